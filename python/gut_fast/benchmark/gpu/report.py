"""What the parts have found, as text, as Markdown, and as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gut_fast.benchmark import report, results, train_report, train_run
from gut_fast.benchmark.results import Result
from gut_fast.benchmark.train_run import TrainingResult

__all__ = ["draw", "markdown", "step_results", "text", "training_results"]

Rows = list[list[str]]
Found = dict[str, Any]

PEER_GOALS = {"sgd": 1.0, "compile": 3.0, "eager": 10.0}
"""How many times our time these are to take at least."""

BACKEND_GOAL = 1.1
"""The most that one of the compiled backends may take of the other's time."""


def step_results(found: Found) -> list[Result]:
    """Of all cases; where a case was also timed beside all peers, that result."""
    alone, beside = (results.from_json(found["parts"].get(part, {}).get("results", [])) for part in ("steps", "peers"))
    return results.merge(alone, beside)


def training_results(found: Found) -> list[TrainingResult]:
    """Of all models and numbers of agents."""
    return train_run.from_json(found["parts"].get("training", {}).get("results", []))


def text(found: Found) -> str:
    """Everything for a terminal."""
    blocks = []
    for title, rows, lines in _sections(found):
        table = [report.text_table(rows)] if rows else []
        blocks.append("\n".join([title.upper(), *table, *lines]))
    return "\n\n".join(blocks) + "\n"


def markdown(found: Found, pictures: Sequence[str] = ()) -> str:
    """The same as a document, with the pictures of these files."""
    lines = ["# Measured on a GPU", ""]
    for title, rows, notes in _sections(found):
        table = report.markdown_table(rows) if rows else []
        lines += [f"## {title}", "", *table, *([""] if table else []), *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in pictures), ""])


def draw(found: Found, folder: Path) -> list[Path]:
    """Writes JSON, Markdown and pictures into a folder, named after the device; returns what was written.

    Raises:
        ValueError: no part has measured anything.
    """
    from gut_fast.benchmark.pictures import draw_results

    steps, training = step_results(found), training_results(found)
    if not steps and not training:
        raise ValueError("neither steps nor training have been measured; there is nothing to draw")
    stem = folder / f"gpu-{results.machine_slug((steps or training)[0].machine)}"
    written = []
    if any(result.ceiling is not None for result in steps):
        written.append(stem.with_name(f"{stem.name}.png"))
        draw_results(steps, written[-1])
    if training:
        written.append(stem.with_name(f"{stem.name}-training.png"))
        train_report.draw_training_speed(training, written[-1])
    page = stem.with_name(f"{stem.name}.md")
    page.write_text(markdown(found, [picture.name for picture in written]), encoding="utf-8")
    return [*written, page]


def _sections(found: Found) -> Iterator[tuple[str, Rows, list[str]]]:
    """Title, table and lines of each section that has something to say."""
    parts = found["parts"]
    yield "Parts", _part_rows(parts), list(_problems(parts))
    if "machine" in parts.get("environment", {}):
        yield "Environment", [], list(_environment(parts["environment"]))
    if steps := step_results(found):
        yield "Steps", report.summary_rows(steps), list(_step_lines(steps))
    if training := training_results(found):
        yield "Training", train_report.summary_rows(training), list(_training_lines(training))
    if "lines" in parts.get("verify", {}):
        yield "Verify", [], list(_verify_lines(parts["verify"]))
    if "entries" in parts.get("determinism", {}):
        yield "Determinism", _determinism_rows(parts["determinism"]), []
    if parts.get("ncu", {}).get("kernels"):
        kernels = parts["ncu"]["kernels"]
        yield "Nsight Compute", [list(kernels[0]), *([*kernel.values()] for kernel in kernels)], []


def _part_rows(parts: Found) -> Rows:
    rows = [[name, part.get("status", "not ended"), f"{part.get('seconds', 0):.0f}"] for name, part in parts.items()]
    return [["part", "ended", "s"], *rows]


def _problems(parts: Found) -> Iterator[str]:
    for name, part in parts.items():
        for key in ("problem", "reason"):
            if key in part:
                yield f"{name}: {part[key]}"
        yield from (f"{name}: {thing}: {problem}" for thing, problem in part.get("failures", {}).items())
        if "not_reached" in part:
            yield f"{name}: no time for {', '.join(part['not_reached'])}"


def _environment(part: Found) -> Iterator[str]:
    yield part["machine"]
    yield " · ".join(f"{name} {version}" for name, version in part["versions"].items())
    if part["nvcc"] is not None:
        yield f"nvcc: {part['nvcc']}"
    if part["nvidia_smi"] is not None:
        yield ", ".join(f"{name} {value}" for name, value in part["nvidia_smi"].items())
    for name, reason in part["backends"].items():
        yield f"backend {name}: {'serves this device' if reason is None else reason}"


def _step_lines(steps: Sequence[Result]) -> Iterator[str]:
    """The ceiling itself, goals that were missed, and what is to be known of the times."""
    rates = [result.rate("ceiling") / 1e9 for result in steps if result.ceiling is not None]
    if rates:
        yield f"the ceiling moves {min(rates):,.0f} to {max(rates):,.0f} GB/s, read and written"
    with_goals = [result for result in steps if result.goal is not None and result.ceiling is not None]
    missed = [result for result in with_goals if not report.is_reached(result)]
    if with_goals:
        yield f"{len(with_goals) - len(missed)} of {len(with_goals)} goals beside it are reached"
    for result in missed:
        fraction = result.fraction_of_ceiling() or 0.0
        yield f"{result.case}: {fraction:.2f} of the ceiling, goal {result.goal:.2f}, NOT reached"
    for result in steps:
        yield from _peer_goals(result) if result.device != "cpu" else ()
        ours = {name: reason for name, reason in result.absent.items() if name.startswith("gut_fast")}
        yield from (f"{result.case}: without {name}: {reason}" for name, reason in ours.items())
        yield from (f"{result.case}: noisy: {reason}" for reason in result.disturbance.reasons())


def _peer_goals(result: Result) -> Iterator[str]:
    for family, goal in PEER_GOALS.items():
        name = result.best(family)
        if name is not None and round(result.times_ours(name), 2) < goal:
            yield f"{result.case}: {name} takes {result.times_ours(name):.2f} times as long, goal {goal:g}, NOT reached"
    name = result.best("backend")
    if name is not None and not 1 / BACKEND_GOAL <= result.times_ours(name) <= BACKEND_GOAL:
        yield f"{result.case}: {name} takes {result.times_ours(name):.2f} times as long as {result.backend}"


def _training_lines(training: Sequence[TrainingResult]) -> Iterator[str]:
    for result in training:
        for line in train_report.goal_lines(result):
            yield f"{train_report.describe(result)}: {line}"


def _verify_lines(part: Found) -> Iterator[str]:
    lines = part["lines"]
    wrong = [line for line in lines if not line["passed"]]
    checks, rules = sum(line["num_comparisons"] for line in lines), {line["rule"] for line in lines}
    backends = dict.fromkeys(f"{line['backend']} in {line['precision']}" for line in lines)
    yield f"{checks:,} comparisons of {len(rules)} rules, {len(lines) - len(wrong)} of {len(lines)} lines right"
    yield f"compared: {', '.join(backends)}"
    for line in wrong:
        what = "; ".join([f"{line['worst_case']}: error {_size(line['error'])}", *line["faults"][:1]])
        yield f"WRONG: {line['rule']} on {line['backend']} in {line['precision']}: {what}"


def _determinism_rows(part: Found) -> Rows:
    rows = [
        [
            f"{entry['rule']}, {entry['backend']}",
            "yes" if entry["same bits"] else "NO",
            *(_size(entry[key]) for key in ("error", "error on the CPU")),
            _size(entry["difference"], ".1e"),
        ]
        for entry in part["entries"]
    ]
    return [["", f"same bits, {part['runs']} runs", "error", "error on the CPU", "difference to the CPU"], *rows]


def _size(value: float | None, style: str = ".2f") -> str:
    """As text; null stands for what is not finite."""
    return "not finite" if value is None else f"{value:{style}}"
