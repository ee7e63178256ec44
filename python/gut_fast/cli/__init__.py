"""The command ``gut-fast``: its entry, and how it speaks of errors.

The commands themselves are in `gut_fast.cli.app`. An error in what the user typed is one line on stderr and exit code
2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``gut-fast`` with these arguments, by default those of the process, and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # λ₂ where the output is not UTF-8
    try:
        import typer

        from gut_fast.cli.app import app
        from gut_fast.cli.terminal import BadArgumentError
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in ("typer", "rich"):
            raise
        return _complain(f'{package} is not installed; install with: pip install "gut_fast[cli]"')
    # The base class of all errors in arguments, which no version of typer exports.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _warnings_in_a_line():
            return int(app(given or ["--help"], standalone_mode=False) or 0)
    except BadArgumentError as error:
        return _complain(str(error))
    except usage_error as error:
        return _complain(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _complain(message: str) -> int:
    print(f"gut-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings about what was asked for, such as an unstable μ, become a line on stderr each, once."""
    shown: set[str] = set()

    def show(message: str) -> None:
        line = f"gut-fast: warning: {' '.join(message.split())}"
        if line not in shown:
            shown.add(line)
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = lambda message, *_: show(str(message))
        yield
