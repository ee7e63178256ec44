"""``gut-fast train``: a sweep of one method over some seeds, run after run, in a folder from which it can go on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from gut_fast import data, models, rules
from gut_fast.analysis.choice import AUTO
from gut_fast.arguments import all_known, printable
from gut_fast.cli.options import JSON_HELP, DataFolder, Download, given_options
from gut_fast.cli.sweep import FILE, console_of_runs, execute, missing_runs
from gut_fast.cli.sweep_progress import Display
from gut_fast.cli.terminal import as_bad_argument, console_of_text, print_json, writing
from gut_fast.cli.topology import GAMMA_HELP, SPECS
from gut_fast.files import write_text
from gut_fast.kernels import machine, ops
from gut_fast.kernels.backends import BACKENDS
from gut_fast.simulation.engines import ENGINES
from gut_fast.study import plots, summary
from gut_fast.study.experiment import ENTRIES, Experiment, make_experiment, seeds_of
from gut_fast.study.presets import PRESETS, preset_settings
from gut_fast.study.processes import RankError
from gut_fast.study.processes import launch as launch_ranks
from gut_fast.study.results import read_results
from gut_fast.study.run import Run, make_simulator, samples_per_class
from gut_fast.study.runner import Failure, check_launch, check_writable, run_here, run_missing, unfinished
from gut_fast.study.schedules import SCHEDULES
from gut_fast.study.sweep import Task, make_sweep, read_sweep
from gut_fast.study.yaml_files import write_yaml

__all__ = ["train"]

DEFAULT = Experiment()
NUM_EVALUATIONS = 20
ON_PEER_FAILURE = ("raise", "restart")
MAX_RESTARTS = 3
WRITTEN = ("history.csv", "summary.csv", "curves.png")


def _one_of(names: Mapping[str, Any]) -> str:
    return f"One of: {', '.join(names)}."


_what, _method, _computing, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("What is learned, by whom", "Method", "Computing", "Output")
)


def train(
    context: typer.Context,
    preset: Annotated[
        str | None, _what(help=f"Settings of a known experiment, before all other options. {_one_of(PRESETS)}")
    ] = None,
    dataset: Annotated[str, _what("--data", help=_one_of(data.DATASETS))] = DEFAULT.data,
    pool: Annotated[int, _what(help="Average images over squares of so many pixels a side.")] = DEFAULT.pool,
    model: Annotated[
        str,
        _what(help=f"{_one_of(models.MODELS)} Sizes: mlp:128-64 (hidden layers), transformer:64:2 (width, layers)."),
    ] = DEFAULT.model,
    norm: Annotated[
        str | None, _what(help=f"Normalisation. {_one_of(models.NORMS)} Default: the network's own.")
    ] = None,
    topology: Annotated[str, _what(help=f"For example {SPECS}.")] = DEFAULT.topology,
    gamma: Annotated[float, _what(help=GAMMA_HELP)] = DEFAULT.gamma,
    partition: Annotated[str, _what(help=_one_of(data.partition.PARTITIONS))] = DEFAULT.partition,
    alpha: Annotated[
        float | None, _what(help="For Dirichlet: small is different data everywhere. Default: 0.1.")
    ] = None,
    classes_per_agent: Annotated[int | None, _what(help="For shards.")] = None,
    augment: Annotated[bool, _what("--augment", help="Crop and mirror training images at random.")] = DEFAULT.augment,
    validation: Annotated[
        float,
        _what(help="Fraction of the training samples to hold out, and to evaluate on instead of test samples."),
    ] = DEFAULT.validation,
    folder: DataFolder = None,
    download: Download = False,
    rule: Annotated[str, _method(help=_one_of(rules.RULES))] = DEFAULT.rule,
    lr: Annotated[float, _method(help="Learning rate.")] = DEFAULT.lr,
    mu: Annotated[str | None, _method(help="Tracking scale μ of the rule, or auto: what suits the topology.")] = None,
    kappa: Annotated[
        str | None,
        _method(help="Part κ of the drift that tracking takes up at once, or auto: what suits the topology."),
    ] = None,
    momentum: Annotated[float | None, _method(help="Momentum β of the rule.")] = None,
    nesterov: Annotated[bool | None, _method("--nesterov/--no-nesterov", help="Nesterov momentum.")] = None,
    settings: Annotated[
        list[str] | None, _method("--set", metavar="NAME=VALUE", help="Any hyper-parameter; may be repeated.")
    ] = None,
    weight_decay: Annotated[
        float, _method(help="λ: adds λz to the gradient; with --inner that optimizer's own.")
    ] = DEFAULT.weight_decay,
    inner: Annotated[
        str | None,
        _method(
            help="Optimizer of torch.optim, such as adamw, that makes the local move; --lr is then its own default."
        ),
    ] = None,
    inner_options: Annotated[
        list[str] | None, _method("--inner-set", metavar="NAME=VALUE", help="An option of --inner; may be repeated.")
    ] = None,
    mix_state: Annotated[
        str | None,
        _method(metavar="NAMES", help="State of --inner that is mixed with the models: exp_avg_sq of adamw."),
    ] = DEFAULT.mix_state,
    max_grad_norm: Annotated[float | None, _method(help="Scale each agent's gradient to at most this norm.")] = None,
    batch_size: Annotated[int, _method(help="Samples per agent and step.")] = DEFAULT.batch_size,
    steps: Annotated[int, _method(help="Number of steps.")] = DEFAULT.steps,
    schedule: Annotated[str, _method(help=f"Of the learning rate. {_one_of(SCHEDULES)}")] = DEFAULT.schedule,
    warmup: Annotated[
        float, _method(help="Steps, or a fraction of all steps, in which the learning rate rises to --lr.")
    ] = DEFAULT.warmup,
    milestones: Annotated[
        str, _method(help="Steps, or fractions of all steps, after which lr drops; empty for none.")
    ] = ",".join(map(str, DEFAULT.milestones)),
    decay: Annotated[float, _method(help="Factor of lr at a milestone.")] = DEFAULT.decay,
    seeds: Annotated[str, _method(help="How many (3 is 0,1,2) or which (7,8 or, a single one, 7,).")] = "1",
    engine: Annotated[str, _computing(help=_one_of(ENGINES))] = DEFAULT.engine,
    backend: Annotated[str, _computing(help=f"auto, {', '.join(BACKENDS)}.")] = DEFAULT.backend,
    state_dtype: Annotated[str | None, _computing(help="Of the state, such as bfloat16. Default: the model's.")] = None,
    local_steps: Annotated[
        int, _method(min=1, help="Steps in a round; the last one mixes, nothing is sent before.")
    ] = DEFAULT.local_steps,
    wire_dtype: Annotated[
        str | None, _method(help="Of messages: int8, int4, bfloat16. Default: the model's.")
    ] = DEFAULT.wire_dtype,
    wire_seed: Annotated[
        int | None, _method(help="Round int8 and int4 at random by this seed. Default: to the nearest.")
    ] = DEFAULT.wire_seed,
    device: Annotated[str, _computing(help="For example cpu, cuda or cuda:1.")] = DEFAULT.device,
    autocast: Annotated[str | None, _computing(help="Of forward passes: bfloat16. Default: the model's.")] = None,
    channels_last: Annotated[
        bool, _computing("--channels-last", help="Memory format of images.")
    ] = DEFAULT.channels_last,
    threads: Annotated[int | None, _computing(min=1, help="1 is best for small models. Default: as PyTorch.")] = None,
    launch: Annotated[
        int | None, _computing(min=1, help="Share the agents out over so many processes on this machine.")
    ] = None,
    on_peer_failure: Annotated[
        str, _computing(help=f"With --launch, when a process dies: {', '.join(ON_PEER_FAILURE)} from the checkpoint.")
    ] = ON_PEER_FAILURE[0],
    eval_every: Annotated[
        int | None, _output(help=f"Steps between evaluations. Default: {NUM_EVALUATIONS} in all.")
    ] = None,
    out: Annotated[Path, _output(help="Folder for histories, checkpoints and picture.")] = Path("outputs/train"),
    resume: Annotated[bool, _output("--resume", help="Go on with the experiment in the folder.")] = False,
    as_json: Annotated[bool, _output("--json", help=JSON_HELP)] = False,
) -> None:
    """Train all agents on one machine, for each seed; Ctrl-C stops in a state from which --resume goes on."""
    if threads is not None:
        torch.set_num_threads(threads)
    with as_bad_argument():
        plots.check_matplotlib()
        if reason := machine.wrong_tier():
            raise ValueError(reason)
        check_writable(out, WRITTEN)
        if resume:
            _check_nothing_else_given(context)
            content, tasks = None, _tasks_in(out)
        else:
            if (out / FILE).exists() or any(out.glob("seed-*/config.json")):
                raise FileExistsError(
                    f"{out} holds an experiment already; continue it with --resume, or name another --out"
                )
            content = _content(_experiment(given_options(context)), _seeds(seeds))
            tasks = make_sweep(content).tasks()
        missing = missing_runs(tasks, out, folder, download)
        check_launch(missing, out, launch)
        _check_on_peer_failure(on_peer_failure, launch)
        about = _what_is_trained(tasks[0].experiment, launch)
    if not as_json:
        typer.echo(printable(about))

    def run() -> list[Failure]:
        if content is not None:
            write_yaml(content, out / FILE)
        num_restarts = MAX_RESTARTS if on_peer_failure == "restart" else 0
        start = partial(_run, len(tasks), out, launch, threads, num_restarts)
        return run_missing(tasks, out, start, keep_checkpoints=True)

    launched = "" if launch is None else f" --launch {launch}"
    execute(run, out, console_of_runs(), f"gut-fast train --out {out} --resume{launched}")
    _show_results(out, tasks, as_json)


def _run(
    total: int, out: Path, launch: int | None, threads: int | None, num_restarts: int, missing: Sequence[Task]
) -> list[Failure]:
    """Runs what is missing of all tasks in this process, or on `launch` ranks, which may die so many times."""
    if launch is None or not missing:
        return _run_here(total, out, missing)
    for restart in range(num_restarts + 1):
        try:
            left = unfinished(missing, out)
            launch_ranks(launch, threads or max(torch.get_num_threads() // launch, 1), _run_here, total, out, left)
        except RankError as error:
            if restart == num_restarts:
                raise
            warnings.warn(f"{error}; restart {restart + 1} of at most {num_restarts}", stacklevel=2)
        else:
            break
    return []


def _check_on_peer_failure(on_peer_failure: str, launch: int | None) -> None:
    """Raises ValueError for an unknown way to deal with a process that dies, or without processes that could."""
    if on_peer_failure == "continue":
        raise ValueError(
            "on_peer_failure=continue is for training loops of your own: the numbers of a run are those of all agents, "
            "which are gone with their process; use restart"
        )
    if on_peer_failure not in ON_PEER_FAILURE:
        raise ValueError(f"on_peer_failure={on_peer_failure} is unknown; {all_known(on_peer_failure, ON_PEER_FAILURE)}")
    if on_peer_failure == "restart" and launch is None:
        raise ValueError("on_peer_failure=restart needs --launch, the processes that may die")


def _run_here(
    total: int, out: Path, missing: Sequence[Task], process_group: dist.ProcessGroup | None = None
) -> list[Failure]:
    with Display(console_of_runs(), total, total - len(missing)) as display:
        return run_here(missing, out, display, process_group)


def _tasks_in(out: Path) -> list[Task]:
    """The tasks of the folder's file.

    Raises:
        FileNotFoundError: there is none.
        OSError, TypeError, ValueError: it cannot be read, or is of more than one method.
    """
    if not (out / FILE).exists():
        if any(out.glob("seed-*/config.json")):
            raise FileNotFoundError(
                f"{out} is of an earlier version of gut_fast, which kept seed-*/config.json, and cannot be continued; "
                "finish it with that version, or train anew with another --out"
            )
        raise FileNotFoundError(f"{out} holds no experiment: there is no {out / FILE}")
    tasks = read_sweep(out / FILE).tasks()
    if len({(task.method, repr(task.point)) for task in tasks}) > 1:
        raise ValueError(
            f"{out / FILE} is of several methods or points; go on with: gut-fast sweep {out / FILE} --out {out}"
        )
    return tasks


def _what_is_trained(experiment: Experiment, launch: int | None) -> str:
    """Rule, topology and backend in a line. Raises ValueError if so many ranks cannot share the agents evenly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simulator = make_simulator(experiment)
    num_agents = simulator.topology.num_agents
    if launch is not None and num_agents % launch:
        raise ValueError(f"--launch {launch}: {num_agents} agents cannot be shared out evenly over {launch} processes")
    optimizer: Any = simulator.optimizer
    values, rule = simulator.stacked.values, optimizer.rule
    selected = ops.select_backend(
        optimizer.backend,
        values.device.type,
        values.dtype,
        len(rule.states),
        rule.num_messages,
        optimizer.state_dtype,
        "gossip_step" if launch is None else "combine",
    )
    backend = next(name for name, backend in BACKENDS.items() if backend is selected)
    return f"{experiment.rule} on {simulator.topology.name}, backend {backend}"


def _check_nothing_else_given(context: typer.Context) -> None:
    given = given_options(context).keys() - {
        "out",
        "resume",
        "threads",
        "folder",
        "launch",
        "on_peer_failure",
        "as_json",
    }
    if given:
        options = sorted(parameter.opts[0] for parameter in context.command.params if parameter.name in given)
        raise ValueError(f"--resume goes on with the settings in the folder; leave out {', '.join(options)}")


def _experiment(given: dict[str, Any]) -> Experiment:
    """The experiment of these options, on top of their preset or of the defaults."""
    own = {name: value for name, value in given.items() if name in ENTRIES}
    own["hyperparameters"] = _hyperparameters(given)
    own |= {name: given[name] for name in ("alpha", "classes_per_agent") if name in given}
    if "dataset" in given:
        own["data"] = given["dataset"]
    if "milestones" in given:
        own["milestones"] = [_number(part) for part in given["milestones"].split(",") if part.strip()]
    own["inner_options"] = _named_values("--inner-set", given.get("inner_options", ()))
    rule = own.get("rule", DEFAULT.rule)
    common = preset_settings(given["preset"], rule) if "preset" in given else {}
    if "eval_every" not in own and ("steps" in own or "preset" not in given):
        own["eval_every"] = max(own.get("steps", DEFAULT.steps) // NUM_EVALUATIONS, 1)
    return make_experiment(common, own)


def _hyperparameters(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: options[name] for name in ("mu", "kappa", "momentum", "nesterov") if name in options}
    given |= {name: _value(given[name], {AUTO: AUTO}) for name in ("mu", "kappa") if name in given}
    more = _named_values("--set", options.get("settings", ()), {AUTO: AUTO})
    if both := given.keys() & more.keys():
        raise ValueError(f"hyper-parameter {min(both)!r} is given twice")
    return {**given, **more}


def _named_values(option: str, settings: Iterable[str], words: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of an option that says NAME=VALUE, where a value is a word, a number, or several with commas.

    Args:
        option: the option, for messages.
        settings: what it was given.
        words: what words stand for, beside true and false.
    """
    words = {"true": True, "false": False, **(words or {})}
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            known = ", ".join(list(words)[:-1]) + f" or {list(words)[-1]}"
            raise ValueError(f"{option} {setting}: expected NAME=VALUE, where VALUE is a number, {known}")
        if name in given:
            raise ValueError(f"hyper-parameter {name!r} is given twice")
        values = [_value(part, words) for part in text.split(",")]
        given[name] = values if "," in text else values[0]
    return given


def _value(text: str, words: Mapping[str, Any]) -> Any:
    return words[text] if text in words else _number(text)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--seeds {text}: expected a count or seeds with commas, such as 5 or 0,1,2")
    try:
        return seeds_of([int(part) for part in parts] if "," in text else int(parts[0]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--seeds {text}: {error}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _content(experiment: Experiment, seeds: Sequence[int]) -> dict[str, Any]:
    """The experiment over these seeds as the content of a sweep's file."""
    settings = experiment.as_dict()
    del settings["seed"]
    settings |= {"milestones": list(experiment.milestones), **settings.pop("partition_options")}
    method = {name: settings.pop(name) for name in ("rule", "lr")} | settings.pop("hyperparameters")
    return {"settings": settings, "methods": {experiment.rule: method}, "seeds": list(seeds), "controls": False}


def _document(run: Run) -> dict[str, Any]:
    """A run for a program: its seed, engine, seconds, and history."""
    return {
        "seed": run.experiment.seed,
        "engine": run.engine,
        "seconds": run.seconds,
        "final": run.final,
        "history": run.history,
    }


def _show_results(out: Path, tasks: Sequence[Task], as_json: bool) -> None:
    """Writes the tables and the picture of all seeds, and prints a table, or one JSON document."""
    results = read_results(out)
    names = [task.name for task in tasks]
    runs, experiment = [results.run(name) for name in names], tasks[0].experiment
    title = f"{experiment.rule} on {experiment.topology}: {experiment.data}, {experiment.model}"
    history, summaries, picture = (out / name for name in WRITTEN)
    seeds = results.runs[["seed"]].loc[names]
    with writing():
        write_text(history, seeds.join(results.history.set_index("run")).to_csv(index=False))
        write_text(summaries, seeds.join(results.final()).to_csv(index=False))
        plots.draw_training({tasks[0].method: runs}, samples_per_class(experiment), title, picture)
    if as_json:
        print_json({"experiment": experiment.as_dict(), "runs": list(map(_document, runs)), "folder": str(out)})
        return
    console = console_of_text()
    console.print(summary.seeds_table(runs, title))
    console.print(f"{summary.LEGEND}\n")
    console.print(f"{', '.join(WRITTEN)}, checkpoints and all runs ({FILE}, runs.csv.zst) are in {out}")
