"""The progress of a run: a bar in terminals and notebooks, lines elsewhere, nothing where stderr is closed."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gut_fast.simulation.callbacks.events import Callback
from gut_fast.simulation.timetable import Timetable

if TYPE_CHECKING:
    from gut_fast.simulation.simulator import Simulator

__all__ = ["Progress", "ShowProgress", "headline"]

Progress = bool | Callable[[int], object]
"""True to show the numbers of a run, or a function to call with the step now and then instead."""

Show = Callable[[int, str], object]
"""Shows the step and the numbers."""

SECONDS_BETWEEN_UPDATES = 0.2
SECONDS_BETWEEN_LINES = 10.0


class ShowProgress(Callback):
    """A callback that shows the step and the numbers now and then, and at the end.

    Args:
        progress: True for a bar if stderr is a terminal and rich is installed, or in a notebook, and for a line on
            stderr now and then elsewhere; or a function to call with the step; False for nothing.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._resources = contextlib.ExitStack()
        self._last_time = -math.inf

    def on_start(self, simulator: Simulator, timetable: Timetable) -> None:
        """Opens the display."""
        self._total = timetable.steps
        seconds, show = _display(self._progress, self._total, simulator.step)
        self._seconds, self._show = seconds, self._resources.enter_context(show)
        self._last_time = time.monotonic()
        self._update(simulator)

    def on_step(self, simulator: Simulator) -> None:
        """Shows the numbers if it is time; those of the last step are shown at the end."""
        if simulator.step < self._total:
            self._update(simulator)

    def on_end(self, simulator: Simulator, error: BaseException | None) -> None:
        """Shows the last numbers and closes the display."""
        with self._resources:
            if error is None:
                self._show(simulator.step, headline(simulator))

    def _update(self, simulator: Simulator) -> None:
        now = time.monotonic()
        if now - self._last_time >= self._seconds:
            self._last_time = now
            self._show(simulator.step, headline(simulator))


def headline(simulator: Simulator) -> str:
    """The numbers of a run in one line: learning rate, loss of the steps since the last evaluation, its metrics."""
    parts = [f"lr {simulator.lr:g}"]
    if not math.isnan(loss := simulator.train_loss):
        parts.append(f"loss {loss:.4f}")
    if simulator.history:
        row = simulator.history[-1]
        if "test_accuracy" in row:
            parts.append(f"accuracy {row['test_accuracy']:.1%} (worst agent {row['worst_agent_accuracy']:.1%})")
        elif "test_loss" in row:
            parts.append(f"test loss {row['test_loss']:.4f}")
        parts.append(f"consensus {row['consensus_error']:.2e}")
    return "  ".join(parts)


def _display(progress: Progress, total: int, first: int) -> tuple[float, contextlib.AbstractContextManager[Show]]:
    """The seconds between updates, and a context that gives the function that shows."""
    nothing: Show = lambda step, text: None  # noqa: E731
    if callable(progress):
        return SECONDS_BETWEEN_UPDATES, contextlib.nullcontext(lambda step, text: progress(step))
    if not progress:
        return math.inf, contextlib.nullcontext(nothing)
    if _in_notebook():
        return SECONDS_BETWEEN_UPDATES, contextlib.nullcontext(_notebook_bar(total))
    if sys.stderr is None or getattr(sys.stderr, "closed", False):
        return math.inf, contextlib.nullcontext(nothing)
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        return SECONDS_BETWEEN_UPDATES, _rich_bar(total, first)
    return SECONDS_BETWEEN_LINES, contextlib.nullcontext(_lines(total, first))


def _lines(total: int, first: int) -> Show:
    start = time.monotonic()

    def show(step: int, text: str) -> None:
        rate = (step - first) / max(time.monotonic() - start, 1e-9)
        with contextlib.suppress(OSError, ValueError):  # stderr has been closed, or its reader is gone
            print(f"step {step}/{total}  {rate:.0f} steps/s  {text}", file=sys.stderr, flush=True)

    return show


def _in_notebook() -> bool:
    """True in the kernel of a Jupyter notebook or the like, whose cells show HTML."""
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def _notebook_bar(total: int) -> Show:
    """A bar of the browser's own, which needs no widgets."""
    from IPython.display import HTML, display

    def bar(step: int, text: str) -> Any:
        return HTML(f'<progress value="{step}" max="{total}"></progress> {step}/{total} &nbsp; {html.escape(text)}')

    handle = display(bar(0, ""), display_id=True)
    return lambda step, text: handle.update(bar(step, text))


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
