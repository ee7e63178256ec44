"""Finished runs as files of JSON lines: the first line says what was run and with what, the others are its history."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gut_fast.distributed.files import replacing
from gut_fast.rules import RULES
from gut_fast.simulation.history import json_line
from gut_fast.study.runner import Experiment, Run

__all__ = ["RUNS", "Record", "read_record", "read_records", "record_file", "write_record"]

FORMAT = "gut_fast run 1"
RUNS = "runs"
"""The folder of the records within that of a sweep."""


def record_file(folder: Path, name: str) -> Path:
    """Where in a sweep's folder the record of the run of that name is."""
    return folder / RUNS / f"{name}.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished run with its place in a sweep.

    Records of the same `point` and seed are paired: they differ in their method alone.
    """

    method: str
    """The label of the method."""
    point: Mapping[str, Any]
    """What the sweep varies beside methods and seeds, such as ``{"alpha": 0.1}``."""
    run: Run
    control_of: str | None = None
    """The method for which this one is the control, for example QG-DSGDm with momentum β + μ for QG-GUTm."""
    versions: Mapping[str, str] | None = None
    machine: str = ""


def write_record(record: Record, path: str | Path) -> None:
    """Writes the file whole or not at all. JSON has no NaN and no infinity: they become null."""
    head = {
        "format": FORMAT,
        "method": record.method,
        "point": dict(record.point),
        "control_of": record.control_of,
        "experiment": record.run.experiment.as_dict(),
        "engine": record.run.engine,
        "seconds": round(record.run.seconds, 2),
        "versions": dict(record.versions or {}),
        "machine": record.machine,
    }
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, (head, *record.run.history)))


def read_record(path: str | Path) -> Record:
    """What `write_record` wrote; null becomes NaN.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not the record of a run; the message names file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is not the record of a run ({error})") from error
    head, *rows = (_parsed(line, path, number) for number, line in enumerate(lines or [""], 1))
    if head.get("format") != FORMAT:
        raise ValueError(f"{path}, line 1: this is not the record of a run ({FORMAT!r})")
    if not rows:
        raise ValueError(f"{path} holds no history, only its first line; delete it, and the sweep runs it again")
    try:
        run = Run(_experiment(head["experiment"]), list(map(_with_nan, rows)), head["engine"], head["seconds"])
        return Record(head["method"], head["point"], run, head["control_of"], head["versions"], head["machine"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line 1: {type(error).__name__} {error}") from error


def _experiment(entries: Mapping[str, Any]) -> Experiment:
    """That of a record; a rule that is not known here is taken as it was checked where it ran."""
    if entries["rule"] in RULES:
        return Experiment(**entries)
    experiment = Experiment(**{**entries, "rule": "dsgd", "hyperparameters": {}})
    for name in ("rule", "hyperparameters"):
        object.__setattr__(experiment, name, entries[name])
    return experiment


def read_records(folder: str | Path) -> list[Record]:
    """All finished runs of a sweep's folder, by the names of their files.

    Raises:
        FileNotFoundError: there are none.
        OSError, ValueError: as `read_record`.
    """
    pattern = record_file(Path(folder), "*")
    files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise FileNotFoundError(f"{folder} holds no finished runs: there is no {pattern}")
    return list(map(read_record, files))


def _parsed(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line {number}: expected an object, got {type(content).__name__}")
    return content


def _with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}
