"""Messages on their way: rows that travel through the group's connections, or are read where they were written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gut_fast.distributed.buckets import Bucket
from gut_fast.distributed.errors import PeerError
from gut_fast.distributed.group import Group, Transfer
from gut_fast.distributed.placement import Route, Way
from gut_fast.distributed.shared_memory import SharedRows

__all__ = ["Traffic"]

HAVE_READ, HAND_OVER = (1 << 20) - 1, 1 << 20
"""Tags: of bytes that say that shared rows have been read; from the second on, of parameters that a newcomer gets."""

Planned = list[tuple[Transfer, Way]]


class Flight(NamedTuple):
    """Works of the transport, each with the way it is of."""

    sends: list[tuple[Any, Way]]
    receives: list[tuple[Any, Way]]


class Traffic:
    """All messages between the ranks of one group.

    Args:
        group: they are lost with it.
        agents_per_rank: k.
    """

    def __init__(self, group: Group, agents_per_rank: int) -> None:
        self.group, self._agents_per_rank = group, agents_per_rank
        self._flights: dict[int, Flight] = {}
        self._readings = Flight([], [])
        self._shared: SharedRows | None = None
        self._turn = 0
        self._byte = torch.zeros(1, dtype=torch.uint8, device="cpu")

    @property
    def is_ready(self) -> bool:
        """Whether it is known where the rows of the buckets lie."""
        return self._shared is not None or not self.group.is_own

    def share(self, rows: Sequence[tuple[int, torch.dtype]] | None) -> None:
        """Meets the other ranks, to share what memory they can, once the buckets are planned: see `SharedRows`."""
        self._shared, self._turn = None, 0
        if self.group.is_own:
            self._shared = SharedRows(self.group, str(next(self.group.occasions)), rows, self._agents_per_rank)

    def shared_rows(self, bucket: Bucket) -> Callable[[int, int], Tensor | None]:
        """What finds the bucket's shared row of a rank's place and an agent there; None for rows that are not."""
        shared, turn = self._shared, self._turn
        return lambda place, agent: None if shared is None else shared.row(place, agent, bucket.number, turn)

    def begin(self, bucket: Bucket, route: Route) -> None:
        """Sends the bucket's messages, which are written, and makes ready for those of others."""
        outgoing, incoming = self._travelling(bucket, bucket.sent), self._travelling(bucket, bucket.received)
        sent = [outgoing[agent - route.first_agent] for agent, _, _ in route.sends]
        ways = (sent, route.sends), (incoming, route.receives)
        self._flights[bucket.number] = self._begun(*(self._planned(*each, bucket.number) for each in ways))

    def has_begun(self, bucket: Bucket) -> bool:
        """Whether the bucket's messages of this step have left."""
        return bucket.number in self._flights

    def wait_for_messages(self, buckets: Sequence[Bucket], number: int) -> None:
        """Until those of all buckets are there. Raises PeerError, of step `number`."""
        self._wait([each for flight in self._flights.values() for each in flight.receives], number, is_send=False)
        for bucket in buckets:
            for row in bucket.received:
                if row.data_ptr() in bucket.staging:
                    row.copy_(bucket.staging[row.data_ptr()], non_blocking=True)

    def finish(self, route: Route, number: int) -> None:
        """After the mixing, until rows may be written anew. Raises as `wait_for_messages`."""
        flights, before = list(self._flights.values()), self._readings
        self.let_go()
        self._turn += 1
        self._wait([each for flight in flights for each in flight.sends], number, is_send=True)
        # The rows that come next were shared in the step before this one: by now they have been read, as a rule.
        self._wait([*before.sends, *before.receives], number, is_send=True)
        told, tell = ({way[1]: way for way in ways if self._is_near(way[1])} for ways in (route.sends, route.receives))
        bytes_ = ([(Transfer(self._byte, rank, HAVE_READ), way) for rank, way in own.items()] for own in (tell, told))
        self._readings = self._begun(*bytes_)

    def hand_over(self, tensors: Sequence[Tensor], place: int, *, is_send: bool) -> None:
        """Sends tensors to a newcomer, or gets them as one. Raises PeerError if the other is lost."""
        transfers = [Transfer(tensor, place, HAND_OVER + k) for k, tensor in enumerate(tensors)]
        sends, receives = self.group.start(transfers, []) if is_send else self.group.start([], transfers)
        deadline = time.monotonic() + self.group.timeout
        for work in (*sends, *receives):
            try:
                self.group.wait(work, deadline)
            except (ConnectionError, TimeoutError) as error:
                rank, is_gone = self.group.members[place], isinstance(error, ConnectionError)
                what = f"rank {rank} was lost while parameters were handed over"
                raise PeerError(what, rank, is_gone=is_gone) from error

    def let_go(self) -> None:
        """Forgets all works: while anybody holds one, its connection stays open and the neighbours wait for nothing."""
        self._flights, self._readings = {}, Flight([], [])

    def agent(self, agent: int) -> int:
        """An agent's number as it was at the start."""
        place, own = divmod(agent, self._agents_per_rank)
        return self.group.members[place] * self._agents_per_rank + own

    def _is_near(self, place: int) -> bool:
        return self._shared is not None and place in self._shared.near

    def _planned(self, rows: Sequence[Tensor | None], ways: Sequence[Way], tag: int) -> Planned:
        """Transfers of the rows, or where they are shared, of a byte that says that one is written."""
        return [
            (Transfer(self._byte if self._is_near(way[1]) else row, way[1], tag), way)
            for row, way in zip(rows, ways, strict=True)
            if row is not None
        ]

    def _begun(self, sends: Planned, receives: Planned) -> Flight:
        works = self.group.start([transfer for transfer, _ in sends], [transfer for transfer, _ in receives])
        ways = [way for _, way in sends], [way for _, way in receives]
        return Flight(*(list(zip(*each, strict=True)) for each in zip(works, ways, strict=True)))

    def _travelling(self, bucket: Bucket, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The rows, or where gloo cannot reach them, on a GPU, copies in pinned memory."""
        if not self.group.is_own or not any(row is not None and row.is_cuda for row in rows):
            return list(rows)
        staged = [None if row is None else bucket.staged(row) for row in rows]
        if rows is bucket.sent:
            for row, copy in zip(rows, staged, strict=True):
                if row is not None and copy is not None:
                    copy.copy_(row, non_blocking=True)
            torch.cuda.current_stream(next(row.device for row in rows if row is not None)).synchronize()
        return staged

    def _wait(self, works: Iterable[tuple[Any, Way]], number: int, *, is_send: bool) -> None:
        deadline = time.monotonic() + self.group.timeout
        for work, way in works:
            try:
                self.group.wait(work, deadline)
            except (ConnectionError, TimeoutError) as error:
                raise self._lost(error, way, number, is_send) from error

    def _lost(self, error: Exception, way: Way, number: int, is_send: bool) -> PeerError:
        agent, place, listener = way
        rank, is_gone = self.group.members[place], isinstance(error, ConnectionError)
        edge = self.agent(agent), self.agent(listener)
        what = f"step {number}: agent {edge[0]}'s message to agent {edge[1]} "
        what += f"could not be sent to rank {rank}, " if is_send else f"did not come from rank {rank}, "
        if not is_gone:
            limit = f"{self.group.timeout:g} s"
            what += f"which was not ready within {limit}: it is stopped, stuck or slow (timeout= sets the limit)"
        elif cause := self.group.last_words(place):
            what += f"which gave up: {cause}"
        else:
            what += "which is gone: its process has ended or its connection broke"
        return PeerError(what, rank, step=number, edge=edge, is_gone=is_gone)
