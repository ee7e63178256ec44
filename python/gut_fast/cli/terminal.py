"""The command line's manners: its class of commands, its errors and warnings, and the console that they print to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from gut_fast.arguments import CONTROLS, printable
from gut_fast.cli import CANNOT_WRITE, say
from gut_fast.study.summary import UNBOUNDED

__all__ = [
    "BadArgumentError",
    "Command",
    "Group",
    "as_bad_argument",
    "console_of_text",
    "facts_grid",
    "in_words_of",
    "print_json",
    "writing",
]

WIDTH_OF_BOXES = 70
"""The width from which help fits into boxes."""


class BadArgumentError(Exception):
    """The command cannot do what the user asked for; the message says why."""


class _WithHelp:
    """A command whose help is written without boxes in a narrow terminal, where they would cut names off."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help page."""
        console = console_of_text()
        if Console().width >= WIDTH_OF_BOXES:
            super().format_help(ctx, formatter)  # type: ignore[misc]
            return
        command: Any = self
        console.print(" ".join(["Usage:", ctx.command_path, *command.collect_usage_pieces(ctx)]))
        console.print(f"\n{' '.join((command.help or '').split())}\n")
        records = [parameter.get_help_record(ctx) for parameter in command.get_params(ctx)]
        records += [
            (name, each.get_short_help_str(UNBOUNDED))
            for name, each in getattr(command, "commands", {}).items()
            if not each.hidden
        ]
        for name, text in filter(None, records):
            console.print(name, style="bold")
            console.print(Padding(" ".join(text.split()), (0, 0, 0, 4)))


class Group(_WithHelp, TyperGroup):
    """A group of commands."""


class Command(_WithHelp, TyperCommand):
    """A command whose errors and warnings name its options, where those of the library name arguments."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; an error is a `BadArgumentError` in the words of the command line."""
        options = {
            str(parameter.name): max(parameter.opts, key=len)
            for parameter in self.params
            if parameter.param_type_name == "option"
        }
        with _warnings_in_a_line(lambda text: in_words_of(options, text)):
            try:
                return super().invoke(ctx)
            except BadArgumentError as error:
                raise BadArgumentError(in_words_of(options, str(error))) from error


def in_words_of(options: Mapping[str, str], text: str) -> str:
    """The text with options in place of arguments: ``--batch-size 0``, where the library says ``batch_size=0``.

    A name of one word, such as steps, is taken for an argument only where a value or a demand follows. What is said
    about a YAML file stays in the words of the file.
    """
    if re.search(r"\.ya?ml: ", text):
        return text
    text = text.replace("topology.lazy(gamma) with gamma", "gamma")
    if "topology" in options:
        text = re.sub(r"\bnum_agents=(\d+)", r"the number of agents of --topology, \1,", text)
    for name, option in options.items():
        if option in text:
            continue
        before = r"(?<![\w.'\"-])"
        text = re.sub(rf"there is no '{name}'", f"there is no {option}", text)
        text = re.sub(rf"{before}{name}=(?=[^\s=,;)])", f"{option} ", text)
        text = re.sub(rf"{before}{name}(=(?=[\s,;)]|$)|(?= (must|is outside|<=|>=) ))", option, text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.-])['\"]?\b{name}\b['\"]?", option, text)
    return text


@contextlib.contextmanager
def _warnings_in_a_line(in_words: Callable[[str], str]) -> Iterator[None]:
    """Prints each warning about the arguments, such as an unstable μ, as one line on stderr, and only once."""
    shown: set[str] = set()

    def show(message: str) -> None:
        line = f"gut-fast: warning: {in_words(' '.join(message.split()))}"
        if line not in shown:
            shown.add(line)
            say(line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = lambda message, *_: show(str(message))
        yield


@contextlib.contextmanager
def as_bad_argument() -> Iterator[None]:
    """Turns the errors that the library raises while it takes in arguments into `BadArgumentError`.

    The errors of a full disk or a closed output go on: they are no fault of the arguments.
    """
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        if getattr(error, "errno", None) in CANNOT_WRITE:
            raise
        raise BadArgumentError(str(error)) from error


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns the errors of a folder that has become read-only, or is gone, into `BadArgumentError`."""
    try:
        yield
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise
        raise BadArgumentError(f"cannot write: {error}") from error


class _Console(Console):
    """A console that shows the control characters of what it prints, and does not send them to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes a text of a string."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Makes pieces of a line of what is printed; those that move the cursor are rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console_of_text(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: names of topologies and files have brackets and colons.

    It is as wide as the terminal. Where the output is no terminal and COLUMNS says nothing, no line is wrapped.
    """
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console


def facts_grid(facts: Mapping[str, str]) -> Table:
    """A table with a line for each fact: its name and its value."""
    grid = Table.grid("", "", padding=(0, 2))
    grid.columns[0].style = "dim"
    for column in grid.columns:
        column.overflow = "fold"
    for name, value in facts.items():
        grid.add_row(name, value)
    return grid


def print_json(content: Any) -> None:
    """Prints the content as one JSON document; numbers that are not finite are null."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
    typer.echo(CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return content
