"""How far a sweep is: bars on a terminal, otherwise lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gut_fast.study.jobs import Failure, Watcher
from gut_fast.study.runner import Run
from gut_fast.study.sweep import Task

__all__ = ["shown_on", "title"]

SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def shown_on(console: Console, total: int, finished: int) -> Iterator[Watcher]:
    """Shows runs on the console: a line for each that ends, and bars on a terminal or a line now and then elsewhere.

    Args:
        console: for text that is no markup.
        total: runs of the sweep.
        finished: how many of them were finished before.
    """
    if not console.is_terminal:
        yield _Lines(console, total, finished)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(console, total, finished, progress)


class _Outcomes:
    """A line for each run that ends."""

    def __init__(self, console: Console, total: int, finished: int) -> None:
        self._console, self._total, self._ended = console, total, finished

    def finished(self, task: Task, run: Run) -> None:
        self._print(f"{title(task)}: {_result(run)}")

    def failed(self, failure: Failure) -> None:
        self._print(f"{title(failure.task)} FAILED: {failure.reason}", style="red")

    def _print(self, text: str, style: str | None = None) -> None:
        self._ended += 1
        self._console.print(f"{self._ended}/{self._total}  {text}", style=style, soft_wrap=True)


class _Lines(_Outcomes):
    """In between a sign of life, where runs take long."""

    def __init__(self, console: Console, total: int, finished: int) -> None:
        super().__init__(console, total, finished)
        self._at_work: dict[str, str] = {}
        self._last_line = time.monotonic()

    def working(self, task: Task, step: int) -> None:
        self._at_work[task.name] = f"{title(task)}: step {step}/{task.experiment.steps}"
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            at_work = "; ".join(self._at_work.values())
            self._console.print(f"{self._ended}/{self._total}  at work: {at_work}", soft_wrap=True)

    def finished(self, task: Task, run: Run) -> None:
        self._forget(task)
        super().finished(task, run)

    def failed(self, failure: Failure) -> None:
        self._forget(failure.task)
        super().failed(failure)

    def _forget(self, task: Task) -> None:
        self._at_work.pop(task.name, None)
        self._last_line = time.monotonic()


class _Bars(_Outcomes):
    """One of all runs, and one for each at work."""

    def __init__(self, console: Console, total: int, finished: int, progress: Progress) -> None:
        super().__init__(console, total, finished)
        self._progress = progress
        self._all = progress.add_task("runs", total=total, completed=finished)
        self._bars: dict[str, TaskID] = {}

    def working(self, task: Task, step: int) -> None:
        if task.name not in self._bars:
            self._bars[task.name] = self._progress.add_task(title(task), total=task.experiment.steps)
        self._progress.update(self._bars[task.name], completed=step)

    def finished(self, task: Task, run: Run) -> None:
        self._remove_bar(task)
        super().finished(task, run)

    def failed(self, failure: Failure) -> None:
        self._remove_bar(failure.task)
        super().failed(failure)

    def _remove_bar(self, task: Task) -> None:
        self._progress.advance(self._all)
        if task.name in self._bars:
            self._progress.remove_task(self._bars.pop(task.name))


def title(task: Task) -> str:
    """The run in words: method, point and seed."""
    point = [f"{name} {value}" for name, value in task.point.items()]
    return ", ".join([task.method, *point, f"seed {task.experiment.seed}"])


def _result(run: Run) -> str:
    text = f"{100 * run.final['test_accuracy']:.1f} %, {run.seconds:.0f} s"
    diverged = max(row["diverged_agents"] for row in run.history)
    return f"{text}; {diverged} agents had a loss of NaN or infinity" if diverged else text
