"""The rule step against the published form of every method, its invariants, and its errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gut_fast import topology
from gut_fast.published import KGT, LED, GASLoC
from gut_fast.reference import PUBLISHED, drift, step, zero_state
from gut_fast.rules import RULES

TOPOLOGIES = {
    "ring": topology.ring(5),
    "torus": topology.torus(3, 3).lazy(0.5),
    "star": topology.star(6),
    "petersen": topology.petersen(),
    "random": topology.erdos_renyi(7, 0.5, seed=1),
}

SETTINGS = [
    ("dsgd", {}),
    ("gut", {"mu": 0.9}),
    ("gutm", {"momentum": 0.9, "mu": 0.8}),
    ("qgt", {"momentum": 0.9, "mu": 1.0}),
    ("d2", {}),
    ("qg_gutm", {"momentum": 0.9, "mu": 0.06}),
    ("dsgdm", {"momentum": 0.9}),
    ("dsgdm", {"momentum": 0.9, "nesterov": True}),
    ("qg_dsgdm", {"momentum": 0.9}),
    ("qg_dsgdm", {"momentum": 0.9, "nesterov": True}),
    ("gradient_tracking", {}),
    ("momentum_tracking", {"momentum": 0.9}),
    ("edm", {"momentum": 0.9}),
    ("extra", {}),
    ("awc_gut", {"mu": 0.9}),
    ("decentlam", {"momentum": 0.9}),
    ("gasloc", {"momentum": 0.9}),
    ("k_gt", {}),
]
MORE_SETTINGS = [
    ("gut", {"mu": 0.3}),
    ("gut", {"mu": 1.0}),
    ("gut", {"mu": 0.9, "kappa": 0.3}),
    ("gut", {"mu": 1.0, "kappa": 0.1}),
    ("d2", {"kappa": 0.3}),
    ("edm", {"momentum": 0.5}),
    ("gasloc", {"momentum": 0.3}),
    ("gutm", {"momentum": 0.0, "mu": 0.5}),
    ("gutm", {"momentum": 0.5, "mu": 0.4}),
    ("qgt", {"momentum": 0.5, "mu": 0.7}),
    ("qg_gutm", {"momentum": 0.9, "mu": 0.0}),
    ("qg_gutm", {"momentum": 0.5, "mu": 0.3}),
    ("dsgdm", {"momentum": 0.5, "nesterov": True}),
    ("qg_dsgdm", {"momentum": 0.5}),
    ("momentum_tracking", {"momentum": 0.5}),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def heterogeneous_quadratics(num_agents, dim, seed=0):
    """The gradient of f_i(x) = ½ (x − b_i)ᵀ H_i (x − b_i), where each agent has its own curvature and optimum."""
    factors, b = randn(num_agents, dim, dim, seed=seed), randn(num_agents, dim, seed=seed + 1)
    H = factors @ factors.mT / dim + 0.2 * torch.eye(dim, dtype=torch.float64)
    return lambda z: (H @ (z - b)[..., None])[..., 0]


def relative_errors(rule, hyperparameters, W, num_steps=100, lr=0.05):
    """The largest difference of rule form and published form in a run, agent by agent, relative to the largest z."""
    gradient = heterogeneous_quadratics(len(W), dim=3)
    z = randn(3, seed=7).expand(len(W), 3)
    state, published = zero_state(rule, z), PUBLISHED[rule](W, z, lr, **hyperparameters)
    error, largest = torch.zeros_like(z), 0.0
    for _ in range(num_steps):
        g = gradient(z)
        z, state = step(rule, {"lr": lr, **hyperparameters}, z, state, g, W)
        published.step(g)
        error = error.maximum((z - published.z).abs())
        largest = max(largest, float(z.abs().max()))
    assert largest < 100
    return error.amax(1) / largest


def test_every_rule_has_a_published_form_and_is_compared_with_it():
    assert PUBLISHED.keys() == RULES.keys() == {rule for rule, _ in SETTINGS}


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS)
def test_rule_form_is_published_form(rule, hyperparameters):
    """All topologies are compared at once, side by side as the blocks of one W."""
    matrices = [static.matrix() for static in TOPOLOGIES.values()]
    errors = relative_errors(rule, hyperparameters, torch.block_diag(*matrices)).split([len(W) for W in matrices])
    for name, error in zip(TOPOLOGIES, errors, strict=True):
        assert error.max() <= 1e-10, name


@pytest.mark.parametrize(("rule", "hyperparameters"), MORE_SETTINGS)
def test_rule_form_is_published_form_at_other_hyperparameters(rule, hyperparameters):
    assert relative_errors(rule, hyperparameters, TOPOLOGIES["ring"].matrix()).max() <= 1e-10


LOCAL = {
    "dsgd": ({}, lambda W, z, lr, H: GASLoC(W, z, lr, momentum=0.0)),
    "gasloc": ({"momentum": 0.9}, lambda W, z, lr, H: GASLoC(W, z, lr, momentum=0.9)),
    "d2": ({}, LED),
    "gut": ({"mu": 1.0}, LED),
    "k_gt": ({}, KGT),
}
"""Hyper-parameters of a rule, and what makes its published form with local steps."""


@pytest.mark.parametrize("local_steps", [1, 2, 5])
@pytest.mark.parametrize("rule", LOCAL)
def test_rounds_of_local_steps_are_those_of_the_published_form(rule, local_steps):
    W, lr, (hyperparameters, published) = TOPOLOGIES["ring"].matrix(), 0.05, LOCAL[rule]
    gradient = heterogeneous_quadratics(len(W), dim=3)
    z = randn(3, seed=7).expand(len(W), 3)
    state, published = zero_state(rule, z), published(W, z, lr, local_steps)
    for number in range(20 * local_steps):
        g, is_last = gradient(z), number % local_steps == local_steps - 1
        options = {"lr": lr, "drift_lr": local_steps * lr} if is_last else {"lr": lr, "is_local": True}
        z, state = step(rule, {**options, **hyperparameters}, z, state, g, W)
        (published.step if is_last else published.local_step)(g)
        assert (z - published.z).abs().max() <= 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_the_average_of_a_local_step_moves_as_that_of_a_step(rule):
    """With a state of mean zero where the rule keeps it so: what the drift feeds alone."""
    W, lr = TOPOLOGIES["ring"].matrix(), 0.05
    z, g = randn(5, 3, seed=7), randn(5, 3, seed=8)
    state = zero_state(rule, z)
    z, state = step(rule, {"lr": lr}, z, state, g, W)
    mixed, after = step(rule, {"lr": lr}, z, state, g, W)
    local, _ = step(rule, {"lr": lr, "is_local": True}, z, state, g, W)
    if rule == "gasloc":  # whose momentum acts at the end of a round only
        assert torch.allclose(local.mean(0), (z - lr * g).mean(0), atol=1e-14)
    else:
        assert torch.allclose(local.mean(0), mixed.mean(0), atol=1e-14)
    assert (local - mixed).abs().max() > 1e-4
    assert all(torch.isfinite(each).all() for each in after.values())


def test_a_local_step_of_gut_leaves_what_has_been_learned():
    z, r, g = (randn(5, 3, seed=seed) for seed in (1, 2, 3))
    local, after = step("gut", {"lr": 0.1, "mu": 0.5, "is_local": True}, z, {"r": r}, g, TOPOLOGIES["ring"].matrix())
    assert torch.equal(after["r"], r)
    assert torch.allclose(local, z - 0.1 * (g + 0.5 * r), atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_published_forms_notice_a_wrong_rule(rule):
    """The comparison fails where the published form runs at another learning rate: it can tell two methods apart."""
    W = TOPOLOGIES["ring"].matrix()
    z, g = randn(3, seed=7).expand(5, 3), randn(5, 3, seed=8)
    published = PUBLISHED[rule](W, z, 0.051, **RULES[rule].hyperparameters)
    published.step(g)
    new_z, _ = step(rule, {"lr": 0.05}, z, zero_state(rule, z), g, W)
    assert (new_z - published.z).abs().max() > 1e-4


# Invariants


def doubly_stochastic(num_agents, seed):
    """A random symmetric W of nonnegative entries, about half of them zero."""
    pairs = torch.rand(num_agents, num_agents, dtype=torch.float64, generator=generator(seed)).triu(1)
    weights = (pairs > 0.5) * pairs
    weights = weights + weights.T
    weights = weights / weights.sum(1).max().clamp(min=1.0)
    return weights + torch.diag(1 - weights.sum(1))


@st.composite
def experiments(draw):
    """A rule with hyper-parameters, some agents in any state, gradients, and a mixing matrix."""
    rule = draw(st.sampled_from(sorted(RULES)))
    hyperparameters = {"lr": draw(st.sampled_from([0.01, 0.1, 1.0]))}
    for name, default in RULES[rule].hyperparameters.items():
        hyperparameters[name] = draw(st.booleans() if isinstance(default, bool) else st.sampled_from([0.0, 0.3, 0.9]))
    num_agents, dim, seed = draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(0, 1000))
    z, g = randn(num_agents, dim, seed=seed), randn(num_agents, dim, seed=seed + 1)
    state = {name: randn(num_agents, dim, seed=seed + 2 + k) for k, name in enumerate(RULES[rule].states)}
    return rule, hyperparameters, z, state, g, doubly_stochastic(num_agents, seed)


properties = settings(max_examples=25, deadline=None, derandomize=True)


def assert_same(actual, expected, tolerance=1e-12):
    (z, state), (expected_z, expected_state) = actual, expected
    assert state.keys() == expected_state.keys()
    for name, values in {"z": z, **state}.items():
        torch.testing.assert_close(values, {"z": expected_z, **expected_state}[name], rtol=tolerance, atol=tolerance)


def each(transform, tensors):
    return {name: transform(tensor) for name, tensor in tensors.items()}


@properties
@given(experiments())
def test_the_average_moves_only_by_the_average_update(experiment):
    rule, hyperparameters, z, state, g, _ = experiment
    new_z, new_state = step(*experiment)

    def average(x):
        return x.mean(0, keepdim=True)

    alone = step(rule, hyperparameters, average(z), each(average, state), average(g), [[1.0]])
    assert_same((average(new_z), each(average, new_state)), alone, tolerance=1e-10)


@properties
@given(experiments(), st.integers(0, 100))
def test_relabelling_agents_relabels_the_result(experiment, seed):
    rule, hyperparameters, z, state, g, W = experiment
    order = torch.randperm(len(z), generator=generator(seed))
    new_z, new_state = step(*experiment)
    relabelled = step(rule, hyperparameters, z[order], each(lambda x: x[order], state), g[order], W[order][:, order])
    assert_same(relabelled, (new_z[order], each(lambda x: x[order], new_state)))


@properties
@given(experiments())
def test_zero_learning_rate_mixes_z_and_leaves_the_state(experiment):
    rule, hyperparameters, z, state, g, W = experiment
    assert_same(step(rule, {**hyperparameters, "lr": 0.0}, z, state, g, W), (W @ z, state))


@properties
@given(experiments(), st.sampled_from([0.0, 0.1]), st.booleans())
def test_weight_decay_and_maximize_fold_into_the_gradient(experiment, weight_decay, maximize):
    rule, hyperparameters, z, state, g, W = experiment
    folded = step(rule, {**hyperparameters, "weight_decay": weight_decay, "maximize": maximize}, z, state, g, W)
    assert_same(folded, step(rule, hyperparameters, z, state, (-g if maximize else g) + weight_decay * z, W))


@properties
@given(experiments(), st.integers(0, 100))
def test_grad_scale_is_one_factor_per_agent_on_the_gradient(experiment, seed):
    rule, hyperparameters, z, state, g, W = experiment
    scale = torch.rand(len(z), generator=generator(seed)).tolist()
    scaled_g = g * torch.tensor(scale, dtype=g.dtype)[:, None]
    assert_same(step(*experiment, grad_scale=scale), step(rule, hyperparameters, z, state, scaled_g, W))


@properties
@given(experiments())
def test_nothing_is_changed_in_place(experiment):
    _, _, z, state, g, W = experiment
    tensors = [z, g, W, *state.values()]
    before = [tensor.clone() for tensor in tensors]
    new_z, new_state = step(*experiment)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert {new_z.data_ptr(), *(x.data_ptr() for x in new_state.values())}.isdisjoint(x.data_ptr() for x in tensors)


@properties
@given(experiments(), st.sampled_from([(), (2, 3), (1, 1, 2)]))
def test_every_shape_is_its_columns(experiment, shape):
    rule, hyperparameters, z, state, g, W = experiment
    columns = math.prod(shape)

    def shaped(x):
        return x[:, :1].expand(-1, columns).cumsum(1).reshape(-1, *shape)

    new_z, new_state = step(rule, hyperparameters, shaped(z), each(shaped, state), shaped(g), W)
    flat = [tensor.reshape(len(z), -1) for tensor in (shaped(z), shaped(g))]
    flat_state = each(lambda x: shaped(x).reshape(len(z), -1), state)
    flat_z, flat_new_state = step(rule, hyperparameters, flat[0], flat_state, flat[1], W)
    assert new_z.shape == (len(z), *shape)
    assert_same(
        (new_z, new_state), (flat_z.reshape(new_z.shape), each(lambda x: x.reshape(new_z.shape), flat_new_state))
    )


LOCAL_SGD = [
    ("dsgd", {}, {}),
    ("gut", {"mu": 0.9}, {}),
    ("d2", {}, {}),
    ("gradient_tracking", {}, {}),
    ("dsgdm", {"momentum": 0.9}, {"momentum": 0.9}),
    ("dsgdm", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    ("momentum_tracking", {"momentum": 0.9}, {"momentum": 0.9}),
    ("qg_gutm", {"momentum": 0.9, "mu": 0.0}, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("rule", "hyperparameters", "sgd"), LOCAL_SGD)
def test_without_mixing_it_is_local_sgd(rule, hyperparameters, sgd):
    weight_decay, z = 0.1, randn(3, 4, seed=0)
    state, parameter = zero_state(rule, z), torch.nn.Parameter(z.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, weight_decay=weight_decay, **sgd)
    for k in range(20):
        parameter.grad = randn(3, 4, seed=k)
        settings = {"lr": 0.1, "weight_decay": weight_decay, **hyperparameters}
        z, state = step(rule, settings, z, state, parameter.grad, torch.eye(3))
        optimizer.step()
    torch.testing.assert_close(z, parameter.data, rtol=1e-12, atol=1e-12)


BEHIND = "extra", "awc_gut", "gasloc"
"""The rules that move an agent by its own gradient behind the mixing."""


@pytest.mark.parametrize(("rule", "hyperparameters"), [each for each in SETTINGS if each[0] not in BEHIND])
def test_on_the_complete_graph_it_is_centralised(rule, hyperparameters):
    """Uniform weights average exactly, so all agents stay equal to one agent that has the mean gradient."""
    W = topology.complete(6).matrix()
    z = randn(1, 4, seed=0).expand(6, 4)
    one_z, state = z[:1], zero_state(rule, z)
    one_state = zero_state(rule, one_z)
    for k in range(20):
        g = randn(6, 4, seed=k)
        z, state = step(rule, {"lr": 0.1, **hyperparameters}, z, state, g, W)
        one_z, one_state = step(
            rule, {"lr": 0.1, **hyperparameters}, one_z, one_state, g.mean(0, keepdim=True), [[1.0]]
        )
        torch.testing.assert_close(z, one_z.expand(6, 4), rtol=1e-11, atol=1e-11)


# Precision, dtypes and special values


def test_drift_is_the_laplacian():
    S, W = randn(9, 4, seed=0), topology.torus(3, 3).matrix()
    torch.testing.assert_close(drift(S, W), W @ S - S, rtol=1e-13, atol=1e-14)


def test_drift_keeps_its_digits_near_consensus():
    S = 1 + 1e-5 * torch.rand(16, 50, generator=generator(0))
    W = topology.ring(16).matrix()
    exact = W @ S.double() - S.double()
    error_of_differences = (drift(S, W) - exact).abs().max() / exact.abs().max()
    error_of_products = (W.float() @ S - S - exact).abs().max() / exact.abs().max()
    assert error_of_differences < 1e-6
    assert error_of_products > 1e-3


def test_drift_uses_the_rows_of_an_asymmetric_w():
    S, W = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]])
    assert drift(S, W).tolist() == [[4.5], [0.0], [-24.75]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_kept(dtype):
    z, g, W = randn(4, 3, seed=0), randn(4, 3, seed=1), topology.ring(4).matrix()
    for rule in RULES:
        state = {name: randn(4, 3, seed=2) for name in RULES[rule].states}
        exact_z, exact_state = step(rule, {"lr": 0.5}, z, state, g, W)
        new_z, new_state = step(rule, {"lr": 0.5}, z.to(dtype), each(lambda x: x.to(dtype), state), g.to(dtype), W)
        for actual, exact in zip([new_z, *new_state.values()], [exact_z, *exact_state.values()], strict=True):
            assert actual.dtype == dtype
            assert (actual.double() - exact).abs().max() <= 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.float])
def test_w_may_be_anything_like_a_matrix(convert):
    z, W = randn(4, 3, seed=0), topology.from_matrix(torch.eye(4) * 0.5 + 0.125).matrix()
    assert_same(step("dsgd", {"lr": 0.1}, z, {}, z, convert(W)), step("dsgd", {"lr": 0.1}, z, {}, z, W))


def test_parameters_that_require_gradients_give_plain_tensors():
    z = randn(4, 3, seed=0).requires_grad_()
    new_z, _ = step("dsgd", {"lr": 0.1}, z, {}, z, torch.eye(4))
    assert not new_z.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_the_neighbours_alone(bad):
    z, g = randn(6, 2, seed=0), randn(6, 2, seed=1)
    g[2, 1] = bad
    new_z, new_state = step("gut", {"lr": 0.1}, z, zero_state("gut", z), g, topology.ring(6).matrix())
    spoiled = torch.zeros(6, 2, dtype=torch.bool)
    spoiled[1:4, 1] = True
    assert torch.equal(~new_z.isfinite(), spoiled)
    assert torch.equal(~new_state["r"].isfinite(), spoiled)


def test_zero_grad_scale_drops_a_gradient_that_is_not_finite():
    z, g = randn(3, 2, seed=0), randn(3, 2, seed=1)
    kept, spoiled = g.clone(), g.clone()
    kept[1], spoiled[1] = 0.0, math.nan
    dropped = step("gutm", {"lr": 0.1}, z, zero_state("gutm", z), spoiled, torch.eye(3), grad_scale=[1.0, 0.0, 1.0])
    assert_same(dropped, step("gutm", {"lr": 0.1}, z, zero_state("gutm", z), kept, torch.eye(3)))


def test_tensors_without_columns_pass():
    z = torch.zeros(3, 0)
    new_z, new_state = step("gut", {"lr": 0.1}, z, {"r": z}, z, torch.eye(3))
    assert new_z.shape == new_state["r"].shape == (3, 0)


def test_zero_state_is_like_z():
    z = torch.ones(3, 2, dtype=torch.bfloat16)
    state = zero_state("gutm", z)
    assert list(state) == ["m", "r"]
    assert all(value.dtype == z.dtype and torch.equal(value, torch.zeros_like(z)) for value in state.values())


Z = torch.ones(3, 2)
GOOD = {"rule": "gut", "hyperparameters": {"lr": 0.1}, "z": Z, "state": {"r": Z}, "grad": Z, "W": torch.eye(3)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rule": "gott"}, ValueError, "unknown rule 'gott'"),
        ({"hyperparameters": {"mu": 0.1}}, ValueError, r"hyperparameters must include 'lr', got \['mu'\]"),
        ({"hyperparameters": {"lr": math.nan}}, ValueError, r"lr=nan is outside \[0, inf\)"),
        ({"hyperparameters": {"lr": 0.1, "beta": 0.9}}, ValueError, "has no hyper-parameter 'beta'"),
        ({"hyperparameters": {"lr": 0.1, "mu": 2.0}}, ValueError, "mu=2.0 is outside"),
        ({"state": {}}, ValueError, r"state must have exactly \['r'\], got \[\]"),
        ({"state": {"r": Z, "m": Z}}, ValueError, r"state must have exactly \['r'\], got \['r', 'm'\]"),
        ({"state": {"r": Z[:2]}}, ValueError, r"r has shape \(2, 2\), z \(3, 2\)"),
        ({"grad": Z.T}, ValueError, r"grad has shape \(2, 3\), z \(3, 2\)"),
        ({"grad": Z.double()}, TypeError, "grad has dtype torch.float64; .* z has torch.float32"),
        ({"grad": None}, TypeError, "grad must be a tensor, got NoneType"),
        ({"grad": Z.to("meta")}, ValueError, "grad is on meta, z on cpu"),
        ({"state": {"r": [0.0] * 3}}, TypeError, "r must be a tensor, got list"),
        ({"z": [1.0]}, TypeError, "z must be a tensor, got list"),
        ({"z": Z.int()}, TypeError, "z has dtype torch.int32"),
        ({"z": torch.tensor(1.0)}, ValueError, r"z has shape \(\), z \(\); all must have one shape \[N, ...\]"),
        ({"z": Z[:0]}, ValueError, r"N >= 1 agents"),
        ({"W": torch.eye(4)}, ValueError, r"W has shape \(4, 4\), expected \(3, 3\) for 3 agents"),
        ({"W": torch.ones(3)}, ValueError, r"W has shape \(3,\), expected \(3, 3\)"),
        ({"W": np.full((3, 3), np.nan)}, ValueError, "W has entries that are not finite"),
        ({"grad_scale": [1.0, 2.0, math.inf]}, ValueError, "grad_scale has entries that are not finite"),
        ({"grad_scale": [1.0, 2.0]}, ValueError, r"grad_scale has shape \(2,\), expected \(3,\) for 3 agents"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        step(**{**GOOD, **changed})
