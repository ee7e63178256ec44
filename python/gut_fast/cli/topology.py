"""The command ``gut-fast topology``: a graph, its spectrum, and which methods are stable on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from gut_fast import analysis, rules
from gut_fast.cli.network import make_question, show_network
from gut_fast.cli.options import AsJson, check_effects, check_picture
from gut_fast.cli.terminal import as_bad_argument, console_of_text, facts_grid, print_json, writing
from gut_fast.study import graph_pictures, summary
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix
from gut_fast.topology.names import TOPOLOGIES, parse_topology

__all__ = ["topology"]

MAX_AGENTS_DENSE_SPECTRUM = 10_000
GAMMA_HELP = "Averaging rate γ in (0, 1]: W becomes I + γ (W − I)."
SPECS = ", ".join(form.example for form in TOPOLOGIES.values())


PANEL = "Network: what a step and a target cost"
_network = partial(typer.Option, rich_help_panel=PANEL)

NEEDS = (
    ("sizes", "out"),
    ("accuracy", "runs"),
    ("straggler_factor", "straggler_probability"),
    ("straggler_probability", "straggler_factor"),
    ("link_straggler_factor", "link_straggler_probability"),
    ("link_straggler_probability", "link_straggler_factor"),
)
"""Options, each with the one without which it has no effect; all of the panel need --network."""


def topology(
    context: typer.Context,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=f"For example {SPECS}.")],
    gamma: Annotated[float, typer.Option(help=GAMMA_HELP)] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate η, for the noise.")] = 0.1,
    curvature: Annotated[float, typer.Option(help="Curvature h of the losses, for noise and limit of η.")] = 1.0,
    local_steps: Annotated[int, typer.Option(min=1, help="Steps H of a round, at whose end the agents mix.")] = 1,
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
    as_json: AsJson = False,
) -> None:
    """Show a topology: its spectrum, which methods are stable on it, and what they settle to."""
    with as_bad_argument():
        of_network = [each.name for each in context.command.params if getattr(each, "rich_help_panel", "") == PANEL]
        needs = [*((name, "network") for name in of_network), *NEEDS]
        check_effects(context, needs, [("lr", "network"), ("curvature", "network")])
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
                local_steps=local_steps,
            )
        show_network(mixing, question, sizes=sizes, out=out, runs=runs, accuracy=accuracy, as_json=as_json)
    else:
        _show_topology(mixing, _Setting(lr, curvature, local_steps), out, as_json)


class _Setting(NamedTuple):
    """The setting in which rules are compared."""

    lr: float
    curvature: float
    local_steps: int

    @property
    def rounds(self) -> str:
        """The end of a table's title that says how long rounds are, if they are longer than a step."""
        return f", rounds of {self.local_steps} steps" if self.local_steps > 1 else ""


def _show_topology(mixing: Topology, setting: _Setting, out: Path | None, as_json: bool) -> None:
    """Prints the facts and the tables of a topology, or one JSON document, and draws it into `out`."""
    with as_bad_argument():
        _check_spectrum(mixing)
        found = _rules_on(mixing, setting)
    if out is not None:
        with writing():
            graph_pictures.draw_topology(mixing, out)
    if as_json:
        print_json(_document(mixing, setting, found))
        return
    console = console_of_text()
    console.print(mixing.name, style="bold")
    console.print(facts_grid(_topology_facts(mixing)))
    console.print(_stability_table(found, setting))
    console.print(_prediction_table(found, setting))
    if out is not None:
        console.print(f"wrote {out}")


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


@dataclass(frozen=True)
class _RuleOnTopology:
    """A rule on a topology: at its defaults, and with the μ that ``mu="auto"`` chooses."""

    defaults: Mapping[str, Any]
    stability: analysis.Stability
    mu_limit: float | None
    """The largest stable μ with the other values at their defaults; None without μ."""
    kappa_limit: float | None
    """The largest stable κ with the other values at their defaults; None without κ."""
    auto_kappa: float | None
    """What ``kappa="auto"`` chooses with the other values at their defaults; None without κ."""
    auto: analysis.Prediction

    @property
    def settled(self) -> tuple[float, float, float, float]:
        """Bias, step, noise and spread where DSGD has 1; NaN where the rule never settles."""
        auto = self.auto
        if auto.stability.verdict == "unstable":
            return (math.nan,) * 4
        return auto.bias_factor, auto.step_gain, auto.noise.average, auto.noise.disagreement


def _rules_on(mixing: Topology, setting: _Setting) -> dict[str, _RuleOnTopology]:
    """Every rule of the table on a topology."""

    def at_defaults(rule: rules.UpdateRule) -> _RuleOnTopology:
        own, H = {**rule.hyperparameters, "lr": setting.lr}, setting.local_steps
        found = analysis.predict(rule, own, mixing, setting.curvature, local_steps=H)
        auto = found if found.auto_mu is None or math.isnan(found.auto_mu) else None
        return _RuleOnTopology(
            rule.hyperparameters,
            found.stability,
            found.mu_limit,
            found.kappa_limit,
            found.auto_kappa,
            auto or analysis.predict(rule, {**own, "mu": found.auto_mu}, mixing, setting.curvature, local_steps=H),
        )

    return {name: at_defaults(rule) for name, rule in rules.RULES.items()}


def _document(mixing: Topology, setting: _Setting, found: Mapping[str, _RuleOnTopology]) -> dict[str, Any]:
    """The facts and the tables of a topology for a program."""
    degrees, is_directed = _degrees(mixing)
    document: dict[str, Any] = {
        "name": mixing.name,
        "agents": mixing.num_agents,
        "edges": sum(degrees) // (1 if is_directed else 2),
        "directed": is_directed,
        "degree": {"least": degrees[0], "largest": degrees[-1]},
        "period": mixing.period,
        "local_steps": setting.local_steps,
    }
    for name in ("lambda_2", "lambda_min", "spectral_gap") if mixing.is_static else ():
        document[name] = getattr(mixing, name)
    document["rules"] = {
        name: {
            "defaults": dict(each.defaults),
            "verdict": each.stability.verdict,
            "consensus_rate": each.stability.consensus_rate,
            "mu_limit": each.mu_limit,
            "kappa_limit": each.kappa_limit,
            "auto_kappa": each.auto_kappa,
            "with_auto_mu": {
                "mu": each.auto.auto_mu,
                "consensus_rate": each.auto.stability.consensus_rate,
                "learning_rate_limit": each.auto.learning_rate_limit,
                **dict(zip(("bias", "step", "noise", "spread"), each.settled, strict=True)),
            },
        }
        for name, each in found.items()
    }
    return document


def _stability_table(found: Mapping[str, _RuleOnTopology], setting: _Setting) -> Table:
    """A table of every rule at its defaults, and of the largest stable μ and κ with the other values at theirs."""
    columns = ("rule", "defaults", "verdict", "per step", "κ up to", "μ up to")
    title = f"Stability of every rule at its defaults{setting.rounds}"
    table = summary.plain_table(title, *columns, wrapped="defaults")
    for name, each in found.items():
        values = ", ".join(f"{key} {value:g}" for key, value in each.defaults.items() if not isinstance(value, bool))
        rate = f"× {each.stability.consensus_rate:.4f}"
        table.add_row(name, values, each.stability.verdict, rate, _limit(each.kappa_limit), _limit(each.mu_limit))
    table.caption = (
        "per step: factor of the slowest disagreement between agents\n"
        "κ up to, μ up to: where stability ends, n/a without it"
    )
    return table


def _prediction_table(found: Mapping[str, _RuleOnTopology], setting: _Setting) -> Table:
    """A table of every rule with the μ that ``mu="auto"`` chooses: what it settles to, where DSGD settles to 1."""
    title = f'With mu="auto", at lr {setting.lr:g} and curvature {setting.curvature:g}{setting.rounds}'
    table = summary.plain_table(
        title, "rule", "auto κ", "auto μ", "per step", "lr up to", "bias", "step", "noise", "spread"
    )
    for name, each in found.items():
        table.add_row(
            name,
            _limit(each.auto_kappa, digits=3),
            _limit(each.auto.auto_mu, digits=3),
            f"{each.auto.stability.consensus_rate:.4f}",
            _limit(each.auto.learning_rate_limit),
            *(f"{value:.2f}" if math.isfinite(value) else "–" for value in each.settled),
        )
    table.caption = (
        "auto κ: with μ at its default; the others: with auto μ and κ at its default\n"
        "lr up to: where stability ends at this curvature\n"
        "where DSGD has 1.00: bias, disagreement at rest; step, of the average;\n"
        "noise of the average and spread of the agents, variances from noisy gradients"
    )
    return table


def _limit(limit: float | None, digits: int = 4) -> str:
    """A limit as text: ``n/a`` without the hyper-parameter, ``none`` where no value is stable."""
    if limit is None:
        return "n/a"
    return "none" if math.isnan(limit) else f"{limit:.{digits}f}"
