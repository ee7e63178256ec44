"""Numbers over seeds: what a run reached at a moment, mean and spread, paired differences with their confidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gut_fast.study.records import Record
from gut_fast.study.run import Run

__all__ = [
    "ACCURACIES",
    "BEFORE_DECAY",
    "CONFIDENCE",
    "END",
    "METRICS",
    "Difference",
    "Estimate",
    "Metric",
    "confidence_interval",
    "diverged_agents",
    "estimate",
    "has_decay",
    "paired",
    "row_at",
    "student_t_quantile",
    "values",
]

CONFIDENCE = 0.95

END = "at the end"
BEFORE_DECAY = "before the first decay"
"""The last evaluation at the initial learning rate, of a run whose learning rate falls later."""


@dataclass(frozen=True)
class Metric:
    """One number of a row of a history, `factor` times as large where it is shown."""

    key: str
    name: str
    factor: float = 1.0
    per_step: bool = False

    @property
    def column(self) -> str:
        """Its name in a table of numbers."""
        return f"{self.key}_per_step" if self.per_step else self.key

    def of(self, row: Mapping[str, Any]) -> float:
        """The number in that row; NaN where it is missing."""
        value = row.get(self.key)
        return math.nan if value is None else self.factor * value / (row["step"] if self.per_step else 1)


ACCURACIES = (
    Metric("test_accuracy", "averaged model", 100),
    Metric("mean_agent_accuracy", "mean agent", 100),
    Metric("worst_agent_accuracy", "worst agent", 100),
)
"""In %."""

METRICS = (
    *ACCURACIES,
    Metric("consensus_error", "consensus error"),
    Metric("train_loss", "train loss"),
    Metric("mean_bytes_sent", "bytes a step, mean agent", per_step=True),
    Metric("max_bytes_sent", "bytes a step, busiest agent", per_step=True),
)


def row_at(run: Run, moment: str) -> Mapping[str, Any] | None:
    """The row of the history at `END` or `BEFORE_DECAY`; None before a decay that does not come."""
    if moment == END:
        return run.final
    at_first = [row for row in run.history if math.isclose(row["lr"], run.experiment.lr)]
    return at_first[-1] if at_first and at_first[-1] is not run.final else None


def has_decay(record: Record) -> bool:
    """Whether there is an evaluation before the learning rate first falls."""
    return row_at(record.run, BEFORE_DECAY) is not None


def diverged_agents(run: Run) -> int:
    """At most how many agents had a loss of NaN or infinity at a time."""
    return max(int(row.get("diverged_agents", 0)) for row in run.history)


def values(records: Mapping[int, Record], metric: Metric, moment: str) -> dict[int, float]:
    """The number of each run that has that moment, by its seed; NaN for one that diverged."""
    rows = {seed: row_at(record.run, moment) for seed, record in records.items()}
    return {seed: metric.of(row) for seed, row in rows.items() if row is not None}


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation over the runs that have a number, and how many runs have none."""

    numbers: tuple[float, ...]
    num_without: int

    @property
    def mean(self) -> float:
        """NaN if no run has a number."""
        return statistics.fmean(self.numbers) if self.numbers else math.nan

    @property
    def std(self) -> float:
        """NaN for fewer than two numbers."""
        return statistics.stdev(self.numbers) if len(self.numbers) > 1 else math.nan


def estimate(records: Mapping[int, Record], metric: Metric, moment: str) -> Estimate:
    """The metric over the seeds."""
    numbers = values(records, metric, moment).values()
    finite = tuple(number for number in numbers if math.isfinite(number))
    return Estimate(finite, len(numbers) - len(finite))


class Difference(Estimate):
    """One method minus another: a number for each seed on which both have one.

    `num_without` counts the seeds that both were run on but have no number for.
    """

    @property
    def num_positive(self) -> int:
        """On how many seeds the first method's number is the larger."""
        return sum(number > 0 for number in self.numbers)

    @property
    def num_zero(self) -> int:
        """On how many seeds both numbers are the same."""
        return self.numbers.count(0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """As `confidence_interval`."""
        return confidence_interval(self.numbers)


def paired(first: Mapping[int, Record], second: Mapping[int, Record], metric: Metric, moment: str) -> Difference:
    """`first` − `second` over their common seeds."""
    mine, other = (values(records, metric, moment) for records in (first, second))
    differences = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    finite = tuple(number for number in differences if math.isfinite(number))
    return Difference(finite, len(differences) - len(finite))


def confidence_interval(numbers: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval of the mean, ``mean ± t s/√n`` with n − 1 degrees of freedom; None for fewer than two."""
    if len(numbers) < 2:
        return None
    mean, error = statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))
    reach = student_t_quantile((1 + confidence) / 2, len(numbers) - 1) * error
    return mean - reach, mean + reach


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t that a Student variable with so many degrees of freedom exceeds with probability ``1 − probability``.

    For ``0.5 <= probability < 1``, by bisection in the angle ``θ = arctan(t/√ν)``.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _probability_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _probability_within(theta: float, degrees: int) -> float:
    """``P(|T| <= √ν tan θ)``: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    sine, cosine, is_odd = math.sin(theta), math.cos(theta), degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total
