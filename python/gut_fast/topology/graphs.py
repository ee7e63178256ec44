"""Topologies: which agents talk to each other at each step, and with what weights.

A `Topology` gives a mixing matrix W [N, N] for every step. Graphs get Metropolis–Hastings weights
``W[i, j] = 1 / (1 + max(deg_i, deg_j))``: symmetric, doubly stochastic, and uniform, ``1 / (1 + deg)``, where the graph
is regular. Other weights: `Topology.with_weights`, `Topology.lazy`, `from_matrix`.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from gut_fast.topology.mixing import (
    CSR,
    WEIGHTS,
    MixingMatrix,
    RandomMatching,
    as_integer,
    as_number,
    check_connected,
    from_dense,
    from_graph,
    listed,
    numbered,
    one_peer,
    warn_if_asymmetric,
)

__all__ = [
    "CSR",
    "Topology",
    "chain",
    "circulant",
    "complete",
    "dyck",
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
"""How often a random graph is drawn anew until it is connected."""

AS_A_STEP = "as one step of a sequence it may stay so with connected=False"


@dataclass(frozen=True, repr=False)
class Topology:
    """A cycle of k mixing matrices: step t mixes with number t mod k. A static topology has k = 1.

    Made by the functions of this module. Immutable; equal to another one of the same name that mixes in the same way.

    Args:
        name: the call that makes it, for example ``"ring(16).lazy(0.5)"``.
        cycle: the mixing matrices; a `RandomMatching` among them draws a new one at each of its steps.
    """

    name: str
    cycle: tuple[MixingMatrix | RandomMatching, ...]

    def __repr__(self) -> str:
        return self.name

    @property
    def num_agents(self) -> int:
        """N."""
        return self.cycle[0].num_agents

    @property
    def period(self) -> int | None:
        """After how many steps it repeats: 1 if it is static, None if never."""
        return len(self.cycle) if all(isinstance(mixing, MixingMatrix) for mixing in self.cycle) else None

    @property
    def is_static(self) -> bool:
        """Whether all steps are the same."""
        return self.period == 1

    @property
    def graph(self) -> nx.Graph:
        """All pairs that ever talk: a new graph on the agents 0 … N − 1; if some talk one way, with edges j → i."""
        graphs = [mixing.graph() for mixing in self.cycle]
        if any(graph.is_directed() for graph in graphs):
            graphs = [graph.to_directed() for graph in graphs]
        return nx.compose_all(graphs)

    def matrix(self, step: int = 0) -> Tensor:
        """W at a step: a new float64 [N, N] tensor on the CPU."""
        return self._mixing_at(step).dense()

    def csr(self, step: int = 0, device: str | torch.device = "cpu") -> CSR:
        """The off-diagonal nonzeros of W at a step, on `device`; kept, so that the next call costs a look-up."""
        return self._mixing_at(step).on(device)

    def neighbors(self, i: int, step: int = 0) -> list[int]:
        """The agents that agent i hears at a step, ascending, itself not among them."""
        agent = as_integer(i, f"{self.name}: agent", minimum=0)
        if agent >= self.num_agents:
            raise ValueError(f"{self.name} has no agent {agent}; its agents are 0 … {self.num_agents - 1}")
        return self._mixing_at(step).neighbors(agent)

    def lazy(self, gamma: float) -> Topology:
        """The topology with ``W_γ = I + γ (W − I)`` at every step, γ in (0, 1].

        Raises:
            TypeError, ValueError: γ is not a number or not in (0, 1].
        """
        gamma = as_number(gamma, f"{self.name}.lazy: gamma")
        if not 0 < gamma <= 1:
            raise ValueError(f"{self.name}.lazy: gamma must be in (0, 1], got {gamma}")
        return Topology(f"{self.name}.lazy({gamma})", tuple(mixing.lazy(gamma) for mixing in self.cycle))

    def with_weights(self, weights: str) -> Topology:
        """The same graph with "metropolis" or "uniform" weights; those it had, lazy ones too, are replaced.

        Raises:
            ValueError: unknown weights, or a directed graph.

        Warns:
            UserWarning: W is asymmetric, as with uniform weights on a graph that is not regular.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"{self.name}: unknown weights {weights!r}; known are {', '.join(map(repr, WEIGHTS))}")
        name = f"{self.name}.with_weights({weights!r})"
        topology = Topology(name, tuple(mixing.with_weights(weights) for mixing in self.cycle))
        for step in range(len(self.cycle)):
            warn_if_asymmetric(topology._mixing_at(step), name, stacklevel=2)
        return topology

    def without(self, agents: Iterable[int]) -> Topology:
        """The topology of the agents that are left, renumbered in order, doubly stochastic at every step.

        Pairs that talked still do, both ways. Weights are Metropolis–Hastings ones, whatever they were; the γ of `lazy`
        is kept. Random matchings are drawn anew among those left.

        Raises:
            TypeError, ValueError: there is no such agent, or nobody is left.

        Warns:
            UserWarning: the graph falls apart; the message lists the components, by the agents' numbers here.
        """
        gone = sorted({as_integer(agent, f"{self.name}.without: agent", minimum=0) for agent in agents})
        if gone and gone[-1] >= self.num_agents:
            raise ValueError(f"{self.name} has no agent {gone[-1]}; its agents are 0 … {self.num_agents - 1}")
        if len(gone) == self.num_agents:
            raise ValueError(f"{self.name}.without: nobody is left of {self.num_agents} agents")
        graph = self.graph.to_undirected()
        graph.remove_nodes_from(gone)
        components = list(nx.connected_components(graph))
        if len(components) > 1:
            warnings.warn(f"{self.name} without {gone} falls into {listed(components)}", UserWarning, stacklevel=2)
        return Topology(f"{self.name}.without({gone})", tuple(mixing.without(gone) for mixing in self.cycle))

    @property
    def eigenvalues(self) -> Tensor:
        """The N eigenvalues of W by descending real part: float64 [N] where W is symmetric, else complex128.

        From a Fourier transform, at any size, on ring, torus, complete, hypercube, exponential and circulant; elsewhere
        by dense linear algebra in O(N³): on two cores 1 s at 2,048 agents, 4 s at 4,096. Computed once.

        Raises:
            RuntimeError: the topology is not static; so do the three below.
        """
        return self._spectrum().clone()

    @property
    def lambda_2(self) -> float:
        """Largest real part of the eigenvalues but the leading 1; 0 for a single agent, which has no other."""
        return float(self._consensus_spectrum()[0].real)

    @property
    def lambda_min(self) -> float:
        """Smallest real part of the eigenvalues but the leading 1; 0 for a single agent, which has no other."""
        return float(self._consensus_spectrum()[-1].real)

    @property
    def spectral_gap(self) -> float:
        """1 minus the largest modulus of the eigenvalues but the leading 1: ``1 − max(|λ_2|, |λ_min|)`` if W = Wᵀ.

        That modulus is the factor by which a step of plain gossip shrinks the slowest consensus mode.
        """
        return 1 - float(self._consensus_spectrum().abs().max())

    def _mixing_at(self, step: int) -> MixingMatrix:
        step = as_integer(step, "step", minimum=0)
        return self.cycle[step % len(self.cycle)].at(step)

    def _spectrum(self) -> Tensor:
        if not self.is_static:
            raise RuntimeError(
                f"{self.name} changes from step to step and has no single spectrum; look at one step with "
                "torch.linalg.eigvals(topology.matrix(step))"
            )
        return self._mixing_at(0).eigenvalues

    def _consensus_spectrum(self) -> Tensor:
        return self._spectrum()[1:] if self.num_agents > 1 else torch.zeros(1, dtype=torch.float64)


def ring(n: int) -> Topology:
    """Every agent between two neighbours; two agents share one edge, one agent stands alone (``W = [[1]]``)."""
    n = as_integer(n, "ring: n", minimum=1)
    return _circulant(f"ring({n})", n, [1])


def torus(rows: int, cols: int) -> Topology:
    """The two-dimensional periodic grid: agent ``r * cols + c`` meets those above, below, left and right.

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
    """Everyone with everyone, ``W = 11ᵀ/N``: exact averaging at every step."""
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
    """``2^k`` agents; those whose numbers differ in one bit are neighbours."""
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
    """Agent i meets ``i ± k mod N`` for every offset k in 1 … N − 1.

    ``circulant(n, (1, 4))`` is what the experiments of the GUT paper's authors call a torus; `torus` is the grid.

    Raises:
        TypeError, ValueError: an offset is not an integer or out of range, or the graph is not connected.
    """
    n = as_integer(n, "circulant: n", minimum=1)
    offsets = tuple(as_integer(offset, "circulant: offset", minimum=1) for offset in offsets)
    if max(offsets, default=0) >= n:
        raise ValueError(f"circulant: offset {max(offsets)} must be below n = {n}")
    return _circulant(f"circulant({n}, {offsets})", n, offsets)


def erdos_renyi(n: int, p: float, seed: int) -> Topology:
    """Every pair is an edge with probability p; drawn anew, as the seed determines, until connected.

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
    """A random graph of degree d; drawn anew, as the seed determines, until connected.

    Raises:
        TypeError, ValueError: not integers, or there is no connected graph of this degree.
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
    """Any undirected networkx graph, with Metropolis–Hastings weights; attributes of its edges are not read.

    Agents have the numbers of the nodes if these are 0 … N − 1, else their places in ``graph.nodes``.

    Args:
        graph: the graph, which is not kept.
        connected: False lets a disconnected graph pass, as one step of a `sequence`.
        name: what to call the topology.

    Raises:
        TypeError: not a graph, a directed graph or a multigraph.
        ValueError: no node, a self loop, or not connected; the message lists the components.
    """
    agents = numbered(graph, "from_networkx")
    return _static(name or f"from_networkx({len(agents)} agents)", agents, connected=connected)


def from_matrix(W: Any, *, connected: bool = True, name: str | None = None) -> Topology:
    """An explicit mixing matrix: agent i gives weight ``W[i, j]`` to what it receives from agent j.

    Entries may be negative as long as mixing does not diverge. The diagonal is what the rest of a row leaves to one, so
    `matrix` returns W up to rounding.

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
    if connected:
        check_connected(mixing.graph(), name, AS_A_STEP)
    warn_if_asymmetric(mixing, name, stacklevel=2)
    return Topology(name, (mixing,))


def sequence(topologies: Sequence[Topology]) -> Topology:
    """Takes turns among k topologies: step t belongs to number t mod k.

    One that varies goes on from turn to turn: a periodic one by one step of its own, a random matching draws anew.
    Single steps may be disconnected (``connected=False`` of `from_matrix` and `from_networkx`), their union may not.

    Raises:
        TypeError: a member is not a Topology.
        ValueError: no members, different numbers of agents, or the union is not connected.
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
    """At step t agent i averages with agent ``i + 2^(t mod τ) mod N``, τ = ⌈log2 N⌉, weights 1/2 and 1/2.

    Directed and doubly stochastic; τ steps average exactly if N is a power of two. Source: Ying et al., "Exponential
    Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021.
    """
    n = as_integer(n, "one_peer_exponential: n", minimum=1)
    cycle = tuple(one_peer(n, hop) for hop in _powers_of_two_below(n)) or complete(1).cycle
    return Topology(f"one_peer_exponential({n})", cycle)


def random_matching(n: int, seed: int) -> Topology:
    """At every step a uniformly random maximal matching: pairs average, an odd agent out rests.

    A step's pairs depend on the seed and the step alone, so all processes draw the same.
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
