"""``gut-fast topology --network``: what a step and a target cost on a network, of each topology and method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing
from gut_fast.simulation import write_csv
from gut_fast.study import summary
from gut_fast.study.network import picture as network_plot
from gut_fast.study.network import question as network
from gut_fast.study.network.convergence import Task
from gut_fast.study.network.planning import Network, Plan
from gut_fast.study.network.question import METHODS, MeasuredPlan, Question
from gut_fast.study.records import Record, read_records
from gut_fast.study.report.study import point_name
from gut_fast.study.units import format_bytes, format_seconds, parse_bandwidth, parse_bytes, parse_seconds

__all__ = ["make_question", "parse_sizes", "show_comparison", "show_measured", "show_network", "write_sizes"]

MAX_AGENTS = 100_000


def make_question(
    bandwidth: str,
    latency: str,
    compute: str,
    model_bytes: str,
    *,
    noise: float = 2.0,
    heterogeneity: float = 1.0,
    target: float = 0.1,
    **network_options: float,
) -> Question:
    """The question that the options of the command ask; `network_options` are the other fields of `Network`.

    Raises:
        TypeError, ValueError: a bad quantity; the message names the option.
    """
    if not 0 < target < 1:
        raise ValueError(f"--target must be a fraction of the loss at the start, in (0, 1), got {target}")
    machines = Network(
        _parsed("bandwidth", bandwidth, parse_bandwidth),
        _parsed("latency", latency, parse_seconds),
        _parsed("compute", compute, parse_seconds),
        **network_options,
    )
    task = Task(noise=noise, heterogeneity=heterogeneity)
    return Question(machines, _parsed("model-bytes", model_bytes, parse_bytes), task, target)


def _parsed(option: str, text: str, parse: Callable[[str], float]) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from None


def parse_sizes(text: str) -> list[int]:
    """Numbers of agents with commas between them, ascending. Raises ValueError."""
    parts = [part.strip().replace("_", "") for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and 2 <= int(part) <= MAX_AGENTS for part in parts):
        raise ValueError(f"--sizes {text}: expected numbers of agents from 2 to {MAX_AGENTS:,}, such as 16,256,4096")
    return sorted({int(part) for part in parts})


def show_network(
    num_agents: int,
    question: Question,
    spec: str,
    gamma: float,
    *,
    sizes: str,
    out: Path | None,
    runs: Path | None,
    accuracy: float,
) -> None:
    """Prints the answers for so many agents, draws them for other numbers into `out`, and those of finished `runs`."""
    console = console_of_text()
    with as_bad_argument():
        counts = parse_sizes(sizes)
        records = [] if runs is None else read_records(runs)
        plans = network.compare(num_agents, question, spec, gamma)
    show_comparison(console, plans, question)
    if records:
        with as_bad_argument():
            show_measured(console, records, question, accuracy)
    if out is not None:
        with writing():
            write_sizes(console, counts, question, "Time for a step, and to the target", out)


def show_comparison(console: Console, plans: Sequence[Plan], question: Question) -> None:
    """Prints what a step costs on each topology, then time, steps and bytes to the target by topology and method."""
    console.print(_step_table(plans))
    target = f"{100 * question.target:g} % of the excess loss at the start"
    console.print(_matrix(plans, f"Time to {target}", lambda plan: plan.seconds, format_seconds))
    console.print(_matrix(plans, "Steps to it", lambda plan: plan.steps, _count))
    console.print(_matrix(plans, "Sent to it by each agent", lambda plan: plan.bytes, format_bytes))
    console.print(
        "* the least; – not reached, or not known for the topology. Loss of the mean agent on quadratics with\n"
        f"gradient noise {question.task.noise:g} and heterogeneity {question.task.heterogeneity:g}, each method at the "
        "best learning rate and μ of a grid.\n"
        "All-reduce is SGD in the column DSGD, SGD with momentum in the column QG-DSGDm.",
        soft_wrap=True,
    )
    if not any(plan.topology.startswith("complete") for plan in plans):
        console.print(f"complete is left out beyond {network.MAX_AGENTS_COMPLETE:,} agents: it sends N² messages")


def _step_table(plans: Sequence[Plan]) -> Table:
    two = {plan.topology: plan.step_seconds for plan in plans if plan.method == "gradient_tracking"}
    table = summary.plain_table("A step", "topology", "sent by each agent", "time", "time, two messages")
    for plan in plans:
        if plan.method == "dsgd":
            times = [format_seconds(plan.step_seconds), format_seconds(two.get(plan.topology, float("nan")))]
            table.add_row(plan.topology, format_bytes(plan.bytes_per_step), *times)
    summary.keep_whole(table, but="topology")
    return table


def _matrix(plans: Sequence[Plan], title: str, value: Callable[[Plan], float], show: Callable[[float], str]) -> Table:
    """Topologies down, methods across; the least value is marked."""
    table = summary.plain_table(title, "topology", *METHODS.values())
    least = min((value(plan) for plan in plans if value(plan) >= 0), default=0.0)
    cells = {
        (plan.topology, plan.method): f"{show(value(plan))}{' *' if value(plan) == least else ''}" for plan in plans
    }
    for topology in dict.fromkeys(plan.topology for plan in plans):
        table.add_row(topology, *(cells.get((topology, method), "") for method in METHODS))
    summary.keep_whole(table, but="topology")
    return table


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < float("inf") else "–"


def write_sizes(console: Console, sizes: Sequence[int], question: Question, title: str, picture: Path) -> None:
    """Plans for all sizes, drawn into `picture` and written to a CSV file beside it.

    Raises:
        OSError: a file cannot be written.
    """
    plans: list[tuple[str, Plan]] = []
    for family, plan in network.sweep_sizes(sizes, question):
        if not plans or plans[-1][1].num_agents != plan.num_agents:
            console.print(f"planning for {plan.num_agents:,} agents", style="dim")
        plans.append((family, plan))
    network_plot.draw_sizes(plans, title, picture)
    table = picture.with_suffix(".csv")
    write_csv([_row(family, plan) for family, plan in plans], table)
    console.print(f"wrote {picture} and {table}", soft_wrap=True)


def _row(family: str, plan: Plan) -> dict[str, Any]:
    best = plan.convergence.hyperparameters if plan.convergence else {}
    return {
        "family": family,
        "topology": plan.topology,
        "agents": plan.num_agents,
        "method": plan.method,
        "bytes_per_step": plan.bytes_per_step,
        "seconds_per_step": plan.step_seconds,
        "steps_to_target": plan.steps,
        "bytes_to_target": plan.bytes,
        "seconds_to_target": plan.seconds,
        "lr": best.get("lr", ""),
        "mu": best.get("mu", ""),
    }


def show_measured(
    console: Console, records: Sequence[Record], question: Question, accuracy: float, picture: Path | None = None
) -> None:
    """Prints what finished runs would have cost on the network to an accuracy of the averaged model, and draws it.

    The bytes of a model are those that the runs have counted, not the question's.

    Raises:
        ValueError: as `network.measure`.
        OSError: the picture cannot be written.
    """
    plans = network.measure(records, question.network, accuracy)
    title = f"Finished runs: to {100 * accuracy:g} % test accuracy of the averaged model"
    table = summary.plain_table(title, "method", "point", "reached", "steps", "sent", "a step", "time")
    for plan in sorted(plans, key=lambda plan: plan.seconds):
        table.add_row(*_measured_cells(plan))
    summary.keep_whole(table, but="point")
    console.print(table)
    if picture is not None:
        network_plot.draw_measured(plans, "test_accuracy", accuracy, picture)
        console.print(f"wrote {picture}", soft_wrap=True)


def _measured_cells(plan: MeasuredPlan) -> list[str]:
    point = {"topology": plan.topology, **plan.point}
    return [
        plan.method,
        point_name(point),
        f"{plan.num_reached} of {len(plan.steps)}",
        _count(plan.mean_steps),
        format_bytes(plan.bytes),
        format_seconds(plan.step_seconds),
        format_seconds(plan.seconds),
    ]
