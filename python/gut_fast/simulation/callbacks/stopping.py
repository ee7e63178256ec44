"""Stopping a run that no longer gets better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gut_fast.arguments import as_integer, as_number
from gut_fast.simulation.callbacks.events import Callback
from gut_fast.simulation.timetable import Timetable

if TYPE_CHECKING:
    from gut_fast.simulation.simulator import Simulator

__all__ = ["EarlyStopping", "check_entry"]


class EarlyStopping(Callback):
    """Ends the run when an entry of the history has not improved for `patience` evaluations.

    It reads the history, so a run that goes on from a checkpoint stops where the uninterrupted one does. NaN is no
    improvement.

    Args:
        metric: an entry of `Simulator.history`, for example ``"test_loss"``.
        patience: number of evaluations without improvement that are too many.
        larger_is_better: whether the entry should grow; None means that it should unless its name ends with "loss" or
            "error".
        min_delta: improvements that are not larger than this count for nothing.

    Raises:
        TypeError, ValueError: an argument is bad.
            At the start of a run: the history has no such entry, or the run has no ``eval_every``.
    """

    def __init__(
        self,
        metric: str = "test_loss",
        patience: int = 5,
        *,
        larger_is_better: bool | None = None,
        min_delta: float = 0.0,
    ) -> None:
        self.metric = metric
        self.patience = as_integer(patience, "patience", minimum=1)
        self.min_delta = as_number(min_delta, "min_delta")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta must be >= 0, got {min_delta}")
        grows = not metric.endswith(("loss", "error")) if larger_is_better is None else larger_is_better
        self._sign = 1.0 if grows else -1.0

    def on_start(self, simulator: Simulator, timetable: Timetable) -> None:
        """Raises ValueError if the history has no such entry, or the run evaluates at its end only."""
        check_entry(self.metric, simulator)
        if timetable.eval_every is None:
            raise ValueError("EarlyStopping looks at evaluations; give run(..., eval_every=) a number of steps")

    def on_evaluation(self, simulator: Simulator, row: dict[str, Any]) -> None:
        """Ends the run if none of the last evaluations was better than all before."""
        best, waited = -float("inf"), 0
        for value in (self._sign * float(each[self.metric]) for each in simulator.history):
            is_better = value > best + self.min_delta
            best, waited = (value, 0) if is_better else (best, waited + 1)
        if waited >= self.patience:
            simulator.stop()


def check_entry(name: str, simulator: Simulator) -> None:
    """Raises ValueError unless rows of the simulator's history have an entry of this name."""
    if name not in simulator.entries:
        raise ValueError(f"there is no entry {name!r} in the history; its entries are {', '.join(simulator.entries)}")
