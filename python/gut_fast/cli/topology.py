"""The command ``gut-fast topology``: a graph, its spectrum, and which methods are stable on it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gut_fast import analysis, rules
from gut_fast.cli.network import make_question, show_network
from gut_fast.cli.options import check_picture
from gut_fast.cli.terminal import as_bad_argument, console_of_text, facts_grid, writing
from gut_fast.study import plots, summary
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix
from gut_fast.topology.names import TOPOLOGIES, parse_topology

__all__ = ["topology"]

MAX_AGENTS_DENSE_SPECTRUM = 10_000
GAMMA_HELP = "Averaging rate γ in (0, 1]: W becomes I + γ (W − I)."
SPECS = ", ".join(form.example for form in TOPOLOGIES.values())


_network = partial(typer.Option, rich_help_panel="Network: what a step and a target cost")


def topology(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=f"For example {SPECS}.")],
    gamma: Annotated[float, typer.Option(help=GAMMA_HELP)] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate η, for the noise.")] = 0.1,
    curvature: Annotated[float, typer.Option(help="Curvature h of the losses, for noise and limit of η.")] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Draw the graph and its spectrum, or with --network time against agents, into this PNG file."
        ),
    ] = None,
    network: Annotated[
        bool, _network("--network", help="Plan a run on a network instead: time, steps and bytes to a target.")
    ] = False,
    bandwidth: Annotated[str, _network(help="Bandwidth of each agent's link, such as 1Gbit or 100MB/s.")] = "1Gbit",
    latency: Annotated[str, _network(help="Time that a message travels.")] = "1ms",
    compute: Annotated[str, _network(help="Time for a gradient.")] = "50ms",
    model_bytes: Annotated[str, _network(help="Size of one model.")] = "1.1MB",
    overlap: Annotated[float, _network(help="Fraction of the computation that messages can hide behind.")] = 0.0,
    straggler_probability: Annotated[float, _network(help="Probability that an agent is slow in a step.")] = 0.0,
    straggler_factor: Annotated[float, _network(help="How many times slower such an agent is.")] = 1.0,
    link_straggler_probability: Annotated[float, _network(help="Probability that a link is slow in a step.")] = 0.0,
    link_straggler_factor: Annotated[float, _network(help="How many times slower such a link is.")] = 1.0,
    noise: Annotated[float, _network(help="Noise of gradients, in the quadratic model of convergence.")] = 2.0,
    heterogeneity: Annotated[float, _network(help="Difference between the agents' losses in that model.")] = 1.0,
    target: Annotated[float, _network(help="Loss to be reached, as a fraction of that at the start.")] = 0.1,
    sizes: Annotated[str, _network(help="Numbers of agents in the picture of --out.")] = "16,100,1000,10000,100000",
    runs: Annotated[
        Path | None, _network(help="A sweep's folder: what its runs would take on this network, up to --accuracy.")
    ] = None,
    accuracy: Annotated[float, _network(help="Target for --runs, a fraction.")] = 0.8,
) -> None:
    """Show a topology: its spectrum, which methods are stable on it, and what they settle to."""
    with as_bad_argument():
        if out is not None:
            check_picture(out)
        mixing = parse_topology(spec, gamma)
    if network:
        with as_bad_argument():
            question = make_question(
                bandwidth,
                latency,
                compute,
                model_bytes,
                overlap=overlap,
                straggler_probability=straggler_probability,
                straggler_factor=straggler_factor,
                link_straggler_probability=link_straggler_probability,
                link_straggler_factor=link_straggler_factor,
                noise=noise,
                heterogeneity=heterogeneity,
                target=target,
            )
        show_network(mixing, question, sizes=sizes, out=out, runs=runs, accuracy=accuracy)
    else:
        _show_topology(mixing, lr, curvature, out)


def _show_topology(mixing: Topology, lr: float, curvature: float, out: Path | None) -> None:
    """Prints the facts and the tables of a topology, and draws it into `out`."""
    with as_bad_argument():
        _check_spectrum(mixing)
        tables = [_stability_table(mixing), _prediction_table(mixing, lr, curvature)] if mixing.is_static else []
    console = console_of_text()
    console.print(mixing.name, style="bold", soft_wrap=True)
    console.print(facts_grid(_topology_facts(mixing)))
    for table in tables:
        console.print(table, crop=False)
    if out is not None:
        with writing():
            plots.draw_topology(mixing, out)
        console.print(f"wrote {out}", soft_wrap=True)


def _check_spectrum(mixing: Topology) -> None:
    """Raises ValueError if the spectrum would take too long to compute."""
    has_transform = getattr(mixing.cycle[0], "group", None) is not None
    if mixing.is_static and not has_transform and mixing.num_agents > MAX_AGENTS_DENSE_SPECTRUM:
        raise ValueError(
            f"{mixing.name} has {mixing.num_agents:,} agents; the spectrum of such a graph is found in O(N³), "
            f"for at most {MAX_AGENTS_DENSE_SPECTRUM:,} agents"
        )


def _topology_facts(mixing: Topology) -> dict[str, str]:
    """Size, degrees and, of a constant topology, the spectrum."""
    degrees, is_directed = _degrees(mixing)
    facts = {
        "agents": str(mixing.num_agents),
        "edges": f"{sum(degrees) // (1 if is_directed else 2)}{', directed' * is_directed}",
        "degree": f"{degrees[0]}" if degrees[0] == degrees[-1] else f"{degrees[0]} … {degrees[-1]}",
    }
    if not mixing.is_static:
        period = "never repeats" if mixing.period is None else f"repeats after {mixing.period} steps"
        return {**facts, "steps": f"{period}; edges and degrees are those of all steps together, no single spectrum"}
    return {
        **facts,
        "λ₂": f"{mixing.lambda_2:.6f}",
        "λ_min": f"{mixing.lambda_min:.6f}",
        "spectral gap": f"{mixing.spectral_gap:.6f}",
    }


def _degrees(mixing: Topology) -> tuple[list[int], bool]:
    """The number of agents that each agent hears, ascending, and whether some pair talks in one direction only."""
    first = mixing.cycle[0]
    if mixing.is_static and isinstance(first, MixingMatrix):
        return sorted(mixing.csr().row_start.diff().tolist()), first.is_directed
    graph: Any = mixing.graph
    return sorted(
        degree for _, degree in (graph.in_degree if graph.is_directed() else graph.degree)
    ), graph.is_directed()


def _stability_table(mixing: Topology) -> Table:
    """A table of every rule at its defaults, and of the largest stable μ with the other values at theirs."""
    table = summary.plain_table(
        "Stability of every rule at its defaults", "rule", "defaults", "verdict", "per step", "μ up to"
    )
    for name, rule in rules.RULES.items():
        defaults = rule.hyperparameters
        result = analysis.stability(rule, defaults, mixing)
        limit = analysis.stability_limit(rule, mixing, defaults) if "mu" in defaults else None
        values = ", ".join(f"{key} {value:g}" for key, value in defaults.items() if not isinstance(value, bool))
        table.add_row(name, values, result.verdict, f"× {result.consensus_rate:.4f}", _limit(limit))
    summary.keep_whole(table, but="defaults")
    table.caption = (
        "per step: factor of the slowest disagreement between agents\nμ up to: where stability ends, n/a without μ"
    )
    return table


def _prediction_table(mixing: Topology, lr: float, curvature: float) -> Table:
    """A table of every rule with the μ that ``mu="auto"`` chooses: what it settles to, where DSGD settles to 1."""
    title = f'With mu="auto", at lr {lr:g} and curvature {curvature:g}'
    table = summary.plain_table(title, "rule", "auto μ", "per step", "lr up to", "bias", "step", "noise", "spread")
    for name, rule in rules.RULES.items():
        found = _prediction(rule, mixing, lr, curvature)
        settles = found.stability.verdict != "unstable"
        settled = (found.bias_factor, found.step_gain, found.noise.average, found.noise.disagreement)
        table.add_row(
            name,
            _limit(found.auto_mu, digits=3),
            f"{found.stability.consensus_rate:.4f}",
            _limit(found.learning_rate_limit),
            *(f"{value:.2f}" if settles and math.isfinite(value) else "–" for value in settled),
        )
    for column in table.columns:
        column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    table.caption = (
        "lr up to: where stability ends at this curvature\n"
        "where DSGD has 1.00: bias, disagreement at rest; step, of the average;\n"
        "noise of the average and spread of the agents, variances from noisy gradients"
    )
    return table


def _prediction(rule: rules.UpdateRule, mixing: Topology, lr: float, curvature: float) -> analysis.Prediction:
    """The prediction with the μ of ``mu="auto"``, or with the rule's default where it has no μ or none is stable."""
    found = analysis.predict(rule, {**rule.hyperparameters, "lr": lr}, mixing, curvature)
    if found.auto_mu is None or math.isnan(found.auto_mu):
        return found
    return analysis.predict(rule, {**rule.hyperparameters, "lr": lr, "mu": found.auto_mu}, mixing, curvature)


def _limit(limit: float | None, digits: int = 4) -> str:
    """A limit as text: ``n/a`` without μ, ``none`` where no value is stable."""
    if limit is None:
        return "n/a"
    return "none" if math.isnan(limit) else f"{limit:.{digits}f}"
