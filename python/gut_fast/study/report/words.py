"""Values as words: what a reader of a table, a note or a heading sees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gut_fast.arguments import printable

__all__ = ["in_markdown", "listed", "point_name", "schedule", "shown", "without_folders"]

SYMBOLS = {"alpha": "α", "mu": "μ", "gamma": "γ"}
"""The settings that are called by a letter."""

FOLDERS = re.compile(r"(?<![\w./])(?:~|[A-Za-z]:)?(?:[/\\][^\s:,/\\]+)+[/\\](?=[^\s/\\])")
"""The folders in front of a file's name, where they begin at the root, a drive or a home."""


def shown(value: Any) -> str:
    """A plain value as a reader takes it: 0.1, ring:16, 0.5 and 0.75, momentum 0.9 and mu 0.06."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return listed(f"{name} {shown(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return listed(map(shown, value))
    return without_folders(str(value))


def schedule(milestones: Sequence[float]) -> str:
    """The fate of the learning rate: ``constant lr``, or ``lr decay at 50 % and 75 %`` of the steps."""
    places = (f"{100 * place:.3g} %" if place < 1 else f"step {place:g}" for place in milestones)
    return f"lr decay at {listed(places)}" if milestones else "constant lr"


def point_name(point: Mapping[str, Any]) -> str:
    """A point of a sweep's grid as text: ``α = 0.1, lr decay at 50 % and 75 %``."""
    return ", ".join(
        schedule(value) if name == "milestones" else f"{SYMBOLS.get(name, name.replace('_', ' '))} = {shown(value)}"
        for name, value in point.items()
    )


def listed(values: Iterable[Any] | int, noun: str = "") -> str:
    """Things in a row, ``a, b and c``; or, of a number and a noun, how many: ``1 run``, ``3 runs``."""
    if isinstance(values, int):
        return f"{values:,} {noun}{'s' * (values != 1)}"
    *others, last = [*map(str, values)] or ["none"]
    return f"{', '.join(others)} and {last}" if others else last


def without_folders(text: str) -> str:
    """The text with files by their names alone, so that it speaks of no particular machine."""
    return FOLDERS.sub("", text)


def in_markdown(text: str) -> str:
    """The text in one line of Markdown, its special characters as themselves, control characters as escapes."""
    line = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`$~]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", line)
