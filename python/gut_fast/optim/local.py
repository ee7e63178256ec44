"""The inner optimizer of `Gossip`: whether it acts on each agent by itself, and whether it can load a state.

Both are found by trial steps on a few small tensors.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import shown
from gut_fast.kernels.validation import described, unreadable
from gut_fast.optim.loading import check_form

__all__ = ["check_inner_state", "names_of_state", "why_not_local"]

SHAPES = (((3, 4), 12), ((5,), 5), ((), 1))
"""Shapes of a parameter of one agent in trial steps, and their sizes."""

MIXES = "it looks at all agents' numbers together"

NOT_LOCAL = {
    "LBFGS": "its step needs a closure",
    "SparseAdam": "it takes sparse gradients only",
    "Adafactor": MIXES,
    "Muon": MIXES,
}
"""Torch's optimizers that cannot act on each agent by itself, and why; nor can their subclasses."""


def why_not_local(optimizer: Optimizer, is_of_one: bool) -> str | None:
    """Returns why the optimizer cannot act on each agent by itself, or None; warns if no trial step can tell.

    Where its parameters are of one agent it may look at whole tensors. A parameter of each shape is tried by itself, as
    an optimizer may refuse some of them.
    """
    for parent in type(optimizer).__mro__:
        if parent.__module__.startswith("torch.optim") and parent.__name__ in NOT_LOCAL:
            reason = NOT_LOCAL[parent.__name__]
            return None if is_of_one and reason == MIXES else reason
    if is_of_one or _is_of_torch(optimizer):
        return None
    refusals = []
    for shape, size in SHAPES:
        start = torch.linspace(1.0, 2.0, 2 * size).view(2, *shape)
        try:
            moves = [_second_agents_move(optimizer, start, of_first) for of_first in (1.0, 1000.0)]
        except Exception as error:
            refusals.append(f"{type(error).__name__} {error}".strip())
            continue
        if not torch.equal(*moves):
            return MIXES
    if len(refusals) == len(SHAPES):
        warnings.warn(
            f"{type(optimizer).__name__} cannot take a trial step ({refusals[0]}), so nobody knows whether it acts on "
            "each agent by itself; if it looks at whole tensors, let every process hold one agent",
            stacklevel=2,
        )
    return None


def _is_of_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _second_agents_move(optimizer: Optimizer, start: Tensor, of_first: float) -> Tensor:
    """Returns two agents' second model after three steps of an optimizer's copy, given the first's size of gradients.

    The copy has a parameter, two rows that begin as `start`, and state of its own.
    """
    parameter = start.to(optimizer.param_groups[0]["params"][0].device, copy=True)
    twin = _twin(optimizer, optimizer.param_groups[0], [parameter])
    with torch.random.fork_rng(devices=[]):
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter)
            parameter.grad[0] *= of_first
            torch.manual_seed(0)
            _plain_step(twin)
    return parameter[1]


def _twin(optimizer: Optimizer, options: Mapping[str, Any], parameters: list[Tensor]) -> Optimizer:
    """Makes an optimizer of the same type with a group of these options and parameters, without state and hooks."""
    twin = type(optimizer).__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.state, twin.param_groups = defaultdict(dict), [{**options, "params": parameters}]
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    return twin


def _plain_step(optimizer: Optimizer) -> None:
    """Takes a step without calling hooks."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def names_of_state(optimizer: Optimizer) -> list[str] | None:
    """Returns the names of state in its parameters' shape that some group has after a step; None if it is not tried."""
    try:
        tried = [_tried(optimizer, group) for group in optimizer.param_groups if group["params"]]
    except Exception:  # as in `why_not_local`
        return None
    alike = [
        key
        for parameter, state in tried
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    return list(dict.fromkeys(alike)) if tried else None


def check_inner_state(optimizer: Optimizer, state_dict: Any, name: str) -> None:
    """Raises ValueError unless the inner optimizer can load the state and then take a step.

    What its state must hold, for the saved options, is what a trial step leaves there: for each name a tensor like the
    parameter, a tensor of one number, or a plain one. More may be there, and a parameter may have none at all.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"{name}: the inner state is not that of an optimizer: it needs 'state' and 'param_groups'")
    check_form(state_dict, optimizer.param_groups, f"{name}: the inner state's")
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    for place, (saved, group) in enumerate(pairs):
        where = f"{name}: the inner state's param_groups[{place}]"
        expected = _expected(optimizer, group, saved, where) if group["params"] else {}
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            entries = state_dict["state"].get(number, {})
            where = f"{name}: the inner state of parameter {number}"
            if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
                raise ValueError(f"{where} must be a dict by names, got {shown(entries)}")
            if entries and (missing := sorted(expected.keys() - entries.keys())):
                raise ValueError(f"{where} has no {', '.join(missing)}")
            for key, value in entries.items():
                if problem := _problem(value, expected.get(key, ...), parameter):
                    raise ValueError(f"{where}: {key!r} {problem}")


def _expected(optimizer: Optimizer, own: Mapping[str, Any], saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns what a trial step with the saved options leaves of state, by name; {} for one that cannot be tried.

    Raises:
        ValueError: it can be tried with the optimizer's own options, but not with the saved ones.
    """
    try:
        lr = float(saved["lr"])
    except Exception as error:
        raise ValueError(f"{where} must have a learning rate 'lr' of one number: {error}") from error
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"{where} must have a finite learning rate 'lr' >= 0, got {lr}")
    try:
        _tried(optimizer, own)
    except Exception:  # as in `why_not_local`
        return {}
    try:
        return _tried(optimizer, saved)[1]
    except Exception as error:
        raise ValueError(
            f"{where} are no options of {type(optimizer).__name__}: {type(error).__name__} {error}"
        ) from error


def _tried(optimizer: Optimizer, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Takes two steps of two agents with these options; returns a parameter of theirs, (2, 3, 4), and its state.

    Two, for some options are not read in the first one, such as SGD's dampening.
    """
    parameter = torch.ones(2, 3, 4, device=optimizer.param_groups[0]["params"][0].device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    options = {key: value for key, value in options.items() if key not in ("params", "param_names")}
    options |= {key: value.clone() for key, value in options.items() if isinstance(value, Tensor)}
    if _is_of_torch(optimizer):  # the constructor looks at the options
        known = options.keys() & inspect.signature(type(optimizer)).parameters.keys()
        twin = type(optimizer)([parameter], **{key: options[key] for key in known})
        # What is missing stays so, but for what the optimizer fills in itself when it loads.
        twin.__setstate__({"state": twin.state, "param_groups": [{**options, "params": [parameter]}]})
    else:
        twin = _twin(optimizer, options, [parameter])
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            _plain_step(twin)
    return parameter, dict(twin.state[parameter])


def _problem(value: Any, tried: Any, parameter: Tensor) -> str:
    """Says what is wrong with a saved value beside that of a trial step (... if there is none); "" if nothing is."""
    if tried is ...:
        problem = unreadable(value) if isinstance(value, Tensor) and not parameter.is_meta else ""
        return f"is a tensor {problem}" if problem else ""
    if isinstance(tried, Tensor):
        expected = described(parameter.detach().new_empty(parameter.shape) if tried.dim() else tried)
        if described(value) != expected:
            return f"must be a tensor {expected}, got {described(value)}"
        if tried.dim():
            return ""
        value, tried = value.item(), tried.item()
    if isinstance(tried, (int, float)):
        is_number = isinstance(value, (int, float)) and math.isfinite(value) and (value >= 0 or tried < 0)
        return "" if is_number else f"must be a finite number{'' if tried < 0 else ' >= 0'}, got {shown(value)}"
    return "" if type(value) is type(tried) else f"must be {type(tried).__name__}, got {type(value).__name__}"
