"""Hyper-parameters for a sweep: every method gets the same number of tries, on samples held out from training.

A sweep's file says how in a section of its own::

    tune:
      tries: 12
      seeds: [100, 101, 102]            # not those of the sweep
      validation: 0.1                   # of the training samples; the test samples are never looked at
      metric: test_accuracy             # or test_loss, …: at the end, mean over points and seeds
      space:
        lr: {low: 0.0125, high: 1.6}    # uniform in the logarithm
        mu: {low: 0.5, high: 0.95, log: false}
        momentum: [0.8, 0.9, 0.95]      # one of these

A method tries what of the space its rule has and its own settings do not fix, and ``space`` among these settings comes
after. Where all of a method's space are lists, it tries all their combinations, which must be `tries` of them;
elsewhere the tries are the points of a scrambled Sobol sequence, which fill the space evenly.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from gut_fast.arguments import nearest, shown
from gut_fast.rules import get_rule
from gut_fast.study.experiment import as_setting, number_if_text, seeds_of
from gut_fast.study.results import Results
from gut_fast.study.sweep import Sweep, Task, check_count, make_sweep, named_methods, section_of

__all__ = ["Choice", "Range", "Tuning", "choose", "make_tuning", "tried", "tuned_content"]

METRICS = {"test_accuracy": 0.0, "mean_agent_accuracy": 0.0, "worst_agent_accuracy": 0.0, "test_loss": math.inf}
"""The entries of the history that a try can be judged by, each with that of a run that has come to nothing."""

MAX_TRIES = 10_000
OF_OPTIMIZERS = {"lr", "weight_decay"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, even in their logarithm if `log`.

    Raises:
        TypeError, ValueError: no numbers, not in this order, or not above 0 if `log`.
    """

    low: float
    high: float
    log: bool = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = number_if_text(getattr(self, name))
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.log, bool):
            raise TypeError(f"log must be true or false, got {self.log!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range goes from a low to a higher value, got {self.low} … {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range that is even in the logarithm is above 0, got {self.low}; or say log: false")

    def at(self, fraction: float) -> float:
        """The number that lies so far on the way from low to high, to three digits."""
        if self.log:
            value = self.low * (self.high / self.low) ** fraction
        else:
            value = self.low + (self.high - self.low) * fraction
        return float(f"{value:.3g}")


Space = Mapping[str, "Range | Sequence[Any]"]


@dataclass(frozen=True)
class Tuning:
    """The tries of every method, and how they are judged.

    Args:
        sweep: has the methods to tune, over all points of its grid together.
        spaces: the space of each method by its label.
        tries: how many tries each method gets.
        seeds: the seeds of each try.
        validation: the fraction of the training samples that is held out.
        metric: one of `METRICS`; the best try has the highest mean of it in the last row over points and seeds, or the
            lowest of a loss.

    Raises:
        TypeError, ValueError: a bad value, or a method that cannot have so many different tries.
    """

    sweep: Sweep
    spaces: Mapping[str, Space]
    tries: int
    seeds: Sequence[int]
    validation: float
    metric: str

    def __post_init__(self) -> None:
        if isinstance(self.tries, bool) or not isinstance(self.tries, int) or not 1 <= self.tries <= MAX_TRIES:
            raise ValueError(f"tune: tries must be an integer from 1 to {MAX_TRIES:,}, got {shown(self.tries)}")
        if not isinstance(self.metric, str) or self.metric not in METRICS:
            raise ValueError(f"tune: metric must be one of {', '.join(METRICS)}, got {shown(self.metric)}")
        if not (isinstance(self.validation, float) and 0 < self.validation < 1):
            raise ValueError(f"tune: validation must be a fraction between 0 and 1, got {shown(self.validation)}")
        check_count(self.tries * len(self.sweep.methods) * len(self.sweep.points) * len(self.seeds), "runs")
        for label in self.sweep.methods:
            self._check_different(label)
        self.tasks()

    def _check_different(self, label: str) -> None:
        tries = [json.dumps(settings) for settings in self.settings(label)]
        for number, settings in enumerate(tries):
            if (first := tries.index(settings)) < number:
                raise ValueError(
                    f"method {label!r}: tries {first} and {number} are the same, {settings}; widen its space, or "
                    "lower the number of tries"
                )

    def settings(self, label: str) -> list[dict[str, Any]]:
        """The settings that a method tries, one dict a try."""
        space = self.spaces[label]
        lists = {name: values for name, values in space.items() if not isinstance(values, Range)}
        if len(lists) < len(space):
            fractions = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(self.tries)
            return [
                {name: _value(space[name], fraction) for name, fraction in zip(space, row, strict=True)}
                for row in fractions.tolist()
            ]
        count = math.prod(map(len, lists.values()))
        if count != self.tries:
            raise ValueError(
                f"method {label!r} has {count} combinations to try, but every method gets {self.tries} "
                "tries; name as many, or give a range: {low: ..., high: ...}"
            )
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]

    def tasks(self) -> list[Task]:
        """All runs of all tries; the number of the try is part of the point."""
        tasks = []
        for label, own in self.sweep.methods.items():
            for number, settings in enumerate(self.settings(label)):
                tried = {label: {**own, **settings, "validation": self.validation}}
                sweep = Sweep(self.sweep.settings, tried, self.sweep.grid, self.seeds, controls=False)
                tasks += [replace(task, point={**task.point, "try": number}) for task in sweep.tasks()]
        return tasks


def _value(values: Range | Sequence[Any], fraction: float) -> Any:
    return values.at(fraction) if isinstance(values, Range) else values[int(fraction * len(values))]


@dataclass(frozen=True)
class Choice:
    """The best try of a method."""

    label: str
    settings: Mapping[str, Any]
    score: float
    at_edge: tuple[str, ...]
    """The settings whose value is the lowest or highest of all tried, so that a better one may lie beyond."""


def tried(tuning: Tuning, results: Results) -> pd.DataFrame:
    """All tries as a table: method, try, score and settings.

    The score is the mean over points and seeds; a run whose averaged model ended in NaN or infinity counts as an
    accuracy of 0 or an infinite loss.

    Raises:
        ValueError: runs are missing.
    """
    final = results.final()
    # A network that is NaN still has an accuracy, that of always answering the first class.
    is_sound = np.isfinite(final[["test_loss", tuning.metric]]).all(axis="columns")
    last = results.runs[["method", "try"]].assign(score=final[tuning.metric].where(is_sound, METRICS[tuning.metric]))
    scores = last.groupby(["method", "try"])["score"].agg(["mean", "count"])
    expected = len(tuning.seeds) * len(tuning.sweep.points)
    rows = []
    for label in tuning.sweep.methods:
        for number, settings in enumerate(tuning.settings(label)):
            mean, count = scores.loc[(label, number)] if (label, number) in scores.index else (0, 0)
            if count != expected:
                raise ValueError(f"try {number} of {label!r} has {count:.0f} finished runs of {expected}")
            rows.append({"method": label, "try": number, "score": mean, **settings})
    return pd.DataFrame(rows)


def choose(tuning: Tuning, results: Results) -> list[Choice]:
    """The best try of every method. Raises as `tried`."""
    choices = []
    for label, tries in tried(tuning, results).groupby("method", sort=False):
        is_loss = METRICS[tuning.metric] == math.inf
        settings, best = tuning.settings(label), int(tries["score"].argmin() if is_loss else tries["score"].argmax())
        edges = [name for name in settings[best] if _is_extreme(settings[best][name], [one[name] for one in settings])]
        choices.append(Choice(label, settings[best], float(tries["score"].iloc[best]), tuple(edges)))
    return choices


def _is_extreme(value: Any, tried: Sequence[Any]) -> bool:
    numbers = sorted({one for one in tried if isinstance(one, (int, float)) and not isinstance(one, bool)})
    return len(numbers) > 2 and value in (numbers[0], numbers[-1])


def make_tuning(content: Mapping[str, Any]) -> Tuning:
    """The tuning that the content of a sweep's file describes. Raises as `Tuning` and `make_sweep`."""
    section = content.get("tune")
    if not isinstance(section, Mapping) or "tries" not in section or "space" not in section:
        raise TypeError(f"section 'tune' must have tries and a space, got {shown(section)}")
    known = ("tries", "space", "seeds", "validation", "metric")
    for name in section:
        if name not in known:
            raise ValueError(f"tune: there is no {name!r}; {nearest(name, known)}")
    methods = named_methods(content)
    bare = {label: _without_space(own) for label, own in methods.items()}
    sweep = make_sweep({**content, "methods": bare, "controls": False}, also=["tune"])
    return Tuning(
        sweep,
        _spaces(methods, section["space"], section_of(content, "settings", {})),
        section["tries"],
        seeds_of(section.get("seeds", [100, 101, 102])),
        number_if_text(section.get("validation", 0.1)),
        section.get("metric", "test_accuracy"),
    )


def _spaces(methods: Mapping[str, Mapping[str, Any]], space: Any, settings: Mapping[str, Any]) -> dict[str, Space]:
    """The space of each method: the part of the common one that its rule has and it does not set itself, and its own.

    Raises:
        TypeError, ValueError: a bad space, a value that is both set and to be tried, or that no method would try.
    """
    common = _space("tune: space", space)
    if both := common.keys() & settings.keys():
        raise ValueError(f"tune: space has {', '.join(sorted(both))}, and so has section 'settings'")
    spaces: dict[str, Space] = {}
    for label, own in methods.items():
        mine = _space(f"method {label!r}: space", own.get("space", {}))
        if both := mine.keys() & own.keys():
            raise ValueError(f"method {label!r} sets {', '.join(sorted(both))}, and so does its space")
        can_have = OF_OPTIMIZERS.union(get_rule(own["rule"]).hyperparameters) - own.keys()
        spaces[label] = {**{name: values for name, values in common.items() if name in can_have}, **mine}
    if useless := [repr(name) for name in common if not any(name in mine for mine in spaces.values())]:
        raise ValueError(
            f"tune: no method would try {', '.join(useless)}; a common space is of {', '.join(sorted(OF_OPTIMIZERS))} "
            "and the hyper-parameters of the rules, of what the methods do not set themselves"
        )
    return spaces


def _space(place: str, section: Any) -> dict[str, Range | Sequence[Any]]:
    if not isinstance(section, Mapping):
        raise TypeError(f"{place} must hold names with ranges or lists, got {shown(section)}")
    return {str(name): _values(f"{place}: {name}", str(name), values) for name, values in section.items()}


def _values(place: str, name: str, values: Any) -> Range | Sequence[Any]:
    if isinstance(values, Mapping):
        if not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
            raise TypeError(f"{place} must have low, high and perhaps log, got {shown(values)}")
        try:
            return Range(**values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {error}") from error
    if not isinstance(values, list) or not values:
        raise TypeError(f"{place} must be a list or {{low: ..., high: ...}}, got {shown(values)}")
    return [as_setting(name, value) for value in values]


def _without_space(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "space"}


def tuned_content(content: Mapping[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """The file's content with the chosen values in place of what was to be tuned."""
    chosen = {choice.label: choice.settings for choice in choices}
    methods = {label: {**_without_space(own), **chosen[label]} for label, own in named_methods(content).items()}
    return {**{name: value for name, value in content.items() if name != "tune"}, "methods": methods}
