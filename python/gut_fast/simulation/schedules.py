"""Schedules: what changes the learning rate in a run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from gut_fast.simulation.timetable import Timetable

__all__ = ["MakeScheduler", "Schedule", "make_schedule", "options_of"]

CLASS = "class of the scheduler"

MakeScheduler = Callable[[Optimizer], LRScheduler]
"""Makes a torch scheduler of the optimizer."""


class Schedule:
    """The schedule that changes nothing; what it does at the moments of a run is for subclasses."""

    def before_step(self, step: int) -> None:
        """Is called before the optimizer's step that follows `step` steps."""

    def after_step(self) -> None:
        """Is called after the optimizer's step."""

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """Is called with each row of the history whose step is a multiple of ``eval_every``."""

    def state_dict(self) -> dict[str, Any] | None:
        """The state of a torch scheduler, None without one."""
        return None


class _Milestones(Schedule):
    """The learning rate of each group, multiplied by a factor that depends on the step alone."""

    def __init__(self, timetable: Timetable, optimizer: Optimizer, initial_rates: Sequence[float]) -> None:
        self._timetable, self._optimizer, self._initial_rates = timetable, optimizer, initial_rates
        if len(initial_rates) != len(optimizer.param_groups):
            raise ValueError(
                f"milestones multiply the learning rates that the groups had at first, but the optimizer has "
                f"{len(optimizer.param_groups)} groups, {len(initial_rates)} at first; give schedule= instead"
            )

    def before_step(self, step: int) -> None:
        """Sets the learning rates of the step."""
        for group, initial in zip(self._optimizer.param_groups, self._initial_rates, strict=True):
            group["lr"] = initial * self._timetable.lr_factor(step)


class _EveryStep(Schedule):
    """A torch scheduler that is stepped after every step of the optimizer."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler

    def after_step(self) -> None:
        """Steps the scheduler."""
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        """The scheduler's state, and the name of its class."""
        return {CLASS: type(self._scheduler).__name__, **self._scheduler.state_dict()}


class _EveryEvaluation(_EveryStep):
    """A torch scheduler that is stepped with an entry of the history, at evaluations."""

    def __init__(self, scheduler: Any, entry: str) -> None:
        super().__init__(scheduler)
        self._entry = entry

    def after_step(self) -> None:
        """Does nothing."""

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """Steps the scheduler with the row's entry."""
        step: Any = self._scheduler.step
        step(row[self._entry])


def make_schedule(
    timetable: Timetable,
    make_scheduler: MakeScheduler | None,
    entry: str,
    optimizer: Optimizer,
    initial_rates: Sequence[float],
    state: dict[str, Any] | None,
) -> Schedule:
    """The schedule that the arguments of `gut_fast.Simulator.run` ask for.

    Args:
        timetable: the arguments of the run.
        make_scheduler: makes a torch scheduler, or None.
        entry: the entry of the history that a scheduler like `ReduceLROnPlateau` is stepped with.
        optimizer: its learning rates are changed.
        initial_rates: the learning rates that the optimizer's groups had at first.
        state: the state of the scheduler at the end of the last run, which one of the same class goes on from, or None.

    Raises:
        TypeError, ValueError: the schedule cannot be followed; the optimizer's options are as they were.
    """
    if make_scheduler is None:
        return _Milestones(timetable, optimizer, initial_rates) if timetable.milestones else Schedule()
    if timetable.milestones:
        raise ValueError("milestones= and schedule= both change the learning rate; give one of them")
    options = copy.deepcopy(options_of(optimizer))
    try:
        scheduler = _checked(make_scheduler, optimizer, timetable)
        goes_on = state is not None and state.get(CLASS) == type(scheduler).__name__
        if state is not None and goes_on:
            scheduler.load_state_dict({name: value for name, value in state.items() if name != CLASS})
    except BaseException:
        _put_back(options, optimizer)
        raise
    if goes_on:  # the new scheduler has set the learning rate of its first step
        for group, saved in zip(optimizer.param_groups, options, strict=True):
            group.update(saved)
    return _EveryEvaluation(scheduler, entry) if _wants_a_metric(scheduler) else _EveryStep(scheduler)


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group of the optimizer."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _checked(make_scheduler: MakeScheduler, optimizer: Optimizer, timetable: Timetable) -> LRScheduler:
    """Makes the scheduler and looks whether the run can follow it."""
    if not callable(make_scheduler):
        raise TypeError(
            f"schedule must be a function of the optimizer, got {type(make_scheduler).__name__}; for example "
            "schedule=lambda optimizer: CosineAnnealingLR(optimizer, 100)"
        )
    scheduler = make_scheduler(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"schedule must return a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__}")
    if scheduler.optimizer.param_groups is not optimizer.param_groups:
        raise ValueError("schedule has made a scheduler of another optimizer than the one that it was given")
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < timetable.steps:
        raise ValueError(f"OneCycleLR ends after {scheduler.total_steps} steps, the run after {timetable.steps}")
    if _wants_a_metric(scheduler) and timetable.eval_every is None:
        raise ValueError(
            f"{type(scheduler).__name__} is stepped at evaluations, but the run evaluates at its end only; give "
            "eval_every="
        )
    return scheduler


def _wants_a_metric(scheduler: LRScheduler) -> bool:
    """True if the scheduler's `step` takes a metric, as that of `ReduceLROnPlateau` does."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


def _put_back(options: list[dict[str, Any]], optimizer: Optimizer) -> None:
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for name in group.keys() - saved.keys() - {"params"}:
            del group[name]
        group.update(saved)
