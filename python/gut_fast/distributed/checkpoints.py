"""Checkpoints of several ranks: each writes a shard of its own, and they go on from a step that all of them have.

To save is to write a file and to leave a note of it in the ranks' store; nobody waits for anybody. A rank removes an
old shard once the notes say that all have newer ones. To load, the ranks compare what each has found and verified,
agree on a step, and give the run a new name. A shard bears the name of its run and how often ranks have left or joined
since, so shards of two runs are never taken for one checkpoint, whatever was removed and what not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from gut_fast.arguments import as_integer
from gut_fast.distributed.consolidation import given_group
from gut_fast.distributed.files import DamagedError, Shard, check_loadable, read_shard, write_shard
from gut_fast.distributed.group import Group
from gut_fast.files import remove_leftovers, sync

__all__ = ["Checkpoints"]

_alone = HashStore()
_groups: WeakKeyDictionary[Any, Group] = WeakKeyDictionary()
_occasions: WeakKeyDictionary[Group, Iterator[int]] = WeakKeyDictionary()
_folders: WeakKeyDictionary[Store, dict[Path, int]] = WeakKeyDictionary()


class Membership(NamedTuple):
    """The ranks that share a folder, seen from one of them; a process that is alone is rank 0 of 1."""

    number: int
    members: Sequence[int]
    everyone: int
    epoch: int
    store: Store
    group: Group | None


class Note(NamedTuple):
    """A rank's note about its shards.

    Attributes:
        steps: the steps of which it has a shard, each with the shard's origin: see `Shard`.
        num_saved: how many shards it has saved in its life.
    """

    steps: dict[int, str]
    num_saved: int


class Checkpoints:
    """The checkpoints in a folder: ``folder/step-00000100/rank-3.pt`` is what rank 3 saved after step 100.

    The folder may be one that all ranks see or one on each host: a rank looks at its own files only. After ranks have
    left, the others keep their numbers and go on without them; what all had before they left is kept, so that all can
    start anew. All ranks use their checkpoints in the same order.

    Args:
        folder: where the checkpoints are; it is made if it is not there.
        group: the ranks that save together: an optimizer, which knows who is left after failures, a `Group` or a
            `torch.distributed` process group; None, or an optimizer of one process, is this process alone.
        keep: how many of the steps that all ranks have are kept.

    Raises:
        TypeError, ValueError: a bad argument.
        NotADirectoryError: there is something else in the folder's place.
        PeerError: a process group's ranks did not all make theirs in time.
    """

    def __init__(self, folder: str | Path, group: Any = None, *, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder).absolute(), as_integer(keep, "keep", minimum=1)
        self._given = group
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is not a folder, so there can be no checkpoints in it")
        _ranks_of(group)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes this rank's shard of a step; a kill or a power failure leaves it whole or not there.

        The step that was loaded is not saved again: the others may have it from the run before.

        Args:
            step: how many steps have been taken; not less than at the save before.
            state: a dict of tensors, numbers, strings, and dicts and lists of them.

        Raises:
            TypeError: `state` holds something that ``torch.load(weights_only=True)`` would not read.
            ValueError: a bad step, or the folder holds checkpoints of another run. Nothing has been written.
            OSError: writing failed; the checkpoints that were there still are.
            RuntimeError: the store that the ranks share is gone.
        """
        step = as_integer(step, "step", minimum=0)
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        check_loadable(dict(state), "state")
        ranks = _ranks_of(self._given)
        run, notes = self._run(ranks)
        note = self._own_note(ranks, notes)
        if note is None:
            self._check_empty(ranks)
            note = Note({}, 0)
        if step < max(note.steps, default=0):
            raise ValueError(f"step is {step}, but step {max(note.steps)} has been saved; load() goes back")
        origin, path = f"{run}, epoch {ranks.epoch}", self._path(step, ranks)
        if note.steps.get(step, origin) != origin:
            return
        new = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, Shard(step, ranks.number, ranks.everyone, origin, note.num_saved + 1, dict(state)))
        for each in (self.folder, *(folder.parent for folder in new)):
            sync(each)
        note = Note({**note.steps, step: origin}, note.num_saved + 1)
        _publish(ranks, notes, note)
        self._remove_old(ranks, notes, note)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Returns the newest step that all ranks have, and what this rank saved then; None if there is no such step.

        All ranks call this. Tensors are on the CPU. Shards of later steps are removed. A rank that joins a run that is
        under way, by `rejoin`, has its parameters from a neighbour and gets None.

        Raises:
            ValueError: the shards are of another number of ranks, or of another rank.
            RuntimeError: the ranks have no step in common but once had; nothing has been removed.
            PeerError: not all ranks came in time.

        Warns:
            UserWarning: a shard is damaged, which counts as missing.
        """
        ranks = _ranks_of(self._given)
        if ranks.group is not None and ranks.group.welcome is not None:
            self._join(ranks)
            return None
        for each in self._folders():
            remove_leftovers(self._path(each, ranks))
        found, damaged = self._verified(ranks)
        reports = _exchange(ranks, {"run": secrets.token_hex(8), **self._report(ranks, found)})
        for warning in damaged:
            warnings.warn(f"{warning}; it counts as missing", UserWarning, stacklevel=2)
        step = self._agreed(dict(zip(ranks.members, reports, strict=True)))
        notes = self._start_run(ranks, reports[0]["run"])
        _publish(
            ranks, notes, Note({} if step is None else {step: "loaded"}, 0 if step is None else found[step].num_saved)
        )
        for newer in self._steps(ranks):
            if step is None or newer > step:
                self._path(newer, ranks).unlink()
        return None if step is None else (step, read_shard(self._path(step, ranks)).state)

    def _path(self, step: int, ranks: Membership) -> Path:
        return self.folder / f"step-{step:08d}" / f"rank-{ranks.number}.pt"

    def _folders(self) -> dict[int, Path]:
        """Returns the folders of all steps, by step."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        named = (path for path in sorted(paths) if re.fullmatch(r"step-\d{8,}", path.name))
        return {int(path.name[5:]): path for path in named if path.is_dir()}

    def _steps(self, ranks: Membership) -> list[int]:
        """Returns the steps of which this rank has a file, whole or not."""
        return [step for step in self._folders() if self._path(step, ranks).is_file()]

    def _verified(self, ranks: Membership) -> tuple[dict[int, Shard], list[str]]:
        """Reads this rank's shards: the whole ones, without their state, and what is wrong with the others."""
        found, damaged = {}, []
        for step in self._steps(ranks):
            try:
                found[step] = read_shard(self._path(step, ranks))._replace(state={})
            except (DamagedError, OSError) as error:
                damaged.append(str(error))
        return found, damaged

    def _report(self, ranks: Membership, found: Mapping[int, Shard]) -> dict[str, Any]:
        """Describes this rank's shards to the other ranks."""
        wrong = [
            f"{self._path(step, ranks)} is of step {shard.step} of rank {shard.rank} of {shard.everyone}, but this is "
            f"rank {ranks.number} of {ranks.everyone}"
            for step, shard in found.items()
            if (shard.step, shard.rank, shard.everyone) != (step, ranks.number, ranks.everyone)
        ]
        return {
            "steps": {step: shard.origin for step, shard in found.items()},
            "count": min((shard.num_saved for shard in found.values()), default=0),
            "wrong": wrong[0] if wrong else None,
            "seen": self._ranks_seen(),
        }

    def _ranks_seen(self) -> list[int]:
        """Returns the numbers of the ranks that have files in the folder."""
        names = {path.stem for folder in self._folders().values() for path in folder.glob("rank-*.pt")}
        return sorted(int(name[5:]) for name in names if name[5:].isdecimal())

    def _agreed(self, reports: Mapping[int, dict[str, Any]]) -> int | None:
        """Returns the newest step that all ranks have, or None. Raises ValueError and RuntimeError as `load` does."""
        for report in reports.values():
            if report["wrong"]:
                raise ValueError(f"{report['wrong']}; start as many ranks as before, numbered as before")
        if common := _common([report["steps"] for report in reports.values()]):
            return common[-1]
        # A rank's first shard goes only when all have newer ones. If it is gone, then others have been lost.
        misplaced = any(number in reports and number not in reports[number]["seen"] for number in _seen(reports))
        if misplaced or any(report["count"] > 1 for report in reports.values()):
            said = (
                f"rank {number} has steps {list(map(int, report['steps']))}, and sees files of ranks {report['seen']}"
                for number, report in reports.items()
            )
            raise RuntimeError(
                f"{self.folder}: the ranks have no step in common, but once had: {'; '.join(said)}. Are folders "
                "missing, or ranks on other hosts than before? To start afresh, give an empty folder"
            )
        return None

    def _check_empty(self, ranks: Membership) -> None:
        """Raises ValueError if the folder holds shards of this rank."""
        if steps := self._steps(ranks):
            raise ValueError(
                f"{self.folder} holds checkpoints of another run, of steps {steps}; load() first, to go on from there, "
                "or give an empty folder"
            )

    def _run(self, ranks: Membership) -> tuple[str, Store]:
        """Returns the run's name, on which the ranks agree through the store, and the store of their notes."""
        store = self._store(ranks)
        run = store.compare_set("run", "", secrets.token_hex(8)).decode()
        return run, PrefixStore(run, store)

    def _start_run(self, ranks: Membership, run: str) -> Store:
        """Gives the run a new name, and returns the store of its notes."""
        store = self._store(ranks)
        store.set("run", run)
        return PrefixStore(run, store)

    def _store(self, ranks: Membership) -> Store:
        """Returns the store of this folder; as folders differ between hosts, their order tells them apart."""
        folders = _folders.setdefault(ranks.store, {})
        number = folders.setdefault(self.folder, len(folders))
        return PrefixStore(f"checkpoints {number}", ranks.store)

    def _own_note(self, ranks: Membership, notes: Store) -> Note | None:
        """Returns this rank's note, without shards that are no longer there; None if it has left no note."""
        known, here = _read_notes(notes, [ranks.number]), set(self._steps(ranks))
        if known is None:
            return None
        return Note({step: origin for step, origin in known[0].steps.items() if step in here}, known[0].num_saved)

    def _join(self, ranks: Membership) -> None:
        """Leaves a note of the shards that this rank had saved before it was lost, as far as they are still there."""
        _, notes = self._run(ranks)
        _publish(ranks, notes, self._own_note(ranks, notes) or Note({}, 0))

    def _remove_old(self, ranks: Membership, notes: Store, own: Note) -> None:
        """Removes shards older than the newest `keep` common ones, but not the newest that the lost ranks have too."""
        common = self._common(notes, ranks.members)
        if len(common) < self.keep:
            return
        limit, spared = common[-self.keep], self._common(notes, range(ranks.everyone))[-1:]
        old = [step for step in self._folders() if step < limit and step not in spared]
        if not old:
            return
        _publish(ranks, notes, Note({step: own.steps[step] for step in own.steps if step not in old}, own.num_saved))
        for step in old:
            path = self._path(step, ranks)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' shards are in it
                path.parent.rmdir()

    @staticmethod
    def _common(notes: Store, numbers: Sequence[int]) -> list[int]:
        """Returns the steps that all of these ranks have according to their notes, ascending."""
        known = _read_notes(notes, numbers)
        return _common([note.steps for note in known]) if known else []


def _ranks_of(given: Any) -> Membership:
    """Returns the ranks of an optimizer, a `Group` or a process group; this process alone for None."""
    group = given_group(given)
    if isinstance(group, dist.ProcessGroup):
        if group not in _groups:
            _groups[group] = Group.of(group)
        group = _groups[group]
    if group is None:
        return Membership(0, (0,), 1, 0, _alone, None)
    return Membership(group.members[group.rank], group.members, group.everyone, group.epoch, group.store, group)


def _exchange(ranks: Membership, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Exchanges the ranks' reports. Raises PeerError if not all come."""
    if ranks.group is None:
        return [report]
    occasion = f"checkpoints, occasion {next(_occasions.setdefault(ranks.group, itertools.count()))}"
    return [json.loads(each) for each in ranks.group.gather(occasion, json.dumps(report))]


def _common(steps: Sequence[Mapping[Any, str]]) -> list[int]:
    """Returns the steps that all have, from the same origin, ascending."""
    origins = defaultdict(list)
    for each in steps:
        for step, origin in each.items():
            origins[int(step)].append(origin)
    return [step for step, found in sorted(origins.items()) if len(found) == len(steps) and len(set(found)) == 1]


def _seen(reports: Mapping[int, dict[str, Any]]) -> set[int]:
    return {number for report in reports.values() for number in report["seen"]}


def _publish(ranks: Membership, notes: Store, note: Note) -> None:
    notes.set(str(ranks.number), json.dumps(note))


def _read_notes(notes: Store, numbers: Sequence[int]) -> list[Note] | None:
    """Reads the notes of these ranks; None if one of them has left none. Waits for nobody."""
    keys = [str(number) for number in numbers]
    if not notes.check(keys):
        return None
    read = [json.loads(note) for note in notes.multi_get(keys)]
    return [Note({int(step): origin for step, origin in steps.items()}, count) for steps, count in read]
