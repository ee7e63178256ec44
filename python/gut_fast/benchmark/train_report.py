"""Results of training as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gut_fast.benchmark.train_run import GOALS, GPU_GOAL_OF_ONE_MODEL, GPU_GOALS, TrainingResult
from gut_fast.study.plots import COLORS, new_figure
from gut_fast.study.summary import plain_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["describe", "draw_training_speed", "goal_lines", "lines", "summary_rows", "table"]

COLUMNS = ("", "samples/s", "gradient", "p10 – p90", "÷ one", "÷ alone", "step")

MAX_PANELS_A_ROW = 3

KINDS = {"simulator": COLORS[1], "plain loop": COLORS[2], "one model": COLORS[0]}
"""Kinds of trainers that a picture shows, with their colours."""


def describe(result: TrainingResult) -> str:
    """What was trained, in a line."""
    return f"{result.model}, {result.agents} agents × {result.batch_size} samples, {result.place}"


def table(result: TrainingResult) -> Table:
    """All trainers, the fastest first, and below them the controls."""
    result_table = plain_table(f"Training {describe(result)}", *COLUMNS)
    trained = sorted(result.trainers, key=result.rate, reverse=True)
    for is_control in (False, True):
        for name in trained:
            if (result.trainers[name].kind == "control") == is_control:
                result_table.add_row(*_cells(result, name))
        result_table.add_section()
    return result_table


def summary_rows(results: Sequence[TrainingResult]) -> list[list[str]]:
    """A heading, and a row of samples per second for each result."""
    rows = [["training, samples/s", "engine", "simulator", "plain loop", "one model", "÷ loop", "time ÷ one model"]]
    for result in results:
        best = result.best
        rates = [f"{result.rate(name):,.0f}" for name in (best, "plain loop", "one model")]
        ratios = result.times_rate(best, "plain loop"), result.times_rate("one model", best)
        rows.append([describe(result), best, *rates, *(f"{ratio:.2f}" for ratio in ratios)])
    return rows


def _cells(result: TrainingResult, name: str) -> list[str]:
    entry = result.trainers[name]
    after_step = result.after_step(name)
    return [
        name,
        f"{result.rate(name):,.0f}",
        _milliseconds(entry.gradient.p50),
        f"{_milliseconds(entry.gradient.p10)} – {_milliseconds(entry.gradient.p90)}",
        f"{result.to_one_model(name):.2f}",
        "" if after_step is None else f"{after_step:.3f}",
        "" if name.endswith("alone") else _milliseconds(entry.step.p50),
    ]


def _milliseconds(seconds: float) -> str:
    """To three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def lines(result: TrainingResult) -> Iterator[str]:
    """What is to be said below the table."""
    errors = [entry.error for entry in result.trainers.values() if entry.error is not None]
    yield f"gradients and steps equal to the plain loop's: error {max(errors):.0e} of the largest entry"
    yield "ms; ÷ one: gradient, to that of one model on all samples; ÷ alone: to the same without steps in between"
    if result.device != "cpu":
        yield "gradient and step: with a synchronisation after each; samples/s: of many training steps without"
    yield from goal_lines(result)
    for reason in result.disturbance.reasons():
        yield f"NOISY RUN: {reason.replace('the ceiling', 'the steadiest trainer')}"


def goal_lines(result: TrainingResult) -> Iterator[str]:
    """How much faster than others the simulator is, and whether it is as fast as it should be."""
    if result.device != "cpu":
        yield from _gpu_goal_lines(result)
    elif "workers" in result.trainers:
        times = result.times_rate("workers", "plain loop")
        yield f"the simulator with workers trains {times:.2f} times as many samples a second as the plain loop"
        if (goal := GOALS.get(result.key)) is not None:
            reached = "reached" if round(result.to_one_model("workers"), 2) <= goal else "NOT reached"
            yield f"goal for workers ÷ one: {goal:.2f}, {reached}"


def _gpu_goal_lines(result: TrainingResult) -> Iterator[str]:
    times, goal = result.times_rate(result.best, "plain loop"), GPU_GOALS.get(result.model)
    one = result.times_rate("one model", result.best)
    reached = "" if goal is None else f"; goal {goal:g}, {_reached(times >= goal)}"
    yield f"{result.best} trains {times:.2f} times as many samples a second as the plain loop{reached}"
    most = GPU_GOAL_OF_ONE_MODEL
    yield f"{result.best} takes {one:.2f} times as long as one model; goal at most {most:g}, {_reached(one <= most)}"


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT reached"


def draw_training_speed(results: Sequence[TrainingResult], path: Path) -> None:
    """Writes a picture: a panel for each result, with a bar of samples per second for each trainer."""
    columns = min(len(results), MAX_PANELS_A_ROW)
    rows = math.ceil(len(results) / columns)
    with new_figure(path, (4.4 * columns, 0.5 + 3.2 * rows)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, result in zip(panels, results, strict=False):
            _plot_rates(axes, result)
        for axes in panels[len(results) :]:
            axes.remove()
        figure.suptitle("Samples of all agents per second of training", fontweight="bold", fontsize=13)


def _plot_rates(axes: Axes, result: TrainingResult) -> None:
    from matplotlib.ticker import MaxNLocator

    names = [name for name, entry in result.trainers.items() if entry.kind in KINDS]
    names.sort(key=result.rate, reverse=True)
    rates = [result.rate(name) for name in names]
    labels = [f"simulator, {name}" if result.trainers[name].kind == "simulator" else name for name in names]
    bars = axes.barh(labels, rates, height=0.62, color=[KINDS[result.trainers[name].kind] for name in names], zorder=2)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(describe(result).replace(", ", "\n", 1), fontsize=9)
