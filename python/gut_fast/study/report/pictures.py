"""A study as pictures: all methods and points at a glance, and every point over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gut_fast.study import plots
from gut_fast.study.plots import line_look
from gut_fast.study.report import statistics
from gut_fast.study.report.statistics import ACCURACIES, Difference, Estimate, Metric
from gut_fast.study.report.study import Study
from gut_fast.study.report.tables import points_with
from gut_fast.study.run import Run, samples_per_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "Picture",
    "division",
    "draw_accuracies",
    "draw_agents",
    "draw_curves",
    "draw_differences",
    "draw_samples",
    "load_samples",
]

WIDTH = 12.0
"""In inches, as all sizes."""

LINE_HEIGHT = 0.27
"""Of a method or a comparison."""

HEADING_HEIGHT = 1.2
"""Of a point."""

AGENTS_PER_ROW = 4
"""At most so many panels."""

FADED = 0.35

MAX_BANDS = 5
"""Of curves in a panel; more hide each other."""

DPI = 110
NUM_COLORS = 128
"""Of a picture: sharp at the width of a page, a sixth of the bytes of 150 dpi in full colour."""


@dataclass(frozen=True)
class Picture:
    """A PNG file, what it shows in a line, and the same in words for those who cannot see it."""

    path: Path
    caption: str
    alt: str
    width: int = 100
    """In % of a page."""


def draw_accuracies(study: Study, moment: str, path: Path) -> Picture:
    """For each point, accuracy of the averaged model, the mean agent and the worst agent, a line for each method."""

    def number(method: str, point: str, metric: Metric) -> Estimate:
        return statistics.estimate(study.records(method, point), metric, moment)

    lines = [(study.name(method), index, partial(number, method)) for index, method in enumerate(study.methods)]
    _draw_dots(points_with(study, moment), lines, moment, f"{study.accuracy} in %", path, zero=False)
    best = [_best_of(study, point, moment) for point in points_with(study, moment)]
    return Picture(
        path,
        f"{study.accuracy.capitalize()} {moment}: mean over seeds as a dot, ± one standard deviation as a bar, "
        "each seed as a faint dot. Every panel has a scale of its own.",
        f"Dots with bars of {study.accuracy} {moment} for {len(study.methods)} methods. Averaged model, best method: "
        f"{'; '.join(best)}.",
    )


def draw_differences(study: Study, moment: str, path: Path) -> Picture:
    """For each point, paired differences of the same three accuracies with their confidence intervals."""

    def number(pair: tuple[str, str], point: str, metric: Metric) -> Difference:
        first, second = (study.records(method, point) for method in pair)
        return statistics.paired(first, second, metric, moment)

    lines = [
        (f"{study.name(pair[0])} − {study.name(pair[1])}", study.methods.index(pair[0]), partial(number, pair))
        for pair in study.comparisons
    ]
    points = points_with(study, moment)
    means = [
        f"{name} {number(points[0], ACCURACIES[0]).mean:+.1f}"
        for name, _, number in lines
        if number(points[0], ACCURACIES[0]).numbers
    ]
    place = f" at {points[0]}" if points[0] else ""
    _draw_dots(points, lines, moment, "paired difference in points", path, zero=True)
    return Picture(
        path,
        f"Paired differences {moment}: mean as a dot, 95 % confidence interval as a bar, each seed as a faint dot. "
        "Every panel has a scale of its own.",
        f"Dots with bars of paired differences {moment}. Averaged model{place}, in points: {'; '.join(means)}.",
    )


def draw_curves(study: Study, point: str, path: Path) -> Picture:
    """Of one point: the averaged model over steps and over bytes sent, the mean agent, and the consensus error."""
    groups = _runs(study, point)
    has_bands = len(study.methods) <= MAX_BANDS
    with _small_figure(path, (WIDTH, 8.4)) as figure:
        axes = figure.subplots(2, 2)
        draw = partial(_curves, groups=groups, bands=has_bands)
        draw(axes[0, 0], "test_accuracy", "The averaged model, against steps", study.accuracy)
        draw(
            axes[0, 1], "test_accuracy", "The averaged model, against bytes", study.accuracy, against="mean_bytes_sent"
        )
        draw(axes[1, 0], "mean_agent_accuracy", "The mean agent", study.accuracy)
        draw(axes[1, 1], "consensus_error", "Disagreement between agents", "consensus error")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4))
        figure.suptitle(point, fontweight="bold", fontsize=13)
    place = f" at {point}" if point else ""
    return Picture(
        path,
        f"Mean over seeds as a line{'; the band reaches from the lowest to the highest seed' * has_bands}.",
        f"Four panels{place}: {study.accuracy} of the averaged model against steps and against bytes sent, of the mean "
        f"agent against steps, and the consensus error, a line for each of {len(study.methods)} methods.",
    )


def draw_agents(study: Study, point: str, path: Path) -> Picture:
    """Of one point: a panel for each method with the agents' accuracies as bands."""
    from matplotlib.ticker import MaxNLocator

    groups = {label: runs for label, runs in _runs(study, point).items() if runs}
    looks = {label: line_look(index)[0] for index, label in enumerate(_runs(study, point))}
    num_cols = min(len(groups), AGENTS_PER_ROW)
    num_rows = -(-len(groups) // num_cols)
    with _small_figure(path, (WIDTH, 0.8 + 2.8 * num_rows)) as figure:
        panels = figure.subplots(num_rows, num_cols, squeeze=False, sharex=True, sharey=True)
        for axes, (label, runs) in zip(panels.flat, groups.items(), strict=False):
            _plot_agents(axes, runs, looks[label])
            axes.set(title=label)
        for axes in panels.flat[len(groups) :]:
            axes.set_axis_off()
        for axes in panels[:, 0]:
            axes.set(ylabel=study.accuracy)
        first = panels[0, 0]
        first.yaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
        first.yaxis.set_major_formatter("{x:.0f} %")
        for axes in panels.flat[: len(groups)]:
            axes.tick_params(labelbottom=True)
            axes.set(xlabel="step")
        lines, labels = first.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(point, fontweight="bold", fontsize=13)
    place = f" at {point}" if point else ""
    return Picture(
        path,
        "Accuracy of single agents, mean over seeds: from worst to best (light), quartiles (dark), median (line).",
        f"A panel for each method{place} with bands of the agents' {study.accuracy} against steps. At the end, "
        f"worst agent: {'; '.join(f'{label} {_worst(runs):.1f} %' for label, runs in groups.items())}.",
    )


def division(study: Study, point: str) -> tuple[str, ...]:
    """What decides who holds what at a point: where it is the same, `load_samples` is."""
    experiment = _first_run(study, point).experiment
    names = ("data", "validation", "topology", "partition", "partition_options", "seed")
    return tuple(str(getattr(experiment, name)) for name in names)


def load_samples(study: Study, point: str) -> Tensor:
    """Samples of each agent and class in the first run at a point. Raises as `samples_per_class`."""
    return samples_per_class(_first_run(study, point).experiment)


def draw_samples(study: Study, point: str, samples: Tensor, path: Path) -> Picture:
    """Of one point: who holds what, from `load_samples`."""
    num_agents, num_classes = samples.shape
    seed = _first_run(study, point).experiment.seed
    width = min(2 + 0.5 * num_classes, WIDTH)
    with _small_figure(path, (width, min(1.4 + 0.24 * num_agents, WIDTH))) as figure:
        title = f"Training samples of each agent (seed {seed})"
        plots.plot_class_histogram(figure.subplots(), samples, title)
        figure.suptitle(point, fontweight="bold", fontsize=13)
    held = (samples > 0).sum(1)
    return Picture(
        path,
        f"How many training samples of each class every agent holds, seed {seed}.",
        f"Map of {num_agents} agents by {num_classes} classes. An agent holds samples of {int(held.min())} to "
        f"{int(held.max())} classes, and {int(samples.sum(1).min())} to {int(samples.sum(1).max())} samples.",
        round(100 * width / WIDTH),
    )


@contextmanager
def _small_figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """As `plots.new_figure`, in few colours."""
    from PIL import Image

    with plots.new_figure(path, size, DPI) as figure:
        yield figure
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _draw_dots(
    points: Sequence[str], lines: Sequence[tuple[str, int, Any]], moment: str, name: str, path: Path, *, zero: bool
) -> None:
    """A row of panels for each point, one for each accuracy; `lines` are label, colour and what gives the number."""
    height = HEADING_HEIGHT + LINE_HEIGHT * len(lines)
    with _small_figure(path, (WIDTH, height * len(points))) as figure:
        strips: Any = figure.subfigures(len(points), 1, squeeze=False)
        for point, strip in zip(points, strips[:, 0], strict=True):
            panels = strip.subplots(1, len(ACCURACIES), sharey=True)
            strip.suptitle(", ".join(filter(None, (point, moment))), fontweight="bold", fontsize=12)
            for axes, metric in zip(panels, ACCURACIES, strict=True):
                numbers = [number(point, metric) for _, _, number in lines]
                axes.set_xlim(_limits(numbers, zero=zero))
                _plot_dots(axes, list(zip((color for _, color, _ in lines), numbers, strict=True)), zero=zero)
                axes.set(title=metric.name, xlabel=name)
            panels[0].set_yticks(range(len(lines)), [label for label, _, _ in lines])
            panels[0].set_ylim(len(lines) - 0.4, -0.6)


def _plot_dots(axes: Axes, numbers: Sequence[tuple[int, Estimate]], *, zero: bool) -> None:
    low, high = axes.get_xlim()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    if zero:
        axes.axvline(0, color="#888888", linewidth=1)
    for line, (color_index, number) in enumerate(numbers):
        color = line_look(color_index)[0]
        marker = "o" if color_index < len(plots.COLORS) else "s"
        if not number.numbers:
            text = "diverged" if number.num_without else "no run"
            axes.text(0.02, line, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#666666")
            continue
        if not low <= number.mean <= high:
            _name_at_edge(axes, line, number.mean, color, left=number.mean < low)
            continue
        axes.plot(number.numbers, [line] * len(number.numbers), marker, color=color, alpha=FADED, markersize=3.5)
        axes.plot(_bar(number), [line, line], color=color, linewidth=1.8)
        axes.plot([number.mean], [line], marker, color=color, markersize=7)


def _bar(number: Estimate) -> tuple[float, float]:
    if isinstance(number, Difference):
        return number.interval or (number.mean, number.mean)
    spread = 0.0 if math.isnan(number.std) else number.std
    return number.mean - spread, number.mean + spread


def _name_at_edge(axes: Axes, line: int, mean: float, color: str, *, left: bool) -> None:
    """The number of a method that lies outside of the panel."""
    axes.text(
        0.01 if left else 0.99,
        line,
        f"◂ {mean:.1f}" if left else f"{mean:.1f} ▸",
        transform=axes.get_yaxis_transform(),
        ha="left" if left else "right",
        va="center",
        fontsize=8.5,
        color=color,
    )


def _limits(numbers: Sequence[Estimate], *, zero: bool) -> tuple[float, float]:
    """Ends of an axis that shows all but what lies far away, as the accuracy of methods that diverged does."""
    means = np.array([number.mean for number in numbers if number.numbers] or [0.0])
    middle, quartiles = np.median(means), np.quantile(means, [0.25, 0.75])
    reach = 4 * max(float(quartiles[1] - quartiles[0]), 1.0) + 4
    near = [number for number in numbers if number.numbers and abs(number.mean - middle) <= reach]
    ends = [end for number in near for end in (*_bar(number), *number.numbers)] + [0.0] * zero
    low, high = max(min(ends, default=0.0), middle - 2 * reach), min(max(ends, default=1.0), middle + 2 * reach)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _curves(axes: Axes, metric: str, title: str, name: str, *, groups: Any, bands: bool, against: str = "step") -> None:
    plots.plot_curves(axes, groups, metric, title, name, against=against, bands=bands)
    if metric.endswith("accuracy"):
        axes.set_ylim(top=min(100.5, axes.dataLim.y1 + 2))


def _plot_agents(axes: Axes, runs: Sequence[Run], color: str) -> None:
    """Bands from worst to best and between the quartiles; of histories without quartiles, from worst to mean."""
    steps = [row["step"] for row in runs[0].history]

    def over_steps(key: str) -> Any:
        rows = [[row.get(key, math.nan) for row in run.history] for run in runs]
        return 100 * np.array(rows, dtype=float).mean(axis=0)

    worst, mean, best = (over_steps(f"{agent}_agent_accuracy") for agent in ("worst", "mean", "best"))
    lower, median, upper = (
        over_steps(f"{name}_agent_accuracy") for name in ("lower_quartile", "median", "upper_quartile")
    )
    has_quartiles = not np.isnan(best).all()
    axes.fill_between(
        steps,
        worst,
        best if has_quartiles else mean,
        color=color,
        alpha=0.15,
        linewidth=0,
        label="worst to best agent" if has_quartiles else "worst to mean agent",
    )
    if has_quartiles:
        axes.fill_between(steps, lower, upper, color=color, alpha=0.35, linewidth=0, label="quartiles")
        axes.plot(steps, median, color=color, linewidth=1.6, label="median agent")
    else:
        axes.plot(steps, mean, color=color, linewidth=1.6, label="mean agent")
    axes.plot(steps, over_steps("test_accuracy"), color="#222222", linewidth=1, linestyle=":", label="averaged model")
    axes.margins(x=0)


def _runs(study: Study, point: str) -> dict[str, list[Run]]:
    """The runs at a point by the name of their method, every method among them."""
    return {
        study.name(method): [record.run for record in study.records(method, point).values()] for method in study.methods
    }


def _first_run(study: Study, point: str) -> Run:
    return next(run for runs in _runs(study, point).values() for run in runs)


def _worst(runs: Sequence[Run]) -> float:
    return 100 * float(np.mean([run.final.get("worst_agent_accuracy", math.nan) for run in runs]))


def _best_of(study: Study, point: str, moment: str) -> str:
    means: Mapping[str, float] = {
        study.name(method): number.mean
        for method in study.methods
        if (number := statistics.estimate(study.records(method, point), ACCURACIES[0], moment)).numbers
    }
    place = f"{point}: " if point else ""
    best = max(means, key=means.__getitem__, default=None)
    return f"{place}none" if best is None else f"{place}{best} with {means[best]:.1f}"
