"""Who belongs to a run: equal settings at the start, going on after ranks have died, letting ranks in again.

At the start the ranks compare their settings, so that a difference is an error and not a wrong number.

Every rank that meets a broken connection, or waits too long, leaves a note in the store and then breaks its own
connections, so that the news spreads along the graph. Once there is a note from each rank, or a note that it is gone,
one rank writes the decision, in a single atomic operation: who goes on, and from which step. Ranks may be some steps
apart; the ranks behind take the missing steps without mixing.

A rank that comes back leaves a note too. While ranks are missing the others look for such notes every few steps; the
first one to look decides for all, again in one atomic operation.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from gut_fast.arguments import as_integer, as_number
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group, MismatchError, PeerError, Welcome
from gut_fast.distributed.notes import Notes
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = [
    "JOIN_EVERY",
    "RankOptions",
    "admit",
    "check_agreement",
    "check_welcome",
    "regroup",
    "rejoin",
    "settings_of",
]

POLL = 0.01
"""The pause between two looks for a decision, in seconds."""
JOIN_EVERY = 10
"""The number of steps between two looks for ranks that want to join."""
COMPARED_STEPS = 64
"""How many steps of a topology are compared; of one that repeats earlier, a period."""
LONGEST_TIMEOUT = 1e6

STORE_IS_GONE = (
    "the store that the ranks share is gone or stopped, so they cannot agree on who is left; host it in a process "
    "that outlives them, as torchrun and gut-fast train --launch do"
)


class RankOptions(NamedTuple):
    """How a process takes part in a run on several ranks: see `gut_fast.GossipOptimizer`."""

    agents_per_rank: int | None = None
    overlap: bool = False
    wire_dtype: torch.dtype | None = None
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
        if not isinstance(self.sync_initial, bool):
            raise TypeError(f"sync_initial must be True or False, got {self.sync_initial!r}")
        wire = self.wire_dtype
        if wire is not None and not (isinstance(wire, torch.dtype) and wire.is_floating_point):
            raise TypeError(f"wire_dtype must be a floating-point torch.dtype, got {wire!r}")

    def check_alone(self, name: str) -> None:
        """Raises ValueError if an option is set, though the optimizer `name` holds all agents itself."""
        defaults = RankOptions()._asdict()
        if given := [f"{key}=" for key, value in self._asdict().items() if value != defaults[key]]:
            raise ValueError(f"{name}: {', '.join(given)} needs process_group=; this optimizer holds all agents itself")


def settings_of(
    rule: UpdateRule, topology: Topology, groups: Sequence[Mapping[str, Any]], options: RankOptions
) -> dict[str, Any]:
    """Returns what ranks compare at the start, and newcomers later: settings of an optimizer, by name."""
    names = ("lr", "weight_decay", "maximize", "drift_memory", *rule.hyperparameters)
    return {
        "versions": f"gut_fast {version('gut_fast')}, torch {torch.__version__}",
        "rule": rule.name,
        "hyper-parameters": [f"group {k}: { ({n: group[n] for n in names}) }" for k, group in enumerate(groups)],
        "parameters": [
            f"group {k}, parameter {p}: {tuple(tensor.shape)} {tensor.dtype}"
            for k, group in enumerate(groups)
            for p, tensor in enumerate(group["params"])
        ],
        "agents_per_rank": options.agents_per_rank or 1,
        "wire_dtype": str(options.wire_dtype),
        "bucket_bytes": options.bucket_bytes or f"automatic with{'' if options.overlap else 'out'} overlap",
        "on_peer_failure": options.on_peer_failure,
        "sync_initial": options.sync_initial,
        "topology": str(topology),
        "rows of W": _digests(topology),
    }


def _digests(topology: Topology) -> list[str]:
    """Returns a short digest of each row of W over the first steps."""
    steps = min(topology.period or COMPARED_STEPS, COMPARED_STEPS)
    digests = [hashlib.sha256() for _ in range(topology.num_agents)]
    for step in range(steps):
        W = topology.csr(step)
        starts = W.row_start.tolist()
        neighbor, weight = W.neighbor.numpy(), W.weight.numpy()
        for digest, start, end in zip(digests, starts, starts[1:], strict=False):
            digest.update(neighbor[start:end].tobytes() + weight[start:end].tobytes())
    return [digest.hexdigest()[:16] for digest in digests]


def check_agreement(group: Group, occasion: str, settings: dict[str, Any]) -> None:
    """Compares the settings of all ranks.

    Raises:
        MismatchError: they differ; the message names the setting, the ranks and what each has.
        PeerError: a rank did not come.
    """
    notes = [json.loads(note) for note in group.gather(occasion, json.dumps(settings))]
    _compare(dict(zip(group.members, notes, strict=True)))


def check_welcome(group: Group, welcome: Welcome, settings: dict[str, Any]) -> None:
    """Compares a newcomer's settings with the others', but for hyper-parameters, which schedules change.

    Raises:
        MismatchError: they differ.
    """
    mine = {**json.loads(json.dumps(settings)), "hyper-parameters": welcome.settings["hyper-parameters"]}
    _compare({welcome.sponsor: welcome.settings, group.members[group.rank]: mine})


def _compare(notes: dict[int, dict[str, Any]]) -> None:
    """Raises MismatchError, about the first difference, unless the settings of all ranks are the same."""
    for name in {name: None for note in notes.values() for name in note}:
        ranks_with = defaultdict(list)
        for rank, note in notes.items():
            ranks_with[json.dumps(note.get(name))].append(rank)
        if len(ranks_with) > 1:
            raise MismatchError(_difference(name, {ranks[0]: ranks for ranks in ranks_with.values()}, notes))


def _difference(name: str, camps: dict[int, list[int]], notes: dict[int, dict[str, Any]]) -> str:
    """Describes a setting in which ranks differ; `camps` are the ranks that agree, by the first of them."""
    values: dict[int, Any] = {first: notes[first].get(name) for first in camps}
    if name == "rows of W":
        rows = list(zip(*values.values(), strict=True))
        differing = [agent for agent, digests in enumerate(rows) if len(set(digests)) > 1]
        said = ", ".join(f"ranks {ranks}" for ranks in camps.values())
        return f"the mixing matrices of {said} differ in rows {differing[:8]}; give all ranks the same topology"
    if all(isinstance(value, list) for value in values.values()):  # the first entries that are not the same everywhere
        places = range(max(map(len, values.values())))
        wrong = [k for k in places if len({tuple(value[k : k + 1]) for value in values.values()}) > 1][:3]
        values = {first: [entry for k in wrong for entry in value[k : k + 1]] for first, value in values.items()}
    said = "; ".join(f"{values[first]} on ranks {ranks}" for first, ranks in camps.items())
    return f"the ranks differ in their {name}: {said}"


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
                gone = {error.rank} & set(members)
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
