"""Who solves a problem: a backend on a device, with an instruction tier and a number of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from gut_fast.kernels.backends import BACKENDS
from gut_fast.rules import UpdateRule
from gut_fast.verify.lockstep import Precision

__all__ = ["Setting", "devices", "settings", "unavailable"]

BACKENDS_WITH_TIERS = ("cpu",)


class Setting(NamedTuple):
    """What must not change a single bit; None is what is in force."""

    tier: str | None = None
    threads: int | None = None
    repeat: int = 0

    def __str__(self) -> str:
        tier = "" if self.tier is None else f"tier {self.tier}"
        threads = "" if self.threads is None else f"{self.threads} thread{'s' * (self.threads != 1)}"
        repeat = "" if self.repeat == 0 else "once more"
        return ", ".join(filter(None, (tier, threads, repeat))) or "as it is"

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Puts back what was before."""
        threads = torch.get_num_threads()
        with contextlib.nullcontext() if self.tier is None else _tier_in_force(self.tier):
            try:
                torch.set_num_threads(self.threads or threads)
                yield
            finally:
                torch.set_num_threads(threads)


def settings(backend: str, tiers: Sequence[str], threads: Sequence[int], device: str = "cpu") -> list[Setting]:
    """All in which a backend must give the same bits; on another device it simply has to do so twice."""
    if device != "cpu":
        return [Setting(), Setting(repeat=1)]
    if backend not in BACKENDS_WITH_TIERS:
        return [Setting()]
    return [Setting(tier, count) for tier in tiers for count in threads or (None,)]


def devices() -> list[str]:
    """Where tensors can be put."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def unavailable(rule: UpdateRule, precision: Precision, backend: str, device: str) -> str | None:
    """Why a backend cannot serve such tensors, in its own words, or None."""
    dtype, state_dtype = precision
    reason: str | None = BACKENDS[backend].unavailable(device, dtype, len(rule.states), rule.num_messages, state_dtype)
    return reason


@contextlib.contextmanager
def _tier_in_force(name: str) -> Iterator[None]:
    from gut_fast import _core

    before = _core.tier()
    _core.set_tier(name)
    try:
        yield
    finally:
        _core.set_tier(before)
