"""The step in plain PyTorch, as fast as we can write it: eager with preallocated memory, and through torch.compile.

A formulation is a way to mix times the rule's row arithmetic, which is read from its coefficients; zeros are left out
and ones are not multiplied with. The parameters of all agents are one matrix [N, D]. It is worked on whole, or in tiles
of columns one after the other, so that what is used again is still in the cache; where the model has many tensors, the
eager formulations also come tensor by tensor. (On the CPU ``torch._foreach_*`` is a loop over the tensors too; on a GPU
one matrix for all tensors saves the launches that it would.)
"""

from __future__ import annotations

import graphlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from gut_fast.benchmark.contenders import Blocks, Contender, Unavailable, Workload
from gut_fast.benchmark.mixings import MIXINGS
from gut_fast.kernels.buffers import allocate
from gut_fast.rules import Coefficients

__all__ = ["Compiled", "Eager"]

TILE = 2**18
"""Numbers in a tile, [N, TILE / N]: 1 MB in float32, the best of several sizes on rings and tori."""


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
            states = [allocate(z.numel(), dtype, z.device).view_as(z) for _ in workload.rule.states]
            blocks.append(_Block([z, *states], g))
        return blocks


class Eager(Contender):
    """PyTorch operations one after the other, all in place or into memory allocated before."""

    def __init__(self, workload: Workload, mixing: str, *, by_tensor: bool = False, tiled: bool = False) -> None:
        self.family = "scipy" if mixing == "scipy" else "eager"
        self.names = ("z", *workload.rule.states)
        if workload.case.stores_halves:
            raise Unavailable("its arithmetic would be done in half precision, which the reference does not equal")
        dtype, device = workload.case.storage[0], workload.device.torch_device
        self.mixing = MIXINGS[mixing](workload, dtype)
        self.coefficients = workload.rule.coefficients(**workload.case.hyperparameters)
        self.order = _safe_order(self.coefficients)
        self.parts = _Block.of(workload, by_tensor)
        self.tiles = [tile for block in self.parts for tile in block.tiles()] if tiled else self.parts
        size = max(tile.gradient.numel() for tile in self.tiles)
        self.messages, self.drifts = ([allocate(size, dtype, device) for _ in self.coefficients.A] for _ in range(2))

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
    fresh memory first, which is slower.) Half precision is computed in float32. `mode` is `torch.compile`'s.
    """

    family = "compile"

    def __init__(
        self,
        workload: Workload,
        mixing: str,
        *,
        tiled: bool = False,
        in_place: bool = False,
        mode: str | None = None,
    ) -> None:
        self.names = ("z", *workload.rule.states)
        compute = torch.float64 if workload.case.dtype == "float64" else torch.float32
        self.mixing = MIXINGS[mixing](workload, compute)
        (self.current,) = _Block.of(workload, by_tensor=False)
        new = [allocate(place.numel(), place.dtype, place.device).view_as(place) for place in self.current.places]
        self.other = _Block(new, self.current.gradient)
        if mode == "reduce-overhead":  # it replays CUDA graphs, and else would copy into memory of theirs
            for tensor in (*self.current.places, *new, self.current.gradient):
                torch._dynamo.mark_static_address(tensor, guard=False)
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
        self.function = torch.compile(own, dynamic=False, fullgraph=True, mode=mode)

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
