"""Ranks that die, stop or dawdle: an error that names them where they are waited for, or training that goes on."""

import gc
import os
import signal
import time
from threading import Timer

import networkx as nx
import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, MismatchError, PeerError, notes, rejoin
from gut_fast.distributed import group as connections
from gut_fast.verify.lockstep import seeded

SIZE = 5


def train(rank, size, phase, victim):
    """Trains on quadratics; the victim says when it is in this phase of step 4, and waits there for what comes."""
    parameter = nn.Parameter(torch.zeros(1000))
    where = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD, "timeout": 2.0}
    optimizer = gf.GUT([parameter], 0.1, **where)

    def fall(now):
        if rank == victim and optimizer.num_steps == (5 if now == "after the step" else 4) and phase == now:
            ranks.store.set("fallen", "")
            signal.pause()

    begin = optimizer._exchange.begin
    optimizer._exchange.begin = lambda *a: (begin(*a), fall("between messages and mixing"))
    try:
        while True:
            parameter.grad = parameter.detach() - rank
            fall("before the step")
            before = parameter.detach().clone()
            optimizer.step()
            fall("after the step")
    except PeerError as error:
        assert torch.equal(parameter, before)
        with pytest.raises(PeerError):
            optimizer.step()
        return error


PHASES = ["before the step", "between messages and mixing", "after the step"]


@pytest.mark.parametrize(
    ("phase", "how"),
    [*((phase, signal.SIGKILL) for phase in PHASES), (PHASES[1], signal.SIGSTOP)]
    + [pytest.param(phase, signal.SIGSTOP, marks=pytest.mark.slow) for phase in (PHASES[0], PHASES[2])],
)
def test_a_lost_rank_is_named_by_all_who_wait_for_it(phase, how):
    victim = 2
    with ranks.Crew(SIZE, train, phase, victim) as crew:
        crew.wait_for("fallen")
        crew.send(victim, how)
        errors = {rank: crew.outcomes([rank])[0] for rank in range(SIZE) if rank != victim}
    for rank in (1, 3):
        error = errors[rank]
        assert isinstance(error, PeerError)
        assert (error.rank, error.edge) in ((victim, (victim, rank)), (4 - rank, (4 - rank, rank)))
    assert sum(error.rank == victim for error in errors.values()) >= 1
    for error in errors.values():
        assert str(error).startswith(f"step {error.step}: agent {error.edge[0]}'s message to agent {error.edge[1]}")
        assert f"rank {error.rank}" in str(error)


TOPOLOGIES = {"ring": gf.topology.ring, "matching": lambda n: gf.topology.random_matching(n, 1)}


def survive(rank, size, steps, rule, graph, seed, wire):
    """Takes steps of random length on quadratics; returns who is left, the steps taken, the mean, and parameters."""
    torch.manual_seed(seed * 100 + rank)
    parameter = nn.Parameter(torch.zeros(50))
    goal = seeded(size, 50, seed=9, dtype=torch.float32)[rank]
    optimizer = gf.GossipOptimizer(
        [parameter], rule, lr=0.05, topology=TOPOLOGIES[graph](size), process_group=dist.group.WORLD,
        timeout=20.0, on_peer_failure="continue", wire_dtype=wire, **({"kappa": 0.2} if rule == "gut" else {}),
    )  # fmt: skip
    for step in range(steps):
        time.sleep(0.003 * float(torch.rand(())))
        parameter.grad = parameter.detach() - goal
        optimizer.step()
        if rank == 0:
            ranks.store.set("step", str(step))
    members = optimizer.group.members
    total = parameter.detach().clone()
    optimizer.group.all_reduce(total)
    return members, optimizer.num_steps, total / len(members), parameter.detach()


SLOW_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4)]


@pytest.mark.parametrize("wire", [None, "int8"])
@pytest.mark.parametrize("seed", [0, 5, *SLOW_SEEDS])  # one and two ranks die, on each of the graphs
def test_the_others_go_on(seed, wire):
    random, size = torch.Generator().manual_seed(seed), 7
    victims = (1 + torch.randperm(size - 1, generator=random)[: 1 + seed % 2]).tolist()
    rule, graph = ["gut", "gradient_tracking", "dsgd"][seed % 3], ["ring", "matching"][seed // 3]
    with ranks.Crew(size, survive, 300, rule, graph, seed, wire) as crew:
        crew.wait_for("step")
        for victim in victims:
            time.sleep(0.4 * float(torch.rand((), generator=random)))
            crew.kill(victim)
        left = [rank for rank in range(size) if rank not in victims]
        outcomes = crew.outcomes(left)
    goals = seeded(size, 50, seed=9, dtype=torch.float32)
    pairs = TOPOLOGIES[graph](size).graph.subgraph(left)
    for rank, outcome in zip(left, outcomes, strict=True):
        assert not isinstance(outcome, Exception), outcome
        members, steps, mean, mine = outcome
        assert list(members) == left
        assert steps == 300
        assert (mean - goals[left].mean(0)).abs().max() < 0.02
        within_reach = sorted(nx.node_connected_component(pairs, rank))
        assert (mine - goals[within_reach].mean(0)).abs().max() < 0.6  # of goals that lie about 2 apart


def die_while_connecting(rank, size, moment, is_seen):
    """Rank 1 dies, and rank 3 when the others connect anew. Returns who is left, and the seconds since the start."""
    if not is_seen:  # as on machines of their own
        connections.has_ended = lambda mark: False
    parameter, optimizer = optimizer_of(Group(ranks.store, rank, range(size), timeout=4.0), size)
    connect = connections._Gloo.__init__

    def connect_and_die(self, *arguments):
        if moment == "while":
            Timer(0.003, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if moment != "before":
            connect(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 3:
        connections._Gloo.__init__ = connect_and_die
    start = time.monotonic()
    for step in range(60):
        if step == 20 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.003)
        parameter.grad = parameter.detach() - rank
        optimizer.step()
    return optimizer.group.members, time.monotonic() - start


@pytest.mark.parametrize(
    ("moment", "is_seen"),
    [("before", True), ("while", True), ("after", True), pytest.param("while", False, marks=pytest.mark.slow)],
)
def test_no_live_rank_is_left_out_when_another_dies_while_they_connect(moment, is_seen):
    with ranks.Crew(7, die_while_connecting, moment, is_seen) as crew:
        outcomes = crew.outcomes([0, 2, 4, 5, 6])
    assert [outcome if isinstance(outcome, Exception) else outcome[0] for outcome in outcomes] == [(0, 2, 4, 5, 6)] * 5
    assert max(seconds for _, seconds in outcomes) < (4 if is_seen else 20)  # gloo itself calls a dead rank for 30 s


def slow_to_see(rank, size):
    """Rank 3 leaves; its neighbours begin their step only after that, and clear no garbage. Returns the seconds."""
    gc.disable()
    parameter, optimizer = optimizer_of(Group(ranks.store, rank, range(size), timeout=20.0), size)
    start = time.monotonic()
    while optimizer.num_steps < 30:
        if optimizer.num_steps == 20 and rank == 3:
            return optimizer.group.close()
        time.sleep(0.5 if optimizer.num_steps == 20 and rank in (2, 4) else 0)
        parameter.grad = parameter.detach() - rank
        optimizer.step()
    return time.monotonic() - start


def test_all_hear_at_once_of_a_connection_that_was_broken_before_the_step():
    with ranks.Crew(5, slow_to_see) as crew:
        outcomes = crew.outcomes()
    assert max(outcomes[:3] + outcomes[4:]) < 15


def die_during_overlap(rank, size):
    """Rank 2 dies at step 5; its neighbours are then a step behind the others. Returns who is left, and parameters."""
    parameter, where = nn.Parameter(torch.zeros(1000)), {"topology": gf.topology.ring(size)}
    where |= {"process_group": dist.group.WORLD, "timeout": 20.0, "on_peer_failure": "continue", "overlap": True}
    optimizer = gf.DSGD([parameter], 0.1, **where)
    while optimizer.num_steps < 150:
        if (rank, optimizer.num_steps) == (2, 5):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        (0.5 * (parameter - rank) ** 2).sum().backward()
        optimizer.step()
    return list(optimizer.group.members), optimizer.overlap, parameter.detach()


def test_with_overlap_messages_leave_only_after_the_ranks_that_are_left_have_met():
    with ranks.Crew(SIZE, die_during_overlap) as crew:
        outcomes = crew.outcomes([0, 1, 3, 4])
    for outcome in outcomes:
        members, overlap, _ = outcome
        assert (members, overlap) == ([0, 1, 3, 4], "on")
    mean = torch.stack([parameter for *_, parameter in outcomes]).mean(0)
    torch.testing.assert_close(mean, torch.full((1000,), 2.0), atol=1e-3, rtol=0.0)


def die_together(rank, size, when):
    """Rank 1 dies; rank 3, no neighbour of it, dies while all regroup. Returns the seconds, and who is left."""
    if rank == 3:
        write = notes.Notes.set

        def die(self, key, note):
            if when == "after its note" or not key.startswith("here"):
                write(self, key, note)
            if key.startswith("here"):
                os.kill(os.getpid(), signal.SIGKILL)

        notes.Notes.set = die
    parameter, optimizer = optimizer_of(Group(ranks.store, rank, range(size), timeout=20.0), size)
    start = time.monotonic()
    while optimizer.num_steps < 30:
        if (rank, optimizer.num_steps) == (1, 20):
            os.kill(os.getpid(), signal.SIGKILL)
        parameter.grad = parameter.detach() - rank
        optimizer.step()
    return time.monotonic() - start, list(optimizer.group.members)


@pytest.mark.filterwarnings("ignore:.* falls into")
@pytest.mark.parametrize("when", ["before its note", "after its note"])
def test_a_rank_of_this_machine_that_dies_while_the_others_regroup_is_not_waited_for(when):
    with ranks.Crew(6, die_together, when) as crew:
        for seconds, members in crew.outcomes([0, 2, 4, 5]):
            assert seconds < 15
            assert members == [0, 2, 4, 5]


def optimizer_of(group, size, rule="gradient_tracking", wire=None):
    parameter = nn.Parameter(torch.zeros(50))
    optimizer = gf.GossipOptimizer(
        [parameter], rule, lr=0.1, topology=gf.topology.ring(size), process_group=group, on_peer_failure="continue",
        wire_dtype=wire,
    )  # fmt: skip
    return parameter, optimizer


def come_and_go(rank, size, victim, comes_back, wire):
    """Trains in a group made of a store; the victim leaves at step 20 and may come back. Ends 300 steps after that."""
    goal = seeded(size, 50, seed=9, dtype=torch.float32)[rank]
    parameter, optimizer = optimizer_of(Group(ranks.store, rank, range(size), timeout=20.0), size, wire=wire)
    first, end = None, None if comes_back else 400
    while end is None or optimizer.num_steps < end:
        if rank == victim and optimizer.num_steps == 20:
            optimizer.group.close()
            del parameter, optimizer
            if not comes_back:
                return None
            parameter, optimizer = optimizer_of(rejoin(ranks.store, rank, size, timeout=20.0), size, wire=wire)
            first = optimizer.num_steps, parameter.detach().clone()
        if end is None:
            time.sleep(0.002)  # leaves a core to the rank that comes back
        parameter.grad = parameter.detach() - goal
        optimizer.step()
        if end is None and optimizer.group.epoch > 1 and optimizer.group.size == size:
            end = optimizer.num_steps + 300
    return optimizer.group.members, parameter.detach(), first, str(optimizer.topology)


@pytest.mark.parametrize("wire", [None, "int4"])
@pytest.mark.parametrize("comes_back", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_comes_back(comes_back, wire):
    size, victim = 5, 3
    with ranks.Crew(size, come_and_go, victim, comes_back, wire) as crew:
        outcomes = crew.outcomes()
    there = [rank for rank in range(size) if comes_back or rank != victim]
    goal = seeded(size, 50, seed=9, dtype=torch.float32)[there].mean(0)
    for rank in there:
        members, mine, first, graph = outcomes[rank]
        assert list(members) == there
        assert graph == ("ring(5)" if comes_back else "ring(5).without([3])")
        assert (mine - goal).abs().max() < 0.01
        if rank == victim:
            step, start = first
            assert step >= 20
            assert step % 10 == 0
            assert start.abs().max() > 0.01  # a neighbour's parameters, not its own zeros


def unwanted(rank, size, odd):
    """Rank 1 of 2, which was never there, comes with other settings, or where nobody looks."""
    if rank == 0:
        group = Group(ranks.store, 0, [0], timeout=5.0, everyone=2)
        parameter, optimizer = optimizer_of(group, size)
        if odd == "nobody looks":
            return None
        while optimizer.group.epoch < 2:
            time.sleep(0.005)
            parameter.grad = parameter.detach() - 1
            optimizer.step()
        return optimizer.group.members, optimizer.num_steps
    group = rejoin(ranks.store, rank, size, timeout=1.0 if odd == "nobody looks" else 5.0)
    return optimizer_of(group, size, rule="gut")


def test_who_may_not_join_is_told_and_the_others_go_on():
    with ranks.Crew(2, unwanted, "settings") as crew:
        (members, steps), error = crew.outcomes()
    assert isinstance(error, MismatchError)
    assert "rule: gradient_tracking on ranks [0]; gut on ranks [1]" in str(error)
    assert list(members) == [0]
    assert steps > 0
    with ranks.Crew(2, unwanted, "nobody looks") as crew:
        error = crew.outcomes()[1]
    assert isinstance(error, PeerError)
    assert "rank 1 was not let in within 1 s" in str(error)


def interrupted(rank, size, overlap):
    """Interrupts rank 1 while it waits for rank 0; it tries to go on."""
    parameter = nn.Parameter(torch.full((4,), 1.0 + rank))
    optimizer = gf.GUT(
        [parameter], 0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD, overlap=overlap, timeout=20.0
    )
    for step in range(6):
        if (rank, step) == (0, 3):
            ranks.store.wait(["interrupted"])
            time.sleep(0.3)
        optimizer.zero_grad()
        parameter.square().sum().backward()
        if (rank, step) == (1, 3):
            before = parameter.detach().clone()
            interrupt = Timer(0.2, lambda: (os.kill(os.getpid(), signal.SIGINT), ranks.store.set("interrupted", "")))
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            assert torch.equal(parameter, before)
            assert optimizer.num_steps == 3
        optimizer.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_after_an_interrupt_no_step_is_taken_and_the_others_hear_of_it(overlap):
    with ranks.Crew(2, interrupted, overlap) as crew:
        errors = crew.outcomes()
    assert all(isinstance(error, PeerError) for error in errors), errors
    assert str(errors[1]) == "step 3: rank 1 broke it off: KeyboardInterrupt"
    assert "which gave up: step 3: rank 1 broke it off: KeyboardInterrupt" in str(errors[0])


def host_stops(rank, size, policy):
    """Trains until rank 0, which hosts the store, is stopped."""
    notes.BRIEFLY = 0.5
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        ranks.store.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(ranks.store.get("port")), None, False)
    group = Group(store, rank, range(size), timeout=1.0)
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = gf.GUT([parameter], 0.1, topology=gf.topology.ring(size), process_group=group, on_peer_failure=policy)
    group.timeout = 2.0 if rank == 2 else 1.0  # it hears that its neighbour gave up
    for step in range(20):
        if (rank, step) == (0, 5):
            ranks.store.set("ready", "")
            signal.pause()
        parameter.grad = parameter.detach() - rank
        optimizer.step()


@pytest.mark.parametrize(("policy", "what"), [("raise", PeerError), ("continue", RuntimeError)])
def test_nobody_waits_for_a_store_whose_host_is_stopped(policy, what):
    with ranks.Crew(5, host_stops, policy) as crew:
        crew.wait_for("ready")
        crew.send(0, signal.SIGSTOP)
        errors = crew.outcomes([1, 2, 3, 4])
    for error in errors:
        assert isinstance(error, what)
        assert policy == "raise" or "the store that the ranks share is gone or stopped" in str(error)


def looks_in_vain(rank, size):
    """Trains without rank 1 of 2; the store is gone when rank 0 looks for newcomers."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", host.port, None, False)
    parameter, optimizer = optimizer_of(Group(client, 0, [0], timeout=2.0, everyone=2), 2, rule="gut")
    for step in range(15):
        if step == 5:
            del host
        parameter.grad = parameter.detach() - 1
        optimizer.step()


def test_whoever_looks_for_newcomers_notices_that_the_store_is_gone():
    with ranks.Crew(1, looks_in_vain) as crew:
        error = crew.outcomes()[0]
    assert isinstance(error, RuntimeError)
    assert "the store that the ranks share is gone or stopped" in str(error)
