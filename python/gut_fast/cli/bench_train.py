"""The command ``gut-fast bench train``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from gut_fast.benchmark import train_report, train_run
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.device import DEVICES, find_device
from gut_fast.benchmark.results import machine_slug
from gut_fast.benchmark.train_run import TrainingResult
from gut_fast.benchmark.training import ENGINE_NAMES, IMAGES, Task, engines_of
from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing
from gut_fast.study import plots

__all__ = ["train"]

_what, _how, _output = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is timed", "How", "Output"))


def train(
    model: Annotated[
        list[str] | None, _what(help=f"One of: {', '.join(IMAGES)}. May be repeated. Default: all.")
    ] = None,
    agents: Annotated[list[int] | None, _what(min=1, help="May be repeated. Default: 16.")] = None,
    batch_size: Annotated[int, _what(min=1, help="Samples per agent and step.")] = 32,
    engine: Annotated[
        list[str] | None, _what(help=f"One of: {', '.join(ENGINE_NAMES)}. May be repeated. Default: as 'auto'.")
    ] = None,
    controls: Annotated[bool, _what(help="Also train without steps and with torch's, to see what they cost.")] = True,
    device: Annotated[str, _how(help=f"One of: {', '.join(DEVICES)}.")] = "cpu",
    threads: Annotated[int | None, _how(min=1, help="Default: as many as PyTorch takes.")] = None,
    seconds: Annotated[float, _how(min=0.0, help="For each model and number of agents, after three rounds.")] = 20.0,
    output: Annotated[
        Path | None, _output(help="Folder for JSON and picture, named after the processor; results add up.")
    ] = None,
) -> None:
    """Time whole training steps: the simulator's with each engine, a plain loop's over agents, and one model's.

    Everyone is compared with the plain loop first. Exit code 1 if gradients or steps are not equal. Images are noise.
    """
    with as_bad_argument():
        where = find_device(device)
        tasks = [Task(name, number, batch_size, where) for name in model or IMAGES for number in agents or [16]]
        engines = engine or engines_of(where)
        if unknown := [name for name in engines if name not in ENGINE_NAMES]:
            raise ValueError(f"unknown engine {unknown[0]!r}; known are {', '.join(ENGINE_NAMES)}")
        if output is not None:
            plots.check_matplotlib()
            output.mkdir(parents=True, exist_ok=True)
    number = torch.get_num_threads() if threads is None else threads
    measured = [_measure(task, engines, number, seconds, controls) for task in tasks]
    if output is not None:
        with writing(), as_bad_argument():
            _write(measured, output)


def _measure(task: Task, engines: Sequence[str], threads: int, seconds: float, controls: bool) -> TrainingResult:
    console = console_of_text()
    try:
        with as_bad_argument():
            result = train_run.run(task, list(dict.fromkeys(engines)), threads, seconds, controls=controls)
    except WrongResultError as error:
        console.print(f"NOT TIMED: {error}", style="red")
        raise typer.Exit(1) from None
    console.print(train_report.table(result))
    for line in train_report.lines(result):
        console.print(line, style="red" if line.startswith("NOISY") else None)
    return result


def _write(measured: Sequence[TrainingResult], output: Path) -> None:
    stem = output / f"train-{machine_slug(measured[0].machine)}"
    file = stem.with_suffix(".json")
    together = train_run.merge(train_run.load(file) if file.exists() else [], measured)
    order = list(IMAGES)
    together.sort(key=lambda result: (order.index(result.model), *result.key[1:]))
    train_run.save(together, file)
    train_report.draw_training_speed(together, stem.with_suffix(".png"))
    typer.echo(f"wrote {stem}.json and .png: {len(together)} results")
