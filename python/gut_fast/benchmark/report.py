"""Results as tables: one of all contenders for each case, one line for each case, and that as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gut_fast.benchmark import overhead
from gut_fast.benchmark.comparison import NUM_STEPS
from gut_fast.benchmark.peers import FAMILIES
from gut_fast.benchmark.results import Result
from gut_fast.experiments.summary import plain_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COMPARED", "case_lines", "case_table", "describe", "markdown", "summary_table"]

COMPARED = {
    "sgd": "SGD",
    "compile": "compile",
    "eager": "eager",
    "scipy": "scipy",
    "jax": "JAX",
    "authors": "authors",
}
"""Families whose best contender stands in the summary, and their headings there."""


def describe(result: Result) -> str:
    """The case and what was timed, in a line."""
    tensors = f" in {result.tensors} tensors" if result.tensors > 1 else ""
    threads = f"{result.threads} thread{'s' * (result.threads != 1)}"
    columns = f"{result.columns:,} columns{tensors}"
    return f"{result.case}: {result.rule} on {result.topology}, {columns}, {result.storage}, {threads}"


def case_table(result: Result) -> Table:
    """All contenders of a case, the fastest first."""
    table = plain_table("", "", "median ms", "p10", "p90", "GB/s", "of ceiling", "× gut_fast")
    for name in sorted(result.contenders, key=lambda each: result.contenders[each].seconds.p50):
        seconds = result.contenders[name].seconds
        table.add_row(
            name,
            *(f"{1e3 * value:.3f}" for value in (seconds.p50, seconds.p10, seconds.p90)),
            f"{result.rate(name) / 1e9:.1f}",
            _fraction(result.fraction_of_ceiling(name)),
            f"{result.times_ours(name):.2f}",
            style="bold" if name == "gut_fast" else None,
        )
    return table


def case_lines(result: Result) -> Iterator[str]:
    """What is to be said below the table."""
    yield f"{result.bytes / 1e6:,.1f} MB in {result.streams} streams have to be moved; GB/s and fractions are of those"
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
        yield f"Python part of a step: {p50:.0f} µs ({p10:.0f} – {p90:.0f}), goal {1e6 * overhead.GOAL:.0f} µs"
    for reason in dict.fromkeys(result.absent.values()):
        names = [name for name, other in result.absent.items() if other == reason]
        yield f"absent: {'; '.join(names)}: {reason}"
    for reason in result.disturbance.reasons():
        yield f"NOISY RUN: {reason}"


def is_reached(result: Result) -> bool:
    """Whether our step is as fast as the case's goal asks, to two digits."""
    fraction = result.fraction_of_ceiling()
    return result.goal is not None and fraction is not None and round(fraction, 2) >= round(result.goal, 2)


def summary_table(results: Sequence[Result]) -> Table:
    """A line for each result: our time, rate and fraction of the ceiling, and how many times longer the others take."""
    header, *rows = _summary(results)
    table = plain_table("gut_fast, and how many times as long others take", *header)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: Sequence[Result]) -> str:
    """The same as a Markdown document, with what the columns mean and what it was measured on."""
    header, *rows = _summary(results)
    lines = [_row(header), _row(["---"] + ["---:"] * (len(header) - 1)), *map(_row, rows)]
    legend = [f"- {heading}: {FAMILIES[family]}" for family, heading in COMPARED.items() if heading in header]
    noisy = sum(bool(result.disturbance.reasons()) for result in results)
    machines = dict.fromkeys(_measured_on(result) for result in results)
    return "\n".join(
        [
            "# A step, measured",
            "",
            "Medians of interleaved runs in one process, each contender after a comparison with the float64 reference.",
            "“Of ceiling” is the time of a plain loop over the same streams of memory, divided by ours; the columns",
            "after it say how many times our time others take, the best of several formulations each. GB/s count",
            "what a step has to move. A star marks a run on a machine that was busy with other things.",
            "",
            *lines,
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


def _summary(results: Sequence[Result]) -> list[list[str]]:
    """A heading and a row for each result, as text; families nobody could take part with are left out."""
    families = {
        family: heading for family, heading in COMPARED.items() if any(result.best(family) for result in results)
    }
    rows = [["case", "threads", "ms", "GB/s", "of ceiling", "goal", *families.values(), "Python µs"]]
    for result in results:
        best = [result.best(family) for family in families]
        rows.append(
            [
                f"{result.case}{'*' * bool(result.disturbance.reasons())}",
                str(result.threads),
                f"{1e3 * result.ours:.2f}",
                f"{result.rate() / 1e9:.1f}",
                _fraction(result.fraction_of_ceiling()),
                _fraction(result.goal),
                *("" if name is None else f"{result.times_ours(name):.2f}" for name in best),
                "" if result.python_part is None else f"{1e6 * result.python_part.p50:.0f}",
            ]
        )
    return rows


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
