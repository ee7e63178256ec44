"""A step of agents that live on several ranks: messages out and in, then the mixing."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gut_fast.distributed.buckets import Bucket, plan_buckets
from gut_fast.distributed.errors import PeerError
from gut_fast.distributed.group import Group
from gut_fast.distributed.membership import JOIN_EVERY, admit, regroup
from gut_fast.distributed.placement import Route, make_route
from gut_fast.distributed.traffic import Traffic
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.topology import Topology
from gut_fast.topology.mixing import CSR

__all__ = ["Exchange"]


class Exchange:
    """What an optimizer does with the other ranks.

    Args:
        group: the ranks, each with `agents_per_rank` agents; agent a lives on rank ``a // agents_per_rank``.
        wire_dtype: of messages; None is the parameters'. Rounding to a narrower one is fed back.
        on_peer_failure: ``"continue"`` goes on with the ranks that are left.
        resets_state: whether the state is zeroed when ranks leave.
        shares_memory: whether ranks of one machine read each other's rows where they were written.

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
        shares_memory: bool,
    ) -> None:
        self.whole, self.agents_per_rank, self.backend = topology, agents_per_rank, backend
        self._traffic = Traffic(group, agents_per_rank)
        self.topology = self._topology_of_members()
        self.settings: dict[str, Any] = {}
        self.wire_dtype, self._shares_memory = wire_dtype, shares_memory
        self.on_peer_failure, self.resets_state = on_peer_failure, resets_state
        self.bytes_sent: Counter[tuple[int, int]] = Counter()
        self.buckets: list[Bucket] = []
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

    @property
    def group(self) -> Group:
        """The ranks that are there."""
        return self._traffic.group

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

    def meet(self, steps: Sequence[GossipStep | None]) -> None:
        """Finds out whose memory can be read, once the buckets are planned. Raises PeerError if not all ranks come."""
        rows = []
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            rows.append((step.num_messages * bucket.columns, self._wire(step)))
        is_on_cpu = all(step is None or step.parameters[0].device.type == "cpu" for step in steps)
        self._traffic.share(rows if self._shares_memory and is_on_cpu else None)

    def begin(self, bucket: Bucket, step: GossipStep, number: int) -> None:
        """Computes and sends a bucket's messages, and makes ready for the neighbours'."""
        route = self.route(number)
        bucket.make_rows(step, route, self._wire(step), self._traffic.shared_rows(bucket))
        bucket.write_messages(step, self.backend, self.has_feedback(step.parameters[0]))
        try:
            self._traffic.begin(bucket, route)
        except BaseException as error:
            self._give_up(error, number)
            raise
        for agent, rank, _ in route.sends:
            row = bucket.sent[agent - route.first_agent]
            assert row is not None
            self.bytes_sent[self._traffic.agent(agent), self.group.members[rank]] += row.nbytes

    def mixes(self, number: int) -> bool:
        """Whether step `number` is mixed: after others have left, a rank that is behind takes steps of its own."""
        return number >= self._alone_until and self._failure is None

    def has_begun(self, bucket: Bucket) -> bool:
        """Whether the bucket's messages of this step have left."""
        return self._traffic.has_begun(bucket)

    def run(self, steps: Sequence[GossipStep | None], number: int) -> None:
        """The whole of step `number`; nothing is changed before all messages are there.

        Raises:
            PeerError: a neighbour is gone or late. After that, or if it is interrupted, no step can be taken.
        """
        if self._failure is not None:
            raise self._failure
        try:
            self._run(steps, number)
        except BaseException as error:
            self._give_up(error, number)
            raise

    def _run(self, steps: Sequence[GossipStep | None], number: int) -> None:
        while number >= self._alone_until:
            try:
                if self._unsent is not None:
                    raise self._unsent
                steps = self._admit(steps, number)
                self._send_and_receive(steps, number)
                break
            except PeerError as failure:
                if self.on_peer_failure == "raise":
                    raise
                self._regroup(failure, number)
                steps = [step and self._reset(step, number) for step in steps]
        else:
            self._step_alone(steps)
            return
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            ops.combine_(bucket.part(step), [*bucket.sent, *bucket.received], self.backend)
        try:
            self._traffic.finish(self.route(number), number)
        except PeerError as failure:  # the step is done, so it is one of the next step
            self._unsent = failure

    def _step_alone(self, steps: Sequence[GossipStep | None]) -> None:
        for step in steps:
            if step is not None:
                nobody = CSR(torch.zeros_like(step.row_start), step.neighbor[:0], step.weight[:0])
                ops.prepare(step._replace(**nobody._asdict()), self.backend)()

    def _send_and_receive(self, steps: Sequence[GossipStep | None], number: int) -> None:
        if not self._traffic.is_ready:
            self.meet(steps)
        for bucket in self.buckets:
            step = steps[bucket.group]
            if step is not None and not self.has_begun(bucket):
                self.begin(bucket, step, number)
        self._traffic.wait_for_messages(self.buckets, number)

    def _give_up(self, error: BaseException, number: int) -> None:
        """Lets go of everything that is under way, and tells the neighbours why."""
        if self._failure is not None:
            return
        failure = error
        if not isinstance(failure, PeerError):
            own = self.group.members[self.group.rank]
            what = f"step {number}: rank {own} broke it off: {type(error).__name__}: {error}".rstrip(": ")
            failure = PeerError(what, own, step=number)
            failure.__cause__ = error
        self._failure = failure
        self._let_go(failure)
        self.group.leave(str(failure))

    def _let_go(self, failure: PeerError) -> None:
        self._traffic.let_go()
        error: BaseException | None
        for error in (failure, self._unsent):
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__
        self._unsent = None

    def _regroup(self, failure: PeerError, number: int) -> None:
        """Goes on with the ranks that are left."""
        before = self.group
        self._let_go(failure)
        group, self._alone_until = regroup(before, failure, number)
        self._take(group)
        if self.group.rank == 0:
            gone = sorted(set(before.members) - set(self.group.members))
            self._tell(f"ranks {gone} are gone; ranks {list(self.group.members)} go on from step {self._alone_until}")

    def _take(self, group: Group) -> None:
        """Topology and rows of the new group; those that may still be under way are left behind."""
        self._traffic = Traffic(group, self.agents_per_rank)
        self.topology = self._topology_of_members()
        self._routes.clear()
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
        group = admit(self.group, number, self._sponsor_of, self.settings)
        newcomers = sorted(set(group.members) - set(self.group.members))
        if not newcomers:
            return steps
        self._take(group)
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
        self._traffic.hand_over(tensors, place, is_send=is_send)

    def _reset(self, step: GossipStep, number: int) -> GossipStep:
        if self.resets_state:
            for buffer in step.state:
                buffer.zero_()
        return self._with_mixing(step, number)

    def _with_mixing(self, step: GossipStep, number: int) -> GossipStep:
        return step._replace(**self.mixing(number, step.parameters[0].device)._asdict())

    def _wire(self, step: GossipStep) -> torch.dtype:
        return self.wire_dtype or step.parameters[0].dtype

    def has_feedback(self, parameter: Tensor) -> bool:
        """Whether messages about it are rounded."""
        return (self.wire_dtype or parameter.dtype).itemsize < parameter.dtype.itemsize
