"""Who belongs to a run: going on after ranks have died, and letting ranks in again.

Everybody who meets a broken connection, or waits too long, leaves a note in the store and then breaks its own
connections, so that the news spreads along the graph. Once there is a note from each rank, or a note that it is gone,
one rank writes the decision, in a single atomic operation: who goes on, and from which step. Ranks may be some steps
apart; those behind take the missing ones without mixing.

A rank that comes back leaves a note too. While ranks are missing the others look for such notes every few steps; the
first one to look decides for all, again in one atomic operation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from gut_fast.distributed.errors import PeerError
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group, Welcome
from gut_fast.distributed.notes import Notes

__all__ = ["JOIN_EVERY", "admit", "regroup", "rejoin"]

POLL = 0.01
JOIN_EVERY = 10
"""Steps between two looks for ranks that want to join."""

STORE_IS_GONE = (
    "the store that the ranks share is gone or stopped, so they cannot agree on who is left; host it in a process "
    "that outlives them, as torchrun and gut-fast train --launch do"
)


class Decision(NamedTuple):
    """Who goes on, and the first step that is mixed again."""

    members: list[int]
    step: int


def regroup(group: Group, failure: PeerError, step: int) -> tuple[Group, int]:
    """The group of the ranks that are left, and the first step they mix.

    Args:
        group: as it was; its connections are broken.
        failure: what this rank has met.
        step: that this rank could not finish.

    Raises:
        PeerError: the others went on without this rank.
        RuntimeError: the group cannot do this, or the store is gone.
    """
    if not group.is_own:
        raise RuntimeError('on_peer_failure="continue" needs a gloo process group') from failure
    own, members, gone = group.members[group.rank], list(group.members), {failure.rank} if failure.is_gone else set()
    try:
        for epoch in range(group.epoch + 1, group.epoch + 2 * len(members) + 2):
            decision = _decide(group, epoch, own, members, gone, step)
            if own not in decision.members:
                raise PeerError(
                    f"step {step}: ranks {decision.members} have gone on without rank {own}, which did not answer "
                    f"within {group.timeout:g} s; start it anew",
                    own,
                    step=step,
                ) from failure
            members, place = decision.members, decision.members.index(own)
            try:
                return successor(group, place, members, epoch), decision.step
            except PeerError as error:  # somebody died in the meantime; if not who, the next round will show
                gone = {error.rank} & set(members)
    except dist.DistError as error:
        raise RuntimeError(STORE_IS_GONE) from error
    raise failure


def _decide(group: Group, epoch: int, own: int, members: list[int], gone: set[int], step: int) -> Decision:
    notes = Notes(group.store, f"regroup {epoch}", group.timeout)
    notes.set(f"here {own}", str(step))
    for member in gone:
        if not notes.check(f"here {member}"):  # one that is regrouping itself breaks its connections too
            notes.set(f"gone {member}", "")
    group.close()
    deadline = time.monotonic() + group.timeout
    while not notes.check("decision"):
        left = [member for member in members if not group.has_ended(member)]
        here = [member for member in left if notes.check(f"here {member}")]
        if all(member in here or notes.check(f"gone {member}") for member in left) or time.monotonic() > deadline:
            first = max(int(notes.get(f"here {member}")) for member in here)
            notes.decide("decision", json.dumps([here, first]))
        else:
            time.sleep(POLL)
    return Decision(*json.loads(notes.get("decision")))


def successor(group: Group, place: int, members: Sequence[int], epoch: int) -> Group:
    """The group after ranks have left or joined. Raises PeerError if not all come."""
    return Group(
        group.store, place, members, timeout=group.timeout, epoch=epoch, everyone=group.everyone, marks=group.marks
    )


def admit(group: Group, step: int, sponsor_of: Callable[[int], int], settings: dict[str, Any]) -> Group:
    """The group with the ranks that want to join at this step, or the same one if there are none.

    Args:
        group: as it is; ranks are missing.
        step: that comes next.
        sponsor_of: the rank whose parameters a newcomer gets, by numbers.
        settings: what newcomers compare with their own.

    Raises:
        PeerError: not all came.
        RuntimeError: the store is gone.
    """
    notes = Notes(group.store, "joining", group.timeout)
    try:
        applicants = [number for number in group.missing if notes.check(f"applicant {number}")]
        decided = notes.decide(f"epoch {group.epoch}, step {step}", json.dumps(applicants))
    except dist.DistError as error:
        raise RuntimeError(STORE_IS_GONE) from error
    newcomers = json.loads(decided)
    if not newcomers:
        return group
    members = sorted([*group.members, *newcomers])
    if group.rank == 0:
        for newcomer in newcomers:
            notes.delete(f"applicant {newcomer}")
            note = {"step": step, "sponsor": sponsor_of(newcomer), "settings": settings}
            notes.set(f"welcome {newcomer}", json.dumps([group.epoch + 1, members, note]))
    group.epoch += 1  # taken, whether all come or not
    return successor(group, members.index(group.members[group.rank]), members, group.epoch)


def rejoin(store: Store, rank: int, num_ranks: int, *, timeout: float = DEFAULT_TIMEOUT) -> Group:
    """Joins a run that goes on without this rank, as the ranks' number `rank` of `num_ranks`.

    For optimizers whose ``process_group`` is a `Group` made of a store, with ``on_peer_failure="continue"``. The
    process groups of torch.distributed cannot take a rank back: their ranks are fixed when they are made. Nor can a
    run take more ranks than its topology was made for. Give the group to the optimizer: its parameters become those of
    a neighbour, its state zero, ``num_steps`` that of the others; set the learning rate accordingly.

    Raises:
        PeerError: nobody let this rank in within the time limit, or not all came to meet it.
    """
    notes = Notes(store, "joining", timeout)
    notes.delete(f"welcome {rank}")
    notes.set(f"applicant {rank}", "")
    if not notes.wait([f"welcome {rank}"]):
        notes.delete(f"applicant {rank}")
        raise PeerError(
            f"rank {rank} was not let in within {timeout:g} s; is the run under way without it, with "
            f'on_peer_failure="continue"? It looks every {JOIN_EVERY} steps',
            rank,
        )
    epoch, members, note = json.loads(notes.get(f"welcome {rank}"))
    place = members.index(rank)
    return Group(store, place, members, timeout=timeout, epoch=epoch, everyone=num_ranks, welcome=Welcome(**note))
