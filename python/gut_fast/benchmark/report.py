"""Results as tables: one of all contenders for each case, one line for each case, and that as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gut_fast.benchmark import overhead
from gut_fast.benchmark.comparison import NUM_STEPS
from gut_fast.benchmark.peers import FAMILIES
from gut_fast.benchmark.results import Result
from gut_fast.study.summary import plain_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "COMPARED",
    "case_lines",
    "case_rows",
    "case_table",
    "describe",
    "is_reached",
    "markdown",
    "markdown_table",
    "summary_rows",
    "summary_table",
    "text_table",
]

COMPARED = {
    "backend": "other backend",
    "graph": "graph",
    "sgd": "SGD",
    "compile": "compile",
    "eager": "eager",
    "scipy": "scipy",
    "jax": "JAX",
    "authors": "authors",
}
"""Families whose best contender stands in the summary, and their headings there."""


ON_A_CPU = ("“Of ceiling” is the time of a plain loop over the same streams of memory, divided by ours; the columns",)
ON_A_GPU = (
    "“ms” is what the GPU is busy with, by events around steps that were queued while it slept; “call ms” what a loop",
    "of steps takes, many of them queued and waited for once. “Of ceiling” is the time that a large copy takes for the",
    "same bytes, read and written, divided by ours (ms); nothing is read from the L2, but for peers on small models,",
    "whose own buffers may be there. Where there are two numbers, the second is for calls. The columns",
)


def describe(result: Result) -> str:
    """The case and what was timed, in a line."""
    tensors = f" in {result.tensors} tensors" if result.tensors > 1 else ""
    columns = f"{result.columns:,} columns{tensors}"
    return f"{result.case}: {result.rule} on {result.topology}, {columns}, {result.storage}, {result.place}"


def case_rows(result: Result) -> list[list[str]]:
    """A heading, and all contenders of a case, the fastest first; on a GPU with what a caller waits for at the end."""
    has_calls = result.device != "cpu"
    calls = ("call ms", "× gut_fast") if has_calls else ()
    rows = [["", "median ms", "p10", "p90", "GB/s", "of ceiling", "× gut_fast", *calls]]
    for name in sorted(result.contenders, key=lambda each: result.contenders[each].of_memory.p50):
        entry = result.contenders[name]
        seconds = entry.of_memory
        rows.append(
            [
                name,
                *(f"{1e3 * value:.3f}" for value in (seconds.p50, seconds.p10, seconds.p90)),
                f"{result.rate(name) / 1e9:.1f}",
                _fraction(result.fraction_of_ceiling(name)),
                f"{result.times_ours(name):.2f}",
                *((f"{1e3 * entry.seconds.p50:.3f}", f"{result.times_our_call(name):.2f}") if has_calls else ()),
            ]
        )
    return rows


def case_table(result: Result) -> Table:
    """The same for a terminal."""
    header, *rows = case_rows(result)
    table = plain_table("", *header)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "gut_fast" else None)
    return table


def case_lines(result: Result) -> Iterator[str]:
    """What is to be said below the table."""
    yield f"{result.bytes / 1e6:,.1f} MB in {result.streams} streams have to be moved; GB/s and fractions are of those"
    if result.device != "cpu":
        yield from _gpu_lines(result)
    errors = [entry.error for entry in result.contenders.values() if entry.error is not None]
    if errors:
        columns = "all" if result.compared_columns == result.columns else f"{result.compared_columns:,}"
        yield f"equal to the float64 reference over {NUM_STEPS} steps, {columns} columns: error {max(errors):.1g}"
    unchecked = [name for name, entry in result.contenders.items() if entry.error is None]
    if unchecked:
        yield f"without gossip, so not compared: {', '.join(unchecked)}"
    if result.goal is not None:
        yield f"goal {result.goal:.2f} of the ceiling: {'reached' if is_reached(result) else 'NOT reached'}"
    if result.python_part is not None:
        part = result.python_part
        p10, p50, p90 = (1e6 * seconds for seconds in (part.p10, part.p50, part.p90))
        what = "Python part of a step" if result.device == "cpu" else "a step is queued in"
        yield f"{what}: {p50:.0f} µs ({p10:.0f} – {p90:.0f}), goal {1e6 * overhead.GOAL:.0f} µs"
    for reason in dict.fromkeys(result.absent.values()):
        names = [name for name, other in result.absent.items() if other == reason]
        yield f"absent: {'; '.join(names)}: {reason}"
    for reason in result.disturbance.reasons():
        yield f"NOISY RUN: {reason}"


def _gpu_lines(result: Result) -> Iterator[str]:
    yield f"backend {result.backend}; ms: what the GPU is busy with; call: what a loop of steps takes"
    if result.ceiling is not None:
        yield f"ceiling: a large copy, {result.rate('ceiling') / 1e9:,.0f} GB/s read and written, scaled to those bytes"
    if result.sets > 1:
        yield f"{result.sets} sets of our buffers take turns, so that nothing is read from the L2"


def is_reached(result: Result) -> bool:
    """Whether our step is as fast as the case's goal asks, to two digits."""
    fraction = result.fraction_of_ceiling()
    return result.goal is not None and fraction is not None and round(fraction, 2) >= round(result.goal, 2)


def summary_table(results: Sequence[Result]) -> Table:
    """A line for each result: our time, rate and fraction of the ceiling, and how many times longer the others take."""
    header, *rows = summary_rows(results)
    table = plain_table("gut_fast, and how many times as long others take", *header)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: Sequence[Result]) -> str:
    """The same as a Markdown document, with what the columns mean and what it was measured on."""
    header, *_ = rows = summary_rows(results)
    legend = [f"- {heading}: {FAMILIES[family]}" for family, heading in COMPARED.items() if heading in header]
    noisy = sum(bool(result.disturbance.reasons()) for result in results)
    machines = dict.fromkeys(_measured_on(result) for result in results)
    return "\n".join(
        [
            "# A step, measured",
            "",
            "Medians of interleaved runs in one process, each contender after a comparison with the float64 reference.",
            *(ON_A_CPU if results[0].device == "cpu" else ON_A_GPU),
            "after it say how many times our time others take, the best of several formulations each. GB/s count",
            "what a step has to move. A star marks a run on a machine that was busy with other things.",
            "",
            *markdown_table(rows),
            "",
            *legend,
            "",
            *([f"{noisy} of {len(results)} runs were disturbed."] if noisy else []),
            *(f"Measured on {line}" for line in machines),
            "",
        ]
    )


def _measured_on(result: Result) -> str:
    machine = ", ".join(part for part in result.machine.split(", ") if not part.endswith(("thread", "threads")))
    return f"{machine}; {', '.join(f'{name} {version}' for name, version in result.versions.items())}."


def summary_rows(results: Sequence[Result]) -> list[list[str]]:
    """A heading and a row for each result, as text; families nobody could take part with are left out."""
    families = {
        family: heading for family, heading in COMPARED.items() if any(result.best(family) for result in results)
    }
    is_gpu = any(result.device != "cpu" for result in results)
    place = ["backend"] if is_gpu else ["threads"]
    calls = ["call ms"] if is_gpu else []
    rows = [["case", *place, "ms", *calls, "GB/s", "of ceiling", "goal", *families.values(), "Python µs"]]
    for result in results:
        best = [result.best(family) for family in families]
        rows.append(
            [
                f"{result.case}{'*' * bool(result.disturbance.reasons())}",
                result.backend if is_gpu else str(result.threads),
                f"{1e3 * result.ours:.{3 if is_gpu else 2}f}",
                *([f"{1e3 * result.contenders['gut_fast'].seconds.p50:.3f}"] if is_gpu else []),
                f"{result.rate() / 1e9:.1f}",
                _fraction(result.fraction_of_ceiling()),
                _fraction(result.goal),
                *("" if name is None else _times(result, name) for name in best),
                "" if result.python_part is None else f"{1e6 * result.python_part.p50:.0f}",
            ]
        )
    return rows


def _times(result: Result, name: str) -> str:
    """How many times our time a contender's is; on a GPU the same of calls, too."""
    times = f"{result.times_ours(name):.2f}"
    return times if result.device == "cpu" else f"{times} / {result.times_our_call(name):.2f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first row the heading."""
    header, *others = rows
    return [_row(header), _row(["---"] + ["---:"] * (len(header) - 1)), *map(_row, others)]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The same in columns of their own width: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
