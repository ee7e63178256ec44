"""Results as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gut_fast.benchmark.report import COMPARED
from gut_fast.benchmark.results import Result
from gut_fast.benchmark.scaling import AXES, Curve
from gut_fast.study.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_results", "draw_scaling"]

OURS = COLORS[1]
MARKERS = {
    "backend": ("^", COLORS[1]),
    "graph": ("*", COLORS[1]),
    "sgd": ("o", COLORS[0]),
    "compile": ("D", COLORS[2]),
    "eager": ("s", COLORS[3]),
    "scipy": ("v", COLORS[4]),
    "jax": ("P", COLORS[6]),
    "authors": ("X", COLORS[5]),
}
ROW_HEIGHT = 0.3


def draw_results(results: Sequence[Result], path: Path) -> None:
    """Writes a picture: our fraction of the ceiling in every case, and how long everyone takes beside the ceiling.

    Raises:
        ValueError: no result has a ceiling.
    """
    results = [result for result in results if result.ceiling is not None]
    if not results:
        raise ValueError("a picture needs results with the ceiling; leave it among the peers")
    with new_figure(path, (12, 1.9 + ROW_HEIGHT * len(results))) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.35))
        _plot_fractions(left, results)
        _plot_times(right, results)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle("A step of all agents, beside the speed of memory", fontweight="bold", fontsize=13)


def _plot_fractions(axes: Axes, results: Sequence[Result]) -> None:
    """A bar for each result, and its goal as a tick."""
    rows = np.arange(len(results))
    fractions = [result.fraction_of_ceiling() or 0.0 for result in results]
    axes.barh(rows, fractions, height=0.62, color=[_shade(result) for result in results], zorder=2)
    for row, (result, fraction) in enumerate(zip(results, fractions, strict=True)):
        axes.text(0.02, row, f"{fraction:.2f}", va="center", fontsize=8, color="white", fontweight="bold", zorder=4)
        if result.goal is not None:
            axes.plot([result.goal] * 2, [row - 0.4, row + 0.4], color="#222222", linewidth=1.6, zorder=3)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_yticks(rows, [_label(result) for result in results])
    axes.tick_params(axis="y", length=0)
    axes.set(
        title="Fraction of the ceiling (tick: goal)", xlim=(0, max(1.05, *fractions)), xlabel="ceiling's time / ours"
    )
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()


def _plot_times(axes: Axes, results: Sequence[Result]) -> None:
    """Times relative to the ceiling: ours, and the best of every family of peers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = np.arange(len(results))
    axes.axvline(1, color="#888888", linewidth=1, label="ceiling")
    for family, heading in COMPARED.items():
        points = [
            (row, result.times_ours(name) / (result.fraction_of_ceiling() or 1.0))
            for row, result in enumerate(results)
            if (name := result.best(family)) is not None
        ]
        if points:
            marker, color = MARKERS[family]
            places, times = zip(*points, strict=True)
            axes.plot(times, places, linestyle="none", marker=marker, color=color, markersize=6, label=heading)
    ours = [1 / (result.fraction_of_ceiling() or 1.0) for result in results]
    axes.plot(ours, rows, linestyle="none", marker="o", color=OURS, markersize=9, label="gut_fast", zorder=5)
    axes.hlines(rows, 1, ours, color=OURS, linewidth=2, zorder=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g} ×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)
    axes.set(title="Time, the ceiling's = 1 (best of each kind)", xlabel="time / ceiling's time")


def _shade(result: Result) -> str:
    return OURS if result.threads == 1 or result.device != "cpu" else "#A84300"


def _label(result: Result) -> str:
    return f"{result.case}, {result.place}"


TITLES = {"agents": "Agents N", "columns": "Columns D", "degree": "Neighbours of an agent"}


def draw_scaling(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Writes a picture with a panel for each axis: time per number, ours and the ceiling's, and the fraction below."""
    axes_names = [axis for axis in AXES if any(curve.axis == axis and curve.points for curve in curves)]
    if not axes_names:
        raise ValueError("no point has been measured")
    with new_figure(path, (4.4 * len(axes_names), 6.2)) as figure:
        panels = figure.subplots(2, len(axes_names), squeeze=False, sharex="col", sharey="row", height_ratios=(1.6, 1))
        for column, axis in enumerate(axes_names):
            mine = [curve for curve in curves if curve.axis == axis and curve.points]
            _plot_time_per_number(panels[0, column], mine)
            _plot_fraction(panels[1, column], mine)
            panels[0, column].set(title=TITLES[axis])
            panels[1, column].set(xlabel=axis)
        panels[0, 0].set(ylabel="ns per number (dotted: ceiling)")
        panels[1, 0].set(ylabel="fraction of the ceiling")
        figure.suptitle(f"GUT, float32, {title}: time of a step over N · D", fontweight="bold", fontsize=13)


def _plot_time_per_number(axes: Axes, curves: Sequence[Curve]) -> None:
    for color, curve in zip(COLORS[1:], curves, strict=False):
        places = [point.x for point in curve.points]
        ours, ceiling = (
            [1e9 * getattr(point, name) / point.numbers for point in curve.points] for name in ("seconds", "ceiling")
        )
        axes.plot(places, ours, color=color, marker="o", markersize=4, label=curve.label)
        axes.plot(places, ceiling, color=color, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if curves[0].axis == "columns":
        axes.set_xscale("log")
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper left", fontsize=8)


def _plot_fraction(axes: Axes, curves: Sequence[Curve]) -> None:
    for color, curve in zip(COLORS[1:], curves, strict=False):
        places, fractions = zip(*((point.x, point.fraction) for point in curve.points), strict=True)
        axes.plot(places, fractions, color=color, marker="o", markersize=4)
    axes.axhline(1, color="#888888", linewidth=1)
    axes.set_ylim(0, 1.1)
