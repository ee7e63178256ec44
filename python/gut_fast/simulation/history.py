"""A run's history, a list of dicts with one per evaluation, as files that are written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gut_fast.distributed.files import replacing

__all__ = ["json_line", "write_csv", "write_json_lines"]


def write_csv(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes one line per row under a line of names; a value that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


def write_json_lines(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes one JSON object per row and line. JSON has no NaN and no infinity: they become null."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, history))


def json_line(row: Mapping[str, Any]) -> str:
    """The row as a line of JSON, NaN and infinity as null."""
    content = {name: _finite(value) for name, value in row.items()}
    return json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
