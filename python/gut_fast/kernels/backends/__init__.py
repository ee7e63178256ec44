"""The backends, each of which can compute a gossip step: one module per backend, all with the same functions.

``unavailable(device_type, dtype, num_states, num_messages, state_dtype) -> str | None`` says why the backend cannot
serve such tensors, or returns None if it can. ``gossip_step(step)`` computes a `GossipStep` in place; its tensors have
been checked and are plain, and its gradients contiguous (`gut_fast.kernels.step.resolved`).

The split form is for agents on several ranks. ``message(step, rows)`` writes what agent i sends into ``rows[i]``, the
M messages one after the other, each the whole model, segment after segment. ``combine(step, rows)`` mixes and updates:
``step.neighbor`` indexes into the rows, first those of the agents that are here, then received ones. The drift is
``Σ_j w_ij (rows[j] − rows[i])`` of the rows as they were sent, so that their rounding does not move the mean over
agents. A backend without ``message`` and ``combine`` has no split form.
"""

from __future__ import annotations

from types import ModuleType

from gut_fast.kernels.backends import cpu, cuda, triton
from gut_fast.kernels.backends import torch as plain_torch
from gut_fast.kernels.step import HALVES, GossipStep, Rows, arithmetic

__all__ = ["AUTOMATIC", "BACKENDS", "HALVES", "GossipStep", "Rows", "arithmetic"]

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": plain_torch}
"""All backends by name."""

AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
"""The backends that ``"auto"`` tries in turn, by the type of the tensors' device; elsewhere it is ``"torch"``."""
