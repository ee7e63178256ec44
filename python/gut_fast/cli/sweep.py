"""``gut-fast sweep`` and ``gut-fast tune``: methods × grid × seeds from a file, several runs at a time."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gut_fast import analysis
from gut_fast.cli.options import DataFolder, Download, prepare_data
from gut_fast.cli.sweep_progress import Display, title
from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing
from gut_fast.files import replacing, write_text
from gut_fast.rules import get_rule
from gut_fast.study import summary
from gut_fast.study.results import LINES, TABLE, read_results
from gut_fast.study.run import make_simulator
from gut_fast.study.runner import (
    CHECKPOINTS,
    Failure,
    check_no_others,
    check_writable,
    run_here,
    run_in_processes,
    run_missing,
    sole_user,
    unfinished,
)
from gut_fast.study.sweep import Task, read_sweep
from gut_fast.study.tune import Choice, choose, make_tuning, tried, tuned_content
from gut_fast.study.yaml_files import about_file, read_yaml, write_yaml
from gut_fast.topology.names import parse_topology

__all__ = ["FILE", "console_of_runs", "execute", "missing_runs", "sweep", "tune"]

FILE = "sweep.yaml"

OF_METHOD = {"rule", "hyperparameters", "lr", "weight_decay", "milestones", "decay", "steps", "eval_every", "seed"}
"""Entries of an experiment that are checked without its data and its network."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file that describes it.")]
Out = Annotated[Path, typer.Option(help="Folder of the runs; those finished there are not repeated.")]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at a time, each with the data in its own memory. Default: as many as cores."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each run; the default of --jobs is divided by it.")]


def sweep(
    file: File,
    out: Out,
    jobs: Jobs = None,
    threads: Threads = 1,
    folder: DataFolder = None,
    download: Download = False,
) -> None:
    """Run methods × grid × seeds of a file; Ctrl-C, or a crash, and the same command goes on where it was."""
    with as_bad_argument():
        tasks = read_sweep(file).tasks()
        missing_runs(tasks, out, folder, download)
    _run(tasks, file, out, jobs or _cores(threads), threads)
    console_of_text().print(f"all {len(tasks)} runs are finished; see them with: gut-fast report {out}")


def tune(
    file: File,
    out: Out,
    jobs: Jobs = None,
    threads: Threads = 1,
    folder: DataFolder = None,
    download: Download = False,
) -> None:
    """Choose hyper-parameters for a sweep's file, as many tries for every method, on held-out training samples.

    Writes tuned.yaml into the folder, the sweep's file with the choices in it, and tries.csv, all that was tried.
    """
    with as_bad_argument():
        content = read_yaml(file)
        with about_file(file):
            tuning = make_tuning(content)
        tasks = tuning.tasks()
        missing_runs(tasks, out, folder, download, advise=False)
    _run(tasks, file, out, jobs or _cores(threads), threads)
    with as_bad_argument():
        results = read_results(out)
        choices, tries = choose(tuning, results), tried(tuning, results)
    tuned = out / "tuned.yaml"
    with writing():
        write_yaml(tuned_content(content, choices), tuned)
        write_text(out / "tries.csv", tries.round({"score": 6}).to_csv(index=False))
    console = console_of_text()
    _print_choices(choices, tuning.metric, tuning.tries, console)
    console.print(f"wrote {tuned}; run it with: gut-fast sweep {tuned} --out ...")


def missing_runs(
    tasks: Sequence[Task], out: Path, folder: Path | None, download: bool, *, advise: bool = True
) -> list[Task]:
    """The runs still to be done, after a look at the folder, the data and all that is to be made of them.

    Args:
        tasks: all runs of the sweep.
        out: the folder of the sweep.
        folder: where data sets lie, or None.
        download: whether data sets that are missing there are downloaded.
        advise: whether to warn of hyper-parameters that are unstable on their topology.

    Raises:
        OSError, ImportError, RuntimeError, TypeError, ValueError: some run cannot be made, or the folder not be used.
    """
    check_writable(out, [FILE, LINES, TABLE, ".lock", "tuned.yaml", "tries.csv"])
    check_writable(out / CHECKPOINTS)
    check_no_others(tasks, out)
    missing = unfinished(tasks, out)
    prepare_data({task.experiment.data for task in missing}, folder, download)
    _check(missing)
    if advise:
        _warn_of_unstable(missing)
    return missing


def _check(tasks: Sequence[Task]) -> None:
    """Finds what is wrong with any method at any point before the first run begins.

    One simulator is made for all that differ in their method alone.
    """
    seen: set[str] = set()
    for task in tasks:
        experiment = task.experiment
        try:
            get_rule(experiment.rule).coefficients(
                experiment.lr, weight_decay=experiment.weight_decay, **experiment.hyperparameters
            )
            rest = repr({name: value for name, value in experiment.as_dict().items() if name not in OF_METHOD})
            if rest not in seen:
                seen.add(rest)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # `_warn_of_unstable` says it once
                    make_simulator(experiment)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{title(task)}: {error}") from error


def _warn_of_unstable(tasks: Sequence[Task]) -> None:
    for task in {(task.method, repr(task.point)): task for task in tasks}.values():
        experiment = task.experiment
        method = experiment.rule, experiment.hyperparameters, parse_topology(experiment.topology, experiment.gamma)
        if advice := analysis.advice(*method, local_steps=experiment.local_steps):
            warnings.warn(f"{task.method}: {advice}", stacklevel=2)


def _run(tasks: Sequence[Task], file: Path, out: Path, jobs: int, threads: int) -> None:
    """Runs what is missing in the folder, in this process where one at a time is enough, and keeps the file there."""
    console = console_of_runs()

    def run(missing: Sequence[Task]) -> list[Failure]:
        _keep(file, out / FILE)
        at_a_time = min(jobs, len(missing))
        torch.set_num_threads(threads)
        with Display(console, len(tasks), len(tasks) - len(missing)) as display:
            if at_a_time > 1:
                return run_in_processes(missing, out, display, jobs=at_a_time, threads=threads)
            return run_here(missing, out, display)

    execute(partial(run_missing, tasks, out, run), out, console, "the same command")


def execute(run: Callable[[], list[Failure]], out: Path, console: Console, again: str) -> None:
    """Calls `run` as the only one at work in the folder. The exit code is 1 if a run failed, 130 on Ctrl-C.

    Args:
        run: returns the runs that failed.
        out: the folder, which need not exist.
        console: where to say how to go on.
        again: the command that goes on.
    """
    with writing():
        out.mkdir(parents=True, exist_ok=True)
    try:
        with as_bad_argument(), sole_user(out):
            failures = run()
    except KeyboardInterrupt:
        console.print(f"stopped; go on with: {again}")
        raise typer.Exit(130) from None
    if failures:
        console.print(f"{len(failures)} runs failed; try them again with: {again}")
        raise typer.Exit(1)


def console_of_runs() -> Console:
    """The console on stderr where the progress of runs is shown."""
    return console_of_text(stderr=True)


def _keep(file: Path, copy: Path) -> None:
    """A copy of the sweep's file beside its runs, unless it lies there itself."""
    if not (copy.exists() and copy.samefile(file)):
        with replacing(copy) as temporary:
            shutil.copyfile(file, temporary)


def _cores(threads: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def _print_choices(choices: Sequence[Choice], metric: str, tries: int, console: Console) -> None:
    table = summary.plain_table(
        f"The best of {tries} tries each, {metric.replace('_', ' ')} on held-out samples", "method", "", "settings"
    )
    for choice in choices:
        settings = ", ".join(f"{name} {value}" for name, value in choice.settings.items())
        score = f"{100 * choice.score:.2f} %" if metric.endswith("accuracy") else f"{choice.score:.4f}"
        table.add_row(choice.label, score, settings)
    console.print(table)
    for choice in choices:
        if choice.at_edge:
            console.print(f"{choice.label}: the best {' and '.join(choice.at_edge)} is at the edge of what was tried")
