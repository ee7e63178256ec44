"""Equal settings on all ranks, compared when an optimizer is made: a difference is an error and not a wrong number.

What a rank cannot change later is compared first, before any rank refuses what does not fit its own settings, so that
all ranks raise the same error. A rank that cannot make its optimizer at all tells the others, who then do not wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from gut_fast.distributed.group import Group, MismatchError, PeerError, Welcome
from gut_fast.distributed.membership import RankOptions
from gut_fast.kernels.backends import GossipStep
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = ["check_agreement", "check_welcome", "fixed_settings", "group_settings", "telling_the_others"]

COMPARED_STEPS = 64
"""How many steps of a topology are compared; of one that repeats earlier, a period."""


PLAIN = (bool, int, float, str, torch.Tensor, type(None))


def fixed_settings(
    rule: UpdateRule,
    topology: Topology,
    backend: str,
    timeout: float,
    options: RankOptions,
    local_steps: int,
    mix_state: Sequence[str],
) -> dict[str, Any]:
    """Returns the settings that an optimizer keeps for as long as it lives, by name."""
    return {
        "versions": f"gut_fast {version('gut_fast')}, torch {torch.__version__}",
        "rule": rule.name,
        "agents_per_rank": options.agents_per_rank or 1,
        "topology": str(topology),
        "rows of W": _digests(topology),
        "backend": backend,
        "local_steps": local_steps,
        "mix_state": f"({', '.join(map(repr, mix_state))})",
        "timeout": f"{timeout:g} s",
        "wire_dtype": str(options.wire_dtype),
        "wire_seed": options.wire_seed,
        "bucket_bytes": options.bucket_bytes or "automatic",
        "overlap": options.overlap,
        "on_peer_failure": options.on_peer_failure,
        "shared_memory": options.shared_memory,
        "sync_initial": options.sync_initial,
    }


def group_settings(
    rule: UpdateRule,
    groups: Sequence[Mapping[str, Any]],
    steps: Sequence[GossipStep | None],
    inner: Optimizer | None = None,
) -> dict[str, Any]:
    """Returns the settings of an optimizer's parameter groups, and of the optimizer in it, by name.

    `steps` are a snapshot of each group's step.
    """
    names = ("lr", "weight_decay", "maximize", "drift_memory", *rule.hyperparameters)
    others = [] if inner is None else inner.param_groups
    return {
        "inner optimizer": None if inner is None else type(inner).__name__,
        "hyper-parameters": [
            *(f"group {k}: { ({n: _numbers(group[n]) for n in names}) }" for k, group in enumerate(groups)),
            *(f"inner group {k}: {name} = {value}" for k, group in enumerate(others) for name, value in _plain(group)),
        ],
        "parameters": [
            f"group {k}, parameter {p}: {tuple(tensor.shape)} {tensor.dtype}"
            for k, group in enumerate(groups)
            for p, tensor in enumerate(group["params"])
        ],
        "state_dtype": [f"group {k}: {step.state[0].dtype}" for k, step in enumerate(steps) if step and step.state],
    }


def _plain(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the options that are numbers, words or several of these: others may be shown differently elsewhere."""
    for name, value in options.items():
        if name not in ("params", "param_names") and all(isinstance(leaf, PLAIN) for leaf in tree_leaves(value)):
            yield name, _numbers(value)


def _numbers(value: Any) -> Any:
    """Returns an option with numbers in the place of tensors, which name the device of their rank."""
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, value)


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


def check_agreement(group: Group, settings: Mapping[str, Any]) -> None:
    """Compares the settings of all ranks, all of which call this.

    Raises:
        MismatchError: they differ; the message names the setting, the ranks and what each has.
        PeerError: a rank did not come, or has failed.
    """
    notes = [json.loads(note) for note in group.gather(group.occasion(), json.dumps(settings))]
    _compare(dict(zip(group.members, notes, strict=True)))


def check_welcome(group: Group, welcome: Welcome, settings: Mapping[str, Any]) -> None:
    """Compares a newcomer's settings with the others', but for hyper-parameters, which schedules change.

    Raises:
        MismatchError: they differ.
    """
    names = [name for name in settings if name != "hyper-parameters"]
    mine = json.loads(json.dumps({name: settings[name] for name in names}))
    theirs = {name: welcome.settings.get(name) for name in names}
    _compare({welcome.sponsor: theirs, group.members[group.rank]: mine})


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
        rows = list(itertools.zip_longest(*values.values()))
        differing = [agent for agent, digests in enumerate(rows) if len(set(digests)) > 1]
        said = ", ".join(f"ranks {ranks}" for ranks in camps.values())
        return f"the mixing matrices of {said} differ in rows {differing[:8]}; give all ranks the same topology"
    if all(isinstance(value, list) for value in values.values()):  # the first entries that are not the same everywhere
        places = range(max(map(len, values.values())))
        wrong = [k for k in places if len({tuple(value[k : k + 1]) for value in values.values()}) > 1][:3]
        values = {first: [entry for k in wrong for entry in value[k : k + 1]] for first, value in values.items()}
    said = "; ".join(f"{values[first]} on ranks {ranks}" for first, ranks in camps.items())
    return f"the ranks differ in their {name}: {said}"


@contextlib.contextmanager
def telling_the_others(of_whom: Callable[[], Any]) -> Iterator[None]:
    """Makes a context in which a rank makes its optimizer: if that fails, the others are told why, and need not wait.

    Args:
        of_whom: returns the process group or `Group` of the ranks to tell; if it is anything else, nobody is told.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (MismatchError, PeerError)):  # the others have met with these themselves
            Group.decline(of_whom(), f"{type(error).__name__}: {error}")
        raise
