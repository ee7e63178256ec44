"""Ranks of one machine read each other's rows in memory; whoever cannot gets them through the group."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gut_fast as gf
import ranks
from gut_fast.distributed import shared_memory
from gut_fast.distributed.group import Group
from gut_fast.distributed.shared_memory import SharedRows
from gut_fast.kernels import ops
from test_distributed import assert_same, rank_run

ROWS = [(5, torch.float32), (3000, torch.bfloat16), (1, torch.float64)]


def open_files():
    """The descriptors of shared memory that this process has."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found.append(str(file.readlink()))
    return [name for name in found if shared_memory.NAME in name and "memfd" in name]


def written_and_read(rank, size, refuses):
    """What each rank reads of the others' rows after all have written their own, and who is near."""
    group = Group.of(dist.group.WORLD)
    shared = SharedRows(group, "once", None if rank == refuses else ROWS, 2)
    group.gather("made", "")
    for bucket in range(len(ROWS)):
        for agent in range(2):
            for turn in range(2):
                row = shared.row(rank, agent, bucket, turn)
                if row is not None:
                    row.fill_(100 * rank + 10 * agent + turn + bucket)
    group.gather("written", "")
    seen = {
        (place, agent, bucket, turn): shared.row(place, agent, bucket, turn)
        for place in range(size)
        for agent in range(2)
        for bucket in range(len(ROWS))
        for turn in range(4)
    }
    # A tensor of shared memory must not be sent to the test through shared memory of torch's.
    return shared.near, {key: None if row is None else row.clone() for key, row in seen.items()}


@pytest.mark.parametrize("refuses", [None, 1])
def test_rows_are_read_where_they_are_written(refuses):
    for rank, (near, seen) in enumerate(ranks.run(3, written_and_read, refuses)):
        willing = {0, 1, 2} - {refuses}
        assert near == (willing - {rank} if rank in willing else set())
        for (place, agent, bucket, turn), row in seen.items():
            if rank not in willing or place not in willing:
                assert row is None
                continue
            numbers, dtype = ROWS[bucket]
            expected = torch.full((numbers,), 100 * place + 10 * agent + turn % 2 + bucket, dtype=dtype)
            assert torch.equal(row, expected)


def no_files_left(rank, size):
    shared = SharedRows(Group.of(dist.group.WORLD), "once", ROWS, 1)
    mapped = "memfd" in Path("/proc/self/maps").read_text()
    return len(shared.near), mapped, open_files()


def test_no_file_stays_open():
    assert ranks.run(2, no_files_left) == [(1, True, [])] * 2


@pytest.mark.parametrize("case", ["right", "secret", "file", "process"])
def test_only_the_file_that_was_meant_is_opened(case, tmp_path):

    with contextlib.ExitStack() as stack, (tmp_path / "other").open("w") as other:
        _, note = shared_memory._make(4096, stack)
        pid, file, secret = json.loads(note)
        note = {
            "right": note,
            "secret": json.dumps([pid, file, "0" * len(secret)]),
            "file": json.dumps([pid, other.fileno(), secret]),
            "process": json.dumps([2**22 + 1, file, secret]),
        }[case]
        assert (shared_memory._opened(note, stack) is not None) == (case == "right")
        assert shared_memory._opened("", stack) is None


def some_share(rank, size, cases):
    """As `rank_run`, but rank 1 shares no memory."""
    return rank_run(rank, size, [(*case[:3], case[3] | {"shared_memory": rank != 1}) for case in cases])


@pytest.mark.filterwarnings("ignore:.* unstable on")
def test_shared_rows_and_sent_ones_side_by_side():
    cases = [("gut", "ring", 8, {}), ("gradient_tracking", "random", 8, {"bucket_bytes": 100}), ("d2", "star", 4, {})]
    assert_same(cases, ranks.run(4, some_share, cases), 4)


def slow_reader(rank, size, cases):
    """As `rank_run`, but rank 1 is asleep now and then when all messages are there, before it mixes them."""
    combine, calls = ops.combine_, 0

    def late(*arguments):
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            time.sleep(0.02)
        combine(*arguments)

    if rank == 1:
        ops.combine_ = late
    return rank_run(rank, size, cases, steps=40)


@pytest.mark.filterwarnings("ignore:.* unstable on")
def test_rows_stay_as_they_are_until_all_have_read_them():
    cases = [("gut", "random_matching", 4, {}), ("gut", "ring", 4, {}), ("dsgd", "one_peer_exponential", 4, {})]
    assert_same(cases, ranks.run(4, slow_reader, cases), 4, steps=40)


def bytes_of(rank, size, shared_memory):
    parameter = torch.nn.Parameter(torch.zeros(1000))
    options = {"process_group": dist.group.WORLD, "shared_memory": shared_memory}
    optimizer = gf.GUT([parameter], 0.1, topology=gf.topology.ring(size), **options)
    parameter.grad = torch.ones(1000)
    optimizer.step()
    return optimizer.bytes_sent


def test_bytes_of_messages_count_wherever_they_lie():
    shared, sent = (ranks.run(3, bytes_of, how) for how in (True, False))
    assert shared == sent
    assert shared[0] == {(0, 1): 4000, (0, 2): 4000}
