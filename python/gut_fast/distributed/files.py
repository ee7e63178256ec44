"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_leftovers", "replacing", "sync"]


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary file to write beside `path`; it takes the place of `path` if the block ends without an error.

    A killed process leaves `path` as it was, or whole. With `durable` that holds for a power failure too, and once the
    block has ended the new file is there to stay.
    """
    path = Path(path)
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
    path = Path(path)
    for leftover in path.parent.iterdir():
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if leftover.name == f".{path.name}.{pid}.tmp" and pid.isdecimal():
            leftover.unlink(missing_ok=True)
