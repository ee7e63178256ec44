"""Runs of a sweep, several at a time in processes of their own, in a folder from which they can go on.

A finished run is appended to the results of the folder (`gut_fast.study.results`). A run that is stopped or killed
leaves its checkpoint, and the next call goes on from there: with a named engine to the same history bit for bit.
Each process holds the data set in its own memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from gut_fast.distributed.files import remove_leftovers, replacing
from gut_fast.distributed.processes import end_with_parent
from gut_fast.simulation import Simulator
from gut_fast.study.results import LINES, append_run, finished_runs, lines_of, remove_half_written, write_table
from gut_fast.study.runner import Run, make_simulator, train
from gut_fast.study.sweep import Task

__all__ = ["Failure", "Watcher", "check_no_others", "run_tasks", "sole_user", "unfinished"]

CHECKPOINTS = "checkpoints"
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error, or with its process."""

    task: Task
    reason: str


class Watcher(Protocol):
    """Is told how the runs are going, from the thread that called `run_tasks`."""

    def working(self, task: Task, step: int) -> None:
        """The task is at that step; called again and again."""

    def finished(self, task: Task, run: Run) -> None:
        """The run has ended and its results are written."""

    def failed(self, failure: Failure) -> None:
        """The run has ended without results."""


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


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keeps a second sweep out of the folder; the lock ends with the process, however that ends.

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


def run_tasks(tasks: Sequence[Task], folder: Path, jobs: int, threads: int, watcher: Watcher) -> list[Failure]:
    """Runs what has no record yet in the folder, `jobs` runs at a time with `threads` threads each.

    The caller is the folder's `sole_user`. A run that fails, or whose process dies, does not stop the others; it is a
    `Failure`. On KeyboardInterrupt every process finishes its step and writes its checkpoint before the exception goes
    on.

    Raises:
        OSError: the folder cannot be written.
    """
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)
    missing = unfinished(tasks, folder)
    for task in tasks:
        if task not in missing:  # killed just after its results were written
            _Files(folder, task).remove()
    workers = [_Worker(folder, threads) for _ in range(jobs)]
    try:
        failures = list(_work(workers, iter(missing), watcher, folder))
        if not failures and (folder / LINES).exists():
            write_table(folder)
        return failures
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()
        with contextlib.suppress(OSError):  # it is not empty where a run was stopped
            (folder / CHECKPOINTS).rmdir()


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
                _Files(folder, task).remove()
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
        """Of the task at work."""
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


class _Shared:
    """In a worker's process: what it shares with the sweep, numbers of shared memory."""

    step: Any = None
    stop: Any = None


def _start_worker(step: Any, stop: Any, threads: int) -> None:
    _Shared.step, _Shared.stop = step, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's, which sets `stop`
    warnings.simplefilter("ignore")  # the sweep says once what would be said in every run
    torch.set_num_threads(threads)
    end_with_parent()


class _TaskError(Exception):
    """An error in a run as text, which goes from process to process whatever it was."""


def _run_task(task: Task, folder: Path) -> tuple[Run, str]:
    try:
        run = _train(task, folder)
        return run, lines_of(task, run)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        raise _TaskError(text) from None


def _show_step(step: int) -> None:
    _Shared.step.value = step
    if _Shared.stop.value:
        raise KeyboardInterrupt


class _Files:
    """What a run has in the folder until it is finished: its checkpoint, and the seconds that it took up to there."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.checkpoint = folder / CHECKPOINTS / f"{task.name}.pt"
        self._seconds = folder / CHECKPOINTS / f"{task.name}.seconds"

    @property
    def seconds(self) -> float:
        """0 at the beginning."""
        return float(self._seconds.read_text()) if self.checkpoint.exists() and self._seconds.exists() else 0.0

    @seconds.setter
    def seconds(self, value: float) -> None:
        with replacing(self._seconds) as temporary:
            temporary.write_text(f"{value:.3f}")

    def remove(self) -> None:
        """Removes both, and what killed processes have left half written."""
        for file in (self.checkpoint, self._seconds):
            remove_leftovers(file)
            file.unlink(missing_ok=True)


def _train(task: Task, folder: Path) -> Run:
    """Trains from the checkpoint, if there is one, to the end."""
    files = _Files(folder, task)
    remove_leftovers(files.checkpoint)
    before, start = files.seconds, time.perf_counter()
    simulator = make_simulator(task.experiment)
    if files.checkpoint.exists():
        _load(simulator, files.checkpoint)

    def save_seconds() -> None:
        files.seconds = before + time.perf_counter() - start

    try:
        run = train(
            task.experiment,
            simulator,
            checkpoint=files.checkpoint,
            checkpoint_every=task.experiment.eval_every,
            on_checkpoint=save_seconds,
            progress=_show_step,
        )
    except KeyboardInterrupt:
        save_seconds()
        raise
    return replace(run, seconds=before + run.seconds)


def _load(simulator: Simulator, checkpoint: Path) -> None:
    try:
        simulator.load_checkpoint(checkpoint)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{error}; remove it, and the run starts anew") from error
