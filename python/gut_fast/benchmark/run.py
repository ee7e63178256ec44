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
from gut_fast.benchmark.peers import FAMILIES, Field, enter
from gut_fast.benchmark.results import Measured, Result
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.experiments import machine

__all__ = ["run", "versions"]

PEERS = tuple(FAMILIES)


def run(
    case: Case,
    threads: int,
    seconds: float = 20.0,
    families: Collection[str] = PEERS,
    max_compared: int = comparison.MAX_ELEMENTS,
) -> Result:
    """Compares all contenders with the reference and times them in turns, for about so many seconds.

    A peer that is not equal to the reference is not timed and named among the absent. Of our own step up to
    `max_compared` numbers are compared, of peers' fewer.

    Raises:
        WrongResultError: our own step is not equal to the reference; nothing has been timed.
        ValueError: an unknown family or a case that cannot be made.
        RuntimeError: the case's backend cannot serve it.
    """
    with timing.threads(threads):
        torch.compiler.reset()  # its limit of compiled variants is per process
        workload = Workload(case)
        field = enter(workload, families)
        columns = comparison.checked_columns(workload, max_compared)
        errors = compare(workload, field, columns)
        timed = {name: contender for name, contender in field.contenders.items() if name not in field.absent}
        with timing.watch() as disturbance:
            quantiles = timing.interleave({name: contender.step for name, contender in timed.items()}, seconds)
        steadiest = min(quantiles.values(), key=lambda each: each.spread)
        disturbance.spread = quantiles.get("ceiling", steadiest).spread
        python_part = _python_part(field.contenders["gut_fast"], seconds / 10) if len(case.shapes) > 1 else None
        measured = {name: Measured(timed[name].family, quantiles[name], errors.get(name)) for name in timed}
        compared = workload.columns if columns is None else len(columns)
        return _result(workload, threads, compared, measured, field.absent, python_part, disturbance)


def compare(workload: Workload, field: Field, columns: Tensor | None) -> dict[str, float]:
    """The largest error of every contender that makes a gossip step: of ours in these columns, of peers in a sample.

    A peer that is wrong goes to the absent.

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
            errors[name] = comparison.largest_error(contender, workload, mine)
        except WrongResultError as error:
            if contender.family in ("gut_fast", "kernel"):
                raise WrongResultError(f"{workload.case.name}: {name} differs from the reference: {error}") from None
            field.absent[name] = f"not equal to the reference: {error}"
    return errors


def _python_part(ours: Contender, seconds: float) -> Quantiles | None:
    assert isinstance(ours, GutFast)
    try:
        return overhead.python_part(ours, seconds)
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
) -> Result:
    case = workload.case
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
        goal=case.goals.get(threads),
        python_part=python_part,
        disturbance=replace(disturbance),
        machine=machine.machine_line(),
        versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def versions() -> dict[str, str]:
    """Versions of everything that was timed."""
    others = {name: machine.installed_version(name) for name in ("scipy", "jax")}
    return {**machine.versions(), **{name: version for name, version in others.items() if version is not None}}
