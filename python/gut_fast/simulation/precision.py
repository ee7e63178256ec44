"""Forward passes in half precision, and the loss in single."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_least_float32", "check_autocast", "forward_precision"]

HALVES = (torch.bfloat16, torch.float16)


def forward_precision(autocast: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where a forward pass computes in `autocast`, as in `torch.autocast`; None changes nothing."""
    if autocast is None:
        return contextlib.nullcontext()
    # Without its cache: a CUDA graph would go on reading weights that were cast before it was captured.
    return torch.autocast(device.type, autocast, cache_enabled=False)


def at_least_float32(outputs: Any) -> Any:
    """Outputs as a loss takes them: a tensor of half precision in float32, anything else as it is."""
    return outputs.float() if isinstance(outputs, Tensor) and outputs.dtype in HALVES else outputs


def check_autocast(autocast: torch.dtype | None, parameters: torch.dtype) -> None:
    """Raises ValueError unless a model with parameters of this dtype can compute in `autocast`."""
    if autocast is None:
        return
    if autocast != torch.bfloat16:
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast!r}; float16 needs its losses scaled")
    if parameters != torch.float32:
        raise ValueError(
            f"autocast={autocast} is for parameters of torch.float32, the model's are {parameters}; without autocast a "
            "model computes in the dtype of its parameters"
        )
