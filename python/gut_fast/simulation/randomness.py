"""Seeds derived from seeds, and the state of torch's random generators."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["derive_seed", "get_state", "initial_state", "own_random_state", "seed_generators", "set_state"]

RandomState = dict[str, Tensor]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, for example of (seed, agent, epoch)."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def get_state(device: torch.device) -> RandomState:
    """The state of the default generators that random operations on `device` may use."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_state(state: RandomState, device: torch.device) -> None:
    """Undoes everything drawn on `device` since `get_state` returned `state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the same generators. (``torch.manual_seed`` would also seed those of all other GPUs.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A context in which the default generators may be used freely; afterwards they are as they were."""
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    return context


def initial_state(seed: int, device: torch.device) -> RandomState:
    """The state after `seed_generators`, which are not seeded outside."""
    with own_random_state(device):
        seed_generators(seed, device)
        return get_state(device)
