"""The weights that agents start from: brought to all agents from the first one, or compared.

Agents that start from different weights are most likely a mistake: ranks that were seeded differently. But they may be
meant to, and ranks that have loaded checkpoints of their own must keep them. So nothing is overwritten unless the user
asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gut_fast.distributed.group import Group

__all__ = ["Meeting", "begin_alike"]

MOST_NAMED = 8
"""How many ranks a message names."""


class Meeting(NamedTuple):
    """The news that a rank has when it has met the others.

    Attributes:
        step: the number of the next step, if this rank joins others that are under way.
        difference: what is to be said if the agents start from different weights.
    """

    step: int | None = None
    difference: str | None = None


def begin_alike(
    group: Group, parameters: Sequence[Tensor], agents_per_rank: int, *, is_synchronized: bool
) -> str | None:
    """Brings the first agent's parameters to all agents, or else compares digests of them; then no tensor travels.

    Args:
        group: the ranks, all of which call this.
        parameters: each of the agents here, one after another in memory.
        agents_per_rank: k.
        is_synchronized: whether to overwrite the parameters of all agents by those of rank 0's first agent.

    Returns:
        What is to be said if agents differ: which ranks have other weights than the first agent, and what to do.

    Raises:
        PeerError: not all ranks came in time; parameters may have been overwritten.
    """
    if is_synchronized:
        _bring_from_first(group, parameters, agents_per_rank)
        return None
    return _difference(group, parameters, agents_per_rank)


@torch.no_grad()
def _bring_from_first(group: Group, parameters: Iterable[Tensor], agents_per_rank: int) -> None:
    """Overwrites the parameters of all agents of all ranks by those of rank 0's first agent."""
    for parameter in parameters:
        if parameter.numel():
            rows = parameter.detach().view(agents_per_rank, -1)
            group.broadcast(rows[0].view(torch.uint8))
            rows[1:] = rows[0]
            torch.autograd.graph.increment_version(parameter)


def _difference(group: Group, parameters: Iterable[Tensor], agents_per_rank: int) -> str | None:
    """Compares digests of all agents' parameters, and returns what is to be said if they differ."""
    notes = group.gather(f"start {next(group.occasions)}", json.dumps(_digests(parameters, agents_per_rank)))
    digests = dict(zip(group.members, map(json.loads, notes), strict=True))
    first = digests[group.members[0]][0]
    different = [rank for rank, own in digests.items() if any(digest != first for digest in own)]
    if not different:
        return None
    named = f"ranks {different[:MOST_NAMED]}"
    if len(different) > MOST_NAMED:
        named += f" and {len(different) - MOST_NAMED} more"
    return (
        f"the agents start from different weights: {named} have others than rank {group.members[0]}'s first agent. "
        'That is right after checkpoints have been loaded, or with init="different"; otherwise seed all ranks alike '
        "(torch.manual_seed) before the model is made, or give sync_initial=True"
    )


def _digests(parameters: Iterable[Tensor], agents_per_rank: int) -> list[str]:
    """Returns a short digest of all parameters of each agent here."""
    digests = [hashlib.sha256() for _ in range(agents_per_rank)]
    for parameter in parameters:
        if parameter.numel():
            rows = parameter.detach().reshape(agents_per_rank, -1).cpu().view(torch.uint8).numpy()
            for digest, row in zip(digests, rows, strict=True):
                digest.update(row)
    return [digest.hexdigest()[:16] for digest in digests]
