"""The CUDA kernels alone: threads, shared memory, streams, captures, refusals; their steps are in test_conformance.

The emulation compiles csrc/cuda as plain C++ and runs each block's threads in a random order between two barriers, so
that a fault in a kernel, races included, shows without a GPU: see tests/emulation.
"""

import os
import subprocess
import sys

import pytest
import torch

import gut_fast as gf
from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import cuda
from gut_fast.rules import get_rule
from gut_fast.verify.lockstep import PRECISIONS, OpRun, Precision, Problem, compare, same_bits, seeded
from steps import a_step, copied, outputs, rows_of, stepped, unequal_complete

FLOAT32 = PRECISIONS["float32"]
GRAPHS = {
    "ring": topology.ring(16),
    "star": topology.star(7),
    "complete": topology.complete(9),
    "random": topology.erdos_renyi(9, 0.4, seed=1),
    "dense": topology.erdos_renyi(45, 0.7, seed=0).lazy(0.5),
    "large complete": topology.complete(37),
    "large unequal complete": unequal_complete(30),
}
STABLE = {"gut": {"mu": 0.3}, "gutm": {"mu": 0.25}}  # on every graph of this file


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a test's tensors; on the CPU the kernels are emulated."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("emulation")
    return "cpu"


def problem(rule, graph, columns, hyperparameters=None):
    return Problem(get_rule(rule), graph, columns, hyperparameters or {})


def ran(num_steps, *arguments, precision=FLOAT32, device="cpu"):
    """Parameters and state after some steps of a problem."""
    return OpRun(problem(*arguments), precision, "cuda", device).run(num_steps).rows()


@pytest.mark.parametrize(
    ("graph", "columns"),
    [
        (topology.random_regular(600, 4, seed=0).lazy(0.5), (3, 20)),
        (GRAPHS["large unequal complete"], (1, 65)),
        (topology.complete(150), (3, 20)),
        (topology.ring(3), (1, 6) * 64),  # as many segments as one launch takes
        (topology.ring(3), (1, 6) * 65),  # in two launches
        (topology.ring(3), (1, 6) * 150),  # in three
        pytest.param(topology.random_regular(4096, 4, seed=0).lazy(0.5), (3, 20), marks=pytest.mark.slow),
        pytest.param(topology.complete(600), (3, 20), marks=pytest.mark.slow),
        pytest.param(topology.ring(257), (5, 4097, 1, 2048), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None) or str(len(value)),
)
def test_large_problems(graph, columns, device):
    given = problem("gutm", graph, columns, STABLE["gutm"])
    run = OpRun(given, FLOAT32, "cuda", device).run(1)
    assert run.guards_intact()
    assert compare(given, FLOAT32, "cuda", num_steps=2, device=device) <= 2


@pytest.mark.parametrize("columns", [(5, 1, 130), (1, 0, 6) * 50], ids=["3 tensors", "150 tensors"])
@pytest.mark.parametrize("graph", [topology.complete(7), topology.ring(70)], ids=lambda graph: graph.name)
def test_both_halves_in_one_rank_make_the_whole_step(graph, columns, device):
    step = a_step("gut", graph, columns, device=device)
    halves, rows = copied(step), [torch.empty(sum(columns), device=device) for _ in range(graph.num_agents)]
    ops.message(halves, rows, "cuda")
    ops.combine_(halves, rows, "cuda")
    assert same_bits(outputs(halves), outputs(stepped(step, "cuda")))


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_a_neighbour_out_of_range_makes_its_agent_nan(bad, device):
    step = a_step("gut", device=device)
    expected = rows_of(stepped(step, "cuda"))
    step.neighbor[5] = bad  # of agent 2
    cuda.gossip_step(step)  # without the checks of the op, which on a device cannot look at indices
    for row, other in zip(rows_of(step), expected, strict=True):
        assert bool(row[2].isnan().all())
        assert torch.equal(row[[0, 1, 3, 4, 5]], other[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("starts", [[0, 90, -5, 2**40, 8, 9, 7], [5, 4, 3, 2, 1, 0, -1]], ids=str)
def test_rows_of_w_out_of_range_read_nothing_beyond_it(starts, device):
    step = a_step("gut", device=device)
    step.row_start.copy_(torch.tensor(starts))
    cuda.gossip_step(step)
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("graph", ["ring", "complete", "dense", "star"])
@pytest.mark.parametrize("rule", ["gradient_tracking", pytest.param("gut", marks=pytest.mark.slow)])
def test_neither_threads_nor_blocks_change_a_bit(rule, graph, emulation):
    """A race would: the emulation runs threads in another order each time."""
    arguments = (3, rule, GRAPHS[graph], (3, 300, 1100), STABLE.get(rule))
    expected = ran(*arguments)
    for seed in (1, 2, 3):
        emulation(multiprocessors=2 * seed - 1, seed=seed)
        assert same_bits(ran(*arguments), expected)


@pytest.mark.parametrize("graph", ["ring", "star", "dense", "random"])
def test_little_shared_memory_changes_no_bit(graph, emulation):
    """W read where it lies; narrower tiles; then messages of all agents in device memory, in two launches."""
    arguments = (2, "gutm", GRAPHS[graph], (3, 300), STABLE["gutm"])
    expected = ran(*arguments)
    for shared_bytes in (8192, 3000, 2400):
        emulation(shared_bytes=shared_bytes)
        assert same_bits(ran(*arguments), expected)
    assert cuda._cuda.fits(0, cuda._cuda.DType.float32, 1, 16) != cuda._cuda.fits(0, cuda._cuda.DType.float32, 1, 40)


def test_more_agents_than_shared_memory_holds(emulation):
    emulation(shared_bytes=6000)
    for dtype in (torch.float32, torch.float64):
        precision = Precision(dtype, dtype)
        given = problem("gradient_tracking", topology.random_regular(300, 4, seed=0).lazy(0.5), (3, 70))
        assert compare(given, precision, "cuda", num_steps=3) <= 2


def test_a_small_step_leaves_a_large_one_its_shared_memory(emulation):
    """Two threads of the host may start both at once."""
    for num_agents in (4096, 2048):
        given = problem("dsgd", topology.ring(num_agents), (8,))
        assert compare(given, FLOAT32, "cuda", num_steps=1) <= 2


def test_coefficients_on_the_device_change_no_bit(emulation, monkeypatch):
    arguments = (3, "qg_gutm", topology.ring(16), (70, 5))
    expected = ran(*arguments)
    monkeypatch.setattr(cuda, "_is_on_device", lambda tensor: True)
    assert same_bits(ran(*arguments), expected)


def test_what_cuda_refuses_is_an_error(emulation):
    step = a_step("gut")
    arguments = cuda._compiled_step(step)
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
    """A GPU's architecture or driver may be older than the kernels; "auto" then goes on to the next backend."""
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
        assert same_bits(rows, ran(*arguments, precision=precision))


@pytest.mark.gpu
def test_runs_are_the_same_bit_for_bit():
    arguments = (5, "gutm", topology.torus(8, 8), (30_011, 64), STABLE["gutm"])
    expected = ran(*arguments, device="cuda")
    for _ in range(5):
        assert same_bits(ran(*arguments, device="cuda"), expected)


@pytest.mark.gpu
def test_steps_run_on_the_callers_stream():
    """The gradient comes late on a stream of its own; a step on another stream would not wait for it."""
    step = a_step("gut", device="cuda")
    expected = outputs(stepped(step, "cuda"))
    late = [torch.zeros_like(gradient) for gradient in step.gradients]
    waiting = step._replace(gradients=late)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for empty, gradient in zip(late, step.gradients, strict=True):
            empty.copy_(gradient)
        rows = outputs(stepped(waiting, "cuda"))
    stream.synchronize()
    assert same_bits(rows, expected)


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
    assert same_bits(ran(*arguments, device="cuda:1"), expected)
    assert torch.cuda.current_device() == 0
