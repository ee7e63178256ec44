"""Ways to mix in plain PyTorch: each computes D(i) = Σ_j W[i, j] (S(j) − S(i)) for a matrix S [N, D]."""

from __future__ import annotations

import importlib
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.benchmark.contenders import Unavailable, Workload
from gut_fast.kernels.buffers import allocate
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["MIXINGS", "Mixing", "Rolls"]

MAX_NEIGHBORS = 16
"""With more, pass over pass for each neighbour is far slower than a matrix product."""

MAX_AGENTS_DENSE = 512


class Mixing(ABC):
    """One way to compute the drift of all agents, in matrices of `dtype` on the workload's device.

    Raises:
        Unavailable: the topology has no such form.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        topology = workload.topology
        mixing = topology.cycle[0]
        if not topology.is_static or not isinstance(mixing, MixingMatrix):
            raise Unavailable(f"{topology} changes from step to step")
        self.topology, self.mixing, self.csr, self.num_agents = topology, mixing, mixing.csr, topology.num_agents
        self.device = workload.device.torch_device

    @abstractmethod
    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """D, in `out` or in new memory."""

    def drift(self, S: Tensor) -> Tensor:
        """D as an expression, for torch.compile."""
        raise NotImplementedError

    def _check_degree(self, degree: int) -> None:
        if degree > MAX_NEIGHBORS:
            raise Unavailable(f"an agent has {degree} neighbours, and this takes one after the other")


class Rolls(Mixing):
    """W is invariant under shifts of a grid, as on rings and tori: neighbours are shifted rows."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        if self.mixing.group is None:
            raise Unavailable(f"{self.topology} is not a ring, a torus or another grid that shifts leave unchanged")
        self.group = group = self.mixing.group
        row = self.mixing.dense_row(0)
        row[0] = 0
        self._check_degree(int(row.count_nonzero()))
        places = row.reshape(group).nonzero().tolist()
        self.shifts = [(tuple(shift), float(row.reshape(group)[tuple(shift)])) for shift in places]
        self.slices = [(*pair, weight) for shift, weight in self.shifts for pair in _shifted(shift, group)]

    def drift(self, S: Tensor) -> Tensor:
        """One roll for each neighbour."""
        grid, axes = S.view(*self.group, -1), tuple(range(len(self.group)))
        terms = [weight * (grid.roll([-s for s in shift], axes) - grid) for shift, weight in self.shifts]
        return sum(terms, torch.zeros((), dtype=S.dtype, device=S.device)).view_as(S) if terms else torch.zeros_like(S)

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """Slices of rows instead of rolls, which would be copies."""
        torch.mul(S, -sum(weight for _, weight in self.shifts), out=out)
        source, total = S.view(*self.group, -1), out.view(*self.group, -1)
        for here, there, weight in self.slices:
            total[here].add_(source[there], alpha=weight)
        return out


def _shifted(shift: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Pairs of regions such that ``total[here] += source[there]`` adds the grid shifted by `shift`, periodically."""
    parts = [
        [(slice(0, n - s), slice(s, n)), (slice(n - s, n), slice(0, s))] if s else [(slice(None), slice(None))]
        for s, n in zip(shift, sizes, strict=True)
    ]
    for pairs in itertools.product(*parts):
        yield tuple(here for here, _ in pairs), tuple(there for _, there in pairs)


class Index(Mixing):
    """Gathers the first neighbour of every agent, then the second, and so on."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        degree = self.csr.row_start.diff()
        self._check_degree(int(degree.max()))
        rows, place = self.mixing.rows, torch.arange(len(self.csr.neighbor)) - self.csr.row_start[self.mixing.rows]
        width = int(degree.max())
        self.neighbors = torch.arange(self.num_agents).repeat(width, 1)  # who has fewer hears itself, with weight 0
        self.weights = torch.zeros(width, self.num_agents, 1, dtype=torch.float64)
        self.neighbors[place, rows] = self.csr.neighbor
        self.weights[place, rows, 0] = self.csr.weight
        self.same = float(self.weights[0, 0]) if bool((self.weights == self.weights[0, 0]).all()) else None
        self.neighbors, self.weights = self.neighbors.to(self.device), self.weights.to(self.device, dtype)
        self.minus_total = -self.weights.sum(0)
        self.scratch = torch.empty(0, dtype=dtype)

    def drift(self, S: Tensor) -> Tensor:
        """One gather for each neighbour."""
        if self.same is not None:
            total = sum((S[j] for j in self.neighbors[1:]), S[self.neighbors[0]])
            return self.same * (total - len(self.neighbors) * S)
        total = torch.zeros_like(S)
        for j, weight in zip(self.neighbors, self.weights, strict=True):
            total = total + weight * (S[j] - S)
        return total

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The same with one scratch matrix."""
        if self.scratch.numel() < S.numel():
            self.scratch = allocate(S.numel(), S.dtype, S.device)
        heard = self.scratch[: S.numel()].view_as(S)
        torch.mul(S, self.minus_total, out=out)
        for j, weight in zip(self.neighbors, self.weights, strict=True):
            torch.index_select(S, 0, j, out=heard)
            if self.same is None:
                out.addcmul_(heard, weight)
            else:
                out.add_(heard, alpha=self.same)
        return out


class Matmul(Mixing):
    """(W − I) S as a dense matrix product."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        if self.num_agents > MAX_AGENTS_DENSE:
            raise Unavailable(f"a dense matrix of {self.num_agents:,} agents; it is tried up to {MAX_AGENTS_DENSE}")
        identity = torch.eye(self.num_agents, dtype=torch.float64)
        self.laplacian = (self.mixing.dense() - identity).to(self.device, dtype)

    def drift(self, S: Tensor) -> Tensor:
        """The product."""
        return self.laplacian @ S

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The product."""
        return torch.mm(self.laplacian, S, out=out)


class Mean(Mixing):
    """On the complete graph with equal weights the drift leads to the mean of all."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        n, weight = self.num_agents, self.csr.weight
        if len(weight) != n * (n - 1) or not torch.allclose(weight, torch.full_like(weight, 1 / n)):
            raise Unavailable(f"{self.topology} is not the complete graph with weights 1/N")

    def drift(self, S: Tensor) -> Tensor:
        """The mean of all minus oneself."""
        return S.mean(0) - S

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The mean of all minus oneself."""
        return torch.sub(S.mean(0), S, out=out)


class TorchSparse(Mixing):
    """(W − I) S with a sparse matrix of torch, CSR."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")  # in beta; unchecked invariants
            self.laplacian = torch.sparse_csr_tensor(*_laplacian_csr(self.mixing), dtype=dtype).to(self.device)

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The product."""
        return torch.mm(self.laplacian, S, out=out)


class ScipySparse(Mixing):
    """(W − I) S with a sparse matrix of scipy, CSR; one thread."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        super().__init__(workload, dtype)
        if workload.device.is_gpu:
            raise Unavailable("scipy computes on the CPU")
        try:
            sparse: Any = importlib.import_module("scipy.sparse")
        except ImportError as error:
            raise Unavailable("scipy is not installed") from error
        row_start, column, value = (each.numpy() for each in _laplacian_csr(self.mixing))
        self.laplacian = sparse.csr_array((value, column, row_start)).astype(torch.empty(0, dtype=dtype).numpy().dtype)

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The product, in new memory."""
        return torch.from_numpy(self.laplacian @ S.numpy())


def _laplacian_csr(mixing: MixingMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """W − I in CSR form, its diagonal included."""
    n = mixing.num_agents
    agents = torch.arange(n)
    rows, columns = torch.cat([mixing.rows, agents]), torch.cat([mixing.csr.neighbor, agents])
    leaving = torch.zeros(n, dtype=torch.float64).index_add(0, mixing.rows, mixing.csr.weight)
    values = torch.cat([mixing.csr.weight, -leaving])
    order = torch.argsort(rows * n + columns)
    row_start = torch.zeros(n + 1, dtype=torch.int64)
    row_start[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return row_start, columns[order], values[order]


MIXINGS: dict[str, type[Mixing]] = {
    "rolls": Rolls,
    "index": Index,
    "matmul": Matmul,
    "mean": Mean,
    "sparse": TorchSparse,
    "scipy": ScipySparse,
}
"""Ways to mix, by name."""
