"""Rows that ranks of one machine read in each other's memory, where the kernel wrote them.

Each rank keeps its rows in a file in memory that has no name, which others open through /proc. Whether they can (the
same machine, user and process namespace) is not guessed but tried: a file begins with a secret, and its owner leaves a
note of it. Files are sealed: their size is fixed, and only the owner writes. Only a byte travels between such ranks
when a row is written, and another one when it has been read.

There are two rows for each message, taken in turn: one can be written while others still read the one before.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gut_fast.distributed.group import Group

__all__ = ["SharedRows"]

NAME = "gut_fast"
SECRET_BYTES = 16
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
"""Linux's numbers, see fcntl(2): Python has not all of them, and none where there are no such files."""
SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
"""Seals after which nobody can change the size of a file, nor its seals."""
PAGE = 4096
TURNS = 2


class SharedRows:
    """The rows of this rank and of the ranks that can read its memory, as it can read theirs.

    Args:
        group: the ranks, all of which make their shared rows at the same time.
        occasion: a name, another one each time.
        rows: how many numbers a row of each bucket has, and of which dtype, the same on all ranks; None if this rank
            shares nothing.
        agents_per_rank: k.

    Attributes:
        near: places of the ranks that share memory with this one.

    Raises:
        PeerError: not all ranks came in time.
    """

    def __init__(
        self, group: Group, occasion: str, rows: Sequence[tuple[int, torch.dtype]] | None, agents_per_rank: int
    ) -> None:
        self._agents, self._like = agents_per_rank, rows or ()
        self._rows: dict[tuple[int, int, int, int], Tensor] = {}
        spaces = [agents_per_rank * TURNS * _space(n * dtype.itemsize) for n, dtype in self._like]
        *self._starts, length = accumulate(spaces, initial=PAGE)
        with contextlib.ExitStack() as stack:  # files are closed once all that can have opened them; mappings stay
            own = None if rows is None else _make(length, stack)
            notes = group.gather(f"memory, {occasion}", own[2] if own else "")
            files = {} if own is None else {group.rank: own[0]}
            for place, note in enumerate(notes) if own else ():
                file = None if place == group.rank else _opened(note, length, stack)
                files |= {} if file is None else {place: file}
            seen = [json.loads(answer) for answer in group.gather(f"seen, {occasion}", json.dumps(list(files)))]
            self.near = frozenset(place for place in files if group.rank in seen[place]) - {group.rank}
            self._memory = {place: _mapped(files[place], length) for place in self.near}
            if own and self.near:
                self._memory[group.rank] = own[1]

    def row(self, place: int, agent: int, bucket: int, turn: int) -> Tensor | None:
        """Returns a row; None if the rank that writes it is not near, or is this rank and no other rank is near.

        Args:
            place: place of the rank that writes the row.
            agent: which of that rank's agents, from 0.
            bucket: number of the bucket.
            turn: how many messages of this agent and bucket came before this one.
        """
        if place not in self._memory:
            return None
        key = place, agent, bucket, turn % TURNS
        if key not in self._rows:
            numbers, dtype = self._like[bucket]
            size, slot = numbers * dtype.itemsize, agent * TURNS + turn % TURNS
            # Rows that are read together begin at different offsets in a page: see kernels.buffers.allocate.
            start = self._starts[bucket] + slot * _space(size) + 576 * ((place * self._agents + agent) % 7)
            self._rows[key] = self._memory[place][start : start + size].view(dtype)
        return self._rows[key]


def _space(row_bytes: int) -> int:
    """Returns the bytes from one row to the next, room for an offset included."""
    return (row_bytes // PAGE + 2) * PAGE


def _make(length: int, stack: contextlib.ExitStack) -> tuple[int, Tensor, str] | None:
    """Makes a file in memory that only this rank can write and that keeps its size.

    Returns:
        The file, its bytes, and the note that tells others how to open it; None if this system has no such files.
    """
    if not hasattr(os, "memfd_create"):
        return None
    file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, file)
    os.ftruncate(file, length)
    secret = secrets.token_hex(SECRET_BYTES)
    os.pwrite(file, secret.encode(), 0)
    memory = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=length, dtype=torch.uint8)
    try:
        fcntl.fcntl(file, F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE)
    except OSError:  # a kernel older than 5.1 cannot forbid others to write
        fcntl.fcntl(file, F_ADD_SEALS, SEALS)
    return file, memory, json.dumps([os.getpid(), file, secret])


def _opened(note: str, length: int, stack: contextlib.ExitStack) -> int | None:
    """Opens the file that a note is about, to read it.

    None if the note is not one of `_make`, or the file cannot be opened, is another one of the same name, is smaller
    than `length`, or may change its size while it is read.
    """
    if (place := _parsed(note)) is None:
        return None
    pid, number, secret = place
    path = f"/proc/{pid}/fd/{number}"
    try:
        if not str(Path(path).readlink()).startswith(f"/memfd:{NAME} "):
            return None
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, file)
        is_sealed = fcntl.fcntl(file, F_GET_SEALS) & SEALS == SEALS
        is_right = is_sealed and os.fstat(file).st_size >= length and os.pread(file, len(secret), 0) == secret.encode()
    except OSError:
        return None
    return file if is_right else None


def _parsed(note: str) -> tuple[int, int, str] | None:
    """Returns a file's process, descriptor and secret from a note of `_make`; None if it is none."""
    try:
        pid, number, secret = json.loads(note)
    except (ValueError, TypeError):
        return None
    is_right = type(pid) is int and type(number) is int and pid > 0 and number >= 0 and isinstance(secret, str)
    return (pid, number, secret) if is_right and re.fullmatch(f"[0-9a-f]{{{2 * SECRET_BYTES}}}", secret) else None


def _mapped(file: int, length: int) -> Tensor:
    """Maps the bytes of a file, which may only be read; the mapping ends with the tensor.

    A tensor knows no memory that is read-only, so torch is not told; whoever writes there gets a segmentation fault.
    The module `mmap` would keep a descriptor open for as long as the mapping lives.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    where: Any = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap.argtypes = where
    libc.mmap.argtypes, libc.mmap.restype = [*where, *[ctypes.c_int] * 3, ctypes.c_long], ctypes.c_void_p
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{length:,} bytes of another rank's memory could not be mapped")
    memory = (ctypes.c_uint8 * length).from_address(address)
    weakref.finalize(memory, libc.munmap, address, length).atexit = False  # a thread may still read them then
    return torch.frombuffer(memory, dtype=torch.uint8)
