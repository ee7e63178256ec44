"""The entry of the command ``gut-fast``, and how it speaks of errors.

The commands themselves are in `gut_fast.cli.app`. An error in what the user typed is one line on stderr and exit code
2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["main", "say"]

MODULES = ("typer", "rich", "jinja2", "matplotlib", "pandas", "scipy", "yaml", "zstandard")
"""The modules that the extra ``cli`` brings."""

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``gut-fast`` with these arguments, by default those of the process, and returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the program began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where the output is not UTF-8, λ₂ becomes ?₂
    try:
        import typer

        from gut_fast.cli.app import app
        from gut_fast.cli.terminal import BadArgumentError
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package not in MODULES:
            raise
        return _complain(f'{package} is not installed; install with: pip install "gut_fast[cli]"')
    # No version of typer exports the base class of all errors in arguments.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(given, standalone_mode=False, prog_name="gut-fast") or 0)
    except BadArgumentError as error:
        return _complain(str(error))
    except usage_error as error:
        return _complain(
            error.message + _meant(error, given) if hasattr(error, "option_name") else error.format_message()
        )
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _complain(f"cannot write: {error.strerror}")


def _complain(message: str) -> int:
    """Prints the message on stderr and returns the exit code of a bad argument."""
    say(f"gut-fast: error: {message}")
    return 2


def say(message: str) -> None:
    """Prints a message on stderr: one line, which a terminal wraps between words."""
    line = " ".join(message.split())
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)


def _meant(error: Any, given: Sequence[str]) -> str:
    """The end of the message about an unknown option: the option that is most like it, if one is."""
    # The parser reads -lr as the options -l and -r.
    typed = next((word for word in given if word.startswith(error.option_name)), error.option_name)
    parameters = error.ctx.command.get_params(error.ctx) if error.ctx is not None else []
    known = [option for parameter in parameters for option in parameter.opts]
    similar = difflib.get_close_matches(f"--{typed.lstrip('-').partition('=')[0]}", known, 1)
    return f"; did you mean {similar[0]}?" if similar else ""
