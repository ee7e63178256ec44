"""Messages of agents that are all in one process: rounded, or coded and decoded, as they would be between ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gut_fast.distributed import wire_state
from gut_fast.distributed.wire import Copies, Wire
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.topology import Topology

__all__ = ["Together"]


class Together:
    """The wire of an optimizer that holds all agents itself, and what the agents know of each other.

    Args:
        wire: how messages travel.
        topology: who hears whom.
        backend: computes messages and mixing.
    """

    def __init__(self, wire: Wire, topology: Topology, backend: str) -> None:
        self.wire, self._topology, self._backend = wire, topology, backend
        self._copies: list[list[Copies]] = []  # of each group one, or none if nothing is coded

    def begin_anew(self, groups: Sequence[Sequence[Tensor]], num_messages: int) -> None:
        """Begins with these parameters of each group; nobody is known."""
        num_agents, column = self._topology.num_agents, 0
        self.wire.begin_anew(num_agents)
        self._copies = []
        for parameters in groups:
            code = self.wire.code(parameters[0].dtype) if parameters else None
            own = [] if code is None else [Copies(code, parameters, num_agents, num_messages, column)]
            self._copies.append(own)
            column += sum(parameter.numel() for parameter in parameters) // num_agents

    def copied(self) -> Together:
        """Returns a copy that shares nothing which changes."""
        return copy.deepcopy(self, {id(self._topology): self._topology})

    def run(self, steps: Sequence[GossipStep | None], number: int) -> None:
        """Takes round `number`; the steps have been checked."""
        for step, copies in zip(steps, self._copies, strict=True):
            if step is None:
                continue
            if copies:
                copies[0].encode(step, self.wire, number, 0, [None] * step.num_agents, self._backend)
                step, rows = copies[0].decode(step, [], [])
            else:
                rows = step.new_rows(self.wire.row_dtype(step.parameters[0].dtype))
                ops.message(step, rows, self._backend)
            ops.combine_(step, rows, self._backend)
        self.wire.close_round(self._topology.csr(number))

    def state(self) -> dict[str, Any]:
        """Returns what a state dict holds of the wire."""
        return wire_state.state_of(self.wire, self._copies)

    def check_state(self, state: Any, name: str) -> None:
        """Raises ValueError unless `state` is one of this wire."""
        wire_state.check_state(state, self.wire, self._copies, self._topology.num_agents, name)

    def load_state(self, state: Any) -> None:
        """Takes over what `state` returned, and `check_state` has accepted."""
        wire_state.load_state(state, self.wire, self._copies, self._topology.num_agents)
