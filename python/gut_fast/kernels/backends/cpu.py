"""The compiled kernel: all segments, all agents, in one pass over memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gut_fast.kernels.codes import Code, Layout, Place, keys_of
from gut_fast.kernels.step import GossipStep, Instances, Rows

__all__ = [
    "combine",
    "direct_combine",
    "direct_decode",
    "direct_encode",
    "direct_message",
    "direct_step",
    "force_plan",
    "gossip_step",
    "last_plan",
    "message",
    "read",
    "set_tier",
    "stream_step",
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

UNREADABLE = "the compiled kernel needs plain, contiguous tensors that do not overlap, and was given others"

FETCHES = ("none", "near", "outer", "write")
"""Where lines that will be needed are brought: nowhere, into L1, into L2, or into L1 to be written."""

try:
    from gut_fast import _core
except ImportError as error:  # a source tree without its extension still has the torch backend
    _core = None  # type: ignore[assignment]
    why_missing: str | None = f"the compiled extension gut_fast._core did not import ({error}); build gut_fast anew"
else:
    why_missing = None


def force_plan(plan: str | None) -> None:
    """Makes all later steps use a plan, such as ``"block=256,ahead=512,fetch=near,threads=2"``; None: the best again.

    A step takes `block` columns of all agents at a time, and fetches from memory what it needs `ahead` columns later,
    counted in the order in which rows are read, into a cache (one of `FETCHES`), on `threads` threads, but not on more
    than `torch.get_num_threads()`. Bits do not depend on it.

    Without it the plan follows from the sizes of the caches, and the first steps of each kind and size,
    `TRIED_STEPS`, try longer and shorter blocks and then variants of the best; the fastest stays.

    Raises:
        ValueError: the plan is not of this form, or a number is out of range.
    """
    if plan is None:
        _core.force_plan(None)
        return
    parts = dict(part.partition("=")[::2] for part in plan.split(","))
    if parts.keys() != {"block", "ahead", "fetch", "threads"} or parts["fetch"] not in FETCHES:
        raise ValueError(f"expected block=COLUMNS,ahead=COLUMNS,fetch={'|'.join(FETCHES)},threads=COUNT, got {plan!r}")
    block, ahead, threads = (int(parts[name]) for name in ("block", "ahead", "threads"))
    _core.force_plan(_core.Plan(block, ahead, getattr(_core.Fetch, parts["fetch"]), threads))


def last_plan() -> str | None:
    """The plan of this thread's last step on the compiled kernel, or None before the first."""
    if why_missing is not None or not (plan := _core.last_plan()).block:
        return None
    return f"block={plan.block},ahead={plan.ahead},fetch={plan.fetch.name},threads={plan.threads}"


if why_missing is None:
    for _name, _use in (("GUT_FAST_TIER", _core.set_tier), ("GUT_FAST_PLAN", force_plan)):
        try:
            if _value := os.environ.get(_name):
                _use(_value)
        except ValueError as error:
            why_missing = f"environment variable {_name}: {error}"

TRIED_STEPS = 0 if why_missing is not None else _core.TRIED_STEPS
"""How many steps of each kind and size try plans, before one stays."""

_reader = None if why_missing is not None else _core.TensorReader(torch)


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


def read(step: GossipStep) -> _core.TensorStep | None:
    """The step as C++ has read it, or None if a tensor is not plain, contiguous or as the op describes, on any device.

    It says the same as the op's checks, 30 times as fast, but not what is wrong with a step.
    """
    return None if _reader is None else _reader.read(step)


def direct_step(step: GossipStep) -> Callable[[], None] | None:
    """A function that performs a step whose tensors `read` can read and the kernel serves; None for others."""
    found = _served(step)
    return None if found is None else lambda: found.run(torch.get_num_threads())


def direct_message(step: GossipStep, rows: Rows) -> bool:
    """Does `message` and returns True if the step's tensors and the rows can be read and served."""
    found = _served(step)
    if found is None or _reader is None or len(rows) != step.num_agents:
        return False
    return found.message(_reader, list(rows), torch.get_num_threads())


def direct_combine(step: GossipStep, rows: Rows) -> bool:
    """Does `combine` and returns True if the step's tensors and the rows can be read and served."""
    found = _served(step)
    if found is None or _reader is None:
        return False
    return found.combine(_reader, list(rows), torch.get_num_threads())


@lru_cache(maxsize=256)
def _layout(layout: Layout) -> _core.CodeLayout:
    return _core.CodeLayout(layout.bits, layout.kind == "modulo", list(layout.columns), layout.num_messages)


def direct_encode(
    step: GossipStep, code: Code, coded: Rows, copies: Sequence[Tensor], widths: Sequence[Tensor], place: Place
) -> bool:
    """Does `ops.encode` and returns True if the tensors can be read and served: messages computed in float32."""
    found = _served(step)
    if found is None or _reader is None:
        return False
    keys: list[tuple[int, int]] = []
    if code.seed is not None:
        agents = range(step.num_agents)
        keys = [each for agent in agents for each in keys_of(code.seed, place, agent, step.num_messages)]
    rows = list(coded), list(copies), list(widths)
    layout = _layout(code.layout(step))
    return found.encode(_reader, layout, *rows, keys, place.column % 2**32, torch.get_num_threads())


def direct_decode(
    layout: Layout, coded: Tensor, copy: Tensor, own: Tensor | None, widths: Tensor | None, distance: Tensor | None
) -> bool:
    """Does `ops.decode`, the distances written into `distance`, and returns True if the tensors can be read."""
    if _reader is None:
        return False
    return _layout(layout).decode(_reader, coded, copy, own, widths, distance, torch.get_num_threads())


def _served(step: GossipStep) -> _core.TensorStep | None:
    found = read(step)
    return found if found is not None and found.is_served else None


def gossip_step(step: GossipStep) -> None:
    """One step in place, on `torch.get_num_threads()` threads."""
    _demanded(step).run(torch.get_num_threads())


def message(step: GossipStep, rows: Rows) -> None:
    """Writes the messages of agent i into ``rows[i]``, the first half of the split form."""
    if not direct_message(step, rows):
        raise TypeError(UNREADABLE)


def combine(step: GossipStep, rows: Rows) -> None:
    """Mixes the rows and updates in place, the second half of the split form."""
    if not direct_combine(step, rows):
        raise TypeError(UNREADABLE)


def stream_step(step: GossipStep) -> None:
    """Reads and writes every byte that the step reads and writes, in a plain loop without agents: its ceiling."""
    _demanded(step).stream(torch.get_num_threads())


def _demanded(step: GossipStep) -> _core.TensorStep:
    found = _served(step)
    if found is None:
        raise TypeError(UNREADABLE)
    return found
