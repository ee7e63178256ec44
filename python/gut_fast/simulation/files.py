"""The files of a run: its history as CSV or lines of JSON, and its checkpoint. Each is written whole or not at all.

The checkpoint of a run in one process is a file; that of a run on several ranks a folder, in which each rank has files
of its own.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gut_fast.arguments import shortened, shown
from gut_fast.distributed import Group, torch_files
from gut_fast.distributed.checkpoints import Checkpoints
from gut_fast.files import FileError, remove_leftovers, replacing
from gut_fast.simulation.structure import described
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = [
    "check_configuration",
    "check_folder",
    "check_target",
    "digest",
    "json_line",
    "mixing_digest",
    "read_checkpoint",
    "write_checkpoint",
    "write_csv",
    "write_json_lines",
]

FORMAT = "gut_fast simulator checkpoint 1"

LATER = re.compile(r"local_steps|wire_seed|mix_state|inner optimizer|\w+ of inner group \d+")
"""The names in a configuration of which the first checkpoints of 0.2.0 have no entry: they are not compared there."""


def write_csv(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes a line of names and then a line per row; a value that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


def write_json_lines(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes one JSON object per row and line, with null for NaN and infinity, which JSON lacks."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, history))


ENDS_OF_LINES = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that some readers take for the end of a line, and halves of pairs, which cannot be written as UTF-8."""


def json_line(row: Mapping[str, Any]) -> str:
    """The row as a line of JSON, with null for NaN and infinity; any text is read again as it was."""
    content = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    line = json.dumps(content, allow_nan=False, ensure_ascii=False)
    return ENDS_OF_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", line) + "\n"


def check_target(path: str | Path, *, is_folder: bool = False) -> None:
    """Looks whether `path` can be written, as a file or as a folder of files, and leaves nothing behind.

    Raises:
        OSError: its folder is missing, is no folder or cannot be written, or something else has its place.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.is_dir() and not is_folder:
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(f"{path} is no file that could be replaced")
    if target.exists() and not target.is_dir() and is_folder:
        raise NotADirectoryError(f"{path} is a file; give the name of a folder")
    folder = target if target.is_dir() else target.parent
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder} for {path.name}; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"{path} cannot be written: {error.strerror}", str(folder)) from error


def check_folder(path: str | Path) -> None:
    """Looks whether `path` can be a folder to write in, which is yet to be made or there. Raises OSError if not."""
    path = Path(os.path.realpath(path))
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    check_target(there, is_folder=True)


def write_checkpoint(content: Mapping[str, Any], path: str | Path, group: Group | None = None) -> None:
    """Writes `content` beside `path` and renames it, so that `path` is always a whole checkpoint.

    The content may hold tensors, numbers, strings, lists and dicts, which can be read without running code.
    """
    if group is not None:
        Checkpoints(path, group).save(content["step"], {"format": FORMAT, **content})
        return
    with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
        torch_files.save({"format": FORMAT, **content}, file)


def read_checkpoint(path: str | Path, group: Group | None = None) -> dict[str, Any]:
    """The content that `write_checkpoint` wrote, tensors on the CPU; with a group, at the newest step of all ranks.

    Raises:
        OSError: the file cannot be read.
        FileError: the file is truncated, corrupt or not a checkpoint of the simulator; it is a RuntimeError too.
    """
    content = _read_file(path) if group is None else _read_folder(path, group)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileError(f"{path} is not a checkpoint of gut_fast's simulator ({FORMAT!r})")
    return content


def _read_file(path: str | Path) -> Any:
    remove_leftovers(path)
    with Path(path).open("rb") as file:
        try:
            content = torch_files.load(file, file.seek(0, os.SEEK_END), path)
            _check_sums(file)
        except (FileError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} cannot be read as a checkpoint: {error}") from error
    return content


def _read_folder(path: str | Path, group: Group) -> Any:
    newest = Checkpoints(path, group).load()
    if newest is None:
        raise FileNotFoundError(f"{path} holds no checkpoint that all ranks have")
    return newest[1]


def _check_sums(file: BinaryIO) -> None:
    """Raises zipfile.BadZipFile if a byte has changed: torch writes check sums but does not read them."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the check sum of {damaged} is wrong")


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of 16 hexadecimal digits that depends on every byte of the tensors."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def mixing_digest(topology: Topology) -> str:
    """A digest of the mixing weights of all steps of a topology."""
    state = hashlib.blake2b(digest_size=8)
    for mixing in topology.cycle:
        state.update((digest(mixing.csr) if isinstance(mixing, MixingMatrix) else repr(mixing)).encode())
    return state.hexdigest()


def check_configuration(saved: Any, own: Mapping[str, Any], path: str | Path) -> None:
    """Raises ValueError with the differences between a checkpoint's configuration and the simulator's own."""
    if not isinstance(saved, dict):
        raise FileError(f"{path} is no checkpoint of a simulator: its configuration is {described(saved)}")
    differences = [
        f"{shortened(str(name))} is {shown(saved.get(name))} there, {shown(own.get(name))} here"
        for name in dict.fromkeys((*own, *saved))
        if (name in saved or not LATER.fullmatch(name)) and not _equal(saved.get(name), own.get(name))
    ]
    if differences:
        raise ValueError(f"{path} is of another configuration: {'; '.join(differences[:20])}")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return described(one) == described(other) and torch.equal(one.cpu(), other.cpu())
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
