"""Checks of an optimizer's arguments and state, before anything is changed. `name` opens every message."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gut_fast.analysis import conserved
from gut_fast.kernels.backends import HALVES, arithmetic
from gut_fast.rules import RULES, Coefficients, UpdateRule, next_drift_lr
from gut_fast.topology import Topology

__all__ = [
    "check_capturable",
    "check_range",
    "check_state_dtype",
    "checked_coefficients",
    "checked_grad_scale",
    "frames_to_the_caller",
    "listed",
    "settings_of",
    "warn_if_unstacked",
    "warns_of_frozen",
    "with_amp",
]

OPTIONS = ("weight_decay", "maximize", "drift_memory")
"""The options of a group, beside its learning rate and hyper-parameters, that its coefficients depend on."""

ZERO_RATE = 1e-12
"""A learning rate that is smaller than this, beside the group's first one, is zero."""


def listed(param_group: dict[str, Any], rule: UpdateRule, name: str) -> tuple[list[Any], list[Tensor]]:
    """Returns the group's parameters, possibly named, as a list, and the tensors in it."""
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


def check_state_dtype(settings: Mapping[str, Any], rule: UpdateRule, state: Sequence[Tensor], name: str) -> None:
    """Raises ValueError if a rule that forgets nothing would keep its state in half the width."""
    own = {key: settings[key] for key in rule.hyperparameters}
    if state and state[0].dtype in HALVES and len(conserved(rule, own)[0]):
        raise ValueError(
            f"{name}: the state is {state[0].dtype}, but the rule {rule.name!r} never forgets"
            f"{' at mu=1' if 'mu' in own else ''}: what rounding adds to the sum of its state over agents would grow "
            "for ever (gut_fast.analysis.rounding); use state_dtype=torch.float32, or another rule"
        )


def check_capturable(topology: Topology, is_across: bool, drift_memory: float | None, name: str) -> None:
    """Raises ValueError if a CUDA graph cannot hold the steps of an optimizer with such arguments."""
    if not topology.is_static:
        raise ValueError(f"capturable=True needs a topology that does not vary with time, got {topology}")
    if is_across:
        raise ValueError("capturable=True: steps of several ranks cannot be captured in a CUDA graph")
    if drift_memory:
        raise ValueError(
            f"{name}: capturable=True with drift_memory={drift_memory}: the drift's rate changes from step to step, "
            "and a CUDA graph repeats one step; leave it out, or give 0"
        )


def checked_grad_scale(grad_scale: Tensor, num_agents: int, name: str) -> Tensor:
    """Returns the factors as the kernels take them. Raises ValueError unless they are real and one per agent."""
    if not isinstance(grad_scale, Tensor) or grad_scale.shape != (num_agents,) or grad_scale.is_complex():
        given = f"{grad_scale.dtype} {[*grad_scale.shape]}" if isinstance(grad_scale, Tensor) else type(grad_scale)
        raise ValueError(f"{name}: grad_scale must be a real tensor [{num_agents}], got {given}")
    return grad_scale.resolve_neg().to(torch.float64).contiguous()


def with_amp(
    grad_scale: Tensor | None, found_inf: Tensor | None, amp_scale: Tensor | None, num_agents: int
) -> Tensor | None:
    """Returns `grad_scale` divided by GradScaler's scale, or zeros if it found infinities; as it is without AMP."""
    if found_inf is None:
        return grad_scale
    factor = 0.0 if found_inf else 1.0 if amp_scale is None else 1.0 / float(amp_scale)
    factors = torch.full((num_agents,), factor, dtype=torch.float64, device="cpu")
    return factors if grad_scale is None else grad_scale.cpu() * factors


def settings_of(
    group: Mapping[str, Any], rule: UpdateRule, default_lr: Any, local_before: int | None = 0
) -> dict[str, Any]:
    """Returns what a group's coefficients depend on, with a learning rate of almost 0 read as 0.

    Schedules that end at zero may miss it by a rounding, on either side: below 1e-12 of the group's first one the
    learning rate is zero. One that is a tensor is read here. ``drift_lr`` is what the next step divides the drift by:
    ρ times the number of steps in its round, as the drift is that of the whole round. ρ forgets by γ a step.

    Args:
        group: a parameter group.
        rule: the update rule.
        default_lr: the optimizer's first learning rate.
        local_before: how many local steps of its round came before a step that mixes; None for a local step.
    """
    settings = {name: group[name] for name in ("lr", *OPTIONS, *rule.hyperparameters)}
    lr, first, memory = settings["lr"], group.get("initial_lr", default_lr), settings["drift_memory"]
    if isinstance(lr, Tensor) and lr.numel() == 1:
        lr = settings["lr"] = lr.item()
    if isinstance(lr, (int, float)):
        is_known = isinstance(first, (int, float)) or (isinstance(first, Tensor) and first.is_cpu)
        if is_known and abs(lr) < ZERO_RATE * float(first):
            lr = settings["lr"] = 0.0
        if local_before is None:
            settings["is_local"] = True
        elif (memory or local_before) and rule.divides_drift and isinstance(memory, (int, float)):
            steps = local_before + 1
            mean_lr = (group["round_lr"] + lr) / steps
            settings["drift_lr"] = steps * next_drift_lr(mean_lr, group["drift_lr"], memory**steps)
    return settings


def checked_coefficients(settings: Mapping[str, Any], rule: UpdateRule, name: str) -> Coefficients:
    """Returns the coefficients of a step with such settings. Raises TypeError or ValueError for a bad one."""
    if isinstance(settings["lr"], Tensor):
        raise ValueError(f"{name}: an lr that is a tensor must hold one number, got shape {[*settings['lr'].shape]}")
    rule.check_option("drift_memory", settings["drift_memory"])
    return rule.coefficients(**{key: value for key, value in settings.items() if key != "drift_memory"})


def warn_if_unstacked(parameters: Sequence[Tensor], num_agents: int, name: str) -> None:
    """Warns if the rows of one plain module's parameters would be taken for agents."""
    if _looks_unstacked(parameters):
        warnings.warn(
            f"{name}: are these the parameters of one plain module, the first of shape {tuple(parameters[0].shape)}? "
            f"Its rows would be taken for {num_agents} agents; gut_fast.stack(module, {num_agents}) makes the "
            f"parameters of {num_agents} modules",
            UserWarning,
            stacklevel=frames_to_the_caller(),
        )


def _looks_unstacked(parameters: Sequence[Tensor]) -> bool:
    """Returns whether these may be the weights and biases of one plain module whose widths happen to be N.

    The parameters of `torch.nn.Linear(5, N)` have shapes (N, 5) and (N,), as if N agents had a vector and a number
    each. They are taken for a module's if there is such a pair, and all weights and biases are spread as torch
    initialises linear and convolutional layers: uniformly within 1/√fan-in. Agents of a stack mostly start alike.
    """
    if any(type(tensor.data) is not Tensor or tensor.is_meta or not tensor.numel() for tensor in parameters):
        return False
    pairs = zip(parameters, [*parameters[1:], None], strict=True)
    biases = [(weight, bias) for weight, bias in pairs if weight.dim() > 1 and bias is not None and bias.dim() == 1]
    weights = [tensor for tensor in parameters if tensor.dim() > 1]
    return bool(biases) and all(
        0 < float(tensor.detach().abs().max()) <= 1.0001 * weight[0].numel() ** -0.5 and not tensor[0].equal(tensor[1])
        for weight, tensor in [*biases, *zip(weights, weights, strict=True)]
    )


def warns_of_frozen(parameters: Sequence[Tensor], weight_decay: float, name: str) -> bool:
    """Warns if weight decay would shrink frozen parameters, and returns whether it has."""
    if not weight_decay:  # which is asked at every change of the learning rate
        return False
    frozen = [each for each in parameters if isinstance(each, nn.Parameter) and not each.requires_grad]
    if not frozen:
        return False
    warnings.warn(
        f"{name}: weight_decay={weight_decay} also shrinks parameters that do not require gradients, the first of "
        f"shape {tuple(frozen[0].shape)}, as a gradient of None counts as zero; put them into a group of their own "
        "with weight_decay=0",
        UserWarning,
        stacklevel=frames_to_the_caller(),
    )
    return True


def frames_to_the_caller() -> int:
    """Returns the `stacklevel` of the first frame outside gut_fast and torch, so that warnings name the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gut_fast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
