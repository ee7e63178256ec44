"""Numbers over seeds of a few runs, and the tables of a terminal that show them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gut_fast.study.run import Run

__all__ = [
    "FittingTable",
    "difference_text",
    "final_values",
    "mean_and_std",
    "methods_table",
    "paired_difference",
    "plain_table",
    "seeds_table",
]

MEGABYTE = 1e6

UNBOUNDED = 10_000
"""The width at which nothing is wrapped."""

WRAPPED_WIDTH = 12
"""The width down to which a column that may be wrapped is narrowed."""

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
    table = plain_table(title, "seed", "averaged", "mean", "worst", "consensus", "MB", "loss")
    for run in runs:
        table.add_row(str(run.experiment.seed), *_cells([run]), _loss([run]))
    if len(runs) > 1:
        table.add_section()
        table.add_row("mean", *_cells(runs), _loss(runs))
    table.caption = "loss: of the averaged model on the test samples; of text, in nats a byte"
    return table


class FittingTable(Table):
    """A table of which each row becomes a few lines, a name and a value each, where the console is too narrow for it.

    Columns with ``no_wrap=False`` are wrapped first. So no number is cut off or broken.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = Measurement.get(console, options.update(max_width=UNBOUNDED), self).maximum
        spare = (_text_width(column.cells) - WRAPPED_WIDTH for column in self.columns if not column.no_wrap)
        if whole - sum(max(each, 0) for each in spare) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        names = [str(column.header) for column in self.columns]
        if self.title:
            yield Text(f"{self.title}", "bold")
        cells_of_rows = zip(*(column.cells for column in self.columns), strict=True)
        for (name, *cells), row in zip(cells_of_rows, self.rows, strict=True):
            yield Text(f"\n{names[0]} {name}", style=row.style or "bold")
            lines = Table.grid("", "", padding=(0, 2))
            for header, cell in zip(names[1:], cells, strict=True):
                if str(cell):
                    lines.add_row(header, cell, style=row.style)
            yield Padding(lines, (0, 0, 0, 2))
        if self.caption:
            yield Text(f"\n{self.caption}")
        yield Text("")


def _text_width(cells: Iterable[Any]) -> int:
    return max((cell_len(str(cell)) for cell in cells), default=0)


def plain_table(title: str, *columns: str, wrapped: str | None = None) -> FittingTable:
    """An empty table whose first column is for names and whose others are for numbers.

    A console that is too narrow may wrap the column called `wrapped`.
    """
    table = FittingTable(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=name != wrapped)
    return table


def _cells(runs: Sequence[Run]) -> list[str]:
    """Accuracies, consensus error and megabytes of the runs, as text."""
    return [
        _accuracy(runs, "test_accuracy", with_std=len(runs) > 1),
        _accuracy(runs, "mean_agent_accuracy"),
        _accuracy(runs, "worst_agent_accuracy"),
        f"{statistics.fmean(final_values(runs, 'consensus_error')):.1e}",
        f"{statistics.fmean(final_values(runs, 'mean_bytes_sent')) / MEGABYTE:.1f}",
    ]


def _loss(runs: Sequence[Run]) -> str:
    """Mean and standard deviation of the test loss."""
    mean, std = mean_and_std(final_values(runs, "test_loss"))
    return f"{mean:.3f} ± {std:.3f}" if len(runs) > 1 else f"{mean:.3f}"


def _accuracy(runs: Sequence[Run], metric: str, *, with_std: bool = False) -> str:
    """The mean over the runs in percent, and the standard deviation if asked for."""
    mean, std = mean_and_std([100 * value for value in final_values(runs, metric)])
    return f"{mean:.1f} ± {std:.1f}" if with_std else f"{mean:.1f}"
