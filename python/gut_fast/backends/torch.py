"""The step in plain PyTorch operations: any device, any floating dtype, any rule. Slow, and always there.

Computes in the tensors' dtype, but in float32 where parameters or state are stored in bfloat16: these are rounded once,
to the nearest, ties to even, when they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gut_fast.backends.step import GossipStep

__all__ = ["gossip_step", "unavailable"]


def unavailable(
    device_type: str, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None = None
) -> str | None:
    """Why this backend cannot serve such tensors, or None."""
    return None if dtype.is_floating_point else f"it computes in floating point, not in {dtype}"


def gossip_step(step: GossipStep) -> None:
    """One step in place, segment by segment. Deterministic: one neighbour of every agent at a time, in CSR order."""
    _check_edges(step)
    num_inputs, num_messages = len(step.state) + 2, step.num_messages
    num_outputs = num_inputs - 1
    coefficients = step.coefficients.tolist()
    A = _take(coefficients, num_messages, num_inputs)
    B = _take(coefficients, num_outputs, num_inputs)
    C = _take(coefficients, num_outputs, num_messages)
    E = _take(coefficients, num_outputs, num_messages)

    dtype = torch.float32 if torch.bfloat16 in step.dtypes else step.dtypes[0]
    offset = 0
    for parameter, gradient in zip(step.parameters, step.gradients, strict=True):
        z = parameter.view(step.num_agents, -1)
        places = [z, *(buffer[offset : offset + z.numel()].view_as(z) for buffer in step.state)]
        offset += z.numel()
        inputs = [place.to(dtype) for place in places]
        inputs.append(_scaled_gradient(gradient, inputs[0], step.grad_scale))
        messages = [_combine(row, inputs) for row in A]
        drifts = [_drift(message, step) for message in messages]
        outputs = [_combine([*B[row], *C[row], *E[row]], [*inputs, *messages, *drifts]) for row in range(num_outputs)]
        for place, output in zip(places, outputs, strict=True):
            place.copy_(output)


def _check_edges(step: GossipStep) -> None:
    """As the compiled kernel does; on a GPU it would wait for the device."""
    if step.row_start.device.type != "cpu":
        return
    degree = step.row_start.diff()
    if step.row_start[0] != 0 or bool((degree < 0).any()):
        raise ValueError(f"row_start must begin at 0 and never decrease, got {step.row_start.tolist()}")
    agents = torch.arange(step.num_agents, device="cpu").repeat_interleave(degree)
    wrong = (step.neighbor < 0) | (step.neighbor >= step.num_agents) | (step.neighbor == agents)
    if bool(wrong.any()):
        edge = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {int(agents[edge])} names agent {int(step.neighbor[edge])}, which is not another one of the "
            f"{step.num_agents}"
        )


def _take(flat: list[float], rows: int, columns: int) -> list[list[float]]:
    """The next matrix of the flat coefficients; consumes them."""
    matrix = [flat[row * columns : (row + 1) * columns] for row in range(rows)]
    del flat[: rows * columns]
    return matrix


def _scaled_gradient(gradient: Tensor | None, z: Tensor, grad_scale: Tensor | None) -> Tensor:
    if gradient is None or gradient.numel() == 0:
        return torch.zeros_like(z)
    gradient = gradient.reshape(z.shape).to(z.dtype)
    if grad_scale is None:
        return gradient
    scale = grad_scale.to(z)[:, None]
    return torch.where(scale == 0, 0.0, scale * gradient)


def _combine(row: list[float], inputs: list[Tensor]) -> Tensor:
    """Σ row[k] inputs[k] over the coefficients that are not zero: what a rule does not read cannot bring in NaN."""
    total = torch.zeros_like(inputs[0])
    for coefficient, tensor in zip(row, inputs, strict=True):
        if coefficient != 0:
            total.add_(tensor, alpha=coefficient)
    return total


def _drift(message: Tensor, step: GossipStep) -> Tensor:
    """D(i) = Σ_j W[i, j] (S(j) − S(i))."""
    drift = torch.zeros_like(message)
    degree = step.row_start.diff()
    for k in range(int(degree.max())):
        agents = torch.nonzero(degree > k).squeeze(1)
        edges = step.row_start[agents] + k
        difference = message[step.neighbor[edges]] - message[agents]
        drift[agents] += step.weight[edges, None].to(message) * difference
    return drift
