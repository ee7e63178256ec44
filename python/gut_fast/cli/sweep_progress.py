"""How far the runs of a sweep are: bars on a terminal, otherwise lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from gut_fast.study.run import Run
from gut_fast.study.runner import Failure
from gut_fast.study.sweep import Task

__all__ = ["Display", "title"]

SECONDS_BETWEEN_LINES = 30.0

WIDE = 60
"""The width of a terminal that has room for long bars and for the numbers of a run."""


class _CutOff(ProgressColumn):
    """A text that a narrow terminal cuts off: the name of a run, or its numbers. The bar and its counts stay whole."""

    def __init__(self, text: Callable[[rich.progress.Task], str]) -> None:
        super().__init__(table_column=Column())
        self._text = text

    def render(self, task: rich.progress.Task) -> Text:
        return Text(self._text(task), no_wrap=True, overflow="ellipsis")


class Display:
    """A line for each run that ends; in between bars on a terminal, or a line now and then elsewhere.

    It is a watcher of `gut_fast.study.runner`, and shows its bars while it is entered.

    Args:
        console: for text that is no markup.
        total: runs of the sweep.
        ended: how many of them were finished before.
    """

    def __init__(self, console: Console, total: int, ended: int) -> None:
        self._console, self._total, self._ended = console, total, ended
        self._progress = Progress(
            _CutOff(lambda task: task.description),
            BarColumn(bar_width=20 if console.width >= WIDE else 5, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            *([_CutOff(lambda task: task.fields["numbers"])] if console.width >= WIDE else []),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=total, completed=ended, numbers="")
        self._bars: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if error is KeyboardInterrupt:
            for bar in self._progress.tasks[1:]:
                self._print(f"{self._ended}/{self._total}  {bar.description}: stopped after step {bar.completed:.0f}")

    def working(self, task: Task, step: int, row: dict[str, Any] | None = None) -> None:
        """Moves the bar of the task, or prints a line about all tasks at work if the last line is some time ago."""
        if task.name not in self._bars:
            self._bars[task.name] = self._progress.add_task(title(task), total=task.experiment.steps, numbers="")
            if row is not None:
                self._print(f"{self._ended}/{self._total}  {title(task)}: goes on from step {step}")
        numbers = "" if row is None else _numbers(row)
        self._progress.update(self._bars[task.name], completed=step, numbers=numbers)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            at_work = [
                f"{bar.description}: step {bar.completed:.0f}/{bar.total:.0f} {bar.fields['numbers']}".rstrip()
                for bar in self._progress.tasks
                if bar.id in self._bars.values()
            ]
            self._print(f"{self._ended}/{self._total}  at work: {'; '.join(at_work)}")

    def finished(self, task: Task, run: Run) -> None:
        """Prints what the run has come to."""
        diverged = max(row["diverged_agents"] for row in run.history)
        note = f"; {diverged} agents had a loss of NaN or infinity" if diverged else ""
        self._end(task, f": {100 * run.final['test_accuracy']:.1f} %, {run.seconds:.0f} s{note}")

    def failed(self, failure: Failure) -> None:
        """Prints why the run has failed."""
        self._end(failure.task, f" FAILED: {failure.reason}", style="red")

    def _end(self, task: Task, text: str, style: str | None = None) -> None:
        self._ended += 1
        self._progress.advance(self._all)
        if task.name in self._bars:
            self._progress.remove_task(self._bars.pop(task.name))
        self._print(f"{self._ended}/{self._total}  {title(task)}{text}", style)

    def _print(self, text: str, style: str | None = None) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, style=style, soft_wrap=not self._console.is_terminal)


def title(task: Task) -> str:
    """The task in words: method, point and seed."""
    point = [f"{name} {value}" for name, value in task.point.items()]
    return ", ".join([task.method, *point, f"seed {task.experiment.seed}"])


def _numbers(row: dict[str, Any]) -> str:
    """The most important numbers of the last evaluation."""
    return (
        f"lr {row['lr']:g}  loss {row['train_loss']:.4f}  accuracy {row['test_accuracy']:.1%} "
        f"(worst agent {row['worst_agent_accuracy']:.1%})  consensus {row['consensus_error']:.2e}"
    )
