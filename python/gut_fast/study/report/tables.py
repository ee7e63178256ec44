"""A study as tables of text: methods by points, every point by itself, paired differences, settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gut_fast.study.report import statistics
from gut_fast.study.report.statistics import ACCURACIES, BEFORE_DECAY, END, METRICS, Metric
from gut_fast.study.report.study import Study, experiment_of
from gut_fast.study.report.words import in_markdown, listed, schedule, shown
from gut_fast.study.units import format_bytes

__all__ = [
    "Table",
    "difference_overview",
    "further_tables",
    "main_tables",
    "markdown_table",
    "moments",
    "overview",
    "point_differences",
    "point_table",
    "points_with",
    "settings",
]

NOTHING = "–"
"""Where there is nothing to say: a method without runs, a decay that does not come."""

BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Table:
    """A table of text: its first row the heading, its first column names. `best` holds the cells (row, column) that
    are to stand out, rows counted below the heading.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()


def moments(study: Study, point: str | None = None) -> tuple[str, ...]:
    """The moments there are to report: the end, and that before the decay if some run, at that point, has one."""
    places = study.points if point is None else (point,)
    records = (study.records(method, place).values() for method in study.methods for place in places)
    decays = any(statistics.has_decay(record) for group in records for record in group)
    return (END, BEFORE_DECAY) if decays else (END,)


def points_with(study: Study, moment: str) -> tuple[str, ...]:
    """The points that have runs with that moment."""
    return tuple(point for point in study.points if moment in moments(study, point))


def main_tables(study: Study, moment: str) -> tuple[Table, Table]:
    """Values and paired differences that come first: of the averaged model at all points, or all of a single point."""
    if len(study.points) == 1:
        return point_table(study, study.points[0], moment), point_differences(study, study.points[0], moment)
    return overview(study, ACCURACIES[0], moment), difference_overview(study, ACCURACIES[0], moment)


def further_tables(study: Study, moment: str) -> list[Table]:
    """The same of the mean and the worst agent, of more than one point."""
    others = ACCURACIES[1:] if len(study.points) > 1 else ()
    return [build(study, metric, moment) for metric in others for build in (overview, difference_overview)]


def overview(study: Study, metric: Metric, moment: str) -> Table:
    """A line for each method, a column for each point: mean ± standard deviation over seeds."""
    points = points_with(study, moment)

    def number(method: str, point: str) -> statistics.Estimate:
        return statistics.estimate(study.records(method, point), metric, moment)

    rows = [(study.name(method), *(_value(number(method, point)) for point in points)) for method in study.methods]
    best = _largest([[number(method, point) for point in points] for method in study.methods])
    return Table(f"{_capital(metric.name)} {moment}", ("method", *points), tuple(rows), best)


def difference_overview(study: Study, metric: Metric, moment: str) -> Table:
    """A line for each comparison, a column for each point."""
    points = points_with(study, moment)
    rows = [
        (_pair_name(study, *pair), *(_difference(study, pair, point, metric, moment) for point in points))
        for pair in study.comparisons
    ]
    return Table(f"Paired differences of the {metric.name} {moment}", ("methods", *points), tuple(rows))


def point_table(study: Study, point: str, moment: str) -> Table:
    """A line for each method: accuracies, consensus error, train loss, bytes, diverged runs, seeds."""
    columns: dict[str, Callable[[str], str]] = {
        "lr": lambda method: _learning_rate(study, method, point),
        **{metric.name: _accuracy_column(study, point, metric, moment) for metric in ACCURACIES},
        "consensus error": _mean_column(study, point, "consensus_error", moment, lambda number: f"{number:.1e}"),
        "train loss": _mean_column(study, point, "train_loss", moment, lambda number: f"{number:.3f}"),
        "sent a step": lambda method: _bytes(study, method, point),
        "diverged": lambda method: _diverged(study, method, point),
        "seeds": lambda method: str(len(study.records(method, point)) or NOTHING),
    }
    rows = [(study.name(method), *(column(method) for column in columns.values())) for method in study.methods]
    numbers = [
        [statistics.estimate(study.records(method, point), metric, moment) for metric in ACCURACIES]
        for method in study.methods
    ]
    best = frozenset((row, column + 1) for row, column in _largest(numbers))
    return Table(_capital(moment), ("method", *columns), tuple(rows), best)


def point_differences(study: Study, point: str, moment: str) -> Table:
    """A line for each comparison, a column for each accuracy."""
    rows = [
        (_pair_name(study, *pair), *(_difference(study, pair, point, metric, moment) for metric in ACCURACIES))
        for pair in study.comparisons
    ]
    header = ("methods", *(metric.name for metric in ACCURACIES))
    return Table(f"Paired differences {moment}", header, tuple(rows))


def settings(study: Study) -> tuple[Table, Table]:
    """The configuration: what is the same for all methods, and what each method has of its own."""
    experiments = {
        method: [experiment_of(record) for record in study.all_records if record.method == method]
        for method in study.methods
    }
    first = experiments[study.methods[0]][0]
    # Of each entry and method the values that occur; an entry that the points vary is the same for all methods.
    occurring = {
        name: [tuple(dict.fromkeys(_entry(name, each[name]) for each in group)) for group in experiments.values()]
        for name in first
        if name != "seed"
    }
    seeds = sorted({record.run.experiment.seed for record in study.all_records})
    common = [
        (name.replace("_", " "), " | ".join(found[0])) for name, found in occurring.items() if len(set(found)) == 1
    ]
    own = [name for name, found in occurring.items() if len(set(found)) > 1]
    rows = [
        (study.name(method), *(" | ".join(occurring[name][row]) for name in own))
        for row, method in enumerate(study.methods)
    ]
    return (
        Table("All methods", ("setting", "value"), (*common, ("seeds", listed(seeds)))),
        Table("Each method", ("method", *(name.replace("_", " ") for name in own)), tuple(rows)),
    )


def markdown_table(table: Table) -> Iterator[str]:
    """The lines of the table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    yield line([in_markdown(cell) for cell in table.header])
    yield f"| --- |{' ---: |' * (len(table.header) - 1)}"
    for row, cells in enumerate(table.rows):
        escaped = [in_markdown(cell) for cell in cells]
        yield line([f"**{cell}**" if (row, column) in table.best else cell for column, cell in enumerate(escaped)])


def _entry(name: str, value: Any) -> str:
    return schedule(value) if name == "milestones" else shown(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _largest(numbers: Sequence[Sequence[statistics.Estimate]]) -> frozenset[tuple[int, int]]:
    """The largest mean of each column, as (row, column) of a table that has names before them.

    A method of which a run has no number is not among them: the mean of its others is of the luckier seeds.
    """
    columns = [
        [math.nan if each.num_without else each.mean for each in column] for column in zip(*numbers, strict=True)
    ]
    return frozenset(
        (row, place + 1)
        for place, column in enumerate(columns)
        for row, mean in enumerate(column)
        if len(column) > 1 and mean == max((other for other in column if math.isfinite(other)), default=math.nan)
    )


def _value(number: statistics.Estimate, digits: int = 1) -> str:
    """``82.6 ± 0.3``; where runs diverged, how many of them have a number."""
    num_runs = len(number.numbers) + number.num_without
    if not number.numbers:
        return "diverged" if num_runs else NOTHING
    spread = f" ± {number.std:.{digits}f}" if len(number.numbers) > 1 else ""
    of = f" ({len(number.numbers)} of {num_runs} runs)" if number.num_without else ""
    return f"{number.mean:.{digits}f}{spread}{of}"


def _difference(study: Study, pair: tuple[str, str], point: str, metric: Metric, moment: str) -> str:
    """``+1.9 [+1.2, +2.6], 5 of 5``; ties and seeds without a number are said."""
    first, second = (study.records(method, point) for method in pair)
    difference = statistics.paired(first, second, metric, moment)
    if not difference.numbers:
        return "diverged" if difference.num_without else NOTHING
    interval = difference.interval
    reach = "" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]"
    ties = f", {difference.num_zero} equal" if difference.num_zero else ""
    lost = f", {difference.num_without} diverged" if difference.num_without else ""
    return f"{difference.mean:+.1f}{reach}, {difference.num_positive} of {len(difference.numbers)}{ties}{lost}"


def _pair_name(study: Study, method: str, other: str) -> str:
    return f"{study.name(method)} − {study.name(other)}"


def _accuracy_column(study: Study, point: str, metric: Metric, moment: str) -> Callable[[str], str]:
    return lambda method: _value(statistics.estimate(study.records(method, point), metric, moment))


def _mean_column(study: Study, point: str, key: str, moment: str, form: Callable[[float], str]) -> Callable[[str], str]:
    def column(method: str) -> str:
        number = statistics.estimate(study.records(method, point), BY_KEY[key], moment)
        return form(number.mean) if number.numbers else _value(number)

    return column


def _learning_rate(study: Study, method: str, point: str) -> str:
    return next((shown(record.run.experiment.lr) for record in study.records(method, point).values()), NOTHING)


def _bytes(study: Study, method: str, point: str) -> str:
    """Of the mean agent and, where agents differ, of the one that sends most."""
    mean, largest = (
        statistics.estimate(study.records(method, point), BY_KEY[key], END).mean
        for key in ("mean_bytes_sent", "max_bytes_sent")
    )
    if math.isnan(mean):
        return NOTHING
    return (
        format_bytes(mean) if math.isclose(mean, largest) else f"{format_bytes(mean)}, at most {format_bytes(largest)}"
    )


def _diverged(study: Study, method: str, point: str) -> str:
    """How many agents, of how many runs."""
    runs = [record.run for record in study.records(method, point).values()]
    agents = [diverged for run in runs if (diverged := statistics.diverged_agents(run))]
    if not agents:
        return "0" if runs else NOTHING
    return f"{max(agents)} agents in {len(agents)} of {len(runs)} runs"
