"""Messages on their way: which agents hear which, the buckets that travel together, and the transfers of a step.

A bucket is a run of parameters whose messages travel together. Its rows of messages go through the group's connections,
or ranks of one machine read them where they were written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gut_fast.distributed.group import Group, PeerError, Transfer
from gut_fast.distributed.shared_memory import SharedRows
from gut_fast.distributed.wire import Copies, Wire
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.kernels.buffers import allocate
from gut_fast.topology.mixing import CSR

__all__ = ["Bucket", "Route", "Traffic", "Way", "make_route", "plan_buckets"]

EXACT, HAVE_READ, HAND_OVER = 1 << 19, (1 << 20) - 1, 1 << 20
"""Tags of transfers: what a bucket's number becomes if a message that could be coded travels as it is, of a byte that
says that shared rows have been read, and of a newcomer's first parameter."""

Way = tuple[int, int, int]
"""A message between ranks: (the agent that sends it, the other rank's place, the first agent that hears it)."""


class Route(NamedTuple):
    """The messages of one step, seen from one rank that holds agents first_agent … first_agent + k − 1.

    Ranks are given by their places in the group. An agent's message travels once to each rank where somebody hears it.

    Attributes:
        mixing: the rows of W of the agents here; ``neighbor`` indexes into rows of messages: the rows of the k agents
            here, then the received ones. The order of edges, and so of summation, is that of W.
        first_agent: number of the first agent here.
        sends: the messages that leave this rank, ascending.
        receives: the messages that come to this rank, in the order of rows.
    """

    mixing: CSR
    first_agent: int
    sends: tuple[Way, ...]
    receives: tuple[Way, ...]


def make_route(W: CSR, rank: int, agents_per_rank: int) -> Route:
    """Makes the route of a rank, agents placed in order: agent a lives on rank ``a // agents_per_rank``."""
    k, first = agents_per_rank, rank * agents_per_rank
    listener = torch.from_numpy(np.repeat(np.arange(len(W.row_start) - 1), W.row_start.diff().numpy()))
    speaker_rank, listener_rank = W.neighbor // k, listener // k

    heard = W.neighbor[listener_rank == rank]
    is_here = speaker_rank[listener_rank == rank] == rank
    away = heard[~is_here].unique()
    row_start = W.row_start[first : first + k + 1] - W.row_start[first]
    neighbor = torch.where(is_here, heard - first, k + torch.searchsorted(away, heard))
    mixing = CSR(row_start.contiguous(), neighbor, W.weight[listener_rank == rank].contiguous())

    incoming = (listener_rank == rank) & (speaker_rank != rank)
    outgoing = (listener_rank != rank) & (speaker_rank == rank)
    receives = _first_of_each(W.neighbor[incoming], speaker_rank[incoming], listener[incoming])
    sends = _first_of_each(W.neighbor[outgoing], listener_rank[outgoing], listener[outgoing])
    return Route(mixing, first, sends, receives)


def _first_of_each(agent: Tensor, rank: Tensor, listener: Tensor) -> tuple[Way, ...]:
    """Keeps the first listener of each pair of agent and rank, pairs ascending."""
    first: dict[tuple[int, int], int] = {}
    for a, r, i in zip(agent.tolist(), rank.tolist(), listener.tolist(), strict=True):
        first.setdefault((a, r), i)
    return tuple((a, r, first[a, r]) for a, r in sorted(first))


@dataclass
class Bucket:
    """Parameters ``start … stop − 1`` of a group, and the rows their messages travel in.

    Attributes:
        number: tells buckets apart on all ranks.
        group: index of the parameter group.
        column: where the bucket's numbers begin in one agent's model of the group.
        sizes: how many numbers one agent has of each parameter.
        sent: a row for each agent here, [M · columns] or the bytes of a code; None for agents that nobody on another
            rank hears.
        received: rows of agents elsewhere, in the order of the route.
        own: the memory of these rows where they do not lie in shared memory.
        copies: what coded messages leave at both ends; None if messages are not coded.
        exact: the agents whose messages of this round travel as they are, though others are coded.
        exact_received: whether each received row is such a message.
        staging: for rows on a GPU that travel through the host, pinned copies by address and length of the row.
    """

    number: int
    group: int
    start: int
    stop: int
    column: int
    sizes: tuple[int, ...]
    sent: list[Tensor | None] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    copies: Copies | None = None
    exact: frozenset[int] = frozenset()
    exact_received: list[bool] = field(default_factory=list)
    staging: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """The numbers of one agent."""
        return sum(self.sizes)

    def staged(self, row: Tensor) -> Tensor:
        """Returns the row's copy on the host, its contents not copied yet."""
        key = row.data_ptr(), row.nbytes
        if key not in self.staging:
            self.staging[key] = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
        return self.staging[key]

    def clear(self) -> None:
        """Leaves all rows behind: some may still be under way."""
        self.sent, self.received, self.own, self.staging = [], [], [], {}

    def row_form(self, step: GossipStep, wire: Wire) -> tuple[int, torch.dtype]:
        """Returns the length and the dtype of the longest row that travels."""
        length = step.num_messages * self.columns if self.copies is None else self.copies.room
        return length, wire.row_dtype(step.parameters[0].dtype)

    def part(self, step: GossipStep) -> GossipStep:
        """Returns the step of the bucket's parameters alone; their state is one run of the group's state."""
        k = step.num_agents
        return step._replace(
            parameters=step.parameters[self.start : self.stop],
            state=[buffer[k * self.column : k * (self.column + self.columns)] for buffer in step.state],
            gradients=step.gradients[self.start : self.stop],
        )

    def write_messages(self, step: GossipStep, backend: str, wire: Wire, number: int, first_agent: int) -> None:
        """Writes the messages of round `number` of the agents here into the rows that are sent."""
        part = self.part(step)
        if self.copies is not None:
            self.copies.encode(part, wire, number, first_agent, self.sent, backend)
            return
        dtype = step.parameters[0].dtype
        if wire.rounds(
            dtype
        ):  # an agent that nobody elsewhere hears is heard here, and by itself, as it would be there
            fresh = part.new_rows(wire.row_dtype(dtype))
            self.sent = [new if row is None else row for row, new in zip(self.sent, fresh, strict=True)]
        ops.message(part, self.sent, backend)

    def mix_(self, step: GossipStep, backend: str) -> None:
        """Mixes the messages that were sent and received, and computes parameters and state anew."""
        part = self.part(step)
        if self.copies is None:
            ops.combine_(part, [*self.sent, *self.received], backend)
        else:
            ops.combine_(*self.copies.decode(part, self.received, self.exact_received), backend)


def plan_buckets(
    sizes: Sequence[Sequence[int]],
    bytes_per_number: Sequence[int],
    limit: int,
    kind: type[Bucket] = Bucket,
    first: int = 0,
) -> list[Bucket]:
    """Plans buckets of about `limit` bytes, in the order in which gradients come: the last parameters first.

    Args:
        sizes: for each group, how many numbers one agent has of each parameter.
        bytes_per_number: for each group, how many bytes of messages one number makes.
        limit: bytes; a bucket ends with the parameter that reaches it.
        kind: the class of the buckets.
        first: the number of the first bucket.
    """
    buckets: list[Bucket] = []
    for group in reversed(range(len(sizes))):
        stop = len(sizes[group])
        while stop > 0:
            start, columns = stop, 0
            while start > 0 and (start == stop or columns * bytes_per_number[group] < limit):
                start -= 1
                columns += sizes[group][start]
            column, own = sum(sizes[group][:start]), tuple(sizes[group][start:stop])
            buckets.append(kind(first + len(buckets), group, start, stop, column, own))
            stop = start
    return buckets


Planned = list[tuple[Transfer, Way]]


class Flight(NamedTuple):
    """Works of the transport, each with its message."""

    sends: list[tuple[Any, Way]]
    receives: list[tuple[Any, Way]]


class Traffic:
    """All messages between the ranks of one group, in either direction.

    Args:
        group: the ranks; when a rank leaves or joins there is a new group, and new traffic.
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
        """True once it is known where the rows of the buckets lie."""
        return self._shared is not None or not self.group.is_own

    def share(self, rows: Sequence[tuple[int, torch.dtype]] | None) -> None:
        """Meets the other ranks, to share what memory they can, once the buckets are planned: see `SharedRows`."""
        self._shared, self._turn = None, 0
        if self.group.is_own:
            self._shared = SharedRows(self.group, str(next(self.group.occasions)), rows, self._agents_per_rank)

    def make_rows(self, bucket: Bucket, step: GossipStep, route: Route, wire: Wire) -> None:
        """Finds rows for the bucket's messages of a step: shared rows, or else rows that the bucket keeps."""
        device, (length, dtype) = step.parameters[0].device, bucket.row_form(step, wire)
        used = itertools.count()
        copies, speakers = bucket.copies, [agent for agent, _, _ in (*route.sends, *route.receives)]
        bucket.exact = frozenset(agent for agent in speakers if copies is not None and wire.is_exact(agent))
        bucket.exact_received = [agent in bucket.exact for agent, _, _ in route.receives]

        def whole_row(agent: int) -> Tensor:
            if self._shared is not None:
                place, own = divmod(agent, self._agents_per_rank)
                if (found := self._shared.row(place, own, bucket.number, self._turn)) is not None:
                    return found
            index = next(used)
            if index == len(bucket.own):
                bucket.own.append(allocate(length, dtype, device))
            return bucket.own[index]

        def row(agent: int) -> Tensor:
            return whole_row(agent)[: length if copies is None else copies.num_bytes(agent in bucket.exact)]

        bucket.sent = [None] * self._agents_per_rank
        for agent in sorted({agent for agent, _, _ in route.sends}):
            bucket.sent[agent - route.first_agent] = row(agent)
        bucket.received = [row(agent) for agent, _, _ in route.receives]

    def begin(self, bucket: Bucket, route: Route) -> None:
        """Sends the bucket's messages, which are written, and makes ready for the neighbours' messages."""
        outgoing, incoming = self._travelling(bucket, bucket.sent), self._travelling(bucket, bucket.received)
        sent = [outgoing[agent - route.first_agent] for agent, _, _ in route.sends]
        ways = (sent, route.sends), (incoming, route.receives)
        self._flights[bucket.number] = self._begun(*(self._planned(*each, bucket) for each in ways))

    def has_begun(self, bucket: Bucket) -> bool:
        """Returns whether the bucket's messages of this step have left."""
        return bucket.number in self._flights

    def wait_for_messages(self, buckets: Sequence[Bucket], number: int) -> None:
        """Waits until the messages of all buckets are there. Raises PeerError, of step `number`."""
        self._wait([each for flight in self._flights.values() for each in flight.receives], number, is_send=False)
        for bucket in buckets:
            for row in bucket.received:
                if (row.data_ptr(), row.nbytes) in bucket.staging:
                    row.copy_(bucket.staged(row), non_blocking=True)

    def finish(self, route: Route, number: int) -> None:
        """Waits, after the mixing, until rows may be written anew. Raises PeerError, of step `number`."""
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
        """Sends tensors to a newcomer, or receives them as one. Raises PeerError if the other rank is lost."""
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
        """Forgets all works: a work that somebody holds keeps its connection open, and the neighbours wait in vain."""
        self._flights, self._readings = {}, Flight([], [])

    def agent(self, agent: int) -> int:
        """Returns an agent's number as it was at the start."""
        place, own = divmod(agent, self._agents_per_rank)
        return self.group.members[place] * self._agents_per_rank + own

    def _is_near(self, place: int) -> bool:
        """Returns whether the rank at this place shares memory with this one."""
        return self._shared is not None and place in self._shared.near

    def _planned(self, rows: Sequence[Tensor | None], ways: Sequence[Way], bucket: Bucket) -> Planned:
        """Plans transfers of the rows, or where they are shared, of a byte that says that one is written."""
        planned = []
        for row, way in zip(rows, ways, strict=True):
            if row is not None:
                tag = bucket.number + (EXACT if way[0] in bucket.exact else 0)
                planned.append((Transfer(self._byte if self._is_near(way[1]) else row, way[1], tag), way))
        return planned

    def _begun(self, sends: Planned, receives: Planned) -> Flight:
        """Begins all these transfers."""
        works = self.group.start([transfer for transfer, _ in sends], [transfer for transfer, _ in receives])
        ways = [way for _, way in sends], [way for _, way in receives]
        return Flight(*(list(zip(*each, strict=True)) for each in zip(works, ways, strict=True)))

    def _travelling(self, bucket: Bucket, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the rows, or where gloo cannot reach them, on a GPU, copies in pinned memory."""
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
        """Waits for works, all within one limit. Raises PeerError, of step `number`."""
        deadline = time.monotonic() + self.group.timeout
        for work, way in works:
            try:
                self.group.wait(work, deadline)
            except (ConnectionError, TimeoutError) as error:
                raise self._lost(error, way, number, is_send) from error

    def _lost(self, error: Exception, way: Way, number: int, is_send: bool) -> PeerError:
        """Makes the error about a message that did not travel."""
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
