"""The finished runs of a sweep as two tables, and the files that keep them.

While a sweep runs, every run that ends is appended to ``runs.jsonl``, as a record of lines of JSON
(`gut_fast.study.records`). When the sweep is complete, ``runs.csv.zst`` takes the place of that file: one row for each
row of a history, with the columns of its run before it. `pandas.read_csv` reads it alone. `read_results` reads both,
and the folder ``runs`` of earlier versions, which holds a file of such lines for each run.

A damaged record is reported by a warning and not read, so the sweep runs it again.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import zstandard

from gut_fast.arguments import shown
from gut_fast.files import read_within, remove_leftovers, replacing
from gut_fast.kernels import machine
from gut_fast.rules import RULES
from gut_fast.study.experiment import Experiment
from gut_fast.study.records import HEAD, Record, ResultsError, object_of, record_lines, records_in
from gut_fast.study.run import Run
from gut_fast.study.sweep import Task

__all__ = [
    "LINES",
    "TABLE",
    "Results",
    "ResultsError",
    "append_run",
    "finished_runs",
    "lines_of",
    "read_results",
    "remove_half_written",
    "results_of",
    "write_table",
]

TABLE = "runs.csv.zst"
LINES = "runs.jsonl"
MAX_BYTES = 1 << 30
"""The most bytes that are read of ``runs.jsonl``, or of the table once it is unpacked: a million rows of histories."""

JSON_COLUMNS = ("point", "experiment", "versions")
RUN_COLUMNS = ("run", "method", "control_of", "seed", *JSON_COLUMNS, "engine", "seconds", "machine")
"""The columns of a run in ``runs.csv.zst``; those of the history follow."""

Row = Mapping[str, Any]
"""One row of a history, as `Simulator.evaluate` makes it."""


@dataclass(frozen=True)
class Results:
    """The finished runs of a sweep.

    Runs of the same ``point`` and seed are paired: they differ in their method alone.

    Attributes:
        runs: one row a run, indexed by the run's name: ``method``, ``control_of`` (the method for which this one is the
            control, or None), ``seed``, ``point`` (what the sweep varies beside methods and seeds, as JSON), ``engine``
            (the one that computed), ``seconds``, ``versions`` (JSON), ``machine``, then a column for each variable of
            the points and each setting: ``rule``, ``lr``, ``mu``, ``alpha``, ``topology``, … (NaN or None where a run
            does not have it).
        history: one row an evaluation: ``run``, ``step`` and the other columns of `Simulator.history`; numbers that
            are NaN or infinite are NaN.
        experiments: the settings of each run by its name.
    """

    runs: pd.DataFrame
    history: pd.DataFrame
    experiments: Mapping[str, Experiment]

    def run(self, name: str) -> Run:
        """The run with this name as `train` returned it."""
        rows = self.history[self.history["run"] == name].drop(columns="run").to_dict("records")
        return Run(self.experiments[name], rows, self.runs.loc[name, "engine"], self.runs.loc[name, "seconds"])

    def final(self) -> pd.DataFrame:
        """The last row of the history of each run, indexed by the run's name."""
        return self.history.groupby("run", sort=False).tail(1).set_index("run")


def lines_of(task: Task, run: Run) -> str:
    """The run as lines of JSON: what was run, with which versions, on this machine; then the rows of its history."""
    return record_lines(_head(task, run), run.history)


def _head(task: Task, run: Run) -> dict[str, Any]:
    return {
        "method": task.method,
        "point": dict(task.point),
        "control_of": task.control_of,
        "experiment": run.experiment.as_dict(),
        "engine": run.engine,
        "seconds": round(run.seconds, 2),
        "versions": machine.versions(),
        "machine": machine.machine_line(),
        "rows": len(run.history),
    }


def append_run(folder: Path, lines: str) -> None:
    """Appends the lines of a finished run, all or none; the caller is the folder's sole user.

    Raises:
        OSError: writing failed; the file is as it was.
    """
    with (folder / LINES).open("ab", buffering=0) as file:
        size, content = file.tell(), memoryview(lines.encode())
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(folder / LINES)) from error


def remove_half_written(folder: Path) -> None:
    """Removes the records of ``runs.jsonl`` that are damaged, or that a killed process has left half written."""
    file = folder / LINES
    remove_leftovers(file)
    remove_leftovers(folder / TABLE)
    if not file.exists():
        return
    records = records_in(read_within(file, MAX_BYTES), file)
    whole = [record for record in records if isinstance(_run_of(record), _Found)]
    if len(whole) < len(records):
        with replacing(file, durable=True) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for record in whole for line in record.lines))


def finished_runs(folder: Path) -> set[str]:
    """The names of the finished runs in a folder, which need not exist. Raises as `read_results`."""
    try:
        return set(read_results(folder).runs.index)
    except FileNotFoundError:
        return set()


def write_table(folder: Path) -> None:
    """Writes all runs of the folder as ``runs.csv.zst`` and removes ``runs.jsonl``. Raises as `read_results`."""
    results = read_results(folder)
    experiments = {name: json.dumps(one.as_dict(), ensure_ascii=False) for name, one in results.experiments.items()}
    runs = results.runs.assign(experiment=pd.Series(experiments)).reset_index()[list(RUN_COLUMNS)]
    with replacing(folder / TABLE, durable=True) as temporary:
        text = runs.merge(results.history, on="run", validate="one_to_many").to_csv(
            index=False, quoting=csv.QUOTE_NONNUMERIC
        )
        packed = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text.encode())
        temporary.write_bytes(packed)
    (folder / LINES).unlink(missing_ok=True)


def read_results(folder: str | Path) -> Results:
    """All finished runs of a sweep's folder, by their names.

    Raises:
        FileNotFoundError: there are none.
        OSError: a file cannot be read.
        ResultsError: a file is broken as a whole; the message names the file and the line.

    Warns:
        UserWarning: the record of a run is damaged, which counts as not run.
    """
    folder = Path(folder)
    sources: list[Iterable[_Found]] = []
    if (folder / TABLE).exists():
        sources.append(_read_table(folder / TABLE))
    if (folder / LINES).exists():
        sources.append(_read_lines(folder / LINES))
    sources += [_read_lines(file) for file in sorted((folder / "runs").glob("*.jsonl"))]
    found: dict[str, _Found] = {}
    for run in itertools.chain(*sources):
        found.setdefault(run.name, run)
    if not found:
        raise FileNotFoundError(f"{folder} holds no finished runs: there is no {TABLE} and no {LINES} with a whole run")
    return _results([run for _, run in sorted(found.items())])


def results_of(finished: Iterable[tuple[Task, Run]]) -> Results:
    """The results of runs that have just ended, in their order."""
    return _results([_Found(_head(task, run), run.experiment, run.history) for task, run in finished])


@dataclass(frozen=True)
class _Found:
    """A finished run as the files have it: its head, which says what was run, and the rows of its history."""

    head: Row
    experiment: Experiment
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the run, which follows from its settings."""
        return Task(self.head["method"], self.head["point"], self.experiment, self.head["control_of"]).name

    @property
    def columns(self) -> dict[str, Any]:
        """The run as a row of `Results.runs`."""
        settings = self.experiment.as_dict()
        options, hyperparameters = settings.pop("partition_options"), settings.pop("hyperparameters")
        settings = {**settings, **options, **hyperparameters, **self.head["point"]}
        own = {name: self.head[name] for name in ("method", "control_of", "engine", "seconds", "machine")}
        own |= {name: json.dumps(self.head[name], ensure_ascii=False) for name in ("point", "versions")}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return {**own, "seed": self.experiment.seed, **{key: plain[key] for key in plain if key not in own}}


def _results(found: Sequence[_Found]) -> Results:
    names = [run.name for run in found]
    runs = pd.DataFrame([run.columns for run in found], index=pd.Index(names, name="run"))
    rows = [{"run": name, **row} for name, run in zip(names, found, strict=True) for row in run.rows]
    return Results(runs, pd.DataFrame(rows), {name: run.experiment for name, run in zip(names, found, strict=True)})


def _read_table(path: Path) -> Iterator[_Found]:
    try:
        yield from _runs_in_table(path)
    except ResultsError as error:
        raise ResultsError(f"{error}; put a copy of it back, or remove it and its runs are run again") from error


def _runs_in_table(path: Path) -> Iterator[_Found]:
    try:
        text = _unpacked(path)
        table = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, index_col=False)
    except (zstandard.ZstdError, ValueError, OverflowError) as error:
        raise ResultsError(f"{path} cannot be read as a table of runs: {error}") from error
    if missing := [name for name in (*RUN_COLUMNS, "step") if name not in table]:
        raise ResultsError(f"{path}, line 1: this is not a table of runs; there is no column {', '.join(missing)}")
    numbers = table.columns.drop(list(RUN_COLUMNS))
    for _, part in table.groupby("run", sort=False):
        head, place = part.iloc[0].to_dict(), f"{path}, line {part.index[0] + 2}"
        head |= {name: object_of(head[name], place) for name in JSON_COLUMNS}
        head |= {"control_of": head["control_of"] or None, "seconds": _number(head["seconds"], place)}
        rows = [
            {name: _number(text, f"{path}, line {index + 2}") for name, text in zip(numbers, row, strict=True)}
            for index, *row in part[numbers].itertuples(name=None)
        ]
        yield _found(head, rows, place)


def _unpacked(path: Path) -> bytes:
    """The content of a compressed file, whose check sum is right. Raises zstandard.ZstdError or ValueError."""
    packed = read_within(path, MAX_BYTES)
    with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
        if len(reader.read(MAX_BYTES + 1)) > MAX_BYTES:
            raise ValueError(f"it holds more than {MAX_BYTES:,} bytes")
    stream = zstandard.ZstdDecompressor().decompressobj()
    text = stream.decompress(packed)
    if not stream.eof:
        raise ValueError("it is truncated")
    return text


def _number(text: str, place: str) -> Any:
    """The number exactly as it was written, an integer if it was one; NaN for nothing."""
    try:
        number = json.loads(text) if text else math.nan
    except (ValueError, RecursionError):
        number = None
    if type(number) not in (int, float):
        raise ResultsError(f"{place}: {shown(text)} is not a number")
    return number


def _read_lines(path: Path) -> list[_Found]:
    """The whole runs of a file of records. A kill may have left half a run at the end; other damage gives a warning.

    Raises:
        OSError: the file cannot be read.
        ResultsError: it is no file of records at all.
    """
    runs = [(record, _run_of(record)) for record in records_in(read_within(path, MAX_BYTES), path)]
    for record, run in runs:
        if isinstance(run, ResultsError):
            if not any(HEAD.match(line) for each, _ in runs for line in each.lines) and record.lines:
                raise run
            if record is not runs[-1][0] or record.has_end:
                warnings.warn(f"{run}; it is not read, and the sweep runs it again", stacklevel=2)
    return [run for _, run in runs if isinstance(run, _Found)]


def _run_of(record: Record) -> _Found | ResultsError:
    """The run of a record, or what is wrong with it."""
    try:
        return _found(*record.content(), record.place)
    except ResultsError as error:
        return error


def _found(head: Row, rows: list[dict[str, Any]], place: str) -> _Found:
    try:
        found = _Found(head, _experiment(head["experiment"]), rows)
        steps = [row["step"] for row in rows]
        if not found.name or not found.columns or steps != sorted(steps):
            raise ValueError("the rows of the history are not in the order of their steps")
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{place}: {type(error).__name__} {error}") from error
    return found


def _experiment(entries: Row) -> Experiment:
    """The settings of a run; a rule that is not known here is taken as it was checked where it ran."""
    if entries["rule"] in RULES:
        return Experiment(**entries)
    experiment = Experiment(**{**entries, "rule": "dsgd", "hyperparameters": {}})
    for name in ("rule", "hyperparameters"):
        object.__setattr__(experiment, name, entries[name])
    return experiment
