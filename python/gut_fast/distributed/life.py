"""Whether processes have ended. On the same machine that is seen at once; of others their silence alone tells."""

from __future__ import annotations

import json
import os
from pathlib import Path

__all__ = ["has_ended", "own_mark"]


def own_mark() -> str:
    """What others know this process by; empty on a system that has no /proc."""
    try:
        return json.dumps([*_machine(), os.getpid(), _state_and_start(os.getpid())[1]])
    except OSError:
        return ""


def has_ended(mark: str) -> bool:
    """Whether the process that left the mark is known to have ended; False where that cannot be seen."""
    if not mark:
        return False
    *machine, pid, start = json.loads(mark)
    try:
        if machine != _machine():
            return False
        os.kill(pid, 0)
        state, own_start = _state_and_start(pid)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, but hidden
        return False
    return state in "ZX" or own_start != start


def _machine() -> list[str]:
    """The running system, and where its processes are numbered."""
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]


def _state_and_start(pid: int) -> tuple[str, str]:
    """See proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
