"""Pictures of runs, costs and topologies, as matplotlib figures.

matplotlib is imported only when a figure is made, so that this module can be imported without it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
from torch import Tensor

from gut_fast.arguments import printable
from gut_fast.files import replacing
from gut_fast.study.experiment import Experiment
from gut_fast.study.run import Run
from gut_fast.study.summary import MEGABYTE
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "History",
    "check_matplotlib",
    "decays_of",
    "draw_costs",
    "draw_topology",
    "draw_training",
    "line_look",
    "new_figure",
    "plot_class_histogram",
    "plot_curves",
    "plot_graph",
    "plot_spectrum",
    "set_percent_axis",
    "shown_label",
]

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette without its yellow: told apart with every kind of colour vision."""

LINE_STYLES = ("-", "-", "-", "--", "-.", "-", (0, (2, 1)))
"""The style of the first line of each colour."""

LINE_STYLE_OF_MORE = (0, (1, 1))
"""The style of further lines in the same colours."""

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

ALLREDUCE_STYLES = {"all-reduce, ring": ":", "all-reduce, tree": "--"}
"""The line styles of all-reduce among the topologies."""

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
            f'pictures need matplotlib ({error}); install it with: pip install "gut_fast[cli]"'
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
    seeds = f"mean and range of {num_seeds} seeds" if num_seeds > 1 else f"seed {first.experiment.seed}"
    histories = {label: [run.history for run in runs] for label, runs in groups.items()}
    panels = (
        ("test_accuracy", f"The averaged model ({seeds})", "test accuracy"),
        ("worst_agent_accuracy", "The worst agent", "test accuracy"),
        ("consensus_error", "Disagreement between agents", "consensus error"),
    )
    with new_figure(path, (12, 8.4)) as figure:
        axes = figure.subplots(2, 2, width_ratios=(1.15, 1))
        figure.suptitle(shown_label(title), fontweight="bold", fontsize=13)
        for panel, (metric, heading, name) in zip(axes.flat, panels, strict=False):
            plot_curves(panel, histories, metric, heading, name, decays=decays_of(first.experiment))
        plot_class_histogram(axes[1, 1], histogram, f"Training samples of each agent (seed {first.experiment.seed})")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 4))


def line_look(index: int) -> tuple[str, Any]:
    """Colour and style of the line with that number in a picture."""
    style = LINE_STYLES[index] if index < len(LINE_STYLES) else LINE_STYLE_OF_MORE
    return COLORS[index % len(COLORS)], style


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
) -> None:
    """Draws the mean over seeds of `metric` at every evaluation; a band reaches from the lowest to the highest seed.

    Args:
        axes: the panel to draw on.
        groups: runs of several seeds by the name of their method; a method without runs keeps its colour free.
        metric: an entry of the history.
        title: the heading of the panel.
        name: what the metric is called at its axis.
        against: the entry on the other axis, ``step`` or ``mean_bytes_sent``.
        bands: whether there are bands, which hide each other where there are many groups.
        decays: steps to be marked, each with its label.
    """
    is_accuracy, is_step = metric.endswith("accuracy"), against == "step"
    means = []
    for index, (label, runs) in enumerate(groups.items()):
        if not runs:
            continue
        places = [row[against] if is_step else row[against] / MEGABYTE for row in runs[0]]
        values = np.array([[row[metric] for row in history] for history in runs], dtype=float)
        values *= 100 if is_accuracy else 1
        color, style = line_look(index)
        means.append(values.mean(axis=0))
        axes.plot(places, means[-1], color=color, linestyle=style, linewidth=1.8, label=shown_label(label))
        if bands:
            axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=color, alpha=0.1, linewidth=0)
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


def draw_topology(topology: Topology, path: str | Path) -> None:
    """Writes the graph and, of a static topology, the eigenvalues of its mixing matrix."""
    num_panels = 2 if topology.is_static else 1
    with new_figure(path, (6.2 * num_panels, 5.4)) as figure:
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
        plot_graph(axes[0], topology)
        if topology.is_static:
            plot_spectrum(axes[1], topology)


def draw_costs(costs: pd.DataFrame, path: str | Path) -> None:
    """Writes time and bytes a step, and time to the target, against the number of agents, a line for each family.

    Time to the target is drawn twice: by topology, each with the fastest of its methods, and by method, each on the
    fastest of the topologies. A size at which a target is not reached is left out.

    Args:
        costs: from `gut_fast.study.network.compare`, for several numbers of agents, with methods by their names.
        path: file to write.
    """
    by_method = costs.assign(family=costs["family"].where(costs["family"].isin(ALLREDUCE_STYLES), costs["method"]))
    panels = (
        (costs[costs["method"] == "DSGD"], "seconds_per_step", "A step, one message"),
        (costs[costs["method"] == "DSGD"], "bytes_per_step", "Sent by an agent in a step"),
        (costs, "seconds_to_target", "To the target, with the best method"),
        (by_method, "seconds_to_target", "To the target, on the best topology"),
    )
    with new_figure(path, (12, 9)) as figure:
        axes = figure.subplots(2, 2)
        figure.suptitle("Time for a step, and to the target", fontweight="bold", fontsize=13)
        for panel, (rows, value, title) in zip(axes.flat, panels, strict=True):
            _plot_lowest(panel, rows, value)
            panel.set(title=title, xlabel="agents", ylabel=value.partition("_")[0], xscale="log", yscale="log")
        axes[0, 0].legend(fontsize=8.5)
        axes[1, 1].legend(fontsize=8.5)


def _plot_lowest(axes: Axes, costs: pd.DataFrame, value: str) -> None:
    """Draws a line for each family: the lowest value at each number of agents."""
    colors = itertools.cycle(COLORS)
    for name, rows in costs.groupby("family", sort=False):
        lowest = rows.groupby("agents")[value].min().replace(np.inf, np.nan).dropna()
        if name in ALLREDUCE_STYLES:
            style: dict[str, Any] = {"color": "#888888", "linestyle": ALLREDUCE_STYLES[str(name)]}
        else:
            style = {"color": next(colors), "marker": "o", "markersize": 4}
        axes.plot(lowest.index, lowest, label=shown_label(str(name)), linewidth=1.8, **style)


def plot_graph(axes: Axes, topology: Topology, *, numbered: bool | None = None) -> None:
    """Draws agents and the pairs that talk, with arrows where only one of the two listens.

    `numbered` says whether the agents bear their numbers; None is yes if they are few.
    """
    graph = topology.graph
    positions = _positions(topology)
    if numbered is None:
        numbered = topology.num_agents <= MAX_AGENTS_WITH_NUMBERS
    options: dict[str, Any] = {"arrowsize": 9, "connectionstyle": "arc3,rad=0.08"} if graph.is_directed() else {}
    size = 340 if numbered else 30
    nx.draw_networkx_edges(graph, positions, ax=axes, edge_color="#9a9a9a", width=1.1, node_size=size, **options)
    nx.draw_networkx_nodes(graph, positions, ax=axes, node_color="#56B4E9", edgecolors="#0072B2", node_size=size)
    if numbered:
        nx.draw_networkx_labels(graph, positions, ax=axes, font_size=9)
    name = shown_label(topology.name)
    axes.set(title=name if topology.is_static else f"{name}, all steps together")
    places = np.array(list(positions.values()))
    reach = 1.15 * np.abs(places - places.mean(axis=0)).max() or 1.0
    x, y = places.mean(axis=0)
    axes.set(xlim=(x - reach, x + reach), ylim=(y - reach, y + reach))
    axes.set_aspect("equal")
    axes.set_axis_off()


def _positions(topology: Topology) -> dict[int, Any]:
    """The place of each agent: a torus is seen from above; springs pull other graphs, if small, out of a circle."""
    first = topology.cycle[0]
    if isinstance(first, MixingMatrix) and first.group is not None and len(first.group) == 2:
        return _torus_positions(*first.group)
    graph = topology.graph.to_undirected()
    circle: dict[int, Any] = nx.circular_layout(graph)
    if len(graph) > 200 or nx.density(graph) > 0.5:
        return circle
    springs: dict[int, Any] = nx.spring_layout(graph, pos=circle, iterations=300, seed=0)
    return springs


def _torus_positions(rows: int, cols: int) -> dict[int, Any]:
    """Places on a torus: columns go around the centre, rows around the tube.

    A twist puts the lower half of the tube between the columns of the upper one.
    """
    row, col = np.divmod(np.arange(rows * cols), cols)
    around_tube = 2 * np.pi * row / rows
    angle = 2 * np.pi * col / cols + np.pi / (2 * cols) * np.sin(around_tube)
    radius = 1 + 0.55 * np.cos(around_tube)
    return dict(enumerate(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)))


def plot_spectrum(axes: Axes, topology: Topology) -> None:
    """Draws the eigenvalues of W, from the largest to the smallest; in the complex plane where W is not symmetric."""
    eigenvalues = topology.eigenvalues
    gap = f"spectral gap {topology.spectral_gap:.4f}"
    if eigenvalues.is_complex():
        angles = np.linspace(0, 2 * np.pi, 200)
        axes.plot(np.cos(angles), np.sin(angles), color="#888888", linewidth=0.8)
        axes.plot(eigenvalues.real.numpy(), eigenvalues.imag.numpy(), "o", color="#0072B2")
        axes.set(title=f"Eigenvalues of W, {gap}", xlabel="real part", ylabel="imaginary part")
        axes.set_aspect("equal")
        return
    values = eigenvalues.numpy()
    axes.plot(np.arange(1, len(values) + 1), values, "o", color="#0072B2", markersize=5)
    axes.set(title=f"Eigenvalues of W, {gap}", xlabel="number, from the largest", ylabel="eigenvalue λ")
    axes.set_ylim(min(-0.1, values.min()) - 0.1, 1.1)
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.axhline(0, color="#888888", linewidth=0.8)
    if len(values) > 1:
        _label_eigenvalue(axes, 2, topology.lambda_2, "λ₂", above=True)
        _label_eigenvalue(axes, len(values), topology.lambda_min, "$λ_{min}$", above=False)


def _label_eigenvalue(axes: Axes, number: int, value: float, name: str, *, above: bool) -> None:
    """Marks the eigenvalue with that number and writes its name and value beside it."""
    axes.plot([number], [value], "o", color="#D55E00", markersize=7)
    axes.annotate(
        f"{name} = {round(value, 4) + 0.0:.4f}",  # + 0.0: no minus before a zero
        (number, value),
        xytext=(6, 6) if above else (-6, -4),
        textcoords="offset points",
        ha="left" if above else "right",
        va="bottom" if above else "top",
        color="#D55E00",
    )
