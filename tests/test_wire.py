"""Coded messages in the optimizers: ranks and the stacked form compute the same, bit for bit, and lose nothing."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
import test_simulator_across as simulations
from gut_fast.distributed import wire as wire_module
from gut_fast.verify.lockstep import seeded
from test_distributed import graph_of, rank_run, train_on_quadratics

WIRES = ["int8", "int4", torch.bfloat16]


def case_of(place, rule, graph, n, wire):
    """One case, with options that differ from case to case."""
    shared, steps, buckets = place % 2 == 0, (1, 3)[place // 2 % 2], (400, 1 << 20)[place % 3 // 2]
    seed = 5 if wire != torch.bfloat16 and place % 4 == 1 else None
    failure = "continue" if place % 5 == 4 else "raise"
    both = {"wire_dtype": wire, "wire_seed": seed, "local_steps": steps}
    return rule, graph, n, both, {"shared_memory": shared, "bucket_bytes": buckets, "on_peer_failure": failure}


def assert_stacked_numbers(size, cases, steps):
    flat = [(rule, graph, n, {**both, **across}) for rule, graph, n, both, across in cases]
    outcomes = ranks.run(size, rank_run, flat, steps)
    for index, (rule, graph, n, both, across) in enumerate(cases):
        if across["on_peer_failure"] == "continue" and graph_of(graph, n).is_static:
            continue  # coded by modulo there, by differences in one process
        whole, _ = train_on_quadratics(rule, graph_of(graph, n), list(range(n)), steps, **both)
        for rank, results in enumerate(outcomes):
            for own, stacked in zip(results[index], whole, strict=True):
                expected = stacked[rank * (n // size) : (rank + 1) * (n // size)]
                assert expected.isfinite().all()
                assert torch.equal(own.reshape(expected.shape), expected), (rule, graph, both, across, rank)


@pytest.mark.filterwarnings("ignore:.* unstable on", "ignore:.* grows from round to round")
@pytest.mark.parametrize(
    ("size", "graph", "n"),
    [(2, "ring", 4), (4, "ring", 4), (2, "random", 8), (3, "one_peer_exponential", 6), (4, "random_matching", 4)],
)
def test_ranks_give_the_stacked_numbers_of_coded_messages(size, graph, n):
    rules = ("gut", "gutm", "gradient_tracking")
    cases = [case_of(k + n, *each[:1], graph, n, each[1]) for k, each in enumerate(itertools.product(rules, WIRES))]
    assert_stacked_numbers(size, cases, 12)


def backward_run(rank, size, graph, wire, local_steps, overlap):
    """Trains by backward passes, one agent a rank, or all agents in one process where `size` is None."""
    n = graph.num_agents
    agents = slice(rank, rank + 1) if size else slice(0, n)
    start = [seeded(n, *shape, seed=k, dtype=torch.float32)[agents] for k, shape in enumerate(((9, 4), (7,), (300,)))]
    parameters = [nn.Parameter(rows[0].clone() if size else rows.clone()) for rows in start]
    where = {"process_group": dist.group.WORLD, "bucket_bytes": 60, "overlap": overlap} if size else {}
    optimizer = gf.GUT(
        parameters, 0.05, mu=0.5, topology=graph, local_steps=local_steps, wire_dtype=wire, wire_seed=3, **where
    )
    for _ in range(13):
        optimizer.zero_grad()
        goals = [seeded(n, *rows.shape[1:], seed=50 + k, dtype=torch.float32)[agents] for k, rows in enumerate(start)]
        pairs = zip(parameters, goals, strict=True)
        sum(((p - goal.reshape(p.shape)) ** 2).sum() for p, goal in pairs).backward()
        optimizer.step()
    return [p.detach() for p in parameters], optimizer.overlap


@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize("graph", [gf.topology.ring(3), gf.topology.random_matching(3, seed=1)], ids=str)
def test_coded_messages_may_leave_during_backward(graph):
    for wire, local_steps in (("int8", 1), ("int4", 3)):
        whole, _ = backward_run(0, None, graph, wire, local_steps, False)
        for rank, (own, said) in enumerate(ranks.run(3, backward_run, graph, wire, local_steps, True)):
            assert all(torch.equal(one, all_[rank]) for one, all_ in zip(own, whole, strict=True))
            assert said == "on"


N = 6
RING, MATCHING = gf.topology.ring(N), gf.topology.random_matching(N, seed=1)
SHAPES = ((300,), (7,))


def a_problem(graph=RING, dtype=torch.float32, **options):
    """Heterogeneous quadratics without noise, and an optimizer that solves them exactly."""
    parameters = [nn.Parameter(seeded(N, *shape, seed=k, dtype=dtype)) for k, shape in enumerate(SHAPES)]
    hyperparameters = {"mu": 1.0, "kappa": 0.3} | options
    return parameters, gf.GUT(parameters, 0.3, topology=graph, **hyperparameters)


def solve(parameters, optimizer, steps):
    goals = [seeded(N, *shape, seed=10 + k, dtype=torch.float64) for k, shape in enumerate(SHAPES)]
    curvatures = [0.5 + seeded(N, *shape, seed=20 + k, dtype=torch.float64).sigmoid() for k, shape in enumerate(SHAPES)]
    for _ in range(steps):
        for p, goal, curvature in zip(parameters, goals, curvatures, strict=True):
            p.grad = (curvature.to(p.dtype) * (p.detach() - goal.to(p.dtype))).to(p.dtype)
        optimizer.step()
    return torch.cat([p.detach() for p in parameters], 1)


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_differences_end_where_whole_messages_do(wire, local_steps):
    steps = 900 * local_steps
    exact = solve(*a_problem(local_steps=local_steps), steps)
    coded = solve(*a_problem(local_steps=local_steps, wire_dtype=wire), steps)
    assert (coded - exact).abs().max() < 3e-6
    assert (coded - coded.mean(0)).pow(2).sum(1).mean() < 4 * (exact - exact.mean(0)).pow(2).sum(1).mean() + 1e-12


def wraps_seen(monkeypatch):
    """Counts the blocks that had to be dropped."""
    seen, judge = [], wire_module.judged

    def judged(*arguments):
        distance = judge(*arguments)
        seen.append(int((distance < 0).sum()))
        return distance

    monkeypatch.setattr(wire_module, "judged", judged)
    return seen


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_modulo_on_matchings_is_close_and_does_not_wrap(wire, monkeypatch):
    exact, seen = solve(*a_problem(MATCHING), 300), wraps_seen(monkeypatch)
    coded = solve(*a_problem(MATCHING, wire_dtype=wire), 300)
    assert len(seen) > 1000
    assert sum(seen) == 0
    assert (coded - exact).abs().max() < {"int8": 1e-3, "int4": 3e-2}[wire]


def jump(rank, size, wire):
    """Gossips without gradients; an agent jumps far away from the others, which its code cannot tell."""
    k = N // size
    agents = slice(rank * k, rank * k + k)
    parameter = nn.Parameter(seeded(N, 600, seed=1, dtype=torch.float32)[agents].clone())
    where = {"process_group": dist.group.WORLD, "agents_per_rank": k} if size > 1 else {}
    optimizer = gf.GUT([parameter], 0.1, mu=0.5, topology=MATCHING, wire_dtype=wire, **where)
    means = []
    for step in range(20):
        if step == 6 and rank == 0:
            parameter.data[0, :300] += 1000.0
        means.append(parameter.detach().double().sum(0))
        optimizer.step()
    return parameter.detach(), torch.stack(means)


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_blocks_that_cannot_be_told_are_dropped_at_both_ends(wire, monkeypatch):
    seen = wraps_seen(monkeypatch)
    whole, sums = jump(0, 1, wire)
    assert sum(seen) > 0
    sums[:6, :300] += 1000.0
    assert (sums - sums[0]).abs().max() < 1e-2  # roundings of float32 numbers of a thousand
    outcomes = ranks.run(2, jump, wire)
    assert torch.equal(torch.cat([own for own, _ in outcomes]), whole)
    assert whole.isfinite().all()


@pytest.mark.parametrize("graph", [RING, MATCHING], ids=str)
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_run_goes_on_bit_for_bit_from_its_state(graph, wire):
    options = {"local_steps": 2, "wire_dtype": wire, "wire_seed": None if wire == torch.bfloat16 else 1}
    parameters, optimizer = a_problem(graph, **options)
    solve(parameters, optimizer, 9)
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy((parameters, optimizer))
    other, restored = a_problem(graph, **options)
    with torch.no_grad():
        for own, theirs in zip(other, parameters, strict=True):
            own.copy_(theirs)
    restored.load_state_dict(saved)
    expected = solve(parameters, optimizer, 9)
    assert torch.equal(solve(other, restored, 9), expected)
    assert torch.equal(solve(*twin, 9), expected)
    assert ("wire" in saved) == (wire != torch.bfloat16 or graph is RING)


def test_without_copies_a_run_begins_with_whole_messages():
    parameters, optimizer = a_problem(wire_dtype="int8")
    solve(parameters, optimizer, 3)
    known, whole = 300 + 8 + 3 * 4, 4 * 307
    assert optimizer.message_bytes().tolist() == [known] * N
    saved = optimizer.state_dict()
    del saved["wire"]
    optimizer.load_state_dict(saved)
    solve(parameters, optimizer, 1)
    assert optimizer.message_bytes().tolist() == [whole] * N
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(N, 5))]})
    optimizer.step()
    assert optimizer.message_bytes().tolist() == [whole + 4 * 5] * N


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("graph", [RING, MATCHING], ids=str)
def test_parameters_of_other_dtypes_are_served(dtype, graph):
    exact = solve(*a_problem(graph, dtype, state_dtype=None if dtype == torch.float64 else torch.float32), 400)
    options = {"state_dtype": None if dtype == torch.float64 else torch.float32, "wire_dtype": "int8"}
    coded = solve(*a_problem(graph, dtype, **options), 400)
    limit = {torch.float64: 1e-9 if graph is RING else 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (coded - exact).abs().max() < limit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capturable": True, "wire_dtype": "int8"}, ValueError, "capturable=True with wire_dtype=int8"),
        ({"wire_dtype": "int3"}, TypeError, '"int8" or "int4", got'),
        ({"wire_dtype": torch.int8}, TypeError, '"int8" or "int4", got'),
        ({"wire_dtype": torch.float16}, TypeError, "messages about parameters of torch.float32 can be"),
        ({"wire_seed": 1}, ValueError, "wire_seed=1 rounds messages"),
        ({"wire_dtype": torch.bfloat16, "wire_seed": 1}, ValueError, "wire_seed=1 rounds messages"),
        ({"wire_dtype": "int8", "wire_seed": 1.5}, TypeError, "wire_seed must be an integer"),
    ],
)
def test_what_cannot_be_coded_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        a_problem(**options)


def test_steps_with_a_wire_are_not_compiled():
    _, optimizer = a_problem(wire_dtype="int8")
    with pytest.raises(Exception, match="with wire_dtype, leave step"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()


def disagree(rank, size):
    with pytest.raises(gf.distributed.MismatchError, match="differ in their wire_seed"):
        gf.GUT(
            [nn.Parameter(torch.zeros(3))], 0.1, topology=gf.topology.complete(2), process_group=dist.group.WORLD,
            wire_dtype="int8", wire_seed=rank,
        )  # fmt: skip
    return True


def test_ranks_agree_on_the_seed():
    assert ranks.run(2, disagree) == [True, True]


def simulated(rank, size, graph, wire):
    """Trains four agents for eight steps; returns the history, models, and both counts of bytes."""
    topology = getattr(simulations, graph)()
    here = {"process_group": dist.group.WORLD, "agents_per_rank": 4 // size} if size > 1 else {}

    def optimizer(parameters):
        return gf.GUT(parameters, 0.1, mu=0.5, topology=topology, wire_dtype=wire, local_steps=2, **here)

    sim = simulations.simulator("gut", lambda: topology, across=size > 1, optimizer=optimizer)
    simulations.run(sim, 8)
    return sim.history, simulations.values(sim), sim.bytes_sent, sim.optimizer.bytes_sent


@pytest.mark.parametrize("graph", ["ring", "matching"])
@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_a_simulation_computes_and_counts_what_ranks_do(graph, wire):
    history, models, total, _ = simulated(0, 1, graph, wire)
    for rank, outcome in enumerate(ranks.run(4, simulated, graph, wire)):
        assert outcome[0] == history
        assert all(
            torch.equal(own[0], whole[rank]) for own, whole in zip(outcome[1].values(), models.values(), strict=True)
        )
        assert torch.equal(outcome[2], total)
        assert sum(outcome[3].values()) == total[rank] > 0


@pytest.mark.parametrize("graph", ["ring", "matching"])
def test_a_resumed_simulation_goes_on_bit_for_bit(graph, tmp_path):
    topology = getattr(simulations, graph)()

    def make():
        options = {"mu": 0.5, "topology": topology, "wire_dtype": "int4", "wire_seed": 2, "local_steps": 2}
        optimizer = partial(gf.GUT, lr=0.1, **options)
        return simulations.simulator("gut", lambda: topology, optimizer=optimizer)

    whole, parts, resumed = make(), make(), make()
    simulations.run(whole, 12)
    simulations.run(parts, 5, checkpoint=tmp_path / "state.pt")
    resumed.load_checkpoint(tmp_path / "state.pt")
    simulations.run(resumed, 12)
    assert torch.equal(resumed.bytes_sent, whole.bytes_sent)
    values = zip(simulations.values(resumed).values(), simulations.values(whole).values(), strict=True)
    assert all(torch.equal(own, expected) for own, expected in values)
