"""The graphs by name, and topologies of one's own: every constructor of `Topology`.

Graphs get Metropolis–Hastings weights ``W[i, j] = 1 / (1 + max(deg_i, deg_j))``: symmetric, doubly stochastic, and
uniform, ``1 / (1 + deg)``, where the graph is regular. `Topology.with_weights`, `Topology.lazy` and `from_matrix` give
other weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import networkx as nx
import numpy as np

from gut_fast.arguments import as_integer, as_number
from gut_fast.topology.drawn import RandomMatching, RandomShift, ShiftMatching
from gut_fast.topology.finite_time import base_cycle
from gut_fast.topology.mixing import (
    check_connected,
    from_dense,
    from_graph,
    numbered,
    one_peer,
    shifts,
    warn_if_asymmetric,
)
from gut_fast.topology.topology import Topology

__all__ = [
    "base",
    "chain",
    "circulant",
    "complete",
    "dyck",
    "equi_dynamic",
    "equi_static",
    "erdos_renyi",
    "exponential",
    "from_matrix",
    "from_networkx",
    "hypercube",
    "one_peer_exponential",
    "petersen",
    "random_matching",
    "random_regular",
    "ring",
    "sequence",
    "star",
    "torus",
]

DRAWS = 1000
"""The largest number of draws of a random graph until one is connected."""

AS_A_STEP = "as one step of a sequence it may stay so with connected=False"


def ring(n: int) -> Topology:
    """The cycle 0, 1, …, N − 1, 0; two agents share one edge, one agent stands alone (``W = [[1]]``)."""
    n = as_integer(n, "ring: n", minimum=1)
    return _circulant(f"ring({n})", n, [1])


def torus(rows: int, cols: int) -> Topology:
    """The two-dimensional periodic grid: agent ``r * cols + c`` meets the agents above, below, left and right.

    Sides of length 2 have single edges, sides of length 1 none: ``torus(1, n)`` mixes as ``ring(n)``.
    """
    rows, cols = as_integer(rows, "torus: rows", minimum=1), as_integer(cols, "torus: cols", minimum=1)
    grid = nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, cols, periodic=True), ordering="sorted")
    return _static(f"torus({rows}, {cols})", grid, (rows, cols))


def petersen() -> Topology:
    """The Petersen graph: 10 agents, degree 3, diameter 2."""
    return _static("petersen()", nx.petersen_graph())


def dyck() -> Topology:
    """The Dyck graph: 32 agents, degree 3, bipartite, girth 6, diameter 5."""
    return _static("dyck()", nx.LCF_graph(32, [5, -5, 13, -13], 8))


def complete(n: int) -> Topology:
    """The complete graph, ``W = 11ᵀ/N``: exact averaging at every step."""
    n = as_integer(n, "complete: n", minimum=1)
    return _static(f"complete({n})", nx.complete_graph(n), (n,))


def chain(n: int) -> Topology:
    """The path 0, 1, …, N − 1."""
    n = as_integer(n, "chain: n", minimum=1)
    return _static(f"chain({n})", nx.path_graph(n))


def star(n: int) -> Topology:
    """Agent 0 in the middle, joined to each of the others."""
    n = as_integer(n, "star: n", minimum=1)
    return _static(f"star({n})", nx.star_graph(n - 1))


def hypercube(k: int) -> Topology:
    """The hypercube of ``2^k`` agents; agents whose numbers differ in one bit are neighbours."""
    k = as_integer(k, "hypercube: k", minimum=0)
    graph = nx.empty_graph(2**k)
    graph.add_edges_from((agent, agent ^ 1 << bit) for agent in graph for bit in range(k))
    return _static(f"hypercube({k})", graph, (2,) * k)


def exponential(n: int) -> Topology:
    """The static exponential graph, undirected: agent i meets ``i ± 2^k mod N`` for every ``2^k < N``.

    Undirected so that W is symmetric; the graph of Ying et al., "Exponential Graph is Provably Efficient for
    Decentralized Deep Training", NeurIPS 2021, has the edges ``i + 2^k`` alone.
    """
    n = as_integer(n, "exponential: n", minimum=1)
    return _circulant(f"exponential({n})", n, _powers_of_two_below(n))


def circulant(n: int, offsets: Iterable[int]) -> Topology:
    """The circulant graph: agent i meets ``i ± k mod N`` for every given offset k in 1 … N − 1.

    ``circulant(n, (1, 4))`` is what the experiments of the GUT paper's authors call a torus; `torus` is the grid.

    Raises:
        TypeError, ValueError: an offset is not an integer or out of range, or the graph is not connected.
    """
    n = as_integer(n, "circulant: n", minimum=1)
    if not isinstance(offsets, Iterable):
        raise TypeError(f"circulant: offsets must be integers in a tuple or list, such as (1, 2), got {offsets!r}")
    offsets = tuple(as_integer(offset, "circulant: offset", minimum=1) for offset in offsets)
    if max(offsets, default=0) >= n:
        raise ValueError(f"circulant: offset {max(offsets)} must be below n = {n}")
    return _circulant(f"circulant({n}, {offsets})", n, offsets)


def erdos_renyi(n: int, p: float, seed: int) -> Topology:
    """A random graph in which every pair is an edge with probability p; drawn anew from the seed until connected.

    Raises:
        TypeError, ValueError: p is not a probability, or so small that no draw is connected.
    """
    n, seed = as_integer(n, "erdos_renyi: n", minimum=1), as_integer(seed, "erdos_renyi: seed", minimum=0)
    p = as_number(p, "erdos_renyi: p")
    if not 0 <= p <= 1:
        raise ValueError(f"erdos_renyi: p must be in [0, 1], got {p}")
    drawn_p = p if 1 - p < 1 else 0.0  # networkx divides by log(1 − p)
    return _first_connected(
        f"erdos_renyi({n}, {p}, seed={seed})",
        seed,
        lambda rng: nx.fast_gnp_random_graph(n, drawn_p, seed=rng),
        f"p is too small, take one above ln(N)/N = {math.log(n) / n:.2g}",
    )


def random_regular(n: int, d: int, seed: int) -> Topology:
    """A random graph of degree d; drawn anew from the seed until connected.

    Raises:
        TypeError, ValueError: an argument is not an integer, or there is no connected graph of this degree.
    """
    n, d = as_integer(n, "random_regular: n", minimum=1), as_integer(d, "random_regular: d", minimum=0)
    seed = as_integer(seed, "random_regular: seed", minimum=0)
    name = f"random_regular({n}, {d}, seed={seed})"
    if d >= n:
        raise ValueError(f"{name}: the degree d must be below n")
    if n * d % 2:
        raise ValueError(f"{name}: n * d must be even, got {n * d}")
    if d < 2 and n > d + 1:
        raise ValueError(f"{name}: {n} agents of degree {d} cannot be connected, take d >= 2")
    return _first_connected(
        name, seed, lambda rng: nx.random_regular_graph(d, n, seed=rng), "take another seed or a larger d"
    )


def from_networkx(graph: nx.Graph, *, connected: bool = True, name: str | None = None) -> Topology:
    """A topology of any undirected networkx graph, with Metropolis–Hastings weights; edge attributes are not read.

    An agent has the number of its node if the nodes are 0 … N − 1, otherwise the node's place in ``graph.nodes``.

    Args:
        graph: the graph, which is not kept.
        connected: False lets a disconnected graph pass, as one step of a `sequence`.
        name: what to call the topology.

    Raises:
        TypeError: the graph is no networkx graph, directed or a multigraph.
        ValueError: the graph has no node, has a self loop, or is not connected; the message lists the components.
    """
    agents = numbered(graph, "from_networkx")
    return _static(name or f"from_networkx({len(agents)} agents)", agents, connected=connected)


def from_matrix(W: Any, *, connected: bool = True, name: str | None = None) -> Topology:
    """A topology of an explicit mixing matrix: agent i gives weight ``W[i, j]`` to what it receives from agent j.

    Entries may be negative as long as mixing does not diverge. The diagonal is computed as one minus the rest
    of the row, so `matrix` returns W up to rounding.

    Args:
        W: [N, N] tensor, array or nested sequences.
        connected: False lets a disconnected W pass, as one step of a `sequence`.
        name: what to call the topology.

    Raises:
        TypeError: W does not hold real numbers.
        ValueError: W is not square, not finite, has a row that does not sum to one or an eigenvalue outside the unit
            circle, or is not (strongly) connected; the message names the row, entry or components.

    Warns:
        UserWarning: W is asymmetric; the message says what is lost.
    """
    mixing = from_dense(W, "from_matrix")
    name = name or f"from_matrix({mixing.num_agents} agents)"
    if connected and not mixing.is_connected:
        check_connected(mixing.graph(), name, AS_A_STEP)  # which says how it falls apart
    warn_if_asymmetric(mixing, name, stacklevel=2)
    return Topology(name, (mixing,))


def sequence(topologies: Sequence[Topology]) -> Topology:
    """The topology that takes turns among k topologies: step t belongs to number t mod k.

    A member that varies moves on from turn to turn: a periodic one by one step, a random matching draws anew. Members
    may be disconnected (``connected=False`` of `from_matrix` and `from_networkx`), but their union may not.

    Raises:
        TypeError: a member is not a Topology.
        ValueError: there is no member, the members differ in their number of agents, or their union is not connected.
    """
    members = tuple(topologies)
    if not members:
        raise ValueError("sequence: expected at least one topology, got none")
    for place, member in enumerate(members):
        if not isinstance(member, Topology):
            raise TypeError(f"sequence: expected topologies, got {type(member).__name__} at place {place}")
        if member.num_agents != members[0].num_agents:
            raise ValueError(
                f"sequence: {member.name} at place {place} has {member.num_agents} agents, "
                f"{members[0].name} at place 0 has {members[0].num_agents}"
            )
    turns = math.lcm(*(len(member.cycle) for member in members))
    cycle = tuple(member.cycle[turn % len(member.cycle)] for turn in range(turns) for member in members)
    topology = Topology(f"sequence([{', '.join(member.name for member in members)}])", cycle)
    check_connected(topology.graph, topology.name)
    return topology


def one_peer_exponential(n: int) -> Topology:
    """The one-peer exponential graph: at step t agent i averages with agent ``i + 2^(t mod τ) mod N``, τ = ⌈log2 N⌉.

    Both weights are 1/2. The graph is directed and doubly stochastic; τ steps average exactly if N is a power of two.

    Source: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021.
    """
    n = as_integer(n, "one_peer_exponential: n", minimum=1)
    cycle = tuple(one_peer(n, hop) for hop in _powers_of_two_below(n)) or complete(1).cycle
    return Topology(f"one_peer_exponential({n})", cycle)


def base(n: int, k: int = 1) -> Topology:
    """The Base-(k+1) graph: at most k neighbours at each step, symmetric, and exact averages after each period.

    The period is at most ``2 log_{k+1} N + 2`` steps for any N: with k = 1 four for 16 agents, five for 25. Each step
    alone may be disconnected. One agent stands alone.

    Source: Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies for Decentralized Learning
    via Finite-time Convergence", NeurIPS 2023.

    Raises:
        TypeError, ValueError: an argument is not an integer, or k is not in 1 … N − 1 (1 for a single agent).
    """
    n, k = as_integer(n, "base: n", minimum=1), as_integer(k, "base: k", minimum=1)
    if k > max(n - 1, 1):
        raise ValueError(f"base: k = {k} must be below n = {n}, an agent has no more neighbours")
    return Topology(f"base({n}, {k})", base_cycle(n, k))


def equi_static(n: int, degree: int, seed: int, *, directed: bool = False) -> Topology:
    """An EquiTopo graph: the mean of random shifts; with O(log N) of them its rate of consensus does not depend on N.

    Each of M shifts a is drawn from 1 … N − 1, all anew until the graph is connected, and gives the weight
    ``(N − 1)/(N M)`` to agent ``i + a mod N``; the mean over all a is ``11ᵀ/N``. Undirected (U-EquiStatic) half of it
    goes to each of ``i ± a``, so that W is symmetric, as the limits of stability assume; directed (D-EquiStatic) W is
    doubly stochastic only. An agent keeps 1/N for itself, so λ_min may be near −1: `lazy` lifts it.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate",
    NeurIPS 2022.

    Args:
        n: the number of agents.
        degree: the largest number of agents that each one hears; M is half of it, or all of it if directed.
        seed: the seed of the shifts.
        directed: whether agents hear those ahead of them only.

    Raises:
        TypeError, ValueError: an argument is not an integer or out of range, or no graph found is connected.
    """
    n, seed = as_integer(n, "equi_static: n", minimum=1), as_integer(seed, "equi_static: seed", minimum=0)
    num_shifts, odd = divmod(as_integer(degree, "equi_static: degree", minimum=1), 1 if directed else 2)
    if odd or num_shifts > max(n - 1, 1):
        expected = "below n" if directed else "even, two for each shift, and at most 2 (n - 1)"
        raise ValueError(f"equi_static: the degree must be {expected}, got {degree} with n = {n}")
    name = f"equi_static({n}, {degree}, seed={seed}{', directed=True' * directed})"
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        drawn = rng.integers(1, max(n, 2), size=num_shifts).tolist()
        if math.gcd(n, *drawn) == 1:
            return Topology(name, (shifts(n, drawn, directed=directed),))
    raise ValueError(f"{name}: none of {DRAWS} draws is connected; take a larger degree")


def equi_dynamic(n: int, seed: int, *, eta: float = 0.5, directed: bool = False) -> Topology:
    """The one-peer EquiTopo graph: at each step a new shift a, and agent i mixes with agent ``i + a mod N`` or nobody.

    Undirected (OU-EquiDyn) agents pair up along the shift, from a drawn one onwards, so W is symmetric, as the limits
    of stability assume; directed (OD-EquiDyn) each hears the agent ahead of it, and W is doubly stochastic. Weights are
    ``η (N − 1)/N``. The shift of a step depends on the seed and the step alone, so all processes draw the same.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate",
    NeurIPS 2022.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or η is not in (0, 1].
    """
    n, seed = as_integer(n, "equi_dynamic: n", minimum=1), as_integer(seed, "equi_dynamic: seed", minimum=0)
    eta = as_number(eta, "equi_dynamic: eta")
    if not 0 < eta <= 1:
        raise ValueError(f"equi_dynamic: eta must be in (0, 1], got {eta}")
    name = f"equi_dynamic({n}, seed={seed}, eta={eta}{', directed=True' * directed})"
    return Topology(name, ((RandomShift if directed else ShiftMatching)(n, seed, eta),))


def random_matching(n: int, seed: int) -> Topology:
    """A uniformly random maximal matching at every step: pairs average, an odd agent out rests.

    The pairs of a step depend on the seed and the step alone, so all processes draw the same.
    """
    n, seed = as_integer(n, "random_matching: n", minimum=1), as_integer(seed, "random_matching: seed", minimum=0)
    return Topology(f"random_matching({n}, seed={seed})", (RandomMatching(n, seed),))


def _powers_of_two_below(n: int) -> list[int]:
    return [2**k for k in range((n - 1).bit_length())]


def _circulant(name: str, n: int, offsets: Iterable[int]) -> Topology:
    return _static(name, nx.circulant_graph(n, [offset for offset in offsets if offset % n]), (n,))


def _static(name: str, graph: nx.Graph, group: tuple[int, ...] | None = None, *, connected: bool = True) -> Topology:
    if connected:
        check_connected(graph, name, "" if group else AS_A_STEP)
    return Topology(name, (from_graph(graph, "metropolis", group),))


def _first_connected(name: str, seed: int, draw: Callable[[random.Random], nx.Graph], advice: str) -> Topology:
    rng = random.Random(seed)
    for _ in range(DRAWS):
        graph = draw(rng)
        if nx.is_connected(graph):
            return _static(name, graph)
    raise ValueError(f"{name}: none of {DRAWS} draws is connected; {advice}")
