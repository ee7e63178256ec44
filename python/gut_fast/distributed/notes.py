"""How ranks agree who may have lost their connections: notes in a store that all of them see, and signs of life.

Whether a process of the same machine has ended is seen at once, by the mark that it has left in a note. A process of
another machine is known to have ended only by its silence.
"""

from __future__ import annotations

import copy
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["Notes", "aside", "has_ended", "own_connection", "own_mark"]

Answer = TypeVar("Answer")

BRIEFLY = 5.0
"""The limit, in seconds, for notes that nobody depends on."""
POLL, LONGEST_POLL = 0.002, 0.1
"""The first and the longest pause between two looks into the store, in seconds."""


class Notes:
    """Notes in a store, under a prefix. No call waits longer than the limit, though the store's host be stopped.

    Raises:
        torch.distributed.DistError: from every method, where the store is gone or does not answer.
    """

    def __init__(self, store: Store, prefix: str, limit: float) -> None:
        self.store, self._limit = PrefixStore(prefix, store), limit

    def briefly(self) -> Notes:
        """Returns the same notes with a shorter limit, for what nobody depends on."""
        notes = copy.copy(self)
        notes._limit = min(BRIEFLY, self._limit)
        return notes

    def set(self, key: str, note: str) -> None:
        """Leaves a note."""
        self._ask(lambda: self.store.set(key, note))

    def check(self, *keys: str) -> bool:
        """Returns whether there is a note under each of the keys."""
        return bool(self._ask(lambda: self.store.check(list(keys))))

    def get(self, key: str) -> str:
        """Reads a note that is known to be there."""
        return str(self._ask(lambda: self.store.get(key)).decode())

    def wait(self, keys: Sequence[str], is_vain: Callable[[], bool] = lambda: False) -> bool:
        """Waits until there is a note under each of the keys; False after the limit, or as soon as it is in vain."""
        deadline, pause = time.monotonic() + self._limit, POLL
        while not self.check(*keys):
            if time.monotonic() > deadline or is_vain():
                return self.check(*keys)
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL)
        return True

    def decide(self, key: str, note: str) -> str:
        """Leaves this note unless there is one already, and returns the one that is there: one atomic operation."""
        return str(self._ask(lambda: self.store.compare_set(key, "", note)).decode())

    def delete(self, key: str) -> None:
        """Takes a note away."""
        self._ask(lambda: self.store.delete_key(key))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return aside(question, self._limit)
        except TimeoutError:
            raise dist.DistNetworkError(
                f"the store that the ranks share has not answered within {self._limit:g} s"
            ) from None


def aside(question: Callable[[], Answer], limit: float, is_vain: Callable[[], bool] | None = None) -> Answer:
    """Returns the answer to a question asked in a thread of its own.

    Args:
        question: may never come back; its thread is left behind then.
        limit: of the wait, in seconds.
        is_vain: looked at now and then, and ends the wait if it is true.

    Raises:
        TimeoutError: there was no answer; or what the question raises.
    """
    answers: queue.SimpleQueue[tuple[Answer, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    deadline, pause = time.monotonic() + limit, limit if is_vain is None else POLL
    while True:
        try:
            answer, error = answers.get(timeout=pause)
        except queue.Empty:
            if time.monotonic() > deadline or (is_vain is not None and is_vain()):
                raise TimeoutError from None
            pause = min(1.5 * pause, LONGEST_POLL)
            continue
        if error is not None:
            raise error
        return cast("Answer", answer)


def own_connection(store: Store) -> Store:
    """Returns a connection to a store for who may wait long, during which one connection answers nobody else.

    Older versions of PyTorch, and stores of a user's own, have but one.
    """
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, NotImplementedError):
        return store
    return own


def own_mark() -> str:
    """Returns the mark by which `has_ended` knows this process; it is empty on a system that has no /proc."""
    try:
        return json.dumps([*_machine(), os.getpid(), _state_and_start(os.getpid())[1]])
    except OSError:
        return ""


def has_ended(mark: str) -> bool:
    """Returns whether the process that left the mark is known to have ended; False where that cannot be seen."""
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
    except OSError:  # the process is there, but hidden
        return False
    return state in "ZX" or own_start != start


def _machine() -> list[str]:
    """Returns names of the running system and of the namespace in which its processes are numbered."""
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]


def _state_and_start(pid: int) -> tuple[str, str]:
    """Returns the state and the start time of a process: see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
