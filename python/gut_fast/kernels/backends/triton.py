"""The step as one Triton kernel, for every GPU that Triton and PyTorch drive; `triton_kernel` holds the kernel.

One launch does the whole step of a model. It reads the tensors' addresses and sizes from a small table on the device.
The table is made anew only when an address changes. It is copied without waiting for the device; in the capture of a
CUDA graph it is written by kernels whose arguments hold the numbers, so that no host memory has to outlive the graph.
Take one step before a capture: the first step compiles.

With the environment variable ``TRITON_INTERPRET=1`` the same kernel runs on CPU tensors, in NumPy, so that its numerics
can be tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gut_fast.kernels.step import HALVES, GossipStep, Rows, arithmetic, message_each, rows_of_all
from gut_fast.requirements import pip_install

__all__ = ["Launch", "combine", "gossip_step", "launch", "message", "unavailable", "why_missing"]

DTYPES = (torch.float32, torch.float64, *HALVES)

why_missing: str | None = (
    None if importlib.util.find_spec("triton") else f"Triton is not installed; {pip_install('triton')}"
)


def unavailable(
    device_type: str, dtype: torch.dtype, num_states: int, num_messages: int, state_dtype: torch.dtype | None = None
) -> str | None:
    """The reason why this backend cannot serve such tensors, or None. Any rule can be compiled."""
    if why_missing is not None:
        return why_missing
    if device_type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return "it computes on GPU tensors; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda"):
        return f"it computes on GPU tensors, these are on {device_type!r}"
    if is_interpreted() != (device_type == "cpu"):
        return f"Triton was imported to {'interpret' if is_interpreted() else 'compile'}, these are on {device_type!r}"
    if dtype not in DTYPES or (state_dtype or dtype) not in DTYPES:
        return f"it computes in floating point of 16, 32 and 64 bits, not on {dtype} with {state_dtype or dtype}"
    return None


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return _kernel().is_interpreted


class _Kernel(NamedTuple):
    launch: Any
    dtypes: dict[torch.dtype, Any]
    is_interpreted: bool


@lru_cache(maxsize=1)
def _kernel() -> _Kernel:
    """Imports Triton, which takes a while, when it is first needed."""
    import triton
    import triton.language as tl

    from gut_fast.kernels.backends.triton_kernel import gossip_kernel

    dtypes = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in DTYPES}
    return _Kernel(gossip_kernel, dtypes, not isinstance(gossip_kernel, triton.JITFunction))


def gossip_step(step: GossipStep) -> None:
    """One step in place, on the current stream of the tensors' device."""
    _run(step, None, sends=True, mixes=True)


def message(step: GossipStep, rows: Rows) -> None:
    """Writes the messages of agent i into ``rows[i]``, the first half of the split form."""
    message_each(step, rows, partial(_run, sends=True, mixes=False))


def combine(step: GossipStep, rows: Rows) -> None:
    """Mixes the rows and updates in place, the second half of the split form."""
    _run(step, rows_of_all(step, rows, partial(_run, sends=True, mixes=False)), sends=False, mixes=True)


class Chip(NamedTuple):
    """The properties of a GPU that the launch depends on; the cache is the L2 cache."""

    num_processors: int
    cache_bytes: int


class Launch(NamedTuple):
    """The cut of a step: tiles of `block_columns` columns of all agents, in blocks of `block_agents` agents.

    At most `num_programs` programs run; they take the tiles in turn.
    """

    block_agents: int
    block_columns: int
    num_warps: int
    num_programs: int


def launch(num_agents: int, bytes_per_number: int, chip: Chip) -> Launch:
    """The cut of a step of N agents whose inputs and messages take `bytes_per_number` for one number of one agent.

    Every thread has 8 numbers of a block, in float32 two accesses of 16 bytes to each tensor, and there are 16 warps on
    every processor: as many as fit at 128 registers a thread, so that no program waits for another one to end.

    Up to 128 agents are one block, whose inputs stay in registers from message to mixing. A row of it is at least 16
    columns, 64 bytes of one agent's float32. The smaller the programs, the better their loads and their barriers
    overlap.

    More agents go through a tile in several blocks and read its inputs twice. The second time they come from the L2
    cache if it holds the tiles of all programs; half of it is left for all else. So programs become fewer and larger
    as agents become more, and tiles as narrow as 8 columns: 32 bytes, a sector of memory.
    """
    if num_agents <= 128:
        block_agents = 1 << (num_agents - 1).bit_length()
        block_columns = max(16, 1024 // block_agents)
        num_warps = block_agents * block_columns // 256
        return Launch(block_agents, block_columns, num_warps, 16 // num_warps * chip.num_processors)
    columns_in_cache = chip.cache_bytes // 2 // (num_agents * bytes_per_number)
    for num_warps in (4, 8, 16):
        num_programs = 16 // num_warps * chip.num_processors
        if columns_in_cache >= 8 * num_programs:
            break
    block_columns = 16 if columns_in_cache >= 16 * num_programs else 8
    return Launch(256 * num_warps // block_columns, block_columns, num_warps, num_programs)


@lru_cache(maxsize=64)
def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":
        return Chip(2, 1 << 25)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


def _run(step: GossipStep, rows: Sequence[Tensor] | None, *, sends: bool, mixes: bool) -> None:
    if not any(parameter.numel() for parameter in step.parameters):
        return
    device = step.parameters[0].device
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        _launch(step, rows, device, SENDS=sends, MIXES=mixes)


def _launch(step: GossipStep, rows: Sequence[Tensor] | None, device: torch.device, **halves: bool) -> None:
    kernel, num_agents, num_messages = _kernel(), step.num_agents, step.num_messages
    dtype, state_dtype = step.dtypes
    compute = torch.promote_types(arithmetic(dtype), arithmetic(state_dtype))
    cut = launch(num_agents, _bytes_per_number(step, compute), _chip(device))
    table = _table(step, cut.block_columns)
    num_programs = min(cut.num_programs, table[-1])
    addresses = [] if rows is None else [row.data_ptr() for row in rows]
    if rows is None:
        padded = -(-num_agents // cut.block_agents) * cut.block_agents
        channel = torch.empty(num_programs * num_messages * padded * cut.block_columns, dtype=compute, device=device)
    else:
        channel = _on_device(tuple(addresses), torch.int64, device)
    row_dtype = compute if rows is None else rows[0].dtype
    kernel.launch[(num_programs,)](
        _on_device(table, torch.int64, device),
        len(step.parameters),
        num_agents,
        _coefficients(step, device),
        step.grad_scale,
        step.row_start,
        step.neighbor,
        step.weight,
        num_agents if rows is None else len(rows),
        channel,
        Q=len(step.state),
        M=num_messages,
        DTYPE=kernel.dtypes[dtype],
        STATE_DTYPE=kernel.dtypes[state_dtype],
        ROW_DTYPE=kernel.dtypes[row_dtype],
        COMPUTE=kernel.dtypes[compute],
        ALIGNMENT=_alignment(step, addresses, row_dtype),
        BLOCK_AGENTS=cut.block_agents,
        BLOCK_COLUMNS=cut.block_columns,
        ONE_BLOCK=cut.block_agents >= num_agents,
        BY_HAND=kernel.is_interpreted,
        **halves,
        num_warps=cut.num_warps,
        num_stages=1,
    )


def _bytes_per_number(step: GossipStep, compute: torch.dtype) -> int:
    dtype, state_dtype = step.dtypes
    return 2 * dtype.itemsize + len(step.state) * state_dtype.itemsize + step.num_messages * compute.itemsize


def _table(step: GossipStep, block_columns: int) -> tuple[int, ...]:
    """The kernel's argument ``table``; its last number is the number of all tiles."""
    words = [buffer.data_ptr() for buffer in step.state]
    num_columns = num_tiles = 0
    for parameter, gradient in zip(step.parameters, step.gradients, strict=True):
        words += parameter.data_ptr(), 0 if gradient is None else gradient.data_ptr(), num_columns, num_tiles
        columns = parameter.numel() // step.num_agents
        num_columns += columns
        num_tiles += -(-columns // block_columns)
    return (*words, 0, 0, num_columns, num_tiles)


def _alignment(step: GossipStep, rows: Sequence[int], row_dtype: torch.dtype) -> int:
    """The number of numbers, up to 16 bytes of them, that every access of the kernel may take at once."""
    dtype, state_dtype = step.dtypes
    return math.gcd(
        16 // dtype.itemsize,
        *(parameter.numel() // step.num_agents for parameter in step.parameters),
        *(parameter.data_ptr() // dtype.itemsize for parameter in step.parameters),
        *(gradient.data_ptr() // dtype.itemsize for gradient in step.gradients if gradient is not None),
        *(buffer.data_ptr() // state_dtype.itemsize for buffer in step.state),
        *(address // row_dtype.itemsize for address in rows),
    )


def _coefficients(step: GossipStep, device: torch.device) -> Tensor:
    if step.coefficients.device == device:
        return step.coefficients
    return _on_device(tuple(step.coefficients.tolist()), torch.float64, device)


def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the values on the device, made without waiting for the device.

    In a capture the graph itself has to write the values, at every replay, by kernels that have them as arguments: a
    copy would read host memory that may be gone by then.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    if not torch.cuda.is_current_stream_capturing():
        return _copied(values, dtype, device, torch.cuda.current_stream(device).cuda_stream)
    tensor = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(list(tensor.unbind()), list(values))
    return tensor


@lru_cache(maxsize=128)
def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """The values on the device, kept for the stream that copied them: another one could read them too early or late."""
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
