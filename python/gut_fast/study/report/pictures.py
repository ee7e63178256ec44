"""A study as four pictures: accuracies and differences of all methods at all points, and every point over the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from gut_fast.files import replacing
from gut_fast.study import plots
from gut_fast.study.looks import Look, looks_of
from gut_fast.study.plots import History, shown_label
from gut_fast.study.report.study import Measure, Study, interval, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Picture", "draw_accuracies", "draw_agents", "draw_curves", "draw_differences", "small_figure"]

WIDTH = 7.2
"""The width of a picture in inches: its letters are readable on a phone."""

LINE_HEIGHT, HEADING_HEIGHT, CURVES_HEIGHT, AGENTS_HEIGHT = 0.27, 1.2, 5.8, 2.2
"""Inches of a method or comparison, of the rest of a row of dots, and of a row of curves or agents."""

LETTER_WIDTH, TITLE_LETTER_WIDTH, PANEL_WIDTH = 0.083, 0.1, 1.25
"""Inches of a letter of a label or of a title, and of the narrowest panel of dots with what stands between two."""

AGENTS_PER_ROW = 3
"""The largest number of methods side by side."""

MAX_BANDS = 5
"""The largest number of methods whose curves have bands; more hide each other."""

FADED = 0.35
"""The opacity of single seeds."""

DPI, NUM_COLORS = 150, 256
"""A picture is sharp at the width of a page, with a sixth of the bytes of 150 dpi in full colour."""

Line = tuple[str, Look, Callable[[str, str, str], pd.Series]]
"""A label, its look, and its numbers as a function of metric, point and moment."""


@dataclass(frozen=True)
class Picture:
    """A PNG file, what it shows in a line, and the same in words for those who cannot see it."""

    path: Path
    caption: str
    alt: str


def draw_accuracies(study: Study, path: Path) -> Picture:
    """Writes accuracy of the averaged model, the mean agent and the worst agent, a line for each method."""
    looks = _looks(study)
    lines = [(name, looks[name], partial(study.numbers, method)) for name, method in _named(study).items()]
    _draw_dots(study, lines, _around_mean, lambda measure: measure.title(study.accuracy), path, zero=False)
    return Picture(
        path,
        f"{study.accuracy.capitalize()}: mean over seeds as a dot, ± one standard deviation as a bar, each seed as a "
        "faint dot. Panels below each other have one scale, which some bars leave.",
        f"Dots with bars of {study.accuracy} for {len(study.methods)} methods, a row of panels for each point; the "
        "tables have the same numbers.",
    )


def draw_differences(study: Study, path: Path) -> Picture:
    """Writes paired differences of the same three accuracies with their confidence intervals."""
    looks = _looks(study)
    lines = [
        (" − ".join(map(study.name, pair)), looks[study.name(pair[0])], partial(study.differences, pair))
        for pair in study.comparisons
    ]
    _draw_dots(study, lines, interval, lambda measure: f"paired difference in {measure.unit[1]}", path, zero=True)
    return Picture(
        path,
        "Paired differences: mean as a dot, 95 % confidence interval as a bar, each seed as a faint dot. Panels below "
        "each other have one scale, which some bars leave.",
        f"Dots with bars of {len(lines)} paired differences, a row of panels for each point; the tables have the same "
        "numbers.",
    )


def draw_curves(study: Study, path: Path) -> Picture:
    """Writes, for each point, the averaged model over steps and bytes, the mean agent, and the consensus error."""
    has_bands, looks = len(study.methods) <= MAX_BANDS, _looks(study)
    panels = (
        ("test_accuracy", "Averaged model", study.accuracy, "step"),
        ("test_accuracy", "… by bytes", study.accuracy, "mean_bytes_sent"),
        ("mean_agent_accuracy", "Mean agent", study.accuracy, "step"),
        ("consensus_error", "Disagreement", "consensus error", "step"),
    )
    legend: dict[str, Any] = {}
    columns: list[list[Axes]] = [[] for _ in panels]
    with small_figure(path, (WIDTH, 0.6 + CURVES_HEIGHT * len(study.points))) as figure:
        for point, strip in _strips(figure, study.points):
            groups = _histories(study, point)
            decays = plots.decays_of(study.results.experiments[next(iter(_runs_at(study, point)))])
            axes = strip.subplots(2, len(panels) // 2).flat
            for panel, column, (metric, title, name, against) in zip(axes, columns, panels, strict=True):
                options: dict[str, Any] = {"against": against, "bands": has_bands, "decays": decays, "looks": looks}
                column.append(panel)
                plots.plot_curves(panel, groups, metric, title, name, **options)
                if metric.endswith("accuracy"):
                    panel.set_ylim(top=min(100.5, panel.dataLim.y1 + 2))
            legend |= dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        for column in ([*columns[0], *columns[1]], columns[2], columns[3]):
            plots.share_scale(column)
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 3))
    return Picture(
        path,
        f"Mean over seeds as a line{'; the band reaches from the lowest to the highest seed' * has_bands}. Panels of "
        "one accuracy have one scale, and so have those of the consensus error.",
        f"Four panels for each point: {study.accuracy} of the averaged model against steps and against bytes sent, of "
        f"the mean agent against steps, and the consensus error, a line for each of {len(study.methods)} methods.",
    )


def draw_agents(study: Study, path: Path) -> Picture:
    """Writes, for each point, a panel for each method with the agents' accuracies as bands."""
    groups = {point: {name: runs for name, runs in _histories(study, point).items() if runs} for point in study.points}
    looks = _looks(study)
    shared: list[Axes] = []
    num_rows = {point: -(-len(methods) // AGENTS_PER_ROW) for point, methods in groups.items()}
    heights = [0.4 + AGENTS_HEIGHT * rows for rows in num_rows.values()]
    with small_figure(path, (WIDTH, 0.4 + sum(heights))) as figure:
        for point, strip in _strips(figure, study.points, heights):
            size = (num_rows[point], min(len(groups[point]), AGENTS_PER_ROW))
            panels = strip.subplots(*size, squeeze=False, sharex=True, sharey=True)
            for axes, (name, runs) in zip(panels.flat, groups[point].items(), strict=False):
                _plot_agents(axes, runs, looks[name].color)
                axes.set(title=shown_label(name))
                axes.tick_params(labelbottom=True)
            for axes in panels.flat[len(groups[point]) :]:
                axes.set_axis_off()
            plots.set_percent_axis(panels[0, 0])
            shared.append(panels[0, 0])
            strip.supxlabel("step", fontsize=10)
            strip.supylabel(study.accuracy, fontsize=10)
        plots.share_scale(shared)
        lines, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    return Picture(
        path,
        "Accuracy of single agents, mean over seeds: from worst to best (light), quartiles (dark), median (line).",
        f"A panel for each point and method with bands of the agents' {study.accuracy} against steps.",
    )


def _named(study: Study) -> dict[str, str]:
    """The methods by their names in pictures."""
    return {study.name(method): method for method in study.methods}


def _looks(study: Study) -> dict[str, Look]:
    """The looks of the methods by their names in pictures."""
    runs = study.results.runs.groupby("method").groups
    experiments = study.results.experiments
    return looks_of({name: experiments[runs[method][0]].rule for name, method in _named(study).items()})


@contextmanager
def small_figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure as from `plots.new_figure`, written in few colours."""
    with plots.new_figure(path, size, DPI) as figure:
        yield figure
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    with replacing(path) as temporary:
        small.save(temporary, "PNG", optimize=True)


def _strips(figure: Figure, titles: Sequence[str], heights: Sequence[float] | None = None) -> Iterator[tuple[str, Any]]:
    """A strip of the figure for each title, one below the other, with the title over it."""
    strips: Any = figure.subfigures(len(titles), 1, squeeze=False, height_ratios=heights)
    for title, strip in zip(titles, strips[:, 0], strict=True):
        strip.suptitle(shown_label(title), fontweight="bold", fontsize=12)
        yield title, strip


def _rows(study: Study) -> list[tuple[str, str]]:
    """Every moment with each of its points, the end first."""
    return [(point, moment) for moment in study.moments() for point in study.points if moment in study.moments(point)]


def _runs_at(study: Study, point: str) -> list[str]:
    """The names of the runs at a point."""
    return [run for method in study.methods for run in study.runs(method, point).index]


def _histories(study: Study, point: str) -> dict[str, list[History]]:
    """The histories of the runs at a point by the name of their method; every method is there, perhaps without runs."""
    histories = study.results.history
    here = dict(list(histories[histories["run"].isin(_runs_at(study, point))].groupby("run")))
    return {
        study.name(method): [here[run].to_dict("records") for run in study.runs(method, point).index]
        for method in study.methods
    }


def _around_mean(numbers: pd.Series) -> tuple[float, float]:
    """The mean minus and plus one standard deviation, which is 0 for a single number."""
    spread = numbers.std() if numbers.count() > 1 else 0.0
    return mean(numbers) - spread, mean(numbers) + spread


def _draw_dots(
    study: Study,
    lines: Sequence[Line],
    bar: Callable[[pd.Series], tuple[float, float]],
    name: Callable[[Measure], str],
    path: Path,
    *,
    zero: bool,
) -> None:
    """Writes panels for each moment and point, one for each accuracy, as many in a row as fit beside the labels.

    `zero` draws a line at 0.
    """
    rows = {", ".join(filter(None, row)): row for row in _rows(study)}
    limits = {
        metric: _limits([of(metric, *row) for row in rows.values() for _, _, of in lines], bar, zero=zero)
        for metric in study.measures
    }
    units = {name(measure) for measure in study.measures.values()}
    room = WIDTH - LETTER_WIDTH * max((len(shown_label(label)) for label, _, _ in lines), default=0)
    columns = min(max(int(room / PANEL_WIDTH), 1), len(study.measures))
    deep, letters = -(-len(study.measures) // columns), int(room / columns / TITLE_LETTER_WIDTH)
    height = (HEADING_HEIGHT + LINE_HEIGHT * len(lines)) * deep
    with small_figure(path, (WIDTH, height * len(rows))) as figure:
        for title, strip in _strips(figure, list(rows)):
            panels = strip.subplots(deep, columns, sharey=True, squeeze=False)
            for axes in panels.flat[len(study.measures) :]:
                axes.remove()
            for axes, (metric, measure) in zip(panels.flat, study.measures.items(), strict=False):
                numbers = [(look, of(metric, *rows[title])) for _, look, of in lines]
                bars = [np.nan_to_num(bar(one), nan=mean(one)) for _, one in numbers]
                axes.set_xlim(limits[metric])
                _plot_dots(axes, numbers, bars, zero=zero)
                unit = "" if len(units) == 1 else name(measure)
                axes.set(title=fill(measure.name, letters), xlabel=fill(unit, letters))
            panels[0, 0].set_yticks(range(len(lines)), [shown_label(label) for label, _, _ in lines])
            panels[0, 0].set_ylim(len(lines) - 0.4, -0.6)
            strip.supxlabel("".join(units) if len(units) == 1 else "", fontsize=10)


def _limits(
    numbers: Sequence[pd.Series], bar: Callable[[pd.Series], tuple[float, float]], *, zero: bool
) -> tuple[float, float]:
    """The ends of an axis for all but what lies or reaches far away, as accuracies of methods that diverged do."""
    bars = [np.nan_to_num(bar(one), nan=mean(one)) for one in numbers]
    means = np.array([mean(one) for one in numbers if one.count()] or [0.0])
    middle, quartiles = np.median(means), np.quantile(means, [0.25, 0.75])
    reach = 4 * max(float(quartiles[1] - quartiles[0]), 1.0) + 4
    is_near = [
        abs(mean(one) - middle) <= reach and bar[1] - bar[0] <= reach for one, bar in zip(numbers, bars, strict=True)
    ]
    near = [k for k, one in enumerate(numbers) if one.count() and is_near[k]]
    ends = [float(end) for k in near for end in (*bars[k], *numbers[k].dropna())] + [0.0] * zero
    low, high = max(min(ends, default=0.0), middle - 2 * reach), min(max(ends, default=1.0), middle + 2 * reach)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _plot_dots(axes: Axes, numbers: Sequence[tuple[Look, pd.Series]], bars: Sequence[Any], *, zero: bool) -> None:
    """Draws a line of dots for each series: a mean with its bar and the seeds, or a word where there is none."""
    low, high = axes.get_xlim()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if zero:
        axes.axvline(0, color="#888888", linewidth=1)
    for line, ((look, found), bar) in enumerate(zip(numbers, bars, strict=True)):
        color, marker = look.color, look.marker
        style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
        if not found.count():
            axes.text(0.02, line, "diverged" if len(found) else "no run", color="#666666", **style)
        elif mean(found) < low:
            axes.text(0.01, line, f"◂ {mean(found):.1f}", color=color, **style)
        elif mean(found) > high:
            axes.text(0.99, line, f"{mean(found):.1f} ▸", color=color, ha="right", **style)
        else:
            axes.plot(found, [line] * len(found), marker=marker, ls="", color=color, alpha=FADED, markersize=3.5)
            axes.plot(bar, [line, line], color=color, linewidth=1.8)
            axes.plot([mean(found)], [line], marker=marker, color=color, markersize=7)


def _plot_agents(axes: Axes, runs: Sequence[History], color: str) -> None:
    """Draws bands from worst to best and between the quartiles; of histories without quartiles, from worst to mean."""
    steps = [row["step"] for row in runs[0]]

    def over_steps(key: str) -> Any:
        rows = [[row.get(key, np.nan) for row in history] for history in runs]
        return 100 * np.array(rows, dtype=float).mean(axis=0)

    of = {
        name: over_steps(f"{name}_agent_accuracy")
        for name in ("worst", "mean", "best", "lower_quartile", "median", "upper_quartile")
    }
    band: dict[str, Any] = {"color": color, "linewidth": 0}
    upper, middle = ("mean", "mean") if np.isnan(of["best"]).all() else ("best", "median")
    axes.fill_between(steps, of["worst"], of[upper], alpha=0.15, label=f"worst to {upper} agent", **band)
    if upper == "best":
        axes.fill_between(steps, of["lower_quartile"], of["upper_quartile"], alpha=0.35, label="quartiles", **band)
    axes.plot(steps, of[middle], color=color, linewidth=1.6, label=f"{middle} agent")
    axes.plot(steps, over_steps("test_accuracy"), color="#222222", linewidth=1, linestyle=":", label="averaged model")
    axes.margins(x=0)
