"""The ranks that train together, how messages travel among them, and the errors that name a rank.

Messages of a gloo group go through connections of our own, so that they never meet the user's, and so that the ranks
that are left can leave broken connections behind. Other backends (NCCL) serve through the user's own group.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from gut_fast.distributed.gloo_threads import settle
from gut_fast.distributed.notes import Notes, aside, has_ended, own_connection, own_mark

__all__ = ["DEFAULT_TIMEOUT", "Group", "MismatchError", "PeerError", "Transfer", "Welcome"]

DEFAULT_TIMEOUT = 60.0
"""The limit of any wait, in seconds, unless the user gives one."""
FIRST_EPOCH, PRESENT, CONNECTED = "epoch 0", "present", "connected"
"""Where the ranks of a new group leave their first notes."""
DECLINED = "/declined"
"""Where, on an occasion, a rank that does not come says why: see `Group.decline`."""
_numbers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # counts the Groups of each process group

atexit.register(settle)  # as early as this: what others register later, such as destroy_process_group, runs before it


class PeerError(RuntimeError):
    """A rank that this one waited for died or did not come in time.

    Attributes:
        rank: number of the other rank, as at the start.
        step: number of the step that could not be finished; None outside of steps.
        edge: (agent that sends, agent that hears) of the message that was missing, or None.
        is_gone: whether the connection broke, as when a process dies; else the limit passed.
    """

    def __init__(
        self,
        message: str,
        rank: int,
        *,
        step: int | None = None,
        edge: tuple[int, int] | None = None,
        is_gone: bool = False,
    ) -> None:
        super().__init__(message)
        self.rank, self.step, self.edge, self.is_gone = rank, step, edge, is_gone

    def __reduce__(self) -> tuple[object, ...]:
        state = {"step": self.step, "edge": self.edge, "is_gone": self.is_gone}
        return type(self), (str(self), self.rank), state


class MismatchError(ValueError):
    """The ranks were started with different settings; the message names the ranks and the difference."""


class Transfer(NamedTuple):
    """A tensor on its way to or from another rank.

    Attributes:
        tensor: what is sent, or where what comes is put.
        peer: the other rank's place in the group.
        tag: tells transfers between the same two ranks apart; transfers of one tag keep their order.
    """

    tensor: Tensor
    peer: int
    tag: int


class Welcome(NamedTuple):
    """The note for a rank that joins a run.

    Attributes:
        step: number of the step that the rank takes first.
        sponsor: number of the rank whose parameters it gets.
        settings: the other ranks' settings, to compare with its own.
    """

    step: int
    sponsor: int
    settings: dict[str, Any]


class Group:
    """The ranks that train together.

    Args:
        store: a store that all ranks reach and none of them takes along when it dies.
        rank: this process's place, 0 … size − 1.
        members: numbers of the ranks, as they were at the start and as errors name them.
        timeout: limit of any wait, in seconds.
        epoch: how often ranks have left or joined.
        everyone: how many ranks there are when none is missing; None is as many as there are members.
        welcome: the note for this rank if it joins a run that is under way.
        process_group: the group that carries the messages; None makes gloo connections of our own.
        marks: marks of the processes known so far, by number: see `own_mark`.

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
        self._notes = Notes(store, f"epoch {epoch}" if epoch else FIRST_EPOCH, timeout)
        self.marks = marks or {}
        self.marks = dict(zip(self.members, self.gather(PRESENT, own_mark()), strict=True))
        self._channel: _Gloo | _Given = self._connected() if process_group is None else _Given(process_group)

    @staticmethod
    def of(process_group: dist.ProcessGroup | Group, timeout: float = DEFAULT_TIMEOUT) -> Group:
        """Returns the group of a `torch.distributed` process group that this process belongs to.

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
        store = _next_store(process_group)
        backends = c10d.get_backend_config(process_group).split(",")  # such as cpu:gloo,cuda:nccl
        is_gloo = all(backend.endswith("gloo") for backend in backends)
        return Group(store, rank, members, timeout=timeout, process_group=None if is_gloo else process_group)

    @staticmethod
    def size_of(process_group: Any) -> int:
        """Counts the ranks of a process group or a `Group`, missing ones too. Raises TypeError if it is neither."""
        if isinstance(process_group, Group):
            return process_group.everyone
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, for example torch.distributed.group.WORLD "
                f"after init_process_group, got {type(process_group).__name__}"
            )
        return int(process_group.size())

    @staticmethod
    def decline(process_group: Any, reason: str) -> None:
        """Has the ranks that come to meet this one, or will, raise an error with this reason instead of waiting.

        Args:
            process_group: a group in which this rank would have made an optimizer; anything else is passed over.
            reason: why it has not.
        """
        if isinstance(process_group, Group):
            notes, what = process_group._notes, process_group.occasion()
            rank = process_group.members[process_group.rank]
        elif isinstance(process_group, dist.ProcessGroup) and (rank := dist.get_rank(process_group)) >= 0:
            notes, what = Notes(_next_store(process_group), FIRST_EPOCH, DEFAULT_TIMEOUT), PRESENT
        else:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone
            notes.briefly().set(what + DECLINED, json.dumps([rank, reason]))

    def occasion(self) -> str:
        """Returns the name of the next occasion on which the ranks compare settings."""
        return f"settings {next(self.occasions)}"

    def check_free(self) -> None:
        """Raises ValueError if another optimizer has taken the group: their messages would meet."""
        if self._is_taken:
            raise ValueError("this Group serves another optimizer; make each its own, of a PrefixStore of its own")

    def take(self) -> None:
        """Makes this the group of one optimizer. Raises as `check_free` does."""
        self.check_free()
        self._is_taken = True

    @property
    def size(self) -> int:
        """The number of ranks that are there."""
        return len(self.members)

    @property
    def missing(self) -> list[int]:
        """The numbers of the ranks that are not there."""
        return [number for number in range(self.everyone) if number not in self.members]

    @property
    def is_own(self) -> bool:
        """True if the connections are our own, so that ranks can leave and join."""
        return isinstance(self._channel, _Gloo)

    def gather(self, what: str, note: str) -> list[str]:
        """Leaves this rank's note, waits for the others', and returns all in order of rank.

        Args:
            what: a name for the occasion, another one each time.
            note: the note of this rank.

        Raises:
            PeerError: not all notes were there in time, or a rank has ended or declined; the message names the ranks
                that are missing.
        """
        keys = [f"{what}/{place}" for place in range(self.size)]
        self._notes.set(keys[self.rank], note)

        def missing() -> list[int]:
            return [number for number, key in zip(self.members, keys, strict=True) if not self._notes.check(key)]

        if not self._notes.wait(keys, lambda: self._is_vain(what, missing())) and (absent := missing()):
            raise self._absence(what, absent)
        return [self._notes.get(key) for key in keys]

    def _is_vain(self, what: str, absent: Sequence[int]) -> bool:
        """Returns whether one of these ranks is known not to come to an occasion."""
        return self._notes.check(what + DECLINED) or any(map(self.has_ended, absent))

    def _connected(self) -> _Gloo:
        """Returns connections among all ranks, once all of them have theirs.

        Gloo goes on for 30 seconds to call a rank that has died, however short the limit is; so it is left behind as
        soon as the death is known, and whoever gives up tells the others, which may have their connections already.

        Raises:
            PeerError: a rank has ended or given up, or the limit passed.
        """
        try:
            store, limit = own_connection(self._notes.store), self.timeout
            make = partial(_Gloo, store, self.rank, self.size, limit)
            channel = aside(make, limit, lambda: self._is_vain(CONNECTED, self.members))
        except (TimeoutError, PeerError) as failure:
            error = failure if isinstance(failure, PeerError) else self._absence(CONNECTED, self.members)
            self._notes.set(CONNECTED + DECLINED, json.dumps([self.members[self.rank], str(error)]))
            raise error from None
        self.gather(CONNECTED, "")
        return channel

    def _absence(self, what: str, absent: Sequence[int]) -> PeerError:
        """Makes the error about ranks that have not come to an occasion."""
        if self._notes.check(what + DECLINED):
            rank, reason = json.loads(self._notes.get(what + DECLINED))
            return PeerError(f"rank {rank} does not come to {what!r}, it has failed: {reason}", rank)
        if ended := [number for number in absent if self.has_ended(number)]:
            return PeerError(f"ranks {ended} have ended before they came to {what!r}", ended[0], is_gone=True)
        return PeerError(
            f"ranks {absent} have not come to {what!r} within {self.timeout:g} s; are they running, and do they "
            "make their optimizers in the same order?",
            absent[0],
        )

    def has_ended(self, number: int) -> bool:
        """Returns whether a rank's process is known to have ended."""
        return has_ended(self.marks.get(number, ""))

    def start(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> tuple[list[Any], list[Any]]:
        """Begins all these transfers and returns a work for each, sends and receives apart, to `wait` for."""
        return self._channel.start(sends, receives)

    def wait(self, work: Any, deadline: float) -> None:
        """Waits for a work until ``time.monotonic()`` passes the deadline.

        Raises:
            ConnectionError: the other rank is gone.
            TimeoutError: the deadline passed.
        """
        self._channel.wait(work, deadline)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums the tensor over all ranks, in place. Raises PeerError if not all came in time."""
        self._collective("all_reduce", self._channel.all_reduce(tensor))

    def reduce(self, tensor: Tensor, to: int) -> None:
        """Sums the tensor over all ranks, in place, on rank `to`. Raises PeerError if not all came in time."""
        self._collective("reduce", self._channel.reduce(tensor, to))

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites the tensor by that of the first rank. Raises PeerError if not all came in time."""
        self._collective("broadcast", self._channel.broadcast(tensor))

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
        """Returns why the rank at this place left, or None if it has not said so."""
        key, notes = f"last words/{place}", self._notes.briefly()
        try:
            return notes.get(key) if notes.check(key) else None
        except RuntimeError:
            return None

    def close(self) -> None:
        """Breaks the connections, if they are our own: whoever waits for this rank notices at once."""
        self._channel.close()


def _next_store(process_group: dist.ProcessGroup) -> Store:
    """Returns the store of the next `Group` of a process group, the same part of it on all ranks."""
    number = next(_numbers.setdefault(process_group, itertools.count()))
    return PrefixStore(f"gut_fast/{number}", c10d._get_process_group_store(process_group))


class _Gloo:
    """Gloo connections of our own among the ranks."""

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
            return error.with_traceback(None)  # its frames hold the other works: see Traffic.let_go

    def wait(self, work: Any, deadline: float) -> None:
        _wait(work, deadline)

    def all_reduce(self, tensor: Tensor) -> Any:
        return self._group.allreduce([tensor])

    def reduce(self, tensor: Tensor, to: int) -> Any:
        return self._group.reduce(tensor, to)

    def broadcast(self, tensor: Tensor) -> Any:
        return self._group.broadcast(tensor, 0)

    def close(self) -> None:
        self._group = None


class _Given:
    """The user's process group as a channel.

    NCCL does its works in order on a stream: waiting for a work holds up the stream, not this process. Whether the work
    was done in time is seen when the next transfers start. For transfers on the CPU this process waits.
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

    def broadcast(self, tensor: Tensor) -> Any:
        place = dist.get_global_rank(self._group, 0)
        return dist.broadcast(tensor, place, group=self._group, async_op=True), tensor.device.type == "cpu"

    def close(self) -> None:
        torch.cuda.synchronize() if torch.cuda.is_available() else None


def _wait(work: Any, deadline: float) -> None:
    """Waits for a work of gloo, or raises the error in its place if it could not even begin: see `Group.wait`."""
    if isinstance(work, TimeoutError):
        raise work
    if isinstance(work, RuntimeError):
        raise ConnectionError(str(work)) from work
    try:
        left = math.ceil(1e3 * (deadline - time.monotonic()))  # gloo cuts milliseconds off, and would be too early
        work.wait(timedelta(milliseconds=max(left, 1)))
    except RuntimeError as error:
        if time.monotonic() < deadline:
            raise ConnectionError(str(error)) from error
        raise TimeoutError(str(error)) from error
