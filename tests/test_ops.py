"""The op as PyTorch sees it: checks before changes, version counters, fake tensors, torch.compile."""

import os
import subprocess
import sys

import pytest
import torch

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, cpu
from gut_fast.rules import RULES
from lockstep import seeded

RING = topology.ring(4)


def arguments(columns=(3, 2), dtype=torch.float32, backend="auto", **changes):
    """Valid arguments of a GUT step of four agents, by name, with `changes`."""
    values = {
        "parameters": [seeded(4, d, seed=d, dtype=dtype) for d in columns],
        "state": [torch.zeros(4 * sum(columns), dtype=dtype)],
        "gradients": [seeded(4, d, seed=d + 9, dtype=dtype) for d in columns],
        "coefficients": torch.tensor(RULES["gut"].coefficients(0.1).flat(), dtype=torch.float64),
        "num_messages": 1,
        **RING.csr()._asdict(),
        "grad_scale": None,
        "backend": backend,
    }
    return {**values, **changes}


BAD = {
    "leading dimension": ({"parameters": [torch.zeros(5, 3), torch.zeros(4, 2)]}, ValueError, r"expected \(4, ...\)"),
    "scalar parameter": ({"parameters": [torch.tensor(1.0), torch.zeros(4, 2)]}, ValueError, r"expected \(4, ...\)"),
    "strides": ({"parameters": [torch.zeros(3, 4).T, torch.zeros(4, 2)]}, ValueError, "parameter 0 is not contiguous"),
    "integers": ({"parameters": [torch.zeros(4, 3, dtype=torch.int64)] * 2}, TypeError, "only floating-point ones"),
    "mixed dtypes": (
        {"parameters": [torch.zeros(4, 3), torch.zeros(4, 2).double()]},
        TypeError,
        "parameter 1 is torch.float64 on cpu, but parameter 0 is torch.float32",
    ),
    "gradient shape": ({"gradients": [torch.zeros(4, 3), torch.zeros(4, 3)]}, ValueError, "gradient 1 has shape"),
    "gradient dtype": ({"gradients": [torch.zeros(4, 3).double(), torch.zeros(4, 2)]}, TypeError, "gradient 0 is"),
    "gradient count": ({"gradients": [torch.zeros(4, 3)]}, ValueError, "2 parameters but 1 gradients"),
    "state length": ({"state": [torch.zeros(19)]}, ValueError, "expected one contiguous row of 20"),
    "state dtype": ({"state": [torch.zeros(20).double()]}, TypeError, "the state is torch.float64; for parameters of"),
    "state missing": ({"state": []}, ValueError, "coefficients is .* expected a contiguous .* of shape"),
    "coefficients": ({"coefficients": torch.zeros(5, dtype=torch.float64)}, ValueError, "coefficients is"),
    "coefficients dtype": ({"coefficients": torch.zeros(13)}, ValueError, "coefficients is torch.float32"),
    "messages": ({"num_messages": 0}, ValueError, "num_messages must be at least 1"),
    "no rows": ({"row_start": torch.zeros(1, dtype=torch.int64)}, ValueError, "row_start must have N"),
    "weights": ({"weight": torch.ones(3, dtype=torch.float64)}, ValueError, "weight is"),
    "row_start end": ({"row_start": torch.tensor([0, 2, 4, 6, 7])}, ValueError, "row_start ends at 7"),
    "row_start order": ({"row_start": torch.tensor([0, 6, 4, 6, 8])}, ValueError, "row_start .*decrease"),
    "row_start leaps": ({"row_start": torch.tensor([0, 1 << 40, 4, 6, 8])}, ValueError, "row_start .*decrease"),
    "row_start begin": ({"row_start": torch.tensor([1, 2, 4, 6, 8])}, ValueError, r"row_start.* must be"),
    "neighbour": ({"neighbor": torch.tensor([1, 9, 0, 2, 1, 3, 0, 2])}, ValueError, "row 0 names agent 9"),
    "itself": ({"neighbor": torch.tensor([0, 3, 0, 2, 1, 3, 0, 2])}, ValueError, "row 0 names agent 0"),
    "scale": ({"grad_scale": torch.ones(3, dtype=torch.float64)}, ValueError, "grad_scale is"),
    "backend": ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'; known are auto, cpu, .*torch"),
    "half on cpu": (
        {**{k: v for k, v in arguments(dtype=torch.half).items() if k in ("parameters", "gradients", "state")}}
        | {"backend": "cpu"},
        RuntimeError,
        "backend 'cpu' is not available: it serves parameters and state of .*; not torch.float16",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_and_changes_nothing(case, backend):
    changes, error, message = BAD[case]
    values = arguments(**{"backend": backend, **changes})
    tensors = [*values["parameters"], *values["state"], *values["gradients"]]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=message):
        ops.gossip_step_(**values)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("nothing", [None, torch.empty(0)], ids=["None", "empty"])
def test_no_gradient_is_zero(nothing, backend):
    without, zero = arguments(backend=backend), arguments(backend=backend)
    without["gradients"][0], zero["gradients"][0] = nothing, torch.zeros(4, 3)
    for values in (without, zero):
        ops.gossip_step_(**values)
    for name in ("parameters", "state"):
        assert all(torch.equal(a, b) for a, b in zip(without[name], zero[name], strict=True))


def test_the_direct_way_gives_the_bits_of_the_op():
    direct, op = arguments(columns=(3, 2, 1)), arguments(columns=(3, 2, 1))
    scale = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    ops.gossip_step_(**{**direct, "parameters": tuple(direct["parameters"]), "grad_scale": scale})
    torch.ops.gut_fast.gossip_step_(*{**op, "grad_scale": scale}.values())
    for name in ("parameters", "state"):
        assert all(torch.equal(a, b) for a, b in zip(direct[name], op[name], strict=True))


def test_tensor_subclasses_go_through_the_op():
    class Own(torch.Tensor):
        pass

    values = arguments()
    values["parameters"][0] = values["parameters"][0].as_subclass(Own)
    step = GossipStep(*list(values.values())[:-1])
    assert cpu.direct_step(step) is None
    ops.gossip_step_(**values)
    plain = arguments()
    ops.gossip_step_(**plain)
    assert torch.equal(values["parameters"][0].as_subclass(torch.Tensor), plain["parameters"][0])


NOT_PLAIN = {
    "expanded": {"gradients": [torch.ones(4, 1).expand(4, 3), torch.zeros(4, 2)]},
    "sparse": {"gradients": [torch.zeros(4, 3).to_sparse(), torch.zeros(4, 2)]},
    "meta": {"gradients": [torch.zeros(4, 3, device="meta"), torch.zeros(4, 2)]},
    "no tensor": {"gradients": [[1.0], torch.zeros(4, 2)]},
    "too few": {"gradients": [torch.zeros(4, 3)]},
    "transposed": {"gradients": [torch.zeros(3, 4), torch.zeros(4, 2)]},
    "another dtype": {"gradients": [torch.zeros(4, 3).bfloat16(), torch.zeros(4, 2)]},
    "state too long": {"state": [torch.zeros(21)]},
    "state with steps": {"state": [torch.zeros(40)[::2]]},
    "state of two dtypes": {"state": [torch.zeros(20), torch.zeros(20).bfloat16()]},
    "short coefficients": {"coefficients": torch.zeros(12, dtype=torch.float64)},
    "weights": {"weight": torch.zeros(8)},
    "neighbours": {"neighbor": torch.zeros(7, dtype=torch.int64)},
    "scale": {"grad_scale": torch.zeros(4)},
    "no messages": {"num_messages": 0},
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_only_tensors_that_fit_go_straight_to_the_kernel(case):
    assert cpu.direct_step(GossipStep(*list(arguments().values())[:-1])) is not None
    assert cpu.direct_step(GossipStep(*list(arguments(**NOT_PLAIN[case]).values())[:-1])) is None


def test_non_contiguous_and_expanded_gradients():
    plain, strided = arguments(), arguments()
    strided["gradients"] = [strided["gradients"][0].T.contiguous().T, torch.ones(4, 1).expand(4, 2)]
    plain["gradients"][1] = torch.ones(4, 2)
    for values in (plain, strided):
        ops.gossip_step_(**values)
    assert all(torch.equal(a, b) for a, b in zip(plain["parameters"], strided["parameters"], strict=True))


def test_no_segments_and_empty_segments():
    ops.gossip_step_(**arguments(columns=(), state=[torch.zeros(0)]))
    with_empty, without = arguments(columns=(3, 0)), arguments(columns=(3,))
    for values in (with_empty, without):
        ops.gossip_step_(**values)
    assert torch.equal(with_empty["parameters"][0], without["parameters"][0])


def test_version_counters_are_bumped():
    values = arguments()
    tensors = [*values["parameters"], *values["state"]]
    before = [tensor._version for tensor in tensors]
    ops.gossip_step_(**values)
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))


def test_a_backward_through_stepped_parameters_raises_instead_of_being_wrong():
    values = arguments()
    weight = values["parameters"][0].requires_grad_()
    loss = (weight**2).sum()
    with torch.no_grad():
        ops.gossip_step_(**values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meta_tensors_do_nothing():
    values = arguments()
    moved = {
        name: [t.to("meta") for t in value] if isinstance(value, list) else value for name, value in values.items()
    }
    moved |= {name: values[name].to("meta") for name in ("row_start", "neighbor", "weight", "coefficients")}
    ops.gossip_step_(**moved)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.gut_fast.gossip_step_.default, tuple(arguments(backend=backend).values()))


def test_compiles_as_a_whole():
    names = ("parameters", "state", "gradients")
    rest = [value for name, value in arguments().items() if name not in names]

    def step(parameters, state, gradients):
        scaled = [2 * gradient for gradient in gradients]
        ops.gossip_step_(parameters, state, scaled, *rest)
        return parameters[0].sum()

    eager, compiled = arguments(), arguments()
    expected = step(*(eager[name] for name in names))
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*(compiled[name] for name in names))
    torch.testing.assert_close(result, expected)
    for name in names[:2]:
        assert all(torch.equal(a, b) for a, b in zip(eager[name], compiled[name], strict=True))


@pytest.mark.parametrize("tier", ["baseline", "no-such-tier"])
def test_the_environment_forces_a_tier(tier):
    script = (
        "import torch\n"
        "from gut_fast.kernels.backends import cpu\n"
        "print(cpu.tier(), '|', cpu.unavailable('cpu', torch.float32, 1, 1))\n"
        "from gut_fast.kernels import ops\n"
        "print(ops.select_backend('auto', 'cpu', torch.float32, 1, 1).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "GUT_FAST_TIER": tier},
        capture_output=True,
        text=True,
        check=True,
    )
    if tier == "baseline":
        assert result.stdout.split("\n")[:2] == ["baseline | None", "gut_fast.kernels.backends.cpu"]
        assert not result.stderr
    else:
        assert "steps are slow without the compiled kernel: backend 'cpu' is not available: env" in result.stderr
        assert "None | environment variable GUT_FAST_TIER: instruction tier 'no-such-tier'" in result.stdout
