"""What an optimizer refuses, before anything is changed. `name` opens every message."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.kernels.backends import arithmetic
from gut_fast.rules import RULES, UpdateRule

__all__ = ["check_entries", "check_range", "checked_grad_scale", "frames_to_the_caller", "listed"]


def listed(param_group: dict[str, Any], rule: UpdateRule, name: str) -> tuple[list[Any], list[Tensor]]:
    """The group's parameters, possibly named, as a list, and the tensors in it."""
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"{name}: a parameter group is a dict with 'params', got {type(param_group).__name__}")
    others = set().union(*(other.hyperparameters for other in RULES.values())) - set(rule.hyperparameters)
    if unknown := sorted(others & set(param_group)):
        raise ValueError(f"{name}: rule {rule.name!r} has no hyper-parameter {', '.join(unknown)}")
    params = param_group["params"]
    if isinstance(params, set):
        raise TypeError(f"{name}: parameters must have an order, got a set; pass a list")
    params = [params] if isinstance(params, Tensor) else list(params)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"{name}: parameters must be tensors, got {[type(t).__name__ for t in tensors]}")
    if len(set(tensors)) < len(tensors):
        raise ValueError(f"{name}: a parameter stands more than once in the group")
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(f"{name}: a parameter was made in inference mode and cannot be trained; clone it")
    return params, tensors


def check_range(coefficients: list[float], lr: float, parameters: Sequence[Tensor], name: str) -> None:
    """Raises ValueError if a coefficient is more than the parameters' arithmetic holds."""
    for parameter in parameters[:1]:
        dtype = arithmetic(parameter.dtype)
        largest, most = max(map(abs, coefficients)), torch.finfo(dtype).max
        if largest > most:
            raise ValueError(
                f"{name}: lr={lr} makes a coefficient of {largest:.3g}, more than {dtype} holds ({most:.3g}); use a "
                "larger lr, or 0"
            )


def checked_grad_scale(grad_scale: Tensor, num_agents: int, name: str) -> Tensor:
    """The factors as the kernels take them."""
    if not isinstance(grad_scale, Tensor) or grad_scale.shape != (num_agents,) or grad_scale.is_complex():
        given = f"{grad_scale.dtype} {[*grad_scale.shape]}" if isinstance(grad_scale, Tensor) else type(grad_scale)
        raise ValueError(f"{name}: grad_scale must be a real tensor [{num_agents}], got {given}")
    return grad_scale.to(torch.float64).contiguous()


def check_entries(entries: Any, states: Sequence[str], parameter: Tensor, index: int, name: str) -> None:
    """Raises ValueError unless this is the saved state of a parameter: a tensor of its shape for each name."""

    def describe(tensor: Any) -> str:
        is_right = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return str(tuple(tensor.shape)) if is_right else f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}"

    found = {key: describe(tensor) for key, tensor in entries.items()} if isinstance(entries, dict) else entries
    expected = dict.fromkeys(states, describe(parameter))
    if found != expected:
        raise ValueError(f"{name}: state of parameter {index} is {found}, expected {expected}")


def frames_to_the_caller() -> int:
    """The `stacklevel` of the first frame outside gut_fast and torch, so that a warning points at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gut_fast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
