"""Agents on several ranks: odd groups and parameters, changes at odd times, and what is refused before it harms."""

import copy
import gc
import time
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, MismatchError, PeerError, rejoin
from gut_fast.distributed.group import _wait
from gut_fast.verify.lockstep import seeded


def make(rank, size, numbers=4, rule="gut", **options):
    """Returns a parameter, 1 + rank everywhere, and its optimizer."""
    parameter = nn.Parameter(torch.full((numbers,), 1.0 + rank))
    options = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD, "timeout": 20.0} | options
    return parameter, gf.GossipOptimizer([parameter], rule, lr=0.1, **options)


def train(parameter, optimizer, steps, between=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        between()
        optimizer.step()


def odd_groups(size, rank=None):
    """Returns odd groups: several dtypes, an empty one, parameters without numbers or dimensions; the last is added."""

    def parameters(first_seed, dtype, *shapes):
        values = [seeded(size, *shape, seed=first_seed + k, dtype=dtype) for k, shape in enumerate(shapes)]
        return [nn.Parameter(value.clone() if rank is None else value[rank].clone()) for value in values]

    return [
        {"params": parameters(0, torch.float32, (3, 2), (), (0,), (5,)), "lr": 0.05},
        {"params": [], "lr": 0.3},
        {"params": parameters(10, torch.float32, (0, 3))},
        {"params": parameters(20, torch.float64, (4,), ()), "lr": 0.02, "weight_decay": 0.1},
        {"params": parameters(30, torch.float32, (6,), (2, 2)), "lr": 0.01, "maximize": True},
    ]


def train_odd_groups(optimizer, last):
    for step in range(12):
        if step == 6:
            optimizer.add_param_group(last)
        if step == 9:
            optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        sum(p.square().sum().double() for group in optimizer.param_groups for p in group["params"]).backward()
        optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def odd_groups_of_a_rank(rank, size, rule, overlap):
    *groups, last = odd_groups(size, rank)
    optimizer = gf.GossipOptimizer(
        groups, rule, lr=0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD, overlap=overlap,
        bucket_bytes=30,
    )  # fmt: skip
    return train_odd_groups(optimizer, last), optimizer.overlap


@pytest.mark.parametrize("overlap", [False, True])
def test_odd_groups_give_the_stacked_numbers(overlap):
    *groups, last = odd_groups(3)
    stacked = train_odd_groups(gf.GradientTracking(groups, lr=0.1, topology=gf.topology.ring(3)), last)
    for rank, (mine, said) in enumerate(ranks.run(3, odd_groups_of_a_rank, "gradient_tracking", overlap)):
        assert all(torch.equal(one, other[rank]) for one, other in zip(mine, stacked, strict=True))
        assert said == ("on" if overlap else "off")


def reload(rank, size):
    """Returns what the refusals of a wire's state of another form say; the optimizer must be as before."""
    rounded = {"wire_dtype": torch.bfloat16}

    def optimizer_of(**options):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        return model, gf.GUT(
            model.parameters(), 0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD, **options
        )

    def steps(model, optimizer):
        for _ in range(3):
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()

    model, optimizer = optimizer_of(**rounded)
    steps(model, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    known, [own] = good["wire"]["known"], good["wire"]["copies"]
    bad = {
        "short": {"known": known, "copies": [own[..., :3]]},
        "groups": {"known": known, "copies": [own, own]},
        "integers": {"known": known, "copies": [own.int()]},
        "known": {"known": known[:1], "copies": [own]},
        "widths": {"known": known, "widths": [own]},
        "nothing": None,
    }
    said = {}
    for name, wire in bad.items():
        model, optimizer = optimizer_of(**rounded)
        steps(model, optimizer)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="GUT: the state's wire") as caught:
            optimizer.load_state_dict({**good, "step": 99, "wire": wire})
        after, said[name] = optimizer.state_dict(), str(caught.value)
        assert after["step"] == before["step"] == 3
        for index, own in before["state"].items():
            assert all(torch.equal(value, after["state"][index][key]) for key, value in own.items())
        assert torch.equal(before["wire"]["copies"][0], after["wire"]["copies"][0])
    # Without copies, or with some that are not needed, a run goes on, whatever the buckets.
    without = {key: value for key, value in good.items() if key != "wire"}
    for state, options in [(without, rounded), (good, {}), (good, {**rounded, "bucket_bytes": 8})]:
        model, optimizer = optimizer_of(**options)
        optimizer.load_state_dict(state)
        steps(model, optimizer)
        assert optimizer.num_steps == 6
    return said


def test_copies_of_another_form_are_refused_before_anything_changes():
    said = ranks.run(2, reload)[0]
    assert "copies[0] is" in said["short"]
    assert "expected torch.float32 (1, 1, 24)" in said["short"]
    assert "expected 'known' and 'copies'" in said["widths"]


def touched(rank, size, what, overlap):
    """Changes the model between backward and step; returns parameters, what overlap says, and what left early."""
    parameter, optimizer = make(rank, size, overlap=overlap)
    left = []

    @torch.no_grad()
    def assign_state():
        optimizer.state[parameter] = {key: value + rank for key, value in optimizer.state[parameter].items()}

    @torch.no_grad()
    def between():
        left.append(optimizer._exchange.has_begun())
        if what == "parameters":
            parameter.mul_(0.9)
        elif what == "state":
            next(iter(optimizer.state[parameter].values())).add_(rank)
        elif what == "assigned state":
            assign_state()
        elif what == "learning rate":
            optimizer.param_groups[0]["lr"] *= 0.9

    for _ in range(5):
        if what == "state before backward":
            assign_state()
        train(parameter, optimizer, 1, between)
    return parameter.detach(), optimizer.overlap, left


@pytest.mark.parametrize(
    ("what", "overlap"),
    [
        ("parameters", "off: parameters or their state change"),
        ("state", "off: parameters or their state change"),
        ("assigned state", "off: parameters or their state change"),
        ("learning rate", "off: learning rate or hyper-parameters change"),
        ("state before backward", "on"),
    ],
)
def test_overlap_notices_models_that_change_before_the_step(what, overlap):
    for (mine, said, left), (theirs, *_) in zip(
        ranks.run(2, touched, what, True), ranks.run(2, touched, what, False), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert said.startswith(overlap)
        assert left == [overlap == "on" and step > 0 for step in range(5)]


def changed_under_way(rank, size):
    """Tries to add a group, and to load a state, while messages of a step are under way."""
    parameter, optimizer = make(rank, size, overlap=True)
    added = nn.Parameter(torch.full((3,), 1.0 + rank))
    state = copy.deepcopy(optimizer.state_dict())

    def change():
        add = partial(optimizer.add_param_group, {"params": [added]})
        for refused in (add, partial(optimizer.load_state_dict, state)):
            with pytest.raises(RuntimeError, match="have left already; call step"):
                refused()

    train(parameter, optimizer, 2)
    train(parameter, optimizer, 2, change)
    optimizer.add_param_group({"params": [added]})
    train(parameter, optimizer, 2)
    return optimizer.num_steps, len(optimizer.param_groups), added.detach()


def test_nothing_is_added_or_loaded_while_messages_are_under_way():
    for steps, groups, added in ranks.run(2, changed_under_way):
        assert (steps, groups) == (6, 2)
        assert (added - 1.5).abs().max() < 0.5  # mixed


def add_differing(rank, size):
    """Adds groups of different shapes, then of one."""
    parameter, optimizer = make(rank, size)
    with pytest.raises(MismatchError, match="differ in their parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3 + rank))]})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    train(parameter, optimizer, 1)
    added = nn.Parameter(torch.full((3,), 1.0 + rank))
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones(3)
    optimizer.step()
    return added.detach()


def test_a_group_that_ranks_do_not_agree_on_is_not_added():
    for added in ranks.run(2, add_differing):
        assert torch.allclose(added, torch.tensor(1.4))


def add_refused(rank, size):
    """Rank 1 tries to add what it must not; then all add a group."""
    parameter, optimizer = make(rank, size)
    start = time.monotonic()
    error, message = (ValueError, "lr") if rank == 1 else (PeerError, "rank 1 does not come .* ValueError: .*lr")
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0 if rank == 1 else 0.1})
    waited = time.monotonic() - start
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    train(parameter, optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.full((3,), 1.0 + rank))]})
    train(parameter, optimizer, 1)
    return waited, len(optimizer.param_groups)


def test_a_rank_that_cannot_add_a_group_tells_the_others():
    for waited, groups in ranks.run(3, add_refused):
        assert waited < 10
        assert groups == 2


def dropped(rank, size):
    """Rank 0 lets go of its optimizer between backward and step."""
    parameter, optimizer = make(rank, size, overlap=True)
    train(parameter, optimizer, 2)
    parameter.square().sum().backward()
    alive = weakref.ref(optimizer)
    if rank == 0:
        del optimizer
        gc.collect()
        assert alive() is None
        parameter.square().sum().backward()  # nobody listens any more
        return None
    try:
        while optimizer.num_steps < 10:
            train(parameter, optimizer, 1)
    except PeerError as error:
        return str(error)


def test_parameters_do_not_keep_their_optimizer():
    assert "rank 0, which is gone" in ranks.run(2, dropped)[1]


def share_a_group(rank, size):
    group = Group(ranks.store, rank, range(size), timeout=20.0)
    make(rank, size, process_group=group)
    with pytest.raises(ValueError, match="this Group serves another optimizer"):
        make(rank, size, process_group=group)
    return True


def test_a_group_serves_one_optimizer():
    assert all(ranks.run(2, share_a_group))


def two_models(rank, size):
    """A generator and a critic with optimizers of their own, in turn and together, over two process groups."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(5, 4), nn.Linear(4, 1)
    first = gf.GUT(
        generator.parameters(), 0.05, topology=gf.topology.ring(size), process_group=dist.group.WORLD, overlap=True
    )
    second = gf.DSGD(
        critic.parameters(), 0.05, topology=gf.topology.star(size), process_group=dist.new_group(range(size)),
        overlap=True, wire_dtype=torch.bfloat16,
    )  # fmt: skip
    for step in range(15):
        generator.zero_grad()
        critic.zero_grad()
        x = seeded(8, 5, seed=rank * 100 + step, dtype=torch.float32)
        made = generator(x) if step % 3 else generator(x).detach()
        critic(made).square().mean().backward()
        for optimizer in (first, second) if rank % 2 else (second, first):
            if optimizer is second or step % 3:
                optimizer.step()
    return first.bytes_sent, second.bytes_sent, (first.overlap, second.overlap)


def test_two_optimizers_do_not_meet():
    for rank, (first, second, said) in enumerate(ranks.run(3, two_models)):
        assert first == {(rank, other): 10 * 24 * 4 for other in range(3) if other != rank}
        assert second == {(rank, other): (4 + 14 * 2) * 5 for other in ([1, 2] if rank == 0 else [0])}
        assert said == ("on", "on")


def any_backend(rank, size):
    """Trains in a group whose backend has another name; rank 0 stops taking part until the other has noticed."""
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", store=dist.PrefixStore("again", ranks.store), rank=rank, world_size=size)
    parameter, optimizer = make(rank, size, timeout=0.5)
    train(parameter, optimizer, 2)
    if rank == 0:
        ranks.store.wait(["noticed"])
        return optimizer.group.is_own, None
    with pytest.raises(PeerError, match=r"rank 0, which was not ready within 0\.5 s") as caught:
        optimizer.step()
    ranks.store.set("noticed", "")
    return optimizer.group.is_own, caught.value.rank


def test_gloo_under_another_name_has_the_limits_of_gloo():
    assert ranks.run(2, any_backend) == [(True, None), (True, 0)]


def given(rank, size, ends):
    """Sends messages through the user's group; then rank 0 dawdles until the other has noticed, or leaves."""
    group = Group(ranks.store, rank, range(size), timeout=0.5, process_group=dist.group.WORLD)
    parameter, optimizer = make(rank, size, process_group=group)
    train(parameter, optimizer, 2)
    assert not group.is_own
    if rank == 0:
        return ends or ranks.store.wait(["noticed"])
    with pytest.raises(PeerError) as caught:
        train(parameter, optimizer, 3)
    ranks.store.set("noticed", "")
    return str(caught.value)


@pytest.mark.parametrize(("ends", "what"), [(False, "was not ready within 0.5 s"), (True, "which is gone")])
def test_the_users_own_group_is_not_waited_for_longer(ends, what):
    assert what in ranks.run(2, given, ends)[1]


class Late:
    """A work that nobody answers; gloo waits for whole milliseconds."""

    def wait(self, limit):
        time.sleep(int(limit.total_seconds() * 1000) / 1000)
        raise RuntimeError("Timed out waiting for recv operation to complete")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_rank_that_is_late_is_not_said_to_be_gone(fraction):
    for _ in range(5):
        with pytest.raises(TimeoutError):
            _wait(Late(), time.monotonic() + (10 + fraction) / 1000)


def add_after_joining(rank, size):
    """Rank 1 joins rank 0, then both add a group; returns the added parameter."""
    if rank == 0:
        group = Group(ranks.store, 0, [0], timeout=20.0, everyone=2)
    else:
        group = rejoin(ranks.store, 1, 2, timeout=20.0)
    parameter, optimizer = make(rank, size, process_group=group, on_peer_failure="continue")
    while optimizer.group.size < 2:
        time.sleep(0.002)  # leaves a core to rank 1
        train(parameter, optimizer, 1)
    while optimizer.num_steps % 10 != 5:
        train(parameter, optimizer, 1)
    added = nn.Parameter(torch.full((3,), 1.0 + rank))
    optimizer.add_param_group({"params": [added]})
    optimizer.step()
    return added.detach()


@pytest.mark.filterwarnings("ignore:ranks")
def test_a_group_is_added_after_a_rank_has_joined():
    first, second = ranks.run(2, add_after_joining)
    assert torch.allclose(first, torch.tensor(1.5))
    assert torch.allclose(second, torch.tensor(1.5))
