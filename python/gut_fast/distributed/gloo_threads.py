"""The end of a process: gloo's threads let go of their last tensors while there is an interpreter to free them.

The thread that has carried out a collective operation drops its tensors after the caller has been woken, and needs the
interpreter's lock for that. If the interpreter is being finalized by then, the thread is unwound through C++ frames
that allow no exception, and the process aborts: "terminate called without an active exception". This happens to
plain scripts as well, so the threads of all gloo groups are waited for, also of those that are not ours.
"""

import contextlib
import time
from pathlib import Path

__all__ = ["settle"]

LIMIT = 5.0
"""The longest wait at the end of a process, in seconds."""
PAUSE = 0.02
"""How long no thread may have run, in seconds; one that waits for the interpreter's lock looks for it every 5 ms."""


def settle(limit: float = LIMIT) -> bool:
    """Waits, with the interpreter's lock released, until every thread of gloo sleeps and has nothing left to do.

    An operation that nobody has waited for, and that another rank does not answer, may go on in its sleep.

    Args:
        limit: the longest wait, in seconds.

    Returns:
        False if a thread was still running at the limit. True also where threads cannot be looked at: they can be
        on Linux.
    """
    deadline, before = time.monotonic() + limit, _runs()
    while before:
        time.sleep(PAUSE)
        now = _runs()
        if now == before and all(state == "S" for state, _, _ in now.values()):
            break
        if time.monotonic() > deadline:
            return False
        before = now
    return True


def _runs() -> dict[str, tuple[str, str, str]]:
    """Returns the state of each thread of gloo, and how often it was taken off a processor, by its own will or not."""
    runs = {}
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has ended
            lines = (line.partition(":") for line in (thread / "status").read_text().splitlines())
            facts = {name: value.strip() for name, _, value in lines}
            if facts["Name"] == "pt_gloo_runloop":
                state = facts["State"][:1]
                runs[thread.name] = state, facts["voluntary_ctxt_switches"], facts["nonvoluntary_ctxt_switches"]
    return runs
