"""The commands ``gut-fast bench step`` and ``gut-fast bench train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gut_fast import rules
from gut_fast.bench import results, train
from gut_fast.bench import step as steps
from gut_fast.bench.cases import CASES, DTYPES, GROUPS, IMAGES, RESNET20, Case
from gut_fast.bench.device import DEVICES, find_device
from gut_fast.bench.peers import PEERS
from gut_fast.bench.results import Result, kind_of
from gut_fast.cli.options import CONTEXT, help_if_bare
from gut_fast.cli.terminal import Command, Group, as_bad_argument, writing
from gut_fast.kernels.backends import BACKENDS
from gut_fast.simulation.engines import ENGINES

__all__ = ["app"]

_HELP = "Measure how fast steps and training are on this machine."

app = typer.Typer(help=_HELP, cls=Group, context_settings=CONTEXT)

MOVED = {
    "scaling": "gut-fast bench step --agents 4 --agents 64 --columns 30000, with as many of each as wanted",
    "across": "python benchmarks/across.py in the repository",
}
"""The commands that are no longer here, and what to use instead."""

_what, _how, _output = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is timed", "How", "Output"))

_Device = Annotated[str, _how("--device", help=f"One of: {', '.join(DEVICES)}.")]
_Out = Annotated[
    Path | None, _output("--out", help="Folder for JSON and Markdown, named after the processor; results add up.")
]
_Json = Annotated[Path | None, _output("--json", help="Write the results of this run to this file.")]


@app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure how fast steps and training are on this machine."""
    help_if_bare(context)


@app.command(cls=Command)
def step(
    cases: Annotated[
        list[str] | None,
        _what("--case", help=f"A case or a group: {', '.join([*GROUPS, *CASES])}. May be repeated. Default: ring-16."),
    ] = None,
    rule: Annotated[str | None, _what(help=f"A case of your own. One of: {', '.join(rules.RULES)}.")] = None,
    topology: Annotated[str | None, _what(help="For example ring:16 or, with --agents, ring.")] = None,
    agents: Annotated[list[int] | None, _what(min=1, help="Size of a topology given by name. May be repeated.")] = None,
    columns: Annotated[list[int] | None, _what(min=1, help="Parameters of each agent. May be repeated.")] = None,
    model: Annotated[str | None, _what(help="Parameters as this network's tensors, for example resnet20.")] = None,
    dtype: Annotated[str | None, _what(help=f"Of parameters and gradients: {', '.join(DTYPES)}.")] = None,
    state_dtype: Annotated[str | None, _what(help="Of the state. Default: as the parameters.")] = None,
    backend: Annotated[str | None, _what(help=f"auto, {', '.join(BACKENDS)}.")] = None,
    device: _Device = "cpu",
    threads: Annotated[
        list[int] | None, _how(min=1, help="May be repeated. Default: 1, and as many as PyTorch takes; on a GPU these.")
    ] = None,
    peers: Annotated[str, _how(help=f"all, none, or some of {', '.join(dict.fromkeys(map(kind_of, PEERS)))}.")] = "all",
    seconds: Annotated[float, _how(min=0.0, help="For each case and number of threads.")] = 20.0,
    out: _Out = None,
    json: _Json = None,
) -> None:
    """Time one step of all agents beside PyTorch and a plain loop over the same memory.

    On a GPU the loop is a copy, and there are two times: what the GPU is busy with, and what a caller waits for.
    Everyone is compared with the float64 reference first. Exit code 1 if the library's own step is not equal to it.
    """
    with as_bad_argument():
        where = find_device(device)
        own = {"rule": rule, "topology": topology, "dtype": dtype, "state_dtype": state_dtype, "backend": backend}
        own = {name: value for name, value in own.items() if value is not None}
        chosen = _own_cases(own, agents, columns, model) if own or agents or columns or model else []
        if cases and chosen:
            raise ValueError("--case is a whole case; leave out --rule, --topology and the other options of a case")
        for name in [] if chosen else cases or ["ring-16"]:
            if name not in GROUPS and name not in CASES:
                raise ValueError(f"unknown case {name!r}; known are {', '.join([*GROUPS, *CASES])}")
            chosen += GROUPS.get(name) or [CASES[name]]
        known = dict.fromkeys(map(kind_of, PEERS))
        kinds = {"all": list(known), "none": []}.get(peers, [kind.strip() for kind in peers.split(",")])
        if unknown := [kind for kind in kinds if kind not in known]:
            raise ValueError(f"--peers: unknown {unknown[0]!r}; known are all, none, {', '.join(known)}")
        most = torch.get_num_threads()
        counts = sorted(set(threads or ([most] if device == "cuda" else [1, most])))
    chosen_peers = {name: peer for name, peer in PEERS.items() if kind_of(name) in kinds}
    measures = [
        partial(steps.measure, case, number, seconds, chosen_peers, where)
        for case in dict.fromkeys(chosen)
        for number in counts
    ]
    _run(measures, out, json)


def _own_cases(
    own: dict[str, Any], agents: Sequence[int] | None, columns: Sequence[int] | None, model: str | None
) -> list[Case]:
    """The cases that the options describe: one for each number of agents and of columns."""
    topology, rule = own.pop("topology", None), own.pop("rule", "gut")
    if agents and topology and ":" in topology:
        raise ValueError(f"--topology {topology} has a size already; leave out --agents {agents[0]}")
    if columns and model is not None:
        raise ValueError("--columns and --model both say how many parameters there are; leave one out")
    if own.get("backend", "auto") not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {own['backend']!r}; known are auto, {', '.join(BACKENDS)}")
    cases: list[Case] = []
    sizes: Sequence[int | str] = columns or [model or RESNET20]
    for graph in [f"{topology or 'ring'}:{number}" for number in agents or []] or [topology or "ring:16"]:
        for parameters in sizes:
            name = " ".join(map(str, (rule, graph, parameters, *own.values())))
            cases.append(Case(name, rule, graph, parameters, **own))
            cases[-1].make_topology()
    return cases


@app.command(name="train", cls=Command)
def train_command(
    model: Annotated[
        list[str] | None, _what(help=f"A network, for example {', '.join(IMAGES)}, the default. May be repeated.")
    ] = None,
    agents: Annotated[list[int] | None, _what(min=1, help="May be repeated. Default: 16.")] = None,
    batch_size: Annotated[int, _what(min=1, help="Samples per agent and step.")] = 32,
    engine: Annotated[
        list[str] | None, _what(help=f"One of: {', '.join(ENGINES)}. May be repeated. Default: those auto tries.")
    ] = None,
    device: _Device = "cpu",
    threads: Annotated[int | None, _how(min=1, help="Default: as many as PyTorch takes.")] = None,
    seconds: Annotated[float, _how(min=0.0, help="For each model and number of agents, after three rounds.")] = 20.0,
    out: _Out = None,
    json: _Json = None,
) -> None:
    """Time whole training steps: the simulator's with each engine, a plain loop and vmap over agents, and one model's.

    Everyone is compared with the plain loop first. Exit code 1 if gradients or steps are not equal. Images are noise.
    """
    with as_bad_argument():
        where, number = find_device(device), torch.get_num_threads() if threads is None else threads
        cases = [train.Training(name, size, batch_size, where) for name in model or IMAGES for size in agents or [16]]
        engines = None if engine is None or engine == ["auto"] else list(dict.fromkeys(engine))
    _run([partial(train.measure, case, engines, number, seconds) for case in cases], out, json)


def _run(measures: Sequence[Callable[[], Result]], out: Path | None, json: Path | None) -> None:
    """Measures one case after the other, shows each when it is there, and all together at the end; writes them."""
    with as_bad_argument():
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        if json is not None and not json.parent.is_dir():
            raise FileNotFoundError(f"--json {json}: there is no folder {json.parent}")
    measured = []
    for measure in measures:
        try:
            with as_bad_argument():
                measured.append(measure())
        except steps.WrongResultError as error:
            typer.echo(f"NOT TIMED: {error}")
            raise typer.Exit(1) from None
        typer.echo(results.describe(measured[-1]))
    typer.echo(results.summary(measured))
    with writing(), as_bad_argument():
        if json is not None:
            results.save(measured, json)
        if out is not None:
            typer.echo(f"wrote {results.add(measured, out)}")


def _moved(name: str) -> Callable[[], None]:
    def command() -> None:
        with as_bad_argument():
            raise ValueError(f"gut-fast bench {name} has moved; use {MOVED[name]}")

    return command


for _name in MOVED:
    _settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name=_name, hidden=True, context_settings=_settings, cls=Command)(_moved(_name))
