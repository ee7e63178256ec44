"""The compiled CUDA kernels: all segments, all agents, in one pass over memory, on the caller's stream.

Nothing waits for the device and nothing is copied to it, so that a step can be captured into a CUDA graph; such a graph
reads the coefficients anew at every replay if they lie on the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gut_fast.kernels.step import HALVES, GossipStep, Instances, Rows, arithmetic, message_each, rows_of_all

__all__ = ["combine", "gossip_step", "message", "unavailable", "why_missing"]

DEVICE_TYPE = "cuda"
PAIRS = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float64, *HALVES)),
    *((torch.float32, half) for half in HALVES),
    *((half, torch.float32) for half in HALVES),
)
"""The pairs of dtypes, of parameters and of state, that are compiled in."""

try:
    from gut_fast._core import CUDA_OPTION
except ImportError:
    CUDA_OPTION = "AUTO"


def _why_missing(error: ImportError) -> str:
    """Why there are no compiled CUDA kernels: they were not asked for, nvcc was not found, or they do not load."""
    if importlib.util.find_spec("gut_fast._cuda") is not None:
        return f"the compiled extension gut_fast._cuda did not import ({error}); build gut_fast anew"
    if CUDA_OPTION == "OFF":
        return "gut_fast was built without it, because of GUT_FAST_CUDA=OFF; build gut_fast anew without that"
    return (
        "gut_fast was built without it, because no nvcc of 12.8 or later was found; build gut_fast where there is one"
    )


try:
    from gut_fast import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    why_missing: str | None = _why_missing(error)
else:
    why_missing = None


def unavailable(
    device_type: str, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None = None
) -> str | None:
    """The reason why this backend cannot serve such tensors, or None."""
    if why_missing is not None:
        return why_missing
    if device_type != DEVICE_TYPE:
        return f"it computes on CUDA tensors, these are on {device_type!r}"
    if DEVICE_TYPE == "cuda" and torch.version.hip is not None:
        return "it is compiled for NVIDIA GPUs"
    if refusal := _refusal():
        return refusal
    instances = Instances(PAIRS, _cuda.MAX_STATES, _cuda.MAX_MESSAGES)
    return instances.refusal(dtype, num_states, num_messages, state_dtype)


def gossip_step(step: GossipStep) -> None:
    """One step in place: in one launch, or in two for more agents than the shared memory of a block has room for."""
    compiled = _compiled_step(step)
    dtype, device = step.parameters[0].dtype, step.parameters[0].device
    if _cuda.fits(_index(device), _compiled(dtype), step.num_messages, step.num_agents):
        _cuda.gossip_step(compiled)
        return
    length = step.num_messages * sum(parameter.numel() for parameter in step.parameters) // step.num_agents
    rows = torch.empty(step.num_agents, length, dtype=arithmetic(dtype), device=device)
    table = rows.data_ptr() + torch.arange(step.num_agents, device=device) * (length * rows.element_size())
    for half in (_cuda.message, _cuda.combine):
        half(compiled, _compiled(rows.dtype), step.num_agents, [], table.data_ptr())


def message(step: GossipStep, rows: Rows) -> None:
    """Writes the messages of agent i into ``rows[i]``, the first half of the split form."""
    message_each(step, rows, partial(_split, _cuda.message))


def combine(step: GossipStep, rows: Rows) -> None:
    """Mixes the rows and updates in place, the second half of the split form."""
    _split(_cuda.combine, step, rows_of_all(step, rows, partial(_split, _cuda.message)))


def _split(half: Callable[..., None], step: GossipStep, rows: Sequence[Tensor]) -> None:
    # Room for the addresses of more rows than a kernel's arguments hold; it may be freed once the kernel is queued.
    length = len(rows) if len(rows) > _cuda.FEW_ROWS else 0
    table = torch.empty(length, dtype=torch.int64, device=step.parameters[0].device)
    addresses = [row.data_ptr() for row in rows]
    half(_compiled_step(step), _compiled(rows[0].dtype), len(rows), addresses, table.data_ptr())


def _refusal() -> str:
    """The reason why the current device cannot run the kernels; empty if it can, or if there is no device to ask."""
    return _cuda.refusal(torch.cuda.current_device()) if torch.cuda.is_available() else ""


def _index(device: torch.device) -> int:
    return device.index or 0


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _is_on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _compiled(dtype: torch.dtype) -> _cuda.DType:
    compiled: _cuda.DType = getattr(_cuda.DType, str(dtype).removeprefix("torch."))
    return compiled


def _compiled_step(step: GossipStep) -> _cuda.Step:
    device, (dtype, state_dtype) = step.parameters[0].device, step.dtypes
    return _cuda.Step(
        _index(device),
        _stream(device),
        _compiled(dtype),
        _compiled(state_dtype),
        step.num_agents,
        [parameter.data_ptr() for parameter in step.parameters],
        [0 if gradient is None else gradient.data_ptr() for gradient in step.gradients],
        [parameter.numel() // step.num_agents for parameter in step.parameters],
        [buffer.data_ptr() for buffer in step.state],
        step.coefficients.data_ptr(),
        _is_on_device(step.coefficients),
        step.num_messages,
        step.neighbor.numel(),
        step.row_start.data_ptr(),
        step.neighbor.data_ptr(),
        step.weight.data_ptr(),
        0 if step.grad_scale is None else step.grad_scale.data_ptr(),
    )
