"""The op as PyTorch sees it: checks before changes, version counters, fake tensors, torch.compile."""

import pytest
import torch

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep, cpu
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import same_bits, seeded
from steps import a_step, copied, length_of, outputs

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


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_and_changes_nothing(case):
    changes, error, message = BAD[case]
    for backend in ("auto", "torch"):
        values = arguments(**{"backend": backend, **changes})
        tensors = [*values["parameters"], *values["state"], *values["gradients"]]
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(error, match=message):
            ops.gossip_step_(**values)
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_a_bad_step_is_refused_when_it_is_prepared():
    values = arguments(gradients=[torch.zeros(4, 3)])
    for backend in ("auto", "torch"):
        with pytest.raises(ValueError, match="2 parameters but 1 gradients"):
            ops.prepare(GossipStep(*list(values.values())[:-1]), backend)


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


def test_a_step_without_segments_does_nothing():
    ops.gossip_step_(**arguments(columns=(), state=[torch.zeros(0)]))


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


# Rows of messages


def rows_for(step, **changes):
    return [torch.zeros(length_of(step), **changes) for _ in range(step.num_agents)]


BAD_ROWS = {
    "too few": (lambda rows: rows[:5], ValueError, "5 rows of messages, expected 6"),
    "length": (lambda rows: [row[:-1] for row in rows], ValueError, "row 0 has shape .* expected 136 contiguous"),
    "strides": (lambda rows: [torch.empty(272)[::2] for _ in rows], ValueError, "row 0 has shape"),
    "dtype": (lambda rows: [row.double() for row in rows], TypeError, "row 0 is torch.float64"),
    "two dtypes": (lambda rows: [*rows[:5], rows[5].bfloat16()], TypeError, "row 5 is torch.bfloat16, the first"),
    "device": (lambda rows: [row.to("meta") for row in rows], TypeError, "row 0 is on meta"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_change_nothing(case):
    change, error, message = BAD_ROWS[case]
    for backend in ("cpu", "torch"):
        step = a_step()
        before, rows = copied(step), rows_for(step)
        for call in (ops.message, ops.combine_):
            with pytest.raises(error, match=message):
                call(step, change(rows), backend)
        assert same_bits(outputs(step), outputs(before))
        assert not any(row.any() for row in rows)


def test_rows_of_half_the_width_beside_float64_are_refused():
    step = a_step(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"row 0 is torch.bfloat16, .* the parameters are torch.float64"):
        ops.message(step, rows_for(step, dtype=torch.bfloat16))


def test_a_received_row_must_be_there():
    with pytest.raises(ValueError, match="row 6 is None, but it is of an agent that is not here"):
        ops.combine_(a_step(), [None] * 7)


@pytest.mark.parametrize("neighbor", [-1, 1, 6])
def test_an_edge_to_a_row_that_is_not_there(neighbor):
    for backend in ("cpu", "torch"):
        step = a_step()
        step.neighbor[3] = neighbor  # of agent 1
        before = copied(step)
        with pytest.raises(ValueError, match=f"row 1 names agent {neighbor}, which is not another one of the 6"):
            ops.combine_(step, rows_for(step), backend)
        assert same_bits(outputs(step), outputs(before))


def test_the_halves_bump_version_counters():
    step = a_step()
    rows = rows_for(step)
    for call, changed in ((ops.message, rows), (ops.combine_, outputs(step))):
        before = [tensor._version for tensor in changed]
        call(step, rows)
        assert all(tensor._version > version for tensor, version in zip(changed, before, strict=True))
