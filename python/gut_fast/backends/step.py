"""What every backend computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GossipStep", "arithmetic"]

HALVES = (torch.bfloat16, torch.float16)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and products on what is stored in `dtype`: float32 for the half-width ones, else itself."""
    return torch.float32 if dtype in HALVES else dtype


class GossipStep(NamedTuple):
    """One step of one rule on all segments, for N agents: the arguments of the op but the backend's name.

    Attributes:
        parameters: one contiguous tensor (N, *shape) per segment; updated in place.
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
        """N."""
        return self.row_start.numel() - 1

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of parameters and gradients, and of the state; without state twice the same."""
        dtype = self.parameters[0].dtype
        return dtype, self.state[0].dtype if self.state else dtype
