"""The same step in plain PyTorch, as fast as we can write it: eager in memory allocated before, and torch.compile.

Both read the rule's coefficients; zeros are left out and ones are not multiplied with. The parameters of all agents are
one matrix [N, D], worked on whole or in tiles of columns, one after the other, so that what is used again is still in
the cache. Of many formulations these were the fastest, or close to the fastest, in every case.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType

import torch
from torch import Tensor

from gut_fast.bench.step import Contender, MakeContender, Unavailable, Workload
from gut_fast.kernels.backends import HALVES
from gut_fast.kernels.buffers import allocate
from gut_fast.rules import Coefficients

__all__ = ["PEERS"]

TILE = 2**18
"""The numbers in a tile, [N, TILE / N]: 1 MB in float32, the best of several sizes on rings and tori."""

MAX_AGENTS, MAX_NEIGHBORS = 512, 16
"""The largest dense matrix of agents; with more neighbours a pass for each is far slower than a matrix product."""


def eager(workload: Workload) -> Contender:
    """PyTorch operations one after the other, in place or into memory allocated before; D = (W − I) S is dense.

    Raises:
        Unavailable: the topology changes or has too many agents, or something is stored in half precision, in which
            the arithmetic would be done too.
    """
    if not set(HALVES).isdisjoint(workload.case.dtypes):
        raise Unavailable("its arithmetic would be done in half precision, which the reference does not equal")
    z, states, gradient = workload.copies()
    matrix, rule = _laplacian(workload, z.dtype), workload.coefficients
    parts = _tiles([z, *states, gradient]) if workload.device.type == "cpu" else [(z, *states, gradient)]
    scratch = [allocate(parts[0][0].numel(), z.dtype, z.device) for _ in range(2 * len(rule.A))]
    order = _safe_order(rule)

    @torch.no_grad()
    def step() -> None:
        for inputs in parts:
            free = [each[: inputs[0].numel()].view_as(inputs[0]) for each in scratch]
            messages = [_write_sum(S, row, inputs) for S, row in zip(free, rule.A, strict=False)]
            drifts = [torch.mm(matrix, S, out=D) for S, D in zip(messages, free[len(messages) :], strict=True)]
            for output in order:
                row = [*rule.B[output], *rule.C[output], *rule.E[output]]
                _write_sum(inputs[output], row, [*inputs, *messages, *drifts])

    names = ("z", *workload.rule.states)
    return Contender(step, lambda: {name: [place] for name, place in zip(names, (z, *states), strict=True)})


def _safe_order(rule: Coefficients) -> list[int]:
    """An order in which the outputs can be written in place: each after all others that read what it overwrites."""
    readers = {
        place: {output for output, row in enumerate(rule.B) if row[place] != 0 and output != place}
        for place in range(len(rule.B))
    }
    try:
        return list(graphlib.TopologicalSorter(readers).static_order())
    except graphlib.CycleError as error:
        raise Unavailable("its outputs read each other's old values, so none can be written in place") from error


def _write_sum(out: Tensor, row: Iterable[float], terms: Sequence[Tensor]) -> Tensor:
    """``out = Σ row[k] terms[k]`` in as few passes as there are; `out` may be one of the terms."""
    pairs = [(factor, term) for factor, term in zip(row, terms, strict=True) if factor != 0]
    if not pairs:
        return out.zero_()
    # The term that is overwritten goes first; else a term without a factor, which one pass adds to the next term.
    pairs.sort(key=lambda pair: 0 if pair[1] is out else 1 if pair[0] == 1 else 2)
    (factor, first), *rest = pairs
    if first is out:
        out.mul_(factor) if factor != 1 else out
    elif factor != 1 or not rest:
        torch.mul(first, factor, out=out)
    else:
        (alpha, second), *rest = rest
        torch.add(first, second, alpha=alpha, out=out)
    for alpha, term in rest:
        out.add_(term, alpha=alpha)
    return out


def compiled(workload: Workload, *, tiled: bool = False) -> Contender:
    """The whole step as one function under torch.compile, with static shapes and memory allocated before.

    New values go to a second set of matrices, and the two sets take turns, so that nothing keeps the compiler from
    fusing everything into one loop. (A model whose parameters are views would have to copy z back.) Half precision is
    computed in float32. The drift gathers one neighbour after the other, or is a dense product where there are many.

    Raises:
        Unavailable: the topology changes or has too many agents, or tiles are asked for on a GPU.
    """
    if tiled and workload.device.type != "cpu":
        raise Unavailable("tiles are for the caches of a CPU")
    compute = torch.float64 if workload.case.dtype == "float64" else torch.float32
    drift, rule = _drift(workload, compute), workload.coefficients

    def function(old: Sequence[Tensor], gradient: Tensor, new: Sequence[Tensor]) -> None:
        inputs = [tensor.to(compute) for tensor in (*old, gradient)]
        messages = [_sum(row, inputs) for row in rule.A]
        terms = [*inputs, *messages, *map(drift, messages)]
        values = [_sum([*b, *c, *e], terms) for b, c, e in zip(rule.B, rule.C, rule.E, strict=True)]
        for place, value in zip(new, values, strict=True):
            place.copy_(value)

    # The function gets code of its own: the compiler counts the variants of a piece of code, and stops at eight.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    run = torch.compile(own, dynamic=False, fullgraph=True)  # fullgraph: it never goes back to eager unsaid
    z, states, gradient = workload.copies()
    spare = [allocate(place.numel(), place.dtype, place.device).view_as(place) for place in (z, *states)]
    sets, number = [[z, *states], spare], 1 + len(states)

    @torch.no_grad()
    def step() -> None:
        everything = [*sets[0], gradient, *sets[1]]
        for part in _tiles(everything) if tiled else [everything]:
            run(part[:number], part[number], part[number + 1 :])
        sets.reverse()

    names = ("z", *workload.rule.states)
    return Contender(step, lambda: {name: [place] for name, place in zip(names, sets[0], strict=True)})


def _drift(workload: Workload, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function D(S) that `compiled` compiles: one neighbour after the other, or where these are many a product."""
    matrix, W = _laplacian(workload, dtype), workload.topology.matrix().clone().fill_diagonal_(0)
    degree = int((W != 0).sum(1).max())
    if not 1 <= degree <= MAX_NEIGHBORS:
        return lambda S: matrix @ S
    gathered = W.abs().argsort(dim=1, descending=True)[:, :degree]  # who has fewer also hears others, with weight 0
    neighbors = gathered.T.to(workload.device)
    weights = W.gather(1, gathered).T[..., None].to(workload.device, dtype)

    def drift(S: Tensor) -> Tensor:
        total = torch.zeros_like(S)
        for j, weight in zip(neighbors, weights, strict=True):
            total = total + weight * (S[j] - S)
        return total

    return drift


def _laplacian(workload: Workload, dtype: torch.dtype) -> Tensor:
    """W − I as a dense matrix. Raises `Unavailable` if the topology changes or has too many agents."""
    if not workload.topology.is_static:
        raise Unavailable(f"{workload.topology} changes from step to step")
    if workload.num_agents > MAX_AGENTS:
        raise Unavailable(f"a dense matrix of {workload.num_agents:,} agents; it is tried up to {MAX_AGENTS}")
    return (workload.topology.matrix() - torch.eye(workload.num_agents)).to(workload.device, dtype)


def _tiles(places: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The same columns of all matrices [N, D], as views: a tuple of one part of each matrix for every tile."""
    width = max(TILE // len(places[0]), 1)
    return list(zip(*(place.split(width, dim=1) for place in places), strict=True))


def _sum(row: Iterable[float], terms: Sequence[Tensor]) -> Tensor:
    """Σ row[k] terms[k]."""
    parts = [term if factor == 1 else factor * term for factor, term in zip(row, terms, strict=True) if factor != 0]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(terms[0])


PEERS: Mapping[str, MakeContender] = {
    "compile": compiled,
    "compile, tiles": partial(compiled, tiled=True),
    "eager": eager,
}
"""The peers by name."""
