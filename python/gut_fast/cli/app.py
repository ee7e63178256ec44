"""The application ``gut-fast``; each command has a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

import gut_fast
from gut_fast.cli import bench
from gut_fast.cli.data import data_command
from gut_fast.cli.info import info
from gut_fast.cli.options import CONTEXT, help_if_bare
from gut_fast.cli.report import report
from gut_fast.cli.sweep import sweep, tune
from gut_fast.cli.terminal import Command, Group
from gut_fast.cli.topology import topology
from gut_fast.cli.train import train
from gut_fast.cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    name="gut-fast",
    help="Decentralized training: many agents learn one model by talking to neighbours only.",
    cls=Group,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    """Prints the version and ends the program, if that is what was asked for."""
    if wanted:
        typer.echo(f"gut-fast {gut_fast.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
    help_if_bare(context)


for command in (train, sweep, tune, report, topology, verify, info):
    app.command(cls=Command)(command)
app.command("data", cls=Command)(data_command)
app.add_typer(bench.app, name="bench")
