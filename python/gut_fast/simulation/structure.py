"""The structure of a checkpoint, looked at field by field before anything of it is restored.

A check sum says that the file is as it was written, not that a simulator wrote it. So every entry must have the type,
the shape and the dtype that this simulator would write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import shortened, shown
from gut_fast.files import FileError
from gut_fast.optim import GossipOptimizer
from gut_fast.optim.local import check_inner_state

__all__ = ["as_file_error", "check_like", "check_structure", "described"]

PLAIN = (str, int, float, bool, complex, type(None))
"""The types of values that hold no others."""

MAX_DEPTH = 16
"""The most levels of lists and dicts in each other."""


def check_structure(content: Mapping[str, Any], own: Mapping[str, Any], optimizer: Optimizer, path: object) -> None:
    """Raises FileError, which names the file and the entry, unless the content could be this simulator's.

    Args:
        content: the content of a checkpoint.
        own: what the simulator would write now.
        optimizer: the simulator's optimizer.
        path: the name of the file for errors.
    """
    with as_file_error(path):
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


@contextlib.contextmanager
def as_file_error(path: object) -> Iterator[None]:
    """Turns the errors about what a checkpoint holds into a `FileError` that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is no checkpoint of this simulator: {shortened(reason, 400)}") from error


def check_like(saved: Any, own: Any, where: str) -> None:
    """Raises ValueError unless a value has the structure of another: keys, types, shapes and dtypes, at every level."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        if saved.keys() != own.keys():
            wrong = sorted(map(shown, saved.keys() ^ own.keys()))
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
    if isinstance(value, Tensor):
        size = value.numel() * value.element_size()
        if value.layout != torch.strided or value.is_meta or size > value.untyped_storage().nbytes():
            raise ValueError(f"{where} is {described(value)} without memory of its own")
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for name, child in children:
        if not isinstance(name, (str, int)):
            raise ValueError(f"{where} has a key that is {described(name)}")
        _check_plain(child, f"{where}[{shown(name)}]", (*PLAIN, Tensor, dict, list, tuple), depth + 1)


def _check_history(history: Any, step: Any) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {shown(step)}, expected a number of steps")
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
    """Raises ValueError unless the state holds plain values, and one of torch's own optimizers can step with it.

    Ours load their states, and those of the optimizers within them, whole or refuse them whole.
    """
    _check_plain(saved, "optimizer", dict)
    if not isinstance(optimizer, GossipOptimizer):
        check_inner_state(optimizer, saved, type(optimizer).__name__)
