"""The step in plain PyTorch, as fast as we can write it: eager with preallocated memory, and through torch.compile.

A formulation is a way to mix times the rule's row arithmetic, which is read from its coefficients; zeros are left out
and ones are not multiplied with. The parameters of all agents are one matrix [N, D]. It is worked on whole, or in tiles
of columns one after the other, so that what is used again is still in the cache; where the model has many tensors, the
eager formulations also come tensor by tensor. (On the CPU ``torch._foreach_*`` is a loop over the tensors too.)
"""

from __future__ import annotations

import graphlib
import importlib
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from gut_fast.benchmark.contenders import Blocks, Contender, Unavailable, Workload
from gut_fast.buffers import allocate
from gut_fast.mixing import MixingMatrix
from gut_fast.rules import Coefficients
from gut_fast.topology import Topology

__all__ = ["MIXINGS", "Compiled", "Eager", "Mixing"]

MAX_NEIGHBORS = 16
"""With more, pass over pass for each neighbour is far slower than a matrix product."""

MAX_AGENTS_DENSE = 512

TILE = 2**18
"""Numbers in a tile, [N, TILE / N]: 1 MB in float32, the best of several sizes on rings and tori."""


class Mixing(ABC):
    """One way to compute D(i) = Σ_j W[i, j] (S(j) − S(i)) for a matrix S [N, D].

    Raises:
        Unavailable: the topology has no such form.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        mixing = topology.cycle[0]
        if not topology.is_static or not isinstance(mixing, MixingMatrix):
            raise Unavailable(f"{topology} changes from step to step")
        self.mixing, self.csr, self.num_agents, self.dtype = mixing, mixing.csr, topology.num_agents, dtype

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

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
        if self.mixing.group is None:
            raise Unavailable(f"{topology} is not a ring, a torus or another grid that shifts leave unchanged")
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
        return sum(terms, torch.zeros((), dtype=S.dtype)).view_as(S) if terms else torch.zeros_like(S)

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

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
        degree = self.csr.row_start.diff()
        self._check_degree(int(degree.max()))
        rows, place = self.mixing.rows, torch.arange(len(self.csr.neighbor)) - self.csr.row_start[self.mixing.rows]
        width = int(degree.max())
        self.neighbors = torch.arange(self.num_agents).repeat(width, 1)  # who has fewer hears itself, with weight 0
        self.weights = torch.zeros(width, self.num_agents, 1, dtype=torch.float64)
        self.neighbors[place, rows] = self.csr.neighbor
        self.weights[place, rows, 0] = self.csr.weight
        self.same = float(self.weights[0, 0]) if bool((self.weights == self.weights[0, 0]).all()) else None
        self.weights = self.weights.to(dtype)
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
            self.scratch = allocate(S.numel(), S.dtype)
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

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
        if self.num_agents > MAX_AGENTS_DENSE:
            raise Unavailable(f"a dense matrix of {self.num_agents:,} agents; it is tried up to {MAX_AGENTS_DENSE}")
        identity = torch.eye(self.num_agents, dtype=torch.float64)
        self.laplacian = (self.mixing.dense() - identity).to(dtype)

    def drift(self, S: Tensor) -> Tensor:
        """The product."""
        return self.laplacian @ S

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The product."""
        return torch.mm(self.laplacian, S, out=out)


class Mean(Mixing):
    """On the complete graph with equal weights the drift leads to the mean of all."""

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
        n, weight = self.num_agents, self.csr.weight
        if len(weight) != n * (n - 1) or not torch.allclose(weight, torch.full_like(weight, 1 / n)):
            raise Unavailable(f"{topology} is not the complete graph with weights 1/N")

    def drift(self, S: Tensor) -> Tensor:
        """The mean of all minus oneself."""
        return S.mean(0) - S

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The mean of all minus oneself."""
        return torch.sub(S.mean(0), S, out=out)


class TorchSparse(Mixing):
    """(W − I) S with a sparse matrix of torch, CSR."""

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")  # in beta; unchecked invariants
            self.laplacian = torch.sparse_csr_tensor(*_laplacian_csr(self.mixing), dtype=dtype)

    def into(self, out: Tensor, S: Tensor) -> Tensor:
        """The product."""
        return torch.mm(self.laplacian, S, out=out)


class ScipySparse(Mixing):
    """(W − I) S with a sparse matrix of scipy, CSR; one thread."""

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        super().__init__(topology, dtype)
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


@dataclass
class _Block:
    """Rows [N, d] of parameters, states and gradients: side by side, of one tensor, or a tile of columns of these."""

    places: list[Tensor]
    gradient: Tensor

    def tiles(self) -> list[_Block]:
        """Itself in pieces that fit into a cache, as views."""
        width = max(TILE // len(self.gradient), 1)
        split = (tensor.split(width, dim=1) for tensor in (self.gradient, *self.places))
        return [_Block(list(places), gradient) for gradient, *places in zip(*split, strict=True)]

    @staticmethod
    def of(workload: Workload, by_tensor: bool) -> list[_Block]:
        """All the workload's, in memory of their own; gradients are only read, and shared."""
        blocks = []
        for z, g in zip(workload.first_rows(by_tensor), workload.gradient_rows(by_tensor), strict=True):
            dtype = workload.case.storage[1]
            states = [allocate(z.numel(), dtype).view_as(z) for _ in workload.rule.states]
            blocks.append(_Block([z, *states], g))
        return blocks


class Eager(Contender):
    """PyTorch operations one after the other, all in place or into memory allocated before."""

    def __init__(self, workload: Workload, mixing: str, *, by_tensor: bool = False, tiled: bool = False) -> None:
        self.family = "scipy" if mixing == "scipy" else "eager"
        self.names = ("z", *workload.rule.states)
        dtype, state_dtype = workload.case.storage
        if torch.bfloat16 in (dtype, state_dtype):
            raise Unavailable("its arithmetic would be done in bfloat16, which the reference does not equal")
        self.mixing = MIXINGS[mixing](workload.topology, dtype)
        self.coefficients = workload.rule.coefficients(**workload.case.hyperparameters)
        self.order = _safe_order(self.coefficients)
        self.parts = _Block.of(workload, by_tensor)
        self.tiles = [tile for block in self.parts for tile in block.tiles()] if tiled else self.parts
        size = max(tile.gradient.numel() for tile in self.tiles)
        self.messages, self.drifts = ([allocate(size, dtype) for _ in self.coefficients.A] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        for tile in self.tiles:
            self._step(tile.places, tile.gradient)

    def _step(self, places: list[Tensor], gradient: Tensor) -> None:
        z, c = places[0], self.coefficients
        inputs = [*places, gradient]
        messages, drifts = ([b[: z.numel()].view_as(z) for b in each] for each in (self.messages, self.drifts))
        for row, message in zip(c.A, messages, strict=True):
            _write_sum(message, row, inputs)
        drifts = [self.mixing.into(drift, message) for drift, message in zip(drifts, messages, strict=True)]
        for output in self.order:
            row = [*c.B[output], *c.C[output], *c.E[output]]
            _write_sum(places[output], row, [*inputs, *messages, *drifts])

    def blocks(self) -> Blocks:
        """Parameters and state."""
        return {name: [block.places[row] for block in self.parts] for row, name in enumerate(self.names)}


def _safe_order(coefficients: Coefficients) -> list[int]:
    """An order in which the outputs can be written in place: each after all others that read what it overwrites."""
    readers = {
        place: {output for output, row in enumerate(coefficients.B) if row[place] != 0 and output != place}
        for place in range(len(coefficients.B))
    }
    try:
        return list(graphlib.TopologicalSorter(readers).static_order())
    except graphlib.CycleError as error:
        raise Unavailable("its outputs read each other's old values, so none can be written in place") from error


def _write_sum(out: Tensor, row: Sequence[float], terms: Sequence[Tensor]) -> None:
    """``out = Σ row[k] terms[k]`` in as few passes as there are; `out` may be one of the terms."""
    pairs = [(factor, term) for factor, term in zip(row, terms, strict=True) if factor != 0]
    if not pairs:
        out.zero_()
        return
    # What is overwritten goes first; else a term without a factor, which one pass adds to the next.
    pairs.sort(key=lambda pair: 0 if pair[1] is out else 1 if pair[0] == 1 else 2)
    (factor, first), *rest = pairs
    if first is out:
        if factor != 1:
            out.mul_(factor)
    elif factor != 1 or not rest:
        torch.mul(first, factor, out=out)
    else:
        (alpha, second), *rest = rest
        torch.add(first, second, alpha=alpha, out=out)
    for alpha, term in rest:
        out.add_(term, alpha=alpha)


class Compiled(Contender):
    """The whole step as one function under torch.compile, with static shapes and memory allocated before.

    New values go to a second set of buffers, and the two sets take turns: nothing keeps the compiler from fusing
    everything into one loop. A model whose parameters are views needs them where they were: with `in_place` the new z
    is copied back, while the state's buffers still take turns. (Left to itself the compiler stores all new values in
    fresh memory first, which is slower.) bfloat16 is computed in float32.
    """

    family = "compile"

    def __init__(self, workload: Workload, mixing: str, *, tiled: bool = False, in_place: bool = False) -> None:
        self.names = ("z", *workload.rule.states)
        compute = torch.float64 if workload.case.dtype == "float64" else torch.float32
        self.mixing = MIXINGS[mixing](workload.topology, compute)
        (self.current,) = _Block.of(workload, by_tensor=False)
        new = [allocate(place.numel(), place.dtype).view_as(place) for place in self.current.places]
        self.other = _Block(new, self.current.gradient)
        self.in_place, self.tiled = in_place, tiled
        coefficients = workload.rule.coefficients(**workload.case.hyperparameters)
        drift = self.mixing.drift

        def function(places: list[Tensor], gradient: Tensor, new_places: list[Tensor]) -> None:
            inputs = [tensor.to(compute) for tensor in (*places, gradient)]
            messages = [_sum(row, inputs) for row in coefficients.A]
            terms = [*inputs, *messages, *(drift(message) for message in messages)]
            rows = zip(coefficients.B, coefficients.C, coefficients.E, strict=True)
            for place, new in zip(new_places, [_sum([*b, *c, *e], terms) for b, c, e in rows], strict=True):
                place.copy_(new)

        # Code of its own: the compiler counts the variants of a piece of code, and stops at eight.
        own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
        # fullgraph: an error where it would go back to eager without a word.
        self.function = torch.compile(own, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        pairs = zip(self._parts(self.current), self._parts(self.other), strict=True)
        for old, new in pairs:
            self.function(old.places, old.gradient, new.places)
        self.current, self.other = self.other, self.current
        if self.in_place:
            new_z, *_ = self.current.places
            self.current.places[0] = self.other.places[0].copy_(new_z)
            self.other.places[0] = new_z

    def _parts(self, block: _Block) -> list[_Block]:
        return block.tiles() if self.tiled else [block]

    def blocks(self) -> Blocks:
        """Parameters and state."""
        return {name: [place] for name, place in zip(self.names, self.current.places, strict=True)}


def _sum(row: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    parts = [term if factor == 1 else factor * term for factor, term in zip(row, terms, strict=True) if factor != 0]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(terms[0])
