"""Ranks compare what they were started with, so that a difference is an error and not a wrong number."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

from gut_fast.distributed.errors import MismatchError
from gut_fast.distributed.group import Group, Welcome
from gut_fast.topology import Topology

__all__ = ["check_agreement", "check_welcome", "fingerprint"]

STEPS = 64
"""Steps of a topology that are compared; of one that repeats earlier, a period of them."""


def fingerprint(topology: Topology) -> dict[str, Any]:
    """What is compared of a topology: its name, and a short digest of every row of W over the first steps."""
    steps = min(topology.period or STEPS, STEPS)
    digests = [hashlib.sha256() for _ in range(topology.num_agents)]
    for step in range(steps):
        W = topology.csr(step)
        starts = W.row_start.tolist()
        neighbor, weight = W.neighbor.numpy(), W.weight.numpy()
        for digest, start, end in zip(digests, starts, starts[1:], strict=False):
            digest.update(neighbor[start:end].tobytes() + weight[start:end].tobytes())
    return {"topology": str(topology), "rows of W": [digest.hexdigest()[:16] for digest in digests]}


def check_agreement(group: Group, occasion: str, settings: dict[str, Any]) -> None:
    """Compares the ranks' settings.

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
    for name in {name: None for note in notes.values() for name in note}:
        ranks_with = defaultdict(list)
        for rank, note in notes.items():
            ranks_with[json.dumps(note.get(name))].append(rank)
        if len(ranks_with) > 1:
            raise MismatchError(_difference(name, {ranks[0]: ranks for ranks in ranks_with.values()}, notes))


def _difference(name: str, camps: dict[int, list[int]], notes: dict[int, dict[str, Any]]) -> str:
    values: dict[int, Any] = {first: notes[first].get(name) for first in camps}
    if name == "rows of W":
        rows = list(zip(*values.values(), strict=True))
        differing = [agent for agent, digests in enumerate(rows) if len(set(digests)) > 1]
        said = ", ".join(f"ranks {ranks}" for ranks in camps.values())
        return f"the mixing matrices of {said} differ in rows {differing[:8]}; give all ranks the same topology"
    if all(isinstance(value, list) for value in values.values()):
        values = _differing(values)
    said = "; ".join(f"{values[first]} on ranks {ranks}" for first, ranks in camps.items())
    return f"the ranks differ in their {name}: {said}"


def _differing(values: dict[int, list[str]]) -> dict[int, list[str]]:
    """The first entries that are not the same in all lists."""
    places = range(max(map(len, values.values())))
    wrong = [k for k in places if len({tuple(value[k : k + 1]) for value in values.values()}) > 1][:3]
    return {first: [entry for k in wrong for entry in value[k : k + 1]] for first, value in values.items()}
