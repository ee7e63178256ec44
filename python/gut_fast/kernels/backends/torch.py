"""The step in plain PyTorch operations: any device, any floating dtype, any rule. Slow, and always there.

Computes in the tensors' dtype, but in float32 where parameters or state are stored in a half-width one: these are
rounded once, to the nearest, ties to even, when they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gut_fast.kernels.step import GossipStep, Rows, arithmetic

__all__ = ["combine", "gossip_step", "message", "unavailable"]

Row = Sequence["float | Tensor"]


def unavailable(
    device_type: str, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None = None
) -> str | None:
    """The reason why this backend cannot serve such tensors, or None."""
    return None if dtype.is_floating_point else f"it computes in floating point, not in {dtype}"


def gossip_step(step: GossipStep) -> None:
    """One step in place, segment by segment. Deterministic: one neighbour of every agent at a time, in CSR order."""
    _check_edges(step, step.num_agents)
    coefficients = _Coefficients.of(step)
    for segment in _segments(step):
        messages = [_combine(row, segment.inputs) for row in coefficients.A]
        drifts = [_drift(message, step) for message in messages]
        segment.store(coefficients, messages, drifts)


def message(step: GossipStep, rows: Rows) -> None:
    """Writes the messages of agent i into ``rows[i]``, the first half of the split form."""
    coefficients = _Coefficients.of(step)
    for segment in _segments(step):
        for m, row in enumerate(coefficients.A):
            message = _combine(row, segment.inputs)
            for sent, own in zip(rows, message, strict=False):
                if sent is not None:
                    segment.of(sent, m, step.num_messages).copy_(own)


def combine(step: GossipStep, rows: Rows) -> None:
    """Mixes the rows and updates in place, the second half of the split form."""
    _check_edges(step, len(rows))
    coefficients = _Coefficients.of(step)
    for segment in _segments(step):
        dtype = segment.inputs[0].dtype
        messages = [_combine(row, segment.inputs) for row in coefficients.A]
        drifts = []
        for m, own in enumerate(messages):
            sent = [own[i] if row is None else segment.of(row, m, step.num_messages) for i, row in enumerate(rows)]
            drifts.append(_drift(torch.stack([row.to(dtype) for row in sent]), step))
        segment.store(coefficients, messages, drifts)


class _Coefficients(NamedTuple):
    """Rows of A, B, C and E: numbers, or scalars on the device, which are never read by the host."""

    A: list[Row]
    B: list[Row]
    C: list[Row]
    E: list[Row]

    @staticmethod
    def of(step: GossipStep) -> _Coefficients:
        flat = step.coefficients
        remaining: Iterator[float | Tensor] = iter(flat.tolist() if flat.device.type == "cpu" else flat.unbind())
        outputs, messages = len(step.state) + 1, step.num_messages

        def matrix(rows: int, columns: int) -> list[Row]:
            return [[next(remaining) for _ in range(columns)] for _ in range(rows)]

        return _Coefficients(
            matrix(messages, outputs + 1),
            matrix(outputs, outputs + 1),
            matrix(outputs, messages),
            matrix(outputs, messages),
        )


class _Segment(NamedTuple):
    """One segment of all agents.

    Attributes:
        places: z and the states as they are stored, [N, d] each.
        inputs: the inputs u in the dtype of arithmetic.
        column: the column of the segment's first number in one agent's whole model.
    """

    places: list[Tensor]
    inputs: list[Tensor]
    column: int

    def of(self, row: Tensor, m: int, num_messages: int) -> Tensor:
        """The segment [d] of message m in an agent's row of messages."""
        return row.view(num_messages, -1)[m, self.column : self.column + self.places[0].shape[1]]

    def store(self, coefficients: _Coefficients, messages: list[Tensor], drifts: list[Tensor]) -> None:
        terms = [*self.inputs, *messages, *drifts]
        _, B, C, E = coefficients
        outputs = [_combine([*b, *c, *e], terms) for b, c, e in zip(B, C, E, strict=True)]
        for place, output in zip(self.places, outputs, strict=True):
            place.copy_(output)


def _segments(step: GossipStep) -> Iterator[_Segment]:
    dtype = torch.promote_types(*map(arithmetic, step.dtypes))
    offset = 0
    for parameter, gradient in zip(step.parameters, step.gradients, strict=True):
        z = parameter.view(step.num_agents, -1)
        places = [z, *(buffer[offset : offset + z.numel()].view_as(z) for buffer in step.state)]
        inputs = [place.to(dtype) for place in places]
        yield _Segment(
            places, [*inputs, _scaled_gradient(gradient, inputs[0], step.grad_scale)], offset // step.num_agents
        )
        offset += z.numel()


def _check_edges(step: GossipStep, num_rows: int) -> None:
    """Raises ValueError for edges that name no other row; not on a GPU, where the check would wait for the device."""
    if step.row_start.device.type != "cpu":
        return
    degree = step.row_start.diff()
    if step.row_start[0] != 0 or bool((degree < 0).any()):
        raise ValueError(f"row_start must begin at 0 and never decrease, got {step.row_start.tolist()}")
    agents = torch.from_numpy(np.repeat(np.arange(step.num_agents), degree.numpy()))
    wrong = (step.neighbor < 0) | (step.neighbor >= num_rows) | (step.neighbor == agents)
    if bool(wrong.any()):
        edge = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {int(agents[edge])} names agent {int(step.neighbor[edge])}, which is not another one of the "
            f"{num_rows}"
        )


def _scaled_gradient(gradient: Tensor | None, z: Tensor, grad_scale: Tensor | None) -> Tensor:
    if gradient is None or gradient.numel() == 0:
        return torch.zeros_like(z)
    gradient = gradient.reshape(z.shape).to(z.dtype)
    if grad_scale is None:
        return gradient
    scale = grad_scale.to(z)[:, None]
    return torch.where(scale == 0, 0.0, scale * gradient)


def _combine(row: Row, inputs: Sequence[Tensor]) -> Tensor:
    """Σ row[k] inputs[k] over the coefficients that are not zero: what a rule does not read cannot bring in NaN."""
    total = torch.zeros_like(inputs[0])
    for coefficient, tensor in zip(row, inputs, strict=True):
        if isinstance(coefficient, Tensor):
            total += torch.where(coefficient == 0, 0.0, coefficient.to(tensor) * tensor)
        elif coefficient != 0:
            total.add_(tensor, alpha=coefficient)
    return total


def _drift(messages: Tensor, step: GossipStep) -> Tensor:
    """D(i) = Σ_j W[i, j] (S(j) − S(i)), [N, d]; the first N of the messages are the agents' own."""
    own = messages[: step.num_agents]
    drift = torch.zeros_like(own)
    degree = step.row_start.diff()
    for k in range(int(degree.max())):
        agents = torch.nonzero(degree > k).squeeze(1)
        edges = step.row_start[agents] + k
        difference = messages[step.neighbor[edges]] - own[agents]
        drift[agents] += step.weight[edges, None].to(own) * difference
    return drift
