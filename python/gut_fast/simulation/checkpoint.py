"""Checkpoints: written whole or not at all, and checked before anything is taken from them.

That of a run in one process is a file; of one on several ranks a folder, in which each rank has files of its own.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gut_fast.distributed import Group
from gut_fast.distributed.checkpoints import Checkpoints
from gut_fast.distributed.files import replacing
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["check_configuration", "digest", "mixing_digest", "read_checkpoint", "write_checkpoint"]

FORMAT = "gut_fast simulator checkpoint 1"


def write_checkpoint(content: Mapping[str, Any], path: str | Path, group: Group | None = None) -> None:
    """Writes `content` beside `path` and renames it: `path` is always a whole checkpoint.

    `content` holds tensors, numbers, strings, lists and dicts, so that it can be read without running code.
    """
    if group is not None:
        Checkpoints(path, group).save(content["step"], {"format": FORMAT, **content})
        return
    with replacing(path, durable=True) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def read_checkpoint(path: str | Path, group: Group | None = None) -> dict[str, Any]:
    """What `write_checkpoint` wrote, tensors on the CPU; with a group at the newest step that all ranks have.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: it is truncated, corrupt or not a checkpoint of the simulator.
    """
    content = _read_file(path) if group is None else _read_folder(path, group)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RuntimeError(f"{path} is not a checkpoint of gut_fast's simulator ({FORMAT!r})")
    return content


def _read_file(path: str | Path) -> Any:
    with Path(path).open("rb") as file:
        try:
            _check_sums(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch raises half a dozen types here, OSError too, depending on which byte is wrong.
            raise RuntimeError(
                f"{path} cannot be read as a checkpoint; it is truncated, corrupt or another file "
                f"({type(error).__name__})"
            ) from error


def _read_folder(path: str | Path, group: Group) -> Any:
    newest = Checkpoints(path, group).load()
    if newest is None:
        raise FileNotFoundError(f"{path} holds no checkpoint that all ranks have")
    return newest[1]


def _check_sums(file: BinaryIO) -> None:
    """Raises zipfile.BadZipFile if a byte has changed: torch writes check sums but does not look at them."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the check sum of {damaged} is wrong")
    file.seek(0)


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that depend on every byte of the tensors."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def mixing_digest(topology: Topology) -> str:
    """What `digest` is of tensors, of the weights of all steps of a topology."""
    state = hashlib.blake2b(digest_size=8)
    for mixing in topology.cycle:
        state.update((digest(mixing.csr) if isinstance(mixing, MixingMatrix) else repr(mixing)).encode())
    return state.hexdigest()


def check_configuration(saved: Mapping[str, Any], own: Mapping[str, Any], path: str | Path) -> None:
    """Raises ValueError that names what differs between a checkpoint's configuration and the simulator's own."""
    differences = [
        f"{name} is {saved.get(name)!r} there, {own.get(name)!r} here"
        for name in dict.fromkeys((*own, *saved))
        if saved.get(name) != own.get(name)
    ]
    if differences:
        raise ValueError(f"{path} is of another configuration: {'; '.join(differences)}")
