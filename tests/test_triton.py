"""The Triton kernel: on a GPU, or without one in Triton's interpreter, and as machine code that is only looked at."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import BACKENDS, GossipStep
from gut_fast.kernels.backends.triton import Chip, Launch, launch
from gut_fast.rules import RULES, Coefficients, UpdateRule
from gut_fast.verify.lockstep import PRECISIONS, OpRun, Problem, compare, excess_error, seeded

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", [*(["cpu"] if INTERPRETED else []), GPU])
# What NumPy says of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

STABLE = {"gut": {"mu": 0.3}, "gutm": {"mu": 0.25}}
SETTINGS = [(name, STABLE.get(name, {})) for name in RULES]
SETTINGS += [(name, {"nesterov": True}) for name in ("dsgdm", "qg_dsgdm")]


def asymmetric():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return topology.from_matrix([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.2, 0.0, 0.8]])


TOPOLOGIES = {
    "one agent": topology.ring(1),
    "two agents": topology.ring(2),
    "torus": topology.torus(4, 4).lazy(0.5),
    "star": topology.star(7),
    "complete": topology.complete(9),
    "chain": topology.chain(5).lazy(0.5),
    "asymmetric": asymmetric(),
    "one-peer": topology.one_peer_exponential(8),
    "matching": topology.random_matching(5, seed=0),
    "several blocks": topology.random_regular(131, 4, seed=0).lazy(0.5),
}


def a_step(rule="gut", graph=None, columns=(3, 130), device="cpu", dtype=torch.float32, state_dtype=None, **settings):
    """Of one rule, on random numbers."""
    graph, rule = graph or topology.ring(5), RULES[rule]
    n, sizes = graph.num_agents, list(enumerate(columns))
    return GossipStep(
        [seeded(n, d, seed=k, dtype=dtype).to(device) for k, d in sizes],
        [seeded(n * sum(columns), seed=90 + k, dtype=state_dtype or dtype).to(device) for k in range(len(rule.states))],
        [seeded(n, d, seed=50 + k, dtype=dtype).to(device) for k, d in sizes],
        torch.tensor(rule.coefficients(**{"lr": 0.1, **settings}).flat(), dtype=torch.float64),
        rule.num_messages,
        *graph.csr(0, device),
        torch.linspace(0, 1, n, dtype=torch.float64, device=device),
    )


def after(step, backend="triton"):
    """Parameters and state after a step, which leaves its own as they are."""
    step = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    ops.gossip_step_(*step, backend)
    return [*step.parameters, *step.state]


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_close(some, others):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@on_each_device
@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=str)
def test_rules(rule, hyperparameters, device):
    problem = Problem(RULES[rule], topology.ring(5), (3, 130), hyperparameters)
    run = OpRun(problem, PRECISIONS["float32"], "triton", device).run(3)
    exact, plain = problem.run_reference(3), problem.run_reference(3, PRECISIONS["float32"])
    assert excess_error(run.rows(), exact, plain, problem.lr) <= 2
    assert run.guards_intact()


@on_each_device
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", ["gutm", "gradient_tracking"])
def test_precisions(rule, precision, device):
    problem = Problem(RULES[rule], topology.ring(5), (66,), STABLE.get(rule, {}))
    assert compare(problem, PRECISIONS[precision], "triton", num_steps=4, device=device) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=str)
def test_rules_in_all_precisions(rule, hyperparameters, precision):
    problem = Problem(RULES[rule], topology.ring(16), (1, 2, 63, 64, 65, 130, 1000), hyperparameters)
    assert compare(problem, PRECISIONS[precision], "triton", device="cuda") <= 2


@on_each_device
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies(name, device):
    problem = Problem(RULES["gutm"], TOPOLOGIES[name], (13,), STABLE["gutm"])
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=3, device=device) <= 2


@on_each_device
@pytest.mark.parametrize("num_agents", [1, 2, 3, 16, 128, 129, 257])
def test_sizes(num_agents, device):
    problem = Problem(RULES["gut"], topology.ring(num_agents), (1, 20, 63), {"mu": 0.9})
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=2, device=device) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("num_agents", [1, 2, 3, 16, 257, 1024, 4096])
def test_large_sizes(num_agents):
    problem = Problem(RULES["gut"], topology.ring(num_agents), (5, 4097, 1, 2048, 63), {"mu": 0.9})
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=3, device="cuda") <= 2


@on_each_device
def test_many_segments(device):
    columns = tuple(k % 5 for k in range(60 if device == "cpu" else 1003))
    problem = Problem(RULES["gut"], topology.ring(3), columns, {"mu": 0.5}, idle=(1, 7, 59))
    run = OpRun(problem, PRECISIONS["float32"], "triton", device).run(1)
    exact, plain = problem.run_reference(1), problem.run_reference(1, PRECISIONS["float32"])
    assert excess_error(run.rows(), exact, plain, problem.lr) <= 2
    assert run.guards_intact()


def own_rule(num_states, num_messages):
    """Every coefficient is there: nothing of the shape is special."""
    outputs, inputs = num_states + 1, num_states + 2

    def formula(lr, leak=0.1):
        def filled(rows, columns, seed):
            return (leak * seeded(rows, columns, seed=seed)).tolist()

        A, B = filled(num_messages, inputs, 1), filled(outputs, inputs, 2)
        A[0][0], A[0][-1] = 1.0, -lr
        return Coefficients(A, B, filled(outputs, num_messages, 3), filled(outputs, num_messages, 4))

    return UpdateRule("own", tuple(f"s{k}" for k in range(num_states)), formula)


@on_each_device
@pytest.mark.parametrize(("num_states", "num_messages"), [(0, 1), (3, 2), (5, 3)])
def test_rules_of_ones_own(num_states, num_messages, device):
    problem = Problem(own_rule(num_states, num_messages), topology.star(5), (65,))
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=3, device=device) <= 2


@on_each_device
def test_no_columns(device):
    step = a_step(columns=(0, 0), device=device)
    assert [tensor.numel() for tensor in after(step)] == [0, 0, 0]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even_and_overflow_is_infinite(dtype, device):
    numbers = torch.tensor([1, -1, 0.1, 1e-8, 6e-8, 3e38, -1e5, 65519, 65520, torch.inf, torch.nan, 0])
    ties = 1 + torch.arange(-8, 9) * torch.finfo(dtype).eps / 2
    g = torch.cat([numbers, ties, -ties]).expand(2, -1).contiguous()
    step = a_step("gradient_tracking", topology.ring(2), g.shape[1:], device, state_dtype=dtype)
    step = step._replace(gradients=[g.to(device)], grad_scale=None)
    assert_equal([after(step)[-1].cpu().view(2, -1)], [g.to(dtype)])  # this state is the gradient


@on_each_device
def test_gradients_of_any_kind(device):
    step = a_step(columns=(3, 6, 4, 5), device=device)
    a, b, c, _ = step.gradients
    mixed = [a.t().contiguous().t(), torch.cat([b, b], dim=1)[:, ::2], torch._neg_view(c), None]
    plain = [mixed[0].contiguous(), mixed[1].contiguous(), -c, torch.zeros_like(step.gradients[3])]
    assert_equal(after(step._replace(gradients=mixed)), after(step._replace(gradients=plain)))
    assert_close(after(step._replace(gradients=mixed)), after(step._replace(gradients=plain), "torch"))


@on_each_device
def test_what_is_dropped_brings_in_no_nan(device):
    step = a_step(device=device)
    for gradient in step.gradients:
        gradient[0] = torch.nan  # its scale is zero
    assert all(bool(tensor.isfinite().all()) for tensor in after(step))
    gossip = a_step(device=device, lr=0.0)
    gossip.gradients[1].fill_(torch.nan)
    assert all(bool(tensor.isfinite().all()) for tensor in after(gossip))


@on_each_device
def test_nan_reaches_the_neighbours_only(device):
    step = a_step(graph=topology.ring(6), device=device)
    step.gradients[1][3, 129] = torch.nan
    assert after(step)[1].isnan().nonzero().tolist() == [[2, 129], [3, 129], [4, 129]]


@on_each_device
def test_infinity_where_others_have_more_neighbours(device):
    step = a_step("dsgd", topology.random_matching(5, seed=0), (9,), device)
    (lonely,) = torch.nonzero(step.row_start.diff() == 0).flatten().tolist()
    step.parameters[0][lonely, 3] = torch.inf
    (z,) = after(step)
    assert z[lonely, 3] == torch.inf
    assert int(z.isfinite().sum()) == 44


@on_each_device
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_neighbour_that_is_not_there_makes_the_drift_nan(wrong, device):
    step = a_step(device=device)
    right = after(step)
    step.neighbor[4] = wrong  # agent 2's first
    for tensor, expected in zip(after(step)[:2], right[:2], strict=True):
        assert tensor.isnan().all(dim=1).tolist() == [False, False, True, False, False]
        others = [0, 1, 3, 4]
        assert torch.equal(tensor[others], expected[others])


def halves(step, row_dtype=None, backend="triton"):
    """The result of message and combine, with all agents here."""
    step = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    before = [tensor.clone() for tensor in (*step.parameters, *step.state)]
    length = step.num_messages * sum(p.shape[1] for p in step.parameters)
    first = step.parameters[0]
    rows = [first.new_full((length,), torch.nan, dtype=row_dtype) for _ in range(step.num_agents)]
    ops.message(step, rows, backend)
    assert_equal(before, [*step.parameters, *step.state])
    ops.combine_(step, rows, backend)
    return [*step.parameters, *step.state]


@on_each_device
@pytest.mark.parametrize("rule", ["gut", "gutm", "gradient_tracking"])
@pytest.mark.parametrize("graph", [topology.star(7), topology.ring(131)], ids=str)
def test_the_halves_make_the_step(rule, graph, device):
    step = a_step(rule, graph, (5, 18), device)
    assert_equal(halves(step), after(step))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_halves_with_rows_of_the_dtype_of_arithmetic(dtype, device):
    step = a_step("gradient_tracking", columns=(2, 65), device=device, dtype=dtype)
    assert_equal(halves(step, torch.float32), after(step))


@on_each_device
def test_the_drift_is_that_of_rows_as_they_were_sent(device):
    step = a_step("gut", device=device, dtype=torch.bfloat16, state_dtype=torch.float32)
    mine, others = halves(step), halves(step, backend="torch")
    torch.testing.assert_close(mine[-1], others[-1], rtol=1e-5, atol=1e-4)  # r = mu r - D / lr
    assert (mine[-1] - after(step)[-1]).abs().max() > 1e-2


@on_each_device
def test_rows_that_came_from_elsewhere(device):
    """Agents 3 and 4 of a ring of 5 here; 2 and 0 elsewhere."""
    step = a_step("gradient_tracking", device=device)
    whole = after(step)
    rows = [torch.empty(2 * 133, device=device) for _ in range(5)]
    ops.message(step, rows, "triton")
    state = [torch.cat([s[:15].view(5, 3)[3:].flatten(), s[15:].view(5, 130)[3:].flatten()]) for s in step.state]
    part = step._replace(
        parameters=[p[3:].clone() for p in step.parameters],
        state=state,
        gradients=[g[3:] for g in step.gradients],
        row_start=torch.tensor([0, 2, 4], device=device),
        neighbor=torch.tensor([2, 1, 3, 0], device=device),  # of (3, 4, 2, 0)
        weight=torch.full((4,), 1 / 3, dtype=torch.float64, device=device),
        grad_scale=step.grad_scale[3:].contiguous(),
    )
    ops.combine_(part, [rows[i] for i in (3, 4, 2, 0)], "triton")
    assert_close(part.parameters, [p[3:] for p in whole[:2]])
    assert_close([s[6:] for s in part.state], [s[15:].view(5, 130)[3:].flatten() for s in whole[2:]])


@pytest.mark.gpu
@pytest.mark.parametrize("num_agents", [64, 1024])
def test_two_runs_are_equal(num_agents):
    graph = topology.random_regular(num_agents, 4, seed=0)
    step = a_step("gradient_tracking", graph, (1000, 4097), "cuda")
    assert_equal(after(step), after(step))


@pytest.mark.gpu
def test_a_step_waits_for_its_own_stream():
    step = a_step(columns=(100_000,), device="cuda")
    doubled = step._replace(gradients=[2 * g for g in step.gradients])
    expected, stream = after(doubled), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # cycles of the GPU: a step on another stream would be too early
        late = [g.mul_(2) for g in step.gradients]
        result = after(step._replace(gradients=late))
    stream.synchronize()
    assert_equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_segments", [2, 300])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_captured_steps(home, num_segments):
    """The gradients have new addresses in the capture; the coefficients on the device change between replays."""
    step = a_step(columns=(3, 130) * (num_segments // 2), device="cuda")
    step = step._replace(coefficients=step.coefficients.to(home))
    after(step)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gossip_step_(*step._replace(gradients=[2 * g for g in step.gradients]), "triton")
    for lr in (0.1, 0.03, 0.0) if home == "cuda" else (0.1, 0.1):
        flat = RULES["gut"].coefficients(lr).flat()
        step.coefficients.copy_(torch.tensor(flat, dtype=torch.float64))
        for gradient in step.gradients:
            gradient.neg_()
        expected = after(step._replace(gradients=[2 * g for g in step.gradients]))
        graph.replay()
        assert_equal([*step.parameters, *step.state], expected)


def test_how_a_step_is_cut():
    chip = Chip(132, 50 << 20)
    assert launch(16, 16, chip) == Launch(16, 64, 4, 528)
    for num_agents in (1, 2, 3, 63, 64, 65, 128, 129, 257, 1024, 4096, 100_000):
        cut = launch(num_agents, 16, chip)
        assert cut.block_agents * cut.block_columns == 256 * cut.num_warps
        assert cut.num_programs * cut.num_warps == 16 * chip.num_processors
        assert (cut.block_agents >= num_agents) == (num_agents <= 128)
        assert cut.block_columns >= 8


def test_whom_it_serves():
    unavailable = BACKENDS["triton"].unavailable
    served = "cpu" if INTERPRETED else "cuda"
    assert unavailable(served, torch.float32, 1, 1) is None
    assert unavailable(served, torch.float16, 9, 5, torch.float32) is None
    assert "floating point of 16, 32 and 64 bits" in unavailable(served, torch.float8_e5m2, 1, 1)
    assert "these are on 'meta'" in unavailable("meta", torch.float32, 1, 1)
    other = unavailable("cuda" if INTERPRETED else "cpu", torch.float32, 1, 1)
    assert ("imported to interpret" if INTERPRETED else "TRITON_INTERPRET=1") in other


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gut_fast.kernels.backends.triton_kernel import gossip_kernel

POINTERS = dict(table="*i64", coefficients="*fp64", row_start="*i64", neighbor="*i64", weight="*fp64")
SIZES = dict(num_segments="i32", num_agents="i32", num_rows="i32")


def compiled(capability, Q, M, dtype, state_dtype, fused=True, one_block=True):
    constants = dict(grad_scale=None, Q=Q, M=M, DTYPE=dtype, STATE_DTYPE=state_dtype, ROW_DTYPE=tl.float32)
    constants |= dict(COMPUTE=tl.float32, SENDS=fused, MIXES=True, ALIGNMENT=4, BLOCK_AGENTS=16, BLOCK_COLUMNS=64)
    constants |= dict(ONE_BLOCK=one_block, BY_HAND=False)
    names = gossip_kernel.arg_names
    types = {**POINTERS, **SIZES, "rows": "*fp32" if fused else "*i64"}
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, "rows")}
    source = ASTSource(gossip_kernel, signature, constexprs, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=4, num_stages=1))


float32, bfloat16, float16 = tl.float32, tl.bfloat16, tl.float16
for capability in (80, 90):
    gut, qg_gutm = (1, 1, float32, float32), (2, 1, float32, bfloat16)
    for rule in (gut, qg_gutm, (2, 2, float32, float32), (1, 1, float16, float16)):
        kernel = compiled(capability, *rule)
        assert kernel.asm["cubin"][:4] == bytes([127]) + b"ELF"
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.asm["ptx"].count("bar.sync") == 2, "a layout is converted"
        assert "ld.global.v4.b32" in kernel.asm["ptx"], "loads are narrow"
for form in (dict(fused=False), dict(one_block=False)):
    assert compiled(90, 1, 1, float32, float32, **form).asm["cubin"]
print("compiled by Triton", triton.__version__)
"""


def test_it_compiles_without_a_gpu(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (tmp_path / "compile_gossip_kernel.py").write_text(COMPILE)
    result = subprocess.run(
        [sys.executable, tmp_path / "compile_gossip_kernel.py"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.stdout.startswith("compiled by Triton"), result.stderr
