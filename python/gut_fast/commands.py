"""All the commands of ``gut-fast`` in one application."""

from __future__ import annotations

from gut_fast.benchmark import commands as bench
from gut_fast.experiments.commands.app import app
from gut_fast.verification.commands import verify

__all__ = ["app"]

app.add_typer(bench.app, name="bench")
app.command()(verify)
