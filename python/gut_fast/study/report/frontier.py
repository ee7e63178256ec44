"""Accuracy against bytes, which is what decides where communication is dear: a line for each family of methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gut_fast.study.looks import Look, looks_of
from gut_fast.study.plots import shown_label
from gut_fast.study.report.pictures import Picture, small_figure
from gut_fast.study.report.study import END, Study, mean
from gut_fast.study.summary import MEGABYTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["bytes_sent", "draw_frontier", "families", "has_frontier"]

PANEL = (5.5, 3.8)
"""Inches of a panel: below each other, so that a phone shows them at full width."""

LEGEND, LEGENDS_PER_ROW = 1.2, 3
"""Inches of the legend's height, and its columns."""

FILLS: dict[str, Any] = {"none": "full", "bfloat16": "left", "int8": "bottom", "int4": "none"}
"""How markers are filled for each width of messages; ``none`` is the width of the parameters."""

WORST_SHOWN = 0.35
"""The part of the panel's methods that may fall below its lower end, where the rest would be a line at the top."""


def families(study: Study) -> dict[str, list[str]]:
    """The methods by what their names begin with, up to the first comma: ``GUT, H = 16, int4`` belongs to ``GUT``."""
    found: dict[str, list[str]] = {}
    for method in study.methods:
        found.setdefault(method.partition(",")[0].strip(), []).append(method)
    return found


def bytes_sent(study: Study, method: str, point: str) -> float:
    """The bytes that an agent of the method has sent at the end of a run at a point, the mean over agents and seeds.

    Where everyone hears everyone a ring all-reduce gives the same mean: two messages less two N-th, of N agents, are
    counted then, and not N − 1.
    """
    per_step = study.numbers(method, "mean_bytes_sent_per_step", point, END)
    total = mean(per_step * study.numbers(method, "step", point, END))
    first = study.runs(method, point).index
    topology = study.results.experiments[first[0]].topology if len(first) else ""
    name, _, size = topology.partition(":")
    return total * 2 / int(size) if name == "complete" and size.isdigit() and int(size) > 2 else total


def has_frontier(study: Study) -> bool:
    """True if some family has methods that send more and methods that send less, so that there is a line to draw."""
    return any(
        len({round(bytes_sent(study, method, point)) for method in methods if len(study.runs(method, point))}) > 1
        for methods in families(study).values()
        for point in study.points
    )


def draw_frontier(study: Study, path: Path) -> Picture:
    """Writes the first measure of the averaged model at the end against the bytes that an agent has sent.

    All panels share their scales.
    """
    metric, measure = next(iter(study.measures.items()))
    rows = len(study.points)
    with small_figure(path, (PANEL[0], PANEL[1] * rows + LEGEND)) as figure:
        panels = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        shown = [_plot_point(axes, study, metric, point) for axes, point in zip(panels, study.points, strict=True)]
        _set_limits(panels[0], np.concatenate(shown), lower_is_better=measure.lower_is_better)
        panels[-1].set_xlabel("MB sent by each agent in the whole run")
        figure.supylabel(measure.title(study.accuracy), fontsize=10)
        figure.legend(handles=list(_legend(study)), loc="outside lower center", ncols=LEGENDS_PER_ROW)
    return Picture(
        path,
        "What the averaged model reaches at the end, against the bytes that an agent has sent in the whole run: mean "
        "over seeds, ± one standard deviation. Where everyone hears everyone, the bytes are those of a ring "
        "all-reduce. A dashed line is a method that sends nothing, because it has all samples. All panels share their "
        "scales; what is far worse is outside.",
        f"A panel for each of {len(study.points)} points: {measure.title(study.accuracy)} against bytes on a "
        f"logarithmic axis, a line for each of {len(families(study))} families; the tables have the numbers.",
    )


def _looks(study: Study) -> dict[str, Look]:
    """The looks of the families by their names."""
    first = {name: study.runs(methods[0], study.points[0]).index for name, methods in families(study).items()}
    experiments = study.results.experiments
    return looks_of({name: experiments[runs[0]].rule if len(runs) else "" for name, runs in first.items()})


def _plot_point(axes: Axes, study: Study, metric: str, point: str) -> Any:
    """Draws all families at a point; returns the means that were drawn."""
    from matplotlib.ticker import LogFormatter

    drawn = []
    looks = _looks(study)
    for name, methods in families(study).items():
        look = looks[name]
        for wire, rows in _by_wire(study, metric, methods, point):
            drawn += list(rows["mean"])
            if (rows["bytes"] == 0).any():
                axes.axhline(rows["mean"].iloc[0], color=look.color, linestyle="--", linewidth=1.2)
                continue
            style: dict[str, Any] = {"color": look.color, "marker": look.marker, "fillstyle": FILLS.get(wire, "full")}
            style |= {"linestyle": look.line, "linewidth": 1.4, "markersize": 6, "capsize": 2}
            axes.errorbar(rows["bytes"] / MEGABYTE, rows["mean"], yerr=rows["std"], **style)
    axes.set(title=shown_label(point), xscale="log")
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 20 instead of 2 × 10¹
    return np.array(drawn)


def _by_wire(study: Study, metric: str, methods: list[str], point: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The family's bytes, means and deviations at a point, for each width of messages, by ascending bytes."""
    rows = []
    for method in methods:
        numbers = study.numbers(method, metric, point, END)
        if numbers.count():
            experiment = study.results.experiments[study.runs(method, point).index[0]]
            spread = float(numbers.std()) if numbers.count() > 1 else 0.0
            rows.append((str(experiment.wire_dtype).lower(), bytes_sent(study, method, point), mean(numbers), spread))
    table = pd.DataFrame(rows, columns=["wire", "bytes", "mean", "std"])
    for wire, group in table.sort_values("bytes").groupby("wire", sort=False):
        yield str(wire), group


def _set_limits(axes: Axes, values: Any, *, lower_is_better: bool) -> None:
    """Ends of the shared axis that show most methods well, the best of them all; the worst may be outside."""
    sign = -1.0 if lower_is_better else 1.0
    best, worst = (sign * values).max(), np.quantile(sign * values, WORST_SHOWN)
    worst = max(worst - 1.5 * (best - worst), (sign * values).min())
    margin = 0.06 * (best - worst) or 0.5
    axes.set_ylim(*sorted((sign * (worst - margin), sign * (best + margin))))


def _legend(study: Study) -> Iterator[Line2D]:
    """The looks of the families, and how the widths are filled if there are several."""
    from matplotlib.lines import Line2D

    for name, look in _looks(study).items():
        style: dict[str, Any] = {"color": look.color, "marker": look.marker, "linestyle": look.line}
        yield Line2D([], [], linewidth=1.8, label=shown_label(name), **style)
    wires = {str(study.results.experiments[run].wire_dtype).lower() for run in study.in_order}
    for wire, fill in FILLS.items():
        if wire in wires and len(wires) > 1:
            label = "parameters' width" if wire == "none" else wire
            yield Line2D([], [], color="#666666", marker="o", fillstyle=fill, linestyle="", label=label)
