"""Flat buffers and the segments in them.

A buffer of N agents' tensors of sizes d_1 … d_P is one allocation of N·Σd_k numbers. Segment k is a contiguous block
[N, d_k], agent after agent; a stacked tensor of shape (N, *shape_k) is a view of it.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.kernels import validation

__all__ = ["FlatState", "allocate", "segment_views"]

PAGE = 4096
HUGE_PAGE = 2 << 20
COLUMNS = 4096  # so many of 16 agents fit into a cache in float64
_slots = itertools.cycle(range(0, PAGE, 576))


def allocate(num_elements: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A flat buffer of zeros, shape (num_elements,).

    On the CPU, buffers allocated one after the other start at different offsets within a page: rows of several buffers
    that are read together and start at the same offset compete for the same few cache sets (1.8 times slower, measured
    on LeNet-5). Large buffers lie in huge pages where the system has them: steps are 2 to 20 % faster.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(num_elements, dtype=dtype, device=device)
    num_bytes = num_elements * dtype.itemsize
    is_large = num_bytes >= 2 * HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    padded, border = (_huge_pages(num_bytes + PAGE), HUGE_PAGE) if is_large else (_zeros(num_bytes + PAGE), PAGE)
    start = (-padded.data_ptr()) % border + next(_slots)
    return padded[start : start + num_bytes].view(dtype)


def _zeros(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes + PAGE, dtype=torch.uint8, device="cpu")


def _huge_pages(num_bytes: int) -> Tensor:
    """Zeros in a memory mapping of their own, which ends with the tensor."""
    pages = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def segment_views(flat: Tensor, num_agents: int, shapes: Iterable[Sequence[int]]) -> list[Tensor]:
    """Views of `flat`, one of shape (num_agents, *shape) for each of `shapes`, one after the other.

    Raises:
        ValueError: the shapes do not fill the buffer exactly.
    """
    shapes = [tuple(shape) for shape in shapes]
    sizes = [num_agents * math.prod(shape) for shape in shapes]
    if sum(sizes) != flat.numel():
        raise ValueError(
            f"{num_agents} agents of shapes {shapes} need {sum(sizes)} elements, the buffer has {flat.numel()}"
        )
    return [block.view(num_agents, *shape) for block, shape in zip(flat.split(sizes), shapes, strict=True)]


class FlatState:
    """The state of a group of parameters: one flat buffer for each state name, seen as views of it.

    Args:
        parameters: tensors (N, *shape), or of a single agent (*shape), of one dtype and device.
        names: names of the states; each has the shape of its parameter and is zero at the start.
        dtype: dtype of the state; None stands for the dtype of the parameters.

    Attributes:
        buffers: one flat buffer per name, all segments one after the other, as kernels read them.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype | None = None) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        first = parameters[0] if parameters else torch.empty(0, device="cpu")
        self.buffers = [allocate(sum(sizes), dtype or first.dtype, first.device) for _ in names]
        self._views = [
            (parameter, name, block.view(parameter.shape))
            for name, buffer in zip(names, self.buffers, strict=True)
            for parameter, block in zip(parameters, buffer.split(sizes), strict=True)
        ]

    @torch.no_grad()
    def recentre(
        self, sums: Tensor, stays: Tensor, num_here: int, num_agents: int, add_up: Callable[[Tensor], None] | None
    ) -> None:
        """Takes ``R ℓ m`` away from every agent's states, in place, where m is their mean over agents, in float64.

        Args:
            sums: ℓ, [k, q] float64 on the state's device, for q names.
            stays: R, [q, k], with ``ℓ R = I``, so that ``ℓ m`` is zero afterwards but for rounding.
            num_here: the number of agents in these buffers.
            num_agents: the number of all agents.
            add_up: adds what it is given up over all ranks, in place; None if all agents are here.
        """
        num_segments = len(self._views) // max(len(self.buffers), 1)
        for index in range(num_segments):
            rows = [view.view(num_here, -1) for _, _, view in self._views[index::num_segments] if view.numel()]
            for blocks in zip(*(row.split(COLUMNS, 1) for row in rows), strict=True):
                total = sums @ torch.stack([block.to(torch.float64).sum(0) for block in blocks])
                if add_up is not None:
                    add_up(total)
                for block, away in zip(blocks, stays @ total / num_agents, strict=True):
                    block.sub_(away.to(block.dtype))

    @torch.no_grad()
    def adopt(self, state: MutableMapping[Tensor, Any]) -> None:
        """Puts the views into ``state[parameter][name]``, with the values that are there, or zero.

        Raises:
            ValueError: a value is not a dense floating-point tensor of its parameter's shape, or has been freed, or a
                parameter's entry is no dict; nothing has been changed.
        """
        found = {parameter: state.get(parameter, {}) for parameter, _, _ in self._views}
        for own in found.values():
            if not isinstance(own, dict):
                raise ValueError(f"the state of a parameter must be a dict of tensors, got {type(own).__name__}")
        for parameter, name, view in self._views:
            current = found[parameter].get(name)
            given, expected = validation.described(current), validation.described(view)
            if current is not None and given != expected:
                raise ValueError(f"state {name!r} of a parameter must be a tensor {expected}, got {given}")
        for parameter, name, view in self._views:
            current = found[parameter].get(name)
            if current is None:
                view.zero_()
            elif current is not view:
                view.copy_(current)
            found[parameter][name] = view
        state.update(found)
