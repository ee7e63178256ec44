"""A folder that holds an experiment over several seeds, and from which it can be continued.

Each seed has ``seed-<n>/`` with ``config.json``, ``checkpoint.pt``, ``history.csv`` and ``history.jsonl``. Where n
processes have trained together, a folder ``checkpoint-of-<n>`` stands for ``checkpoint.pt``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from gut_fast.distributed.files import remove_leftovers
from gut_fast.simulation import Simulator, write_csv, write_json_lines
from gut_fast.study.runner import Experiment, Run, make_simulator, train

__all__ = ["check_launch", "check_writable", "create", "load_simulator", "read", "train_in"]


RESULTS = ("summary.csv", "curves.png")
"""What the command writes beside the folders of the seeds."""


def check_writable(folder: Path) -> None:
    """Looks at the folder, if it exists, before any work is done.

    Raises:
        OSError: it is not a folder, nothing can be written to it, or a directory is where a file is to be.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    for place in (folder, *folder.glob("seed-*")):
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write to {place}")
    files = [folder / name for name in RESULTS]
    files += [place / name for place in folder.glob("seed-*") for name in ("history.csv", "history.jsonl")]
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; it is where a file is to be written")


def create(folder: Path, experiments: Sequence[Experiment]) -> None:
    """Makes the folder and writes all configurations, so that `read` finds the seeds not yet begun.

    Raises:
        FileExistsError: the folder holds an experiment already.
        OSError: the folder cannot be made.
    """
    if any(folder.glob("seed-*/config.json")):
        raise FileExistsError(f"{folder} holds an experiment already; continue it with --resume, or name another --out")
    for experiment in experiments:
        _seed_folder(folder, experiment).mkdir(parents=True, exist_ok=True)
        experiment.save(_seed_folder(folder, experiment) / "config.json")


def read(folder: Path) -> list[Experiment]:
    """The experiments of the folder, by ascending seed.

    Raises:
        FileNotFoundError: there are none.
        OSError, TypeError, ValueError: a configuration cannot be read.
    """
    files = list(folder.glob("seed-*/config.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no experiment: there is no {folder / 'seed-*' / 'config.json'}")
    return sorted((Experiment.load(file) for file in files), key=lambda experiment: experiment.seed)


def check_launch(folder: Path, experiments: Sequence[Experiment], size: int | None) -> None:
    """Raises ValueError if a checkpoint in the folder is of another number of processes than `size`."""
    for experiment in experiments:
        place = _seed_folder(folder, experiment)
        if others := sorted(set(place.glob("checkpoint*")) - {_checkpoint(place, size)}):
            its_size = others[0].name.partition("-of-")[2]
            advice = f"with --launch {its_size}" if its_size else "without --launch"
            raise ValueError(f"{others[0]} was written {advice}; go on {advice}")


def load_simulator(folder: Path, experiment: Experiment, process_group: dist.ProcessGroup | None = None) -> Simulator:
    """The experiment's simulator, at the step of its checkpoint if there is one. Raises as `make_simulator` does, and
    as `Simulator.load_checkpoint`.
    """
    simulator = make_simulator(experiment, process_group)
    with contextlib.suppress(FileNotFoundError):  # it has not yet begun
        simulator.load_checkpoint(_checkpoint(_seed_folder(folder, experiment), _size(process_group)))
    return simulator


def train_in(
    folder: Path, experiment: Experiment, simulator: Simulator, process_group: dist.ProcessGroup | None = None
) -> Run:
    """Trains to the last step; checkpoint and history are in the folder however it ends, by Ctrl-C for example.

    Both are written at every evaluation too, so that a process that was killed loses little, and what such a process
    has left half written is removed first: only one at a time may train in a folder. Of the ranks of a process group
    the first one writes the history.
    """
    place, is_first = _seed_folder(folder, experiment), process_group is None or dist.get_rank(process_group) == 0
    checkpoint, table, lines = _checkpoint(place, _size(process_group)), place / "history.csv", place / "history.jsonl"
    for file in (checkpoint, table, lines) if is_first else ():
        remove_leftovers(file)

    def write_history() -> None:
        if is_first:
            write_csv(simulator.history, table)
            write_json_lines(simulator.history, lines)

    try:
        return train(
            experiment,
            simulator,
            checkpoint=checkpoint,
            checkpoint_every=experiment.eval_every,
            on_checkpoint=write_history,
        )
    finally:
        write_history()


def _size(process_group: dist.ProcessGroup | None) -> int | None:
    return None if process_group is None else dist.get_world_size(process_group)


def _checkpoint(place: Path, size: int | None) -> Path:
    return place / ("checkpoint.pt" if size is None else f"checkpoint-of-{size}")


def _seed_folder(folder: Path, experiment: Experiment) -> Path:
    return folder / f"seed-{experiment.seed}"
