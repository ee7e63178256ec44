"""What the command prints where nobody can read it, and what it makes of text that a terminal would obey."""

import io
import shlex
import subprocess
import sys

import pytest

from gut_fast.arguments import printable
from gut_fast.cli import say, terminal

COMMAND = [sys.executable, "-m", "gut_fast", "topology", "ring:4", "--json"]


def test_a_full_disk_is_one_line_and_exit_code_1():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = "gut-fast: error: cannot write: [Errno 28] No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, message)


def test_an_output_that_was_closed_is_one_line_and_exit_code_1():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()
        message = started.stderr.read()
    assert started.returncode == 1
    assert message.startswith("gut-fast: error: cannot write: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("closed", "code"), [(">&-", 1), ("2>&-", 0), (">&- 2>&-", 1)])
def test_an_output_that_was_closed_before_the_start_is_said_at_once(closed, code):
    command = f"{shlex.join(COMMAND)} {closed}"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == (closed == ">&-")
    assert (closed == ">&-") == ("the output was closed before the start" in ended.stderr)
    assert (ended.stdout != "") == (code == 0)


HOSTILE = "a\x1b[2J\x07\x9b5m\u202eb\x7f"
SHOWN = r"a\x1b[2J\x07\x9b5m\u202eb\x7f"


def test_control_characters_are_shown_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("β, µ\tline\n") == "β, µ\tline\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_never_given_control_characters_of_a_label(is_terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    console = terminal.console_of_text()
    console.file, console._force_terminal = io.StringIO(), is_terminal
    table = terminal.facts_grid({HOSTILE: HOSTILE})
    table.title = HOSTILE
    for each in (HOSTILE, table, terminal.Text(HOSTILE, "bold")):
        console.print(each)
    printed = console.file.getvalue()
    assert printed.count(SHOWN) == 4
    assert printed.count(r"a\x1b[2J") == 5  # rich leaves out some of the others
    assert not set("\x07\x9b\u202e\x7f") & set(printed)
    assert "\x1b[2J" not in printed


def test_messages_and_json_show_them_too(capsys):
    say(HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}\n"
    terminal.print_json({"label": HOSTILE})
    printed = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e\x7f") & set(printed)
    assert terminal.json.loads(printed) == {"label": HOSTILE}
