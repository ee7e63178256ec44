"""Ranks of one machine read each other's rows in memory; whoever cannot gets them through the group."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, shared_memory
from gut_fast.distributed.shared_memory import SharedRows
from gut_fast.kernels import ops
from test_distributed import assert_stacked_numbers, rank_run

ROWS = [(5, torch.float32), (3000, torch.bfloat16), (1, torch.float64)]


def open_files():
    """Lists the descriptors of shared memory that this process has."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.append(str(file.readlink()))
    return [name for name in found if shared_memory.NAME in name and "memfd" in name]


def written_and_read(rank, size, refuses):
    """Returns who is near, what this rank reads after all have written their rows, and the files that stay open."""
    group = Group.of(dist.group.WORLD)
    shared = SharedRows(group, "once", None if rank == refuses else ROWS, 2)
    places = [(agent, bucket, turn) for agent in range(2) for bucket in range(len(ROWS)) for turn in range(4)]
    for agent, bucket, turn in places:
        row = shared.row(rank, agent, bucket, turn)
        if row is not None:
            row.fill_(100 * rank + 10 * agent + turn % 2 + bucket)
    group.gather("written", "")
    seen = {(place, *where): shared.row(place, *where) for place in range(size) for where in places}
    rows = {key: None if row is None else row.clone() for key, row in seen.items()}
    return shared.near, rows, "memfd" in Path("/proc/self/maps").read_text(), open_files()


@pytest.mark.parametrize("refuses", [None, 1])
def test_rows_are_read_where_they_are_written_and_no_file_stays_open(refuses):
    for rank, (near, seen, is_mapped, files) in enumerate(ranks.run(3, written_and_read, refuses)):
        willing = {0, 1, 2} - {refuses}
        assert near == (willing - {rank} if rank in willing else set())
        assert is_mapped or rank not in willing
        assert files == []
        for (place, agent, bucket, turn), row in seen.items():
            if rank not in willing or place not in willing:
                assert row is None
                continue
            numbers, dtype = ROWS[bucket]
            expected = torch.full((numbers,), 100 * place + 10 * agent + turn % 2 + bucket, dtype=dtype)
            assert torch.equal(row, expected)


LENGTH = 8192


def unsealed(stack):
    """Returns a file in memory as `_make` makes it, but without seals, with the secret of no letters but f."""
    file = os.memfd_create(shared_memory.NAME)
    stack.callback(os.close, file)
    os.ftruncate(file, LENGTH)
    os.pwrite(file, b"f" * 32, 0)
    return file


def notes_of(note, other, without_seals):
    """Returns notes by what is wrong with them."""
    pid, file, secret = json.loads(note)
    places = {
        "secret": [pid, file, "0" * len(secret)],
        "no secret": [pid, file, ""],
        "half a secret": [pid, file, secret[:16]],
        "secret of another type": [pid, file, list(secret)],
        "another file": [pid, other, secret],
        "no seals": [pid, without_seals, "f" * 32],
        "no process": [2**22 + 1, file, secret],
        "path as process": ["self", file, secret],
        "path up": [f"1/../{pid}", file, secret],
        "number as text": [str(pid), file, secret],
        "negative process": [-pid, file, secret],
        "True as process": [True, file, secret],
        "fraction": [float(pid), file, secret],
        "path as file": [pid, f"../fd/{file}", secret],
        "huge number": [10**400, file, secret],
        "too few": [pid, file],
        "too many": [pid, file, secret, 1],
        "no list": 7,
    }
    return {name: json.dumps(place) for name, place in places.items()} | {"no JSON": note[:-1], "empty": ""}


def test_only_the_file_that_was_meant_is_opened(tmp_path):
    with contextlib.ExitStack() as stack, (tmp_path / "other").open("w") as other:
        _, _, note = shared_memory._make(LENGTH, stack)
        assert shared_memory._opened(note, LENGTH, stack) is not None
        assert shared_memory._opened(note, LENGTH + 1, stack) is None
        for name, wrong in notes_of(note, other.fileno(), unsealed(stack)).items():
            assert shared_memory._opened(wrong, LENGTH, stack) is None, name


def test_nobody_changes_the_size_and_only_the_owner_writes():
    with contextlib.ExitStack() as stack:
        file, memory, note = shared_memory._make(LENGTH, stack)
        for length in (0, LENGTH - 1, LENGTH + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(file, length)
        writable = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
        stack.callback(os.close, writable)
        with pytest.raises(PermissionError):
            os.pwrite(writable, b"x", 5000)
        with pytest.raises(PermissionError):
            mmap.mmap(writable, LENGTH)
        seen = shared_memory._mapped(shared_memory._opened(note, LENGTH, stack), LENGTH)
    memory[5000] = 7  # the files are closed: mappings stay
    assert seen[5000] == 7
    assert "memfd" in Path("/proc/self/maps").read_text()
    del seen, memory
    assert "memfd" not in Path("/proc/self/maps").read_text()


WRITES = """
import contextlib
from gut_fast.distributed import shared_memory
with contextlib.ExitStack() as stack:
    _, _, note = shared_memory._make(8192, stack)
    seen = shared_memory._mapped(shared_memory._opened(note, 8192, stack), 8192)
    print(int(seen.sum()) > 0, flush=True)
    seen[5000] = 1
    print("written")
"""


def test_a_row_cannot_be_written_by_who_only_reads_it():
    done = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "True\n")


def some_share(rank, size, cases, steps):
    """Does as `rank_run`, but rank 1 is on a system that has no files in memory."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.delattr(os, "memfd_create")
        return rank_run(rank, size, cases, steps)


@pytest.mark.filterwarnings("ignore:.* unstable on")
def test_shared_rows_and_sent_ones_side_by_side():
    cases = [("gut", "ring", 8, {}), ("gradient_tracking", "random", 8, {"bucket_bytes": 100}), ("d2", "star", 4, {})]
    assert_stacked_numbers(4, cases, 20, some_share)


def slow_reader(rank, size, cases, steps):
    """Does as `rank_run`, but rank 1 sleeps now and then when all messages are there, before it mixes them."""
    combine, calls = ops.combine_, 0

    def late(*arguments):
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            time.sleep(0.02)
        combine(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(ops, "combine_", late)
        return rank_run(rank, size, cases, steps)


@pytest.mark.filterwarnings("ignore:.* unstable on")
def test_rows_stay_as_they_are_until_all_have_read_them():
    cases = [("gut", "random_matching", 4, {}), ("gut", "ring", 4, {}), ("dsgd", "one_peer_exponential", 4, {})]
    assert_stacked_numbers(4, cases, 25, slow_reader)


def bytes_of(rank, size):
    """Returns the bytes of a step with shared memory, and without."""
    sent = []
    for shares in (True, False):
        parameter = torch.nn.Parameter(torch.zeros(1000))
        where = {"process_group": dist.group.WORLD, "shared_memory": shares}
        optimizer = gf.GUT([parameter], 0.1, topology=gf.topology.ring(size), **where)
        optimizer.step()
        sent.append(optimizer.bytes_sent)
    return sent


def test_bytes_of_messages_count_wherever_they_lie():
    assert ranks.run(3, bytes_of)[0] == [{(0, 1): 4000, (0, 2): 4000}] * 2
