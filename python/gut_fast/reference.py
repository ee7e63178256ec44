"""The truth for all tests: one step of any update rule, and every method a second time in its published form.

`step` is the equations of `gut_fast.rules` in plain PyTorch, on any floating dtype and any device, with nothing in
place. `PUBLISHED` are the methods as their papers write them (`gut_fast.published`). Given the same gradients both
produce the same models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.published import PUBLISHED, Published
from gut_fast.rules import UpdateRule, get_rule

__all__ = ["KEPT", "PUBLISHED", "Published", "drift", "recentred", "step", "zero_state"]


def zero_state(rule: str | UpdateRule, z: Tensor) -> dict[str, Tensor]:
    """The state at the start: zeros like `z` under each of the rule's state names."""
    return {name: torch.zeros_like(z) for name in get_rule(rule).states}


def drift(S: Tensor, W: Tensor) -> Tensor:
    """D(i) = Σ_j W[i, j] (S(j) − S(i)) over the agents j with W[i, j] ≠ 0; no other agent's values are touched.

    Differences, never W S − S: near consensus they are tiny, and low precision keeps their digits.
    """
    W = W.to(device=S.device, dtype=S.dtype)
    agents, neighbors = W.nonzero(as_tuple=True)
    total = torch.zeros_like(S)
    # N edges at a time, so memory stays O(N d).
    for i, j in zip(agents.split(len(S)), neighbors.split(len(S)), strict=True):
        total = total.index_add(0, i, _per_agent(W[i, j], S) * (S[j] - S[i]))
    return total


@torch.no_grad()
def step(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    z: Tensor,
    state: Mapping[str, Tensor],
    grad: Tensor,
    W: Any,
    *,
    grad_scale: Any = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of `rule` for N agents; returns the new z and the new state and changes nothing.

    Args:
        rule: a rule or its name.
        hyperparameters: ``lr``, and optionally ``weight_decay``, ``maximize``, ``drift_lr``, ``is_local`` and the
            rule's own: see `UpdateRule.coefficients`.
        z: parameters, [N, ...], any floating dtype and device; the arithmetic is done in it.
        state: a tensor like `z` for each of the rule's states, see `zero_state`.
        grad: the agents' gradients at `z`, like `z`.
        W: mixing matrix, [N, N], a tensor or anything `torch.as_tensor` takes; a local step does not mix.
        grad_scale: one factor per agent on its gradient, [N]; zero drops the gradient, even one that is not finite.

    Raises:
        TypeError: an input that is no tensor, or not of z's floating dtype.
        ValueError: a wrong shape or device, a missing or unknown state or hyper-parameter, entries of W or
            grad_scale that are not finite.
    """
    rule = get_rule(rule)
    if "lr" not in hyperparameters:
        raise ValueError(f"rule {rule.name!r}: hyperparameters must include 'lr', got {sorted(hyperparameters)}")
    coefficients = rule.coefficients(**hyperparameters)
    _check_tensors(rule, z, state, grad)
    W = _per_agent_input("W", W, (len(z), len(z)), z)
    if hyperparameters.get("is_local"):
        W = torch.eye(len(z), dtype=z.dtype, device=z.device)
    if grad_scale is not None:
        scale = _per_agent(_per_agent_input("grad_scale", grad_scale, (len(z),), z), z)
        grad = torch.where(scale == 0, torch.zeros_like(grad), scale * grad)

    inputs = [z, *(state[name] for name in rule.states), grad]
    messages = [_combine(row, inputs) for row in coefficients.A]
    terms = [*inputs, *messages, *(drift(message, W) for message in messages)]
    rows = zip(coefficients.B, coefficients.C, coefficients.E, strict=True)
    new_z, *new_state = [_combine([*b, *c, *e], terms) for b, c, e in rows]
    return new_z, dict(zip(rule.states, new_state, strict=True))


KEPT: Mapping[str, tuple[str, str | None]] = {
    "d2": ("r", None),
    "edm": ("r", None),
    "extra": ("r", None),
    "gradient_tracking": ("v", "q"),
    "k_gt": ("c", None),
    "momentum_tracking": ("v", "m"),
}
"""The rules that keep a sum over agents for ever, zero at the start: of a state, or of one state less another."""


def recentred(rule: str | UpdateRule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the sum of `KEPT` zero again: the first state less the mean over agents of what is summed up.

    Optimizers do this every `gut_fast.analysis.RECENTRING` steps, against what rounding adds to the sum in a long run;
    without rounding it changes nothing. The state of other rules stays as it is.
    """
    name = get_rule(rule).name
    if name not in KEPT:
        return dict(state)
    first, second = KEPT[name]
    excess = state[first] if second is None else state[first] - state[second]
    return {**state, first: state[first] - excess.mean(0)}


def _combine(row: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Σ row[k] terms[k] over the coefficients that are not zero: what a rule does not read cannot bring in NaN."""
    total = torch.zeros_like(terms[0])
    for coefficient, term in zip(row, terms, strict=True):
        if coefficient != 0:
            total = total + coefficient * term
    return total


def _per_agent(values: Tensor, like: Tensor) -> Tensor:
    """One value per agent, shaped to multiply tensors [N, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _per_agent_input(name: str, values: Any, shape: tuple[int, ...], z: Tensor) -> Tensor:
    tensor = torch.as_tensor(values)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {len(z)} agents")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    return tensor.to(device=z.device, dtype=z.dtype)


def _check_tensors(rule: UpdateRule, z: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> None:
    if set(state) != set(rule.states):
        raise ValueError(f"rule {rule.name!r}: state must have exactly {list(rule.states)}, got {list(state)}")
    for name, tensor in {"z": z, **state, "grad": grad}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.dtype != z.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; all must have one floating dtype, z has {z.dtype}")
        if tensor.dim() == 0 or len(tensor) == 0 or tensor.shape != z.shape:
            shapes = f"{name} has shape {tuple(tensor.shape)}, z {tuple(z.shape)}"
            raise ValueError(f"{shapes}; all must have one shape [N, ...], N >= 1 agents")
        if tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z on {z.device}")
