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
    """Sets the default generators back to a `state` that `get_state` has returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the default generators of `device`; ``torch.manual_seed`` would also seed the generators of other GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the default generators are put back to their state before."""
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    return context


def initial_state(seed: int, device: torch.device) -> RandomState:
    """The state that `seed_generators` would set; the generators themselves stay as they are."""
    with own_random_state(device):
        seed_generators(seed, device)
        return get_state(device)
