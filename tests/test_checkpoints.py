"""Checkpoints of several ranks: whole or not there, of one run, and always one that all ranks have."""

import collections
import os
import random
import resource
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
from gut_fast.distributed import Group, PeerError
from gut_fast.distributed.checkpoints import Checkpoints
from gut_fast.distributed.files import DamagedError, read_shard


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def value(rank, step):
    return {"rank": rank, "w": torch.full((50,), float(100 * step + rank))}


def play(rank, size, folder, steps, keep=2):
    """Loads, saves after these steps (a list for each rank) without waiting, and returns what was loaded."""
    checkpoints = Checkpoints(folder, dist.group.WORLD, keep=keep)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.load()
    for step in steps[rank]:
        checkpoints.save(step, value(rank, step))
    return found and found[0], [str(warning.message) for warning in caught], found and found[1]


def loaded(size, folder):
    """Returns the step that ranks agree on, and the warnings of each."""
    outcomes = ranks.run(size, play, folder, [[]] * size)
    assert len({outcome[0] for outcome in outcomes}) == 1
    for rank, (step, _, state) in enumerate(outcomes):
        assert step is None or (state["rank"], state["w"].tolist()) == (rank, value(rank, step)["w"].tolist())
    return outcomes[0][0], [outcome[1] for outcome in outcomes]


def test_the_newest_step_that_all_have(tmp_path):
    assert ranks.run(3, play, tmp_path, [[10, 20], [10, 20, 30], [10]])[0][0] is None
    (tmp_path / "step-00000020" / ".rank-1.pt.123.tmp").write_bytes(b"left by a killed writer")
    assert loaded(3, tmp_path) == (10, [[], [], []])
    assert files(tmp_path) == [f"step-00000010/rank-{rank}.pt" for rank in range(3)]


def test_a_process_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.load() is None
    for step in (0, 5, 5, 10):
        Checkpoints(tmp_path, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), keep=1).save(step, {"x": step})
    assert files(tmp_path) == ["step-00000010/rank-0.pt"]
    assert checkpoints.load() == (10, {"x": 10})
    with pytest.raises(ValueError, match=r"step is 9, but step 10 has been saved; load\(\) goes back"):
        checkpoints.save(9, {})
    assert torch.load(tmp_path / "step-00000010/rank-0.pt", weights_only=True)["state"] == {"x": 10}


def test_step_0_is_a_step(tmp_path):
    Checkpoints(tmp_path).save(0, {"x": 1})
    assert Checkpoints(tmp_path).load() == (0, {"x": 1})


def ahead(rank, size, folder):
    """Saves on rank 1 before rank 0 has saved anything, then the other way round; returns the files in between."""
    checkpoints, kept = Checkpoints(folder, dist.group.WORLD), []
    for leader, steps in ((1, [10, 20, 30, 40]), (0, [10, 20, 30, 40, 50]), (1, [50])):
        if rank == leader:
            for step in steps:
                checkpoints.save(step, value(rank, step))
        dist.barrier()
        kept.append(files(folder))
        dist.barrier()
    return kept


def test_a_rank_that_is_ahead_keeps_what_the_others_need(tmp_path):
    first, second, third = ranks.run(2, ahead, tmp_path)[0]
    assert first == [f"step-000000{step}/rank-1.pt" for step in (10, 20, 30, 40)]
    theirs = [f"step-000000{step}/rank-0.pt" for step in (30, 40, 50)]
    assert second == sorted(first + theirs)
    assert third == sorted([*theirs, "step-00000040/rank-1.pt", "step-00000050/rank-1.pt"])
    assert loaded(2, tmp_path)[0] == 50


def test_a_folder_for_each_host(tmp_path):
    def host(rank):
        return tmp_path / f"host-{rank}"

    assert [each[0] for each in ranks.run(2, on_hosts, tmp_path, [[10, 20, 30], [10, 20]])] == [None, None]
    assert [each[0] for each in ranks.run(2, on_hosts, tmp_path, [[], []])] == [20, 20]
    assert files(host(1)) == ["step-00000010/rank-1.pt", "step-00000020/rank-1.pt"]
    ranks.run(2, on_hosts, tmp_path, [[30, 40, 50], [30, 40, 50]], 60)
    assert "step-00000020/rank-1.pt" not in files(host(1))
    host(0).rename(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=r"rank 0 has steps \[\], and sees .* rank 1 has steps \[.*50, 60\]"):
        ranks.run(2, on_hosts, tmp_path, [[], []])
    host(1).rename(host(0))
    (tmp_path / "elsewhere").rename(host(1))
    with pytest.raises(RuntimeError, match=r"once had: rank 0 has steps \[\], and sees files of ranks \[1\]; "):
        ranks.run(2, on_hosts, tmp_path, [[], []])


def on_hosts(rank, size, folder, steps, last=None):
    """Saves `last` once all have saved the others."""
    outcome = play(rank, size, folder / f"host-{rank}", steps)
    if last is not None:
        dist.barrier()
        Checkpoints(folder / f"host-{rank}", dist.group.WORLD).save(last, value(rank, last))
    return outcome


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "another"])
def test_a_damaged_shard_counts_as_missing(tmp_path, how):
    ranks.run(2, play, tmp_path, [[10, 20], [10, 20]])
    shard = tmp_path / "step-00000020" / "rank-1.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= how == "flipped"
    shard.write_bytes({"truncated": content[:-1], "flipped": content, "empty": b"", "another": b"x" * 500}[how])
    step, said = loaded(2, tmp_path)
    assert step == 10
    assert said[0] == []
    assert said[1] == [f"{shard} is truncated or corrupt: its check sum is wrong; it counts as missing"]
    assert not shard.exists()


def test_every_byte_counts(tmp_path):
    Checkpoints(tmp_path).save(1, {"x": torch.arange(3)})
    shard = tmp_path / "step-00000001" / "rank-0.pt"
    content = shard.read_bytes()
    for place in range(0, len(content), 7):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedError):
            read_shard(shard)
    shard.write_bytes(content)
    assert read_shard(shard).step == 1


def test_two_runs_never_make_one_checkpoint(tmp_path):
    """Rank 1's folder is put aside, as a host that is away, and comes back with shards of a later step of before."""
    ranks.run(2, play, tmp_path, [[10, 20, 30], [10, 20]])
    old = (tmp_path / "step-00000030" / "rank-0.pt").read_bytes()
    assert [each[0] for each in ranks.run(2, play, tmp_path, [[], [30]])] == [20, 20]
    (tmp_path / "step-00000030" / "rank-0.pt").write_bytes(old)
    assert loaded(2, tmp_path)[0] == 20
    ranks.run(2, play, tmp_path, [[20], []])  # what one rank says again, the other still has
    assert loaded(2, tmp_path)[0] == 20


def test_another_number_of_ranks_or_another_numbering(tmp_path):
    ranks.run(2, play, tmp_path, [[10], [10]])
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"rank-0.pt is of step 10 of rank 0 of 2, but this is rank 0 of 3; start as"):
        ranks.run(3, play, tmp_path, [[]] * 3)
    with pytest.raises(ValueError, match="rank 0 of 2, but this is rank 0 of 1"):
        Checkpoints(tmp_path).load()
    with pytest.raises(ValueError, match=r"holds checkpoints of another run, of steps \[10\]; load\(\) first"):
        Checkpoints(tmp_path).save(20, {})
    assert files(tmp_path) == before
    zero, one = (tmp_path / "step-00000010" / f"rank-{rank}.pt" for rank in range(2))
    zero.rename(tmp_path / "aside")
    one.rename(zero)
    (tmp_path / "aside").rename(one)
    with pytest.raises(ValueError, match="of step 10 of rank 1 of 2, but this is rank 0 of 2"):
        ranks.run(2, play, tmp_path, [[], []])


def survivors(rank, size, folder):
    """Goes on without rank 2 after step 20, as members of a new group, and saves often; returns what is left."""
    group = Group.of(dist.group.WORLD)
    owner = nn.Module()
    owner.group = group
    checkpoints = Checkpoints(folder, owner)
    checkpoints.load()
    for step in (10, 20):
        checkpoints.save(step, value(rank, step))
    dist.barrier()
    if rank == 2:
        checkpoints.save(30, value(rank, 30))
        return None
    owner.group = Group(group.store, rank, [0, 1], epoch=1, everyone=3)
    for step in (30, 40, 50, 60):
        checkpoints.save(step, value(rank, step))
        owner.group.gather(f"saved {step}", "")
    found = checkpoints.load()
    return found[0], files(folder)


def test_those_who_are_left_count_and_all_can_start_anew(tmp_path):
    step, names = ranks.run(3, survivors, tmp_path)[0]
    assert step == 60
    kept = {int(name[5:13]) for name in names if "rank-0" in name}
    assert {20, 50, 60} <= kept <= {20, 40, 50, 60}  # 40 goes when rank 0 knows that rank 1 has 60
    assert loaded(3, tmp_path)[0] == 20  # not 30, which rank 2 had before it was lost and the others without it


def absent(rank, size, folder):
    if rank == 0:
        Checkpoints(folder, Group(ranks.store, 0, [0, 1], timeout=0.5))


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with pytest.raises(PeerError, match=r"ranks \[1\] have not come"):
        ranks.run(2, absent, tmp_path)


def write_until_killed(rank, size, folder, numbers):
    checkpoints = Checkpoints(folder, dist.group.WORLD)
    found = checkpoints.load()
    step, state = found or (0, {"w": torch.zeros(numbers)})
    assert torch.equal(state["w"], torch.full((numbers,), float(step)))
    ranks.store.set(f"loaded {rank}", str(step))
    while True:
        step += 1
        checkpoints.save(step, {"w": torch.full((numbers,), float(step))})
        ranks.store.set(f"saved {rank}", "")


@pytest.mark.parametrize("restarts", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_writing_many_times(tmp_path, restarts):
    rng, last = random.Random(0), 0
    for _ in range(restarts):
        with ranks.Crew(2, write_until_killed, tmp_path, 200_000) as crew:
            for rank in range(2):
                crew.wait_for(f"saved {rank}")
            started = int(crew.store.get("loaded 0"))
            assert started == int(crew.store.get("loaded 1")) >= last
            last = started
            for rank in rng.sample(range(2), 2):
                time.sleep(rng.uniform(0, 0.15))
                crew.kill(rank)
    assert last >= restarts - 1  # every time both had saved a step at least


def train(rank, size, folder, stop):
    """Trains with momentum, a schedule and drop-out until step `stop`; returns the step it began at, and the model."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 8])
    checkpoints = Checkpoints(folder, dist.group.WORLD)
    parts, start = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, 0
    if found := checkpoints.load():
        start, state = found
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
    for step in range(start, stop):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 3 == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            checkpoints.save(step + 1, {**states, "random": torch.get_rng_state()})
    return start, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_restarted_run_goes_on_bit_for_bit(tmp_path):
    whole = ranks.run(2, train, tmp_path / "whole", 12)
    ranks.run(2, train, tmp_path / "parts", 7)
    for (_, expected), (start, state) in zip(whole, ranks.run(2, train, tmp_path / "parts", 12), strict=True):
        assert start == 6
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, len]}}, r"state\['a'\]\['b'\]\[1\] is a builtins.builtin_function_or_method"),
        ({"lr": torch.ones(1).numpy()[0]}, r"state\['lr'\] is a numpy.float32, which torch.load\(weights_only=True\)"),
        ({"a": collections.defaultdict(int)}, r"state\['a'\] is a collections.defaultdict"),
        ([1], "state must be a dict, got list"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path / "new").save(1, state)
    assert not (tmp_path / "new").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(TypeError, match="group must be an optimizer"):
        Checkpoints(tmp_path, 3)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Checkpoints(tmp_path).save(-1, {})


def test_something_else_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError, match=f"{name} is not a folder"):
            Checkpoints(tmp_path / name)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "step-00000003").touch()
    checkpoints = Checkpoints(folder)
    assert checkpoints.load() is None
    for step in (5, 6, 7):
        checkpoints.save(step, {"x": step})
    assert checkpoints.load() == (7, {"x": 7})
    assert files(folder) == ["step-00000003", "step-00000006/rank-0.pt", "step-00000007/rank-0.pt"]


@pytest.mark.parametrize("room", [100, 5000, 60_000])
def test_a_full_disk_is_an_oserror_and_what_was_there_stays(tmp_path, room):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(2, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == ["step-00000001/rank-0.pt"]
    assert checkpoints.load() == (1, {"x": 1})


def test_new_folders_are_on_the_disk_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("gut_fast.distributed.checkpoints.sync", synced.append)
    Checkpoints(tmp_path / "a" / "b").save(1, {})
    assert set(synced) == {tmp_path / "a" / "b", tmp_path / "a", tmp_path}


def also_in_a_part(rank, size, folder):
    """Saves checkpoints of ranks 0 and 1 alone, beside the checkpoints of all."""
    part = dist.new_group([0, 1])
    if rank < 2:
        Checkpoints(folder / "part", part).save(5, value(rank, 5))
    checkpoints = Checkpoints(folder / "all", dist.group.WORLD)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, value(rank, step))
        dist.barrier()
    checkpoints.save(50, value(rank, 50))
    dist.barrier()
    return files(folder / "all")


def test_ranks_that_have_checkpoints_elsewhere_too(tmp_path):
    ranks.run(3, also_in_a_part, tmp_path)
    assert not (tmp_path / "all" / "step-00000010").exists()
    assert loaded(3, tmp_path / "all")[0] == 50


ELASTIC = """
import os, sys, torch, torch.distributed as dist, gut_fast as gf
from torch import nn
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder, kills = dist.get_rank(), sys.argv[1], sys.argv[2:]
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
optimizer = gf.GUT(model.parameters(), 0.1, mu=0.9, topology=gf.topology.ring(2), process_group=dist.group.WORLD,
                   wire_dtype=torch.bfloat16)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
checkpoints, parts = gf.distributed.Checkpoints(folder, optimizer), (model, optimizer, scheduler)
start, state = checkpoints.load() or (0, None)
if state:
    for part, saved in zip(parts, state["parts"]):
        part.load_state_dict(saved)
    torch.set_rng_state(state["random"])
for step in range(start + 1, 21):
    if rank == 1 and kills and step == 13 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    optimizer.zero_grad()
    model(torch.randn(6, 4)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    if step % 5 == 0:
        checkpoints.save(step, {"parts": [part.state_dict() for part in parts], "random": torch.get_rng_state()})
torch.save([start, model.state_dict(), optimizer.state_dict()], f"{folder}/end-{rank}.pt")
dist.destroy_process_group()
"""


def flat(value):
    """Lists the numbers in nested dicts and lists of tensors."""
    if isinstance(value, torch.Tensor):
        return [value.flatten().tolist()]
    if isinstance(value, (dict, list)):
        return [part for each in (value.values() if isinstance(value, dict) else value) for part in flat(each)]
    return [value]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_bit_for_bit(tmp_path):
    (tmp_path / "train.py").write_text(ELASTIC)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, kills in (("whole", []), ("parts", ["kill"])):
        done = subprocess.run(
            [*torchrun, "--max-restarts", "1", tmp_path / "train.py", tmp_path / name, *kills],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # else addresses of the dead stay in it
        )
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        whole, parts = (torch.load(tmp_path / name / f"end-{rank}.pt") for name in ("whole", "parts"))
        assert (whole[0], parts[0]) == (0, 10)
        assert whole[1]["0.weight"].isfinite().all()
        assert flat(parts[1:]) == flat(whole[1:])
