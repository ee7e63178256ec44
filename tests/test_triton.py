"""The Triton kernel alone: how it is cut and rounds, and how it is compiled; its steps are in test_conformance.

Without a GPU it runs in Triton's interpreter, and its machine code is compiled but only looked at.
"""

import os
import subprocess
import sys

import pytest
import torch

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import BACKENDS
from gut_fast.kernels.backends.triton import Chip, Launch, launch
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import PRECISIONS, Problem, compare, same_bits
from steps import a_step, outputs, own_rule, stepped

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", [*(["cpu"] if INTERPRETED else []), GPU])
# NumPy warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


def after(step):
    """Parameters and state after a step, which leaves its own as they are."""
    return outputs(stepped(step, "triton"))


@on_each_device
@pytest.mark.parametrize("num_agents", [128, pytest.param(257, marks=pytest.mark.slow)])
def test_agents_in_one_block_and_in_several(num_agents, device):
    """Up to 128 agents are one block; more go through a tile in several blocks."""
    problem = Problem(RULES["gut"], topology.ring(num_agents), (1, 20), {"mu": 0.9})
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=1, device=device) <= 2
    step = a_step("gut", topology.ring(131), (5,), device=device)
    rows = [torch.full((5,), torch.nan, device=device) for _ in range(131)]
    expected = after(step)
    ops.message(step, rows, "triton")
    ops.combine_(step, rows, "triton")
    assert same_bits(outputs(step), expected)


@on_each_device
def test_many_segments(device):
    columns = tuple(k % 5 for k in range(60 if device == "cpu" else 1003))
    problem = Problem(RULES["gut"], topology.ring(3), columns, {"mu": 0.5}, idle=(1, 7, 59))
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=1, device=device) <= 2


@on_each_device
def test_rules_of_any_size(device):
    problem = Problem(own_rule(5, 3), topology.star(5), (65,))
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=2, device=device) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("num_agents", [1, 2, 3, 16, 257, 1024, 4096])
def test_large_sizes(num_agents):
    problem = Problem(RULES["gut"], topology.ring(num_agents), (5, 4097, 1, 2048, 63), {"mu": 0.9})
    assert compare(problem, PRECISIONS["float32"], "triton", num_steps=3, device="cuda") <= 2


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even_and_overflow_is_infinite(dtype, device):
    numbers = torch.tensor([1, -1, 0.1, 1e-8, 6e-8, 3e38, -1e5, 65519, 65520, torch.inf, torch.nan, 0])
    ties = 1 + torch.arange(-8, 9) * torch.finfo(dtype).eps / 2
    g = torch.cat([numbers, ties, -ties]).expand(2, -1).contiguous()
    step = a_step(
        "gradient_tracking", topology.ring(2), g.shape[1:], state_dtype=dtype, device=device, weight_decay=0.0
    )
    step = step._replace(gradients=[g.to(device)], grad_scale=None)
    (*_, q) = after(step)  # this state is the gradient
    torch.testing.assert_close(q.cpu().view(2, -1), g.to(dtype), rtol=0, atol=0, equal_nan=True)


@on_each_device
@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
def test_a_neighbour_that_is_not_there_makes_the_drift_nan(wrong, device):
    step = a_step(device=device)
    right = after(step)
    step.neighbor[5] = wrong  # agent 2's second
    others = [0, 1, 3, 4, 5]
    for tensor, expected in zip(after(step)[:3], right[:3], strict=True):
        assert tensor.isnan().all(dim=1).tolist() == [agent == 2 for agent in range(6)]
        assert torch.equal(tensor[others], expected[others])


@pytest.mark.gpu
@pytest.mark.parametrize("num_agents", [64, 1024])
def test_two_runs_are_equal(num_agents):
    graph = topology.random_regular(num_agents, 4, seed=0)
    step = a_step("gradient_tracking", graph, (1000, 4097), device="cuda")
    assert same_bits(after(step), after(step))


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
    assert same_bits(result, expected)


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
        flat = RULES["gut"].coefficients(lr, weight_decay=0.01).flat()
        step.coefficients.copy_(torch.tensor(flat, dtype=torch.float64))
        for gradient in step.gradients:
            gradient.neg_()
        expected = after(step._replace(gradients=[2 * g for g in step.gradients]))
        graph.replay()
        assert same_bits(outputs(step), expected)


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
for capability in map(int, sys.argv[1:]):
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


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_it_compiles_without_a_gpu(capability, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (tmp_path / "compile_gossip_kernel.py").write_text(COMPILE)
    result = subprocess.run(
        [sys.executable, tmp_path / "compile_gossip_kernel.py", str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.stdout.startswith("compiled by Triton"), result.stderr
