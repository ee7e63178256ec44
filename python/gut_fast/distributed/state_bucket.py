"""State of an inner optimizer on its way to other agents, which mix it at the end of a round as they mix models.

Agent i's state v becomes ``v_i + Σ_j w_ij (X_j − X_i)``, where X, which travels, is v in bfloat16, whatever the dtypes
of v and of other messages are. It is cut off, not rounded to the nearest: X is nowhere larger than v, so what is not
negative stays so. Every agent takes X for its own too, so the mean stays.

An agent has no state of a parameter before the parameter's first gradient there. Until then it neither gives nor takes:
its edges weigh nothing. A message is as long as ever, as others cannot know, and begins with a number for each tensor:
1 if it is there, else 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gut_fast.coefficients import plain_gossip
from gut_fast.distributed.traffic import Bucket
from gut_fast.distributed.wire import Wire
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, arithmetic
from gut_fast.topology.mixing import CSR

__all__ = ["StateBucket", "mix_together", "state_bytes", "state_step"]

DTYPE = torch.bfloat16
"""The dtype in which state travels."""


def state_bytes(sizes: Sequence[int]) -> int:
    """Returns the bytes that travel of an agent's state: of tensors of these sizes."""
    return (len(sizes) + sum(sizes)) * DTYPE.itemsize


def state_step(tensors: Sequence[Tensor], mixing: CSR) -> GossipStep:
    """Makes the step that mixes state; an empty tensor stands for state that is not there."""
    coefficients = torch.tensor(plain_gossip(2, 1).flat(), dtype=torch.float64, device="cpu")
    return GossipStep(list(tensors), [], [None] * len(tensors), coefficients, 1, *mixing, None)


class StateBucket(Bucket):
    """State of parameters that travels together: `Bucket` for a step of `state_step`."""

    def row_form(self, step: GossipStep, wire: Wire) -> tuple[int, torch.dtype]:
        """Returns the length and the dtype of a row."""
        return len(self.sizes) + self.columns, DTYPE

    def part(self, step: GossipStep) -> GossipStep:
        """Returns the step of the bucket's state alone."""
        return state_step(step.parameters[self.start : self.stop], CSR(step.row_start, step.neighbor, step.weight))

    def write_messages(self, step: GossipStep, backend: str, wire: Wire, number: int, first_agent: int) -> None:
        """Writes X of the agents here into the rows that are sent, and into new ones of agents heard here alone."""
        self.write(step)

    @torch.no_grad()
    def write(self, step: GossipStep) -> None:
        """Writes X of the agents here."""
        tensors, agents, device = self.part(step).parameters, step.num_agents, step.row_start.device
        is_there = torch.tensor([[tensor.numel() > 0 for tensor in tensors]], dtype=DTYPE, device=device)
        numbers = [
            cut_off(tensor).reshape(agents, -1) if tensor.numel() else is_there.new_zeros(agents, size)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        X = torch.cat([is_there.expand(agents, -1), *numbers], dim=1)
        self.sent = [own if row is None else row.copy_(own) for row, own in zip(self.sent, X, strict=True)]

    def mix_(self, step: GossipStep, backend: str) -> None:
        """Mixes the state that is here with what has come: at once what the same agents have."""
        part, rows = self.part(step), [row for row in (*self.sent, *self.received) if row is not None]
        dtype = next((tensor.dtype for tensor in part.parameters if tensor.numel()), DTYPE)
        heads = torch.stack([row[: len(self.sizes)] for row in rows], dim=1).double()
        end = len(self.sizes)
        for _, run in itertools.groupby(range(end), key=heads.tolist().__getitem__):
            own = list(run)
            begin, end = end, end + sum(self.sizes[number] for number in own)
            tensors = [part.parameters[number] for number in own if part.parameters[number].numel()]
            if tensors:
                weight = part.weight * heads[own[0]][part.neighbor]
                some = state_step(tensors, CSR(part.row_start, part.neighbor, weight))
                ops.combine_(some, [_readable(row[begin:end], dtype) for row in rows], backend)


def mix_together(step: GossipStep, backend: str) -> None:
    """Mixes the state of agents that are all here."""
    sizes = tuple(tensor.numel() // step.num_agents for tensor in step.parameters)
    bucket = StateBucket(0, 0, 0, len(sizes), 0, sizes, sent=[None] * step.num_agents)
    bucket.write(step)
    bucket.mix_(step, backend)


def cut_off(tensor: Tensor) -> Tensor:
    """Returns a tensor's numbers, a row, in bfloat16: each the nearest one that is not larger in absolute value."""
    row = tensor.detach().reshape(-1)
    if row.dtype == torch.float32:
        return row.view(DTYPE)[1::2]  # the upper half of its bits, which lies behind the lower one
    rounded = row.to(DTYPE)
    is_larger = rounded.abs() > row.abs()
    return (rounded.view(torch.int16) - is_larger.short()).view(DTYPE)


def _readable(row: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a row as kernels read it beside tensors of `dtype`."""
    return row if dtype in (torch.float32, DTYPE) else row.to(arithmetic(dtype))
