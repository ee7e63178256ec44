"""Agents shared out over the ranks of a process group, and sums and rows over all agents from each rank's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.agents import means
from gut_fast.distributed import Group

__all__ = ["Everyone", "agents_here", "check_ranks"]

ASK_EVERY = 10
"""The number of steps between two moments at which the ranks ask each other whether to stop."""


def agents_here(num_agents: int, process_group: dist.ProcessGroup | Group | None) -> range:
    """The numbers of the agents in this process: rank r of a group holds agents r · k … r · k + k − 1.

    Raises:
        TypeError: `process_group` is not a process group.
        ValueError: the agents cannot be shared out evenly, or this process is not in the group.
    """
    if process_group is None:
        return range(num_agents)
    size = Group.size_of(process_group)
    rank = process_group.rank if isinstance(process_group, Group) else dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group: this process is not one of its ranks")
    if num_agents % size:
        raise ValueError(
            f"{num_agents} agents cannot be shared out evenly over {size} ranks; take a number of ranks that divides "
            f"{num_agents}"
        )
    here = num_agents // size
    return range(rank * here, rank * here + here)


def check_ranks(group: Group | None, process_group: dist.ProcessGroup | Group | None) -> None:
    """Raises ValueError unless the ranks over which the optimizer mixes are as many as the ranks of `process_group`."""
    sizes = [None if each is None else Group.size_of(each) for each in (process_group, group)]
    if sizes[0] != sizes[1]:
        given, has = ("no process_group" if size is None else f"one of {size} ranks" for size in sizes)
        raise ValueError(
            f"the simulator was given {given}, its optimizer {has}; give both the same, and the optimizer "
            "agents_per_rank= beside it"
        )


class Everyone:
    """Rows and means over all agents, computed from the agents in each process.

    With a group every method is collective: all ranks call it in the same order, and all get the same result. The ranks
    add up float64 sums of float32 numbers, which are hardly ever rounded, or numbers and zeros; so the results equal
    those of one process.

    Args:
        agents: numbers of the agents in this process.
        num_agents: number of all agents N.
        device: device of the numbers.
        optimizer: the optimizer whose ``group`` holds the ranks; None if all agents are in this process.
    """

    def __init__(
        self, agents: range, num_agents: int, device: torch.device, optimizer: Optimizer | None = None
    ) -> None:
        self._agents, self._num_agents, self._device, self._optimizer = agents, num_agents, device, optimizer

    @property
    def group(self) -> Group | None:
        """The group of ranks, or None if all agents are in this process."""
        group: Group | None = getattr(self._optimizer, "group", None)
        return group

    @property
    def is_first(self) -> bool:
        """True if agent 0 is in this process, which then reports for all."""
        return self._agents.start == 0

    def rows(self, own: Tensor) -> Tensor:
        """The rows [N, ...] of all agents, from the rows [k, ...] of the agents in this process."""
        if self.group is None:
            return own
        rows = own.new_zeros(self._num_agents, *own.shape[1:])
        rows[self._agents.start : self._agents.stop] = own
        return self._sum(rows)

    def means(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The agents' mean of each stacked tensor, float64; agent 0's value of a tensor that is not floating-point."""
        if self.group is None:
            return means(stacked)
        own = [
            each.sum(0, dtype=torch.float64) if each.is_floating_point() else each[0].to(torch.float64) * self.is_first
            for each in stacked.values()
        ]
        sums = self._sum(torch.cat([each.flatten() for each in own])).split([each.numel() for each in own])
        return {
            name: each.view(rows.shape[1:]).div(self._num_agents if rows.is_floating_point() else 1)
            for (name, rows), each in zip(stacked.items(), sums, strict=True)
        }

    def wants_to_stop(self, is_asked_to: bool, step: int, is_last: bool) -> bool:
        """True if any process has been asked to stop; all ranks get the answer at the same step."""
        if self.group is None:
            return is_asked_to
        asks = is_last or step % ASK_EVERY == 0
        return asks and bool(self._sum(torch.tensor([int(is_asked_to)], device=self._device)))

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over all ranks."""
        group = self.group
        assert group is not None
        if group.missing:
            raise RuntimeError(
                f"ranks {group.missing} are gone, so there are no numbers of all agents; the simulator has no "
                "use for on_peer_failure='continue', a training loop of your own has"
            )
        # A group of our own connects by gloo, which takes tensors on the CPU.
        summed = tensor.to("cpu", copy=True) if group.is_own else tensor.clone()
        group.all_reduce(summed)
        return summed.to(tensor.device)
