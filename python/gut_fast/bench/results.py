"""The record that every benchmark keeps, its file, and its two tables: all contenders of a case, and all cases."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gut_fast.arguments import shortened
from gut_fast.bench.timing import Quantiles
from gut_fast.files import FileError, read_within, write_text

__all__ = ["Measurement", "Result", "add", "case_table", "describe", "kind_of", "load", "markdown", "save", "summary"]

MAX_SPREAD = 0.25
"""The largest (p90 − p10) / median of the ceiling, or else of the steadiest contender, in a quiet run."""


@dataclass(frozen=True)
class Measurement:
    """The measured times of one contender in one case, and what else was found.

    Attributes:
        seconds: the time that the caller of a step waits.
        busy: the time that the GPU itself is busy with a step; None on a CPU, and where it was not measured.
        error: the largest error beside the reference, in units of the largest entry; None of a contender that computes
            something else.
        counts: medians of whatever else was counted in a step, by a name with its unit.
    """

    seconds: Quantiles
    busy: Quantiles | None = None
    error: float | None = None
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def best_known(self) -> Quantiles:
        """The time of the GPU itself where it was measured, else of the caller."""
        return self.seconds if self.busy is None else self.busy


@dataclass(frozen=True)
class Result:
    """All measurements of one case.

    Attributes:
        benchmark: ``"step"``, ``"train"`` or ``"across"``.
        case: the name of the case.
        settings: what was computed. ``"bytes"``, where present, is what a step has to move at least; ``"samples"`` how
            many samples a training step takes.
        baseline: the contender whose time the tables count as 1.
        measurements: the contenders by name. The part of a name before the first comma is the contender's kind.
        absent: the contenders that could not take part, and why.
        noise: what else the machine was busy with, as `gut_fast.bench.timing.watch` says it.
    """

    benchmark: str
    case: str
    settings: dict[str, Any]
    baseline: str
    measurements: dict[str, Measurement]
    absent: dict[str, str]
    noise: list[str]
    device: str = "cpu"
    threads: int = 1
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M UTC}")

    @property
    def doubts(self) -> list[str]:
        """Why the times are not to be trusted to the last per cent; empty if the run was quiet."""
        spreads = {name: each.best_known.spread for name, each in self.measurements.items()}
        name = "ceiling" if "ceiling" in spreads else min(spreads, key=spreads.__getitem__)
        wide = f"the times of {name} spread by {spreads[name]:.0%} of their median"
        return [*self.noise, *([wide] if spreads[name] > MAX_SPREAD else [])]

    @property
    def place(self) -> str:
        """The GPU, or the number of threads."""
        return "GPU" if self.device == "cuda" else f"{self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def key(self) -> tuple[str, str, str]:
        """The benchmark, case and place, which tell this result from others of the same machine."""
        return self.benchmark, self.case, self.place

    def time(self, name: str) -> float:
        """The median seconds of a contender's step."""
        return self.measurements[name].best_known.p50

    def ratio(self, name: str) -> float:
        """The median time of a contender over that of the baseline."""
        return self.time(name) / self.time(self.baseline)

    def fraction_of_ceiling(self, name: str) -> float | None:
        """The ceiling's median time over that of a contender; None where no ceiling was measured."""
        return self.time("ceiling") / self.time(name) if "ceiling" in self.measurements else None

    def fastest(self, kind: str) -> str | None:
        """The name of the fastest contender of a kind, or None if there is none."""
        return min((name for name in self.measurements if kind_of(name) == kind), key=self.time, default=None)

    def rate(self, name: str) -> tuple[str, str]:
        """The unit and the value of what a contender does a second: GB that a step must move, or samples."""
        if "bytes" in self.settings:
            return "GB/s", f"{self.settings['bytes'] / self.time(name) / 1e9:.1f}"
        return "samples/s", f"{self.settings['samples'] / self.time(name):,.0f}"


def kind_of(name: str) -> str:
    """The kind of a contender: the part of its name before the first comma."""
    return name.partition(",")[0]


MAX_BYTES = 64 << 20
"""The most bytes that are read of a file of results."""


def save(results: Sequence[Result], path: Path) -> None:
    """Writes results as JSON, one line for each."""
    lines = (json.dumps(dataclasses.asdict(each), allow_nan=False, ensure_ascii=False) for each in results)
    write_text(path, '{"results": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path: Path) -> list[Result]:
    """Reads results that `save` has written.

    Raises:
        OSError: the file cannot be read.
        FileError: it is not such a file.
    """
    try:
        results = json.loads(read_within(path, MAX_BYTES))["results"]
        for fields in results:
            for name, each in fields["measurements"].items():
                times = {key: each[key] and Quantiles(**each[key]) for key in ("seconds", "busy")}
                fields["measurements"][name] = Measurement(**{**each, **times})
        return [Result(**fields) for fields in results]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{path} holds no results of gut-fast bench ({shortened(repr(error))}); name another file or folder"
        ) from None


def add(results: Sequence[Result], folder: Path) -> Path:
    """Adds results to the JSON file of their machine in a folder, writes Markdown beside it, and returns the file.

    A new result takes the place of an old one of the same case. Both files are named after the processor, for example
    ``amd-epyc-zen-4.json``.

    Raises:
        OSError, ValueError: the file cannot be read or written, or is something else.
    """
    processor = re.sub(r"[^a-z0-9]+", "-", results[0].machine.partition(",")[0].lower()).strip("-")
    file = folder / f"{processor or 'machine'}.json"
    old = load(file) if file.exists() else []
    together = list({result.key: result for result in (*old, *results)}.values())
    save(together, file)
    write_text(file.with_suffix(".md"), markdown(together))
    return file


def describe(result: Result) -> str:
    """All that is to be said of a result: what was computed, where, the table, and what to think of the times."""
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    errors = [each.error for each in result.measurements.values() if each.error is not None]
    unchecked = [name for name, each in result.measurements.items() if each.error is None]
    lines = [
        f"\n{result.case} on {result.place}: {settings}",
        f"{result.machine}; {', '.join(f'{name} {version}' for name, version in result.versions.items())}",
        case_table(result),
        f"compared before it was timed: error {max(errors):.1g} of the largest entry",
        *([f"something else, so not compared: {', '.join(unchecked)}"] if unchecked else []),
    ]
    absent = [
        f"absent: {'; '.join(name for name, why in result.absent.items() if why == reason)}: {reason}"
        for reason in dict.fromkeys(result.absent.values())
    ]
    return "\n".join([*lines, *absent, *(f"NOISY: {doubt}" for doubt in result.doubts)])


def case_table(result: Result) -> str:
    """A Markdown table with a row for each contender of a case, the fastest first."""
    has_calls = any(each.busy for each in result.measurements.values())
    counts = list(dict.fromkeys(count for each in result.measurements.values() for count in each.counts))
    rows = []
    for name in sorted(result.measurements, key=result.time):
        each, (unit, rate) = result.measurements[name], result.rate(name)
        row = {"": name, "ms": _milliseconds(each.best_known.p50)}
        row["p10 – p90"] = f"{_milliseconds(each.best_known.p10)} – {_milliseconds(each.best_known.p90)}"
        row |= {"call ms": _milliseconds(each.seconds.p50)} if has_calls else {}
        row |= {unit: rate, **_of_ceiling(result, name), f"÷ {result.baseline}": f"{result.ratio(name):.2f}"}
        rows.append(row | {count: f"{each.counts.get(count, 0):.4g}" for count in counts})
    return _table(rows)


def summary(results: Sequence[Result]) -> str:
    """A Markdown table with a row for each result of one benchmark.

    The row has the baseline's time, rate and fraction of the ceiling, and for each kind of contender the time of its
    fastest one over the baseline's. A star marks a noisy run.
    """
    named = [name for result in results for name in result.measurements if name not in (result.baseline, "ceiling")]
    rows = []
    for result in results:
        base, (unit, rate) = result.baseline, result.rate(result.baseline)
        row = {"case": result.case + "*" * bool(result.doubts), "on": result.place}
        row |= {f"{base} ms": _milliseconds(result.time(base)), unit: rate, **_of_ceiling(result, base)}
        for kind in dict.fromkeys(map(kind_of, named)):
            fastest = result.fastest(kind)
            row[kind] = "" if fastest is None else f"{result.ratio(fastest):.2f}"
        rows.append(row)
    return _table(rows)


def markdown(results: Sequence[Result]) -> str:
    """All results as a document: a summary for each benchmark, and what they were measured on."""
    noisy = sum(bool(result.doubts) for result in results)
    parts = [
        "# Measured",
        "Medians of interleaved runs, each after a comparison. Columns without a unit count the times of others, the\n"
        "fastest of each kind, over the time in the third column. A star marks a run on a busy machine: "
        f"{noisy} of {len(results)}.",
    ]
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        parts += [f"## {benchmark}", summary([result for result in results if result.benchmark == benchmark])]
    machines = dict.fromkeys((re.sub(r"\d+ threads?, ", "", each.machine), str(each.versions)) for each in results)
    return "\n\n".join([*parts, *(f"Machine: {line}. Versions: {versions}." for line, versions in machines)]) + "\n"


def _of_ceiling(result: Result, name: str) -> dict[str, str]:
    fraction = result.fraction_of_ceiling(name)
    return {} if fraction is None else {"of ceiling": f"{fraction:.2f}"}


def _milliseconds(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:#.3g}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """An aligned Markdown table of rows by heading; where a row lacks a heading, the cell is empty."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    cells = [headings, *([row.get(heading, "") for heading in headings] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headings))]
    lines = [
        "| " + " | ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])
