"""Pictures of runs and costs, as matplotlib figures.

matplotlib is imported only when a figure is made, so that this module can be imported without it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gut_fast.arguments import printable
from gut_fast.files import replacing
from gut_fast.requirements import pip_install
from gut_fast.study.experiment import Experiment
from gut_fast.study.looks import Look, looks_of
from gut_fast.study.run import Run
from gut_fast.study.summary import MEGABYTE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "History",
    "check_matplotlib",
    "decays_of",
    "draw_costs",
    "draw_training",
    "new_figure",
    "plot_class_histogram",
    "plot_curves",
    "set_percent_axis",
    "share_scale",
    "shown_label",
]

History = Sequence[Mapping[str, Any]]
"""The rows of one run, one for each evaluation, as in `gut_fast.simulation.Simulator.history`."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}

FAMILIES = {
    "one-peer exponential": Look("#7FCDBB", "v", "-"),
    "ring": Look("#41B6C4", "o", "-"),
    "torus": Look("#1D91C0", "s", "-"),
    "random regular": Look("#225EA8", "D", "-"),
    "exponential": Look("#253494", "^", "-"),
    "complete": Look("#081D58", "p", "-"),
    "all-reduce, ring": Look("#888888", "", ":"),
    "all-reduce, tree": Look("#444444", "", "--"),
}
"""The looks of topologies, darker the more neighbours an agent has, and of all-reduce; no method has them."""

ALLREDUCE = ("all-reduce, ring", "all-reduce, tree")
"""The families that are no topologies."""

MAX_AGENTS_WITH_NUMBERS = 40
"""The number of agents up to which a picture names each."""


def check_matplotlib() -> None:
    """Imports matplotlib, whatever the variable MPLBACKEND says: pictures are drawn to files, without any window.

    A notebook exports its own backend to the processes that it starts, and where these do not have it, matplotlib would
    refuse to be imported.

    Raises:
        ImportError: matplotlib is not installed, or cannot be imported.
    """
    if sys.modules.get("matplotlib") is not None:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}); install it with: {pip_install('matplotlib')}"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # for the rest of a program that draws on windows too
            mpl.rcParams["backend"] = backend


@contextlib.contextmanager
def new_figure(path: str | Path, size: tuple[float, float], dpi: float = 150) -> Iterator[Figure]:
    """A figure of that size in inches to draw on, written to `path` at the end. Raises as `check_matplotlib`."""
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=Path(path).suffix[1:].lower() or "png")


def shown_label(text: str) -> str:
    """A text as matplotlib draws it: it takes what stands between two signs of dollar for mathematics."""
    return printable(text).replace("$", r"\$")


def draw_training(groups: Mapping[str, Sequence[Run]], histogram: Tensor, title: str, path: str | Path) -> None:
    """Writes accuracy and consensus error over the steps, a line for each group of runs, and who holds what.

    Args:
        groups: runs of several seeds by the name of their method.
        histogram: samples of every agent and class, [N, classes], for the seed of the first run.
        title: the heading of the whole picture.
        path: file to write.
    """
    first, num_seeds = next(iter(groups.values()))[0], len(next(iter(groups.values())))
    seeds = (
        f"lines: mean of {num_seeds} seeds, bands: their range" if num_seeds > 1 else f"seed {first.experiment.seed}"
    )
    histories = {label: [run.history for run in runs] for label, runs in groups.items()}
    panels = (
        ("test_accuracy", "Averaged model", "test accuracy"),
        ("worst_agent_accuracy", "Worst agent", "test accuracy"),
        ("consensus_error", "Disagreement", "consensus error"),
    )
    looks = looks_of({label: runs[0].experiment.rule for label, runs in groups.items()})
    with new_figure(path, (6.6, 7.4), 200) as figure:
        axes = figure.subplots(2, 2)
        figure.suptitle(f"{shown_label(title)}\n{seeds}", fontsize=12)
        for panel, (metric, heading, name) in zip(axes.flat, panels, strict=False):
            plot_curves(panel, histories, metric, heading, name, decays=decays_of(first.experiment), looks=looks)
        share_scale(axes[0])
        plot_class_histogram(axes[1, 1], histogram, f"Who holds what (seed {first.experiment.seed})")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4))


def decays_of(experiment: Experiment) -> dict[float, str]:
    """The steps at which the learning rate of an experiment falls, each with a label for a picture."""
    places = (round(place * experiment.steps) if place < 1 else place for place in experiment.milestones)
    return dict.fromkeys(places, f"lr × {experiment.decay:g}")


def plot_curves(
    axes: Axes,
    groups: Mapping[str, Sequence[History]],
    metric: str,
    title: str,
    name: str,
    *,
    against: str = "step",
    bands: bool = True,
    decays: Mapping[float, str] | None = None,
    looks: Mapping[str, Look] | None = None,
) -> None:
    """Draws the mean over seeds of `metric` at every evaluation; a band reaches from the lowest to the highest seed.

    Args:
        axes: the panel to draw on.
        groups: runs of several seeds by the name of their method; a method without runs is left out.
        metric: an entry of the history.
        title: the heading of the panel.
        name: what the metric is called at its axis.
        against: the entry on the other axis, ``step`` or ``mean_bytes_sent``.
        bands: whether there are bands, which hide each other where there are many groups.
        decays: steps to be marked, each with its label.
        looks: colours, markers and lines of the methods; None takes those of their names.
    """
    looks = looks or looks_of(dict.fromkeys(groups, ""))
    is_accuracy, is_step = metric.endswith("accuracy"), against == "step"
    means = []
    for index, (label, runs) in enumerate(groups.items()):
        if not runs:
            continue
        places = [row[against] if is_step else row[against] / MEGABYTE for row in runs[0]]
        values = np.array([[row[metric] for row in history] for history in runs], dtype=float)
        values *= 100 if is_accuracy else 1
        means.append(values.mean(axis=0))
        _plot_line(axes, places, values, looks[label], index, label=shown_label(label), band=bands)
    axes.set(title=title, xlabel="step" if is_step else "MB sent by each agent", ylabel=name)
    axes.margins(x=0)
    if is_accuracy:
        set_percent_axis(axes)
        axes.set_ylim(_floor(means), 100.5)
    elif any((mean > 0).any() for mean in means):
        axes.set_yscale("log")
    for step, label in (decays or {}).items() if is_step else ():
        axes.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(label, (step, 0.02), xytext=(3, 0), fontsize=8, color="#666666", **place)


def _plot_line(axes: Axes, places: list[float], values: Any, look: Look, index: int, *, label: str, band: bool) -> None:
    """Draws the mean over the rows of `values` with a few markers, at other places for another index, and the band."""
    every = max(len(places) // 4, 1)
    options: dict[str, Any] = {"marker": look.marker, "markersize": 5, "markevery": (index % every, every)}
    options |= {"color": look.color, "linestyle": look.line, "linewidth": 1.6, "label": label}
    axes.plot(places, values.mean(axis=0), **options)
    if band:
        axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=look.color, alpha=0.1, linewidth=0)


def share_scale(panels: Iterable[Axes]) -> None:
    """Gives panels that show the same thing one vertical scale, which holds what each of them would show alone."""
    panels = list(panels)
    ends = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def set_percent_axis(axes: Axes) -> None:
    """Gives the vertical axis whole numbers with a sign of percent."""
    axes.locator_params(axis="y", nbins="auto", steps=[1, 2, 5, 10], integer=True)
    axes.yaxis.set_major_formatter("{x:.0f} %")


def _floor(means: Sequence[Any]) -> float:
    """The lower end of an accuracy axis: the first evaluations, far below the rest, may leave the picture."""
    late = np.concatenate([mean[len(mean) // 8 :] for mean in means])
    return max(0.0, float(np.nanmin(late)) - 3) if np.isfinite(late).any() else 0.0


def plot_class_histogram(axes: Axes, histogram: Tensor, title: str) -> None:
    """Draws how many samples of each class every agent holds, as a map of shades with the numbers in it."""
    counts = histogram.numpy()
    num_agents, num_classes = counts.shape
    image = axes.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    axes.grid(visible=False)
    axes.set(title=shown_label(title), xlabel="class", ylabel="agent")
    axes.set_xticks(range(num_classes) if num_classes <= 20 else range(0, num_classes, 10))
    axes.set_yticks(range(num_agents) if num_agents <= MAX_AGENTS_WITH_NUMBERS else range(0, num_agents, 10))
    if num_agents <= MAX_AGENTS_WITH_NUMBERS and num_classes <= 20:
        for (agent, label), count in np.ndenumerate(counts):
            if count:
                color = "white" if count > 0.6 * counts.max() else "#333333"
                axes.text(label, agent, str(count), ha="center", va="center", fontsize=7.5, color=color)
    else:
        axes.figure.colorbar(image, ax=axes, label="samples", pad=0.02)


def draw_costs(costs: pd.DataFrame, path: str | Path) -> None:
    """Writes time and bytes a step, and time to the target, against the number of agents, a line for each family.

    Time to the target is drawn twice: by topology, each with the fastest of its methods, and by method, each on the
    fastest of the topologies. A size at which a target is not reached is left out.

    Args:
        costs: from `gut_fast.study.network.compare`, for several numbers of agents, with methods by their names.
        path: file to write.
    """
    by_method = costs.assign(family=costs["family"].where(costs["family"].isin(ALLREDUCE), costs["method"]))
    panels = (
        (costs[costs["method"] == "DSGD"], "seconds_per_step", "A step, one message"),
        (costs[costs["method"] == "DSGD"], "bytes_per_step", "Sent by an agent a step"),
        (costs, "seconds_to_target", "To target, best method"),
        (by_method, "seconds_to_target", "To target, best topology"),
    )
    with new_figure(path, (6.6, 7.6), 200) as figure:
        axes = figure.subplots(2, 2)
        for panel, (rows, value, title) in zip(axes.flat, panels, strict=True):
            _plot_lowest(panel, rows, value)
            panel.set(title=title, xlabel="agents", ylabel=value.partition("_")[0], xscale="log", yscale="log")
        share_scale(axes[1])
        topologies, methods = axes[0, 0].get_legend_handles_labels(), axes[1, 1].get_legend_handles_labels()
        figure.legend(*topologies, loc="outside upper center", ncols=4, fontsize=9.5)
        figure.legend(*methods, loc="outside lower center", ncols=4, fontsize=9.5)


def _plot_lowest(axes: Axes, costs: pd.DataFrame, value: str) -> None:
    """Draws a line for each family: the lowest value at each number of agents."""
    families = list(dict.fromkeys(costs["family"]))
    looks = {**FAMILIES, **looks_of(dict.fromkeys((name for name in families if name not in FAMILIES), ""))}
    for name, rows in costs.groupby("family", sort=False):
        lowest = rows.groupby("agents")[value].min().replace(np.inf, np.nan).dropna()
        look = looks[str(name)]
        style: dict[str, Any] = {"color": look.color, "linestyle": look.line, "marker": look.marker, "markersize": 5}
        axes.plot(lowest.index, lowest, label=shown_label(str(name)), linewidth=1.6, **style)
