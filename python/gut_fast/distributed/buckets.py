"""Buckets: runs of parameters whose messages travel together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gut_fast.distributed.placement import Route
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, arithmetic
from gut_fast.kernels.buffers import allocate

__all__ = ["Bucket", "plan_buckets"]


@dataclass
class Bucket:
    """Parameters ``start … stop − 1`` of a group, and the rows their messages travel in.

    Attributes:
        number: tells buckets apart on all ranks.
        group: index of the parameter group.
        column, columns: where its numbers begin in one agent's model of the group, and how many they are.
        sent: a row for each agent here, [M · columns]; None for those nobody on another rank hears.
        received: rows of agents elsewhere, in the order of the route.
        own: what these rows are made of where they do not lie in shared memory.
        residual: what rounding left of the last messages, one float row for each agent here; empty without feedback.
        staging: for rows on a GPU that travel through the host, pinned copies by address of the row.
    """

    number: int
    group: int
    start: int
    stop: int
    column: int
    columns: int
    sent: list[Tensor | None] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)
    staging: dict[int, Tensor] = field(default_factory=dict)

    def staged(self, row: Tensor) -> Tensor:
        """The row's copy on the host, its contents not copied yet."""
        if row.data_ptr() not in self.staging:
            self.staging[row.data_ptr()] = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
        return self.staging[row.data_ptr()]

    def clear(self) -> None:
        """Leaves all rows behind: some may still be under way."""
        self.sent, self.received, self.own, self.residual, self.staging = [], [], [], [], {}

    def part(self, step: GossipStep) -> GossipStep:
        """The step of these parameters alone. State lies segment after segment, so theirs is one run of it."""
        k = step.num_agents
        return step._replace(
            parameters=step.parameters[self.start : self.stop],
            state=[buffer[k * self.column : k * (self.column + self.columns)] for buffer in step.state],
            gradients=step.gradients[self.start : self.stop],
        )

    def make_rows(
        self, step: GossipStep, route: Route, dtype: torch.dtype, shared: Callable[[int, int], Tensor | None]
    ) -> None:
        """Rows for the messages of a step: those that are shared, by place and agent there, or others that are kept."""
        length, device = step.num_messages * self.columns, step.parameters[0].device
        k, used = step.num_agents, itertools.count()

        def row(agent: int) -> Tensor:
            found = shared(*divmod(agent, k))
            if found is not None:
                return found
            index = next(used)
            if index == len(self.own):
                self.own.append(allocate(length, dtype, device))
            return self.own[index]

        self.sent = [None] * k
        for agent in route.senders:
            self.sent[agent] = row(route.first_agent + agent)
        self.received = [row(agent) for agent, _, _ in route.receives]

    def write_messages(self, step: GossipStep, backend: str, has_feedback: bool) -> None:
        """The messages of the agents here into the rows that are sent."""
        if has_feedback and not self.residual:
            first, length = step.parameters[0], step.num_messages * self.columns
            self.residual = [allocate(length, arithmetic(first.dtype), first.device) for _ in range(step.num_agents)]
        ops.message(self.part(step), self.sent, backend, residuals=self.residual if has_feedback else ())


def plan_buckets(sizes: Sequence[Sequence[int]], bytes_per_number: Sequence[int], limit: int) -> list[Bucket]:
    """Buckets of about `limit` bytes, in the order in which gradients come: the last parameters first.

    Args:
        sizes: for each group, how many numbers one agent has of each parameter.
        bytes_per_number: for each group, how many bytes of messages one number makes.
        limit: bytes; a bucket ends with the parameter that reaches it.
    """
    buckets: list[Bucket] = []
    for group in reversed(range(len(sizes))):
        stop = len(sizes[group])
        while stop > 0:
            start, columns = stop, 0
            while start > 0 and (start == stop or columns * bytes_per_number[group] < limit):
                start -= 1
                columns += sizes[group][start]
            buckets.append(Bucket(len(buckets), group, start, stop, sum(sizes[group][:start]), columns))
            stop = start
    return buckets
