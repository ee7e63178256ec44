"""``gut-fast train``: one experiment over some seeds, in a folder from which it can go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from gut_fast import data, models, rules
from gut_fast.analysis.choice import AUTO
from gut_fast.cli.launch import launch as launch_ranks
from gut_fast.cli.options import DataFolder, Download, prepare_data
from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing
from gut_fast.cli.topology import GAMMA_HELP, SPECS
from gut_fast.kernels import machine, ops
from gut_fast.kernels.backends import BACKENDS
from gut_fast.simulation import Simulator, write_csv
from gut_fast.simulation.engines import ENGINES
from gut_fast.study import folder as experiment_folder
from gut_fast.study import plots, summary
from gut_fast.study.presets import PRESETS, preset_settings
from gut_fast.study.runner import Experiment, Run, make_simulator, samples_per_class
from gut_fast.study.settings import ENTRIES, MAX_SEEDS, make_experiment

__all__ = ["train"]

DEFAULT = Experiment()
DEFAULT_SETTINGS = {"alpha": DEFAULT.partition_options["alpha"]}
NUM_EVALUATIONS = 20


def _one_of(names: Mapping[str, Any]) -> str:
    return f"One of: {', '.join(names)}."


_task, _method, _computing, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("What is learned, by whom", "Method", "Computing", "Output")
)


def train(
    context: typer.Context,
    preset: Annotated[
        str | None, _task(help=f"Settings of the paper, before all other options. {_one_of(PRESETS)}")
    ] = None,
    dataset: Annotated[str, _task("--data", help=_one_of(data.DATASETS))] = DEFAULT.data,
    pool: Annotated[int, _task(help="Average images over squares of so many pixels a side.")] = DEFAULT.pool,
    model: Annotated[
        str, _task(help=f"{_one_of(models.MODELS)} Widths of an MLP's hidden layers: mlp:128-64.")
    ] = DEFAULT.model,
    norm: Annotated[
        str | None, _task(help=f"Normalisation. {_one_of(models.NORMS)} Default: the network's own.")
    ] = None,
    topology: Annotated[str, _task(help=f"For example {SPECS}.")] = DEFAULT.topology,
    gamma: Annotated[float, _task(help=GAMMA_HELP)] = DEFAULT.gamma,
    partition: Annotated[str, _task(help=_one_of(data.partition.PARTITIONS))] = DEFAULT.partition,
    alpha: Annotated[
        float | None, _task(help="For Dirichlet: small is different data everywhere. Default: 0.1.")
    ] = None,
    classes_per_agent: Annotated[int | None, _task(help="For shards.")] = None,
    augment: Annotated[bool, _task("--augment", help="Crop and mirror training images at random.")] = DEFAULT.augment,
    validation: Annotated[
        float, _task(help="Fraction of the training samples to hold out, and to evaluate on instead of test samples.")
    ] = DEFAULT.validation,
    folder: DataFolder = None,
    download: Download = False,
    rule: Annotated[str, _method(help=_one_of(rules.RULES))] = DEFAULT.rule,
    lr: Annotated[float, _method(help="Learning rate.")] = DEFAULT.lr,
    mu: Annotated[str | None, _method(help="Tracking scale μ of the rule, or auto: what suits the topology.")] = None,
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
    launch: Annotated[
        int | None, _computing(min=1, help="Share the agents out over so many processes on this machine.")
    ] = None,
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
            prepare_data([], folder, download=False)
            experiments = experiment_folder.read(out)
        else:
            experiment = _experiment(_given(context))
            prepare_data([experiment.data], folder, download)
            experiments = [replace(experiment, seed=seed) for seed in _seeds(seeds)]
            _check_can_be_shared_out(make_simulator(experiments[0]), launch)
            experiment_folder.create(out, experiments)
        experiment_folder.check_launch(out, experiments, launch)
    try:
        if launch is None:
            _train_all(out, experiments)
        else:
            with as_bad_argument():
                launch_ranks(launch, threads or max(torch.get_num_threads() // launch, 1), _train_all, out, experiments)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _check_can_be_shared_out(simulator: Simulator, launch: int | None) -> None:
    num_agents = simulator.topology.num_agents
    if launch is not None and num_agents % launch:
        raise ValueError(f"--launch {launch}: {num_agents} agents cannot be shared out evenly over {launch} processes")


def _given(context: typer.Context) -> dict[str, Any]:
    """The values of the options that stand on the command line, by the names of `train`'s arguments."""
    return {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _check_nothing_else_given(context: typer.Context) -> None:
    given = _given(context).keys() - {"out", "resume", "threads", "folder", "launch"}
    if given:
        options = sorted(parameter.opts[0] for parameter in context.command.params if parameter.name in given)
        raise ValueError(f"--resume goes on with the settings in the folder; leave out {', '.join(options)}")


def _experiment(given: dict[str, Any]) -> Experiment:
    """The experiment of these options, on top of their preset or of the defaults."""
    own = {name: value for name, value in given.items() if name in ENTRIES}
    own["hyperparameters"] = _hyperparameters(given)
    own["partition_options"] = {name: given[name] for name in ("alpha", "classes_per_agent") if name in given}
    if "dataset" in given:
        own["data"] = given["dataset"]
    if "milestones" in given:
        own["milestones"] = [_number(part) for part in given["milestones"].split(",") if part.strip()]
    rule = own.get("rule", DEFAULT.rule)
    common = preset_settings(given["preset"], rule) if "preset" in given else DEFAULT_SETTINGS
    if "eval_every" not in own and ("steps" in own or "preset" not in given):
        own["eval_every"] = max(own.get("steps", DEFAULT.steps) // NUM_EVALUATIONS, 1)
    return make_experiment(common, own)


def _hyperparameters(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: options[name] for name in ("mu", "momentum", "nesterov") if name in options}
    if "mu" in given and given["mu"] != AUTO:
        given["mu"] = _number(given["mu"])
    for setting in options.get("settings", ()):
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected NAME=VALUE, where VALUE is a number, true or false")
        if name in given:
            raise ValueError(f"hyper-parameter {name!r} is given twice")
        given[name] = text == "true" if text in ("true", "false") else _number(text)
    return given


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


def _train_all(out: Path, experiments: Sequence[Experiment], process_group: dist.ProcessGroup | None = None) -> None:
    """Trains seed after seed in the folder, then shows the results; of several ranks the first one speaks."""
    runs = []
    is_first = process_group is None or dist.get_rank(process_group) == 0
    say = typer.echo if is_first else _say_nothing
    for experiment in experiments:
        with as_bad_argument():
            simulator = experiment_folder.load_simulator(out, experiment, process_group)
        say(
            f"seed {experiment.seed}: {experiment.rule} on {simulator.topology.name}, "
            f"backend {_backend_in_use(simulator)}, from step {simulator.step}"
        )
        try:
            with writing():
                runs.append(experiment_folder.train_in(out, experiment, simulator, process_group))
        except KeyboardInterrupt:
            launched = "" if process_group is None else f" --launch {process_group.size()}"
            say(
                f"\nstopped in seed {experiment.seed} after step {simulator.step}; "
                f"go on with: gut-fast train --out {out} --resume{launched}"
            )
            raise
    if is_first:
        _show_results(out, runs)


def _say_nothing(text: str) -> None:
    """As the ranks do that are not the first."""


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
        "gossip_step" if optimizer.group is None else "combine",
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
