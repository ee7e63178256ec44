"""A step of agents that live on several ranks: messages out and in, then the mixing."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gut_fast import ops
from gut_fast.backends import GossipStep
from gut_fast.distributed.buckets import Bucket, plan_buckets
from gut_fast.distributed.errors import PeerError
from gut_fast.distributed.group import Group, Transfer
from gut_fast.distributed.membership import JOIN_EVERY, admit, regroup
from gut_fast.distributed.placement import Route, make_route
from gut_fast.mixing import CSR
from gut_fast.topology import Topology

__all__ = ["Exchange"]

HAND_OVER = 1 << 20
"""Tags from here on are of parameters that a newcomer gets."""


class Flight(NamedTuple):
    """A bucket's messages on their way.

    Attributes:
        sends, receives: works of the transport, in the order of the route's.
    """

    bucket: Bucket
    sends: list[Any]
    receives: list[Any]


class Exchange:
    """What an optimizer does with the other ranks.

    Args:
        group: the ranks, each with `agents_per_rank` agents; agent a lives on rank ``a // agents_per_rank``.
        wire_dtype: of messages; None is the parameters'. Rounding to a narrower one is fed back.
        on_peer_failure: ``"continue"`` goes on with the ranks that are left.
        resets_state: whether the state is zeroed when ranks leave.

    Attributes:
        whole: the topology, with all agents.
        topology: of the agents that are there.
        settings: what newcomers compare with their own.
        bytes_sent: by (agent, rank), as numbered at the start.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        *,
        agents_per_rank: int,
        backend: str,
        wire_dtype: torch.dtype | None,
        on_peer_failure: Literal["raise", "continue"],
        resets_state: bool,
    ) -> None:
        self.group, self.whole = group, topology
        self.agents_per_rank, self.backend = agents_per_rank, backend
        self.topology = self._topology_of_members()
        self.settings: dict[str, Any] = {}
        self.wire_dtype = wire_dtype
        self.on_peer_failure, self.resets_state = on_peer_failure, resets_state
        self.bytes_sent: Counter[tuple[int, int]] = Counter()
        self.buckets: list[Bucket] = []
        self._flights: dict[int, Flight] = {}
        self._routes: dict[int, Route] = {}
        self._alone_until = 0
        self._failure: PeerError | None = None
        self._unsent: PeerError | None = None

    def route(self, number: int) -> Route:
        """Of step `number`."""
        key = number % self.topology.period if self.topology.period else number
        if key not in self._routes:
            if self.topology.period is None:
                self._routes.clear()
            self._routes[key] = make_route(self.topology.csr(number), self.group.rank, self.agents_per_rank)
        return self._routes[key]

    def mixing(self, number: int, device: torch.device) -> CSR:
        """The rows of W of the agents here, at step `number`."""
        return CSR(*(values.to(device) for values in self.route(number).mixing))

    def plan(self, steps: Sequence[GossipStep | None], limit: Callable[[int], int]) -> None:
        """Plans the buckets of these groups.

        Args:
            steps: of each group, None for one without parameters.
            limit: called with the bytes of one agent's messages; about how many of them travel at once.
        """
        sizes = [[p.numel() // self.agents_per_rank for p in step.parameters] if step else [] for step in steps]
        widths = [self._wire(step).itemsize * step.num_messages if step else 0 for step in steps]
        total = sum(width * sum(own) for width, own in zip(widths, sizes, strict=True))
        self.buckets = plan_buckets(sizes, widths, limit(total))

    def begin(self, bucket: Bucket, step: GossipStep, number: int) -> None:
        """Computes and sends a bucket's messages, and makes ready for the neighbours'."""
        route, dtype = self.route(number), self._wire(step)
        bucket.make_rows(step, route.senders, len(route.receives), dtype)
        bucket.write_messages(step, self.backend, self._has_feedback(step))
        outgoing, incoming = self._travelling(bucket, bucket.sent), self._travelling(bucket, bucket.received)
        sends = []
        for agent, rank, _ in route.sends:
            row = outgoing[agent - route.first_agent]
            assert row is not None
            sends.append(Transfer(row, rank, bucket.number))
            self.bytes_sent[self._agent(agent), self.group.members[rank]] += row.nbytes
        receives = [
            Transfer(row, rank, bucket.number)
            for row, (_, rank, _) in zip(incoming, route.receives, strict=False)
            if row is not None
        ]
        self._flights[bucket.number] = Flight(bucket, *self.group.start(sends, receives))

    def mixes(self, number: int) -> bool:
        """Whether step `number` is mixed: after others have left, a rank that is behind takes steps of its own."""
        return number >= self._alone_until and self._failure is None

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

    def _unload(self, bucket: Bucket) -> None:
        for row in bucket.received:
            if row.data_ptr() in bucket.staging:
                row.copy_(bucket.staging[row.data_ptr()], non_blocking=True)

    def has_begun(self, bucket: Bucket) -> bool:
        """Whether the bucket's messages of this step have left."""
        return bucket.number in self._flights

    def run(self, steps: Sequence[GossipStep | None], number: int) -> None:
        """The whole of step `number`; nothing is changed before all messages are there.

        Raises:
            PeerError: a neighbour is gone or late. After that no step can be taken.
        """
        if self._failure is not None:
            raise self._failure
        while number >= self._alone_until:
            try:
                steps = self._admit(steps, number)
                self._send_and_receive(steps, number)
                break
            except PeerError as failure:
                if self.on_peer_failure == "raise":
                    self._give_up(failure)
                    raise
                self._regroup(failure, number)
                steps = [step and self._reset(step, number) for step in steps]
        else:
            self._step_alone(steps)
            return
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            self._unload(bucket)
            rows = [*bucket.sent, *bucket.received[: len(self.route(number).receives)]]
            ops.combine_(bucket.part(step), rows, self.backend)
        self._finish_sends(number)

    def _step_alone(self, steps: Sequence[GossipStep | None]) -> None:
        for step in steps:
            if step is not None:
                nobody = CSR(torch.zeros_like(step.row_start), step.neighbor[:0], step.weight[:0])
                ops.prepare(step._replace(**nobody._asdict()), self.backend)()

    def _send_and_receive(self, steps: Sequence[GossipStep | None], number: int) -> None:
        if self._unsent is not None:
            failure, self._unsent = self._unsent, None
            raise failure
        for bucket in self.buckets:
            step = steps[bucket.group]
            if step is not None and not self.has_begun(bucket):
                self.begin(bucket, step, number)
        self._wait(number, is_send=False)

    def _finish_sends(self, number: int) -> None:
        """After the mixing, so a failure is one of the next step."""
        try:
            self._wait(number, is_send=True)
        except PeerError as failure:
            self._unsent = failure
        self._flights.clear()

    def _wait(self, number: int, *, is_send: bool) -> None:
        deadline = time.monotonic() + self.group.timeout
        for work, (agent, rank, listener) in self._works(number, is_send):
            try:
                self.group.wait(work, deadline)
            except (ConnectionError, TimeoutError) as error:
                edge = self._agent(agent), self._agent(listener)
                raise self._peer_error(error, rank, number, edge, is_send) from error

    def _works(self, number: int, is_send: bool) -> Iterator[tuple[Any, tuple[int, int, int]]]:
        route = self.route(number)
        for flight in self._flights.values():
            works, ways = (flight.sends, route.sends) if is_send else (flight.receives, route.receives)
            yield from zip(works, ways, strict=True)

    def _peer_error(self, error: Exception, place: int, number: int, edge: tuple[int, int], is_send: bool) -> PeerError:
        rank, is_gone = self.group.members[place], isinstance(error, ConnectionError)
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

    def _give_up(self, failure: PeerError) -> None:
        """Lets go of everything that is under way, and tells the neighbours why."""
        self._failure = failure
        self._let_go(failure)
        self.group.leave(str(failure))

    def _let_go(self, failure: PeerError) -> None:
        """Forgets all works: while anybody holds one, its connection stays open and the neighbours wait for nothing."""
        self._flights.clear()
        error: BaseException | None = failure
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__

    def _regroup(self, failure: PeerError, number: int) -> None:
        """Goes on with the ranks that are left."""
        before = self.group
        self._let_go(failure)
        self.group, self._alone_until = regroup(before, failure, number)
        self._take_group()
        if self.group.rank == 0:
            gone = sorted(set(before.members) - set(self.group.members))
            self._tell(f"ranks {gone} are gone; ranks {list(self.group.members)} go on from step {self._alone_until}")

    def _take_group(self) -> None:
        """Topology and rows of the new group; those that may still be under way are left behind."""
        self.topology = self._topology_of_members()
        self._routes.clear()
        self._flights.clear()
        for bucket in self.buckets:
            bucket.clear()

    def _topology_of_members(self) -> Topology:
        k, missing = self.agents_per_rank, self.group.missing
        return self.whole.without([rank * k + i for rank in missing for i in range(k)]) if missing else self.whole

    @staticmethod
    def _tell(what: str) -> None:
        warnings.warn(what, UserWarning, stacklevel=2)

    def _admit(self, steps: Sequence[GossipStep | None], number: int) -> Sequence[GossipStep | None]:
        """Lets ranks in that want to join, and sends them parameters; state stays, as theirs is zero."""
        if self.on_peer_failure == "raise" or not self.group.missing or number % JOIN_EVERY:
            return steps
        before = self.group
        self.group = admit(before, number, self._sponsor_of, self.settings)
        newcomers = sorted(set(self.group.members) - set(before.members))
        if not newcomers:
            return steps
        self._take_group()
        for newcomer in newcomers:
            if self._sponsor_of(newcomer) == self.group.members[self.group.rank]:
                self._hand_over(steps, self.group.members.index(newcomer), is_send=True)
        if self.group.rank == 0:
            self._tell(f"ranks {newcomers} have joined at step {number}")
        return [step and self._with_mixing(step, number) for step in steps]

    def _sponsor_of(self, newcomer: int) -> int:
        """The first neighbour of the newcomer's first agent that is there, else the first rank."""
        k = self.agents_per_rank
        ranks = [agent // k for agent in self.whole.graph.neighbors(newcomer * k)]
        return next((rank for rank in sorted(ranks) if rank in self.group.members), self.group.members[0])

    def join(self, steps: Sequence[GossipStep | None], sponsor: int) -> None:
        """Takes over a sponsor's parameters."""
        self._hand_over(steps, self.group.members.index(sponsor), is_send=False)

    def _hand_over(self, steps: Sequence[GossipStep | None], place: int, *, is_send: bool) -> None:
        tensors = [parameter for step in steps if step is not None for parameter in step.parameters]
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

    def _reset(self, step: GossipStep, number: int) -> GossipStep:
        if self.resets_state:
            for buffer in step.state:
                buffer.zero_()
        return self._with_mixing(step, number)

    def _with_mixing(self, step: GossipStep, number: int) -> GossipStep:
        return step._replace(**self.mixing(number, step.parameters[0].device)._asdict())

    def _agent(self, agent: int) -> int:
        """An agent's number as it was at the start."""
        place, own = divmod(agent, self.agents_per_rank)
        return self.group.members[place] * self.agents_per_rank + own

    def _wire(self, step: GossipStep) -> torch.dtype:
        return self.wire_dtype or step.parameters[0].dtype

    def _has_feedback(self, step: GossipStep) -> bool:
        return self._wire(step).itemsize < step.parameters[0].dtype.itemsize
