"""The optimizers refuse bad input before anything is changed, and warn of unstable settings."""

import warnings

import pytest
import torch

import gut_fast as gf
from quadratics import RING, make, parameters, refused, same, set_gradients, snapshot, train

BAD_HYPERPARAMETERS = [
    ({"lr": float("nan")}, ValueError, r"lr=nan is outside \[0, inf\)"),
    ({"lr": -0.1}, ValueError, r"lr=-0.1 is outside \[0, inf\)"),
    ({"lr": "fast"}, TypeError, "lr must be a number, got str"),
    ({"lr": torch.ones(2)}, ValueError, r"GUTm: an lr that is a tensor must hold one number, got shape \[2\]"),
    ({"lr": torch.tensor(-0.5)}, ValueError, r"lr=-0.5 is outside \[0, inf\)"),
    ({"drift_memory": 1.0}, ValueError, r"drift_memory=1.0 is outside \[0, 1\)"),
    ({"drift_memory": "long"}, TypeError, "drift_memory must be a number, got str"),
    ({"momentum": -0.1}, ValueError, r"momentum=-0.1 is outside \[0, 1\)"),
    ({"momentum": 1.0}, ValueError, r"outside \[0, 1\)"),
    ({"mu": 1.1}, ValueError, r"mu=1.1 is outside \[0, 1\]"),
    ({"mu": float("nan")}, ValueError, "outside"),
    ({"mu": None}, TypeError, "mu must be a number"),
    ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1.0 is outside \[0, inf\)"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay=inf is outside"),
    ({"maximize": 1}, TypeError, "maximize must be True or False"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_HYPERPARAMETERS, ids=str)
def test_bad_hyperparameters_change_nothing(bad, error, message):
    with pytest.raises(error, match=message):
        make(gf.GUTm, **bad)
    params, optimizer = make(gf.GUTm, split=1)
    train(params, optimizer, range(2))
    set_gradients(params, 2)
    good = {key: optimizer.param_groups[1][key] for key in bad}
    with refused(params, optimizer, error, message):
        optimizer.param_groups[1].update(bad)
        try:
            optimizer.step()
        finally:
            optimizer.param_groups[1].update(good)


BAD_PARAMETERS = {
    "leading dimension": (lambda: [torch.zeros(5, 3)], ValueError, r"shape \(5, 3\), expected \(6, ...\).*stack"),
    "no dimension": (lambda: [torch.tensor(1.0)], ValueError, r"expected \(6, ...\)"),
    "integers": (lambda: [torch.zeros(6, 3, dtype=torch.int64)], TypeError, "only floating-point ones"),
    "complex": (lambda: [torch.zeros(6, dtype=torch.complex64)], TypeError, "only floating-point ones"),
    "mixed dtypes": (lambda: [torch.zeros(6), torch.zeros(6).double()], TypeError, "parameter 1 is torch.float64"),
    "mixed devices": (lambda: [torch.zeros(6), torch.zeros(6, device="meta")], TypeError, "on meta, but parameter 0"),
    "strides": (lambda: [torch.zeros(3, 6).T], ValueError, "parameter 0 is not contiguous"),
    "sparse": (lambda: [torch.zeros(6, 3).to_sparse()], TypeError, "only dense parameters"),
    "twice": (lambda: parameters()[:1] * 2, ValueError, "stands more than once"),
}
BAD_GROUPS = {
    "a module": (lambda: torch.nn.Linear(5, 8), TypeError, r"give the parameters of the module, Linear\.parameters"),
    "no tensor": (lambda: [{"params": [1.0]}], TypeError, "parameters must be tensors, got"),
    "nothing": (list, ValueError, "empty parameter list"),
    "a set": (lambda: [{"params": {torch.zeros(6)}}], TypeError, "must have an order, got a set"),
    "another rule's": (lambda: [{"params": parameters(), "momentum": 0.5}], ValueError, "no hyper-parameter momentum"),
}


@pytest.mark.parametrize("case", [*BAD_PARAMETERS, *BAD_GROUPS])
def test_bad_parameters_and_groups_change_nothing(case):
    bad, error, message = {**BAD_PARAMETERS, **BAD_GROUPS}[case]
    with pytest.raises(error, match=message):
        gf.GUT(bad(), 0.1, topology=RING)
    params, optimizer = make()
    if case in BAD_PARAMETERS:
        with refused(params, optimizer, error, message):
            optimizer.add_param_group({"params": bad()})
    with refused(params, optimizer, ValueError, "some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    train(params, optimizer, range(2))


def set_data(number, data):
    """Returns a damage that gives a parameter other data."""
    return lambda params: setattr(params[number], "data", data(params[number].data))


def set_gradient(data):
    """Returns a damage that gives the first parameter's gradient other data."""
    return lambda params: setattr(params[0].grad, "data", data)


def convert_all(dtype):
    """Returns a damage that converts all parameters, without gradients."""

    def damage(params):
        for p in params:
            p.grad, p.data = None, p.data.to(dtype)

    return damage


def sparse_gradient(params):
    params[0].grad = params[0].grad.to_sparse()


DAMAGES = [
    (
        set_gradient(torch.zeros(6, 5, 3, dtype=torch.float64)),
        ValueError,
        r"gradient 0 has shape \(6, 5, 3\), expected \(6, 3, 5\)",
    ),
    (set_gradient(torch.zeros(6, 3, 5)), TypeError, "gradient 0 is torch.float32 on cpu, but parameter 0 is torch.flo"),
    (sparse_gradient, TypeError, "gradient 0 is torch.sparse_coo; use dense gradients"),
    (set_data(0, lambda data: data[:4]), ValueError, r"parameter 0 has shape \(4, 3, 5\), expected \(6, ...\)"),
    (set_data(0, lambda data: data.transpose(1, 2)), ValueError, "parameter 0 is not contiguous"),
    (set_data(1, lambda data: data.float()), TypeError, "parameter 1 is torch.float32 on cpu, but parameter 0"),
    (
        convert_all(torch.float32),
        TypeError,
        "GUTm: the parameters are now torch.float32, .*; make the optimizer after the conversion: the state is "
        "torch.float64; for parameters of torch.float32 it can be",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_what_no_longer_fits_changes_nothing(damage, error, message):
    params = parameters()
    optimizer = gf.GUTm([{"params": params[2:]}, {"params": params[:2]}], 0.1, topology=RING)
    train(params, optimizer, range(2))
    set_gradients(params, 2)
    damage(params)
    with refused(params, optimizer, error, message):
        optimizer.step()


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("which", ["parameter", "gradient", "state", "grad_scale"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_memory_that_was_freed_is_an_error(which, offset, backend):
    """A storage that is resized to nothing leaves tensors that point nowhere, or just beside it."""

    def part(*shape, dtype=torch.float32):
        return torch.zeros(200, dtype=dtype)[offset : offset + torch.Size(shape).numel()].view(shape)

    params = [torch.nn.Parameter(torch.zeros(6, 2)), torch.nn.Parameter(torch.zeros(6, 5))]
    params[1].data = part(6, 5)
    optimizer = gf.GUT(params, 0.1, topology=RING, backend=backend)
    params[1].grad = part(6, 5)
    optimizer.step()
    scale = part(6, dtype=torch.float64)
    freed = {"parameter": params[1], "gradient": params[1].grad, "grad_scale": scale}
    freed.get(which, optimizer.state[params[1]]["r"]).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{which} ?\d? has no memory: its storage has 0 bytes of .* was it freed"):
        optimizer.step(grad_scale=scale if which == "grad_scale" else None)
    assert optimizer.num_steps == 1
    assert not params[0].any()


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_gradients_that_are_negated_lazily_are_resolved(backend):
    (params, optimizer), (twins, twin) = (make(dtype=torch.float32, backend=backend) for _ in range(2))
    for step in range(3):
        set_gradients(params, step)
        for p, q in zip(params, twins, strict=True):
            q.grad = torch._neg_view(-p.grad)
            assert q.grad.is_neg()
        optimizer.step()
        twin.step()
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def test_parameters_that_are_negated_lazily_are_refused_and_state_is_resolved():
    (params, optimizer), (twins, twin) = make(), make()
    for values, one, wrapped in ((params, optimizer, torch.clone), (twins, twin, lambda r: torch._neg_view(-r))):
        train(values, one, range(2))
        one.state[values[0]]["r"] = wrapped(one.state[values[0]]["r"] + 1)
        train(values, one, range(2, 4))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))
    params[0].data = torch._neg_view(-params[0].data)
    with refused(params, optimizer, ValueError, r"parameter 0 is a lazily negated or zero view.*use .clone\(\)"):
        optimizer.step()


def test_converted_or_moved_parameters_need_a_new_optimizer():
    params, optimizer = make(dtype=torch.float32)
    convert_all(torch.bfloat16)(params)
    with refused(params, optimizer, TypeError, r"are now torch.bfloat16, their state is torch.float32; make"):
        optimizer.step()
    params, optimizer = make()
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(p.to("meta")) for p in params]
    with pytest.raises(TypeError, match="GUT: the parameters are now on meta; make the optimizer after the move"):
        optimizer.step()


@pytest.mark.parametrize("scale", [torch.ones(5), torch.ones(6, 1), torch.ones(6) * 1j, [1.0] * 6], ids=str)
def test_bad_grad_scale(scale):
    params, optimizer = make()
    with refused(params, optimizer, ValueError, r"grad_scale must be a real tensor \[6\], got"):
        optimizer.step(grad_scale=scale)


def test_a_learning_rate_too_small_for_the_dtype_changes_nothing():
    params, optimizer = make(dtype=torch.float16, split=1, lr=1e-38, drift_memory=0.0)
    train(params, optimizer, range(1))
    set_gradients(params, 1)
    optimizer.param_groups[1]["lr"] = 1e-39
    with refused(params, optimizer, ValueError, r"lr=1e-39 makes a coefficient of 1e\+39, more than torch.float32 hol"):
        optimizer.step()


def test_bad_topology_rule_and_backend():
    with pytest.raises(TypeError, match=r"must be a gut_fast\.topology\.Topology, got Tensor"):
        make(topology=torch.eye(6))
    with pytest.raises(ValueError, match="unknown rule 'sgd'; known are dsgd, gut"):
        make(gf.GossipOptimizer, rule="sgd")
    with pytest.raises(TypeError, match="dsgd: unexpected keyword argument 'mu'; its rule has: none"):
        make(gf.GossipOptimizer, rule="dsgd", mu=0.5)
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        make(backend="tpu")
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: it serves .*; not torch.float16 with"):
        make(dtype=torch.float16, backend="cpu")


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_dtypes_that_do_not_go_together(dtype, state_dtype):
    with pytest.raises(TypeError, match=f"GUT: the state is {state_dtype}; for parameters of {dtype} it can be"):
        make(dtype=dtype, state_dtype=state_dtype)


TORUS = gf.topology.torus(4, 4)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda p: gf.GUT(p, 0.1, 0.9, topology=TORUS), r"GUT: mu=0.9, kappa=1 is unstable on torus\(4, 4\)"),
        (lambda p: gf.QGGUTm(p, 0.1, 0.95, 0.1, topology=gf.topology.ring(16)), "must stay below 1"),
        (lambda p: gf.GUTm(p, 0.1, topology=TORUS), r"GUTm: .*unstable on torus\(4, 4\).*use "),
    ],
)
def test_unstable_hyperparameters_warn_at_the_callers_line(make_one, message):
    with pytest.warns(UserWarning, match=message) as caught:
        make_one(parameters(num_agents=16))
    assert caught[0].filename == __file__


def test_weight_decay_of_frozen_parameters_is_said_once():
    params = parameters()
    params[1].requires_grad_(requires_grad=False)
    with pytest.warns(UserWarning, match=r"GUT: weight_decay=0.1 also shrinks .* of shape \(6, 5\)") as caught:
        optimizer = gf.GUT(params, 0.1, topology=RING, weight_decay=0.1)
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.param_groups[0].update(lr=0.05, weight_decay=0.2)
    optimizer.step()


def test_frozen_parameters_in_a_group_without_weight_decay_stay():
    params = [torch.nn.Parameter(torch.ones(6, 3), requires_grad=k == 0) for k in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = gf.GUTm(groups, 0.1, topology=RING, weight_decay=0.1)
    optimizer.step()
    assert (params[0] < 1).all()
    torch.testing.assert_close(params[1].detach(), torch.ones(6, 3))


def test_stable_hyperparameters_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in gf.rules.RULES:
            gf.GossipOptimizer(parameters(num_agents=16), rule, lr=0.1, topology=gf.topology.ring(16))
        gf.GUT(parameters(num_agents=16), 0.1, 0.3, topology=TORUS)
        gf.GUT(parameters(num_agents=16), 0.1, 0.9, topology=TORUS.lazy(0.5))
