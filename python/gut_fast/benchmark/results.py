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

__all__ = ["Measured", "Result", "load", "machine_slug", "merge", "save"]


@dataclass(frozen=True)
class Measured:
    """One contender's times.

    Attributes:
        family: what kind of contender it is.
        seconds: of a step.
        error: largest one against the reference, relative to the largest entry; None of what makes no gossip step.
    """

    family: str
    seconds: Quantiles
    error: float | None


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
    """Seconds of ``optimizer.step()`` outside the kernel; measured where there are several tensors."""
    disturbance: Disturbance
    machine: str
    versions: dict[str, str]
    date: str

    @property
    def ours(self) -> float:
        """Median seconds of our step."""
        return self.contenders["gut_fast"].seconds.p50

    @property
    def ceiling(self) -> float | None:
        """Median seconds of the ceiling, where it was measured."""
        return self.contenders["ceiling"].seconds.p50 if "ceiling" in self.contenders else None

    def fraction_of_ceiling(self, name: str = "gut_fast") -> float | None:
        """The ceiling's median time over that of a contender."""
        return None if self.ceiling is None else self.ceiling / self.contenders[name].seconds.p50

    def rate(self, name: str = "gut_fast") -> float:
        """Bytes that a step has to move, per second: what a contender moves beyond them does not count."""
        return self.bytes / self.contenders[name].seconds.p50

    def best(self, family: str) -> str | None:
        """The fastest contender of a family, if it has one."""
        medians = {name: entry.seconds.p50 for name, entry in self.contenders.items() if entry.family == family}
        return min(medians, key=medians.__getitem__, default=None)

    def times_ours(self, name: str) -> float:
        """How many times our median a contender's is."""
        return self.contenders[name].seconds.p50 / self.ours


def machine_slug(machine: str) -> str:
    """The processor of a line about a machine as part of a file name, for example ``"amd-epyc"``."""
    processor = machine.partition(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-") or "machine"


def save(results: Sequence[Result], path: Path) -> None:
    """Writes results as JSON, which `load` reads; fractions and ratios stand there too, for whoever reads it."""
    content = {"results": [{**dataclasses.asdict(result), "derived": _derived(result)} for result in results]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def _derived(result: Result) -> dict[str, Any]:
    return {
        name: {
            "fraction_of_ceiling": result.fraction_of_ceiling(name),
            "gb_per_second": result.rate(name) / 1e9,
            "times_gut_fast": result.times_ours(name),
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
        return [_result(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of gut-fast bench step ({error}); name another file") from error


def _result(entry: dict[str, Any]) -> Result:
    fields = {name: value for name, value in entry.items() if name != "derived"}
    fields["contenders"] = {
        name: Measured(one["family"], Quantiles(**one["seconds"]), one["error"])
        for name, one in fields["contenders"].items()
    }
    fields["python_part"] = None if fields["python_part"] is None else Quantiles(**fields["python_part"])
    fields["disturbance"] = Disturbance(**fields["disturbance"])
    return Result(**fields)


def merge(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """The old results with new ones of the same case and number of threads in their places, and others after them."""
    by_key = {(result.case, result.threads): result for result in old}
    by_key.update({(result.case, result.threads): result for result in new})
    return list(by_key.values())
