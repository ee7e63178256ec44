"""The options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from gut_fast import data
from gut_fast.study import plots

__all__ = [
    "CONTEXT",
    "JSON_HELP",
    "AsJson",
    "DataFolder",
    "Download",
    "check_effects",
    "check_picture",
    "given_options",
    "help_if_bare",
    "prepare_data",
]

OTHER_NAMES = dict.fromkeys(("output", "output-folder", "output-dir", "out-dir", "outdir"), "out")
"""Other names of options, which no help lists."""

DataFolder = Annotated[
    Path | None, typer.Option("--data-folder", help="Where data sets lie. Default: environment variable GUT_FAST_DATA.")
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set if it is not in the folder.")]
JSON_HELP = "Print one JSON document, and nothing else, on stdout."
AsJson = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def usual_name(name: str) -> str:
    """The usual name of an option or a command that was typed with underscores, or by one of its `OTHER_NAMES`."""
    name = name.replace("_", "-")
    return OTHER_NAMES.get(name, name)


CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": usual_name}
"""The settings of the parser."""


def help_if_bare(context: typer.Context) -> None:
    """Prints the help of a group of commands, and ends the program, if no command was named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def given_options(context: typer.Context) -> dict[str, Any]:
    """The values of the options that stand on the command line, by the names of the command's arguments."""
    return {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def check_effects(
    context: typer.Context, needs: Iterable[tuple[str, str]], excludes: Iterable[tuple[str, str]] = ()
) -> None:
    """Raises ValueError for an option on the command line that would have no effect.

    Args:
        context: of the command.
        needs: names of arguments, each with that of another one without which it has no effect.
        excludes: names of arguments, each with that of another one beside which it has none.
    """
    given = given_options(context)
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, other in needs:
        if name in given and other not in given:
            raise ValueError(f"{options[name]} has no effect without {options[other]}; add that, or leave it out")
    for name, other in excludes:
        if name in given and other in given:
            raise ValueError(f"{options[name]} has no effect with {options[other]}; leave one of them out")


def prepare_data(names: Iterable[str], folder: Path | None, download: bool) -> None:
    """Makes this process and its children look for data sets in `folder`; downloads missing ones if asked to.

    Raises:
        OSError, ImportError, RuntimeError, ValueError: a download fails, as `gut_fast.data.load`.
    """
    if folder is not None:
        os.environ["GUT_FAST_DATA"] = str(folder.absolute())
    if download:
        for name in names:
            data.load(name, download=True)


def check_picture(path: Path) -> None:
    """Checks, before any work is done, that a picture can be written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or is not named as a PNG file.
    """
    plots.check_matplotlib()
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: expected the name of a PNG file, such as topology.png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: this is a folder, expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--out {path}: no permission to write it")
