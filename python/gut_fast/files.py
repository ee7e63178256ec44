"""Files that are written whole or not at all, and files of others, which are read within limits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FileError", "FileTypeError", "read_within", "remove_leftovers", "replacing", "sync", "write_text"]

LEFTOVER = re.compile(r"[0-9a-f]{16}|[0-9]+")
"""The part of a temporary file's name that differs between files; earlier versions put the process there."""


class FileError(ValueError, RuntimeError):
    """A file holds something else than it should: it is damaged, too large, or another file. The message names it."""


class FileTypeError(FileError, TypeError):
    """A value in a file has another type than it should. The message names the file."""


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary file to write beside `path`, which takes its place if the block ends without an error.

    A killed process leaves `path` as it was, or whole. With `durable` so does a power failure, and once the block has
    ended the new file is there to stay. A symbolic link is followed: the file that it leads to is replaced. The new
    file has the permissions of the one that it replaces, or else those that the umask gives.

    Nobody can predict the temporary file's name, and it is never one that was there before. It is locked as long as
    its process lives; what killed processes have left for this `path` is removed first.

    Raises:
        OSError: something that is no file has the place of `path`, or writing failed; the message names the file.
    """
    path = Path(os.path.realpath(path))
    remove_leftovers(path)
    try:
        permissions = _permissions(path)
        temporary, descriptor = _made_beside(path, 0o666 if permissions is None else 0o600)
        try:
            yield temporary
            if permissions is not None:
                temporary.chmod(permissions)
            if durable:
                sync(temporary)
            temporary.replace(path)
            if durable:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all. Raises OSError as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _permissions(path: Path) -> int | None:
    """Returns the permissions of the file to be replaced, None if there is none. Raises OSError for anything else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give the name of a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is no file that could be replaced", str(path))
    return stat.S_IMODE(mode) & 0o777


def _made_beside(path: Path, permissions: int) -> tuple[Path, int]:
    """Makes a temporary file for `path`; returns it and a descriptor that holds its lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(temporary, flags, permissions)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks, on which no leftover can be locked either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files for `path` of processes that were killed within `replacing`.

    A file that a living process writes is locked, and stays; so does one that cannot be opened or removed.
    """
    path = Path(os.path.realpath(path))
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            middle = entry.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
            if entry.name == f".{path.name}.{middle}.tmp" and LEFTOVER.fullmatch(middle):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(entry.path)


def _remove_unless_locked(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            Path(path).unlink()
    finally:
        os.close(descriptor)


def sync(path: str | Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_within(path: str | Path, limit: int) -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read.
        FileError: it is larger.
    """
    with Path(path).open("rb") as file:
        is_larger = os.fstat(file.fileno()).st_size > limit
        content = b"" if is_larger else file.read(limit + 1)
    if is_larger or len(content) > limit:
        raise FileError(f"{path} is larger than {limit:,} bytes, the most that is read of such a file")
    return content
