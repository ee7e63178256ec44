"""Shard files: one rank's part of a checkpoint.

What `torch.save` writes, and behind it the SHA-256 of that: `torch.load` reads such a file too, and does not notice.
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

from gut_fast.distributed.files import replacing

__all__ = ["DamagedError", "Shard", "check_loadable", "read_shard", "write_shard"]

FORMAT = "gut_fast shard 1"
DIGEST_BYTES = hashlib.sha256().digest_size
CHUNK = 1 << 20


class DamagedError(RuntimeError):
    """A file is truncated, corrupt or no shard."""


class Shard(NamedTuple):
    """What a file holds.

    Attributes:
        step: after which it was saved.
        rank, everyone: the number of the rank that saved it, of so many at the start.
        origin: the shards of a step belong together if they have the same: which run, after which failures.
        num_saved: how many the rank had saved by then, this one among them.
        state: what the user gave.
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
        writer = _HashingWriter(file)
        try:
            torch.save({"format": FORMAT, **shard._asdict()}, writer)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's own about a write that failed, which does not say why
            raise writer.error or error from error
        file.write(writer.hash.digest())


def read_shard(path: Path) -> Shard:
    """What `write_shard` wrote, tensors on the CPU.

    Raises:
        OSError: the file cannot be read.
        DamagedError: a byte of it is wrong or missing.
    """
    with path.open("rb") as file:
        _check_digest(file, path)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            return Shard(**content)
        except Exception as error:  # of half a dozen types
            raise DamagedError(f"{path} is no shard of a checkpoint ({type(error).__name__}: {error})") from error


class _HashingWriter:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_digest(file: BinaryIO, path: Path) -> None:
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
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
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
    """The same with empty tensors, so that trying it costs nothing."""
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return torch.empty(0, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return {key: _without_numbers(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return [_without_numbers(child) for child in value]
    return value
