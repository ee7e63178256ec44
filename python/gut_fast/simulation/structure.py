"""The structure of a checkpoint, looked at field by field before anything of it is restored.

A check sum says that the file is as it was written, not that a simulator wrote it. So every entry must have the type,
the shape and the dtype that this simulator would write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import abbreviated
from gut_fast.files import FileError

__all__ = ["check_like", "check_structure", "described"]

PLAIN = (str, int, float, bool, complex, type(None))
"""The types of values that hold no others."""

MAX_DEPTH = 8
"""The most levels of lists and dicts in each other."""

FACTORED = ("row_var", "col_var")
"""Entries of Adafactor's state, which have one number for each row or column."""


def check_structure(content: Mapping[str, Any], own: Mapping[str, Any], optimizer: Optimizer, path: object) -> None:
    """Raises FileError, which names the file and the entry, unless the content could be this simulator's.

    Args:
        content: the content of a checkpoint.
        own: what the simulator would write now.
        optimizer: the simulator's optimizer.
        path: the name of the file for errors.
    """
    try:
        if missing := [name for name in own if name not in content]:
            raise ValueError(f"there is no entry {missing[0]!r}")
        _check_plain(content["configuration"], "configuration", dict)
        _check_history(content["history"], content["step"])
        for name in ("model", "bytes_sent", "last_lr", "loss_sum", "loss_steps"):
            check_like(content[name], own[name], name)
        if min(content["loss_steps"], int(content["bytes_sent"].min())) < 0:
            raise ValueError("bytes_sent and loss_steps must be at least 0")
        _check_plain(content["scheduler"], "scheduler", (dict, type(None)))
        _check_engine(content["engine"])
        _check_random_state(content["random_state"], own["random_state"])
        _check_optimizer(content["optimizer"], optimizer)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise FileError(f"{path} is no checkpoint of this simulator: {abbreviated(str(error), 400)}") from error


def check_like(saved: Any, own: Any, where: str) -> None:
    """Raises ValueError unless a value has the structure of another: keys, types, shapes and dtypes, at every level."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        if saved.keys() != own.keys():
            wrong = sorted(map(abbreviated, saved.keys() ^ own.keys()))
            raise ValueError(f"{where} lacks, or has in excess, {', '.join(wrong[:3])}")
        for name, value in own.items():
            check_like(saved[name], value, f"{where}[{name!r}]")
    elif described(saved) != described(own):
        raise ValueError(f"{where} is {described(saved)}, expected {described(own)}")


def described(value: Any) -> str:
    """The type of a value in words; of a tensor the shape and dtype too."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}{layout}"
    return f"{'a number' if type(value) in (int, float) else type(value).__name__}"


def _check_plain(value: Any, where: str, kind: Any, depth: int = 0) -> None:
    """Raises ValueError unless a value is of that kind and holds plain values alone, or tensors, not too deep."""
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {described(value)}")
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for name, child in children:
        if not isinstance(name, (str, int)):
            raise ValueError(f"{where} has a key that is {described(name)}")
        _check_plain(child, f"{where}[{abbreviated(name)}]", (*PLAIN, Tensor, dict, list, tuple), depth + 1)


def _check_history(history: Any, step: Any) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {abbreviated(step)}, expected a number of steps")
    if type(history) is not list or any(type(row) is not dict for row in history):
        raise ValueError("history is no list of rows")
    for number, row in enumerate(history):
        if any(type(name) is not str or type(value) not in (int, float) for name, value in row.items()):
            raise ValueError(f"history[{number}] has an entry that is no number")
    steps = [row.get("step") for row in history]
    if any(type(each) is not int for each in steps) or steps != sorted(set(steps)) or max(steps, default=0) > step:
        raise ValueError("the rows of history are not in the order of their steps, up to that of the checkpoint")


def _check_engine(engine: Any) -> None:
    if engine is None:
        return
    if type(engine) is not dict or not isinstance(engine["chosen"], (str, type(None))):
        raise ValueError("engine does not hold a choice and times")
    for name, seconds in engine["seconds"].items():
        if type(name) is not str or type(seconds) is not list or any(type(each) is not float for each in seconds):
            raise ValueError("engine['seconds'] does not hold lists of times")


def _check_random_state(saved: Any, own: Mapping[str, Tensor]) -> None:
    """Raises ValueError or RuntimeError unless the generators can be set to the states."""
    if type(saved) is not dict or "cpu" not in saved:
        raise ValueError("random_state does not hold the states of generators")
    for name in saved.keys() & own.keys():
        check_like(saved[name], own[name], f"random_state[{name!r}]")
        torch.Generator(name).set_state(saved[name])


def _check_optimizer(saved: Any, optimizer: Optimizer) -> None:
    """Checks what the optimizers themselves do not: the state of torch's own, which may be within one of ours."""
    if type(saved) is not dict:
        raise ValueError(f"optimizer is {described(saved)}")
    inner = getattr(optimizer, "inner", None)
    if isinstance(inner, Optimizer):
        _check_optimizer(saved.get("inner"), inner)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    if type(saved.get("state")) is not dict or type(saved.get("param_groups")) is not list:
        raise ValueError("optimizer does not hold a state and groups")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("the groups of the optimizer hold other parameters")
    for group, expected in zip(saved["param_groups"], own, strict=True):
        _check_plain(group, "a group of the optimizer", dict)
        for name in group.keys() & expected.keys() - {"params"}:
            if group[name] is not None and expected[name] is not None:
                check_like(group[name], expected[name], f"option {name} of the optimizer")
    for index, entries in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or type(entries) is not dict:
            raise ValueError(f"the optimizer has no parameter {abbreviated(index)}")
        for name, value in entries.items():
            _check_entry(value, name, parameters[index])


def _check_entry(value: Any, name: Any, parameter: Tensor) -> None:
    """Raises ValueError unless an entry of a state is a number, or a tensor like its parameter."""
    where = f"the optimizer's {abbreviated(name)}"
    if not isinstance(value, Tensor):
        _check_plain(value, where, PLAIN)
    else:
        is_shaped = value.ndim == 0 or name in FACTORED or value.shape == parameter.shape
        is_of_dtype = value.ndim == 0 or value.is_floating_point() == parameter.is_floating_point()
        if value.layout != torch.strided or not (is_shaped and is_of_dtype):
            raise ValueError(f"{where} is {described(value)}, expected {described(parameter)}")
