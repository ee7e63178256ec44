"""Times of training steps across ranks, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gut_fast.benchmark import timing
from gut_fast.benchmark.across import CONTENDERS, Rank, Task, absent
from gut_fast.benchmark.across_ranks import Crew, crew
from gut_fast.benchmark.across_truth import compare
from gut_fast.benchmark.run import versions
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.kernels import machine, ops

__all__ = ["AcrossResult", "MeasuredAcross", "load", "merge", "run", "save"]

TURN_SECONDS = 0.3
"""How long a contender trains before the next one has its turn."""

MAX_STEPS_A_TURN = 50
MIN_ROUNDS, MAX_ROUNDS = 3, 200


@dataclass(frozen=True)
class MeasuredAcross:
    """One contender's times.

    Attributes:
        seconds: of a step: means over turns, of the rank that took longest.
        cpu_seconds: of processors that all ranks together use in a step, median of turns.
        bytes_out: that a rank's interface sends in a step, headers included, median of turns.
        error: against the recurrence, in units of the largest parameter.
    """

    seconds: Quantiles
    cpu_seconds: float
    bytes_out: float
    error: float


@dataclass(frozen=True)
class AcrossResult:
    """All contenders' times in one task over one kind of link, and what they were measured on.

    Attributes:
        numbers: parameters of the model.
        link: "loopback", or the rate of the link that each rank has, each way.
        processors: that the ranks share.
    """

    model: str
    ranks: int
    samples: int
    numbers: int
    bucket_bytes: int
    link: str
    processors: int
    contenders: dict[str, MeasuredAcross]
    absent: dict[str, str]
    disturbance: Disturbance
    machine: str
    versions: dict[str, str]
    date: str

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """What tells it from other results."""
        return self.model, self.ranks, self.samples, self.bucket_bytes, self.link

    @property
    def bound(self) -> float:
        """The larger of computation and communication, median seconds of a step."""
        return max(self.contenders[name].seconds.p50 for name in ("computation", "communication"))

    def to_bound(self, name: str) -> float:
        """Median time of a step over the larger of computation and communication."""
        return self.contenders[name].seconds.p50 / self.bound

    def to_ddp(self, name: str) -> float:
        """Median time of a step over that of DDP."""
        return self.contenders[name].seconds.p50 / self.contenders["DDP"].seconds.p50

    def of_processors(self, name: str) -> float:
        """The part of a step in which all processors are busy with it, on average."""
        entry = self.contenders[name]
        return entry.cpu_seconds / (entry.seconds.p50 * self.processors)


def run(
    task: Task, seconds: float = 30.0, rate: str | None = None, progress: Callable[[str], object] = lambda _: None
) -> AcrossResult:
    """Compares all contenders with their recurrences, then times them in turns, for about so many seconds.

    Args:
        task: what is trained.
        seconds: three rounds are made at least.
        rate: of the link of each rank, for example ``"200mbit"``; None is this machine's loopback.
        progress: is told what is being done.

    Raises:
        WrongResultError: a contender does not compute, or send, what it should; nothing has been timed.
        CrewError: a rank failed.
        RuntimeError: links of that rate cannot be made here.
    """
    task = dataclasses.replace(task, shares_memory=rate is None)  # shaped links stand for those between machines
    missing = absent(task)
    names = [name for name in CONTENDERS if name not in missing]
    progress("starting")
    with timing.threads(1), crew(Rank, task.ranks, rate) as ranks:
        numbers = ranks.ask("enter", task, names)[0]
        progress("comparing")
        errors = compare(ranks, task, names, numbers)
        used = sum(ranks.ask("cpu_seconds"))
        with timing.watch() as disturbance:
            times = _take_turns(ranks, names, seconds, progress)
        used = sum(ranks.ask("cpu_seconds")) - used
    if disturbance.others is not None:
        disturbance.others = max(0.0, disturbance.others - used / disturbance.seconds)
    shared = task.ranks if rate is None else 1
    measured = {name: _measured(times[name], errors[name], shared) for name in names}
    disturbance.spread = min(entry.seconds.spread for entry in measured.values())
    return AcrossResult(
        task.model,
        task.ranks,
        task.samples,
        numbers,
        task.bucket,
        "loopback" if rate is None else rate,
        os.cpu_count() or 1,
        measured,
        missing,
        disturbance,
        machine.machine_line(),
        {**versions(), **_peers(), "backend": _backend()},
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _peers() -> dict[str, str]:
    version = machine.installed_version("decent-dp")
    return {} if version is None else {"decent-dp": version}


def _backend() -> str:
    """That computes messages and mixes them."""
    chosen = ops.select_backend("auto", "cpu", torch.float32, 1, 1, None, "combine")
    return chosen.__name__.rpartition(".")[2]


Turn = tuple[float, float, float]
"""Of a step: seconds, seconds of processors of all ranks together, bytes out of an interface."""


def _take_turns(
    ranks: Crew, names: Sequence[str], seconds: float, progress: Callable[[str], object]
) -> dict[str, list[Turn]]:
    """In every round each contender has one turn, in an order drawn anew."""
    duration = {name: _turn(ranks, name, 2)[0] for name in names}
    steps = {name: min(max(1, round(TURN_SECONDS / each)), MAX_STEPS_A_TURN) for name, each in duration.items()}
    rounds = round(seconds / sum(duration[name] * (steps[name] + 1) for name in names))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    order, shuffle = list(names), random.Random(0).shuffle
    times: dict[str, list[Turn]] = {name: [] for name in names}
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}")
        shuffle(order)
        for name in order:
            times[name].append(_turn(ranks, name, steps[name]))
    return times


def _turn(ranks: Crew, name: str, steps: int) -> Turn:
    seconds, cpu, out = zip(*ranks.ask("time", name, steps), strict=True)
    return max(seconds) / steps, sum(cpu) / steps, statistics.fmean(out) / steps


def _measured(turns: Sequence[Turn], error: float, shared: int) -> MeasuredAcross:
    """`shared`: how many ranks send through one interface."""
    seconds, cpu, out = zip(*turns, strict=True)
    return MeasuredAcross(Quantiles.of(seconds), statistics.median(cpu), statistics.median(out) / shared, error)


def save(results: Sequence[AcrossResult], path: Path) -> None:
    """Writes results as JSON, which `load` reads; ratios stand there too, for whoever reads it."""
    content = {"results": [{**dataclasses.asdict(result), "derived": _derived(result)} for result in results]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def _derived(result: AcrossResult) -> dict[str, Any]:
    return {
        name: {
            "to_bound": result.to_bound(name),
            "to_ddp": result.to_ddp(name),
            "of_processors": result.of_processors(name),
        }
        for name in result.contenders
    }


def load(path: Path) -> list[AcrossResult]:
    """The results of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    try:
        return [_result(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of gut-fast bench across ({error}); name another folder") from error


def _result(entry: Mapping[str, Any]) -> AcrossResult:
    fields = {name: value for name, value in entry.items() if name != "derived"}
    fields["contenders"] = {
        name: MeasuredAcross(Quantiles(**one["seconds"]), one["cpu_seconds"], one["bytes_out"], one["error"])
        for name, one in fields["contenders"].items()
    }
    fields["disturbance"] = Disturbance(**fields["disturbance"])
    return AcrossResult(**fields)


def merge(old: Iterable[AcrossResult], new: Iterable[AcrossResult]) -> list[AcrossResult]:
    """The old results with the new ones of the same task and link in their places, and others after them."""
    return list({result.key: result for result in (*old, *new)}.values())
