"""The entry of the command ``gut-fast``, and how it speaks of errors.

The commands themselves are in `gut_fast.cli.app`. An error in what the user typed is one line on stderr and exit code
2; a full disk, or an output that nobody reads any more, is one line and exit code 1. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from gut_fast.arguments import printable
from gut_fast.requirements import COMMAND_LINE, what_is_missing

__all__ = ["CANNOT_WRITE", "main", "say"]

FAILED, BAD_ARGUMENT, INTERRUPTED = 1, 2, 130
"""The exit codes of a program that has failed, that was called in a wrong way, and that Ctrl-C has ended."""

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)
"""The errors of a full or broken disk, and of an output that was closed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``gut-fast`` with these arguments, by default those of the process, and returns the exit code."""
    were_closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in were_closed:
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if "stdout" in were_closed:
        return _cannot_write("the output was closed before the start; give it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where the output is not UTF-8, λ₂ becomes ?₂
    try:
        import typer

        from gut_fast.cli.app import app
        from gut_fast.cli.terminal import BadArgumentError
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in COMMAND_LINE or not (missing := what_is_missing(COMMAND_LINE)):
            raise
        return _complain(missing)
    # No version of typer exports the base class of all errors in arguments.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = int(app(given, standalone_mode=False, prog_name="gut-fast") or 0)
        sys.stdout.flush()
        return code
    except BadArgumentError as error:
        return _complain(str(error))
    except usage_error as error:
        return _complain(
            error.message + _meant(error, given) if hasattr(error, "option_name") else error.format_message()
        )
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except SystemExit:  # typer and rich end so when the output was closed
        return _cannot_write("the output was closed")
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        return _cannot_write(str(error))


def _complain(message: str, code: int = BAD_ARGUMENT) -> int:
    """Prints the message on stderr and returns the exit code."""
    say(f"gut-fast: error: {message}")
    return code


def _cannot_write(reason: str) -> int:
    """Says why, and makes Python forget what is left to be written, which it would try once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    with contextlib.suppress(OSError, ValueError):
        _complain(f"cannot write: {reason}")
    return FAILED


def say(message: str) -> None:
    """Prints a message on stderr: one line, which a terminal wraps between words."""
    line = printable(" ".join(message.split()))
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
