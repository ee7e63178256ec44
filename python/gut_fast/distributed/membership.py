"""Who belongs to a run: going on after ranks have died, letting ranks in again.

Every rank that meets a broken connection, or waits too long, leaves a note in the store and then breaks its own
connections, so that the news spreads along the graph. Once there is a note from each rank, or a note that it is gone,
one rank writes the decision, in a single atomic operation: who goes on, and from which step. Ranks may be some steps
apart; the ranks behind take the missing steps without mixing.

A rank that comes back leaves a note too. While ranks are missing the others look for such notes every few steps; the
first one to look decides for all, again in one atomic operation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from gut_fast.arguments import as_integer, as_number
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group, PeerError, Welcome
from gut_fast.distributed.notes import Notes
from gut_fast.distributed.wire import check_wire_options

__all__ = [
    "JOIN_EVERY",
    "RankOptions",
    "admit",
    "regroup",
    "rejoin",
]

POLL = 0.01
"""The pause between two looks for a decision, in seconds."""
JOIN_EVERY = 10
"""The number of steps between two looks for ranks that want to join."""
LONGEST_TIMEOUT = 1e6

STORE_IS_GONE = (
    "the store that the ranks share is gone or stopped, so they cannot agree on who is left; host it in a process "
    "that outlives them, as torchrun and gut-fast train --launch do"
)


class RankOptions(NamedTuple):
    """How a process takes part in a run on several ranks: see `gut_fast.GossipOptimizer`."""

    agents_per_rank: int | None = None
    overlap: bool = False
    wire_dtype: torch.dtype | str | None = None
    wire_seed: int | None = None
    bucket_bytes: int | None = None
    timeout: float = DEFAULT_TIMEOUT
    on_peer_failure: Literal["raise", "continue"] = "raise"
    shared_memory: bool = True
    sync_initial: bool = False

    def check(self) -> None:
        """Raises TypeError or ValueError if an option has a value that it cannot have."""
        for name in ("agents_per_rank", "bucket_bytes"):
            if getattr(self, name) is not None:
                as_integer(getattr(self, name), name, minimum=1)
        if not 0 < as_number(self.timeout, "timeout") < LONGEST_TIMEOUT:
            limit = f"between 0 and {LONGEST_TIMEOUT:g}"
            raise ValueError(f"timeout must be a number of seconds {limit}, got {self.timeout!r}")
        if self.on_peer_failure not in ("raise", "continue"):
            raise ValueError(f"on_peer_failure must be 'raise' or 'continue', got {self.on_peer_failure!r}")
        for name in ("overlap", "shared_memory", "sync_initial"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_wire_options(self.wire_dtype, self.wire_seed)

    def check_alone(self, name: str) -> None:
        """Raises ValueError if an option is set, though the optimizer `name` holds all agents itself."""
        defaults = RankOptions(wire_dtype=self.wire_dtype, wire_seed=self.wire_seed)._asdict()
        if given := [f"{key}=" for key, value in self._asdict().items() if value != defaults[key]]:
            raise ValueError(f"{name}: {', '.join(given)} needs process_group=; this optimizer holds all agents itself")


class Decision(NamedTuple):
    """The numbers of the ranks that go on, and the first step that is mixed again."""

    members: list[int]
    step: int


def regroup(group: Group, failure: PeerError, step: int) -> tuple[Group, int]:
    """Agrees with the ranks that are left, and returns their group and the first step that they mix.

    Args:
        group: the group before; its connections are broken.
        failure: the error that this rank has met.
        step: the step that this rank could not finish.

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
                gone = {error.rank} if error.is_gone else set()
    except dist.DistError as error:
        raise RuntimeError(STORE_IS_GONE) from error
    raise failure


def _decide(group: Group, epoch: int, own: int, members: list[int], gone: set[int], step: int) -> Decision:
    """Leaves the notes of this rank, waits for the others', and returns the decision, which is the same for all."""
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
    """Makes the group after ranks have left or joined. Raises PeerError if not all come."""
    return Group(
        group.store, place, members, timeout=group.timeout, epoch=epoch, everyone=group.everyone, marks=group.marks
    )


def admit(group: Group, step: int, sponsors: Mapping[int, int], settings: dict[str, Any]) -> Group:
    """Returns the group with the ranks that want to join at this step, or the same one if there are none.

    Args:
        group: the group before; ranks are missing.
        step: the step that comes next.
        sponsors: for each missing rank the one whose parameters it would get, both by number.
        settings: the settings that newcomers compare with their own.

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
            note = {"step": step, "sponsor": sponsors[newcomer], "settings": settings}
            notes.set(f"welcome {newcomer}", json.dumps([group.epoch + 1, members, note]))
    group.epoch += 1  # taken, whether all come or not
    return successor(group, members.index(group.members[group.rank]), members, group.epoch)


def rejoin(store: Store, rank: int, num_ranks: int, *, timeout: float = DEFAULT_TIMEOUT) -> Group:
    """Joins a run that goes on without this rank, as the ranks' number `rank` of `num_ranks`.

    The other optimizers' ``process_group`` is a `Group` made of a store, and they have ``on_peer_failure="continue"``.
    The process groups of torch.distributed cannot take a rank back: their ranks are fixed when they are made. Nor can a
    run take more ranks than its topology was made for. Give the group to the optimizer: it takes over a neighbour's
    parameters and the others' ``num_steps``, and its state is zero; set the learning rate accordingly.

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
