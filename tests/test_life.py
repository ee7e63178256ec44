"""What `has_ended` knows of processes that end, hide, or live elsewhere."""

import json
import os
import signal
import subprocess
import sys

import pytest

from gut_fast.distributed import notes

pytestmark = pytest.mark.skipif(not notes.own_mark(), reason="this system has no /proc")

PRINT_MARK = "from gut_fast.distributed import notes; print(notes.own_mark(), flush=True); input()"


def test_a_process_that_ends_is_seen_to_before_anybody_has_waited_for_it():
    process = subprocess.Popen([sys.executable, "-c", PRINT_MARK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        mark = process.stdout.readline().decode().strip()
        assert mark != notes.own_mark()
        assert not notes.has_ended(mark)
        process.send_signal(signal.SIGSTOP)
        assert not notes.has_ended(mark)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert notes.has_ended(mark)
    finally:
        process.kill()
        process.communicate()
    assert notes.has_ended(mark)


def test_what_cannot_be_seen_has_not_ended():
    boot, space, _, start = json.loads(notes.own_mark())
    assert not notes.has_ended("")
    assert not notes.has_ended(json.dumps(["another machine", space, 2**22 + 1, start]))
    assert not notes.has_ended(json.dumps([boot, "pid:[1]", 2**22 + 1, start]))
    assert notes.has_ended(json.dumps([boot, space, 2**22 + 1, start]))


def test_another_process_may_have_the_number_now():
    *where, pid, start = json.loads(notes.own_mark())
    assert not notes.has_ended(json.dumps([*where, pid, start]))
    assert notes.has_ended(json.dumps([*where, pid, str(int(start) - 1)]))


def test_a_hidden_process_has_not_ended(monkeypatch):
    mark = notes.own_mark()

    def hidden(pid):
        raise FileNotFoundError

    monkeypatch.setattr(notes, "_state_and_start", hidden)
    assert notes.own_mark() == ""
    assert not notes.has_ended(mark)
