"""The runner: tasks become finished runs in a folder from which they can go on.

Tasks run one after another in this process (`run_here`), which may be one of several ranks that train together, or
several at a time in processes of their own (`run_in_processes`), each with the data set in its own memory. A finished
run is appended to the results of the folder (`gut_fast.study.results`). A run that is stopped or killed leaves its
checkpoint, and the next call goes on from there: with a named engine to the same history bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gut_fast.distributed.files import remove_leftovers, replacing
from gut_fast.simulation import Simulator
from gut_fast.study.processes import ToldError, end_with_parent
from gut_fast.study.results import LINES, append_run, finished_runs, lines_of, remove_half_written, write_table
from gut_fast.study.run import Run, make_simulator, train
from gut_fast.study.sweep import Task

__all__ = [
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
SECONDS_BETWEEN_LOOKS = 0.2


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

    def stopped(self, task: Task, step: int) -> None:
        """Ctrl-C has stopped the run after this step; its checkpoint is written."""


def check_writable(folder: Path, names: Sequence[str] = ()) -> None:
    """Looks at the folder, if it exists, before any work is done.

    Args:
        folder: where files are to be written.
        names: the files.

    Raises:
        OSError: it is not a folder, nothing can be written to it, or a directory is where a file is to be.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to {folder}")
    for file in (folder / name for name in names):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; it is where a file is to be written")


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
    with (folder / ".lock").open("w") as file:
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
        tasks: all of the sweep.
        folder: the caller is its `sole_user`.
        run: `run_here` or `run_in_processes` with this folder; is given the missing tasks.
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
            run = _train(task, folder, watcher if is_first else None, process_group)
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


def _train(task: Task, folder: Path, watcher: Watcher | None, process_group: dist.ProcessGroup | None = None) -> Run:
    """Trains from the checkpoint, if there is one, to the end."""
    size = None if process_group is None else dist.get_world_size(process_group)
    checkpoint, seconds = checkpoint_of(folder, task, size), folder / CHECKPOINTS / f"{task.name}.seconds"
    if watcher is not None:
        for file in (checkpoint, seconds):
            remove_leftovers(file)
    before = float(seconds.read_text()) if checkpoint.exists() and seconds.exists() else 0.0
    start = time.perf_counter()
    simulator = _simulator_at(checkpoint, task, process_group)

    def save_seconds() -> None:
        if watcher is not None:
            with replacing(seconds) as temporary:
                temporary.write_text(f"{before + time.perf_counter() - start:.3f}")

    def show(step: int) -> None:
        if watcher is not None:
            watcher.working(task, step, simulator.history[-1] if simulator.history else None)

    show(simulator.step)
    try:
        run = train(
            task.experiment,
            simulator,
            checkpoint=checkpoint,
            checkpoint_every=task.experiment.eval_every,
            on_checkpoint=save_seconds,
            progress=show,
        )
    except KeyboardInterrupt:
        save_seconds()
        if watcher is not None:
            watcher.stopped(task, simulator.step)
        raise
    return replace(run, seconds=before + run.seconds)


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

    A run that fails, or whose process dies, does not stop the others; it is a `Failure`. On KeyboardInterrupt every
    process finishes its step and writes its checkpoint before the exception goes on.
    """
    workers = [_Worker(folder, threads) for _ in range(jobs)]
    try:
        return list(_work(workers, iter(tasks), watcher, folder))
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()


def _work(workers: Sequence[_Worker], tasks: Iterator[Task], watcher: Watcher, folder: Path) -> Iterator[Failure]:
    """Keeps every worker busy until there is no task left."""
    idle = list(workers)
    at_work: dict[Future[tuple[Run, str]], tuple[_Worker, Task]] = {}
    while True:
        while idle and (task := next(tasks, None)) is not None:
            worker = idle.pop()
            at_work[worker.start(task)] = (worker, task)
        if not at_work:
            return
        done, running = wait(at_work, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        for future in running:
            worker, task = at_work[future]
            watcher.working(task, worker.step)
        for future in done:
            worker, task = at_work.pop(future)
            idle.append(worker)
            if (error := future.exception()) is None:
                run, lines = future.result()
                append_run(folder, lines)
                watcher.finished(task, run)
            else:
                is_dead = isinstance(error, BrokenProcessPool)
                failure = Failure(task, "its process was killed, or ran out of memory" if is_dead else str(error))
                watcher.failed(failure)
                yield failure


class _Worker:
    """A process that works on one task after another, and is replaced when it dies.

    What it shares with the process has no lock, which a killed process might hold for ever.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder, threads
        self._context = multiprocessing.get_context("spawn")
        self._step, self._stop = (self._context.Value("q", 0, lock=False) for _ in range(2))
        self._executor: ProcessPoolExecutor | None = None

    @property
    def step(self) -> int:
        """The step that the task at work has reached."""
        return int(self._step.value)

    def start(self, task: Task) -> Future[tuple[Run, str]]:
        """Begins a task."""
        self._step.value = 0
        try:
            return self._submit(task)
        except BrokenProcessPool:
            self.close()
            return self._submit(task)

    def _submit(self, task: Task) -> Future[tuple[Run, str]]:
        if self._executor is None:
            shared = (self._step, self._stop, self._threads)
            self._executor = ProcessPoolExecutor(1, self._context, _start_worker, shared)
        # Ctrl-C reaches all processes of a terminal. One that starts inherits what is blocked, before it can ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self._executor.submit(_run_task, task, self._folder)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Asks the process to write its checkpoint and leave its task."""
        self._stop.value = 1

    def close(self) -> None:
        """Waits for the end of the process."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


class _Reporter:
    """The watcher within a worker's process: it tells the step and learns of a stop through shared memory."""

    step: Any = None
    stop: Any = None

    def working(self, task: Task, step: int, row: dict[str, Any] | None = None) -> None:
        self.step.value = step
        if self.stop.value:
            raise KeyboardInterrupt

    def finished(self, task: Task, run: Run) -> None: ...

    def failed(self, failure: Failure) -> None: ...

    def stopped(self, task: Task, step: int) -> None: ...


def _start_worker(step: Any, stop: Any, threads: int) -> None:
    _Reporter.step, _Reporter.stop = step, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's, which sets `stop`
    warnings.simplefilter("ignore")  # the command says once what would be said in every run
    torch.set_num_threads(threads)
    end_with_parent()


class _RunError(Exception):
    """An error in a run as text, which goes from process to process whatever it was."""


def _run_task(task: Task, folder: Path) -> tuple[Run, str]:
    try:
        run = _train(task, folder, _Reporter())
        return run, lines_of(task, run)
    except Exception as error:
        raise _RunError(_reason(error)) from None
