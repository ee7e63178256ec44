"""An optimizer's part in a run on several ranks: it meets them, lets messages leave during backward, and steps."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gut_fast.distributed import SCALED, Exchange, Group, Together, Wire, state_bytes
from gut_fast.kernels import validation
from gut_fast.kernels.backends import GossipStep
from gut_fast.optim import checks
from gut_fast.optim.counts import Counts
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = ["AcrossRanks"]


class AcrossRanks(Optimizer):
    """The part of `GossipOptimizer` that other ranks see; without a process group there is no exchange.

    Attributes:
        inner: the optimizer that makes the local moves, of `gut_fast.Gossip`, else None.
        mix_state: names of its state that is mixed as the models are.
    """

    _topology: Topology
    inner: Optimizer | None = None
    mix_state: tuple[str, ...] = ()
    _exchange: Exchange | None = None
    _together: Together | None = None  # codes or rounds messages where all agents are here
    _hooks: tuple[RemovableHandle, ...] = ()
    _is_made: bool = False  # once the constructor has added its groups
    _counts: Counts
    rule: UpdateRule

    @property
    @abstractmethod
    def _name(self) -> str: ...

    @property
    @abstractmethod
    def _num_here(self) -> int: ...

    @abstractmethod
    def _group_steps(self, grad_scale: Tensor | None) -> list[GossipStep | None]: ...

    @abstractmethod
    def _snapshot(self, index: int) -> GossipStep: ...

    def _state_steps(self) -> list[GossipStep | None]:
        """Makes the step of each group's state that is mixed; [] if nothing but the models is."""
        return []

    @abstractmethod
    def _warn_if_unstable(self, group: dict[str, Any]) -> None: ...

    def _meet(self) -> None:
        """Compares the settings with the other ranks' once all groups are there, and listens to gradients."""
        if self._exchange is not None and self._is_made:
            steps = [self._snapshot(k) if group["params"] else None for k, group in enumerate(self.param_groups)]
            meeting = self._exchange.meet(self.param_groups, [*steps, *self._state_steps()], self.inner)
            if meeting.step is not None:  # a newcomer comes to the end of a round
                self._counts.go_to_end_of(meeting.step)
            if meeting.difference and not self._counts.steps and not self._exchange.group.rank:
                said = f"{self._name}: {meeting.difference}"
                warnings.warn(said, UserWarning, stacklevel=checks.frames_to_the_caller())
            self._listen(self._exchange)

    def _step_across(self, exchange: Exchange, grad_scale: Tensor | None, is_local: bool) -> None:
        """Takes one step of the agents here, with the agents of other ranks unless it is local."""
        # GradScaler leaves its scale, and whether it found infinities, in attributes of the optimizer.
        found_inf, amp_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = checks.with_amp(grad_scale, found_inf, amp_scale, self._num_here)
        steps = self._group_steps(scale)
        for step in filter(None, steps):
            validation.check(step)
        if is_local:
            exchange.run_local(steps)
            return
        exchange.run([*steps, *self._state_steps()], self._counts.rounds, None if scale is None else SCALED)
        if self._topology is not exchange.topology:
            self._topology = exchange.topology
            for group in self.param_groups:
                self._warn_if_unstable(group)

    def _listen(self, exchange: Exchange) -> None:
        """Has `_gradient_is_there` called for the parameters that overlap waits for; they do not keep this alive."""
        method = weakref.WeakMethod(self._gradient_is_there)

        def hook(parameter: Tensor) -> None:
            if (gradient_is_there := method()) is not None:
                gradient_is_there(parameter)

        for handle in self._hooks:
            handle.remove()
        watched = [] if exchange.overlap is None else exchange.overlap.watched
        self._hooks = tuple(parameter.register_post_accumulate_grad_hook(hook) for parameter in watched)

    def _gradient_is_there(self, parameter: Tensor) -> None:
        """Lets the buckets leave that were waiting for this gradient only."""
        if self._exchange is not None and self._exchange.overlap is not None and not self._counts.is_local:
            for bucket in self._exchange.overlap.completed_by(parameter):
                self._exchange.gradients_are_there(bucket, self._snapshot(bucket.group), self._counts.rounds)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if GradScaler leaves the scale, and what to do about infinities, to `step`.

        Across ranks it must: a step that one rank skips is one its neighbours wait for.
        """
        return self._exchange is not None

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context, for all backward passes of a step but the last, in which no message leaves."""
        return contextlib.nullcontext() if self._exchange is None else self._exchange.no_sync()

    @property
    def topology(self) -> Topology:
        """Who mixes with whom; smaller after ranks have left."""
        return self._topology

    @property
    def group(self) -> Group | None:
        """The ranks that are there, or None if this process holds all agents."""
        return None if self._exchange is None else self._exchange.group

    @property
    def wire_dtype(self) -> torch.dtype | str | None:
        """The dtype of messages between agents; None is the parameters'."""
        return None if self._wire is None else self._wire.dtype

    @property
    def wire_seed(self) -> int | None:
        """The seed of rounding at random in messages of 8 and 4 bits; None rounds to the nearest."""
        return None if self._wire is None else self._wire.seed

    @property
    def _wire(self) -> Wire | None:
        """How messages travel between ranks, or would; None if all agents are here and mix what they are."""
        part = self._exchange or self._together
        return None if part is None else part.wire

    def message_bytes(self) -> Tensor:
        """Returns the bytes that each agent has sent to each that heard it in the last round, int64 [N].

        These are all bytes that the algorithm sends. Across ranks an agent's message travels once to each rank, and the
        first one after loading a state is sent whole again: see `bytes_sent`.
        """
        wire = self._wire or Wire(None, None, self.topology.num_agents, stays=True)
        groups = [group["params"] for group in self.param_groups]
        known, new = wire.message_sizes(groups, self._num_here, self.rule.num_messages)
        sizes = [parameter.numel() // self._num_here for group in groups for parameter in group]
        return torch.where(wire.knew, known, new) + len(self.mix_state) * state_bytes(sizes)

    @property
    def overlap(self) -> str:
        """Says whether messages leave during backward: "on", or "off" and why."""
        exchange = self._exchange
        return "off" if exchange is None or exchange.overlap is None else str(exchange.overlap)

    @property
    def bytes_sent(self) -> dict[tuple[int, int], int]:
        """The bytes of messages sent so far, by (agent, rank), as numbered at the start."""
        return {} if self._exchange is None else dict(self._exchange.bytes_sent)
