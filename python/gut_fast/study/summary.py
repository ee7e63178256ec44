"""Numbers over seeds of a few runs, and the tables of a terminal that show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from gut_fast.study.run import Run

__all__ = [
    "difference_text",
    "final_values",
    "keep_whole",
    "mean_and_std",
    "methods_table",
    "paired_difference",
    "plain_table",
    "seeds_table",
]

MEGABYTE = 1e6

LEGEND = (
    "test accuracy in % of the averaged model, mean agent, worst agent; consensus:\n"
    "error (1/N) Σ ‖zᵢ − mean z‖²; MB: sent by each agent"
)
"""The legend under a table of runs."""


def final_values(runs: Sequence[Run], metric: str) -> list[float]:
    """The entry `metric` of the last row of each run's history."""
    return [float(run.final[metric]) for run in runs]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(runs: Sequence[Run], others: Sequence[Run], metric: str = "test_accuracy") -> list[float]:
    """The difference `runs` − `others` in percentage points, seed by seed. Raises ValueError for unlike seeds."""
    by_seed = {run.experiment.seed: run for run in runs}
    others_by_seed = {run.experiment.seed: run for run in others}
    if by_seed.keys() != others_by_seed.keys():
        raise ValueError(f"runs of seeds {list(by_seed)} cannot be paired with runs of seeds {list(others_by_seed)}")
    return [100 * (by_seed[seed].final[metric] - others_by_seed[seed].final[metric]) for seed in sorted(by_seed)]


def difference_text(points: Sequence[float]) -> str:
    """Mean and standard deviation of differences in points, and on how many seeds the first method is better."""
    mean, std = mean_and_std(points)
    return f"{mean:+.1f} ± {std:.1f} points, better on {sum(point > 0 for point in points)} of {len(points)} seeds"


def methods_table(groups: Mapping[str, Sequence[Run]], title: str) -> Table:
    """A line for each method: mean ± standard deviation over its runs after the last step, and the seconds of a run."""
    table = plain_table(title, "method", "lr", "averaged", "mean", "worst", "consensus", "MB", "s")
    for label, runs in groups.items():
        seconds = statistics.fmean(run.seconds for run in runs)
        table.add_row(label, f"{runs[0].experiment.lr:g}", *_cells(runs), f"{seconds:.1f}")
    return table


def seeds_table(runs: Sequence[Run], title: str) -> Table:
    """A line for each seed, and one of mean ± standard deviation."""
    table = plain_table(title, "seed", "averaged", "mean", "worst", "consensus", "MB")
    for run in runs:
        table.add_row(str(run.experiment.seed), *_cells([run]))
    if len(runs) > 1:
        table.add_section()
        table.add_row("mean", *_cells(runs))
    return table


def plain_table(title: str, *columns: str) -> Table:
    """An empty table whose first column is for names and whose others are for numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def keep_whole(table: Table, *, but: str) -> None:
    """Makes a narrow terminal cut the column `but` alone."""
    for column in table.columns:
        if column.header == but:
            column.no_wrap, column.overflow, column.min_width = False, "ellipsis", len(but)
        else:
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))


def _cells(runs: Sequence[Run]) -> list[str]:
    """Accuracies, consensus error and megabytes of the runs, as text."""
    return [
        _accuracy(runs, "test_accuracy", with_std=len(runs) > 1),
        _accuracy(runs, "mean_agent_accuracy"),
        _accuracy(runs, "worst_agent_accuracy"),
        f"{statistics.fmean(final_values(runs, 'consensus_error')):.1e}",
        f"{statistics.fmean(final_values(runs, 'mean_bytes_sent')) / MEGABYTE:.1f}",
    ]


def _accuracy(runs: Sequence[Run], metric: str, *, with_std: bool = False) -> str:
    """The mean over the runs in percent, and the standard deviation if asked for."""
    mean, std = mean_and_std([100 * value for value in final_values(runs, metric)])
    return f"{mean:.1f} ± {std:.1f}" if with_std else f"{mean:.1f}"
