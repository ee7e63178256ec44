"""The runner: tasks become finished runs in a folder from which they can go on.

Tasks run one after another in this process (`run_here`), which may be one of several ranks that train together, or
several at a time in processes of their own (`run_in_processes`), each with the data set in its own memory. A finished
run is appended to the results of the folder (`gut_fast.study.results`). A run that is stopped or killed leaves its
checkpoint, and the next call goes on from there: with a named engine to the same history bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from gut_fast.files import read_within, remove_leftovers, write_text
from gut_fast.simulation import Simulator, keep_freed_memory
from gut_fast.study.processes import INTERRUPTED, Child, ToldError
from gut_fast.study.results import LINES, append_run, finished_runs, lines_of, remove_half_written, write_table
from gut_fast.study.run import Run, make_simulator, train
from gut_fast.study.sweep import Task

__all__ = [
    "CHECKPOINTS",
    "Failure",
    "Watcher",
    "check_launch",
    "check_no_others",
    "check_writable",
    "checkpoint_of",
    "run_here",
    "run_in_processes",
    "run_missing",
    "sole_user",
    "unfinished",
]

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error, or with its process."""

    task: Task
    reason: str


class Watcher(Protocol):
    """An object that is told how the runs are going, from the thread that called the runner."""

    def working(self, task: Task, step: int, row: dict[str, Any] | None = None) -> None:
        """The task is at this step, and `row` is the last of its history where it is known; called again and again."""

    def finished(self, task: Task, run: Run) -> None:
        """The run has ended and its results are written."""

    def failed(self, failure: Failure) -> None:
        """The run has ended without results."""


def check_writable(folder: Path, names: Sequence[str] = ()) -> None:
    """Looks before any work is done whether files can be written to a folder, which need not exist yet.

    Args:
        folder: where files are to be written.
        names: the files.

    Raises:
        OSError: it is not a folder and cannot be made, nothing can be written to it, or one of the files cannot be.
    """
    first = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not first.is_dir():
        raise NotADirectoryError(f"{first} is not a folder")
    if not os.access(first, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to {first}")
    for file in (folder / name for name in names):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; it is where a file is to be written")
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(f"no permission to write {file}")


def unfinished(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks that have no results in the folder. Raises as `read_results`."""
    finished = finished_runs(folder)
    return [task for task in tasks if task.name not in finished]


def check_no_others(tasks: Sequence[Task], folder: Path) -> None:
    """Raises FileExistsError if the folder holds finished runs that are not among the tasks, of an older file perhaps.

    Whoever reads the folder would take them for runs of this sweep.
    """
    if others := sorted(finished_runs(folder) - {task.name for task in tasks}):
        raise FileExistsError(
            f"{folder} holds {len(others)} finished runs of another sweep, such as {others[0]}; take a folder of its "
            "own for each sweep"
        )


def check_launch(tasks: Sequence[Task], folder: Path, size: int | None) -> None:
    """Raises ValueError if a checkpoint in the folder is of another number of processes than `size`."""
    for task in tasks:
        own = checkpoint_of(folder, task, size)
        for other in (folder / CHECKPOINTS).glob(f"{task.name}.pt*"):
            if other != own:
                its_size = other.name.partition(".pt-of-")[2]
                advice = f"with --launch {its_size}" if its_size else "without --launch"
                raise ValueError(f"{other} was written {advice}; go on {advice}")


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock ends with the process, however that ends.

    Raises:
        BlockingIOError: another process is at work in the folder.
        OSError: the folder cannot be written.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is at work in {folder}; wait for it, or name another folder"
            ) from error
        yield


def checkpoint_of(folder: Path, task: Task, size: int | None = None) -> Path:
    """The task's checkpoint: a file, or the folder of `size` ranks that train together."""
    return folder / CHECKPOINTS / (f"{task.name}.pt" if size is None else f"{task.name}.pt-of-{size}")


def run_missing(
    tasks: Sequence[Task],
    folder: Path,
    run: Callable[[Sequence[Task]], list[Failure]],
    *,
    keep_checkpoints: bool = False,
) -> list[Failure]:
    """Runs the tasks that have no results in the folder yet; once all have, the results become one table.

    Args:
        tasks: all tasks of the sweep.
        folder: the folder of the sweep; the caller is its `sole_user`.
        run: `run_here` or `run_in_processes` with this folder; it is given the missing tasks.
        keep_checkpoints: whether the checkpoints of finished runs, which hold the trained models, stay.

    Raises:
        OSError: the folder cannot be written.
        ResultsError: its results are broken.
    """
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)
    missing = unfinished(tasks, folder)
    try:
        failures = run(missing)
        if not failures and (folder / LINES).exists():
            write_table(folder)
    finally:
        still_missing = unfinished(tasks, folder)
        for task in tasks:
            if task not in still_missing:
                _clean(folder, task, keep_checkpoints)
        with contextlib.suppress(OSError):  # it is not empty where a run was stopped
            (folder / CHECKPOINTS).rmdir()
    return failures


def _clean(folder: Path, task: Task, keep_checkpoint: bool) -> None:
    """Removes what a finished run needs no longer."""
    for file in (folder / CHECKPOINTS).glob(f"*{task.name}*"):
        if file.suffix in (".tmp", ".seconds") or not keep_checkpoint:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def run_here(
    tasks: Sequence[Task], folder: Path, watcher: Watcher, process_group: dist.ProcessGroup | None = None
) -> list[Failure]:
    """Runs the tasks one after another in this process, or on all ranks of a process group, which call this together.

    A run that fails does not stop the others; it is a `Failure`. On Ctrl-C the step is finished and the checkpoint
    written before KeyboardInterrupt goes on. With a process group the errors of a run go on too, and the first rank
    alone tells the watcher and writes the results.
    """
    is_first = process_group is None or dist.get_rank(process_group) == 0
    failures = []
    for task in tasks:
        try:
            show = partial(watcher.working, task) if is_first else None
            run = _train(task, folder, show, process_group)
        except Exception as error:
            if process_group is not None:
                raise
            failures.append(Failure(task, _reason(error)))
            watcher.failed(failures[-1])
            continue
        if is_first:
            append_run(folder, lines_of(task, run))
            watcher.finished(task, run)
    return failures


def _reason(error: Exception) -> str:
    if isinstance(error, ToldError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def _train(
    task: Task,
    folder: Path,
    show: Callable[[int, dict[str, Any] | None], object] | None,
    process_group: dist.ProcessGroup | None = None,
) -> Run:
    """Trains from the checkpoint, if there is one, to the end.

    Args:
        task: the run to be done.
        folder: the folder of the sweep, which has the checkpoints.
        show: a function that is given step and last row of the history now and then; None on all ranks but the first.
        process_group: the ranks that train together.
    """
    size = None if process_group is None else dist.get_world_size(process_group)
    checkpoint, seconds = checkpoint_of(folder, task, size), folder / CHECKPOINTS / f"{task.name}.seconds"
    is_first = show is not None
    for file in (checkpoint, seconds) if is_first else ():
        remove_leftovers(file)
    before = _seconds_in(seconds) if checkpoint.exists() and seconds.exists() else 0.0
    keep_freed_memory()
    start = time.perf_counter()
    simulator = _simulator_at(checkpoint, task, process_group)

    def show_last_row(step: int) -> None:
        if show is not None:
            show(step, simulator.history[-1] if simulator.history else None)

    def save_seconds() -> None:
        if is_first:
            write_text(seconds, f"{before + time.perf_counter() - start:.3f}")

    show_last_row(simulator.step)
    try:
        run = train(
            task.experiment,
            simulator,
            checkpoint=checkpoint,
            checkpoint_every=task.experiment.eval_every,
            on_checkpoint=save_seconds,
            progress=show_last_row,
        )
    finally:
        save_seconds()
        show_last_row(simulator.step)
    return replace(run, seconds=before + run.seconds)


def _seconds_in(file: Path) -> float:
    """How long a run has taken before. Raises ToldError if the file does not say so."""
    try:
        seconds = float(read_within(file, 100))
    except ValueError as error:
        raise ToldError(f"{file} does not hold a number of seconds; remove it") from error
    if not 0 <= seconds < math.inf:
        raise ToldError(f"{file} holds {seconds} seconds; remove it")
    return seconds


def _simulator_at(checkpoint: Path, task: Task, process_group: dist.ProcessGroup | None) -> Simulator:
    """The task's simulator at the step of its checkpoint, or at step 0 if there is none.

    Raises:
        ToldError: the checkpoint is corrupt or of another configuration.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the command has made such a simulator before, and said it
        simulator = make_simulator(task.experiment, process_group)
    try:
        with contextlib.suppress(FileNotFoundError):  # it has not yet begun
            simulator.load_checkpoint(checkpoint)
    except (RuntimeError, ValueError) as error:
        raise ToldError(f"{error}; remove it, and the run starts anew") from error
    return simulator


def run_in_processes(
    tasks: Sequence[Task], folder: Path, watcher: Watcher, *, jobs: int, threads: int
) -> list[Failure]:
    """Runs `jobs` tasks at a time in processes of their own, with `threads` threads each.

    A process takes one task after another, so it loads the data once, and ends with a run that fails. Such a run, or
    one whose process dies, does not stop the others; it is a `Failure`. On KeyboardInterrupt every process finishes its
    step and writes its checkpoint before the exception goes on.
    """
    failures: list[Failure] = []
    waiting, at_work = list(tasks), dict[Any, tuple[Child, Task]]()

    def take_message(connection: Any) -> None:
        child, task = at_work[connection]
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            child.process.join()
            message = None if child.process.exitcode == INTERRUPTED else "its process was killed, or ran out of memory"
        if isinstance(message, tuple):
            watcher.working(task, *message)
            return
        del at_work[connection]
        if isinstance(message, Run):
            append_run(folder, lines_of(task, message))
            watcher.finished(task, message)
            with contextlib.suppress(OSError):  # it has been killed meanwhile: another process takes the task
                connection.send(waiting[0] if waiting else None)
                if waiting:
                    at_work[connection] = (child, waiting.pop(0))
                    return
            child.process.join()
            connection.close()
        elif message is not None:
            failures.append(Failure(task, message))
            watcher.failed(failures[-1])

    try:
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                child = Child(waiting[0].name, threads, _run_in_child, waiting[0], folder)
                at_work[child.connection] = (child, waiting.pop(0))
            for connection in wait(at_work):
                take_message(connection)
    finally:
        waiting.clear()
        for child, _ in at_work.values():
            child.interrupt()
        while at_work:
            for connection in wait(at_work):
                take_message(connection)
    return failures


def _run_in_child(connection: Connection, task: Task | None, folder: Path) -> None:
    """Runs this task and those that come, until None comes or one has failed.

    It sends step and last row of the history now and then, and the finished run, or why it failed, at the end.
    """
    while task is not None:
        try:
            connection.send(_train(task, folder, partial(_send_row, connection)))
        except Exception as error:
            connection.send(_reason(error))
            return
        task = connection.recv()


def _send_row(connection: Connection, step: int, row: dict[str, Any] | None) -> None:
    connection.send((step, row))
