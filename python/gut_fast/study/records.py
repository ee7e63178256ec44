"""The runs of a sweep one by one, for code that does not yet read the tables of `gut_fast.study.results`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gut_fast.distributed.files import replacing
from gut_fast.study.results import Results, lines_of, read_results
from gut_fast.study.run import Run
from gut_fast.study.sweep import Task

__all__ = ["Record", "read_records", "records_of", "write_record"]


@dataclass(frozen=True)
class Record:
    """A finished run with its place in a sweep.

    Records of the same `point` and seed are paired: they differ in their method alone.
    """

    method: str
    point: Mapping[str, Any]
    run: Run
    control_of: str | None = None
    versions: Mapping[str, str] | None = None
    machine: str = ""


def records_of(results: Results) -> list[Record]:
    """The rows of the tables as records, in the same order."""
    return [
        Record(
            row["method"],
            results.point(name),
            results.run(name),
            None if not isinstance(row["control_of"], str) else row["control_of"],
            json.loads(row["versions"]),
            row["machine"],
        )
        for name, row in results.runs.iterrows()
    ]


def read_records(folder: str | Path) -> list[Record]:
    """All finished runs of a sweep's folder, by their names. Raises as `read_results`."""
    return records_of(read_results(folder))


def write_record(record: Record, path: str | Path) -> None:
    """Writes the run as a file of its own, as earlier versions did."""
    task = Task(record.method, record.point, record.run.experiment, record.control_of)
    head, *rows = lines_of(task, record.run).splitlines(keepends=True)
    content = {**json.loads(head), "versions": dict(record.versions or {}), "machine": record.machine}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n" + "".join(rows), encoding="utf-8")
