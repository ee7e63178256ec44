"""The runs of a sweep as a grid: for every method and point of the sweep, a run per seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gut_fast.rules import RULES
from gut_fast.study.records import Record
from gut_fast.study.report.words import listed, schedule, shown

__all__ = ["Study", "gather"]

OF_COMPUTING = {"engine", "backend", "device", "seed"}
"""Entries of an experiment that may differ between two runs of the same method and point."""

OF_METHOD = {"rule", "hyperparameters", "lr", "weight_decay", "gamma", "state_dtype", "autocast", "channels_last"}
"""Entries that may differ between two methods that are compared."""

SYMBOLS = {"alpha": "α", "mu": "μ", "gamma": "γ"}


@dataclass(frozen=True)
class Study:
    """Finished runs, by method and point.

    Attributes:
        methods: labels, each control right after the method it belongs to.
        points: what the sweep varies beside methods and seeds, each as text: ``α = 0.1, topology = ring:16``.
        baseline: the method that the others are compared with.
        controls: the control of a method, for the methods that have one.
        notes: what a reader has to know of missing, repeated or unlike runs.
    """

    methods: tuple[str, ...]
    points: tuple[str, ...]
    baseline: str
    controls: Mapping[str, str]
    notes: tuple[str, ...]
    grid: Mapping[tuple[str, str], Mapping[int, Record]]

    def records(self, method: str, point: str) -> Mapping[int, Record]:
        """The runs of a method at a point, by ascending seed; there may be none."""
        return self.grid.get((method, point), {})

    @property
    def all_records(self) -> list[Record]:
        """All runs: point by point, method by method, seed by seed."""
        return [
            record
            for point in self.points
            for method in self.methods
            for record in self.records(method, point).values()
        ]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of methods whose difference is of interest: with the baseline, then with their controls."""
        with_baseline = [(method, self.baseline) for method in self.methods if method != self.baseline]
        with_control = [pair for pair in self.controls.items() if pair not in with_baseline]
        return with_baseline + with_control

    def name(self, method: str) -> str:
        """The method's label, marked if it sends more than one message a step."""
        return f"{method} †" if any(num_messages(record) > 1 for record in self._of_method(method)) else method

    @property
    def accuracy(self) -> str:
        """Which accuracy this is: of test samples, or of those held out for validation."""
        held_out = {experiment_of(record).get("validation", 0.0) > 0 for record in self.all_records}
        return {frozenset({False}): "test accuracy", frozenset({True}): "validation accuracy"}.get(
            frozenset(held_out), "accuracy"
        )

    def _of_method(self, method: str) -> Iterator[Record]:
        return (record for point in self.points for record in self.records(method, point).values())


def gather(records: Sequence[Record], baseline: str | None = None, order: Sequence[str] = ()) -> Study:
    """The study of these records.

    Args:
        records: in any order; what is repeated counts once.
        baseline: a method's label; None is the first method.
        order: labels of methods in the order wanted; the others follow as they come.

    Raises:
        ValueError: there is no such baseline, no record at all, or a method has two different experiments at a point.
    """
    if not records:
        raise ValueError("there are no runs to report")
    grid: dict[tuple[str, str], dict[int, Record]] = {}
    repeated = 0
    for record in records:
        runs = grid.setdefault((record.method, point_name(record.point)), {})
        if runs:
            _check_same(next(iter(runs.values())), record)
        repeated += record.run.experiment.seed in runs
        runs.setdefault(record.run.experiment.seed, record)
    grid = {place: dict(sorted(runs.items())) for place, runs in grid.items()}
    controls = {record.control_of: record.method for record in records if record.control_of is not None}
    methods = _methods_in_order([*order, *(record.method for record in records)], {name for name, _ in grid}, controls)
    baseline = methods[0] if baseline is None else baseline
    if baseline not in methods:
        raise ValueError(f"there is no method {baseline!r} to compare with; there are: {', '.join(methods)}")
    points = _points_in_order(records)
    controls = {method: control for method, control in controls.items() if method in methods}
    notes = (
        *([f"{listed(repeated, 'run')} found more than once; the first of each counts."] if repeated else []),
        *_missing(methods, points, grid),
        *_unlike(methods, points, grid),
        *_unknown_rules(records),
    )
    return Study(methods, points, baseline, controls, notes, grid)


def experiment_of(record: Record) -> dict[str, Any]:
    """The configuration of the run as plain values."""
    return record.run.experiment.as_dict()


def num_messages(record: Record) -> int:
    """Messages a step; 1 for a rule that is not known here."""
    rule = RULES.get(record.run.experiment.rule)
    return 1 if rule is None else rule.num_messages


def point_name(point: Mapping[str, Any]) -> str:
    """A point of the grid as text: ``α = 0.1, lr decay at 50 % and 75 %``."""
    return ", ".join(
        schedule(value) if name == "milestones" else f"{SYMBOLS.get(name, name.replace('_', ' '))} = {shown(value)}"
        for name, value in point.items()
    )


def _methods_in_order(labels: Iterable[str], known: set[str], controls: Mapping[str, str]) -> tuple[str, ...]:
    methods = [label for label in dict.fromkeys(labels) if label in known]
    for method, control in controls.items():
        if method in methods and control != method:
            methods.remove(control)
            methods.insert(methods.index(method) + 1, control)
    return tuple(methods)


def _points_in_order(records: Sequence[Record]) -> tuple[str, ...]:
    """By their values, the first named first: numbers ascending, anything else in order of appearance."""
    appearance: dict[str, int] = {}
    for record in records:
        for value in record.point.values():
            appearance.setdefault(json.dumps(value), len(appearance))

    def rank(point: Mapping[str, Any]) -> list[tuple[bool, float]]:
        is_number = {name: isinstance(value, (int, float)) for name, value in point.items()}
        return [
            (not is_number[name], float(value) if is_number[name] else appearance[json.dumps(value)])
            for name, value in point.items()
        ]

    return tuple(dict.fromkeys(map(point_name, sorted((record.point for record in records), key=rank))))


def _check_same(first: Record, second: Record) -> None:
    mine, other = (experiment_of(record) for record in (first, second))
    differing = [name for name in mine if name not in OF_COMPUTING and mine[name] != other[name]]
    if differing:
        place = f"{first.method} at {point_name(first.point) or 'the only point'}"
        values = "; ".join(f"{name}: {shown(mine[name])} and {shown(other[name])}" for name in differing)
        raise ValueError(f"runs of {place} are of two experiments ({values}); report them apart, or relabel one")


def _missing(
    methods: Sequence[str], points: Sequence[str], grid: Mapping[tuple[str, str], Mapping[int, Record]]
) -> Iterator[str]:
    """For each point and each set of seeds, the methods that lack it where others have it."""
    for point in points:
        have = {method: grid.get((method, point), {}).keys() for method in methods}
        seeds = set[int]().union(*have.values())
        gaps: dict[tuple[int, ...], list[str]] = {}
        for method in methods:
            gaps.setdefault(tuple(sorted(seeds - have[method])), []).append(method)
        for lacking, those in gaps.items():
            if lacking:
                of_seeds = "" if len(lacking) == len(seeds) else f" of seed {listed(lacking)}"
                verb = "has" if len(those) == 1 else "have"
                yield (
                    f"{_at(point)}{listed(those)} {verb} no run{of_seeds}; differences are of the seeds that both "
                    "methods have."
                )


def _unlike(
    methods: Sequence[str], points: Sequence[str], grid: Mapping[tuple[str, str], Mapping[int, Record]]
) -> Iterator[str]:
    """Where methods at the same point differ in more than the method."""
    for point in points:
        groups = (grid.get((method, point), {}) for method in methods)
        experiments = [experiment_of(next(iter(runs.values()))) for runs in groups if runs]
        for name in experiments[0]:
            values = {shown(experiment[name]) for experiment in experiments}
            if len(values) > 1 and name not in OF_METHOD | OF_COMPUTING:
                yield f"{_at(point)}the methods differ in {name.replace('_', ' ')}: {listed(sorted(values))}."


def _unknown_rules(records: Sequence[Record]) -> Iterator[str]:
    for rule in dict.fromkeys(record.run.experiment.rule for record in records):
        if rule not in RULES:
            yield f"Rule {rule} is not known here; how many messages it sends shows in its bytes alone."


def _at(point: str) -> str:
    return f"{point}: " if point else ""
