"""How messages travel: as they are, rounded, or as codes of a few bits; and the copies that codes are about.

An agent that the others know sends a code; one that they do not know yet sends its message as it is, in the dtype of
arithmetic. Where all agents are in one process nothing travels, but everything is coded and decoded as ranks would, so
that the numbers are the same, bit for bit on the CPU.

Differences need the neighbours to have the copy of the round before, so they serve on a topology that stays, if no rank
may leave. Elsewhere messages of 8 and 4 bits are coded by modulo, which needs no copy, and bfloat16 is plainly rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.arguments import as_integer, shown
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, arithmetic
from gut_fast.kernels.buffers import allocate
from gut_fast.kernels.codes import Code, Layout, Place, block_distances, drop_, judged, next_widths_
from gut_fast.topology import CSR

__all__ = ["Copies", "Wire", "check_wire_options"]

BITS = {"int8": 8, "int4": 4, torch.bfloat16: 16}
"""The bits of a number in codes, by the dtype of messages."""


def check_wire_options(wire_dtype: Any, wire_seed: Any) -> None:
    """Raises TypeError or ValueError unless messages can be of this dtype, and rounded by this seed."""
    is_coded = isinstance(wire_dtype, str) and wire_dtype in BITS
    is_float = isinstance(wire_dtype, torch.dtype) and wire_dtype.is_floating_point
    if not (wire_dtype is None or is_coded or is_float):
        raise TypeError(f'wire_dtype must be a floating-point torch.dtype, "int8" or "int4", got {shown(wire_dtype)}')
    if wire_seed is not None:
        as_integer(wire_seed, "wire_seed", minimum=None)
        if not is_coded:
            raise ValueError(
                f'wire_seed={wire_seed} rounds messages of wire_dtype "int8" or "int4" at random; messages of '
                f"{wire_dtype or 'the dtype of the parameters'} are rounded to the nearest"
            )


class Wire:
    """How the messages of an optimizer travel, and which agents the others know.

    Args:
        dtype: a torch dtype, ``"int8"`` or ``"int4"``; None is the parameters'.
        seed: of rounding at random; None rounds to the nearest.
        num_agents: N.
        stays: whether agents have the same neighbours in every round, and keep them.

    Attributes:
        known: bool [N], the agents of which the others know enough to understand their codes.
        knew: `known` as it was in the last round.
        sends_again: whether the next message is sent as it is at both ends, as after loading a state.
    """

    def __init__(self, dtype: torch.dtype | str | None, seed: int | None, num_agents: int, stays: bool) -> None:
        check_wire_options(dtype, seed)
        self.dtype, self.seed, self.stays = dtype, seed, stays
        self.begin_anew(num_agents)

    def begin_anew(self, num_agents: int) -> None:
        """Forgets who is known: the next messages are sent as they are."""
        self.known = self.knew = torch.zeros(num_agents, dtype=torch.bool, device="cpu")
        self.sends_again = False

    def check(self, dtype: torch.dtype) -> None:
        """Raises TypeError unless messages about parameters of `dtype` can have the wire's dtype."""
        wire = self.dtype or dtype
        halved = [torch.bfloat16] if dtype == torch.float32 else []
        allowed = dict.fromkeys([dtype, arithmetic(dtype), *halved, "int8", "int4"])
        if wire not in allowed:
            choice = " or ".join(map(str, allowed))
            raise TypeError(f"wire_dtype is {wire}; messages about parameters of {dtype} can be {choice}")

    def code(self, dtype: torch.dtype) -> Code | None:
        """Returns the code of messages about parameters of `dtype`; None if they are at most rounded."""
        bits = BITS.get(self.dtype)
        if bits is None or (bits == 16 and not (self.stays and dtype == torch.float32)):
            return None
        return Code(bits, "difference" if self.stays else "modulo", self.seed)

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the rows that messages about parameters of `dtype` travel in."""
        if self.code(dtype) is not None:
            return torch.uint8
        return self.dtype if isinstance(self.dtype, torch.dtype) else dtype

    def rounds(self, dtype: torch.dtype) -> bool:
        """Returns whether messages about parameters of `dtype` are rounded, by the user's wish."""
        return isinstance(self.dtype, torch.dtype) and self.dtype.itemsize < arithmetic(dtype).itemsize

    def is_exact(self, agent: int) -> bool:
        """Returns whether an agent's next message travels as it is."""
        return self.sends_again or not bool(self.known[agent])

    def close_round(self, mixing: CSR) -> None:
        """Takes down that a round was mixed, with these weights of all agents."""
        heard = torch.ones_like(self.known) if self.stays else mixing.row_start.diff().cpu() > 0
        self.knew, self.known, self.sends_again = self.known, self.known | heard, False

    def message_sizes(self, groups: Sequence[Sequence[Tensor]], num_agents: int, num_messages: int) -> tuple[int, int]:
        """Returns the bytes of an agent's messages to one other, scales and check sums included.

        Args:
            groups: the parameters of each group, of `num_agents` agents.
            num_agents: k.
            num_messages: M.

        Returns:
            The bytes of an agent that is known, and of one that is not.
        """
        known = new = 0
        for parameters in filter(None, groups):
            dtype = parameters[0].dtype
            columns = tuple(parameter.numel() // num_agents for parameter in parameters)
            numbers, code = num_messages * sum(columns), self.code(dtype)
            plain = numbers * self.row_dtype(dtype).itemsize
            known += plain if code is None else Layout(*code.check()[:2], columns, num_messages).num_bytes
            new += plain if code is None else numbers * arithmetic(dtype).itemsize
        return known, new


class Copies:
    """The copies of the agents in one process, and of those that they hear: rows of one run of parameters.

    Args:
        code: how messages are coded.
        parameters: of `num_agents` agents, those that are here.
        num_agents: k.
        num_messages: M.
        column: where the parameters begin among all numbers that an agent sends.

    Attributes:
        layout: of rows of codes.
        num_agents: k.
        dtype, device: of copies; the dtype is that of arithmetic.
        own: X of each agent here; empty before the first round.
        heard: X of each agent elsewhere that is heard, in the order of the route.
        widths: of a modulo code, B of each agent here.
    """

    def __init__(
        self, code: Code, parameters: Sequence[Tensor], num_agents: int, num_messages: int, column: int
    ) -> None:
        columns = tuple(parameter.numel() // num_agents for parameter in parameters)
        self.layout = Layout(*code.check()[:2], columns, num_messages)
        self.own: list[Tensor] = []
        self.heard: list[Tensor] = []
        self.widths: list[Tensor] = []
        self._code, self._column = code, column
        self.num_agents = num_agents
        self.dtype, self.device = arithmetic(parameters[0].dtype), parameters[0].device

    @property
    def room(self) -> int:
        """The bytes of the longest row that travels: a code, or the message as it is."""
        return max(self.num_bytes(is_exact=True), self.num_bytes(is_exact=False))

    def num_bytes(self, is_exact: bool) -> int:
        """Returns the bytes of a message, as it is or as a code."""
        return self.layout.num_numbers * self.dtype.itemsize if is_exact else self.layout.num_bytes

    def _new_row(self) -> Tensor:
        return allocate(self.layout.num_numbers, self.dtype, self.device)

    def encode(
        self, step: GossipStep, wire: Wire, number: int, first_agent: int, rows: Sequence[Tensor | None], backend: str
    ) -> None:
        """Brings the own copies up to date, and writes what travels.

        Args:
            step: the step of the agents here, of these parameters.
            wire: knows who sends a code.
            number: of the round.
            first_agent: the number of the first agent here.
            rows: for each agent here bytes, of the length of its code or of its message as it is; None if nobody
                elsewhere hears it.
            backend: computes the messages.
        """
        agents = range(first_agent, first_agent + step.num_agents)
        if not self.own:
            self.own = [self._new_row() for _ in agents]
        if self._code.kind == "modulo" and not self.widths:
            self.widths = [torch.zeros(self.layout.num_blocks, device=self.device) for _ in agents]
        is_new, is_exact = [not bool(wire.known[a]) for a in agents], [wire.is_exact(a) for a in agents]
        if not all(is_new):
            coded = [None if exact else row for exact, row in zip(is_exact, rows, strict=True)]
            place = Place(number, first_agent, self._column)
            ops.encode(step, self._code, coded, self.own, self.widths, place, backend)
        if any(is_new):
            ops.message(step, [own if new else None for new, own in zip(is_new, self.own, strict=True)], backend)
        for own, width, new in zip(self.own, self.widths, is_new, strict=False):
            if new:  # any distance will do
                largest = block_distances(self.layout, own, torch.zeros_like(own))
                width.copy_(torch.where(largest.isfinite(), torch.inf, torch.nan))
        for row, own, exact in zip(rows, self.own, is_exact, strict=True):
            if row is not None and exact:
                row.copy_(own.view(torch.uint8))

    def decode(
        self, step: GossipStep, received: Sequence[Tensor], is_exact: Sequence[bool]
    ) -> tuple[GossipStep, list[Tensor]]:
        """Returns the step and the rows that `combine_` mixes, after the rows of bytes that have come from elsewhere.

        Where a block of modulo cannot be told, its edge has a row of its own, which drops the block at both ends.

        Args:
            step: the step of the agents here, of these parameters.
            received: rows of bytes, in the order of the route.
            is_exact: whether each is the message as it is.
        """
        while len(self.heard) < len(received):
            self.heard.append(self._new_row())
        del self.heard[len(received) :]
        for copy, row, exact in zip(self.heard, received, is_exact, strict=True):
            if exact:
                copy.copy_(row.clone().view(copy.dtype))
            elif self._code.kind == "difference":
                ops.decode(self.layout, row, copy)
        rows = [*self.own, *self.heard]
        if self._code.kind == "difference":
            return step, rows
        coded = [None] * len(self.own) + [None if e else row for e, row in zip(is_exact, received, strict=True)]
        return step._replace(neighbor=self._hear_each(step, rows, coded)), rows

    def _hear_each(self, step: GossipStep, rows: list[Tensor], coded: Sequence[Tensor | None]) -> Tensor:
        """Decodes modulo for each edge; returns which of the rows each edge hears, with new ones where blocks drop.

        Args:
            step: the step of the agents here.
            rows: the copies of all agents that are heard, in place; more are added.
            coded: the codes that they are to be decoded from; None if a copy is right already.
        """
        neighbors, starts = step.neighbor.tolist(), step.row_start.tolist()
        distances: list[list[Tensor]] = []
        infinite = torch.full_like(self.widths[0], torch.inf)
        for agent, (begin, end) in enumerate(itertools.pairwise(starts)):
            own, seen = rows[agent], []
            for edge in range(begin, end):
                code, speaker = coded[neighbors[edge]], neighbors[edge]
                copy = rows[speaker] if code is None else self._new_row()
                if code is None:
                    theirs = self.widths[speaker] if speaker < step.num_agents else self._widths_of(copy, infinite)
                    distance = block_distances(self.layout, own, copy)
                    distance = judged(distance, self.widths[agent], theirs)
                else:
                    found = ops.decode(self.layout, code, copy, own, self.widths[agent])
                    assert found is not None
                    distance = found
                seen.append(distance)
                if bool((distance >= 0).all()):
                    rows[speaker] = copy  # the same bits, whoever hears it
                    continue
                if code is None:
                    copy = copy.clone()
                    drop_(self.layout, copy, own, distance)
                neighbors[edge] = len(rows)
                rows.append(copy)
            distances.append(seen)
        for width, seen in zip(self.widths, distances, strict=True):
            width.masked_fill_(width.isinf(), 0.0)
            next_widths_(self.layout, width, seen)
        return torch.tensor(neighbors, dtype=step.neighbor.dtype, device=step.neighbor.device)

    def _widths_of(self, message: Tensor, infinite: Tensor) -> Tensor:
        """Returns the widths of an agent whose message came as it is: infinite, or NaN where it is not finite."""
        largest = block_distances(self.layout, message, torch.zeros_like(message))
        return torch.where(largest.isfinite(), infinite, torch.nan)
