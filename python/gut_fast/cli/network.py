"""The option ``--network`` of ``gut-fast topology``: what a step and a target cost for each topology and method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from gut_fast.cli.terminal import as_bad_argument, console_of_text, print_json, writing
from gut_fast.files import write_text
from gut_fast.study import plots, summary
from gut_fast.study.network import COLUMNS, MAX_AGENTS_COMPLETE, METHODS, Network, Question, compare, measured
from gut_fast.study.quadratics import Quadratics
from gut_fast.study.report.words import point_name
from gut_fast.study.results import read_results
from gut_fast.study.units import format_bytes, format_seconds, parse_bandwidth, parse_bytes, parse_seconds
from gut_fast.topology import Topology

__all__ = ["make_question", "measured_table", "parse_sizes", "show_comparison", "show_network", "write_sizes"]

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
    local_steps: int = 1,
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
    size = _parsed("model-bytes", model_bytes, parse_bytes)
    return Question(machines, size, Quadratics(noise, heterogeneity, target), local_steps=local_steps)


def _parsed(option: str, text: str, parse: Callable[[str], float]) -> float:
    """The quantity that the text of an option says; errors name the option."""
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
    topology: Topology,
    question: Question,
    *,
    sizes: str,
    out: Path | None,
    runs: Path | None,
    accuracy: float,
    as_json: bool,
) -> None:
    """Prints the costs for the topology's number of agents and of finished `runs`; draws those of all `sizes`."""
    console = console_of_text(stderr=as_json)
    with as_bad_argument():
        counts = parse_sizes(sizes)
        finished = None if runs is None else measured(read_results(runs), question.network, accuracy)
        costs = compare(topology.num_agents, question, topology)
    if as_json:
        measured_rows = None if finished is None else finished.to_dict("records")
        asked = {"agents": topology.num_agents, "local_steps": question.local_steps}
        print_json({**asked, "costs": costs.to_dict("records"), "runs": measured_rows})
    else:
        show_comparison(console, costs, question)
        if finished is not None:
            console.print(measured_table(finished, accuracy))
    if out is not None:
        with writing():
            write_sizes(console, counts, question, out)


def show_comparison(console: Console, costs: pd.DataFrame, question: Question) -> None:
    """Prints what a step costs on each topology, then time, steps and bytes to the target by topology and method."""
    console.print(_step_table(costs, question.local_steps))
    target = f"{100 * question.problem.target:g} % of the excess loss at the start"
    console.print(_matrix(costs, "seconds_to_target", f"Time to {target}", format_seconds))
    console.print(_matrix(costs, "steps_to_target", "Steps to it", _count))
    console.print(_matrix(costs, "bytes_to_target", "Sent to it by each agent", format_bytes))
    console.print(
        "* the least; – not reached, or not known for the topology. Loss of the mean agent on quadratics with\n"
        f"gradient noise {question.problem.noise:g} and heterogeneity {question.problem.heterogeneity:g}, each method "
        "at the best learning rate and μ of a grid.\n"
        "All-reduce, in every step, is SGD in the column DSGD, SGD with momentum in the column QG-DSGDm.",
    )
    if not costs["topology"].str.startswith("complete").any():
        console.print(f"complete is left out beyond {MAX_AGENTS_COMPLETE:,} agents: it sends N² messages")


def _step_table(costs: pd.DataFrame, local_steps: int) -> Table:
    """Bytes and time of a step on each topology, with one and with two messages."""
    title = "A step" if local_steps == 1 else f"A step, where one in {local_steps} sends messages"
    table = summary.plain_table(
        title, "topology", "sent by each agent", "time", "time, two messages", wrapped="topology"
    )
    one, two = (costs[costs["method"] == rule].set_index("topology") for rule in ("dsgd", "gradient_tracking"))
    twice = two["seconds_per_step"].reindex(one.index)
    for name, sent, seconds, other in zip(
        one.index, one["bytes_per_step"], one["seconds_per_step"], twice, strict=True
    ):
        table.add_row(name, format_bytes(sent), format_seconds(seconds), format_seconds(other))
    return table


def _matrix(costs: pd.DataFrame, value: str, title: str, show: Callable[[float], str]) -> Table:
    """A table with topologies down and methods across; the least value is marked, all-reduce's gaps are empty."""
    table = summary.plain_table(title, "topology", *METHODS.values(), wrapped="topology")
    least = costs[value].min()
    for name, rows in costs.groupby("topology", sort=False):
        cells = {
            method: f"{show(number)}{' *' if number == least < math.inf else ''}"
            for method, number in zip(rows["method"], rows[value], strict=True)
        }
        table.add_row(str(name), *(cells.get(method, "") for method in METHODS))
    return table


def _count(number: float) -> str:
    """A number of steps; a dash for infinity and NaN."""
    return f"{number:,.0f}" if math.isfinite(number) else "–"


def measured_table(finished: pd.DataFrame, accuracy: float) -> Table:
    """The rows of `gut_fast.study.network.measured` for a terminal."""
    title = f"Finished runs: to {100 * accuracy:g} % test accuracy of the averaged model"
    table = summary.plain_table(title, "method", "point", "reached", "steps", "sent", "a step", "time", wrapped="point")
    for row in finished.itertuples():
        table.add_row(
            row.method,
            point_name({"topology": row.topology, **json.loads(row.point)}),
            f"{row.reached} of {row.runs}",
            _count(row.steps),
            format_bytes(row.bytes),
            format_seconds(row.seconds_per_step),
            format_seconds(row.seconds),
        )
    return table


def write_sizes(console: Console, sizes: list[int], question: Question, picture: Path) -> None:
    """The costs at all sizes, drawn into `picture` and written to a CSV file beside it.

    Raises:
        OSError: a file cannot be written.
    """
    frames = []
    for num_agents in sizes:
        console.print(f"planning for {num_agents:,} agents", style="dim")
        frames.append(compare(num_agents, question))
    costs = pd.concat(frames)
    plots.draw_costs(costs.assign(method=costs["method"].map(METHODS)), picture)
    table = picture.with_suffix(".csv")
    ordered = [*COLUMNS[:-2], "bytes_to_target", "seconds_to_target", "lr", "mu"]
    write_text(table, costs.to_csv(columns=ordered, index=False))
    console.print(f"wrote {picture} and {table}")
