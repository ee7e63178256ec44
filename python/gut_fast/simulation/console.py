"""A run and its user: progress on stderr, and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Display", "Interrupt", "Progress", "deferred_interrupt", "display"]

Progress = bool | Callable[[int], object]
"""True to show the numbers of a run on stderr, or a function to call with the step now and then instead."""

Show = Callable[[int, str], object]
"""Shows the step and the numbers."""

SECONDS_BETWEEN_UPDATES = 0.2
SECONDS_BETWEEN_LINES = 10.0


class Display:
    """The progress of a run, shown at most once in so many seconds.

    Args:
        seconds: shortest time between two updates.
        show: shows a step and the numbers.
    """

    def __init__(self, seconds: float, show: Show) -> None:
        self.show = show
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """True when it is time for another `show`; cheap, as it is asked at every step."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


@contextlib.contextmanager
def display(total: int, first: int, progress: Progress) -> Iterator[Display]:
    """A display for a run from step `first` to step `total`.

    It is a progress bar if stderr is a terminal and rich is installed, otherwise a line on stderr now and then.
    """
    if callable(progress):
        yield Display(SECONDS_BETWEEN_UPDATES, lambda step, text: progress(step))
    elif not progress:
        yield Display(math.inf, lambda step, text: None)
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _rich_bar(total, first) as show:
            yield Display(SECONDS_BETWEEN_UPDATES, show)
    else:
        yield Display(SECONDS_BETWEEN_LINES, _lines(total, first))


def _lines(total: int, first: int) -> Show:
    start = time.monotonic()

    def show(step: int, text: str) -> None:
        rate = (step - first) / max(time.monotonic() - start, 1e-9)
        print(f"step {step}/{total}  {rate:.0f} steps/s  {text}", file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _rich_bar(total: int, first: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Numbers(ProgressColumn):
        """The numbers, which are cut off in a narrow terminal, so that the bar is not."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")

    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        Numbers(table_column=Column()),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        training = bar.add_task("training", total=total, completed=first, text="")
        yield lambda step, text: bar.update(training, completed=step, text=text)


class Interrupt:
    """Whether Ctrl-C has been pressed."""

    requested = False


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """A context in which the first Ctrl-C only sets ``requested``; a second one raises KeyboardInterrupt at once.

    It replaces only Python's own handler, and only in the main thread, where signals arrive; a program that handles or
    ignores SIGINT itself continues to do so.
    """
    interrupt = Interrupt()
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
