"""An optimizer's part in a run on several ranks: settings compared, messages out and in, then the mixing."""

from __future__ import annotations

import contextlib
import itertools
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from gut_fast.distributed import wire_state
from gut_fast.distributed.agreement import check_agreement, check_welcome, fixed_settings, group_settings
from gut_fast.distributed.group import Group, PeerError, Welcome
from gut_fast.distributed.membership import JOIN_EVERY, RankOptions, admit, regroup
from gut_fast.distributed.overlap import Overlap
from gut_fast.distributed.starts import Meeting, begin_alike
from gut_fast.distributed.state_bucket import DTYPE, StateBucket
from gut_fast.distributed.traffic import Bucket, Route, Traffic, make_route, plan_buckets
from gut_fast.distributed.wire import Copies, Wire
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.rules import UpdateRule
from gut_fast.topology import CSR, Topology, nobody

__all__ = ["Exchange"]

BUCKET_BYTES, LEAST_BUCKET_BYTES, OVERLAPPING_BUCKETS = 25 << 20, 256 << 10, 4
"""Sizes of buckets unless the user sets one: with overlap there are four, so that some can leave early."""


class Exchange:
    """The agents of this process and their messages to and from those of other ranks: the work of an optimizer.

    The optimizer hands over snapshots of its step, a `GossipStep` for each parameter group, None for a group without
    parameters; behind them, if it mixes state of an inner optimizer, in the same way the steps of that state, which
    rounds take and local steps do not. Agent a lives on rank ``a // agents_per_rank``.

    Args:
        process_group: a `torch.distributed` process group, or a `Group`.
        topology: who mixes with whom, all agents of all ranks.
        rule: the update rule; if it tracks, its state is zeroed when ranks leave.
        backend: the name of the backend that computes messages and mixing.
        options: how this process takes part.
        local_steps: the number of steps in a round; the steps of an exchange are those that end one.
        mix_state: the names of the inner optimizer's state that is mixed.

    Attributes:
        topology: the topology of the agents that are there.
        buckets: the buckets in which messages travel.
        bytes_sent: bytes of messages by (agent, rank), as numbered at the start.
        wire: how messages travel.
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
        mix_state: Sequence[str] = (),
    ) -> None:
        options.check()
        self.options, self.agents_per_rank, self._mix_state = options, options.agents_per_rank or 1, mix_state
        group = Group.of(process_group, options.timeout)
        group.check_free()
        self._traffic = Traffic(group, self.agents_per_rank)
        stays = topology.is_static and options.on_peer_failure == "raise"
        self.wire = Wire(options.wire_dtype, options.wire_seed, topology.num_agents, stays)
        self._settings: dict[str, Any] = {}
        fixed = fixed_settings(rule, topology, backend, group.timeout, options, local_steps, mix_state)
        self._agree(fixed, group.welcome)
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

    def meet(
        self, groups: Sequence[Mapping[str, Any]], steps: Sequence[GossipStep | None], inner: Optimizer | None
    ) -> Meeting:
        """Makes sure that all ranks have the same settings, and plans the buckets; again after a group is added.

        New groups are overwritten by the first agent's with `sync_initial`, else compared.

        Args:
            groups: the optimizer's parameter groups.
            steps: a snapshot of each group's step, and of the steps of its state.
            inner: the optimizer that makes the local moves, if there is one.

        Raises:
            MismatchError, PeerError: the ranks differ, or not all came: see `check_agreement`.
        """
        welcome = None
        if not self._num_compared:
            self.group.take()
            welcome = self.group.welcome
        self._agree(group_settings(self._rule, groups, steps, inner), welcome)
        self._plan_buckets(groups, steps)
        if welcome is None:
            new = [parameter for group in groups[self._num_compared :] for parameter in group["params"]]
            said = begin_alike(self.group, new, self.agents_per_rank, is_synchronized=self.options.sync_initial)
            meeting = Meeting(difference=said)
        else:
            self._hand_over(steps[: len(groups)], self.group.members.index(welcome.sponsor), is_send=False)
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

    def _plan_buckets(self, groups: Sequence[Mapping[str, Any]], steps: Sequence[GossipStep | None]) -> None:
        """Plans buckets of the size that the user set, or else as many as suit a model of this size."""
        sizes = [[p.numel() // self.agents_per_rank for p in group["params"]] for group in groups]
        own = steps[: len(groups)]
        widths = [self._bytes_per_number(step) * step.num_messages if step else 0 for step in own]
        limit = self.options.bucket_bytes
        if limit is None:
            total = sum(width * sum(own) for width, own in zip(widths, sizes, strict=True))
            parts = OVERLAPPING_BUCKETS if self.options.overlap else 1
            limit = min(BUCKET_BYTES, max(total // parts, LEAST_BUCKET_BYTES))
        self.buckets = plan_buckets(sizes, widths, limit)
        begins = [0, *itertools.accumulate(map(sum, sizes))]
        for bucket in self.buckets:
            step = steps[bucket.group]
            code = self.wire.code(step.parameters[0].dtype) if step else None
            if step is not None and code is not None:
                part, column = step.parameters[bucket.start : bucket.stop], begins[bucket.group] + bucket.column
                bucket.copies = Copies(code, part, self.agents_per_rank, step.num_messages, column)
        state = [*([] for _ in sizes), *(each * len(self._mix_state) for each in sizes)]  # its values come only later
        self.buckets += plan_buckets(state, [DTYPE.itemsize] * len(state), limit, StateBucket, len(self.buckets))
        self.wire.begin_anew(self.topology.num_agents)

    def _share_memory(self, steps: Sequence[GossipStep | None]) -> None:
        """Finds out whose memory can be read, once the buckets are planned. Raises PeerError if not all ranks come."""
        rows = []
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            rows.append(bucket.row_form(step, self.wire))
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
        self._traffic.make_rows(bucket, step, route, self.wire)
        bucket.write_messages(step, self._backend, self.wire, number, route.first_agent)
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
            steps: a snapshot of each group's step, and of the steps of its state.
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
            self.run_local(steps[: self._num_compared])
            return
        for bucket in self.buckets:
            step = steps[bucket.group]
            assert step is not None
            bucket.mix_(step, self._backend)
        self.wire.close_round(self.topology.csr(number))
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
        self.wire.begin_anew(self.topology.num_agents)
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
                self._hand_over(steps[: self._num_compared], group.members.index(newcomer), is_send=True)
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

    def _bytes_per_number(self, step: GossipStep) -> int:
        """Returns about how many bytes a number takes in a row of messages."""
        return self.wire.row_dtype(step.parameters[0].dtype).itemsize

    def _copies(self) -> list[list[Copies]]:
        """Returns the copies of the agents here for each parameter group, in the order of its parameters."""
        groups: list[list[Copies]] = [[] for _ in range(self._num_compared)]
        for bucket in sorted(self.buckets, key=lambda bucket: bucket.start):
            if bucket.copies is not None:
                groups[bucket.group].append(bucket.copies)
        return groups

    def state(self) -> dict[str, Any]:
        """Returns what a state dict holds of the wire."""
        return wire_state.state_of(self.wire, self._copies())

    def check_state(self, state: Any, name: str) -> None:
        """Raises ValueError unless `state` is one of this wire, and RuntimeError if messages have left already."""
        self.check_idle()
        wire_state.check_state(state, self.wire, self._copies(), self.topology.num_agents, name)

    def load_state(self, state: Any) -> None:
        """Takes over what `state` returned, and `check_state` has accepted, on all ranks in the same round."""
        wire_state.load_state(state, self.wire, self._copies(), self.topology.num_agents)
