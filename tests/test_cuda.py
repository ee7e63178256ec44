"""The CUDA kernels, emulated on the CPU and, where there is one, on a GPU: the same numbers, bit for bit.

The emulation compiles csrc/cuda as plain C++ and runs each block's threads in a random order between two barriers, so
what is wrong in a kernel, races included, shows without a GPU: see tests/emulation.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

import gut_fast as gf
from emulation.build import build
from gut_fast import topology
from gut_fast.kernels import backends, ops
from gut_fast.kernels.backends import GossipStep, cuda
from gut_fast.rules import RULES, get_rule
from gut_fast.verify.lockstep import PRECISIONS, OpRun, Precision, Problem, compare, seeded
from test_kernel import ODD_COLUMNS, SETTINGS, STABLE, TOPOLOGIES, a_rule_of_ones_own
from test_split import assert_same, fused, split, whole_step

FLOAT32 = Precision(torch.float32, torch.float32)
HALF_WIDTH = {name: precision for name, precision in PRECISIONS.items() if "16" in name}
H100 = (132, 232448)  # multiprocessors, bytes of shared memory that one block can have


class Emulation:
    """The emulated device; calling it changes what it has and the order in which its threads run."""

    def __init__(self, library):
        self.library = library
        self()

    def __call__(self, multiprocessors=2, shared_bytes=H100[1], seed=0):
        self.library.set_emulation(multiprocessors, shared_bytes, seed)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulation(built, monkeypatch):
    """Makes the backend "cuda" compute CPU tensors on the emulated device."""
    module, library = built
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "why_missing", None)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setitem(backends.BACKENDS, "cuda", cuda)
    ops.select_backend.cache_clear()
    yield Emulation(library)
    ops.select_backend.cache_clear()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the tensors of a test lie."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("emulation")
    return "cpu"


def problem(rule, graph, columns, hyperparameters=None, **others):
    return Problem(get_rule(rule), graph, columns, hyperparameters or {}, **others)


def ran(num_steps, *arguments, precision=FLOAT32, device="cpu", **others):
    """z and state after some steps of a problem."""
    return OpRun(problem(*arguments, **others), precision, "cuda", device).run(num_steps).rows()


def same(rows, others):
    return all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=str)
def test_rules(rule, hyperparameters, dtype, device):
    given = problem(rule, topology.ring(16), ODD_COLUMNS, hyperparameters)
    run = OpRun(given, Precision(dtype, dtype), "cuda", device).run(1)
    assert run.guards_intact()
    assert compare(given, Precision(dtype, dtype), "cuda", num_steps=20, device=device) <= 2


@pytest.mark.parametrize("precision", HALF_WIDTH)
@pytest.mark.parametrize("rule", ["dsgd", "gut", "gutm", "gradient_tracking"])
def test_half_width_storage(rule, precision, device):
    given = problem(rule, topology.ring(5), (1, 2, 63, 70, 300), STABLE.get(rule))
    run = OpRun(given, PRECISIONS[precision], "cuda", device).run(1)
    assert run.guards_intact()
    assert compare(given, PRECISIONS[precision], "cuda", num_steps=8, device=device) <= 2


def unequal_complete(n):
    """Every agent mixes with every other one, no two edges with the same weight."""
    weights = seeded(n, n, seed=3).abs().clamp(max=1) + 0.1
    W = (weights + weights.T) / (4 * n)
    W.fill_diagonal_(0)
    return topology.from_matrix((W + torch.diag(1 - W.sum(1))).tolist())


GRAPHS = {
    **TOPOLOGIES,
    "large complete": topology.complete(37),
    "unequal complete": unequal_complete(6),
    "large unequal complete": unequal_complete(30),
    "dense": topology.erdos_renyi(45, 0.7, seed=0).lazy(0.5),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("rule", ["gut", "gradient_tracking", "gutm"])
def test_topologies(rule, graph, device):
    given = problem(rule, GRAPHS[graph], (1, 65, 200), STABLE.get(rule))
    assert compare(given, FLOAT32, "cuda", num_steps=8, device=device) <= 2
    assert compare(given, PRECISIONS["float64"], "cuda", num_steps=2, device=device) <= 2


@pytest.mark.parametrize("columns", [(1,), (2,), (63,), (4097,), (1,) * 40, (5, 4097, 1, 2048)], ids=str)
@pytest.mark.parametrize("num_agents", [1, 2, 3, 16, 257])
def test_sizes(num_agents, columns, device):
    given = problem("gut", topology.ring(num_agents), columns, {"mu": 0.9})
    assert compare(given, FLOAT32, "cuda", num_steps=2, device=device) <= 2


@pytest.mark.parametrize("num_agents", [600, 1024, 4096])
def test_thousands_of_agents(num_agents, device):
    given = problem("gut", topology.random_regular(num_agents, 4, seed=0).lazy(0.5), (3, 20), STABLE["gut"])
    assert compare(given, FLOAT32, "cuda", num_steps=2, device=device) <= 2


@pytest.mark.parametrize("num_segments", [129, 1000])
def test_hundreds_of_segments(num_segments, device):
    given = problem("gutm", topology.ring(3), (1, 6) * (num_segments // 2) + (3,), STABLE["gutm"])
    run = OpRun(given, FLOAT32, "cuda", device).run(1)
    assert run.guards_intact()
    assert compare(given, FLOAT32, "cuda", num_steps=2, device=device) <= 2


@pytest.mark.parametrize("num_messages", [1, 2])
@pytest.mark.parametrize("num_states", [0, 1, 2, 3])
def test_rules_of_ones_own(num_states, num_messages, device):
    rule = a_rule_of_ones_own(num_states, num_messages)
    for graph in (topology.ring(16), topology.star(5), topology.complete(6), topology.ring(1)):
        assert compare(problem(rule, graph, (1, 65, 300)), FLOAT32, "cuda", num_steps=4, device=device) <= 2


def test_gradient_scale(device):
    given = problem("gut", topology.ring(16), (3, 200), grad_scale=seeded(16, seed=4).abs())
    assert compare(given, FLOAT32, "cuda", num_steps=8, device=device) <= 2


def step_on(device, rule, graph, dtype=torch.float32, state_dtype=None):
    """The step of `test_split`; its coefficients stay on the CPU."""
    step = whole_step(rule, graph, dtype, state_dtype)
    moved = [[t.to(device) for t in each] if isinstance(each, list) else each for each in step]
    moved = [each.to(device) if isinstance(each, torch.Tensor) else each for each in moved]
    return GossipStep(*moved)._replace(coefficients=step.coefficients)


def outputs(step):
    """z and state after the step."""
    step = fused(step, "cuda")
    return [*step.parameters, *step.state]


SPLIT_GRAPHS = {
    "ring": topology.ring(6),
    "star": topology.star(7),
    "random": topology.erdos_renyi(9, 0.4, seed=1),
    "many rows": topology.ring(70),
    "dense": topology.erdos_renyi(45, 0.7, seed=0).lazy(0.5),
}


@pytest.mark.parametrize("graph", SPLIT_GRAPHS)
@pytest.mark.parametrize("rule", ["dsgd", "gut", "qg_gutm", "gradient_tracking"])
def test_ranks_together_make_the_fused_step(rule, graph, device):
    step, n = step_on(device, rule, SPLIT_GRAPHS[graph]), SPLIT_GRAPHS[graph].num_agents
    for ranks in ([list(range(n))], [[0, 2], [1], list(range(3, n))]):
        assert_same(fused(step, "cuda"), split(step, ranks, "cuda"), ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_messages_in_the_dtype_of_arithmetic_lose_nothing(dtype, device):
    step = step_on(device, "gutm", topology.ring(6), dtype, torch.float32)
    ranks = [[0, 1, 2], [3], [4, 5]]
    assert_same(fused(step, "cuda"), split(step, ranks, "cuda", torch.float32), ranks)


def test_a_complete_graph_in_one_rank_makes_the_fused_step(device):
    step = step_on(device, "gut", topology.complete(7))
    ranks = [list(range(7))]
    assert_same(fused(step, "cuda"), split(step, ranks, "cuda"), ranks)


@pytest.mark.parametrize("n", [7, 37])
def test_what_cancels_in_the_sum_of_a_complete_graph_loses_no_digit(n, device):
    """All agents are mixed with one sum: its error would move their mean."""
    large, small = 1e4 * seeded(n // 2, 130, seed=1), seeded(n // 2, 130, seed=2)
    z = torch.cat([torch.zeros(1, 130), torch.stack([large, small - large], 1).flatten(0, 1)]).float().to(device)
    expected = z.double().mean(0)
    coefficients = torch.tensor(get_rule("dsgd").coefficients(0.0).flat(), dtype=torch.float64)
    ops.gossip_step_([z], [], [None], coefficients, 1, *topology.complete(n).csr(0, device), None, "cuda")
    assert (z[0].double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("graph", ["star", "complete"])
def test_nan_reaches_the_neighbours_only(graph, device):
    W = {"star": topology.star(20), "complete": topology.complete(20)}[graph]
    step = step_on(device, "gut", W)
    step.gradients[2][5, 66] = math.nan
    z = outputs(step)[2]
    reached = {5, *W.neighbors(5)}
    assert {tuple(place) for place in z.isnan().nonzero().tolist()} == {(agent, 66) for agent in reached}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_plain_gossip_does_not_read_gradients(rule, device):
    z = torch.nn.Parameter(seeded(4, 70, seed=5, dtype=torch.float32).to(device))
    z.grad = torch.full_like(z, math.nan)
    optimizer = gf.GossipOptimizer([z], rule, lr=0.0, topology=topology.ring(4), backend="cuda")
    optimizer.step()
    assert bool(z.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in optimizer.state[z].values())


def test_a_gradient_scale_of_zero_drops_even_nan(device):
    step = step_on(device, "gutm", topology.ring(6))  # agent 0 has scale zero
    expected = outputs(
        step._replace(gradients=[g * (torch.arange(6, device=g.device) > 0)[:, None] for g in step.gradients])
    )
    for gradient in step.gradients:
        gradient[0] = math.nan
    assert same(outputs(step), expected)


def test_no_gradient_is_a_gradient_of_zero(device):
    step = step_on(device, "gutm", topology.ring(6))
    expected = outputs(step._replace(gradients=[torch.zeros_like(g) for g in step.gradients]))
    assert same(outputs(step._replace(gradients=[None, *(g.new_empty(0) for g in step.gradients[1:])])), expected)


def test_gradients_may_have_any_strides(device):
    step = step_on(device, "gut", topology.ring(6))
    strided = [g.t().contiguous().t() for g in step.gradients[1:]]
    negated = torch._neg_view(-step.gradients[0])
    assert same(outputs(step._replace(gradients=[negated, *strided])), outputs(step))


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_a_neighbour_out_of_range_makes_its_agent_nan(bad, device):
    step = step_on(device, "gut", topology.ring(6))
    expected = outputs(step)
    step.neighbor[5] = bad  # of agent 2
    direct = fused_unchecked(step)
    for row, other in zip([*direct.parameters, *direct.state], expected, strict=True):
        row, other = row.view(6, -1) if row.dim() > 1 else row, other.view(6, -1) if other.dim() > 1 else other
        if row.dim() > 1:
            assert bool(row[2].isnan().all())
            assert torch.equal(row[[0, 1, 3, 4, 5]], other[[0, 1, 3, 4, 5]])


def fused_unchecked(step):
    """Without the checks of `gut_fast.kernels.ops`, which on a device cannot look at indices."""
    step = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    cuda.gossip_step(step)
    return step


@pytest.mark.parametrize("starts", [[0, 90, -5, 2**40, 8, 9, 7], [5, 4, 3, 2, 1, 0, -1]], ids=str)
def test_rows_of_w_out_of_range_read_nothing_beyond_it(starts, device):
    step = step_on(device, "gut", topology.ring(6))
    step.row_start.copy_(torch.tensor(starts))
    fused_unchecked(step)
    if device == "cuda":
        torch.cuda.synchronize()


def test_as_many_edges_as_the_complete_graph_are_not_yet_that_graph(device):
    n = 6
    step = step_on(device, "gut", topology.complete(n))
    step.neighbor[: n - 1] = 1
    expected = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    backends.BACKENDS["torch"].gossip_step(expected)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(outputs(step), outputs_of(expected), strict=True))


def outputs_of(step):
    return [*step.parameters, *step.state]


@pytest.mark.parametrize("graph", ["ring", "complete", "dense", "star"])
@pytest.mark.parametrize("rule", ["gut", "gradient_tracking"])
def test_neither_threads_nor_blocks_change_a_bit(rule, graph, emulation):
    """A race would: the emulation runs threads in another order each time."""
    arguments = (3, rule, GRAPHS[graph], (3, 300, 1100), STABLE.get(rule))
    expected = ran(*arguments)
    for seed in (1, 2, 3):
        emulation(multiprocessors=2 * seed - 1, seed=seed)
        assert same(ran(*arguments), expected)


@pytest.mark.parametrize("graph", ["ring", "star", "dense", "random"])
def test_little_shared_memory_changes_no_bit(graph, emulation):
    """W read where it lies; narrower tiles; then messages of all agents in device memory, in two launches."""
    arguments = (2, "gutm", {**GRAPHS, **SPLIT_GRAPHS}[graph], (3, 300), STABLE["gutm"])
    expected = ran(*arguments)
    for shared_bytes in (8192, 3000, 2400):
        emulation(shared_bytes=shared_bytes)
        assert same(ran(*arguments), expected)
    assert cuda._cuda.fits(0, cuda._cuda.DType.float32, 1, 16) != cuda._cuda.fits(0, cuda._cuda.DType.float32, 1, 40)


def test_more_agents_than_shared_memory_holds(emulation):
    emulation(shared_bytes=6000)
    for dtype in (torch.float32, torch.float64):
        precision = Precision(dtype, dtype)
        given = problem("gradient_tracking", topology.random_regular(300, 4, seed=0).lazy(0.5), (3, 70))
        assert compare(given, precision, "cuda", num_steps=3) <= 2


@pytest.mark.parametrize("num_agents", [150, 200, 600])
def test_large_complete_graphs(num_agents, device):
    given = problem("gut", topology.complete(num_agents), (3, 20), STABLE["gut"])
    assert compare(given, FLOAT32, "cuda", num_steps=1, device=device) <= 2


def test_a_small_step_leaves_a_large_one_its_shared_memory(emulation):
    """They may be started by two threads of the host at once."""
    for num_agents in (4096, 2048):
        given = problem("dsgd", topology.ring(num_agents), (8,))
        assert compare(given, FLOAT32, "cuda", num_steps=1) <= 2


def test_coefficients_on_the_device_change_no_bit(emulation, monkeypatch):
    arguments = (3, "qg_gutm", topology.ring(16), (70, 5))
    expected = ran(*arguments)
    monkeypatch.setattr(cuda, "_is_on_device", lambda tensor: True)
    assert same(ran(*arguments), expected)


def test_what_cuda_refuses_is_an_error(emulation):
    step = step_on("cpu", "gut", topology.ring(6))
    arguments = cuda._compiled_step(step, step.gradients)
    emulation(multiprocessors=0)
    with pytest.raises(RuntimeError, match=r"CUDA refused to start a step in 0 blocks .*invalid configuration"):
        cuda._cuda.gossip_step(arguments)


UNSERVED = {
    "device": (("meta", torch.float32, 1, 1), "it computes on CUDA tensors, these are on 'meta'"),
    "dtype": (("cpu", torch.float64, 1, 1, torch.float32), "not torch.float64 with torch.float32"),
    "states": (("cpu", torch.float32, 4, 1), "up to 3 states and 2 messages, the rule has 4 and 1"),
    "messages": (("cpu", torch.float32, 1, 3), "the rule has 1 and 3"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_it_cannot_serve(case, emulation):
    arguments, reason = UNSERVED[case]
    assert reason in cuda.unavailable(*arguments)
    assert cuda.unavailable("cpu", torch.float16, 3, 2, torch.float32) is None


def test_a_device_that_cannot_run_the_kernels_is_not_served(emulation, monkeypatch):
    """Of an architecture or with a driver older than they were compiled for; "auto" goes on to the next backend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert cuda.unavailable("cpu", torch.float32, 1, 1) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda.unavailable("cpu", torch.float32, 1, 1) == "CUDA refused device 1: invalid device ordinal"


WITHOUT_A_DRIVER = """
from gut_fast import _cuda
print(_cuda.refusal(0))
try:
    _cuda.fits(0, _cuda.DType.float32, 1, 16)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(cuda.why_missing is not None, reason="gut_fast._cuda was not built here")
def test_the_module_imports_without_a_device():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", WITHOUT_A_DRIVER], env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("CUDA refused to tell the current device: "), result
    assert "CUDA refused to describe device 0: " in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["ring", "complete", "dense", "star", "large complete"])
@pytest.mark.parametrize("rule", ["gut", "qg_gutm", "gradient_tracking"])
def test_the_device_computes_the_bits_of_the_emulation(rule, graph, request):
    arguments = (5, rule, GRAPHS[graph], (3, 300, 1100), STABLE.get(rule))
    on_device = [ran(*arguments, precision=precision, device="cuda") for precision in PRECISIONS.values()]
    request.getfixturevalue("emulation")
    for precision, rows in zip(PRECISIONS.values(), on_device, strict=True):
        assert same(rows, ran(*arguments, precision=precision))


@pytest.mark.gpu
def test_runs_are_the_same_bit_for_bit():
    arguments = (5, "gutm", topology.torus(8, 8), (30_011, 64), STABLE["gutm"])
    expected = ran(*arguments, device="cuda")
    for _ in range(5):
        assert same(ran(*arguments, device="cuda"), expected)


@pytest.mark.gpu
def test_steps_run_on_the_callers_stream():
    """The gradient comes late on a stream of its own; a step on another stream would not wait for it."""
    step = step_on("cuda", "gut", topology.ring(6))
    expected = outputs(step)
    late = [torch.zeros_like(gradient) for gradient in step.gradients]
    waiting = step._replace(gradients=late)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for empty, gradient in zip(late, step.gradients, strict=True):
            empty.copy_(gradient)
        rows = outputs(waiting)
    stream.synchronize()
    assert same(rows, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_agents", [16, 20_000])
def test_captured_steps_follow_their_coefficients(num_agents):
    graph = topology.ring(num_agents)
    z = torch.nn.Parameter(seeded(num_agents, 70, seed=1, dtype=torch.float32).cuda())
    twin = torch.nn.Parameter(z.detach().clone())
    z.grad, twin.grad = (torch.ones_like(z) for _ in range(2))
    options = {"topology": graph, "lr": 0.1, "mu": 0.5, "backend": "cuda"}
    optimizer, eager = gf.GUT([z], capturable=True, **options), gf.GUT([twin], **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        optimizer.step()
    eager.step()
    for lr in (0.1, 0.02):
        for group in (*optimizer.param_groups, *eager.param_groups):
            group["lr"] = lr
        optimizer.update_coefficients()
        recorded.replay()
        eager.step()
    assert torch.equal(z, twin)


A_CAPTURE_FIRST = """
import torch
import gut_fast as gf
z = torch.nn.Parameter(torch.ones(4, 3, device="cuda"))
z.grad = torch.ones_like(z)
optimizer = gf.GUT([z], 0.5, mu=0.5, topology=gf.topology.ring(4), backend="cuda", capturable=True)
optimizer.update_coefficients()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
graph.replay()
print(z.flatten().tolist() == [0.5] * 12)
"""


@pytest.mark.gpu
def test_the_first_step_of_a_process_can_be_captured():
    """Nothing is left to be loaded or asked for at the first launch that a capture forbids."""
    result = subprocess.run([sys.executable, "-c", A_CAPTURE_FIRST], capture_output=True, text=True)
    assert result.stdout == "True\n", result


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("shape", [(2, 2**30 + 5), (1, 2**31 + 9)], ids=str)
def test_more_numbers_than_32_bits_count(shape, backend):
    z = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16, device="cuda"))
    optimizer = gf.DSGD([z], 0.5, weight_decay=1.0, topology=topology.ring(len(z)), backend=backend)
    optimizer.step()
    assert bool((z == 0.5).all())
    with torch.no_grad():
        z[0] = 0
    optimizer.step()
    assert bool((z == 0.25 * (len(z) - 1) / len(z)).all())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used_and_the_current_one_kept():
    arguments = (3, "gut", topology.ring(6), (70, 3), STABLE["gut"])
    expected = ran(*arguments, device="cuda:0")
    assert same(ran(*arguments, device="cuda:1"), expected)
    assert torch.cuda.current_device() == 0
