"""Compiled steps: an op reads learning rates and state, and counts steps, at every run; tracing would freeze them."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["register"]


class Compiled(Protocol):
    """An optimizer whose steps are compiled."""

    def _up_to_date(self) -> list[Tensor]: ...


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Compiled] = weakref.WeakValueDictionary()

_library = torch.library.Library("gut_fast", "FRAGMENT")
_library.define("bring_up_to_date_(Tensor(a!)[] coefficients, Tensor(b!)[] state, int optimizer) -> ()")


def register(optimizer: Compiled) -> int:
    """Returns a number by which the op ``bring_up_to_date_`` finds the optimizer; it does not keep it alive."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def _bring_up_to_date(coefficients: list[Tensor], state: list[Tensor], number: int) -> None:
    """Lets the optimizer follow its options and state, at every run of a compiled step; counts the step."""
    for given, current in zip([*coefficients, *state], _optimizers[number]._up_to_date(), strict=True):
        given.copy_(current)


for _key in ("CPU", "CUDA"):
    _library.impl("bring_up_to_date_", _bring_up_to_date, _key)
torch.library.register_fake("gut_fast::bring_up_to_date_", lambda *_: None, lib=_library)
