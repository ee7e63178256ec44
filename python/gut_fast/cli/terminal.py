"""The errors that all commands of ``gut-fast`` raise, and the console that they print to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

__all__ = ["BadArgumentError", "as_bad_argument", "console_of_text", "facts_grid", "writing"]

MIN_WIDTH = 60


class BadArgumentError(Exception):
    """The command cannot do what the user asked for; the message says why."""


@contextlib.contextmanager
def as_bad_argument() -> Iterator[None]:
    """Turns the errors that the library raises while it takes in arguments into `BadArgumentError`."""
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        raise BadArgumentError(str(error)) from error


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns the errors of a full disk, or of a folder that has become read-only, into `BadArgumentError`."""
    try:
        yield
    except OSError as error:
        raise BadArgumentError(f"cannot write: {error}") from error


def console_of_text() -> Console:
    """A console that prints text as it is: names of topologies and files have brackets and colons.

    It is never so narrow that rich would cut numbers; a narrower terminal wraps the lines.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, MIN_WIDTH)
    return console


def facts_grid(facts: Mapping[str, str]) -> Table:
    """A table with a line for each fact: its name and its value."""
    grid = Table.grid("", "", padding=(0, 2))
    grid.columns[0].style = "dim"
    for name, value in facts.items():
        grid.add_row(name, value)
    return grid
