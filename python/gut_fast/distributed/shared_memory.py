"""Rows that ranks of one machine read in each other's memory, where the kernel wrote them.

Each rank keeps its rows in a file in memory that has no name, which others open through /proc. Whether they can (the
same machine, user and process namespace) is not guessed but tried: a file begins with a secret, and its owner leaves a
note of it. Only a byte travels between such ranks when a row is written, and another one when it has been read.

There are two rows for each message, taken in turn: one can be written while others still read the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from gut_fast.distributed.group import Group

__all__ = ["SharedRows"]

NAME = "gut_fast"
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
            notes = group.gather(f"memory, {occasion}", own[1] if own else "")
            files = {} if own is None else {group.rank: own[0]}
            for place, note in enumerate(notes) if own else ():
                file = None if place == group.rank else _opened(note, stack)
                files |= {} if file is None else {place: file}
            seen = [json.loads(answer) for answer in group.gather(f"seen, {occasion}", json.dumps(list(files)))]
            self.near = frozenset(place for place in files if group.rank in seen[place]) - {group.rank}
            mapped = (*self.near, group.rank) if self.near else ()
            self._memory = {place: _mapped(files[place], length) for place in mapped}

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


def _make(length: int, stack: contextlib.ExitStack) -> tuple[int, str] | None:
    """Makes a file in memory, and the note that tells others how to open it; None if this system has no such files."""
    if not hasattr(os, "memfd_create"):
        return None
    file = os.memfd_create(NAME)
    stack.callback(os.close, file)
    os.ftruncate(file, length)
    secret = secrets.token_hex(16)
    os.pwrite(file, secret.encode(), 0)
    return file, json.dumps([os.getpid(), file, secret])


def _opened(note: str, stack: contextlib.ExitStack) -> int | None:
    """Opens the file that a note is about; None if it cannot be opened, or is another one of the same name."""
    if not note:
        return None
    pid, number, secret = json.loads(note)
    path = f"/proc/{pid}/fd/{number}"
    try:
        if not str(Path(path).readlink()).startswith(f"/memfd:{NAME}"):
            return None
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    stack.callback(os.close, file)
    return file if os.pread(file, len(secret), 0) == secret.encode() else None


def _mapped(file: int, length: int) -> Tensor:
    """Maps the bytes of a file; the mapping ends with the tensor."""
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=length, dtype=torch.uint8)
