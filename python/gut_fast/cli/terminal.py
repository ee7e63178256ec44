"""What the commands of ``gut-fast`` share: how they speak of errors, and where they print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

__all__ = ["BadArgumentError", "as_bad_argument", "console_of_text", "facts_grid", "writing"]

MIN_WIDTH = 60


class BadArgumentError(Exception):
    """What the user asked for cannot be done; the message says why."""


@contextlib.contextmanager
def as_bad_argument() -> Iterator[None]:
    """What the library raises while it takes in arguments is about the arguments."""
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        raise BadArgumentError(str(error)) from error


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """A full disk, or a folder that has become read-only, is not a bug either."""
    try:
        yield
    except OSError as error:
        raise BadArgumentError(f"cannot write: {error}") from error


def console_of_text() -> Console:
    """Names of topologies and files have brackets and colons, which rich must leave alone.

    It is never so narrow that rich would cut numbers: a terminal that is wraps the lines.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, MIN_WIDTH)
    return console


def facts_grid(facts: Mapping[str, str]) -> Table:
    """Names and what there is to say of them, a line each."""
    grid = Table.grid("", "", padding=(0, 2))
    grid.columns[0].style = "dim"
    for name, value in facts.items():
        grid.add_row(name, value)
    return grid
