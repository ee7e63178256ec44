"""One case from beginning to end: buffers, contenders, comparison, times."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from gut_fast.benchmark import comparison, overhead, timing
from gut_fast.benchmark.cases import Case
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.contenders import Contender, GutFast, Unavailable, Workload
from gut_fast.benchmark.device import CPU, Device
from gut_fast.benchmark.peers import FAMILIES, Field, enter
from gut_fast.benchmark.results import Measured, Result
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.kernels import machine, ops
from gut_fast.kernels.backends import BACKENDS

__all__ = ["run", "versions"]

PEERS = tuple(FAMILIES)
OURS = ("gut_fast", "backend", "kernel", "graph")
"""Families that must be right, or nothing is timed; the first also has to work."""


def run(
    case: Case,
    threads: int,
    seconds: float = 20.0,
    families: Collection[str] = PEERS,
    max_compared: int = comparison.MAX_ELEMENTS,
    device: Device = CPU,
) -> Result:
    """Compares all contenders with the reference and times them in turns, for about so many seconds.

    A peer that is not equal to the reference, or anyone beside our step who fails, is not timed and named among the
    absent. Of our own step up to
    `max_compared` numbers are compared, of peers' fewer. On a GPU half of the time is for what callers wait for, and
    half for what it is busy with.

    Raises:
        WrongResultError: our own step is not equal to the reference; nothing has been timed.
        ValueError: an unknown family or a case that cannot be made.
        RuntimeError: the case's backend cannot serve it.
    """
    with timing.threads(threads):
        torch.compiler.reset()  # its limit of compiled variants is per process
        workload = Workload(case, device)
        field = enter(workload, families)
        columns = comparison.checked_columns(workload, max_compared)
        errors = compare(workload, field, columns)
        timed = {name: contender for name, contender in field.contenders.items() if name not in field.absent}
        with timing.watch() as disturbance:
            measured = _times(timed, errors, seconds, device)
        steadiest = min((entry.of_memory for entry in measured.values()), key=lambda each: each.spread)
        ceiling = measured.get("ceiling")
        disturbance.spread = (steadiest if ceiling is None else ceiling.of_memory).spread
        python_part = _python_part(timed["gut_fast"], seconds / 10) if len(case.shapes) > 1 else None
        compared = workload.columns if columns is None else len(columns)
        sets = len(timed["gut_fast"].members())
        return _result(workload, threads, compared, measured, field.absent, python_part, disturbance, sets)


def _times(
    timed: dict[str, Contender], errors: dict[str, float], seconds: float, device: Device
) -> dict[str, Measured]:
    """With the clock of callers and, where there is another, with that of the device."""
    steps = {name: contender.step for name, contender in timed.items()}
    clocks = [device.wall, *([] if device.busy is None else [device.busy])]
    times = [timing.interleave(steps, seconds / len(clocks), clock=clock) for clock in clocks]
    measured = {}
    for name, contender in timed.items():
        wall, *busy = (each[name].divided(contender.steps_a_call) for each in times)
        measured[name] = Measured(contender.family, wall, errors.get(name), *busy)
    return measured


def compare(workload: Workload, field: Field, columns: Tensor | None) -> dict[str, float]:
    """The largest error of every contender that makes a gossip step: of ours in these columns, of peers in a sample.

    A peer that is wrong goes to the absent, and so does anyone beside our step who fails.

    Raises:
        WrongResultError: our own step is wrong.
    """
    errors = {}
    sample = comparison.checked_columns(workload, comparison.MAX_ELEMENTS_OF_PEERS)
    for name, contender in field.contenders.items():
        if contender.blocks() is None:
            continue
        try:
            mine = columns if contender.family == "gut_fast" else sample
            members = contender.members()
            errors[name] = max(comparison.largest_error(member, workload, mine) for member in members)
        except WrongResultError as error:
            if contender.family in OURS:
                raise WrongResultError(f"{workload.case.name}: {name} differs from the reference: {error}") from None
            field.absent[name] = f"not equal to the reference: {error}"
        except Exception as error:  # of a compiler's, of any kind
            if contender.family == "gut_fast":
                raise
            field.absent[name] = f"failed: {str(error).strip().partition(chr(10))[0]}"
    return errors


def _python_part(ours: Contender, seconds: float) -> Quantiles | None:
    first = ours.members()[0]
    assert isinstance(first, GutFast)
    if first.workload.device.is_gpu:
        return overhead.queueing(first, first.workload.device)
    try:
        return overhead.python_part(first, seconds)
    except Unavailable:
        return None


def _result(
    workload: Workload,
    threads: int,
    compared_columns: int,
    measured: dict[str, Measured],
    absent: dict[str, str],
    python_part: Quantiles | None,
    disturbance: Disturbance,
    sets: int,
) -> Result:
    case, device = workload.case, workload.device
    return Result(
        case=case.name,
        rule=case.rule,
        topology=workload.topology.name,
        agents=workload.num_agents,
        columns=case.columns,
        tensors=len(case.shapes),
        storage=case.storage_name,
        hyperparameters=dict(case.hyperparameters),
        threads=threads,
        bytes=case.bytes_per_step(workload.num_agents),
        streams=3 + 2 * len(workload.rule.states),
        compared_columns=compared_columns,
        contenders=measured,
        absent=absent,
        goal=case.gpu_goal if device.is_gpu else case.goals.get(threads),
        python_part=python_part,
        disturbance=replace(disturbance),
        machine=device.machine_line(),
        versions=versions(device),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        device=device.name,
        backend=_backend(workload),
        sets=sets,
    )


def _backend(workload: Workload) -> str:
    """The name of the one that makes our steps."""
    chosen = ops.select_backend(workload.case.backend, *workload.kind)
    return next(name for name, backend in BACKENDS.items() if backend is chosen)


def versions(device: Device = CPU) -> dict[str, str]:
    """Versions of everything that was timed."""
    others = {name: machine.installed_version(name) for name in ("scipy", "jax")}
    found = {name: version for name, version in others.items() if version is not None}
    return {**machine.versions(), **device.versions(), **found}
