"""Pictures of plans: time and bytes against the number of agents, and accuracy of finished runs against time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gut_fast.study.network.planning import Plan
from gut_fast.study.network.question import METHODS, MeasuredPlan
from gut_fast.study.plots import COLORS, new_figure
from gut_fast.study.report.study import point_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_measured", "draw_sizes"]

ALLREDUCE_STYLES = {"all-reduce, ring": ":", "all-reduce, tree": "--"}

Named = Sequence[tuple[str, Plan]]


def draw_sizes(plans: Iterable[tuple[str, Plan]], title: str, path: str | Path) -> None:
    """Writes time and bytes a step, and time to the target, against the number of agents, a line for each family.

    Time to the target is drawn twice: by topology, each with the fastest of its methods, and by method, each on the
    fastest of the topologies. A size at which a target is not reached is left out.

    Args:
        plans: families of topologies and their plans, as from `gut_fast.study.network.question.sweep_sizes`.
        title: of the picture.
        path: file to write.
    """
    named = list(plans)
    with new_figure(path, (12, 9)) as figure:
        axes = figure.subplots(2, 2)
        figure.suptitle(title, fontweight="bold", fontsize=13)
        steps = [(family, plan) for family, plan in named if plan.method == "dsgd"]
        by_method = [(METHODS[plan.method], plan) for family, plan in named if family not in ALLREDUCE_STYLES] + [
            (family, plan) for family, plan in named if family in ALLREDUCE_STYLES
        ]
        _plot_lowest(axes[0, 0], steps, lambda plan: plan.step_seconds, "A step, one message", "seconds")
        _plot_lowest(axes[0, 1], steps, lambda plan: plan.bytes_per_step, "Sent by an agent in a step", "bytes")
        _plot_lowest(axes[1, 0], named, lambda plan: plan.seconds, "To the target, with the best method", "seconds")
        _plot_lowest(axes[1, 1], by_method, lambda plan: plan.seconds, "To the target, on the best topology", "seconds")
        axes[0, 0].legend(fontsize=8.5)
        axes[1, 1].legend(fontsize=8.5)


def _plot_lowest(axes: Axes, plans: Named, value: Callable[[Plan], float], title: str, unit: str) -> None:
    """A line for each name: the lowest value at each number of agents."""
    names = list(dict.fromkeys(name for name, _ in plans))
    colored = [name for name in names if name not in ALLREDUCE_STYLES]
    for name in names:
        lowest: dict[int, float] = {}
        for _, plan in (entry for entry in plans if entry[0] == name):
            lowest[plan.num_agents] = np.fmin(value(plan), lowest.get(plan.num_agents, np.inf))
        points = {size: lowest[size] for size in sorted(lowest) if np.isfinite(lowest[size])}
        style = (
            {"color": "#888888", "linestyle": ALLREDUCE_STYLES[name]}
            if name in ALLREDUCE_STYLES
            else {"color": COLORS[colored.index(name) % len(COLORS)], "marker": "o", "markersize": 4}
        )
        axes.plot(list(points), list(points.values()), label=name, linewidth=1.8, **style)
    axes.set(title=title, xlabel="agents", ylabel=unit, xscale="log", yscale="log")


def draw_measured(plans: Sequence[MeasuredPlan], metric: str, accuracy: float, path: str | Path) -> None:
    """Writes the accuracy of finished runs, the mean over seeds, against the time they would take on the network.

    Args:
        plans: as from `gut_fast.study.network.question.measure`.
        metric: the accuracy that is drawn.
        accuracy: the target, drawn as a line.
        path: file to write.
    """
    points = {tuple(sorted(map(str, plan.point.items()))) for plan in plans}
    with new_figure(path, (9, 5.5)) as figure:
        axes = figure.subplots()
        for index, plan in enumerate(plans):
            num_rows = min(map(len, plan.histories))
            steps = np.array([row["step"] for row in plan.histories[0][:num_rows]])
            values = np.array([[row[metric] for row in history[:num_rows]] for history in plan.histories])
            place = point_name(plan.point) if len(points) > 1 else ""
            label = f"{plan.method}{f' ({place})' if place else ''}"
            style = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
            seconds = steps * plan.step_seconds
            axes.plot(seconds, 100 * values.mean(axis=0), style, color=COLORS[index % len(COLORS)], label=label)
        axes.axhline(100 * accuracy, color="#888888", linewidth=0.8, linestyle=":")
        axes.set(title="Accuracy against time on the network", xlabel="seconds", ylabel=metric.replace("_", " "))
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.legend(fontsize=8.5)
