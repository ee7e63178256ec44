"""What was found, as a table, in a sentence, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gut_fast.kernels import machine
from gut_fast.study import summary
from gut_fast.verify.comparison import Line, Result
from gut_fast.verify.lockstep import LIMIT

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["as_json", "conclusion", "failures", "legend", "not_compared", "table"]

MAX_FAULTS = 3
"""So many of a line are shown."""


def table(result: Result) -> Table:
    """A line for each rule, backend and precision."""
    lines = summary.plain_table(
        "Every rule beside the reference", "rule", "backend", "precision", "error", "checks", "verdict", "worst on"
    )
    for column in (*lines.columns[1:3], lines.columns[-1]):
        column.justify = "left"
    for line in result.lines:
        verdict = "right" if line.passed else "WRONG"
        cells = (line.rule, line.where, line.precision, _size(line.error), f"{line.num_comparisons}", verdict)
        lines.add_row(*cells, line.worst_case, style=None if line.passed else "bold red")
    summary.keep_whole(lines, but="worst on")
    lines.columns[-1].no_wrap = True
    return lines


def legend(tiers: Sequence[str], threads: Sequence[int], devices: Sequence[str] = ("cpu",)) -> str:
    """What the columns of the table are; tiers and thread counts are those that had to give the same bits."""
    text = (
        f"error: the largest, in units of what plain PyTorch loses; right is at most {LIMIT:g}\n"
        "precision: of the parameters, after a slash that of the state\n"
        "checks: tensors compared, parameters and every state\n"
        "published: the reference beside the form in the paper\n"
        f"cpu: the same bits in tiers {', '.join(tiers) or 'none'} and on {', '.join(map(str, threads))} threads"
    )
    others = [device for device in devices if device != "cpu"]
    return "\n".join([text, *(f"{device}: the same bits a second time" for device in others)])


def not_compared(result: Result) -> list[str]:
    """What no backend, or not this one, serves here, and why."""
    return [
        f"not compared: {backend} in {', '.join(precisions)}: {reason}"
        for (backend, reason), precisions in result.missing.items()
    ]


def failures(result: Result) -> list[str]:
    """What is wrong, one line each."""
    texts = []
    for line in result.lines:
        faults = line.faults[:MAX_FAULTS]
        if len(line.faults) > MAX_FAULTS:
            faults.append(f"and {len(line.faults) - MAX_FAULTS} more of this kind")
        if not line.error <= LIMIT:
            faults.insert(0, f"{line.worst_case}: error {_size(line.error)}, more than {LIMIT:g}")
        texts += [f"WRONG: {line.rule} on {line.where} in {line.precision}: {fault}" for fault in faults]
    return texts


def conclusion(result: Result, seconds: float) -> str:
    """The last sentence."""
    wrong = [line for line in result.lines if not line.passed]
    checks = sum(line.num_comparisons for line in result.lines)
    rules = list(dict.fromkeys(line.rule for line in (wrong or result.lines)))
    if wrong:
        return (
            f"{len(wrong)} of {len(result.lines)} lines are WRONG: {', '.join(rules)}; do not trust this installation"
        )
    return f"right: {checks:,} comparisons of {len(rules)} rule{'s' * (len(rules) > 1)} in {seconds:.0f} s"


def as_json(result: Result, seconds: float, seed: int, full: bool) -> dict[str, Any]:
    """All there is to know; an error that is not finite is null."""
    return {
        "passed": result.passed,
        "limit": LIMIT,
        "seed": seed,
        "full": full,
        "seconds": round(seconds, 1),
        "versions": machine.versions(),
        "machine": machine.machine_line(),
        "lines": [_plain(line) for line in result.lines],
        "not compared": not_compared(result),
    }


def _plain(line: Line) -> dict[str, Any]:
    error = line.error if math.isfinite(line.error) else None
    return {**asdict(line), "error": error, "passed": line.passed}


def _size(error: float) -> str:
    return f"{error:.2f}" if error < 1000 else f"{error:.0e}"
