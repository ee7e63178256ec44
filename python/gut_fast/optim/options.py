"""The options that all optimizers share: their types, their place in signatures and docstrings, and misspelt ones."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from gut_fast.arguments import shown
from gut_fast.distributed import Group

__all__ = ["Options", "Parameters", "check_group", "check_implementation", "check_names", "with_shared_options"]

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""Parameters, parameter groups, or parameters with their names, as `torch.optim` takes them."""

NOT_HERE = {
    "foreach": "one fused kernel takes the step of all tensors already",
    "fused": "every step is fused already, by the kernel that `backend` names",
    "differentiable": "steps work in place, below autograd",
}
"""Options of `torch.optim` that say how a step is computed, and why True makes no sense here."""


class Options(TypedDict, total=False):
    """The types of the options that every optimizer has beside its rule's hyper-parameters: see `GossipOptimizer`."""

    weight_decay: float
    maximize: bool
    drift_memory: float | None
    local_steps: int
    foreach: bool | None
    fused: bool | None
    differentiable: bool
    backend: str
    state_dtype: torch.dtype | None
    capturable: bool
    process_group: dist.ProcessGroup | Group | None
    agents_per_rank: int | None
    overlap: bool
    wire_dtype: torch.dtype | str | None
    wire_seed: int | None
    bucket_bytes: int | None
    timeout: float
    on_peer_failure: Literal["raise", "continue"]
    shared_memory: bool
    sync_initial: bool


def check_names(given: Iterable[str], allowed: Iterable[str], options: Iterable[str], name: str) -> None:
    """Raises TypeError if a keyword is none of the rule's hyper-parameters; the message names the nearest right one.

    Args:
        given: the keywords that are none of the options.
        allowed: the rule's hyper-parameters.
        options: the options of the optimizer.
        name: the optimizer's name.
    """
    allowed = list(allowed)
    for unknown in given:
        if unknown not in allowed:
            near = difflib.get_close_matches(unknown, [*allowed, *options, "lr", "params", "topology"], 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"its rule has: {', '.join(allowed) or 'none'}"
            raise TypeError(f"{name}: unexpected keyword argument {unknown!r}; {hint}")


OF_GROUPS = (
    "params",
    "param_names",
    "lr",
    "initial_lr",
    "drift_lr",
    "round_lr",
    "weight_decay",
    "maximize",
    "drift_memory",
)
"""Keys of every parameter group, beside the rule's hyper-parameters and those of `NOT_HERE`."""


def check_group(param_group: Mapping[str, Any], allowed: Iterable[str], name: str) -> None:
    """Raises ValueError if a key is an option of the whole optimizer, or a misspelt one of a group. Others pass.

    Args:
        param_group: a parameter group.
        allowed: the rule's hyper-parameters, and the options of an inner optimizer.
        name: the optimizer's name.
    """
    known = {*allowed, *OF_GROUPS, *NOT_HERE}
    for key in param_group.keys() - known:
        if key in (*Options.__annotations__, "topology", "rule"):
            raise ValueError(f"{name}: a parameter group has no {key!r} of its own; give it to the whole optimizer")
        alike = [other for other in known if abs(len(other) - len(str(key))) < 2]
        if near := difflib.get_close_matches(str(key), alike, 1, 0.85):
            raise ValueError(f"{name}: a parameter group has the key {key!r}; did you mean {near[0]!r}?")


def check_implementation(given: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if `foreach`, `fused` or `differentiable` is True, TypeError if one is no flag."""
    for option, reason in NOT_HERE.items():
        value = given.get(option)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: {option} must be True, False or None, got {shown(value)}")
        if value:
            raise ValueError(f"{name}: {option}=True is not possible: {reason}")


Class = TypeVar("Class", bound=type[Optimizer])


def with_shared_options(cls: Class) -> Class:
    """Writes the shared options into a class's signature and docstring, in place of ``**options``.

    They are those of the class's parent, which lists them with types, defaults and descriptions. Type checkers have
    them from `Options`.
    """
    parent: Any = cls.__mro__[1]
    initializer = vars(cls)["__init__"]
    listed = inspect.signature(parent.__init__).parameters
    signature = inspect.signature(initializer)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    shared = [listed[option] for option in Options.__annotations__]
    initializer.__signature__ = signature.replace(parameters=[*own, *shared])
    entries = _entries(inspect.cleandoc(parent.__doc__ or ""))
    text = "".join(entries.get(option, "") for option in Options.__annotations__)
    cls.__doc__ = re.sub(
        r"^ +\*\*options:.*(\n|$)", lambda _: text, inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE
    )
    return cls


def _entries(docstring: str) -> dict[str, str]:
    """Returns the entries of a docstring's arguments by name, each with its lines as they are."""
    arguments = re.search(r"^Args:\n((?: {4}.*\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}\w+:.*\n(?: {8}.*\n)*", arguments[1] if arguments else "", re.MULTILINE)
    return {entry.split(":")[0].strip(): entry for entry in entries}
