"""Notes in a store that all ranks see: how those agree who may have lost their connections to each other."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["Notes"]

BRIEFLY = 5.0
"""Seconds for notes that nobody depends on."""
POLL, LONGEST_POLL = 0.002, 0.1
"""Seconds between two looks, first and last."""


class Notes:
    """Notes in a store, under a prefix. No call waits longer than the limit, though the store's host be stopped.

    Raises:
        torch.distributed.DistError: from every method, where the store is gone or does not answer.
    """

    def __init__(self, store: Store, prefix: str, limit: float) -> None:
        self.store, self._limit = PrefixStore(prefix, store), limit

    def briefly(self) -> Notes:
        """The same notes, with a limit for those that nobody depends on."""
        notes = copy.copy(self)
        notes._limit = min(BRIEFLY, self._limit)
        return notes

    def set(self, key: str, note: str) -> None:
        """Leaves a note."""
        self._ask(lambda: self.store.set(key, note))

    def check(self, *keys: str) -> bool:
        """Whether there are such notes."""
        return bool(self._ask(lambda: self.store.check(list(keys))))

    def get(self, key: str) -> str:
        """A note that is there."""
        return str(self._ask(lambda: self.store.get(key)).decode())

    def wait(self, keys: Sequence[str], is_vain: Callable[[], bool] = lambda: False) -> bool:
        """Until all of them are there, for as long as the limit; False if not, or as soon as it is in vain."""
        deadline, pause = time.monotonic() + self._limit, POLL
        while not self.check(*keys):
            if time.monotonic() > deadline or is_vain():
                return self.check(*keys)
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL)
        return True

    def decide(self, key: str, note: str) -> str:
        """The note that is there, or else this one, which is left there then."""
        return str(self._ask(lambda: self.store.compare_set(key, "", note)).decode())

    def delete(self, key: str) -> None:
        """Takes a note away."""
        self._ask(lambda: self.store.delete_key(key))

    def _ask(self, question: Callable[[], Any]) -> Any:
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=self._limit)
        except queue.Empty:
            raise dist.DistNetworkError(
                f"the store that the ranks share has not answered within {self._limit:g} s"
            ) from None
        if error is not None:
            raise error
        return answer
