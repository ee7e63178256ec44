"""The command: all parts one after the other, each in a process of its own, and a table at the end.

A part that crashes, hangs or breaks the device for its process leaves the others their turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gut_fast.benchmark import timing
from gut_fast.benchmark.device import DEVICES, find_device
from gut_fast.benchmark.gpu import report
from gut_fast.benchmark.gpu.notes import ABSENT, DONE, FAILED, Budget, Notes, say
from gut_fast.benchmark.gpu.parts import FUNCTIONS, Part, profile_steps
from gut_fast.benchmark.gpu.plan import PARTS, plan_for

__all__ = ["FILE", "main"]

FILE = "results.json"
TABLE = "table.txt"
GRACE = 10.0
"""Seconds after its time that a part has to end by itself."""

Launch = Callable[[list[str], float], str]
"""Runs this command with arguments; returns what was wrong, or nothing. Ends it after so many seconds."""


def main(arguments: Sequence[str] | None = None, launch: Launch | None = None) -> int:
    """Runs the parts asked for. Exit code 1 if one of them found something wrong or did not come to its end."""
    options = _parser().parse_args(arguments)
    if options.profile_steps:
        device = find_device(options.device)
        profile_steps(device, plan_for(device).profiled)
        return 0
    if options.folder is None:
        _parser().error("expected a folder for the results")
    options.folder.mkdir(parents=True, exist_ok=True)
    notes = Notes(options.folder / FILE)
    if options.child is not None:
        return _run_part(options, notes)
    find_device(options.device)
    started = time.time()
    ends = _run_all(options, notes, started, launch or _launch)
    text = report.text(notes.read())
    (options.folder / TABLE).write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")
    say(started, f"wrote {notes.file}")
    return 0 if set(ends) <= {DONE, ABSENT} else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.py", description="Measure everything on a GPU, in one call."
    )
    parser.add_argument("folder", type=Path, nargs="?", help=f"results go here: {FILE} and {TABLE}")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s; the others' results stay")
    parser.add_argument("--seconds", type=float, default=sum(PARTS.values()), help="in all; default %(default).0f")
    parser.add_argument("--device", choices=list(DEVICES), default="cuda", help="cpu: a dry run of small cases")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--profile-steps", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_all(options: argparse.Namespace, notes: Notes, started: float, launch: Launch) -> list[str]:
    """How each part has ended."""
    names = [name.strip() for name in options.parts.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        _parser().error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    budget = Budget(options.seconds)
    for index, name in enumerate(names):
        seconds = budget.left * PARTS[name] / sum(PARTS[other] for other in names[index:])
        say(started, f"{name}: up to {seconds:.0f} s")
        begin = time.monotonic()
        notes.forget(name)
        times = ["--started", f"{started}", "--until", f"{time.time() + seconds}"]
        arguments = [str(options.folder), "--device", options.device, "--child", name, *times]
        problem = launch(arguments, max(seconds, 0.0) + GRACE)
        if notes.status(name) is None:
            notes.put(name, status=FAILED, problem=problem or "it ended without a word")
        notes.put(name, seconds=round(time.monotonic() - begin, 1))
        say(started, f"{name}: {notes.status(name)}")
    return [notes.status(name) or FAILED for name in names]


def _launch(arguments: list[str], seconds: float) -> str:
    """In a process, with whatever it starts in a group that is ended with it."""
    command = [sys.executable, "-m", "gut_fast.benchmark.gpu.run", *arguments]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
    return "" if code == 0 else f"exit code {code}"


def _run_part(options: argparse.Namespace, notes: Notes) -> int:
    """One part, in this process."""
    name, budget = options.child, Budget(options.until - time.time())
    try:
        device = find_device(options.device)
        plan = plan_for(device)
        part = Part(name, device, plan, budget, notes, partial(say, options.started))
        with timing.threads(plan.threads):
            notes.put(name, status=FUNCTIONS[name](part))
    except Exception as error:
        notes.put(name, status=FAILED, problem="".join(traceback.format_exception_only(error)).strip())
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
