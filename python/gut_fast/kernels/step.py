"""The step as every backend takes it, and what the backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PLAIN",
    "GossipStep",
    "Instances",
    "Rows",
    "arithmetic",
    "message_each",
    "resolved",
    "rows_of_all",
]

HALVES = (torch.bfloat16, torch.float16)

Rows = Sequence["Tensor | None"]
"""Rows of messages, one for each agent."""


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and products on what is stored in `dtype`: float32 for the half-width ones, else itself."""
    return torch.float32 if dtype in HALVES else dtype


class Instances(NamedTuple):
    """The steps that a backend has been compiled for: dtypes of parameters and state, and sizes of rules."""

    pairs: tuple[tuple[torch.dtype, torch.dtype], ...]
    max_states: int
    max_messages: int

    def refusal(
        self, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None
    ) -> str | None:
        """The reason why there is no instance for such a step, or None."""
        asked = dtype, state_dtype or dtype
        if asked not in self.pairs:
            served = ", ".join(map(_pair_name, self.pairs))
            return f"it serves parameters and state of {served}; not {' with '.join(map(str, asked))}"
        if num_states > self.max_states or num_messages > self.max_messages:
            return (
                f"it is compiled for up to {self.max_states} states and {self.max_messages} messages, "
                f"the rule has {num_states} and {num_messages}"
            )
        return None


def _pair_name(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return " with ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(pair))


class GossipStep(NamedTuple):
    """One step of one rule on all segments, for N agents: the arguments of the op but the backend's name.

    Attributes:
        parameters: one contiguous tensor (N, *shape) per segment, or (*shape) of a single agent; updated in place.
        state: q flat buffers of one dtype, each holding all segments one after the other; updated in place.
        gradients: as `parameters`; None counts as zero, as does a tensor of shape (0,), which the op's schema asks for.
        coefficients: A, B, C, E one after the other, float64, on the CPU or the parameters' device.
        num_messages: M.
        row_start, neighbor, weight: the off-diagonal non-zeros of W in CSR form (int64, int64, float64).
        grad_scale: one float64 factor per agent on its gradient, or None; zero drops the gradient, NaN included.
    """

    parameters: list[Tensor]
    state: list[Tensor]
    gradients: list[Tensor | None]
    coefficients: Tensor
    num_messages: int
    row_start: Tensor
    neighbor: Tensor
    weight: Tensor
    grad_scale: Tensor | None

    @property
    def num_agents(self) -> int:
        """The number N of agents."""
        return self.row_start.numel() - 1

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of parameters and gradients, and the dtype of the state; without state twice the same."""
        dtype = self.parameters[0].dtype
        return dtype, self.state[0].dtype if self.state else dtype

    def new_rows(self, dtype: torch.dtype) -> list[Tensor]:
        """Uninitialised rows of messages [M ΣD], one for each agent here."""
        numbers = self.num_messages * sum(parameter.numel() for parameter in self.parameters)
        return list(self.parameters[0].new_empty(self.num_agents, numbers // self.num_agents, dtype=dtype))


def resolved(step: GossipStep) -> GossipStep:
    """The step, which has been checked, as kernels can read it: of plain tensors, with contiguous gradients.

    Parameters and state stay in their memory. A gradient is copied if its numbers are not what lies there one after the
    other (strides, a lazy sign), or if it is its own parameter.
    """
    parameters = [_plain(parameter) for parameter in step.parameters]
    gradients = [_gradient(*pair) for pair in zip(step.gradients, parameters, strict=True)]
    return step._replace(parameters=parameters, gradients=gradients, state=[_plain(buffer) for buffer in step.state])


def _plain(tensor: Tensor) -> Tensor:
    return tensor if type(tensor) in PLAIN else tensor.as_subclass(Tensor)


def _gradient(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    if gradient is None or not gradient.numel() or gradient._is_zerotensor():
        return None
    dense = _plain(gradient).resolve_neg().contiguous()
    is_parameter = not dense.is_meta and dense.data_ptr() == parameter.data_ptr()
    return dense.clone() if is_parameter else dense


PLAIN = {Tensor, torch.nn.Parameter}
"""The types of tensors that compute as PyTorch does; others stand for something else."""

Message = Callable[[GossipStep, Sequence[Tensor]], None]


def message_each(step: GossipStep, rows: Rows, message: Message) -> None:
    """Does a backend's ``message`` with a kernel that needs a row for every agent, of the parameters' dtype or wider.

    If a row is None or has another dtype, the kernel's messages go to rows of their own first and are then rounded
    into the given ones.
    """
    first = step.parameters[0].dtype
    if all(row is not None and row.dtype in (first, arithmetic(first)) for row in rows):
        message(step, [row for row in rows if row is not None])
        return
    computed = step.new_rows(arithmetic(first))
    message(step, computed)
    for row, own in zip(rows, computed, strict=True):
        if row is not None:
            row.copy_(own)


def rows_of_all(step: GossipStep, rows: Rows, message: Message) -> list[Tensor]:
    """The rows for a kernel that reads a row of every agent, in the dtype of parameters or arithmetic.

    A row that is None is computed anew by `message`.
    """
    first = step.parameters[0].dtype
    if all(row is not None and row.dtype in (first, arithmetic(first)) for row in rows):
        return [row for row in rows if row is not None]
    computed: list[Tensor] = []
    if any(row is None for row in rows):
        computed = step.new_rows(arithmetic(first))
        message(step, computed)
    return [computed[i] if row is None else row.to(arithmetic(first)) for i, row in enumerate(rows)]
