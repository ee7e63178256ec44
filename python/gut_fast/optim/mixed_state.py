"""State of an inner optimizer that is mixed at the end of each round, as the models are.

With second moments of its own each agent scales its steps differently, and the agents' average then settles where the
gradients so scaled cancel out, which is elsewhere than where the gradients do, however well the models are mixed.
Second moments that are mixed leave nothing of that. They are mixed and not tracked, as a tracked one can be negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import shown
from gut_fast.distributed import state_step
from gut_fast.kernels import validation
from gut_fast.kernels.backends import GossipStep
from gut_fast.kernels.validation import described
from gut_fast.optim.local import names_of_state
from gut_fast.topology import CSR

__all__ = ["checked_names", "mixed_state"]


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
    alike = names_of_state(optimizer) if names else None
    if alike is not None and (unknown := [name for name in names if name not in alike]):
        known = ", ".join(map(repr, alike)) or "nothing"
        raise ValueError(
            f"Gossip: mix_state has {unknown[0]!r}, but of the shape of its parameters "
            f"{type(optimizer).__name__} keeps {known}"
        )
    return tuple(names)


def mixed_state(
    names: Sequence[str], states: Mapping[Tensor, Mapping[str, Any]], parameters: Sequence[Tensor], mixing: CSR
) -> GossipStep:
    """Makes the step that mixes the state of these names, of all parameters; state that is not there is left out.

    Raises:
        TypeError, ValueError: it cannot be mixed; nothing has been changed.
    """
    tensors = []
    for name in names:
        for parameter in parameters:
            value = states.get(parameter, {}).get(name)
            if value is not None and (not isinstance(value, Tensor) or value.shape != parameter.shape):
                raise ValueError(
                    f"Gossip: mix_state: {name!r} of a parameter {tuple(parameter.shape)} is {described(value)}; only "
                    "state of the parameters' shape can be mixed"
                )
            tensors.append(parameter.new_empty(0) if value is None else value)
    if there := [tensor for tensor in tensors if tensor.numel()]:
        validation.check(state_step(there, mixing))
    return state_step(tensors, mixing)
