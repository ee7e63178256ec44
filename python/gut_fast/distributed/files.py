"""Files that are written whole or not at all, and shards: one rank's part of a checkpoint in such a file.

A shard is what `torch.save` writes, followed by its SHA-256: `torch.load` reads such a file too, and does not notice.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "DamagedError",
    "Shard",
    "check_loadable",
    "read_shard",
    "remove_leftovers",
    "replacing",
    "sync",
    "write_shard",
]

FORMAT = "gut_fast shard 1"
DIGEST_BYTES = hashlib.sha256().digest_size
CHUNK = 1 << 20


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary file to write beside `path`, which takes its place if the block ends without an error.

    A killed process leaves `path` as it was, or whole. With `durable` so does a power failure, and once the block has
    ended the new file is there to stay. Of a symbolic link the file is replaced that it leads to.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def sync(path: str | Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files of processes that were killed within `replacing`; none may be writing `path` now."""
    path = Path(os.path.realpath(path))
    for leftover in path.parent.iterdir():
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if leftover.name == f".{path.name}.{pid}.tmp" and pid.isdecimal():
            leftover.unlink(missing_ok=True)


class DamagedError(RuntimeError):
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
        writer = _HashingWriter(file)
        try:
            torch.save({"format": FORMAT, **shard._asdict()}, writer)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's own about a write that failed, which does not say why
            raise writer.error or error from error
        file.write(writer.hash.digest())


def read_shard(path: Path) -> Shard:
    """Reads what `write_shard` wrote, tensors on the CPU.

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
        except Exception as error:  # torch.load raises half a dozen types
            raise DamagedError(f"{path} is no shard of a checkpoint ({type(error).__name__}: {error})") from error


class _HashingWriter:
    """A file to write that computes the SHA-256 of what is written, and keeps the error of a write that failed."""

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
    """Puts empty tensors in the place of plain ones, so that trying to save and load the value costs nothing."""
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return torch.empty(0, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return {key: _without_numbers(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return [_without_numbers(child) for child in value]
    return value
