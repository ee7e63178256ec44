"""The finished runs of sweeps, side by side: which methods at which points, and their numbers at each moment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from gut_fast.data.catalog import TEXTS
from gut_fast.rules import RULES
from gut_fast.study.experiment import Experiment
from gut_fast.study.report.words import listed, point_name, shown
from gut_fast.study.results import Results

__all__ = ["ACCURACIES", "BEFORE_DECAY", "END", "METRICS", "Measure", "Study", "gather", "interval", "mean"]

OF_COMPUTING = {"engine", "backend", "device", "seed"}
"""Settings that may differ between two runs of the same method and point."""

OF_METHOD = {"rule", "hyperparameters", "lr", "weight_decay", "gamma", "state_dtype", "autocast", "channels_last"}
OF_METHOD |= {"local_steps", "wire_dtype", "wire_seed"}
"""Settings that may differ between two methods that are compared."""

END = "at the end"
BEFORE_DECAY = "before the first decay"
"""The last evaluation at the initial learning rate, of a run whose learning rate falls later."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """A number by which methods are judged.

    Attributes:
        name: what it is called at the head of a column.
        unit: of it, and of its differences.
        factor: of a history's number.
        digits: those shown after the point.
        lower_is_better: which end is the good one.
    """

    name: str
    unit: tuple[str, str] = ("%", "points")
    factor: float = 100.0
    digits: int = 1
    lower_is_better: bool = False

    def title(self, accuracy: str) -> str:
        """The words at its axis; `accuracy` says on which samples accuracies are."""
        return f"{accuracy if self.factor == 100 else 'loss'} in {self.unit[0]}"

    def best(self, means: pd.Series) -> float:
        """The best of the means."""
        return float(means.min() if self.lower_is_better else means.max())

    def is_better(self, differences: pd.Series) -> pd.Series:
        """Says of each difference whether it speaks for the first method."""
        return differences < 0 if self.lower_is_better else differences > 0


ACCURACIES = {
    "test_accuracy": Measure("averaged model"),
    "mean_agent_accuracy": Measure("mean agent"),
    "worst_agent_accuracy": Measure("worst agent"),
}
"""The columns of `Study.values` that hold accuracies."""

LOSS = {
    "test_loss": Measure("loss of the averaged model", ("nats a byte", "nats a byte"), 1.0, 3, lower_is_better=True)
}
"""The column that comes first where the samples are text."""

SENT = {"mean_bytes_sent": "mean_bytes_sent_per_step", "max_bytes_sent": "max_bytes_sent_per_step"}
"""The columns of a history that grow with the steps, and the columns of `Study.values` that hold them for one step."""

METRICS = (*LOSS, *ACCURACIES, "consensus_error", "train_loss", *SENT.values())
"""The columns of `Study.values` over which means are taken."""


@dataclass(frozen=True)
class Study:
    """Finished runs, by method and point.

    Attributes:
        results: the runs, each method, point and seed once; a column ``place`` of `results.runs` is the point as text.
        methods: labels, each control right after the method it belongs to.
        points: what the sweep varies beside methods and seeds, each as text: ``α = 0.1, topology = ring:16``.
        baseline: the method that the others are compared with.
        controls: the control of a method, for the methods that have one.
        notes: what a reader has to know of missing, repeated or unlike runs.
        values: one row for each run at each moment, indexed by point, moment, method and seed, with the columns of
            `METRICS`, ``step``, and ``diverged_agents`` (the most agents that had a loss of NaN or infinity at a time).
            A number that is missing or infinite is NaN.
    """

    results: Results
    methods: tuple[str, ...]
    points: tuple[str, ...]
    baseline: str
    controls: Mapping[str, str]
    notes: tuple[str, ...]
    values: pd.DataFrame

    def numbers(self, method: str, metric: str, point: str, moment: str) -> pd.Series:
        """A column of `values` for the runs of a method at a point and moment, by seed; there may be none."""
        try:
            found: pd.Series = self.values.loc[(point, moment, method), metric]
        except KeyError:
            return pd.Series(dtype=float)
        return found

    def differences(self, pair: tuple[str, str], metric: str, point: str, moment: str) -> pd.Series:
        """The first method's numbers minus the second's, by the seeds that both methods have."""
        first, second = (self.numbers(method, metric, point, moment) for method in pair)
        seeds = first.index.intersection(second.index).sort_values()
        return first.reindex(seeds) - second.reindex(seeds)

    def runs(self, method: str, point: str) -> pd.DataFrame:
        """The rows of `results.runs` of a method at a point, by ascending seed; there may be none."""
        runs = self.results.runs
        return runs[(runs["method"] == method) & (runs["place"] == point)].sort_values("seed")

    @property
    def measures(self) -> dict[str, Measure]:
        """The numbers by which methods are judged: accuracies, and before them the loss if all samples are text."""
        return {**LOSS, **ACCURACIES} if self.results.runs["data"].isin(TEXTS).all() else ACCURACIES

    @property
    def in_order(self) -> list[str]:
        """The names of all runs: point by point, method by method, seed by seed."""
        return [run for point in self.points for method in self.methods for run in self.runs(method, point).index]

    def moments(self, point: str | None = None) -> tuple[str, ...]:
        """The moments that some run has, at that point or at any: the end, perhaps one before a decay."""
        index = self.values.index
        here = index if point is None else index[index.get_level_values("point") == point]
        return (END, BEFORE_DECAY) if BEFORE_DECAY in here.get_level_values("moment") else (END,)

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of methods whose difference is of interest: with the baseline, then with their controls."""
        with_baseline = [(method, self.baseline) for method in self.methods if method != self.baseline]
        return with_baseline + [pair for pair in self.controls.items() if pair not in with_baseline]

    def name(self, method: str) -> str:
        """The method's label, marked if it sends more than one message a step."""
        runs = self.results.runs
        return f"{method} †" if runs.loc[runs["method"] == method, "messages"].max() > 1 else method

    @property
    def accuracy(self) -> str:
        """The name of the accuracy: of test samples, or of those held out for validation."""
        held_out = self.results.runs["validation"] > 0
        return "validation accuracy" if held_out.all() else "accuracy" if held_out.any() else "test accuracy"


def mean(numbers: pd.Series) -> float:
    """The mean of the numbers there are, NaN if there are none; the sum is rounded once, so no order changes it."""
    there = numbers.dropna()
    return math.fsum(there) / len(there) if len(there) else math.nan


def interval(numbers: pd.Series) -> tuple[float, float]:
    """Student's interval of the mean, ``mean ± t s/√n`` with n − 1 degrees of freedom; NaN for fewer than two."""
    reach = stdtrit(numbers.count() - 1, (1 + CONFIDENCE) / 2) * numbers.sem()
    return mean(numbers) - reach, mean(numbers) + reach


def gather(found: Sequence[Results], baseline: str | None = None, order: Sequence[str] = ()) -> Study:
    """The study of these results, taken together.

    Args:
        found: the results of one sweep or more; what is repeated counts once.
        baseline: a method's label; None is the first method.
        order: labels of methods in the order wanted; the others follow as they come.

    Raises:
        ValueError: there is no such baseline, no run at all, or a method has two different experiments at a point.
    """
    results, repeated = _together(found)
    runs = results.runs
    controls = runs.dropna(subset=["control_of"]).set_index("control_of")["method"].to_dict()
    methods = _methods_in_order([*order, *runs["method"]], set(runs["method"]), controls)
    baseline = methods[0] if baseline is None else baseline
    if baseline not in methods:
        raise ValueError(f"there is no method {baseline!r} to compare with; there are: {', '.join(methods)}")
    points = _points_in_order(runs["point"].unique())
    notes = (
        *([f"{listed(repeated, 'run')} found more than once; the first of each counts."] if repeated else []),
        *_missing(methods, points, runs),
        *_unlike(methods, points, results),
        *(
            f"Rule {rule} is not known here; how many messages it sends shows in its bytes alone."
            for rule in runs["rule"].unique()
            if rule not in RULES
        ),
    )
    controls = {method: control for method, control in controls.items() if method in methods}
    return Study(results, methods, points, baseline, controls, notes, _values(results))


def _together(found: Sequence[Results]) -> tuple[Results, int]:
    """All results as one, each method, point and seed once, and how many runs were found again."""
    if not any(len(results.runs) for results in found):
        raise ValueError("there are no runs to report")
    frames, histories, experiments = [], [], dict[str, Experiment]()
    for number, results in enumerate(found):  # two folders may hold runs of the same name
        frames.append(results.runs.rename(index=f"{number}/{{}}".format))
        histories.append(results.history.assign(run=f"{number}/" + results.history["run"]))
        experiments |= {f"{number}/{run}": experiment for run, experiment in results.experiments.items()}
    runs, history = pd.concat(frames), pd.concat(histories)
    runs["place"] = [point_name(json.loads(point)) for point in runs["point"]]
    runs["messages"] = [RULES[rule].num_messages if rule in RULES else 1 for rule in runs["rule"]]
    for (method, place), group in runs.groupby(["method", "place"], sort=False):
        first, *others = (experiments[run] for run in group.index)
        for other in others:
            _check_same(first, other, method, place)
    once = runs[~runs.duplicated(["method", "place", "seed"])]
    history = history[history["run"].isin(once.index)]
    return Results(once, history, {run: experiments[run] for run in once.index}), len(runs) - len(once)


def _check_same(first: Experiment, other: Experiment, method: str, place: str) -> None:
    """Raises ValueError if two runs of a method at a point differ in more than seed and machinery."""
    mine, theirs = first.as_dict(), other.as_dict()
    if differing := [name for name in mine if name not in OF_COMPUTING and mine[name] != theirs[name]]:
        values = "; ".join(f"{name}: {shown(mine[name])} and {shown(theirs[name])}" for name in differing)
        raise ValueError(
            f"runs of {method} at {place or 'the only point'} are of two experiments ({values}); report them apart, or "
            "relabel one"
        )


def _values(results: Results) -> pd.DataFrame:
    """The table `Study.values`."""
    history = results.history.reset_index(drop=True)
    last = history.groupby("run", sort=False).tail(1)
    initial = results.runs["lr"].reindex(history["run"]).to_numpy(dtype=float)
    at_first = history[np.isclose(history["lr"], initial, rtol=1e-9, atol=0)].groupby("run", sort=False).tail(1)
    moments = {END: last, BEFORE_DECAY: at_first[~at_first.index.isin(last.index)]}
    rows = pd.concat(moments, names=["moment"]).reset_index("moment").replace([np.inf, -np.inf], np.nan)
    diverged = history.reindex(columns=["run", "diverged_agents"]).groupby("run")["diverged_agents"].max()
    places = results.runs[["place", "method", "seed"]].rename(columns={"place": "point"})
    rows = rows.drop(columns="diverged_agents", errors="ignore").join(diverged.fillna(0).astype(int), on="run")
    rows = rows.join(places, on="run").assign(
        **{name: 100 * rows[name] for name in ACCURACIES},
        **{name: rows.get(name, math.nan) for name in LOSS},
        **{per_step: rows[name] / rows["step"] for name, per_step in SENT.items()},
    )
    index = ["point", "moment", "method", "seed"]
    return rows.set_index(index)[["step", *METRICS, "diverged_agents"]].sort_index()


def _methods_in_order(labels: Iterable[str], known: set[str], controls: Mapping[str, str]) -> tuple[str, ...]:
    """The known labels, each once, every control right after its method."""
    methods = [label for label in dict.fromkeys(labels) if label in known]
    for method, control in controls.items():
        if method in methods and control != method:
            methods.remove(control)
            methods.insert(methods.index(method) + 1, control)
    return tuple(methods)


def _points_in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """The names of points by their values, the first named first: numbers ascending, others in order of appearance."""
    points = [json.loads(text) for text in texts]
    appearance: dict[str, int] = {}
    for value in (value for point in points for value in point.values()):
        appearance.setdefault(json.dumps(value), len(appearance))

    def rank(point: Mapping[str, Any]) -> list[tuple[bool, float]]:
        return [
            (False, float(value)) if isinstance(value, (int, float)) else (True, appearance[json.dumps(value)])
            for value in point.values()
        ]

    return tuple(dict.fromkeys(map(point_name, sorted(points, key=rank))))


def _missing(methods: Sequence[str], points: Sequence[str], runs: pd.DataFrame) -> Iterator[str]:
    """A note for each point and each set of seeds that some methods lack where others have it."""
    for point in points:
        here = runs[runs["place"] == point]
        seeds = sorted(set(here["seed"]))
        gaps: dict[tuple[int, ...], list[str]] = {}
        for method in methods:
            lacking = tuple(sorted(set(seeds) - set(here.loc[here["method"] == method, "seed"])))
            gaps.setdefault(lacking, []).append(method)
        for lacking, without in gaps.items():
            if lacking:
                of_seeds = "" if len(lacking) == len(seeds) else f" of seed {listed(lacking)}"
                verb = "has" if len(without) == 1 else "have"
                yield (
                    f"{_at(point)}{listed(without)} {verb} no run{of_seeds}; differences are of the seeds that both "
                    "methods have."
                )


def _unlike(methods: Sequence[str], points: Sequence[str], results: Results) -> Iterator[str]:
    """A note wherever methods at the same point differ in more than the method."""
    firsts = results.runs.reset_index(names="run").groupby(["place", "method"])["run"].first()
    for point in points:
        present = [firsts[point, method] for method in methods if (point, method) in firsts.index]
        experiments = [results.experiments[run].as_dict() for run in present]
        for name in experiments[0]:
            values = {shown(experiment[name]) for experiment in experiments}
            if len(values) > 1 and name not in OF_METHOD | OF_COMPUTING:
                yield f"{_at(point)}the methods differ in {name.replace('_', ' ')}: {listed(sorted(values))}."


def _at(point: str) -> str:
    """The beginning of a note on a point."""
    return f"{point}: " if point else ""
