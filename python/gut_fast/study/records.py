"""Records of finished runs, as lines of JSON: what was run, the rows of its history, and a last line with a check sum.

The last line says that the record is whole, how many lines come before it, and their SHA-256. So a record that is cut
off, or of which a byte has changed, is told from one that was written so, and the records around it can be read.
Records of earlier versions have no such line; they are read as before, by the number of their rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gut_fast.arguments import shortened
from gut_fast.files import FileError
from gut_fast.simulation.files import json_line

__all__ = ["Record", "ResultsError", "object_of", "record_lines", "records_in"]

FORMAT = "gut_fast run 2"
FORMAT_WITHOUT_END = "gut_fast run 1"
"""The format of the first line of a record, and that of earlier versions."""

HEAD = re.compile(rb'\s*\{\s*"format": ?"gut_fast run \d')
END = re.compile(rb'\s*\{\s*"end": ?')
"""How the first and the last line of a record begin."""


class ResultsError(FileError):
    """A file does not hold what a sweep has written; the message names the file and the line."""


@dataclass
class Record:
    """The lines of a record in a file, without their ends.

    Attributes:
        path: the file.
        number: the number of the first line in it.
        lines: the lines that have an end.
        is_cut_off: whether another follows that has none, at the end of the file.
    """

    path: object
    number: int
    lines: list[bytes] = field(default_factory=list)
    is_cut_off: bool = False

    @property
    def place(self) -> str:
        """The file and the number of the first line."""
        return f"{self.path}, line {self.number}"

    @property
    def has_end(self) -> bool:
        """True if the last line says that it is the last."""
        return not self.is_cut_off and bool(END.match(self.lines[-1]))

    def content(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Returns the first line and the rows of the history. Raises ResultsError if they are not as they were."""
        if not self.lines or not HEAD.match(self.lines[0]):
            raise ResultsError(f"{self.place}: this is not the head of a run ({FORMAT!r})")
        head = object_of(self.lines[0], self.place)
        if head.get("format") == FORMAT_WITHOUT_END:
            lines = self.lines[1:]
        elif head.get("format") == FORMAT and self.has_end and self.lines[-1] == _end(self.lines[:-1]):
            lines = self.lines[1:-1]
        else:
            raise ResultsError(f"{self.place}: the record of this run is damaged, its check sum is wrong or missing")
        rows = [object_of(line, f"{self.path}, line {self.number + index}") for index, line in enumerate(lines, 1)]
        expected = head.get("rows", len(rows) or 1)
        if len(rows) != expected or (self.is_cut_off and "rows" not in head):
            raise ResultsError(f"{self.place}: the history of this run has {len(rows)} rows, not {expected}")
        return head, [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def record_lines(head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """The record as text: the head, which says its own ``format``, the rows, and the last line."""
    lines = [json_line(line).rstrip("\n") for line in ({"format": FORMAT, **head}, *rows)]
    return "\n".join([*lines, _end([line.encode() for line in lines]).decode(), ""])


def _end(lines: Sequence[bytes]) -> bytes:
    """The last line of a record of these lines."""
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    return json_line({"end": len(lines), "sha256": digest}).rstrip("\n").encode()


def records_in(content: bytes, path: object) -> list[Record]:
    """Divides the content of a file into records, whole ones and others.

    A record begins with a line that says so, or after the last line of another, and a last line ends it.
    """
    found: list[Record] = []
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not found or HEAD.match(line) or found[-1].has_end:
            found.append(Record(path, number))
        found[-1].lines.append(line)
    if rest:
        if not found or HEAD.match(rest) or found[-1].has_end:
            found.append(Record(path, len(lines) + 1))
        found[-1].is_cut_off = True
    return found


def object_of(text: str | bytes, place: str) -> dict[str, Any]:
    """The object that a line of JSON says. Raises ResultsError if it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{place}: not JSON ({shortened(str(error))})") from error
    if not isinstance(content, dict):
        raise ResultsError(f"{place}: expected an object, got {type(content).__name__}")
    return content
