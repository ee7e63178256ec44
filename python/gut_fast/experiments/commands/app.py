"""The application ``gut-fast``; each command has a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

import gut_fast
from gut_fast.experiments.commands.data import data_command
from gut_fast.experiments.commands.info import info
from gut_fast.experiments.commands.report import report
from gut_fast.experiments.commands.sweep import sweep, tune
from gut_fast.experiments.commands.topology import topology
from gut_fast.experiments.commands.train import train

__all__ = ["app"]

app = typer.Typer(
    name="gut-fast",
    help="Decentralized training: many agents learn one model by talking to neighbours only.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gut-fast {gut_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


for command in (train, sweep, tune, report, topology, info):
    app.command()(command)
app.command("data")(data_command)
