"""Contenders that there are on a GPU alone: the copy that its steps are measured by, buffers in turns, CUDA graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gut_fast.benchmark.contenders import Blocks, Contender, GutFast, Unavailable, Workload
from gut_fast.benchmark.device import CACHES

__all__ = ["Captured", "InTurns", "LargeCopy", "SmallCopy", "copy_length", "in_turns", "num_sets"]


class LargeCopy(Contender):
    """A copy from one large buffer of the device to another: the speed of its memory, bytes read and bytes written.

    It is many times larger than the L2, and larger than most steps; its time is scaled to the bytes of a step.
    """

    family = "ceiling"

    def __init__(self, workload: Workload) -> None:
        self.step_bytes = workload.case.bytes_per_step(workload.num_agents)
        # Of noise: some devices copy zeros faster.
        noise = torch.rand(copy_length(workload) // 4, device=workload.device.torch_device)
        self.source, self.target = noise.view(torch.uint8), torch.zeros_like(noise).view(torch.uint8)
        self.steps_a_call = 2 * self.source.numel() / self.step_bytes

    def step(self) -> None:
        """One copy."""
        self.target.copy_(self.source)


def copy_length(workload: Workload) -> int:
    """Bytes of each of the two buffers: never fewer than half of a step's."""
    half = workload.case.bytes_per_step(workload.num_agents) // 2
    return 4 * math.ceil(max(workload.device.copy_bytes, half) / 4)


class SmallCopy(Contender):
    """A copy that moves no more bytes than a step does, each time from and to another place of the large buffers.

    Beside the large one it shows what starting and ending take.
    """

    family = "copy"

    def __init__(self, large: LargeCopy) -> None:
        length = large.step_bytes // 2
        places = range(0, large.source.numel() - length + 1, length)
        self.pairs = [(large.target[place:][:length], large.source[place:][:length]) for place in places]
        self._next = itertools.cycle(self.pairs)

    def step(self) -> None:
        """One copy."""
        target, source = next(self._next)
        target.copy_(source)


class InTurns(Contender):
    """A contender on several sets of buffers, which take turns, so that a step finds none of its data in the cache."""

    def __init__(self, members: Sequence[Contender]) -> None:
        self.family, self._members = members[0].family, members
        self._next = itertools.cycle(members)

    def step(self) -> None:
        """One step on the next set."""
        next(self._next).step()

    def blocks(self) -> Blocks | None:
        """Those of the first set."""
        return self._members[0].blocks()

    def members(self) -> Sequence[Contender]:
        """One for each set."""
        return self._members


def in_turns(members: Sequence[Contender]) -> Contender:
    """The members as one contender; a single one as it is."""
    return members[0] if len(members) == 1 else InTurns(members)


def num_sets(workload: Workload) -> int:
    """How many sets of the workload's buffers are together several times as large as the cache."""
    held = workload.num_agents * workload.case.bytes_held
    return max(1, math.ceil(CACHES * workload.device.cache_bytes / held))


class Captured(Contender):
    """``optimizer.step()`` in a CUDA graph, replayed: a step without its Python."""

    family = "graph"

    def __init__(self, workload: Workload) -> None:
        if not workload.topology.is_static:
            raise Unavailable(f"{workload.topology} changes from step to step")
        self.ours = GutFast(workload, capturable=True)
        replay = workload.device.captured(self.ours.step)
        if replay is None:
            raise Unavailable("there are no CUDA graphs on this device")
        self._replay = replay

    def step(self) -> None:
        """One replay."""
        self._replay()

    def blocks(self) -> dict[str, list[Tensor]]:
        """Parameters and state."""
        return self.ours.blocks()
