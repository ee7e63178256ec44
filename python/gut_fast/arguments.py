"""Arguments, checked: the same error wherever an integer or a number is expected."""

from __future__ import annotations

import numbers
import operator
from typing import Any

__all__ = ["as_integer", "as_number"]


def as_integer(value: Any, what: str, minimum: int) -> int:
    """Returns `value` as an int of at least `minimum`; NumPy's integers are taken, bools are not.

    Raises:
        TypeError: the value is not an integer; the message opens with `what`.
        ValueError: the value is below `minimum`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, got {value!r}")
    if number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def as_number(value: Any, what: str) -> float:
    """Returns `value` as a float; NumPy's numbers are taken, bools are not.

    Raises:
        TypeError: the value is not a real number; the message opens with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    return float(value)
