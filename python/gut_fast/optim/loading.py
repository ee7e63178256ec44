"""Checks of a state dict before anything of it is loaded: every entry that will be read has the form it must have.

`name` opens every message. What a check accepts can be loaded and stepped; numbers that are not finite are accepted in
the state's tensors, as in gradients, but not in settings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import shown
from gut_fast.kernels.validation import described, unreadable
from gut_fast.optim.checks import check_range, checked_coefficients, settings_of
from gut_fast.optim.options import check_implementation
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = ["check_form", "check_state_dict", "older_values", "unchanged_if_raised"]

MOST_STEPS = 2**63
"""The step count that is too large for an int64, in which compiled steps are counted."""


KEYS = (int, str)
"""The types of what a state calls parameters: numbers, or names in the distributed checkpoints of torch."""


def older_values(rule: UpdateRule) -> dict[str, float]:
    """Returns what older states do not have in their parameter groups, as it was then."""
    kappa = {"kappa": 1.0} if "kappa" in rule.hyperparameters else {}
    return {"drift_memory": 0.0, "drift_lr": 0.0, "round_lr": 0.0, **kappa}


@contextmanager
def unchanged_if_raised(*optimizers: Optimizer) -> Iterator[None]:
    """If the block raises, the optimizers have again what they had; loading puts new objects in the old ones' place."""
    before = [dict(vars(optimizer)) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, attributes in zip(optimizers, before, strict=True):
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
        raise


def check_state_dict(
    state_dict: Any,
    rule: UpdateRule,
    topology: Topology,
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    defaults: dict[str, Any],
    name: str,
) -> None:
    """Raises TypeError, ValueError or RuntimeError unless the optimizer of these groups and state can load this one."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"{name}: the state is not that of an optimizer: it needs 'state' and 'param_groups'")
    if state_dict.get("rule", rule.name) != rule.name:
        raise ValueError(f"{name}: the state is of rule {shown(state_dict['rule'])}, expected {rule.name!r}")
    if "step" not in state_dict and not topology.is_static:
        raise RuntimeError(
            f"{name}: the state has no step count, and {topology} varies with time: set state_dict['step'] to the "
            "number of steps taken"
        )
    for key in ("step", "round", "local_before"):
        count = state_dict.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < MOST_STEPS:
            raise ValueError(
                f"{name}: the state's {key} count must be an integer >= 0 and below 2**63, got {shown(count)}"
            )
    check_form(state_dict, groups, f"{name}: the state's")
    for saved_group, group in zip(state_dict["param_groups"], groups, strict=True):
        _check_settings(saved_group, group["params"], rule, defaults, name)
        for index, parameter in zip(saved_group["params"], group["params"], strict=True):
            entries = state_dict["state"].get(index, {})
            found = {k: described(v) for k, v in entries.items()} if isinstance(entries, dict) else entries
            expected = {state_name: described(state[parameter][state_name]) for state_name in rule.states}
            if found != expected:
                raise ValueError(f"{name}: state of parameter {index} is {shown(found)}, expected {shown(expected)}")


def check_form(state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], whose: str) -> None:
    """Raises ValueError unless groups and state are nested as `torch.optim` nests them, for these parameter groups.

    Args:
        state_dict: a dict with the entries "state" and "param_groups".
        groups: the parameter groups of the optimizer that is to load it.
        whose: how the message opens, for example "GUT: the state's".
    """
    saved, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        raise ValueError(f"{whose} param_groups must be a list of dicts, got {_kind(saved)}")
    if not isinstance(state, dict):
        raise ValueError(f"{whose} entry 'state' must be a dict by parameter numbers, got {_kind(state)}")
    for place, group in enumerate(saved):
        where = f"{whose} param_groups[{place}]"
        if problems := [problem for problem in map(unreadable, _tensors(group)) if problem]:
            raise ValueError(f"{where} has a tensor {problems[0]}")
        if odd := [key for key in group if not isinstance(key, str)]:
            raise ValueError(f"{where} has a key that is no string: {shown(odd[0])}")
        numbers, names = group.get("params"), group.get("param_names", [])
        if not isinstance(numbers, list) or not all(type(number) in KEYS for number in numbers):
            raise ValueError(
                f"{whose} param_groups[{place}]['params'] must be a list of integers or names, got {shown(numbers)}"
            )
        is_named = isinstance(names, list) and all(isinstance(each, str) for each in names)
        if not is_named or ("param_names" in group and len(names) != len(numbers)):
            raise ValueError(
                f"{whose} param_groups[{place}]['param_names'] must name each parameter, got {shown(names)}"
            )
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ValueError(f"{whose} parameter groups have other sizes than this optimizer's")
    every = [number for group in saved for number in group["params"]]
    known = set(every)
    if len(known) < len(every):
        raise ValueError(f"{whose} param_groups name a parameter more than once: {shown(every)}")
    if unknown := [shown(key) for key in state if type(key) not in KEYS or key not in known]:
        raise ValueError(f"{whose} entry 'state' has the key {unknown[0]}, which is no number or name of a parameter")
    try:
        copy.deepcopy(saved)
    except Exception as error:
        raise ValueError(f"{whose} param_groups cannot be copied: {error}") from error


def _check_settings(
    saved_group: dict[str, Any], parameters: Sequence[Tensor], rule: UpdateRule, defaults: dict[str, Any], name: str
) -> None:
    """Raises TypeError or ValueError unless a saved group has all settings, each of them in its domain."""
    group = {**older_values(rule), **saved_group}
    if missing := sorted(defaults.keys() - group.keys() - {"differentiable"}):
        raise ValueError(f"{name}: a parameter group of the state has no {', '.join(missing)}")
    for setting in {*defaults, "lr", "drift_lr", "round_lr", "initial_lr"} & group.keys():
        value = group[setting]
        if isinstance(value, Tensor) and (described(value) not in ("()", "(1,)") or value.numel() != 1):
            raise ValueError(f"{name}: {setting} in the state must be one number, got a tensor {described(value)}")
    for rate in ("lr", "initial_lr"):
        if not isinstance(group.get(rate, 0.0), Tensor):
            rule.check_option("lr", group.get(rate, 0.0))
    rule.check_option("drift_lr", group["drift_lr"])
    rule.check_option("round_lr", group["round_lr"])
    rule.check_option("drift_memory", group["drift_memory"])
    check_implementation(group, name)
    settings = settings_of(group, rule, defaults["lr"])
    check_range(checked_coefficients(settings, rule, name).flat(), settings["lr"], parameters, name)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested dicts, lists and tuples, however deep."""
    pending, seen = [tree], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend([*value, *value.values()] if isinstance(value, dict) else value)


def _kind(value: Any) -> str:
    """Names a value's type, and the types in a list."""
    inside = f" of {', '.join(sorted({type(each).__name__ for each in value}))}" if isinstance(value, list) else ""
    return f"{type(value).__name__}{inside}"
