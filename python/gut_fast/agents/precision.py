"""The precision of forward passes: autocasting around them, and outputs for losses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_least_float32", "check_autocast", "forward_precision"]

HALVES = (torch.bfloat16, torch.float16)


def forward_precision(autocast: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which forward passes compute in `autocast`, as in `torch.autocast`; None changes nothing."""
    if autocast is None:
        return contextlib.nullcontext()
    # With the cache a CUDA graph would keep reading weights that were cast before its capture.
    return torch.autocast(device.type, autocast, cache_enabled=False)


def at_least_float32(outputs: Any) -> Any:
    """Outputs for a loss: a tensor of half precision is converted to float32, anything else is returned as it is."""
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
