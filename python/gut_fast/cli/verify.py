"""The command ``gut-fast verify``, which tells a user if this installation can be trusted."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from gut_fast.cli.terminal import BadArgumentError, as_bad_argument, console_of_text, writing
from gut_fast.files import write_text
from gut_fast.kernels import machine
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS
from gut_fast.rules import RULES, get_rule
from gut_fast.simulation.files import check_target
from gut_fast.study import summary
from gut_fast.verify import comparison
from gut_fast.verify.cases import THREADS
from gut_fast.verify.coding import CODES, code_name
from gut_fast.verify.comparison import Candidate, Request, Result
from gut_fast.verify.lockstep import LIMIT, PRECISIONS

__all__ = ["as_json", "legend", "verify"]

MAX_FAULTS = 3
"""The number of faults that are printed of one candidate."""


def verify(
    rule: Annotated[list[str] | None, typer.Option(help="Only this rule; may be repeated.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this backend; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Only this precision, one of: {', '.join(PRECISIONS)}; may be repeated.")
    ] = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="Only this instruction tier of the compiled kernel; may be repeated.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Large graphs, every odd size, longer runs.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random numbers that are compared.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results here.")] = None,
) -> None:
    """Compare every rule, backend, precision and instruction tier with the reference.

    All run many steps beside the reference in float64, and the reference beside the published forms. Exit code 1 if
    anything loses more than twice what plain PyTorch loses in the same precision.
    """
    with as_bad_argument():
        request = _request(rule, backend, dtype, tier, seed, full)
        _check_file(json_file)
    console = console_of_text()
    start = time.monotonic()
    with _progress(comparison.num_cases(request), console) as on_case:
        result = comparison.verify(request, on_case)
    seconds = time.monotonic() - start
    if not any(candidate.backend in BACKENDS for candidate in result.candidates):
        raise BadArgumentError("; ".join(["there is nothing to compare", *_not_compared(result)]))
    _show(result, request, seconds, console)
    if json_file is not None:
        text = json.dumps(as_json(result, seconds, seed, full), indent=1, allow_nan=False, ensure_ascii=False)
        with writing():
            write_text(json_file, text + "\n")
    if not result.passed:
        raise typer.Exit(1)


def _request(
    rule: Sequence[str] | None,
    backend: Sequence[str] | None,
    dtype: Sequence[str] | None,
    tier: Sequence[str] | None,
    seed: int,
    full: bool,
) -> Request:
    if reason := machine.wrong_tier():
        raise ValueError(reason)
    # The backends that "auto" may choose here; Triton's interpreter, on CPU tensors, would take hours.
    automatic = {name for device in comparison.devices() for name in AUTOMATIC[device]}
    if tier and backend and "cpu" not in backend:
        raise ValueError("--tier has no effect without the backend cpu; add --backend cpu, or leave --tier out")
    return Request(
        rules=[RULES[name] for name in _chosen("--rule", [get_rule(name).name for name in rule or ()], RULES)],
        backends=_chosen("--backend", backend or [name for name in BACKENDS if name in automatic], BACKENDS),
        precisions=[PRECISIONS[name] for name in _chosen("--dtype", dtype, PRECISIONS)],
        tiers=_chosen("--tier", tier, machine.instruction_tiers()),
        seed=seed,
        full=full,
        codes=() if rule or (dtype and "float32" not in dtype) else CODES,
    )


def _chosen(option: str, given: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """The names that were given, each once; all known ones if none was."""
    for name in given or ():
        if name not in known:
            raise ValueError(f"{option} {name}: expected one of {', '.join(known) or 'none, the kernel is missing'}")
    return list(dict.fromkeys(given or known))


def _check_file(path: Path | None) -> None:
    """Raises OSError if the file cannot be written, before minutes are spent on the comparison."""
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"--json {path}: this is a folder, expected the name of a file")
    if path is not None:
        check_target(path)


@contextlib.contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Shows, on a terminal, how many cases are done and which one is next."""
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda label: bar.update(task, advance=1, description=label)


def _show(result: Result, request: Request, seconds: float, console: Console) -> None:
    console.print(_table(result))
    console.print(legend(request.tiers, THREADS, request.devices), style="dim")
    for text in _not_compared(result):
        console.print(text)
    for text in _failures(result):
        console.print(text, style="bold red")
    console.print(" · ".join(f"{name} {version}" for name, version in machine.versions().items()))
    console.print(machine.machine_line())
    console.print(_conclusion(result, seconds), style="bold" if result.passed else "bold red")


def _table(result: Result) -> Table:
    """A line for each candidate."""
    table = summary.plain_table(
        "Every rule beside the reference",
        "rule",
        "backend",
        "precision",
        "error",
        "checks",
        "verdict",
        "worst on",
        wrapped="worst on",
    )
    for column in (*table.columns[1:3], table.columns[-1]):
        column.justify = "left"
    for each in result.candidates:
        verdict = "right" if each.passed else "WRONG"
        cells = (each.rule, each.where, each.precision, _size(each.error), f"{each.num_comparisons}", verdict)
        table.add_row(*cells, each.worst_case, style=None if each.passed else "bold red")
    return table


def legend(tiers: Sequence[str], threads: Sequence[int], devices: Sequence[str] = ("cpu",)) -> str:
    """The meaning of the table's columns; tiers and thread counts are the ones that had to give the same bits."""
    text = (
        f"error: the largest, in units of what plain PyTorch loses; right is at most {LIMIT:g}\n"
        "precision: of the parameters, after a slash that of the state\n"
        "checks: tensors compared, parameters and every state\n"
        "published: the reference beside the form in the paper\n"
        "difference, modulo: coded messages; cpu has the bits of torch, which loses up to 1 of half a step, or of one\n"
        f"cpu: the same bits in tiers {', '.join(tiers) or 'none'} and on {', '.join(map(str, threads))} threads"
    )
    others = [device for device in devices if device != "cpu"]
    return "\n".join([text, *(f"{device}: the same bits a second time" for device in others)])


def _not_compared(result: Result) -> list[str]:
    """The precisions that a backend, or every one, cannot serve here, with its reason."""
    return [
        f"not compared: {backend} in {', '.join(precisions)}: {reason}"
        for (backend, reason), precisions in result.missing.items()
    ]


def _failures(result: Result) -> list[str]:
    """One line for each fault, at most `MAX_FAULTS` of a candidate."""
    texts = []
    for each in result.candidates:
        faults = each.faults[:MAX_FAULTS]
        if len(each.faults) > MAX_FAULTS:
            faults.append(f"and {len(each.faults) - MAX_FAULTS} more of this kind")
        if not each.error <= LIMIT:
            faults.insert(0, f"{each.worst_case}: error {_size(each.error)}, more than {LIMIT:g}")
        texts += [f"WRONG: {each.rule} on {each.where} in {each.precision}: {fault}" for fault in faults]
    return texts


def _conclusion(result: Result, seconds: float) -> str:
    """The last sentence of the output."""
    wrong = [candidate for candidate in result.candidates if not candidate.passed]
    rules = list(dict.fromkeys(candidate.rule for candidate in (wrong or result.candidates)))
    if wrong:
        count = f"{len(wrong)} of {len(result.candidates)} lines are WRONG"
        return f"{count}: {', '.join(rules)}; do not trust this installation"
    checks = sum(candidate.num_comparisons for candidate in result.candidates)
    codes = len({code_name(code) for code in CODES} & set(rules))
    count = f"{len(rules) - codes} rule{'s' * (len(rules) - codes > 1)}{f' and {codes} codes' if codes else ''}"
    return f"right: {checks:,} comparisons of {count} in {seconds:.0f} s"


def as_json(result: Result, seconds: float, seed: int, full: bool) -> dict[str, Any]:
    """The whole result; an error that is not finite is null."""
    return {
        "passed": result.passed,
        "limit": LIMIT,
        "seed": seed,
        "full": full,
        "seconds": round(seconds, 1),
        "versions": machine.versions(),
        "machine": machine.machine_line(),
        "lines": [_plain(candidate) for candidate in result.candidates],
        "not compared": _not_compared(result),
    }


def _plain(candidate: Candidate) -> dict[str, Any]:
    error = candidate.error if math.isfinite(candidate.error) else None
    return {**asdict(candidate), "error": error, "passed": candidate.passed}


def _size(error: float) -> str:
    return f"{error:.2f}" if error < 1000 else f"{error:.0e}"
