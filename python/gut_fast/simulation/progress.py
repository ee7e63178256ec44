"""A progress bar on a terminal if rich is installed, otherwise a line on stderr now and then."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["Display", "Progress", "display"]

Progress = bool | Callable[[int], object]
"""Whether to show the numbers of a run on stderr; or what to call with its step instead, now and then."""

SECONDS_BETWEEN_UPDATES = 0.2
SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Shows how far a run is."""

    def is_due(self) -> bool:
        """Whether it is time for another `show`: asked at every step, so it must be cheap."""

    def show(self, step: int, text: str) -> None:
        """Shows the step and the numbers."""


@contextlib.contextmanager
def display(total: int, first: int, progress: Progress) -> Iterator[Display]:
    """A display of a run that goes from step `first` to step `total`."""
    if callable(progress):
        yield _Caller(progress)
    elif not progress:
        yield _Nothing()
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _rich_bar(total, first) as bar:
            yield bar
    else:
        yield _Lines(total, first)


class _Nothing:
    def is_due(self) -> bool:
        return False

    def show(self, step: int, text: str) -> None:
        """Nothing."""


class _Timed:
    """Due when some seconds have passed since the last time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class _Caller(_Timed):
    def __init__(self, function: Callable[[int], object]) -> None:
        super().__init__(SECONDS_BETWEEN_UPDATES)
        self._function = function

    def show(self, step: int, text: str) -> None:
        self._function(step)


class _Lines(_Timed):
    def __init__(self, total: int, first: int) -> None:
        super().__init__(SECONDS_BETWEEN_LINES)
        self._total, self._first = total, first
        self._start = time.monotonic()

    def show(self, step: int, text: str) -> None:
        rate = (step - self._first) / max(time.monotonic() - self._start, 1e-9)
        print(f"step {step}/{self._total}  {rate:.0f} steps/s  {text}", file=sys.stderr, flush=True)


class _RichBar(_Timed):
    def __init__(self, bar: Any, task: Any) -> None:
        super().__init__(SECONDS_BETWEEN_UPDATES)
        self._bar, self._task = bar, task

    def show(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, text=text)


@contextlib.contextmanager
def _rich_bar(total: int, first: int) -> Iterator[_RichBar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Numbers(ProgressColumn):
        """In a narrow terminal the numbers are cut off, not the bar."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")

    def fixed() -> Column:
        return Column(no_wrap=True)

    columns = (
        MofNCompleteColumn(table_column=fixed()),
        BarColumn(bar_width=16, table_column=fixed()),
        TimeRemainingColumn(table_column=fixed()),
        Numbers(table_column=Column()),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _RichBar(bar, bar.add_task("training", total=total, completed=first, text=""))
