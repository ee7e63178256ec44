"""The compiled kernel: all segments, all agents, in one pass over memory."""

from __future__ import annotations

import os

import torch

from gut_fast.backends.step import GossipStep

__all__ = ["gossip_step", "tier", "unavailable", "why_missing"]

try:
    from gut_fast import _core
except ImportError as error:  # a source tree without its extension still has the torch backend
    _core = None  # type: ignore[assignment]
    why_missing: str | None = f"the compiled extension gut_fast._core did not import ({error}); reinstall gut_fast"
else:
    why_missing = None
    try:
        _core.set_tier(os.environ.get("GUT_FAST_TIER", "") or _core.tier())
    except ValueError as error:
        why_missing = f"environment variable GUT_FAST_TIER: {error}"


def unavailable(device_type: str, dtype: torch.dtype, num_states: int, num_messages: int) -> str | None:
    """Why this backend cannot serve such tensors, or None."""
    if why_missing is not None:
        return why_missing
    if device_type != "cpu":
        return f"it computes on CPU tensors, these are on {device_type!r}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not in {dtype}"
    if num_states > _core.MAX_STATES or num_messages > _core.MAX_MESSAGES:
        return (
            f"it is compiled for up to {_core.MAX_STATES} states and {_core.MAX_MESSAGES} messages, "
            f"the rule has {num_states} and {num_messages}"
        )
    return None


def tier() -> str | None:
    """The instruction tier in use, or None without the compiled extension."""
    return _core.tier() if why_missing is None else None


def gossip_step(step: GossipStep) -> None:
    """One step in place, on `torch.get_num_threads()` threads."""
    num_agents = step.num_agents
    # None of these copies unless a gradient is not contiguous; the list keeps such copies alive during the call.
    gradients = [gradient.contiguous() for gradient in step.gradients]
    _core.gossip_step(
        dtype := getattr(_core.DType, str(step.parameters[0].dtype).removeprefix("torch.")),
        dtype,
        num_agents,
        [parameter.data_ptr() for parameter in step.parameters],
        [gradient.data_ptr() for gradient in gradients],
        [parameter.numel() // num_agents for parameter in step.parameters],
        [buffer.data_ptr() for buffer in step.state],
        step.coefficients.data_ptr(),
        step.num_messages,
        step.row_start.data_ptr(),
        step.neighbor.data_ptr(),
        step.weight.data_ptr(),
        0 if step.grad_scale is None else step.grad_scale.data_ptr(),
        torch.get_num_threads(),
    )
