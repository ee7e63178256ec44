"""The compiled kernel against the reference: every rule, size, topology, thread count and instruction tier."""

import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import gut_fast as gf
from gut_fast import _core, topology
from gut_fast.kernels import ops
from gut_fast.rules import RULES, Coefficients, UpdateRule
from lockstep import Lockstep, seeded

ODD_COLUMNS = (1, 2, 63, 64, 65, 130, 1000)
STABLE = {"gut": {"mu": 0.3}, "gutm": {"mu": 0.25}}  # on every topology below
NESTEROV = [(name, {"nesterov": True}) for name in ("dsgdm", "qg_dsgdm")]
SETTINGS = [(name, STABLE.get(name, {})) for name in RULES] + NESTEROV


def asymmetric():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return topology.from_matrix([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.2, 0.0, 0.8]])


TOPOLOGIES = {
    "one agent": topology.ring(1),
    "two agents": topology.ring(2),
    "three agents": topology.ring(3),
    "ring": topology.ring(16),
    "torus": topology.torus(4, 4).lazy(0.5),
    "petersen": topology.petersen().lazy(0.5),
    "star": topology.star(7),
    "complete": topology.complete(9),
    "exponential": topology.exponential(16).lazy(0.5),
    "chain": topology.chain(5).lazy(0.5),
    "asymmetric": asymmetric(),
    "one-peer": topology.one_peer_exponential(8),
    "matching": topology.random_matching(5, seed=0),
}


@pytest.fixture
def tier():
    before = _core.tier()
    yield _core.set_tier
    _core.set_tier(before)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=str)
def test_rules(rule, hyperparameters, dtype, backend):
    run = Lockstep(rule, topology.ring(16), ODD_COLUMNS, dtype, backend, hyperparameters).run(30)
    assert run.excess_error() <= 2
    assert run.guards_intact()


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("rule", ["gut", "gradient_tracking", "gutm"])
def test_topologies(rule, name):
    # D² and tracking amplify without a symmetric W, so a directed one gets few steps
    run = Lockstep(rule, TOPOLOGIES[name], (1, 65, 200), hyperparameters=STABLE.get(rule, {})).run(8)
    assert run.excess_error() <= 2
    assert run.guards_intact()


@pytest.mark.parametrize("columns", [(1,), (2,), (63,), (4097,), (1,) * 40, (5, 4097, 1, 2048)], ids=str)
@pytest.mark.parametrize("num_agents", [1, 2, 3, 16, 257])
def test_sizes(num_agents, columns):
    run = Lockstep("gut", topology.ring(num_agents), columns, hyperparameters={"mu": 0.9}).run(4)
    assert run.excess_error() <= 2
    assert run.guards_intact()


def test_many_agents_on_a_random_graph():
    run = Lockstep("gut", topology.random_regular(1024, 4, seed=0).lazy(0.5), (3, 70)).run(3)
    assert run.excess_error() <= 2


def test_learning_rate_zero_mixes_and_keeps_the_state():
    run = Lockstep("gut", topology.ring(16), (100,)).run(3)
    state = [flat.clone() for flat in run.state]
    W, z = run.topology.matrix().float(), run.rows()[0].clone()
    run.settings["lr"] = 0.0
    run.op_step()
    assert all(torch.equal(now, before) for now, before in zip(run.state, state, strict=True))
    torch.testing.assert_close(run.rows()[0], W @ z)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_instruction_tiers_agree_bit_for_bit(rule, dtype, tier):
    def result(name):
        tier(name)
        run = Lockstep(rule, topology.torus(3, 3).lazy(0.5), ODD_COLUMNS, dtype)
        for step in range(5):
            run.op_step(step)
        return run.rows()

    first, *others = [result(name) for name in _core.available_tiers()]
    assert "baseline" in _core.available_tiers()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_thread_counts_agree_bit_for_bit(rule, threads):
    def result(count):
        threads(count)
        run = Lockstep(rule, topology.ring(16), (1, 9000, 70, 4097))
        for step in range(4):
            run.op_step(step)
        return run.rows()

    first = result(1)
    for count in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, result(count), strict=True))


def test_threads_share_the_callers_floating_point_modes(threads):
    """Denormals are flushed, or not, whichever thread computes them."""

    def result(count):
        threads(count)
        run = Lockstep("gut", topology.ring(16), (20_000,), hyperparameters={"mu": 0.5})
        run.flat.mul_(1e-38)
        run.optimum = torch.zeros_like(run.optimum)
        run.op_step()
        return run.rows()

    assert torch.set_flush_denormal(True)
    try:
        flushed = result(1), result(4)
    finally:
        torch.set_flush_denormal(False)
    kept = result(1), result(4)
    assert torch.equal(flushed[0][0], flushed[1][0])
    assert torch.equal(kept[0][0], kept[1][0])
    assert not torch.equal(flushed[0][0], kept[0][0])


def test_steps_in_several_python_threads_at_once(threads):
    threads(2)

    def runs():
        return [Lockstep(rule, topology.ring(16), (9000, 3)) for rule in ("gut", "gutm", "dsgd", "gradient_tracking")]

    def five_steps(run):
        for step in range(5):
            run.op_step(step)

    one_by_one, together = runs(), runs()
    for run in one_by_one:
        five_steps(run)
    workers = [threading.Thread(target=five_steps, args=(run,)) for run in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(one_by_one, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.rows(), b.rows(), strict=True))


def test_the_gil_is_released(threads):
    threads(1)
    run = Lockstep("gut", topology.ring(16), (500_000,))
    gradient = run.gradient(run.rows()[0])
    coefficients = torch.tensor(run.rule.coefficients(0.1).flat(), dtype=torch.float64)
    arguments = (run.parameters, run.state, [gradient], coefficients, 1, *run.topology.csr(), None, "cpu")
    running, done, seen = threading.Event(), threading.Event(), 0

    def steps():
        running.set()
        for _ in range(10):
            ops.gossip_step_(*arguments)
        done.set()

    worker = threading.Thread(target=steps)
    worker.start()
    running.wait()
    while not done.is_set():
        seen += 1
    worker.join()
    assert seen > 10_000  # a kernel that kept the GIL would let this loop turn only between steps


FORK = """
import os, signal, torch
from lockstep import Lockstep
from gut_fast import _core, topology
from gut_fast.kernels import ops

torch.set_num_threads(4)
run = Lockstep("gut", topology.ring(16), (9000,))
coefficients = torch.tensor(run.rule.coefficients(0.1).flat(), dtype=torch.float64)
arguments = (run.parameters, run.state, [run.flat.view(16, -1).clone()], coefficients, 1, *run.topology.csr())
ops.gossip_step_(*arguments)  # the pool's threads exist now, and will not in the child
child = os.fork()
signal.alarm(30)
ops.gossip_step_(*arguments)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both stepped")
"""


def test_a_forked_child_can_step():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=100)
    assert (result.stdout.strip(), result.returncode) == ("both stepped", 0), result.stderr


def test_nan_reaches_the_neighbours_only():
    run = Lockstep("gut", topology.ring(16), (70,))
    run.optimum[5, 66] = float("nan")
    run.op_step()
    bad = run.rows()[0].isnan().nonzero().tolist()
    assert bad == [[4, 66], [5, 66], [6, 66]]


def test_a_gradient_scale_of_zero_drops_even_nan():
    scale = torch.ones(16, dtype=torch.float64)
    scale[5] = 0
    run = Lockstep("gutm", topology.ring(16), (70,), grad_scale=scale)
    expected = Lockstep("gutm", topology.ring(16), (70,))
    expected.optimum[5] = expected.rows()[0][5].double()  # a gradient of zero
    run.optimum[5] = float("nan")
    run.op_step()
    expected.op_step()
    for mine, other in zip(run.rows(), expected.rows(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradient_scale(backend):
    scale = seeded(16, seed=4).abs()
    run = Lockstep("gut", topology.ring(16), (3, 200), backend=backend, grad_scale=scale).run(10)
    assert run.excess_error() <= 2


def a_rule_of_ones_own(num_states, num_messages):
    """Every coefficient is there: nothing of the shape is special."""
    outputs, inputs = num_states + 1, num_states + 2

    def formula(lr, leak=0.1):
        def filled(rows, columns, seed):
            return (leak * seeded(rows, columns, seed=seed)).tolist()

        A, B = filled(num_messages, inputs, 1), filled(outputs, inputs, 2)
        A[0][0], A[0][-1] = 1.0, -lr
        C, E = filled(outputs, num_messages, 3), filled(outputs, num_messages, 4)
        C[0][0] = E[0][0] = 0.9
        return Coefficients(A, B, C, E)

    return UpdateRule("own", tuple(f"s{k}" for k in range(num_states)), formula)


@pytest.mark.parametrize("num_messages", [1, 2])
@pytest.mark.parametrize("num_states", [0, 1, 2, 3])
def test_rules_of_ones_own_run_compiled(num_states, num_messages):
    rule = a_rule_of_ones_own(num_states, num_messages)
    for graph in (topology.ring(16), topology.star(5), topology.ring(1)):
        assert Lockstep(rule, graph, (1, 65, 300)).run(5).excess_error() <= 2


def test_rules_beyond_the_compiled_shapes_run_in_torch():
    rule = a_rule_of_ones_own(5, 3)
    with pytest.raises(RuntimeError, match="'cpu' is not available: it is compiled for up to 3 states and 2 messages"):
        Lockstep(rule, topology.ring(4), (5,)).op_step()
    assert Lockstep(rule, topology.ring(4), (5,), backend="auto").run(5).excess_error() <= 2


def test_every_rule_of_the_table_has_its_own_instance():
    """The generated patterns cover the table: see csrc/cpu/patterns.py."""
    for rule in RULES.values():
        assert len(rule.states) <= _core.MAX_STATES
        assert rule.num_messages <= _core.MAX_MESSAGES


def test_tier_names():
    with pytest.raises(ValueError, match=r"instruction tier 'x87' is not available here; there are: .*baseline"):
        _core.set_tier("x87")
    assert _core.tier() in _core.available_tiers()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_plain_gossip_does_not_read_gradients(rule):
    z = torch.nn.Parameter(seeded(4, 70, seed=5, dtype=torch.float32))
    z.grad = torch.full_like(z, math.nan)
    optimizer = gf.GossipOptimizer([z], rule, lr=0.0, topology=gf.topology.ring(4), backend="cpu")
    optimizer.step()
    assert bool(z.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in optimizer.state[z].values())


def test_as_many_edges_as_the_complete_graph_are_not_yet_that_graph():
    n = 6
    row_start = torch.arange(n + 1) * (n - 1)
    neighbor = torch.cat([torch.ones(n - 1, dtype=torch.int64), gf.topology.complete(n).csr().neighbor[n - 1 :]])
    weight = torch.full((n * (n - 1),), 0.1, dtype=torch.float64)
    results = []
    for backend in ("cpu", "torch"):
        z, r, g = (seeded(n, 33, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
        coefficients = torch.tensor(RULES["gut"].coefficients(0.1, mu=0.3).flat(), dtype=torch.float64)
        ops.gossip_step_([z], [r.flatten()], [g], coefficients, 1, row_start, neighbor, weight, None, backend)
        results.append(z)
    assert torch.allclose(*results, atol=1e-5)
