"""The commands of ``gut-fast``: train, topology, info."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import gut_fast
from gut_fast import analysis, data, models, ops, rules
from gut_fast.backends import AUTOMATIC, BACKENDS, cpu
from gut_fast.experiments import folder as experiment_folder
from gut_fast.experiments import machine, plots, summary
from gut_fast.experiments.runner import Experiment, Run, make_simulator, samples_per_class
from gut_fast.experiments.specs import TOPOLOGIES, parse_topology
from gut_fast.experiments.terminal import as_bad_argument, console_of_text, writing
from gut_fast.simulation import Simulator, write_csv
from gut_fast.simulation.engines import ENGINES
from gut_fast.topology import Topology

__all__ = ["app"]

app = typer.Typer(
    name="gut-fast",
    help="Decentralized training: many agents learn one model by talking to neighbours only.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT = Experiment()
NUM_EVALUATIONS = 20
MAX_SEEDS = 10_000
MAX_AGENTS_DENSE_SPECTRUM = 10_000
GAMMA_HELP = "Averaging rate γ in (0, 1]: W becomes I + γ (W − I)."
SPECS = ", ".join(form.example for form in TOPOLOGIES.values())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gut-fast {gut_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


def _one_of(names: Mapping[str, Any]) -> str:
    return f"One of: {', '.join(names)}."


_task, _method, _computing, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("What is learned, by whom", "Method", "Computing", "Output")
)


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[str, _task("--data", help=_one_of(data.DATASETS))] = DEFAULT.data,
    model: Annotated[str, _task(help=_one_of(models.MODELS))] = DEFAULT.model,
    topology: Annotated[str, _task(help=f"For example {SPECS}.")] = DEFAULT.topology,
    gamma: Annotated[float, _task(help=GAMMA_HELP)] = DEFAULT.gamma,
    partition: Annotated[str, _task(help=_one_of(data.partition.PARTITIONS))] = DEFAULT.partition,
    alpha: Annotated[
        float | None, _task(help="For Dirichlet: small is different data everywhere. Default: 0.1.")
    ] = None,
    classes_per_agent: Annotated[int | None, _task(help="For shards.")] = None,
    augment: Annotated[bool, _task("--augment", help="Crop and mirror training images at random.")] = DEFAULT.augment,
    rule: Annotated[str, _method(help=_one_of(rules.RULES))] = DEFAULT.rule,
    lr: Annotated[float, _method(help="Learning rate.")] = DEFAULT.lr,
    mu: Annotated[float | None, _method(help="Tracking scale μ of the rule.")] = None,
    momentum: Annotated[float | None, _method(help="Momentum β of the rule.")] = None,
    nesterov: Annotated[bool | None, _method("--nesterov/--no-nesterov", help="Nesterov momentum.")] = None,
    settings: Annotated[
        list[str] | None, _method("--set", metavar="NAME=VALUE", help="Any other hyper-parameter; may be repeated.")
    ] = None,
    weight_decay: Annotated[float, _method(help="λ: adds λz to the gradient.")] = DEFAULT.weight_decay,
    batch_size: Annotated[int, _method(help="Samples per agent and step.")] = DEFAULT.batch_size,
    steps: Annotated[int, _method(help="Number of steps.")] = DEFAULT.steps,
    milestones: Annotated[
        str, _method(help="Steps, or fractions of all steps, after which lr drops; empty for none.")
    ] = ",".join(map(str, DEFAULT.milestones)),
    decay: Annotated[float, _method(help="Factor of lr at a milestone.")] = DEFAULT.decay,
    seeds: Annotated[str, _method(help="How many (3 is 0,1,2) or which (7,8 or, a single one, 7,).")] = "1",
    engine: Annotated[str, _computing(help=_one_of(ENGINES))] = DEFAULT.engine,
    backend: Annotated[str, _computing(help=f"auto, {', '.join(BACKENDS)}.")] = DEFAULT.backend,
    state_dtype: Annotated[str | None, _computing(help="Of the state, such as bfloat16. Default: the model's.")] = None,
    device: Annotated[str, _computing(help="For example cpu, cuda or cuda:1.")] = DEFAULT.device,
    autocast: Annotated[str | None, _computing(help="Of forward passes: bfloat16. Default: the model's.")] = None,
    channels_last: Annotated[
        bool, _computing("--channels-last", help="Memory format of images.")
    ] = DEFAULT.channels_last,
    threads: Annotated[int | None, _computing(min=1, help="1 is best for small models. Default: as PyTorch.")] = None,
    eval_every: Annotated[
        int | None, _output(help=f"Steps between evaluations. Default: {NUM_EVALUATIONS} in all.")
    ] = None,
    out: Annotated[Path, _output(help="Folder for histories, checkpoints and picture.")] = Path("outputs/train"),
    resume: Annotated[bool, _output("--resume", help="Go on with the experiment in the folder.")] = False,
) -> None:
    """Train all agents on one machine, for each seed; Ctrl-C stops in a state from which --resume goes on."""
    if threads is not None:
        torch.set_num_threads(threads)
    with as_bad_argument():
        plots.check_matplotlib()
        if reason := machine.wrong_tier():
            raise ValueError(reason)
        experiment_folder.check_writable(out)
        if resume:
            _check_nothing_else_given(context)
            experiments = experiment_folder.read(out)
        else:
            hyperparameters = _hyperparameters(mu, momentum, nesterov, settings or [])
            experiment = Experiment(
                data=dataset,
                model=model,
                topology=topology,
                gamma=gamma,
                rule=rule,
                hyperparameters=hyperparameters,
                lr=lr,
                weight_decay=weight_decay,
                milestones=tuple(_number(part) for part in milestones.split(",") if part.strip()),
                decay=decay,
                partition=partition,
                partition_options=_partition_options(partition, alpha, classes_per_agent),
                batch_size=batch_size,
                steps=steps,
                eval_every=max(steps // NUM_EVALUATIONS, 1) if eval_every is None else eval_every,
                engine=engine,
                backend=backend,
                state_dtype=state_dtype,
                device=device,
                autocast=autocast,
                channels_last=channels_last,
                augment=augment,
            )
            experiments = [replace(experiment, seed=seed) for seed in _seeds(seeds)]
            make_simulator(experiments[0])
            experiment_folder.create(out, experiments)
    _train_all(out, experiments)


def _check_nothing_else_given(context: typer.Context) -> None:
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("out", "resume", "threads")
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise ValueError(f"--resume goes on with the settings in the folder; leave out {', '.join(given)}")


def _hyperparameters(
    mu: float | None, momentum: float | None, nesterov: bool | None, settings: Sequence[str]
) -> dict[str, Any]:
    given: dict[str, Any] = {"mu": mu, "momentum": momentum, "nesterov": nesterov}
    given = {name: value for name, value in given.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected NAME=VALUE, where VALUE is a number, true or false")
        if name in given:
            raise ValueError(f"hyper-parameter {name!r} is given twice")
        given[name] = text == "true" if text in ("true", "false") else _number(text)
    return given


def _partition_options(partition: str, alpha: float | None, classes_per_agent: int | None) -> dict[str, Any]:
    if alpha is None and partition.startswith("dirichlet"):
        alpha = DEFAULT.partition_options["alpha"]
    options = {"alpha": alpha, "classes_per_agent": classes_per_agent}
    return {name: value for name, value in options.items() if value is not None}


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--seeds {text}: expected a count or seeds with commas, such as 5 or 0,1,2")
    numbers = [int(part) for part in parts]
    if (len(numbers) if "," in text else numbers[0]) > MAX_SEEDS or max(numbers) >= 2**63:
        raise ValueError(f"--seeds {text}: expected at most {MAX_SEEDS:,} seeds, each below 2^63")
    seeds = numbers if "," in text else list(range(numbers[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: expected at least one seed, and none twice")
    return seeds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _train_all(out: Path, experiments: Sequence[Experiment]) -> None:
    """Trains seed after seed in the folder, then shows the results."""
    runs = []
    for experiment in experiments:
        with as_bad_argument():
            simulator = experiment_folder.load_simulator(out, experiment)
        typer.echo(
            f"seed {experiment.seed}: {experiment.rule} on {simulator.topology.name}, "
            f"backend {_backend_in_use(simulator)}, from step {simulator.step}"
        )
        try:
            with writing():
                runs.append(experiment_folder.train_in(out, experiment, simulator))
        except KeyboardInterrupt:
            typer.echo(
                f"\nstopped in seed {experiment.seed} after step {simulator.step}; "
                f"go on with: gut-fast train --out {out} --resume"
            )
            raise typer.Exit(130) from None
    _show_results(out, runs)


def _backend_in_use(simulator: Simulator) -> str:
    optimizer: Any = simulator.optimizer
    rule, values = optimizer.rule, simulator.stacked.values
    selected = ops.select_backend(
        optimizer.backend,
        values.device.type,
        values.dtype,
        len(rule.states),
        rule.num_messages,
        optimizer.state_dtype,
    )
    return next(name for name, backend in BACKENDS.items() if backend is selected)


def _show_results(out: Path, runs: Sequence[Run]) -> None:
    experiment = runs[0].experiment
    title = f"{experiment.rule} on {experiment.topology}: {experiment.data}, {experiment.model}"
    table, picture = (out / name for name in experiment_folder.RESULTS)
    with writing():
        write_csv([{"seed": run.experiment.seed, **run.final} for run in runs], table)
        plots.draw_training({experiment.rule: runs}, samples_per_class(experiment), title, picture)
    console = console_of_text()
    console.print(summary.seeds_table(runs, title))
    console.print(f"{summary.LEGEND}\n")
    for run in runs:
        if diverged := max(row["diverged_agents"] for row in run.history):
            console.print(f"seed {run.experiment.seed}: {diverged} agents had a loss of NaN or infinity", style="red")
    console.print(f"histories, checkpoints, summary.csv and curves.png are in {out}", soft_wrap=True)


@app.command()
def topology(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=f"For example {SPECS}.")],
    gamma: Annotated[float, typer.Option(help=GAMMA_HELP)] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Draw the graph and its spectrum into this PNG file.")] = None,
) -> None:
    """Show a topology: its spectrum, and which methods are stable on it."""
    with as_bad_argument():
        if out is not None:
            _check_picture(out)
        mixing = parse_topology(spec, gamma)
        _check_spectrum(mixing)
    console = console_of_text()
    console.print(mixing.name, style="bold", soft_wrap=True)
    console.print(_grid(_topology_facts(mixing)))
    if mixing.is_static:
        console.print(_stability_table(mixing))
    if out is not None:
        with writing():
            plots.draw_topology(mixing, out)
        console.print(f"wrote {out}", soft_wrap=True)


def _check_picture(path: Path) -> None:
    plots.check_matplotlib()
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: expected the name of a PNG file, such as topology.png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: this is a folder, expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--out {path}: no permission to write it")


def _check_spectrum(mixing: Topology) -> None:
    has_transform = getattr(mixing.cycle[0], "group", None) is not None
    if mixing.is_static and not has_transform and mixing.num_agents > MAX_AGENTS_DENSE_SPECTRUM:
        raise ValueError(
            f"{mixing.name} has {mixing.num_agents:,} agents; the spectrum of such a graph is found in O(N³), "
            f"for at most {MAX_AGENTS_DENSE_SPECTRUM:,} agents"
        )


def _topology_facts(mixing: Topology) -> dict[str, str]:
    graph: Any = mixing.graph
    degrees = sorted(degree for _, degree in (graph.in_degree() if graph.is_directed() else graph.degree()))
    facts = {
        "agents": str(mixing.num_agents),
        "edges": f"{graph.number_of_edges()}{', directed' * graph.is_directed()}",
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


def _stability_table(mixing: Topology) -> Table:
    """Every rule at its default hyper-parameters, and up to which μ it is stable with the others at theirs."""
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


def _limit(limit: float | None) -> str:
    if limit is None:
        return "n/a"
    return "none" if math.isnan(limit) else f"{limit:.4f}"


@app.command()
def info() -> None:
    """Show versions, backends and why one is missing, threads and instruction tiers."""
    tiers = machine.instruction_tiers()
    console = console_of_text()
    facts = {
        **machine.versions(),
        "machine": machine.machine_line(),
        "threads": str(torch.get_num_threads()),
        "instruction tier": f"{cpu.tier()} of {', '.join(tiers)} (GUT_FAST_TIER chooses)" if tiers else "none",
        "GPU": machine.gpu_line(),
        **{f"backend {name}": machine.backend_line(name) for name in BACKENDS},
        **{f"auto on {device}": machine.automatic_backend(device) for device in AUTOMATIC},
        **{name: _package_status(name) for name in machine.OPTIONAL_PACKAGES},
    }
    console.print(_grid(facts))


def _package_status(package: str) -> str:
    version = machine.installed_version(package)
    extra = machine.OPTIONAL_PACKAGES[package]
    return version or f'not installed; pip install "gut_fast[{extra}]"'


def _grid(facts: Mapping[str, str]) -> Table:
    grid = Table.grid("", "", padding=(0, 2))
    grid.columns[0].style = "dim"
    for name, value in facts.items():
        grid.add_row(name, value)
    return grid
