"""Shards: one rank's part of a checkpoint, in a file that is written whole or not at all.

A shard is what `torch.save` writes, followed by its SHA-256: `torch.load` reads such a file too, and does not notice.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from gut_fast.distributed import torch_files
from gut_fast.files import FileError, replacing

__all__ = ["DamagedError", "Shard", "check_loadable", "read_shard", "write_shard"]

FORMAT = "gut_fast shard 1"
DIGEST_BYTES = hashlib.sha256().digest_size
CHUNK = 1 << 20


class DamagedError(FileError):
    """A file is truncated, corrupt or no shard."""


class Shard(NamedTuple):
    """The contents of a shard file.

    Attributes:
        step: the number of steps taken when it was saved.
        rank: number of the rank that saved it.
        everyone: how many ranks there were at the start.
        origin: names the run and how often ranks had left or joined; shards of one checkpoint have the same origin.
        num_saved: how many shards the rank had saved by then, this one among them.
        state: the state that the user gave.
    """

    step: int
    rank: int
    everyone: int
    origin: str
    num_saved: int
    state: dict[str, Any]


def write_shard(path: Path, shard: Shard) -> None:
    """Writes the file, whole or not at all; once this returns it is there to stay. Raises OSError if that fails."""
    with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
        file.write(torch_files.save({"format": FORMAT, **shard._asdict()}, file))


def read_shard(path: Path) -> Shard:
    """Reads what `write_shard` wrote, tensors on the CPU.

    Raises:
        OSError: the file cannot be read.
        DamagedError: a byte of it is wrong or missing.
    """
    with path.open("rb") as file:
        _check_digest(file, path)
        try:
            content = torch_files.load(file, file.seek(0, io.SEEK_END) - DIGEST_BYTES, path)
        except FileError as error:
            raise DamagedError(f"{path} is no shard of a checkpoint: {error}") from error
    kinds = {"format": str, "step": int, "rank": int, "everyone": int, "origin": str, "num_saved": int, "state": dict}
    if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
        raise DamagedError(f"{path} is no shard of a checkpoint: it does not hold {', '.join(kinds)}")
    if content.pop("format") != FORMAT:
        raise DamagedError(f"{path} is a shard of another format, not {FORMAT!r}")
    return Shard(**content)


def _check_digest(file: BinaryIO, path: Path) -> None:
    """Raises DamagedError unless the file ends with the SHA-256 of what stands before it."""
    left = file.seek(0, io.SEEK_END) - DIGEST_BYTES
    file.seek(0)
    found = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(CHUNK, left))):
        found.update(chunk)
        left -= len(chunk)
    if left or file.read() != found.digest():
        raise DamagedError(f"{path} is truncated or corrupt: its check sum is wrong")


def check_loadable(value: Any, where: str) -> None:
    """Raises TypeError, which names the place, if `value` holds what ``torch.load(weights_only=True)`` refuses."""
    try:
        buffer = io.BytesIO()
        torch.save(_without_numbers(value), buffer)
        torch_files.load(buffer, len(buffer.getvalue()), where)
    except Exception as error:
        for key, child in _children(value):
            check_loadable(child, f"{where}[{key!r}]")
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which torch.load(weights_only=True) "
            "would not read again; save tensors, numbers, strings, and dicts and lists of them"
        ) from error


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _without_numbers(value: Any) -> Any:
    """Puts empty tensors in the place of plain ones, so that trying to save and load the value costs nothing."""
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return torch.empty(0, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return {key: _without_numbers(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return [_without_numbers(child) for child in value]
    return value
