"""Mixing matrices: how much each agent takes over from each neighbour.

A mixing matrix ``W`` [N, N] has rows that sum to one; ``W[i, j]`` is the weight that agent i gives to what it receives
from agent j. Gossip is ``x_i ← x_i + Σ_j W[i, j] (x_j − x_i)``, so only the off-diagonal entries ever act: they are
stored, as CSR, and the diagonal follows from them, ``W[i, i] = 1 − Σ_{j≠i} W[i, j]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CSR",
    "WEIGHTS",
    "MixingMatrix",
    "check_connected",
    "from_dense",
    "from_edges",
    "from_graph",
    "listed",
    "nobody",
    "numbered",
    "one_peer",
    "shifts",
    "warn_if_asymmetric",
]

WEIGHTS = ("metropolis", "uniform")
"""The weights that a graph determines: ``1 / (1 + max(deg_i, deg_j))`` and ``1 / (1 + deg_i)``."""

TOLERANCE = 1e-6
"""The largest accepted error of a row sum, a symmetric pair or an eigenvalue: enough for a W made in float32."""


class CSR(NamedTuple):
    """The off-diagonal nonzeros of W, row by row in ascending column order.

    Row i is ``neighbor[row_start[i] : row_start[i + 1]]``, with its weights at the same places. The tensors are shared:
    read them, never write to them.
    """

    row_start: Tensor
    """The first entry of each row, and the number of entries: int64 [N + 1]."""
    neighbor: Tensor
    """The column j of each entry: int64 [nnz]."""
    weight: Tensor
    """The weight W[i, j] of each entry: float64 [nnz]."""


@lru_cache(maxsize=64)
def nobody(num_agents: int, device: torch.device) -> CSR:
    """The CSR of a step in which no agent hears another."""
    starts = torch.zeros(num_agents + 1, dtype=torch.int64, device=device)
    return CSR(starts, starts[:0], torch.zeros(0, dtype=torch.float64, device=device))


@dataclass(frozen=True, eq=False)
class MixingMatrix:
    """One mixing matrix W, stored sparsely; its spectrum and copies on other devices are made at the first use.

    Args:
        csr: the off-diagonal entries, on the CPU.
        group: sizes (n_1, …, n_k), Πn = N, if W is symmetric and invariant under the shifts of the periodic grid
            n_1 × … × n_k that the agents form in row-major order, as on rings, tori and hypercubes. The eigenvalues
            of W are then the Fourier transform of its first row: exact, and fast at any size.
        gamma: the averaging rate γ that `lazy` has applied.
    """

    csr: CSR
    group: tuple[int, ...] | None = None
    gamma: float = 1.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MixingMatrix):
            return NotImplemented
        return all(torch.equal(mine, theirs) for mine, theirs in zip(self.csr, other.csr, strict=True))

    def __hash__(self) -> int:
        return hash((self.num_agents, len(self.csr.neighbor)))

    def __reduce__(self) -> tuple[type[MixingMatrix], tuple[Any, ...]]:
        return MixingMatrix, (self.csr, self.group, self.gamma)

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return len(self.csr.row_start) - 1

    def at(self, step: int) -> MixingMatrix:
        """The matrix itself, at every step."""
        return self

    def on(self, device: str | torch.device) -> CSR:
        """The CSR arrays on `device`, the same tensors at every call."""
        known = self._on_device.get(device)
        return self._copy_to(device) if known is None else known

    @cached_property
    def _on_device(self) -> dict[str | torch.device, CSR]:
        return {}

    def _copy_to(self, device: str | torch.device) -> CSR:
        concrete = torch.empty(0, device=device).device
        if concrete not in self._on_device:
            self._on_device[concrete] = CSR(*(values.to(concrete) for values in self.csr))
        # "cuda" is another device once the caller changes the current one, so only full names are remembered.
        if torch.device(device) == concrete:
            self._on_device[device] = self._on_device[concrete]
        return self._on_device[concrete]

    @cached_property
    def rows(self) -> Tensor:
        """The row of every entry of the CSR arrays, int64 [nnz]."""
        return torch.from_numpy(np.repeat(np.arange(self.num_agents), self.csr.row_start.diff().numpy()))

    def dense(self) -> Tensor:
        """The matrix W as a new float64 [N, N] tensor."""
        W = torch.diag(1 - _sums(self.num_agents, self.rows, self.csr.weight))
        W[self.rows, self.csr.neighbor] = self.csr.weight
        return W

    def dense_row(self, agent: int) -> Tensor:
        """A row of W as a new float64 [N] tensor."""
        start, end = self.csr.row_start[agent : agent + 2].tolist()
        row = torch.zeros(self.num_agents, dtype=torch.float64, device="cpu")
        row[self.csr.neighbor[start:end]] = self.csr.weight[start:end]
        row[agent] = 1 - row.sum()
        return row

    def neighbors(self, agent: int) -> list[int]:
        """The agents j ≠ i with ``W[i, j] ≠ 0``, ascending."""
        start, end = self.csr.row_start[agent : agent + 2].tolist()
        neighbors: list[int] = self.csr.neighbor[start:end].tolist()
        return neighbors

    def graph(self) -> nx.Graph:
        """A new graph of the nonzeros: undirected for a symmetric pattern, else with edges j → i where i hears j."""
        graph: nx.Graph = nx.DiGraph() if self.is_directed else nx.Graph()
        graph.add_nodes_from(range(self.num_agents))
        graph.add_edges_from(zip(self.csr.neighbor.tolist(), self.rows.tolist(), strict=True))
        return graph

    def lazy(self, gamma: float) -> MixingMatrix:
        """The matrix ``I + γ (W − I)``."""
        return MixingMatrix(self.csr._replace(weight=gamma * self.csr.weight), self.group, gamma * self.gamma)

    def without(self, agents: Collection[int]) -> MixingMatrix:
        """The matrix of the other agents, renumbered in order: the same pairs in both directions, Metropolis–Hastings
        weights, the same γ.
        """
        graph = self.graph().to_undirected()
        graph.remove_nodes_from(agents)
        return from_graph(nx.convert_node_labels_to_integers(graph), "metropolis").lazy(self.gamma)

    def with_weights(self, weights: str) -> MixingMatrix:
        """The matrix of the same graph with these weights; raises ValueError if the graph is directed."""
        graph = self.graph()
        if graph.is_directed():
            raise ValueError(f"the graph is directed; {weights} weights need an undirected one")
        return from_graph(graph, weights, self.group)

    @cached_property
    def _transposed(self) -> CSR:
        return _sorted_csr(self.num_agents, self.csr.neighbor, self.rows, self.csr.weight)

    @cached_property
    def is_directed(self) -> bool:
        """True if some agent hears another that does not hear it."""
        return not all(torch.equal(self.csr[array], self._transposed[array]) for array in range(2))

    @cached_property
    def is_symmetric(self) -> bool:
        """True if ``W = Wᵀ``."""
        return not self.is_directed and _close(self.csr.weight, self._transposed.weight)

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """True if the columns sum to one, as the rows do, so that mixing keeps the average over agents."""
        given, taken = (_sums(self.num_agents, index, self.csr.weight) for index in (self.csr.neighbor, self.rows))
        return _close(given, taken)

    @cached_property
    def is_normal(self) -> bool:
        """True if ``W Wᵀ = Wᵀ W``, so that eigenvectors of W are orthogonal: seen on a random vector, in O(N²)."""
        if self.is_symmetric:
            return True
        W, x = self.dense(), torch.from_numpy(np.random.default_rng(0).standard_normal(self.num_agents))
        return _close(W @ (W.T @ x), W.T @ (W @ x))

    @cached_property
    def is_connected(self) -> bool:
        """True if every agent hears of every other in time: the graph is connected, or strongly so if directed."""
        return all(_reaches_everyone(csr) for csr in (self.csr, self._transposed))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """All N eigenvalues by descending real part: float64 where W is symmetric, else complex128."""
        if self.group is not None:
            transformed = np.fft.fftn(self.dense_row(0).reshape(self.group).numpy()).real
            eigenvalues = torch.from_numpy(transformed.flatten())
        elif self.is_symmetric:
            eigenvalues = torch.linalg.eigvalsh(self.dense())
        else:
            eigenvalues = torch.linalg.eigvals(self.dense())
        return eigenvalues[eigenvalues.real.argsort(descending=True)]


def shifts(num_agents: int, hops: Sequence[int], *, directed: bool) -> MixingMatrix:
    """The mean of EquiTopo's basis graphs: agent i hears ``(i + hop) mod N`` of every hop, or both ``(i ± hop) mod N``.

    A hop has the weight ``(N − 1)/N`` over the number of hops; hops that meet add up.
    """
    both_ways = np.array([hop % num_agents for given in hops for hop in ([given] if directed else [given, -given])])
    hop, counts = np.unique(both_ways[both_ways > 0], return_counts=True)
    agents = np.arange(num_agents)
    rows, columns = np.broadcast_arrays(agents[:, None], (agents[:, None] + hop) % num_agents)
    weight = np.broadcast_to((num_agents - 1) / num_agents * counts / len(both_ways), rows.shape)
    entries = (torch.from_numpy(values.flatten()) for values in (rows, columns, weight))
    return MixingMatrix(_sorted_csr(num_agents, *entries), None if directed else (num_agents,))


def one_peer(num_agents: int, hop: int) -> MixingMatrix:
    """The directed W in which agent i averages with agent ``(i + hop) mod N``, 0 < hop < N, with weights 1/2."""
    agents = torch.arange(num_agents, device="cpu")
    weight = torch.full((num_agents,), 0.5, dtype=torch.float64, device="cpu")
    return MixingMatrix(_sorted_csr(num_agents, agents, (agents + hop) % num_agents, weight))


def from_graph(graph: nx.Graph, weights: str, group: tuple[int, ...] | None = None) -> MixingMatrix:
    """The W of an undirected graph on the nodes 0 … N − 1 without self loops, with `weights` out of `WEIGHTS`.

    Metropolis–Hastings weights ``1 / (1 + max(deg_i, deg_j))`` are symmetric on any graph; uniform weights
    ``1 / (1 + deg_i)`` equal them where all degrees are the same.

    Source: Xiao, Boyd, Kim, "Distributed average
    consensus with least-mean-square deviation", JPDC 2007.
    """
    num_agents = graph.number_of_nodes()
    edges = torch.tensor(list(graph.edges), dtype=torch.int64, device="cpu").reshape(-1, 2)
    rows, columns = torch.cat([edges, edges.flip(1)]).T
    degree = torch.bincount(rows, minlength=num_agents)
    counted = torch.maximum(degree[rows], degree[columns]) if weights == "metropolis" else degree[rows]
    return MixingMatrix(_sorted_csr(num_agents, rows, columns, 1 / (1 + counted.double())), group)


def from_edges(num_agents: int, pairs: Tensor, weight: Tensor) -> MixingMatrix:
    """The symmetric W in which the agents of each of the distinct pairs, int64 [m, 2], give each other its weight."""
    rows, columns = torch.cat([pairs, pairs.flip(1)]).T
    return MixingMatrix(_sorted_csr(num_agents, rows, columns, weight.repeat(2)))


def numbered(graph: nx.Graph, name: str) -> nx.Graph:
    """The graph with agents for nodes: nodes 0 … N − 1 keep their names, others get their places in ``graph.nodes``.

    Raises:
        TypeError: the graph is no networkx graph, directed or a multigraph; `name` opens the message.
        ValueError: the graph has no node, or has a self loop.
    """
    if not isinstance(graph, nx.Graph) or graph.is_directed() or graph.is_multigraph():
        raise TypeError(
            f"{name}: expected an undirected networkx.Graph, got {type(graph).__name__}; directed or weighted mixing "
            "goes through from_matrix"
        )
    if not graph:
        raise ValueError(f"{name}: the graph has no node, a topology needs at least one agent")
    for node in nx.nodes_with_selfloops(graph):
        raise ValueError(f"{name}: node {node!r} has a self loop; an agent's own weight follows by itself")
    in_order = set(graph) == set(range(len(graph)))
    return graph if in_order else nx.convert_node_labels_to_integers(graph)


def from_dense(W: Any, name: str) -> MixingMatrix:
    """The mixing matrix of an explicit W, a tensor, an array or nested sequences; entries may be negative.

    Raises:
        TypeError: W does not hold real numbers.
        ValueError: W is not square or empty, has an entry that is not finite or a row that does not sum to one, or an
            eigenvalue outside the unit circle, so that gossip would diverge; `name` opens the message.
    """
    dense = _as_square(W, name)
    _check_rows(dense, name)
    rows, columns = (dense - torch.diag(dense.diagonal())).nonzero(as_tuple=True)
    mixing = MixingMatrix(_sorted_csr(len(dense), rows, columns, dense[rows, columns]))
    if bool((dense < 0).any()):  # rows that sum to one keep every eigenvalue inside if no entry is negative
        _check_bounded(mixing, name)
    return mixing


def _as_square(W: Any, name: str) -> Tensor:
    try:
        values = W.detach().cpu().to_dense() if isinstance(W, Tensor) else torch.from_numpy(np.array(W))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: W must be an [N, N] matrix of real numbers: {error}") from error
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: W must hold real numbers, got {values.dtype}")
    if values.dim() != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ValueError(f"{name}: W must be square, [N, N] with N >= 1, got shape {tuple(values.shape)}")
    return values.to(torch.float64)


def _check_rows(W: Tensor, name: str) -> None:
    for row, column in (~W.isfinite()).nonzero()[:1].tolist():
        raise ValueError(f"{name}: W[{row}, {column}] is {W[row, column]}; every entry must be finite")
    sums = W.sum(1)
    bad_rows: list[int] = ((sums - 1).abs() > TOLERANCE).nonzero().flatten().tolist()
    if bad_rows:
        row, total = bad_rows[0], float(sums[bad_rows[0]])
        others = f" ({len(bad_rows)} such rows)" if len(bad_rows) > 1 else ""
        negative = "a negative row sum, " if total < 0 else ""
        raise ValueError(f"{name}: row {row} of W sums to {total:.6g}, {negative}expected 1{others}")


def _check_bounded(mixing: MixingMatrix, name: str) -> None:
    eigenvalues = mixing.eigenvalues
    largest = eigenvalues[eigenvalues.abs().argmax()]
    if largest.abs() > 1 + TOLERANCE:
        diagonal = mixing.dense().diagonal()
        row = int(diagonal.argmin())
        raise ValueError(
            f"{name}: W has the eigenvalue {largest.item():.4g} outside the unit circle, so mixing diverges; look at "
            f"its negative entries (smallest diagonal: W[{row}, {row}] = {float(diagonal[row]):.4g})"
        )


def check_connected(graph: nx.Graph, name: str, advice: str = "") -> None:
    """Raises ValueError with a list of the components unless every agent hears of every other in time."""
    directed = graph.is_directed()
    find_components: Any = nx.strongly_connected_components if directed else nx.connected_components
    components = list(find_components(graph))
    if len(components) > 1:
        raise ValueError(
            f"{name} is not {'strongly ' if directed else ''}connected, so its agents cannot agree; it falls into "
            f"{listed(components)}{advice and '; '}{advice}"
        )


def listed(components: Collection[Collection[int]]) -> str:
    """A text that says how many components there are, and describes the first eight."""
    parts = [f"{len(component)} with agent {min(component)}" for component in sorted(components, key=min)]
    return f"{len(parts)} components, of sizes {', '.join(parts[:8])}{', …' if len(parts) > 8 else ''}"


def warn_if_asymmetric(mixing: MixingMatrix, name: str, stacklevel: int) -> None:
    """Warns if W is not symmetric, and says what is lost."""
    if mixing.is_symmetric:
        return
    if mixing.is_doubly_stochastic:
        lost = (
            "its columns sum to one, so the average over agents is kept, but its eigenvalues may be complex and "
            "stability limits that assume a symmetric W do not hold"
        )
    else:
        lost = (
            "its columns do not sum to one (not doubly stochastic), so mixing does not keep the average over agents: "
            "they drift to a weighted average, and methods converge to the optimum of a weighted objective"
        )
    warnings.warn(f"{name}: W is asymmetric; {lost}", UserWarning, stacklevel=stacklevel + 1)


def _reaches_everyone(csr: CSR) -> bool:
    """True if all agents are found from agent 0 along the rows of the arrays, level by level."""
    row_start, neighbor = csr.row_start.numpy(), csr.neighbor.numpy()
    is_found = np.zeros(len(row_start) - 1, dtype=bool)
    level = np.zeros(1, dtype=np.int64)
    while len(level):
        is_found[level] = True
        is_next = np.zeros_like(is_found)
        for agent in level:
            is_next[neighbor[row_start[agent] : row_start[agent + 1]]] = True
        level = np.flatnonzero(is_next & ~is_found)
    return bool(is_found.all())


def _sums(num_agents: int, index: Tensor, weight: Tensor) -> Tensor:
    return torch.zeros(num_agents, dtype=torch.float64, device="cpu").index_add(0, index, weight)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def _sorted_csr(num_agents: int, rows: Tensor, columns: Tensor, weight: Tensor) -> CSR:
    order = torch.argsort(rows * num_agents + columns)
    row_start = torch.zeros(num_agents + 1, dtype=torch.int64, device="cpu")
    row_start[1:] = torch.bincount(rows, minlength=num_agents).cumsum(0)
    return CSR(row_start, columns[order], weight[order])
