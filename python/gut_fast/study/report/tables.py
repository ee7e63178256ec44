"""A study as tables of text: methods by points, every point by itself, paired differences, settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from gut_fast.study.experiment import Experiment
from gut_fast.study.report.study import END, Measure, Study, interval, mean
from gut_fast.study.report.words import in_markdown, listed, schedule, shown
from gut_fast.study.schedules import MILESTONES
from gut_fast.study.units import format_bytes

__all__ = ["Table", "further_tables", "main_tables", "markdown_table", "point_tables", "settings"]

OPTIONAL = (
    *("inner", "inner_options", "mix_state", "max_grad_norm", "schedule", "warmup"),
    *("local_steps", "wire_dtype", "wire_seed"),
)
"""The settings that are not listed where no run departs from their defaults."""

PERCENT = Measure("accuracy")

NOTHING = "–"
"""The cell of a method without runs."""


@dataclass(frozen=True)
class Table:
    """A table of text: a header, rows whose first cell is a name, and the cells (row, column) that are to stand out."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()


def main_tables(study: Study, moment: str) -> tuple[Table, Table]:
    """The values and differences that come first: of the averaged model at all points, or all of a single point."""
    if len(study.points) == 1:
        return point_tables(study, study.points[0], moment)
    first = next(iter(study.measures))
    return overview(study, first, moment), difference_overview(study, first, moment)


def further_tables(study: Study, moment: str) -> list[Table]:
    """The values and differences of the mean and of the worst agent, where there is more than one point."""
    others = [*study.measures][1:] if len(study.points) > 1 else []
    return [build(study, metric, moment) for metric in others for build in (overview, difference_overview)]


def overview(study: Study, metric: str, moment: str) -> Table:
    """A line for each method, a column for each point: mean ± standard deviation over seeds."""
    columns = [(metric, point) for point in study.points if moment in study.moments(point)]
    title = f"{study.measures[metric].name.capitalize()} {moment}"
    return _value_table(study, columns, moment, title, [point for _, point in columns])


def difference_overview(study: Study, metric: str, moment: str) -> Table:
    """A line for each comparison, a column for each point."""
    columns = [(metric, point) for point in study.points if moment in study.moments(point)]
    title = f"Paired differences of the {study.measures[metric].name} {moment}"
    return _difference_table(study, columns, moment, title, [point for _, point in columns])


def point_tables(study: Study, point: str, moment: str) -> tuple[Table, Table]:
    """The values and the differences of all accuracies at a point."""
    columns = [(metric, point) for metric in study.measures]
    differences = _difference_table(study, columns, moment, f"Paired differences {moment}", _names(study))
    return _point_table(study, point, moment), differences


def _names(study: Study) -> list[str]:
    """The names of the measures."""
    return [measure.name for measure in study.measures.values()]


def _point_table(study: Study, point: str, moment: str) -> Table:
    """A line for each method: accuracies, consensus error, train loss, bytes, diverged runs, seeds."""
    columns = [(metric, point) for metric in study.measures]
    values = _value_table(study, columns, moment, moment.capitalize(), _names(study))
    rows = []
    for method, (name, *accuracies) in zip(study.methods, values.rows, strict=True):
        runs = study.runs(method, point)
        error, loss = (study.numbers(method, metric, point, moment) for metric in ("consensus_error", "train_loss"))
        rows.append(
            (
                name,
                shown(runs["lr"].iloc[0]) if len(runs) else NOTHING,
                *accuracies,
                f"{mean(error):.1e}" if error.count() else value_text(error),
                f"{mean(loss):.3f}" if loss.count() else value_text(loss),
                _sent(study, method, point),
                _diverged(study.numbers(method, "diverged_agents", point, END)),
                str(len(runs) or NOTHING),
            )
        )
    header = ("method", "lr", *_names(study), "consensus error", "train loss", "sent a step", "diverged", "seeds")
    best = frozenset((row, column + 1) for row, column in values.best)
    return Table(values.title, header, tuple(rows), best)


def _value_table(
    study: Study, columns: Sequence[tuple[str, str]], moment: str, title: str, names: Sequence[str]
) -> Table:
    """A line for each method, a column for each (metric, point); the best mean of a column stands out.

    A method of which a run has no number is not among the best: the mean of its others is of the luckier seeds.
    """
    numbers = [[study.numbers(method, metric, point, moment) for metric, point in columns] for method in study.methods]
    means = pd.DataFrame([[math.nan if one.isna().any() else mean(one) for one in row] for row in numbers])
    best = {
        (row, column + 1)
        for column in means
        for row in means.index[means[column] == study.measures[columns[column][0]].best(means[column])]
        if len(means) > 1
    }
    measures = [study.measures[metric] for metric, _ in columns]
    rows = [
        (study.name(method), *map(value_text, row, measures))
        for method, row in zip(study.methods, numbers, strict=True)
    ]
    return Table(title, ("method", *names), tuple(rows), frozenset(best))


def _difference_table(
    study: Study, columns: Sequence[tuple[str, str]], moment: str, title: str, names: Sequence[str]
) -> Table:
    """A line for each comparison, a column for each (metric, point)."""
    rows = [
        (
            " − ".join(map(study.name, pair)),
            *(
                difference_text(study.differences(pair, metric, point, moment), study.measures[metric])
                for metric, point in columns
            ),
        )
        for pair in study.comparisons
    ]
    return Table(title, ("methods", *names), tuple(rows))


def value_text(numbers: pd.Series, measure: Measure = PERCENT) -> str:
    """``82.6 ± 0.3``; where runs diverged, how many of them have a number."""
    if not numbers.count():
        return "diverged" if len(numbers) else NOTHING
    digits = measure.digits
    spread = f" ± {numbers.std():.{digits}f}" if numbers.count() > 1 else ""
    of = f" ({numbers.count()} of {len(numbers)} runs)" if numbers.count() < len(numbers) else ""
    return f"{mean(numbers):.{digits}f}{spread}{of}"


def difference_text(numbers: pd.Series, measure: Measure = PERCENT) -> str:
    """``+1.9 [+1.2, +2.6], 5 of 5``: mean, interval, seeds where the first is better; ties and lost seeds are said."""
    if not numbers.count():
        return "diverged" if len(numbers) else NOTHING
    low, high = interval(numbers)
    digits = measure.digits
    reach = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if numbers.count() > 1 else ""
    ties = f", {(numbers == 0).sum()} equal" if (numbers == 0).any() else ""
    lost = f", {numbers.isna().sum()} diverged" if numbers.isna().any() else ""
    return f"{mean(numbers):+.{digits}f}{reach}, {measure.is_better(numbers).sum()} of {numbers.count()}{ties}{lost}"


def _sent(study: Study, method: str, point: str) -> str:
    """Bytes a step of the mean agent and, where agents differ, of the one that sends most."""
    columns = ("mean_bytes_sent_per_step", "max_bytes_sent_per_step")
    average, largest = (mean(study.numbers(method, column, point, END)) for column in columns)
    if math.isnan(average):
        return NOTHING
    at_most = "" if math.isclose(average, largest) else f", at most {format_bytes(largest)}"
    return f"{format_bytes(average)}{at_most}"


def _diverged(agents: pd.Series) -> str:
    """The most agents that diverged in a run, and in how many of the runs some did."""
    if not agents.any():
        return "0" if len(agents) else NOTHING
    return f"{agents.max()} agents in {(agents > 0).sum()} of {len(agents)} runs"


def _settings_of(experiment: Experiment) -> dict[str, str]:
    """All settings as text."""
    values = experiment.as_dict()
    falls = {"milestones": schedule(experiment.milestones)} if experiment.schedule == MILESTONES else {}
    return {name: shown(value) for name, value in values.items()} | falls


def settings(study: Study) -> tuple[Table, Table]:
    """The configuration: what is the same for all methods, and what each method has of its own."""
    runs = study.results.runs
    entries = pd.DataFrame({run: _settings_of(study.results.experiments[run]) for run in study.in_order}).T
    unused = [
        name
        for name, value in _settings_of(Experiment()).items()
        if name in OPTIONAL and (entries[name] == value).all()
    ]
    entries = entries.drop(columns=["seed", *unused])
    # The values of each entry that occur in each method; an entry that the points vary is the same for all methods.
    methods = runs["method"].reindex(entries.index)
    occurring = (
        entries.groupby(methods, sort=False).agg(lambda column: " | ".join(column.unique())).loc[[*study.methods]]
    )
    is_common = occurring.nunique() == 1
    common = [(name.replace("_", " "), occurring[name].iloc[0]) for name in occurring.columns[is_common]]
    own = occurring.loc[:, ~is_common]
    rows = [(study.name(method), *own.loc[method]) for method in study.methods]
    return (
        Table("All methods", ("setting", "value"), (*common, ("seeds", listed(sorted(set(runs["seed"])))))),
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
