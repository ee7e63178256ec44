"""Who can compute a gossip step: one module per backend, each with the same two functions.

``unavailable(device_type, dtype, num_states, num_messages, state_dtype) -> str | None`` says why the backend cannot
serve such tensors, or None if it can. ``gossip_step(step)`` computes a `GossipStep` in place; its tensors have been
checked.
"""

from __future__ import annotations

from types import ModuleType

from gut_fast.backends import cpu
from gut_fast.backends import torch as plain_torch
from gut_fast.backends.step import GossipStep

__all__ = ["BACKENDS", "GossipStep"]

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "torch": plain_torch}
"""Backends by name, in the order in which ``"auto"`` tries them."""
