"""State of an inner optimizer that is mixed at the end of each round, as the models are.

With second moments of its own each agent scales its steps differently, and the agents' average then settles where the
gradients so scaled cancel out, which is elsewhere than where the gradients do, however well the models are mixed.
Second moments that are mixed leave nothing of that. They are mixed and not tracked, as a tracked one can be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import shown
from gut_fast.coefficients import plain_gossip
from gut_fast.kernels import ops, validation
from gut_fast.kernels.backends import GossipStep
from gut_fast.optim.local import state_after_a_step
from gut_fast.topology import CSR

__all__ = ["checked_names", "mix"]

UPPER_HALF = -(1 << 16)
"""The bits of a float32 that a bfloat16 has."""


def checked_names(names: Any, optimizer: Optimizer) -> tuple[str, ...]:
    """Returns the names of an optimizer's state that are to be mixed.

    Raises:
        TypeError: not a list or tuple of names.
        ValueError: a name that the optimizer's state does not have, or not in the shape of the parameters.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Gossip: mix_state must be a tuple of names, such as ('exp_avg_sq',), got {shown(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"Gossip: mix_state has a name twice: {shown(names)}")
    parameter, state = state_after_a_step(optimizer)
    if names and parameter is not None:
        alike = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape]
        if unknown := [name for name in names if name not in alike]:
            known = ", ".join(map(repr, alike)) or "nothing"
            raise ValueError(
                f"Gossip: mix_state has {unknown[0]!r}, but of the shape of its parameters "
                f"{type(optimizer).__name__} keeps {known}"
            )
    return tuple(names)


def mix(tensors: Sequence[Tensor], mixing: CSR, backend: str) -> Callable[[], None]:
    """Returns a function that mixes tensors of all agents in place: ``v_i + Σ_j w_ij (X_j − X_i)``.

    X is v in bfloat16 if it is float32, else v itself. It is cut off, not rounded to the nearest: so X is nowhere
    larger than v, and what is not negative stays so. Every agent takes X for its own too, so the mean stays.

    Raises:
        TypeError, ValueError, RuntimeError: a tensor cannot be mixed; nothing has been changed.
    """
    coefficients = torch.tensor(plain_gossip(2, 1).flat(), dtype=torch.float64, device="cpu")
    step = GossipStep(list(tensors), [], [None] * len(tensors), coefficients, 1, *mixing, None)
    validation.check(step)
    return lambda: ops.combine_(step, rows_of(step), backend)


@torch.no_grad()
def rows_of(step: GossipStep) -> list[Tensor]:
    """Returns what each agent sends of the tensors that are mixed."""
    agents = step.num_agents
    rows = torch.cat([tensor.detach().reshape(agents, -1) for tensor in step.parameters], dim=1)
    if rows.dtype == torch.float32:
        rows = (rows.view(torch.int32) & UPPER_HALF).view(torch.float32).to(torch.bfloat16)
    return list(rows)
