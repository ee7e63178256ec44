"""Results of training across ranks as tables and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gut_fast.benchmark.across_run import AcrossResult
from gut_fast.benchmark.report import markdown_table
from gut_fast.study.summary import plain_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["describe", "lines", "markdown", "table"]

COLUMNS = ("", "ms", "p10 – p90", "÷ bound", "÷ DDP", "MB out", "CPU ms", "of CPUs")

GOAL = 1.15
"""The most that a step with overlap may take, in the larger of computation and communication."""

BUSY = 0.9
"""Of all processors; beyond it nothing can be hidden behind anything else."""

LEGEND = (
    "ms: a training step, median of turns, of the rank that takes longest; ÷ bound: to the larger of computation and "
    "communication, each alone",
    "MB out: of a rank's interface in a step, headers included; CPU ms: processor time of all ranks in a step; of "
    "CPUs: the part of all processors' time that this is",
)


def describe(result: AcrossResult) -> str:
    """What was trained, in a line."""
    over = result.link if result.link == "loopback" else f"{result.link} links"
    return f"{result.model}, {result.ranks} ranks × {result.samples} samples, {over}"


def table(result: AcrossResult) -> Table:
    """A row for each contender."""
    rows = _rows(result)
    result_table = plain_table(f"Across ranks: {describe(result)}", *COLUMNS)
    for row in rows:
        result_table.add_row(*row)
    return result_table


def _rows(result: AcrossResult) -> list[list[str]]:
    return [
        [
            name,
            _milliseconds(entry.seconds.p50),
            f"{_milliseconds(entry.seconds.p10)} – {_milliseconds(entry.seconds.p90)}",
            f"{result.to_bound(name):.2f}",
            f"{result.to_ddp(name):.2f}",
            f"{entry.bytes_out / 1e6:.3g}",
            _milliseconds(entry.cpu_seconds),
            f"{result.of_processors(name):.0%}",
        ]
        for name, entry in result.contenders.items()
    ]


def _milliseconds(seconds: float) -> str:
    """To three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def lines(result: AcrossResult) -> Iterator[str]:
    """What is to be said below the table."""
    worst = max(entry.error for entry in result.contenders.values())
    yield f"all equal to their recurrences: error {worst:.0e} of the largest parameter, bfloat16 messages included"
    size = 4 * result.numbers / 1e6
    yield (
        f"model: {result.numbers:,} parameters, {size:.3g} MB; each rank's messages in a step are degree × model size, "
        "as counted, for GUT as for DSGD"
    )
    yield from _goals(result)
    if result.ranks > result.processors:
        computing = result.contenders["computation"]
        yield (
            f"{result.ranks} ranks share {result.processors} processors: computation alone keeps "
            f"{result.of_processors('computation'):.0%} of them busy ({_milliseconds(computing.cpu_seconds)} ms of "
            "processor time in a step), and what messages cost the processors cannot be hidden behind it"
        )
    for name, reason in result.absent.items():
        yield f"absent: {name}: {reason}"
    for reason in result.disturbance.reasons():
        if "context switches" not in reason:
            yield f"NOISY RUN: {reason.replace('the ceiling', 'the steadiest contender')}"


def _goals(result: AcrossResult) -> Iterator[str]:
    for name in ("DSGD, overlap", "GUT, overlap"):
        to_bound, to_ddp = result.to_bound(name), result.to_ddp(name)
        is_full = result.of_processors(name) > BUSY
        note = ", the processors being busy all the time" if is_full and to_bound > GOAL else ""
        yield (
            f"{name}: {to_bound:.2f} of the bound, goal {GOAL:.2f} {_reached(to_bound <= GOAL)}{note}; "
            f"{to_ddp:.2f} of DDP, goal 1.00 {_reached(to_ddp <= 1.0)}"
        )


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT reached"


def markdown(results: Sequence[AcrossResult]) -> str:
    """All of it as a document."""
    parts = [
        "# Training steps across ranks, measured",
        "",
        "A process for each agent, one thread each, gloo; in turns of shuffled order, after everyone was compared with",
        "the recurrence it should compute. All have buckets of the same size, decent-dp whole MiB.",
        "",
        *(f"- {line}" for line in LEGEND),
        "- communication: `optimizer.step()` of DSGD with gradients at hand; bare sends: the same bytes, and nothing",
        '  done to them; decent-dp and "one peer": one neighbour a step, left and right in turn, half of those bytes.',
        "  decent-dp mixes parameters from before the gradient step, so that its messages travel during the next one.",
        '- on loopback our ranks read each other\'s messages in shared memory, but for those of "GUT, sockets";',
        "  shaped links stand for links between machines, and everything goes through them",
    ]
    for result in results:
        machine = ", ".join(part for part in result.machine.split(", ") if not part.endswith(("thread", "threads")))
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        parts += ["", f"## {describe(result)}", "", *markdown_table([list(COLUMNS), *_rows(result)]), ""]
        parts += [f"- {line}" for line in lines(result)]
        parts += [f"- buckets of {result.bucket_bytes / (1 << 20):g} MiB; {result.date}; {machine}; {versions}"]
    return "\n".join([*parts, ""])
