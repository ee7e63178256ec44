"""The ranks that train together, and how messages travel among them.

Messages of a gloo group go through connections of our own, so that they never meet the user's, and so that the ranks
that are left can leave broken ones behind. Other backends (NCCL) serve through the group they were given with.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from gut_fast.distributed.errors import PeerError
from gut_fast.distributed.life import has_ended, own_mark
from gut_fast.distributed.notes import Notes

__all__ = ["Group", "Transfer", "Welcome"]

DEFAULT_TIMEOUT = 60.0
_numbers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Transfer(NamedTuple):
    """A tensor on its way to or from another rank.

    Attributes:
        peer: the other rank's place in the group.
        tag: tells transfers between the same two ranks apart; those of one tag keep their order.
    """

    tensor: Tensor
    peer: int
    tag: int


class Welcome(NamedTuple):
    """What a rank is told that joins a run.

    Attributes:
        step: that it takes first.
        sponsor: number of the rank whose parameters it gets.
        settings: of the others, to compare with its own.
    """

    step: int
    sponsor: int
    settings: dict[str, Any]


class Group:
    """The ranks that train together.

    Args:
        store: what all ranks reach and none of them takes along when it dies.
        rank: this process's place, 0 … size − 1.
        members: numbers of the ranks, as they were at the start and as errors name them.
        timeout: seconds that any wait may take.
        epoch: how often ranks have left or joined.
        everyone: how many ranks there are when none is missing; None is as many as there are members.
        welcome: what this rank was told when it joined a run that is under way.
        process_group: carries the messages; None makes gloo connections of our own.
        marks: of processes, by number, as far as known: see `life`.

    Raises:
        PeerError: not all ranks were there in time.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[int],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        epoch: int = 0,
        everyone: int | None = None,
        welcome: Welcome | None = None,
        process_group: dist.ProcessGroup | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self.store, self.rank, self.members = store, rank, tuple(members)
        self.timeout, self.epoch, self.welcome = timeout, epoch, welcome
        self.everyone = len(self.members) if everyone is None else everyone
        self.occasions, self._is_taken = itertools.count(1), False
        self._notes = Notes(store, f"epoch {epoch}", timeout)
        self.marks = marks or {}
        self.marks = dict(zip(self.members, self.gather("present", own_mark()), strict=True))
        self._channel: _Gloo | _Given = (
            _Given(process_group) if process_group is not None else _Gloo(self._notes.store, rank, self.size, timeout)
        )

    @staticmethod
    def of(process_group: dist.ProcessGroup | Group, timeout: float = DEFAULT_TIMEOUT) -> Group:
        """The group of a `torch.distributed` process group that this process belongs to.

        Raises:
            TypeError, ValueError: not a process group, or one that this process does not belong to.
            PeerError: not all of its ranks made theirs in time.
        """
        members = range(Group.size_of(process_group))
        if isinstance(process_group, Group):
            return process_group
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError("process_group: this process is not one of its ranks")
        number = next(_numbers.setdefault(process_group, itertools.count()))
        store = PrefixStore(f"gut_fast/{number}", c10d._get_process_group_store(process_group))
        backends = c10d.get_backend_config(process_group).split(",")  # such as cpu:gloo,cuda:nccl
        is_gloo = all(backend.endswith("gloo") for backend in backends)
        return Group(store, rank, members, timeout=timeout, process_group=None if is_gloo else process_group)

    @staticmethod
    def size_of(process_group: Any) -> int:
        """Ranks of a process group or a `Group`, missing ones too. Raises TypeError if it is neither."""
        if isinstance(process_group, Group):
            return process_group.everyone
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, for example torch.distributed.group.WORLD "
                f"after init_process_group, got {type(process_group).__name__}"
            )
        return int(process_group.size())

    def take(self) -> None:
        """For an optimizer, once it is to meet its like on the other ranks.

        Raises:
            ValueError: another one did: their messages would meet.
        """
        if self._is_taken:
            raise ValueError("this Group serves another optimizer; make each its own, of a PrefixStore of its own")
        self._is_taken = True

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    @property
    def missing(self) -> list[int]:
        """Numbers of the ranks that are not there."""
        return [number for number in range(self.everyone) if number not in self.members]

    @property
    def is_own(self) -> bool:
        """Whether the connections are our own, so that ranks can leave and join."""
        return isinstance(self._channel, _Gloo)

    def gather(self, what: str, note: str) -> list[str]:
        """Every rank's note, in order; `what` names the occasion, a new name for each one.

        Raises:
            PeerError: not all notes were there in time, or a rank has ended; the message names those they are missing
                from.
        """
        keys = [f"{what}/{place}" for place in range(self.size)]
        self._notes.set(keys[self.rank], note)

        def missing() -> list[int]:
            return [number for number, key in zip(self.members, keys, strict=True) if not self._notes.check(key)]

        if not self._notes.wait(keys, lambda: any(map(self.has_ended, missing()))) and (absent := missing()):
            if ended := [number for number in absent if self.has_ended(number)]:
                raise PeerError(f"ranks {ended} have ended before they came to {what!r}", ended[0], is_gone=True)
            raise PeerError(
                f"ranks {absent} have not come to {what!r} within {self.timeout:g} s; are they running, and do they "
                "make their optimizers in the same order?",
                absent[0],
            )
        return [self._notes.get(key) for key in keys]

    def has_ended(self, number: int) -> bool:
        """Whether a rank's process is known to have ended."""
        return has_ended(self.marks.get(number, ""))

    def start(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> tuple[list[Any], list[Any]]:
        """Begins all these transfers; `wait` for each work that is returned, one for each of them, in order."""
        return self._channel.start(sends, receives)

    def wait(self, work: Any, deadline: float) -> None:
        """Waits for a work until ``time.monotonic()`` passes the deadline.

        Raises:
            ConnectionError: its peer is gone.
            TimeoutError: the deadline passed.
        """
        self._channel.wait(work, deadline)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums the tensor over all ranks, in place. Raises PeerError if not all came in time."""
        self._collective("all_reduce", self._channel.all_reduce(tensor))

    def reduce(self, tensor: Tensor, to: int) -> None:
        """Sums the tensor over all ranks, in place, on rank `to`. Raises PeerError if not all came in time."""
        self._collective("reduce", self._channel.reduce(tensor, to))

    def _collective(self, what: str, work: Any) -> None:
        try:
            self.wait(work, time.monotonic() + self.timeout)
        except (ConnectionError, TimeoutError) as error:
            raise PeerError(f"{what} among ranks {list(self.members)} failed: {error}", -1) from error

    def leave(self, last_words: str) -> None:
        """Breaks the connections, after a note that says why."""
        with contextlib.suppress(RuntimeError):  # the store may be gone too
            self._notes.briefly().set(f"last words/{self.rank}", last_words)
        self.close()

    def last_words(self, place: int) -> str | None:
        """Why a rank left, if it said so."""
        key, notes = f"last words/{place}", self._notes.briefly()
        try:
            return notes.get(key) if notes.check(key) else None
        except RuntimeError:
            return None

    def close(self) -> None:
        """Breaks the connections, if they are our own: whoever waits for this rank knows at once."""
        self._channel.close()


class _Gloo:
    """Connections of our own."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        try:
            self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
        except RuntimeError as error:
            raise PeerError(f"the ranks could not connect to each other within {timeout:g} s: {error}", -1) from error

    def start(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> tuple[list[Any], list[Any]]:
        received = [self._begun(self._group.recv, each) for each in receives]
        return [self._begun(self._group.send, each) for each in sends], received

    def _begun(self, function: Any, transfer: Transfer) -> Any:
        try:
            return function([transfer.tensor], transfer.peer, transfer.tag)
        except RuntimeError as error:
            return error.with_traceback(None)  # whose frames hold the other works: see Traffic.let_go

    def wait(self, work: Any, deadline: float) -> None:
        _wait(work, deadline)

    def all_reduce(self, tensor: Tensor) -> Any:
        return self._group.allreduce([tensor])

    def reduce(self, tensor: Tensor, to: int) -> Any:
        return self._group.reduce(tensor, to)

    def close(self) -> None:
        self._group = None


class _Given:
    """The user's process group.

    NCCL's work is done in order on a stream: to wait for it holds up the stream, not this process. Whether it was done
    in time is seen when the next transfers start. Transfers on the CPU are waited for.
    """

    POLL = 1e-4

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._begun: list[tuple[Any, float]] = []

    def start(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> tuple[list[Any], list[Any]]:
        operations = [
            dist.P2POp(function, each.tensor, dist.get_global_rank(self._group, each.peer), self._group, each.tag)
            for function, transfers in ((dist.isend, sends), (dist.irecv, receives))
            for each in transfers
        ]
        is_on_cpu = all(each.tensor.device.type == "cpu" for each in (*sends, *receives))
        try:
            self._check_begun()
            begun: list[Any] = dist.batch_isend_irecv(operations) if operations else []
        except (RuntimeError, TimeoutError) as error:
            begun = [error.with_traceback(None)]
        if len(begun) < len(operations):  # coalesced, or failed
            begun = begun[:1] * len(operations)
        works = [(work, is_on_cpu) for work in begun]
        return works[: len(sends)], works[len(sends) :]

    def wait(self, work: Any, deadline: float) -> None:
        begun, is_on_cpu = work
        if is_on_cpu or isinstance(begun, Exception):
            _wait(begun, deadline)
        else:
            begun.wait()
            self._begun.append((begun, deadline))

    def _check_begun(self) -> None:
        for work, deadline in self._begun:
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TimeoutError("the transfers of the step before are not finished")
                time.sleep(self.POLL)
        self._begun.clear()

    def all_reduce(self, tensor: Tensor) -> Any:
        return dist.all_reduce(tensor, group=self._group, async_op=True), tensor.device.type == "cpu"

    def reduce(self, tensor: Tensor, to: int) -> Any:
        place = dist.get_global_rank(self._group, to)
        return dist.reduce(tensor, place, group=self._group, async_op=True), tensor.device.type == "cpu"

    def close(self) -> None:
        torch.cuda.synchronize() if torch.cuda.is_available() else None


def _wait(work: Any, deadline: float) -> None:
    """For a work of gloo, or the error in its place if it could not even begin; raises as `Group.wait`."""
    if isinstance(work, TimeoutError):
        raise work
    if isinstance(work, RuntimeError):
        raise ConnectionError(str(work)) from work
    try:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
    except RuntimeError as error:
        if time.monotonic() < deadline:
            raise ConnectionError(str(error)) from error
        raise TimeoutError(str(error)) from error
