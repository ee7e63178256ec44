"""Which agents live on which rank, and what each step moves between ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gut_fast.topology.mixing import CSR

__all__ = ["Route", "Way", "make_route"]

Way = tuple[int, int, int]
"""Of a message between ranks: the agent, the other rank, and the first listener: there, or here if it comes."""


class Route(NamedTuple):
    """What one step moves, seen from one rank that holds k agents: numbers first_agent … first_agent + k − 1.

    Ranks stand for their places in the group. An agent's message travels once to each rank where somebody hears it.

    Attributes:
        mixing: the rows of W of the agents here; ``neighbor`` indexes into rows of messages: those of the k agents
            here, then the received ones. The order of edges, and so of summation, is that of W.
        sends: (agent, rank, one that hears it there), ascending.
        receives: (agent, rank, one here that hears it), in the order of rows.
    """

    mixing: CSR
    first_agent: int
    sends: tuple[Way, ...]
    receives: tuple[Way, ...]

    @property
    def senders(self) -> list[int]:
        """Agents here whose messages leave, from 0."""
        return sorted({agent - self.first_agent for agent, _, _ in self.sends})


def make_route(W: CSR, rank: int, agents_per_rank: int) -> Route:
    """The route of a rank, agents placed in order: agent a lives on rank ``a // agents_per_rank``."""
    k, first = agents_per_rank, rank * agents_per_rank
    listener = torch.arange(len(W.row_start) - 1, device="cpu").repeat_interleave(W.row_start.diff())
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
    """(agent, rank, first listener) for each pair of agent and rank, ascending."""
    first: dict[tuple[int, int], int] = {}
    for a, r, i in zip(agent.tolist(), rank.tolist(), listener.tolist(), strict=True):
        first.setdefault((a, r), i)
    return tuple((a, r, first[a, r]) for a, r in sorted(first))
