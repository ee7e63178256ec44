"""A file of what has been found, whole at every moment."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

__all__ = ["ABSENT", "DONE", "FAILED", "WRONG", "Budget", "Notes", "say"]

DONE, WRONG, FAILED, ABSENT = "done", "wrong", "failed", "absent"
"""How a part has ended: measured, found something wrong, broke off, or could not be begun here."""


class Notes:
    """What the parts have found, as JSON, written after every entry: what there is survives a part that is ended.

    JSON has no NaN and no infinity: they become null.

    Only one process writes at a time: the one that starts the parts, or the part it waits for.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Any]:
        """Everything: ``parts``, each with its ``status``, ``seconds`` and what it has put there."""
        if not self.file.exists():
            return {"parts": {}}
        content: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return content

    def forget(self, part: str) -> None:
        """Drops what a part has found before."""
        content = self.read()
        content["parts"].pop(part, None)
        self._write(content)

    def put(self, part: str, **entries: Any) -> None:
        """Sets entries of a part."""
        content = self.read()
        content["parts"].setdefault(part, {}).update(entries)
        self._write(content)

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.file.with_suffix(".new")
        text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.file)

    def status(self, part: str) -> str | None:
        """How a part has ended; None if it has not."""
        status: str | None = self.read()["parts"].get(part, {}).get("status")
        return status


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Budget:
    """Seconds that may be spent."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self._end - time.monotonic()

    def share(self, *, of: int) -> float:
        """An equal share of what is left."""
        return max(0.0, self.left) / max(of, 1)


def say(started: float, text: str) -> None:
    """A line of progress, with the seconds since `started`, a time of `time.time`."""
    print(f"[{time.time() - started:4.0f} s] {text}", flush=True)
