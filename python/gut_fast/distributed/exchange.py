"""An optimizer's part in a run on several ranks: settings compared, messages out and in, then the mixing."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gut_fast.distributed.agreement import check_agreement, check_welcome, fixed_settings, group_settings
from gut_fast.distributed.group import Group, PeerError, Welcome
from gut_fast.distributed.membership import JOIN_EVERY, RankOptions, admit, regroup
from gut_fast.distributed.overlap import Overlap
from gut_fast.distributed.starts import Meeting, begin_alike
from gut_fast.distributed.traffic import Bucket, Route, Traffic, make_route, plan_buckets
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, arithmetic
from gut_fast.rules import UpdateRule
from gut_fast.topology import CSR, Topology, nobody

__all__ = ["Exchange"]

BUCKET_BYTES, LEAST_BUCKET_BYTES, OVERLAPPING_BUCKETS = 25 << 20, 256 << 10, 4
"""Sizes of buckets unless the user sets one: with overlap there are four, so that some can leave early."""


class Exchange:
    """The agents of this process and their messages to and from those of other ranks: the work of an optimizer.

    The optimizer hands over snapshots of its step, a `GossipStep` for each parameter group, None for a group without
    parameters. Agent a lives on rank ``a // agents_per_rank``.

    Args:
        process_group: a `torch.distributed` process group, or a `Group`.
        topology: who mixes with whom, all agents of all ranks.
        rule: the update rule; if it tracks, its state is zeroed when ranks leave.
        backend: the name of the backend that computes messages and mixing.
        options: how this process takes part.
        local_steps: the number of steps in a round; the steps of an exchange are those that end one.

    Attributes:
        topology: the topology of the agents that are there.
        buckets: the buckets in which messages travel.
        bytes_sent: bytes of messages by (agent, rank), as numbered at the start.
        overlap: what watches the gradients if messages may leave during backward, or None.

    Raises:
        TypeError, ValueError: a bad argument, or the topology has not `agents_per_rank` agents for each rank.
        MismatchError, PeerError: the ranks differ, or not all came: see `check_agreement`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | Group,
        topology: Topology,
        rule: UpdateRule,
        backend: str,
        options: RankOptions,
        local_steps: int = 1,
    ) -> None:
        options.check()
        self.options, self.agents_per_rank = options, options.agents_per_rank or 1
        group = Group.of(process_group, options.timeout)
        group.check_free()
        self._traffic = Traffic(group, self.agents_per_rank)
        self._settings: dict[str, Any] = {}
        self._agree(fixed_settings(rule, topology, backend, group.timeout, options, local_steps), group.welcome)
        if group.everyone * self.agents_per_rank != topology.num_agents:
            raise ValueError(
                f"{topology} has {topology.num_agents} agents, but {group.everyone} ranks with {self.agents_per_rank} "
                f"each have {group.everyone * self.agents_per_rank}; give a topology of that many, or agents_per_rank="
            )
        if options.on_peer_failure == "continue" and not group.is_own:
            raise ValueError('on_peer_failure="continue" needs a gloo process group; others cannot lose a rank')
        self._rule, self._backend, self._whole = rule, backend, topology
        self.topology = self._topology_of_members()
        self.buckets: list[Bucket] = []
        self.bytes_sent: Counter[tuple[int, int]] = Counter()
        self.overlap: Overlap | None = None
        self._routes: dict[int, Route] = {}
        self._num_compared = 0  # parameter groups
        self._alone_until = 0
        self._failure: PeerError | None = None
        self._unsent: PeerError | None = None

    @property
    def group(self) -> Group:
        """The ranks that are there."""
        return self._traffic.group

    def mixing(self, number: int, device: torch.device) -> CSR:
        """Returns the rows of W of the agents here, at step `number`."""
        return CSR(*(values.to(device) for values in self._route(number).mixing))

    def _route(self, number: int) -> Route:
        """Returns the route of step `number`."""
        key = number % self.topology.period if self.topology.period else number
        if key not in self._routes:
            if self.topology.period is None:
                self._routes.clear()
            self._routes[key] = make_route(self.topology.csr(number), self.group.rank, self.agents_per_rank)
        return self._routes[key]

    def check_wire(self, dtype: torch.dtype) -> None:
        """Raises TypeError unless messages about parameters of `dtype` can have the wire's dtype."""
        wire = self.options.wire_dtype or dtype
        allowed = dict.fromkeys([dtype, arithmetic(dtype), *([torch.bfloat16] if dtype == torch.float32 else [])])
        if wire not in allowed:
            choice = " or ".join(map(str, allowed))
            raise TypeError(f"wire_dtype is {wire}; messages about parameters of {dtype} can be {choice}")

    def meet(self, groups: Sequence[Mapping[str, Any]], steps: Sequence[GossipStep | None]) -> Meeting:
        """Makes sure that all ranks have the same settings, and plans the buckets; again after a group is added.

        New groups are overwritten by the first agent's with `sync_initial`, else compared.

        Args:
            groups: the optimizer's parameter groups.
            steps: a snapshot of each group's step.

        Raises:
            MismatchError, PeerError: the ranks differ, or not all came: see `check_agreement`.
        """
        welcome = None
        if not self._num_compared:
            self.group.take()
            welcome = self.group.welcome
        self._agree(group_settings(self._rule, groups, steps), welcome)
        self._plan_buckets(steps)
        if welcome is None:
            new = [parameter for group in groups[self._num_compared :] for parameter in group["params"]]
            said = begin_alike(self.group, new, self.agents_per_rank, is_synchronized=self.options.sync_initial)
            meeting = Meeting(difference=said)
        else:
            self._hand_over(steps, self.group.members.index(welcome.sponsor), is_send=False)
            meeting = Meeting(step=welcome.step)
        self._share_memory(steps)
        self.overlap = Overlap(self.buckets, [group["params"] for group in groups]) if self.options.overlap else None
        self._num_compared = len(groups)
        return meeting

    def _agree(self, settings: Mapping[str, Any], welcome: Welcome | None) -> None:
        """Compares settings with the other ranks, which do the same, or with those that they let a newcomer know."""
        if welcome is None:
            check_agreement(self.group, settings)
        else:
            check_welcome(self.group, welcome, settings)
        self._settings |= settings

    def _plan_buckets(self, steps: Sequence[GossipStep | None]) -> None:
        """Plans buckets of the size that the user set, or else as many as suit a model of this size."""
        sizes = [[p.numel() // self.agents_per_rank for p in step.parameters] if step else [] for step in steps]
        widths = [self._wire(step).itemsize * step.num_messages if step else 0 for step in steps]
        limit = self.options.bucket_bytes
        if limit is None:
            total = sum(width * sum(own) for width, own in zip(widths, sizes, strict=True))
            parts = OVERLAPPING_BUCKETS if self.options.overlap else 1
            limit = min(BUCKET_BYTES, max(total // parts, LEAST_BUCKET_BYTES))
        self.buckets = plan_buckets(sizes, widths, limit)

    def _share_memory(self, steps: Sequence[GossipStep | None]) -> None:
        """Finds out whose memory can be read, once the buckets are planned. Raises PeerError if not all ranks come."""
        rows = []
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            rows.append((step.num_messages * bucket.columns, self._wire(step)))
        is_on_cpu = all(step is None or step.parameters[0].device.type == "cpu" for step in steps)
        self._traffic.share(rows if self.options.shared_memory and is_on_cpu else None)

    def gradients_are_there(self, bucket: Bucket, step: GossipStep, number: int) -> None:
        """Takes note during backward that a bucket is complete, and lets its messages of step `number` leave."""
        assert self.overlap is not None
        self.overlap.note(bucket, step)
        if self.overlap.has_watched and self._can_mix(number):
            self.begin(bucket, step, number)

    def _can_mix(self, number: int) -> bool:
        """Returns whether the ranks have met, and mix step `number`.

        After others have left, ranks that are behind take steps of their own, and all meet anew in their first step
        together: what left before that would go into rows that the neighbours do not know.
        """
        return self._failure is None and number >= self._alone_until and self._traffic.is_ready

    def begin(self, bucket: Bucket, step: GossipStep, number: int) -> None:
        """Computes and sends a bucket's messages, and makes ready for the neighbours' messages."""
        route = self._route(number)
        self._traffic.make_rows(bucket, step, route, self._wire(step))
        bucket.write_messages(step, self._backend, self._has_feedback(step.parameters[0]))
        try:
            self._traffic.begin(bucket, route)
        except BaseException as error:
            self._give_up(error, number)
            raise
        for agent, rank, _ in route.sends:
            row = bucket.sent[agent - route.first_agent]
            assert row is not None
            self.bytes_sent[self._traffic.agent(agent), self.group.members[rank]] += row.nbytes

    def has_begun(self) -> bool:
        """Returns whether messages of the next step have left, as they do with overlap."""
        return any(map(self._traffic.has_begun, self.buckets))

    def check_idle(self) -> None:
        """Raises RuntimeError if messages of the next step have left."""
        if self.has_begun():
            raise RuntimeError("messages of this step have left already; call step() first")

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which no message leaves."""
        return contextlib.nullcontext() if self.overlap is None else self.overlap.paused()

    def run(self, steps: Sequence[GossipStep | None], number: int, reason: str | None = None) -> None:
        """Takes the whole of step `number`; nothing is changed before all messages are there.

        Args:
            steps: a snapshot of each group's step.
            number: of the step.
            reason: why messages that left early are not those of this step, if the optimizer knows one.

        Raises:
            PeerError: a neighbour is gone or late. After that, or if it is interrupted, no step can be taken.
        """
        if self.overlap is not None and (said := self.overlap.close_step(steps, reason)) and not self.group.rank:
            warnings.warn(said, UserWarning, stacklevel=2)
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
                if self.options.on_peer_failure == "raise":
                    raise
                self._regroup(failure, number)
                steps = [step and self._reset(step, number) for step in steps]
        else:
            self.run_local(steps)
            return
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            ops.combine_(bucket.part(step), [*bucket.sent, *bucket.received], self._backend)
        try:
            self._traffic.finish(self._route(number), number)
        except PeerError as failure:  # this step is done, so the failure is one of the next step
            self._unsent = failure

    def run_local(self, steps: Sequence[GossipStep | None]) -> None:
        """Takes a step in which nobody mixes; nothing is changed if one of the groups' steps is bad."""
        alone = [
            step._replace(**nobody(step.num_agents, step.row_start.device)._asdict())
            for step in steps
            if step is not None
        ]
        for run in [ops.prepare(step, self._backend) for step in alone]:
            run()

    def _send_and_receive(self, steps: Sequence[GossipStep | None], number: int) -> None:
        """Sends what has not left yet, and waits for the neighbours' messages."""
        if not self._traffic.is_ready:
            self._share_memory(steps)
        for bucket in self.buckets:
            step = steps[bucket.group]
            if step is not None and not self._traffic.has_begun(bucket):
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
        """Forgets all works, those in the errors' frames too: see `Traffic.let_go`."""
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
            said = f"ranks {gone} are gone; ranks {list(self.group.members)} go on from step {self._alone_until}"
            warnings.warn(said, UserWarning, stacklevel=2)

    def _take(self, group: Group) -> None:
        """Begins anew with another group; rows that may still be under way are left behind."""
        self._traffic = Traffic(group, self.agents_per_rank)
        self.topology = self._topology_of_members()
        self._routes.clear()
        for bucket in self.buckets:
            bucket.clear()

    def _topology_of_members(self) -> Topology:
        k, missing = self.agents_per_rank, self.group.missing
        return self._whole.without([rank * k + i for rank in missing for i in range(k)]) if missing else self._whole

    def _admit(self, steps: Sequence[GossipStep | None], number: int) -> Sequence[GossipStep | None]:
        """Lets ranks in that want to join, and sends them parameters; state stays, as theirs is zero."""
        if self.options.on_peer_failure == "raise" or not self.group.missing or number % JOIN_EVERY:
            return steps
        sponsors = {missing: self._sponsor_of(missing) for missing in self.group.missing}
        group = admit(self.group, number, sponsors, self._settings)
        newcomers = sorted(set(group.members) - set(self.group.members))
        if not newcomers:
            return steps
        own = self.group.members[self.group.rank]
        self._take(group)
        for newcomer in newcomers:
            if sponsors[newcomer] == own:
                self._hand_over(steps, group.members.index(newcomer), is_send=True)
        if group.rank == 0:
            warnings.warn(f"ranks {newcomers} have joined at step {number}", UserWarning, stacklevel=2)
        return [step and self._with_mixing(step, number) for step in steps]

    def _sponsor_of(self, newcomer: int) -> int:
        """Returns the first neighbour of the newcomer's first agent that is there, else the first rank."""
        k = self.agents_per_rank
        ranks = [agent // k for agent in self._whole.graph.neighbors(newcomer * k)]
        return next((rank for rank in sorted(ranks) if rank in self.group.members), self.group.members[0])

    def _hand_over(self, steps: Sequence[GossipStep | None], place: int, *, is_send: bool) -> None:
        """Sends all parameters to a newcomer, or takes over its sponsor's."""
        tensors = [parameter for step in steps if step is not None for parameter in step.parameters]
        self._traffic.hand_over(tensors, place, is_send=is_send)

    def _reset(self, step: GossipStep, number: int) -> GossipStep:
        """Fits a step to the ranks that are left: their mixing, and state zero if the rule tracks."""
        if any(map(any, self._rule.coefficients(1.0).E[1:])):
            for buffer in step.state:
                buffer.zero_()
        return self._with_mixing(step, number)

    def _with_mixing(self, step: GossipStep, number: int) -> GossipStep:
        return step._replace(**self.mixing(number, step.parameters[0].device)._asdict())

    def _wire(self, step: GossipStep) -> torch.dtype:
        return self.options.wire_dtype or step.parameters[0].dtype

    def _has_feedback(self, parameter: Tensor) -> bool:
        """Returns whether messages about a parameter are rounded."""
        return (self.options.wire_dtype or parameter.dtype).itemsize < parameter.dtype.itemsize

    def residuals(self) -> list[list[Tensor]]:
        """Copies what rounding has left of messages, for each bucket."""
        return [[row.clone() for row in bucket.residual] for bucket in self.buckets]

    def load_residuals(self, residuals: Sequence[Sequence[Tensor]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `residuals` returned: see `checked_residuals`."""
        for bucket, rows in zip(self.buckets, self.checked_residuals(residuals, groups), strict=True):
            bucket.residual = rows

    def checked_residuals(
        self, residuals: Sequence[Sequence[Tensor]], groups: Sequence[Mapping[str, Any]]
    ) -> list[list[Tensor]]:
        """Copies residuals for each bucket. None at all are zero; where nothing is rounded none are needed.

        Raises:
            ValueError: they are of other buckets; nothing has been changed.
        """
        found = _shapes(residuals)
        firsts: list[Tensor] = [groups[bucket.group]["params"][0] for bucket in self.buckets]
        if not any(map(self._has_feedback, firsts)) or (isinstance(found, list) and not any(found)):
            return [[] for _ in self.buckets]
        messages = self._rule.num_messages
        expected = [[(messages * bucket.columns,)] * self.agents_per_rank for bucket in self.buckets]
        is_right = isinstance(found, list) and len(found) == len(expected)
        if not is_right or any(f not in ([], e) for f, e in zip(found, expected, strict=True)):
            raise ValueError(
                f"the state's residuals are of shapes {found}, expected {expected}, for each bucket those of the "
                "agents here: use the same bucket_bytes and overlap, or delete state_dict['residuals']"
            )
        return [
            [row.to(first.device, arithmetic(first.dtype), copy=True) for row in rows]
            for rows, first in zip(residuals, firsts, strict=True)
        ]


def _shapes(residuals: Any) -> Any:
    """Puts tensors' shapes in their place, in lists of lists of them."""
    if isinstance(residuals, (list, tuple)):
        return [_shapes(each) for each in residuals]
    is_right = isinstance(residuals, Tensor) and residuals.is_floating_point()
    return tuple(residuals.shape) if is_right else type(residuals).__name__
