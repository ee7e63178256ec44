"""Arguments, checked: the same error wherever an integer, a number or one of several names is expected."""

from __future__ import annotations

import difflib
import numbers
import operator
import re
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["CONTROLS", "all_known", "as_integer", "as_number", "nearest", "printable", "shortened", "shown"]

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, or that change the order of others, but for tabs and ends of lines."""


def as_integer(value: Any, what: str, minimum: int | None) -> int:
    """Returns `value` as an int of at least `minimum` (None: any int); NumPy's integers are taken, bools are not.

    Raises:
        TypeError: the value is not an integer; the message opens with `what`.
        ValueError: the value is below `minimum`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, got {shown(value)}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def as_number(value: Any, what: str) -> float:
    """Returns `value` as a float; NumPy's numbers are taken, bools are not.

    Raises:
        TypeError: the value is not a real number; the message opens with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {shown(value)}")
    return float(value)


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the known name that is most like it, or all of them."""
    known = list(known)
    similar = _most_like(name, known)
    return f"did you mean {similar!r}?" if similar else f"there are {', '.join(known)}"


def all_known(name: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: all known names, and the one that is most like it."""
    known = list(known)
    similar = _most_like(name, known)
    return f"known are {', '.join(known)}" + (f"; did you mean {similar!r}?" if similar else "")


def _most_like(name: Any, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(name).lower(), known, 1)), None)


class _Shown(reprlib.Repr):
    """Shortens text, numbers and collections of them; anything else, whose own text may be anything, is its type."""

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if isinstance(x, (bool, float, complex, bytes, type(None))) else f"<{type(x).__name__}>"

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """Shows a value that was given in place of another, for an error message: short, whatever it is.

    A tensor's own text needs its numbers, which may not be there, and that of a value from a file may have no end.
    """
    shorten = _Shown()
    shorten.maxstring, shorten.maxdict = 120, 8
    return shortened(shorten.repr(value))


def shortened(text: str, length: int = 200) -> str:
    """The text, its end left out if it is longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: str) -> str:
    """The text with control characters as escape sequences, so that a terminal shows and does not obey them."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
