"""``gut-fast verify``: whether to trust this installation."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gut_fast.cli import verify_report as report
from gut_fast.cli.terminal import BadArgumentError, as_bad_argument, console_of_text, writing
from gut_fast.distributed.files import replacing
from gut_fast.kernels import machine
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS
from gut_fast.rules import RULES
from gut_fast.verify import comparison, players
from gut_fast.verify.cases import THREADS
from gut_fast.verify.lockstep import PRECISIONS

__all__ = ["verify"]

FILE_WIDTH = 100
"""Of the table where the output is no terminal: no name of a case is cut."""


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
    seed: Annotated[int, typer.Option(min=0, help="Of the numbers compared.")] = 0,
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
    if not console.is_terminal:
        console.width = FILE_WIDTH
    start = time.monotonic()
    with _progress(comparison.num_cases(request), console) as on_case:
        result = comparison.verify(request, on_case)
    seconds = time.monotonic() - start
    if not any(line.backend in BACKENDS for line in result.lines):
        raise BadArgumentError("; ".join(["there is nothing to compare", *report.not_compared(result)]))
    _show(result, request, seconds, console)
    if json_file is not None:
        text = json.dumps(report.as_json(result, seconds, seed, full), indent=1, allow_nan=False, ensure_ascii=False)
        with writing(), replacing(json_file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if not result.passed:
        raise typer.Exit(1)


def _request(
    rule: Sequence[str] | None,
    backend: Sequence[str] | None,
    dtype: Sequence[str] | None,
    tier: Sequence[str] | None,
    seed: int,
    full: bool,
) -> comparison.Request:
    if reason := machine.wrong_tier():
        raise ValueError(reason)
    tiers = machine.instruction_tiers()
    return comparison.Request(
        rules=[RULES[name] for name in _chosen("--rule", rule, RULES)],
        backends=_chosen("--backend", backend or _automatic_backends(), BACKENDS),
        precisions=[PRECISIONS[name] for name in _chosen("--dtype", dtype, PRECISIONS)],
        tiers=_chosen("--tier", tier, tiers),
        seed=seed,
        full=full,
    )


def _automatic_backends() -> list[str]:
    """Those that "auto" may choose here; Triton's interpreter, on CPU tensors, would take hours."""
    chosen = {name for device in players.devices() for name in AUTOMATIC[device]}
    return [name for name in BACKENDS if name in chosen]


def _chosen(option: str, given: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """What was given, each once; everything if nothing was."""
    for name in given or ():
        if name not in known:
            raise ValueError(f"{option} {name}: expected one of {', '.join(known) or 'none, the kernel is missing'}")
    return list(dict.fromkeys(given or known))


def _check_file(path: Path | None) -> None:
    """Before minutes are spent."""
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"--json {path}: this is a folder, expected the name of a file")
    if path is not None:
        with replacing(path) as temporary:
            temporary.touch()


@contextlib.contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Shows, on a terminal, how many cases are done and which one is next."""
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda label: bar.update(task, advance=1, description=label)


def _show(result: comparison.Result, request: comparison.Request, seconds: float, console: Console) -> None:
    console.print(report.table(result))
    console.print(report.legend(request.tiers, THREADS, request.devices), style="dim")
    for text in report.not_compared(result):
        console.print(text, soft_wrap=True)
    for text in report.failures(result):
        console.print(text, style="bold red", soft_wrap=True)
    console.print(" · ".join(f"{name} {version}" for name, version in machine.versions().items()), soft_wrap=True)
    console.print(machine.machine_line(), soft_wrap=True)
    console.print(report.conclusion(result, seconds), style="bold" if result.passed else "bold red", soft_wrap=True)
