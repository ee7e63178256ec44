"""What came out of a case, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gut_fast.benchmark.timing import Disturbance, Quantiles

__all__ = ["Measured", "Result", "as_json", "from_json", "load", "machine_slug", "merge", "save"]


@dataclass(frozen=True)
class Measured:
    """One contender's times.

    Attributes:
        family: what kind of contender it is.
        seconds: of a step, for whoever calls it: on a GPU of many queued one after the other.
        error: largest one against the reference, relative to the largest entry; None of what makes no gossip step.
        busy: seconds of a step on the GPU alone; None on a CPU, where that is the same.
    """

    family: str
    seconds: Quantiles
    error: float | None
    busy: Quantiles | None = None

    @property
    def of_memory(self) -> Quantiles:
        """Seconds to be compared with those of a copy: without what Python takes, where it runs beside."""
        return self.seconds if self.busy is None else self.busy


@dataclass(frozen=True)
class Result:
    """All contenders' times in one case on so many threads, and what they were measured on."""

    case: str
    rule: str
    topology: str
    agents: int
    columns: int
    tensors: int
    storage: str
    hyperparameters: dict[str, Any]
    threads: int
    bytes: int
    """What a step has to move."""
    streams: int
    """Of memory, read or written."""
    compared_columns: int
    """Of our own step, with the reference, before it was timed."""
    contenders: dict[str, Measured]
    absent: dict[str, str]
    goal: float | None
    python_part: Quantiles | None
    """Seconds of ``optimizer.step()`` outside the kernel, or on a GPU until it is queued; for several tensors."""
    disturbance: Disturbance
    machine: str
    versions: dict[str, str]
    date: str
    device: str = "cpu"
    backend: str = ""
    """That has made our steps."""
    sets: int = 1
    """Of our buffers, which take turns."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from other results."""
        return self.case, self.device, self.threads if self.device == "cpu" else 0

    @property
    def place(self) -> str:
        """The processor's threads, or the GPU."""
        return "GPU" if self.device != "cpu" else f"{self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def ours(self) -> float:
        """Median seconds of our step."""
        return self.contenders["gut_fast"].of_memory.p50

    @property
    def ceiling(self) -> float | None:
        """Median seconds of the ceiling, where it was measured."""
        return self.contenders["ceiling"].of_memory.p50 if "ceiling" in self.contenders else None

    def fraction_of_ceiling(self, name: str = "gut_fast") -> float | None:
        """The ceiling's median time over that of a contender."""
        return None if self.ceiling is None else self.ceiling / self.contenders[name].of_memory.p50

    def rate(self, name: str = "gut_fast") -> float:
        """Bytes that a step has to move, per second: what a contender moves beyond them does not count."""
        return self.bytes / self.contenders[name].of_memory.p50

    def best(self, family: str) -> str | None:
        """The fastest contender of a family, if it has one."""
        medians = {name: entry.of_memory.p50 for name, entry in self.contenders.items() if entry.family == family}
        return min(medians, key=medians.__getitem__, default=None)

    def times_ours(self, name: str) -> float:
        """How many times our median a contender's is; on a GPU of what it is busy with."""
        return self.contenders[name].of_memory.p50 / self.ours

    def times_our_call(self, name: str) -> float:
        """The same of what the caller waits for."""
        return self.contenders[name].seconds.p50 / self.contenders["gut_fast"].seconds.p50


def machine_slug(machine: str) -> str:
    """The processor of a line about a machine as part of a file name, for example ``"amd-epyc"``."""
    processor = machine.partition(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-") or "machine"


def save(results: Sequence[Result], path: Path) -> None:
    """Writes results as JSON, which `load` reads; fractions and ratios stand there too, for whoever reads it."""
    content = {"results": as_json(results)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The entries of such a file, which `from_json` reads."""
    return [{**dataclasses.asdict(result), "derived": _derived(result)} for result in results]


def _derived(result: Result) -> dict[str, Any]:
    return {
        name: {
            "fraction_of_ceiling": result.fraction_of_ceiling(name),
            "gb_per_second": result.rate(name) / 1e9,
            "times_gut_fast": result.times_ours(name),
            "calls_times_gut_fast": result.times_our_call(name),
        }
        for name in result.contenders
    }


def load(path: Path) -> list[Result]:
    """The results of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of gut-fast bench step ({error}); name another file") from error


def from_json(entries: Iterable[dict[str, Any]]) -> list[Result]:
    """The results of such entries. Raises KeyError, TypeError or ValueError if they are something else."""
    return [_result(entry) for entry in entries]


def _result(entry: dict[str, Any]) -> Result:
    fields = {name: value for name, value in entry.items() if name != "derived"}
    fields["contenders"] = {
        name: Measured(one["family"], Quantiles(**one["seconds"]), one["error"], _quantiles(one.get("busy")))
        for name, one in fields["contenders"].items()
    }
    fields["python_part"] = _quantiles(fields["python_part"])
    fields["disturbance"] = Disturbance(**fields["disturbance"])
    return Result(**fields)


def _quantiles(entry: dict[str, Any] | None) -> Quantiles | None:
    return None if entry is None else Quantiles(**entry)


def merge(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """The old results with new ones of the same case and place in their places, and others after them."""
    return list({result.key: result for result in (*old, *new)}.values())
