"""The events of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gut_fast.simulation.timetable import Timetable

if TYPE_CHECKING:
    from gut_fast.simulation.simulator import Simulator

__all__ = ["AfterCheckpoint", "Callback", "around", "checked"]


class Callback:
    """The base of callbacks, whose methods do nothing.

    The events of a run are, in their order: start; then for each step, step, and evaluation and checkpoint where there
    are any; at last end. They happen between two steps, when parameters, counters and `Simulator.history` belong
    together. A callback may read everything, call `Simulator.evaluate`, `Simulator.save_checkpoint` and
    `Simulator.stop`, and change the agents' parameters or the optimizer's options. An error that it raises ends the
    run, after which the simulator can go on as after Ctrl-C. With a process_group every process calls its own
    callbacks; `Simulator.is_first` tells which one may write files.
    """

    def on_start(self, simulator: Simulator, timetable: Timetable) -> None:
        """Is called when the arguments of `Simulator.run` have been checked, before the first step.

        Args:
            simulator: the simulator that runs; its `step` is above 0 if the run goes on from an earlier one.
            timetable: the arguments of the run: ``timetable.steps``, ``eval_every``, ``checkpoint`` and
                ``checkpoint_every``.
        """

    def on_step(self, simulator: Simulator) -> None:
        """Is called after every step."""

    def on_evaluation(self, simulator: Simulator, row: dict[str, Any]) -> None:
        """Is called after every evaluation, when `row` has been added to the history."""

    def on_checkpoint(self, simulator: Simulator, path: Path) -> None:
        """Is called after every checkpoint that Ctrl-C has not caused."""

    def on_end(self, simulator: Simulator, error: BaseException | None) -> None:
        """Is called when the run ends, if `on_start` has raised nothing; `error` is what ended it, None if all is well.

        After Ctrl-C it is a KeyboardInterrupt.
        """


def checked(callbacks: Callback | Sequence[Callback]) -> list[Callback]:
    """The callbacks as a list. Raises TypeError if one is no `Callback`."""
    given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    for callback in given:
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise TypeError(f"callbacks has the class {callback.__name__}; give an object, {callback.__name__}(...)")
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks takes objects of gut_fast.callbacks.Callback, got {type(callback).__name__}")
    return given


@contextlib.contextmanager
def around(callbacks: Sequence[Callback], simulator: Simulator, timetable: Timetable) -> Iterator[None]:
    """A context that tells the callbacks of the start and the end; what has started also ends, whoever raises."""
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            callback.on_start(simulator, timetable)
            ends.push(_End(callback, simulator))
        yield


class _End:
    """A context manager that tells one callback of the end."""

    def __init__(self, callback: Callback, simulator: Simulator) -> None:
        self._callback, self._simulator = callback, simulator

    def __enter__(self) -> None:
        """Does nothing: the start has been told."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._callback.on_end(self._simulator, error)


class AfterCheckpoint(Callback):
    """A callback that calls a function after each checkpoint."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def on_checkpoint(self, simulator: Simulator, path: Path) -> None:
        """Calls the function."""
        self._function()
