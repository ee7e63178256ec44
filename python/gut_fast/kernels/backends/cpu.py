"""The compiled kernel: all segments, all agents, in one pass over memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from gut_fast.kernels.step import GossipStep, Instances, Rows, arithmetic

__all__ = [
    "are_plain",
    "combine",
    "direct_combine",
    "direct_message",
    "direct_step",
    "force_plan",
    "gossip_step",
    "last_plan",
    "message",
    "set_tier",
    "tier",
    "tiers",
    "unavailable",
    "why_missing",
]

PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)
"""The pairs of dtypes, of parameters and of state, that are compiled in."""

FETCHES = ("none", "near", "outer", "write")
"""Where lines that will be needed are brought: nowhere, into L1, into L2, or into L1 to be written."""

try:
    from gut_fast import _core
except ImportError as error:  # a source tree without its extension still has the torch backend
    _core = None  # type: ignore[assignment]
    why_missing: str | None = f"the compiled extension gut_fast._core did not import ({error}); reinstall gut_fast"
else:
    why_missing = None


def force_plan(plan: str | None) -> None:
    """Makes all later steps use a plan, such as ``"block=256,ahead=512,fetch=near"``; None: the processor's best again.

    A step takes `block` columns of all agents at a time, and fetches from memory what it needs `ahead` columns later,
    counted in the order in which rows are read, into a cache (one of `FETCHES`). Bits do not depend on it.

    Raises:
        ValueError: the plan is not of this form, or a number is out of range.
    """
    if plan is None:
        _core.force_plan(None)
        return
    parts = dict(part.partition("=")[::2] for part in plan.split(","))
    if parts.keys() != {"block", "ahead", "fetch"} or parts["fetch"] not in FETCHES:
        raise ValueError(f"expected block=COLUMNS,ahead=COLUMNS,fetch={'|'.join(FETCHES)}, got {plan!r}")
    block, ahead = int(parts["block"]), int(parts["ahead"])
    _core.force_plan(_core.Plan(block, ahead, getattr(_core.Fetch, parts["fetch"])))


def last_plan() -> str | None:
    """The plan of this thread's last step on the compiled kernel, or None before the first."""
    if why_missing is not None or not (plan := _core.last_plan()).block:
        return None
    return f"block={plan.block},ahead={plan.ahead},fetch={plan.fetch.name}"


if why_missing is None:
    for _name, _use in (("GUT_FAST_TIER", _core.set_tier), ("GUT_FAST_PLAN", force_plan)):
        try:
            if _value := os.environ.get(_name):
                _use(_value)
        except ValueError as error:
            why_missing = f"environment variable {_name}: {error}"

_exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # PyTorch 2.10 and later
_reader = (
    None
    if why_missing is not None or _exchange_api is None
    else _core.tensor_reader(_exchange_api, [torch.Tensor, torch.nn.Parameter])
)


def unavailable(
    device_type: str, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None = None
) -> str | None:
    """The reason why this backend cannot serve such tensors, or None."""
    if why_missing is not None:
        return why_missing
    if device_type != "cpu":
        return f"it computes on CPU tensors, these are on {device_type!r}"
    instances = Instances(PAIRS, _core.MAX_STATES, _core.MAX_MESSAGES)
    return instances.refusal(dtype, num_states, num_messages, state_dtype)


def tiers() -> list[str]:
    """The instruction tiers that this machine can use, the fastest first; none without the compiled extension."""
    return list(_core.available_tiers()) if why_missing is None else []


def tier() -> str | None:
    """The instruction tier in use, or None without the compiled extension."""
    return _core.tier() if why_missing is None else None


def set_tier(name: str) -> None:
    """Makes all later steps use this instruction tier. Raises ValueError if the machine does not have it."""
    _core.set_tier(name)


def gossip_step(step: GossipStep) -> None:
    """One step in place, on `torch.get_num_threads()` threads."""
    _call(_core.gossip_step, step)


def message(step: GossipStep, rows: Rows, residuals: Rows = ()) -> None:
    """Writes the messages of agent i into ``rows[i]``, the first half of the split form."""
    _half(_core.message, step, rows, residuals)


def combine(step: GossipStep, rows: Rows) -> None:
    """Mixes the rows and updates in place, the second half of the split form."""
    _half(_core.combine, step, rows, ())


def _half(half: Callable[..., None], step: GossipStep, rows: Rows, residuals: Rows) -> None:
    dtype = next((row.dtype for row in rows if row is not None), arithmetic(step.parameters[0].dtype))
    _call(half, step, _dtype(dtype), _addresses(rows), _addresses(residuals))


def _addresses(rows: Rows) -> list[int]:
    return [0 if row is None else row.data_ptr() for row in rows]


def _call(function: Callable[..., None], step: GossipStep, *more: Any) -> None:
    # Only a gradient that is not contiguous is copied; the list keeps such copies alive during the call.
    gradients = [None if gradient is None else gradient.resolve_neg().contiguous() for gradient in step.gradients]
    function(
        *map(_dtype, step.dtypes),
        step.num_agents,
        [parameter.data_ptr() for parameter in step.parameters],
        [0 if gradient is None else gradient.data_ptr() for gradient in gradients],
        [parameter.numel() // step.num_agents for parameter in step.parameters],
        [buffer.data_ptr() for buffer in step.state],
        step.coefficients.data_ptr(),
        step.num_messages,
        step.row_start.data_ptr(),
        step.neighbor.data_ptr(),
        step.weight.data_ptr(),
        0 if step.grad_scale is None else step.grad_scale.data_ptr(),
        *more,
        torch.get_num_threads(),
    )


def _dtype(dtype: torch.dtype) -> Any:
    return getattr(_core.DType, str(dtype).removeprefix("torch."))


def direct_step(step: GossipStep) -> Callable[[], None] | None:
    """A function that performs a step of plain, contiguous CPU tensors that are as the op describes; None for others.

    It does the same as the op's checks and `gossip_step`, 30 times as fast, but cannot say what is wrong with a step.
    """
    tensor_step = _tensor_step(step)
    return None if tensor_step is None else lambda: tensor_step.run(torch.get_num_threads())


def direct_message(step: GossipStep, rows: Rows, residuals: Rows = ()) -> bool:
    """Does `message` and returns True if the step's tensors and the rows are plain, contiguous CPU tensors."""
    tensor_step = _tensor_step(step)
    return tensor_step is not None and tensor_step.message(
        _reader, list(rows), list(residuals), torch.get_num_threads()
    )


def direct_combine(step: GossipStep, rows: Rows) -> bool:
    """Does `combine` and returns True if the step's tensors and the rows are plain, contiguous CPU tensors."""
    tensor_step = _tensor_step(step)
    return tensor_step is not None and tensor_step.combine(_reader, list(rows), [], torch.get_num_threads())


def _tensor_step(step: GossipStep) -> Any:
    if _reader is None or not step.parameters:
        return None
    dtype, state_dtype = step.dtypes
    if unavailable("cpu", dtype, len(step.state), step.num_messages, state_dtype) is not None:
        return None
    return _core.tensor_step(_reader, *step)


def are_plain(step: GossipStep) -> bool:
    """True if parameters, state and gradients are plain, contiguous tensors of one device that fit each other.

    It is False also where this cannot be seen quickly. Nothing else of the step is looked at.
    """
    return _reader is not None and _core.are_plain(
        _reader, step.num_agents, step.parameters, step.state, step.gradients
    )
