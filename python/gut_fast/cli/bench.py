"""The commands of ``gut-fast bench``: step, scaling, train and across."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gut_fast import rules
from gut_fast.benchmark import pictures, report, results, scaling
from gut_fast.benchmark.cases import CASES, DTYPES, GROUPS, SHAPES, STEP_SIZE, Case
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.device import DEVICES, Device, find_device
from gut_fast.benchmark.peers import FAMILIES
from gut_fast.benchmark.results import Result
from gut_fast.benchmark.run import run, versions
from gut_fast.cli.bench_across import across
from gut_fast.cli.bench_train import train
from gut_fast.cli.terminal import as_bad_argument, console_of_text, writing
from gut_fast.kernels import machine
from gut_fast.kernels.backends import BACKENDS
from gut_fast.study import plots

__all__ = ["app"]

app = typer.Typer(help="Measure how fast steps and training are on this machine.", no_args_is_help=True)

DEFAULT_TOPOLOGY = "ring:16"
MIN_WIDTH = 120
"""So that no column of the tables is cut; a narrower terminal wraps the lines."""

_what, _how, _output = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is timed", "How", "Output"))


@app.callback()
def _bench() -> None:
    """Measure how fast steps and training are on this machine."""


app.command()(train)
app.command()(across)


@app.command()
def step(
    cases: Annotated[
        list[str] | None,
        _what("--case", help=f"A case or a group: {', '.join([*GROUPS, *CASES])}. May be repeated. Default: ring-16."),
    ] = None,
    rule: Annotated[str | None, _what(help=f"A case of your own. One of: {', '.join(rules.RULES)}.")] = None,
    topology: Annotated[str | None, _what(help=f"For example {DEFAULT_TOPOLOGY} or, with --agents, ring.")] = None,
    agents: Annotated[int | None, _what(min=1, help="Number of agents of a topology given by its name alone.")] = None,
    columns: Annotated[int | None, _what(min=1, help="Parameters of each agent, as one flat row.")] = None,
    model: Annotated[str | None, _what(help=f"Parameters as this model's tensors: {', '.join(SHAPES)}.")] = None,
    dtype: Annotated[str | None, _what(help=f"Of parameters and gradients: {', '.join(DTYPES)}.")] = None,
    state_dtype: Annotated[str | None, _what(help="Of the state. Default: as the parameters.")] = None,
    backend: Annotated[str | None, _what(help=f"auto, {', '.join(BACKENDS)}.")] = None,
    device: Annotated[str, _how(help=f"One of: {', '.join(DEVICES)}.")] = "cpu",
    threads: Annotated[
        list[int] | None,
        _how(min=1, help="May be repeated. Default: 1, and as many as PyTorch takes; on a GPU the latter alone."),
    ] = None,
    peers: Annotated[str, _how(help=f"all, none, or some of {', '.join(FAMILIES)}, with commas.")] = "all",
    seconds: Annotated[float, _how(min=0.0, help="For each case and number of threads.")] = 20.0,
    output: Annotated[
        Path | None, _output(help="Folder for JSON, Markdown and picture, named after the processor; results add up.")
    ] = None,
    json: Annotated[Path | None, _output(help="Write the results of this run to this file.")] = None,
    png: Annotated[Path | None, _output(help="Draw the results of this run into this file.")] = None,
) -> None:
    """Time one step of all agents beside PyTorch, other peers and a plain loop over the same memory.

    On a GPU the loop is a large copy, and there are two times: what the GPU is busy with, and what a caller waits for.
    Everyone is compared with the float64 reference first. Exit code 1 if the library's own step is not equal to it.
    """
    with as_bad_argument():
        own = {
            "rule": rule,
            "topology": topology,
            "agents": agents,
            "columns": columns,
            "model": model,
            "dtype": dtype,
            "state_dtype": state_dtype,
            "backend": backend,
        }
        where = find_device(device)
        chosen = _chosen(cases or [], {name: value for name, value in own.items() if value is not None})
        families, counts = _families(peers), _thread_counts(threads, where)
        for place in (output, json and json.parent, png and png.parent):
            _check_folder(place, make=place is output)
        if png is not None or output is not None:
            plots.check_matplotlib()
    measured = _measure_all(chosen, counts, seconds, families, where)
    with writing(), as_bad_argument():
        _write(measured, output, json, png)


def _chosen(names: Sequence[str], own: dict[str, Any]) -> list[Case]:
    """The cases that were named, or the one that the other options describe."""
    if names and own:
        raise ValueError(f"--case is a whole case; leave out {', '.join('--' + n.replace('_', '-') for n in own)}")
    if own:
        return [_own_case(**own)]
    chosen: dict[str, Case] = {}
    for name in names or ["ring-16"]:
        if name not in GROUPS and name not in CASES:
            raise ValueError(f"unknown case {name!r}; known are {', '.join([*GROUPS, *CASES])}")
        chosen |= {case.name: case for case in GROUPS.get(name, [CASES[name]] if name in CASES else [])}
    return list(chosen.values())


def _own_case(
    rule: str = "gut",
    topology: str = DEFAULT_TOPOLOGY,
    agents: int | None = None,
    columns: int | None = None,
    model: str | None = None,
    dtype: str = "float32",
    state_dtype: str | None = None,
    backend: str = "auto",
) -> Case:
    if agents is not None:
        if ":" in topology and topology != DEFAULT_TOPOLOGY:
            raise ValueError(f"--topology {topology} has a size already; leave out --agents {agents}")
        topology = f"{topology.partition(':')[0]}:{agents}"
    if columns is not None and model is not None:
        raise ValueError("--columns and --model both say how many parameters there are; leave one out")
    if model is not None and model not in SHAPES:
        raise ValueError(f"unknown model {model!r}; known are {', '.join(SHAPES)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; known are auto, {', '.join(BACKENDS)}")
    shapes = SHAPES[model] if model is not None else ((columns or CASES["ring-16"].columns,),)
    name = f"{rule} {topology} {model or shapes[0][0]} {dtype}{'' if state_dtype is None else '/' + state_dtype}"
    name += "" if backend == "auto" else f" {backend}"
    case = Case(name, rule, topology, shapes, dict(STEP_SIZE), dtype, state_dtype, backend)
    case.make_topology()
    return case


def _families(peers: str) -> list[str]:
    if peers == "all":
        return list(FAMILIES)
    families = ["ceiling"] if peers == "none" else [each.strip() for each in peers.split(",")]
    if unknown := [each for each in families if each not in FAMILIES]:
        raise ValueError(f"--peers: unknown {', '.join(unknown)}; known are all, none, {', '.join(FAMILIES)}")
    return families


def _thread_counts(given: Sequence[int] | None, device: Device) -> list[int]:
    everything = torch.get_num_threads()
    if device.is_gpu and len(set(given or ())) > 1:
        raise ValueError(f"--threads {', '.join(map(str, given or ()))}: on a GPU a case is timed once; give one")
    return sorted(set(given or ((everything,) if device.is_gpu else (1, everything))))


def _check_folder(folder: Path | None, *, make: bool) -> None:
    if folder is not None and make:
        folder.mkdir(parents=True, exist_ok=True)
    elif folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")


def _measure_all(
    cases: Sequence[Case], threads: Sequence[int], seconds: float, families: Sequence[str], device: Device
) -> list[Result]:
    """Case after case, each shown when it is there."""
    console = console_of_text()
    console.width = max(console.width, MIN_WIDTH)
    measured = []
    for case in cases:
        for number in threads:
            try:
                with as_bad_argument():
                    result = run(case, number, seconds, families, device=device)
            except WrongResultError as error:
                console.print(f"NOT TIMED: {error}", style="red")
                raise typer.Exit(1) from None
            console.print(report.describe(result), style="bold", soft_wrap=True)
            console.print(report.case_table(result))
            for line in report.case_lines(result):
                console.print(line, style="red" if line.startswith("NOISY") else None, soft_wrap=True)
            measured.append(result)
    console.print(report.summary_table(measured))
    return measured


def _write(measured: Sequence[Result], output: Path | None, json: Path | None, png: Path | None) -> None:
    if json is not None:
        results.save(measured, json)
    if png is not None:
        pictures.draw_results(measured, png)
    if output is None:
        return
    stem = output / results.machine_slug(measured[0].machine)
    file = stem.with_suffix(".json")
    together = results.merge(results.load(file) if file.exists() else [], measured)
    order = {name: place for place, name in enumerate(CASES)}
    together.sort(key=lambda result: (order.get(result.case, len(order)), result.case, result.threads))
    results.save(together, file)
    stem.with_suffix(".md").write_text(report.markdown(together), encoding="utf-8")
    pictures.draw_results(together, stem.with_suffix(".png"))
    typer.echo(f"wrote {stem}.json, .md and .png: {len(together)} results")


@app.command(name="scaling")
def scaling_command(
    axes: Annotated[
        list[str] | None, _what("--axis", help=f"{', '.join(scaling.AXES)}. May be repeated. Default: all.")
    ] = None,
    threads: Annotated[int, _how(min=1, help="Threads.")] = 1,
    seconds: Annotated[float, _how(min=0.0, help="For each point.")] = 1.0,
    output: Annotated[Path, _output(help="Folder for JSON and picture, named after the processor.")] = Path(
        "outputs/bench"
    ),
) -> None:
    """Time a step against the number of agents, columns and neighbours, beside a plain loop over the same memory.

    Points whose buffers need more than a quarter of this machine's memory are left out. Curves that the folder holds
    already, and that are not measured anew, stay.
    """
    with as_bad_argument():
        plots.check_matplotlib()
        curves = scaling.curves(axes or list(scaling.AXES))
        _check_folder(output, make=True)
    stem = output / f"scaling-{results.machine_slug(machine.machine_line())}-{threads}-thread{'s' * (threads != 1)}"
    file, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    about = {"machine": machine.machine_line(), "versions": versions(), "threads": threads}
    for curve in curves:
        _measure_curve(curve, threads, seconds)
        with writing(), as_bad_argument():
            together = scaling.replace(scaling.load(file) if file.exists() else [], curve)
            scaling.save(together, about, file)
            pictures.draw_scaling(together, f"{threads} thread{'s' * (threads != 1)}", picture)
    typer.echo(f"wrote {file} and {picture}")


def _measure_curve(curve: scaling.Curve, threads: int, seconds: float) -> None:
    console = console_of_text()
    console.print(f"{curve.axis}, {curve.label}", style="bold")
    for x, case in curve.cases.items():
        if (needed := scaling.memory_needed(case)) > scaling.room():
            console.print(f"  {x:>11,}  left out: {needed / 1e9:.1f} GB, more than a quarter of the memory")
            continue
        with as_bad_argument():
            point = scaling.measure(x, case, threads, seconds)
        curve.points.append(point)
        noisy = f"  NOISY: {'; '.join(point.noisy)}" if point.noisy else ""
        nanoseconds = 1e9 * point.seconds / point.numbers
        console.print(
            f"  {x:>11,}  {nanoseconds:7.3f} ns a number, {point.fraction:.2f} of the ceiling{noisy}", soft_wrap=True
        )
