"""The command ``gut-fast bench across``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gut_fast.benchmark import across_report, across_run
from gut_fast.benchmark.across import SETTINGS, Task
from gut_fast.benchmark.across_link import check_rate
from gut_fast.benchmark.across_run import AcrossResult
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.results import machine_slug
from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing

__all__ = ["across"]

MIN_WIDTH = 100
"""So that no column of the table is cut."""

_what, _how, _output = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is timed", "How", "Output"))


def across(
    model: Annotated[
        list[str] | None, _what(help=f"One of: {', '.join(SETTINGS)}. May be repeated. Default: all.")
    ] = None,
    ranks: Annotated[int, _what(min=2, help="Processes, with one agent and one thread each.")] = 4,
    batch_size: Annotated[
        int | None, _what(min=1, help="Samples per agent and step. Default: 32, of resnet20 8, of mlp 16.")
    ] = None,
    bucket_bytes: Annotated[
        int | None,
        _what(min=1, help="How much travels at once. Default: 64 KiB, of resnet20 256 KiB, of mlp 1 MiB."),
    ] = None,
    rate: Annotated[
        str | None,
        _how(help="Give each rank a network namespace and a link of this rate, for example 200mbit; needs root."),
    ] = None,
    seconds: Annotated[float, _how(min=0.0, help="For each model; three rounds at least.")] = 30.0,
    output: Annotated[
        Path | None, _output(help="Folder for JSON and Markdown, named after the processor; results add up.")
    ] = None,
) -> None:
    """Time training steps of several processes beside PyTorch's DDP and decent-dp, and what bounds them.

    Everyone is compared with what it should compute first, and the bytes we send are counted. Exit code 1 if anything
    is not right. Images are noise.
    """
    with as_bad_argument():
        tasks = [Task(name, ranks, batch_size, bucket_bytes) for name in model or SETTINGS]
        if rate is not None:
            check_rate(rate)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
    measured = [_measure(task, seconds, rate) for task in tasks]
    if output is not None:
        with writing(), as_bad_argument():
            _write(measured, output)


def _measure(task: Task, seconds: float, rate: str | None) -> AcrossResult:
    console = console_of_text()
    console.width = max(console.width, MIN_WIDTH)
    with Console(stderr=True).status(task.model) as status, as_bad_argument():
        try:
            result = across_run.run(task, seconds, rate, lambda doing: status.update(f"{task.model}: {doing}"))
        except WrongResultError as error:
            console.print(f"NOT TIMED: {error}", style="red")
            raise typer.Exit(1) from None
    console.print(across_report.table(result))
    for line in across_report.lines(result):
        console.print(line, style="red" if line.startswith("NOISY") else None, soft_wrap=True)
    return result


def _write(measured: Sequence[AcrossResult], output: Path) -> None:
    stem = output / f"across-{machine_slug(measured[0].machine)}"
    file = stem.with_suffix(".json")
    together = across_run.merge(across_run.load(file) if file.exists() else [], measured)
    order = list(SETTINGS)
    together.sort(key=lambda result: (result.link != "loopback", result.link, order.index(result.model), result.key))
    across_run.save(together, file)
    stem.with_suffix(".md").write_text(across_report.markdown(together), encoding="utf-8")
    typer.echo(f"wrote {stem}.json and .md: {len(together)} results")
