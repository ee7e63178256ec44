"""The predictions of `gut_fast.analysis` against runs of `reference.step` on quadratics."""

import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

import gut_fast as gf
from gut_fast import analysis, topology
from gut_fast.analysis.limits import stabilities_of
from gut_fast.analysis.periods import mixing_of
from gut_fast.analysis.transition import round_of, transitions
from gut_fast.reference import step
from gut_fast.rules import RULES, Coefficients, UpdateRule, get_rule
from products import covering


def averaged_gut(lr, mu=0.5, keep=0.7):
    """A user's rule: y = (1−k)(g + μr) + km;  S = z − ηy;  z' = S + D;  m' = y;  r' = μr − D/η."""
    new = 1 - keep
    return Coefficients(
        A=[[1, -lr * keep, -lr * new * mu, -lr * new]],
        B=[[0, 0, 0, 0], [0, keep, new * mu, new], [0, 0, mu, 0]],
        C=[[1], [0], [0]],
        E=[[1], [0], [-1 / lr]],
    )


OWN = UpdateRule("averaged_gut", ("m", "r"), averaged_gut)

GRAPHS = {
    "ring": topology.ring(16),
    "torus": topology.torus(4, 4),
    "lazy torus": topology.torus(4, 4).lazy(0.5),
    "star": topology.star(7),
}

SETTINGS = [
    ("dsgd", {}),
    ("gut", {"mu": 0.3}),
    ("gutm", {"momentum": 0.9, "mu": 0.2}),
    ("qg_gutm", {"momentum": 0.9, "mu": 0.05}),
    ("dsgdm", {"momentum": 0.8}),
    ("dsgdm", {"momentum": 0.5, "nesterov": True}),
    ("qg_dsgdm", {"momentum": 0.9}),
    ("qg_dsgdm", {"momentum": 0.5, "nesterov": True}),
    ("gradient_tracking", {}),
    ("momentum_tracking", {"momentum": 0.8}),
    ("qgt", {"momentum": 0.5, "mu": 0.2}),
    (OWN, {"mu": 0.3}),
    ("gut", {"mu": 0.9, "kappa": 0.3}),
    ("d2", {"kappa": 0.3}),
    ("edm", {"momentum": 0.5}),
    ("extra", {}),
    ("awc_gut", {"mu": 0.3}),
    ("decentlam", {"momentum": 0.5}),
    ("gasloc", {"momentum": 0.5}),
    ("k_gt", {}),
]


def name_of(value):
    return value.name if isinstance(value, UpdateRule) else None


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_step(rule, hyperparameters, W, curvature):
    """The matrices of `reference.step`: (z, states) of all agents [M N] becomes transition @ (z, states) + input @ s.

    The gradients are h z + s; the columns of the matrices are the steps from one-hot z, states and s.
    """
    num_rows = len(get_rule(rule).states) + 2
    z, *state, s = torch.eye(num_rows * len(W), dtype=torch.float64).view(num_rows, len(W), -1)
    state = dict(zip(get_rule(rule).states, state, strict=True))
    z, state = step(rule, hyperparameters, z, state, curvature * z + s, W)
    both = torch.stack([z, *state.values()]).reshape((num_rows - 1) * len(W), -1)
    return both[:, : -len(W)], both[:, -len(W) :]


def grows(rule, hyperparameters, W, curvature, num_steps=1200):
    """Whether a run from random models is larger at its end than in its middle."""
    transition, _ = one_step(rule, hyperparameters, W, curvature)
    transition, x = transition.numpy(), np.zeros(len(transition))
    x[: len(W)] = randn(len(W), seed=0)
    sizes = []
    for _ in range(num_steps):
        x = transition @ x
        sizes.append(math.sqrt(x @ x))
        if sizes[-1] > 1e100:
            return True
    return max(sizes[-60:]) > max(sizes[num_steps // 2 : num_steps // 2 + 60])


# Both sides of every limit


@pytest.mark.parametrize(
    ("rule", "mu", "name"),
    covering(["gut", "gutm", "qg_gutm", OWN], [0.1, 0.3, 0.36, 0.6, 0.9, 0.97], list(GRAPHS)),
    ids=name_of,
)
def test_the_verdict_is_that_of_a_run(rule, mu, name):
    hyperparameters = {"lr": 0.05, "mu": mu}
    predicted = analysis.stability(rule, hyperparameters, GRAPHS[name], curvature=1.0)
    assert abs(predicted.spectral_radius - 1) > 1e-4
    assert grows(rule, hyperparameters, GRAPHS[name].matrix(), 1.0) == (predicted.verdict == "unstable")


def test_the_torus_at_mu_09_is_among_the_unstable():
    assert analysis.stability("gut", {"mu": 0.9}, GRAPHS["torus"]).verdict == "unstable"
    assert grows("gut", {"lr": 0.05, "mu": 0.9}, GRAPHS["torus"].matrix(), 1.0)


@pytest.mark.parametrize(("name", "curvature"), [("ring", 0.5), ("lazy torus", 20.0)])
@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=name_of)
def test_the_learning_rate_limit_divides_runs_that_settle_from_runs_that_grow(rule, hyperparameters, curvature, name):
    limit = analysis.learning_rate_limit(rule, hyperparameters, GRAPHS[name], curvature)
    W = GRAPHS[name].matrix()
    assert not grows(rule, {**hyperparameters, "lr": 0.97 * limit}, W, curvature)
    assert grows(rule, {**hyperparameters, "lr": 1.03 * limit}, W, curvature)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_learning_rate_limits_that_are_known(beta):
    """Gradient descent has the limit 2/h, the heavy ball 2(1+β)/h."""
    alone = topology.ring(1)
    assert math.isclose(analysis.learning_rate_limit("gut", {}, GRAPHS["ring"], 4.0), 0.5, rel_tol=1e-6)
    for curvature in (1e-6, 4.0, 1e6):
        heavy_ball = analysis.learning_rate_limit("dsgdm", {"momentum": beta}, alone, curvature)
        assert math.isclose(heavy_ball, 2 * (1 + beta) / curvature, rel_tol=1e-6)


def test_without_a_stable_learning_rate_the_limit_is_nan():
    assert math.isnan(analysis.learning_rate_limit("gut", {"mu": 0.9}, GRAPHS["torus"]))


def test_a_rule_that_hardly_moves_has_no_learning_rate_limit():
    rule = UpdateRule("careful", (), lambda lr: Coefficients(A=[[1, -lr / (1 + lr)]], B=[[0, 0]], C=[[1]], E=[[1]]))
    assert analysis.learning_rate_limit(rule, {}, GRAPHS["ring"]) == math.inf


# Bias


@pytest.mark.parametrize(("rule", "hyperparameters", "name"), covering(SETTINGS, list(GRAPHS)), ids=name_of)
def test_the_bias_factor_is_the_ratio_of_disagreements_at_rest(rule, hyperparameters, name):
    """The runs are long, on f_i(z) = h/2 |z − b_i|², with an ηh so small that second order is below the tolerance.

    There is one column of b for every agent, so that all modes are driven alike.
    """
    W, lr, curvature = GRAPHS[name].matrix(), 0.1, 1e-5

    def disagreement(rule, hyperparameters):
        transition, inputs = one_step(rule, {**hyperparameters, "lr": lr}, W, curvature)
        offset, power = -curvature * inputs, transition
        for _ in range(26):  # doubles the number of steps
            offset, power = offset + power @ offset, power @ power
        z = offset[: len(W)]
        return float((z - z.mean(0)).norm())

    ratio = disagreement(rule, hyperparameters) / disagreement("dsgd", {})
    if not math.isfinite(ratio):  # there is no rest
        assert analysis.stability(rule, hyperparameters, GRAPHS[name]).verdict == "unstable"
        return
    predicted = analysis.bias_factor(rule, hyperparameters, GRAPHS[name])
    assert math.isclose(ratio, predicted, rel_tol=2e-3, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("rule", "hyperparameters", "factor"),
    [
        ("dsgd", {}, 1.0),
        ("gut", {"mu": 0.9}, 0.1),
        ("gut", {"mu": 1.0}, 0.0),
        ("gutm", {"mu": 0.8}, 0.2),
        ("qg_gutm", {"momentum": 0.9, "mu": 0.06}, 0.94 / 1.054),
        ("qg_dsgdm", {}, 1.0),
        ("qg_dsgdm", {"momentum": 0.5, "nesterov": True}, 1.5),
        ("dsgdm", {"momentum": 0.9}, 10.0),
        ("d2", {}, 0.0),
        ("gradient_tracking", {}, 0.0),
        ("momentum_tracking", {}, 0.0),
        ("qgt", {"momentum": 0.8, "mu": 0.2}, 1.0),
        ("qgt", {"momentum": 0.8, "mu": 1.0}, 0.2 / 0.84),
    ],
)
def test_bias_factors_that_are_known(rule, hyperparameters, factor):
    for graph, lr in itertools.product(GRAPHS.values(), (1e-4, 0.1)):
        found = analysis.bias_factor(rule, {**hyperparameters, "lr": lr, "weight_decay": 0.1}, graph)
        assert math.isclose(found, factor, rel_tol=1e-9, abs_tol=1e-9)


def test_the_bias_factor_of_a_graph_whose_spectrum_is_estimated():
    found = analysis.bias_factor("gut", {"mu": 0.9}, topology.random_regular(600, 4, seed=0))
    assert math.isclose(found, 0.1, rel_tol=1e-9)


def test_where_dsgd_has_no_bias_there_is_no_factor():
    for graph in (topology.complete(8), topology.ring(1)):
        assert math.isnan(analysis.bias_factor("gut", {}, graph))
    stubborn = UpdateRule("stubborn", (), lambda lr: Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[0.5]]))
    assert analysis.bias_factor(stubborn, {}, topology.complete(8)) == math.inf


def test_without_a_single_resting_point_there_is_no_factor():
    deaf = UpdateRule("deaf", (), lambda lr: Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[0]]))
    assert math.isnan(analysis.bias_factor(deaf, {}, GRAPHS["ring"]))


# Steps of the average


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=name_of)
def test_the_step_gain_is_the_velocity_under_a_steady_gradient(rule, hyperparameters):
    lr = 0.1
    transition, inputs = one_step(rule, {**hyperparameters, "lr": lr}, torch.ones(1, 1, dtype=torch.float64), 0.0)
    x = torch.zeros_like(inputs)
    for _ in range(3000):
        before, x = x, transition @ x + inputs
    gain = analysis.step_gain(rule, {**hyperparameters, "lr": lr, "weight_decay": 1.0, "maximize": True})
    assert math.isclose(float(before[0] - x[0]) / lr, gain, rel_tol=1e-9)


def test_step_gains_that_are_known():
    assert math.isclose(analysis.step_gain("qg_gutm", {"momentum": 0.9, "mu": 0.06}), 0.94 / 0.04)
    assert math.isclose(analysis.step_gain("momentum_tracking", {"momentum": 0.9}), 10.0)
    assert analysis.step_gain("qg_gutm", {"momentum": 0.9, "mu": 0.2}) == math.inf
    shrinking = UpdateRule("shrinking", (), lambda lr: Coefficients(A=[[0.5, -lr]], B=[[0, 0]], C=[[1]], E=[[1]]))
    assert math.isnan(analysis.step_gain(shrinking, {}))


# Noise


def simulated_noise(rule, hyperparameters, W, curvature, num_columns=1000):
    """The variance of the average and the disagreement: their means over independent columns, and standard errors."""
    generator = torch.Generator().manual_seed(0)
    transition, inputs = one_step(rule, hyperparameters, W, curvature)
    x, samples = torch.zeros(len(transition), num_columns, dtype=torch.float64), []
    for k in range(160):
        noise = torch.randn(len(W), num_columns, dtype=torch.float64, generator=generator)
        x = transition @ x + inputs @ noise
        if k >= 120:
            z = x[: len(W)]
            samples.append(torch.stack([z.mean(0) ** 2, z.var(0, correction=0)]))
    columns = torch.stack(samples).mean(0)  # averages over steps of one column are independent of those of another
    return columns.mean(1), columns.std(1) / math.sqrt(num_columns)


@pytest.mark.parametrize(("rule", "hyperparameters"), [*SETTINGS, ("d2", {})], ids=name_of)
def test_variances_under_noise_are_those_of_a_simulation(rule, hyperparameters):
    """The tolerance is four standard errors, which one in 16,000 correct predictions exceeds."""
    ring = topology.ring(8)
    hyperparameters, curvature = {**hyperparameters, "lr": 0.1}, 2.0
    assert analysis.stability(rule, hyperparameters, ring, curvature).spectral_radius ** 120 < 0.06
    found, error = simulated_noise(rule, hyperparameters, ring.matrix(), curvature)
    predicted = analysis.noise(rule, hyperparameters, ring, curvature)
    assert abs(found[0] - predicted.average) < 4 * error[0]
    assert abs(found[1] - predicted.disagreement) < 4 * error[1]
    assert (error < 0.05 * found).all()


def test_noise_of_dsgd_is_that_of_the_formula():
    """The average has η/(h (2 − ηh) N), the disagreement the mean of (λη)²/(1 − λ²(1 − ηh)²)."""
    ring, lr, h = GRAPHS["ring"], 0.2, 0.5
    found = analysis.noise("dsgd", {"lr": lr}, ring, curvature=h)
    eigenvalues = ring.eigenvalues.numpy()[1:]
    spread = (eigenvalues * lr) ** 2 / (1 - (eigenvalues * (1 - lr * h)) ** 2)
    assert math.isclose(found.average, lr / (h * (2 - lr * h) * 16), rel_tol=1e-9)
    assert math.isclose(found.disagreement, spread.sum() / 16, rel_tol=1e-9)
    decayed = analysis.noise("dsgd", {"lr": lr, "weight_decay": h}, ring, curvature=0.0)
    assert math.isclose(decayed.average, found.average, rel_tol=1e-9)


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS, ids=name_of)
def test_noise_amplification_depends_on_lr_times_curvature_and_tends_to_the_step_gain(rule, hyperparameters):
    ring = GRAPHS["ring"]
    found = analysis.noise_amplification(rule, {**hyperparameters, "lr": 0.1}, ring, curvature=1.0)
    scaled = analysis.noise_amplification(rule, {**hyperparameters, "lr": 1e-3}, ring, curvature=100.0)
    assert math.isclose(scaled.average, found.average, rel_tol=1e-6)
    assert math.isclose(scaled.disagreement, found.disagreement, rel_tol=1e-6)
    flat = analysis.noise_amplification(rule, hyperparameters, ring, curvature=0.0).average
    nearly = analysis.noise_amplification(rule, hyperparameters, ring, curvature=1e-6).average
    assert flat == analysis.step_gain(rule, hyperparameters)
    assert math.isclose(nearly, flat, rel_tol=1e-3)


def test_noise_where_there_is_none_or_no_end_of_it():
    assert analysis.noise("gut", {"mu": 0.9, "lr": 0.1}, GRAPHS["torus"]).disagreement == math.inf
    assert analysis.noise("dsgd", {}, GRAPHS["ring"], curvature=0.0).average == math.inf
    assert math.isnan(analysis.noise_amplification("gut", {"lr": 0.1}, topology.complete(8)).disagreement)


def test_noise_of_a_directed_ring_is_simulated_and_of_a_matrix_that_is_not_normal_unknown():
    with pytest.warns(UserWarning, match="asymmetric"):
        ring = topology.from_matrix(torch.eye(5).roll(1, dims=1) * 0.6 + torch.eye(5) * 0.4)
    found, error = simulated_noise("gut", {"lr": 0.1, "mu": 0.3}, ring.matrix(), 2.0)
    predicted = analysis.noise("gut", {"lr": 0.1, "mu": 0.3}, ring, 2.0)
    assert abs(found[1] - predicted.disagreement) < 4 * error[1]


def test_of_a_pair_of_conjugate_eigenvalues_one_is_kept():
    with pytest.warns(UserWarning, match="asymmetric"):
        ring = topology.from_matrix(torch.eye(7).roll(1, dims=1) * 0.7 + torch.eye(7) * 0.3)
    mixing, eigenvalues = mixing_of(ring), ring.eigenvalues[1:].numpy()
    assert len(mixing.eigenvalues) == 3
    assert np.allclose(mixing.weights, 2 / 7)
    for name, rule in RULES.items():
        (found,) = stabilities_of([round_of(name, rule.hyperparameters)], mixing)
        assert found.consensus_rate == pytest.approx(np.abs(analysis.modes(name, {}, eigenvalues)).max(), rel=1e-9)


def test_what_is_known_where_w_is_not_normal_and_does_not_keep_the_mean():
    with pytest.warns(UserWarning, match="asymmetric"):
        skewed = topology.from_matrix([[0.5, 0.5, 0], [0.2, 0.5, 0.3], [0, 0.5, 0.5]])
    noise = analysis.noise("gut", {"mu": 0.3}, skewed)
    assert math.isnan(noise.average)
    assert math.isnan(noise.disagreement)
    assert math.isnan(analysis.noise_amplification("gut", {"mu": 0.3}, skewed).average)
    assert math.isclose(analysis.bias_factor("gut", {"mu": 0.3}, skewed), 0.7)
    damped = UpdateRule("damped", (), lambda lr: Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[0.5]]))
    assert math.isnan(analysis.bias_factor(damped, {}, skewed))
    assert math.isfinite(analysis.bias_factor(damped, {}, GRAPHS["ring"]))


def test_means_over_a_spectrum_that_is_estimated():
    """The graph is too large for dense linear algebra; its exact eigenvalues give the expected mean."""
    large, lr, h = topology.random_regular(700, 4, seed=0), 0.1, 1.0
    eigenvalues = large.eigenvalues.numpy()[1:]
    exact = ((eigenvalues * lr) ** 2 / (1 - (eigenvalues * (1 - lr * h)) ** 2)).sum() / 700
    assert math.isclose(analysis.noise("dsgd", {"lr": lr}, large, h).disagreement, exact, rel_tol=0.1)


# The choice of μ


def costs(rule, hyperparameters, graph):
    """The time that disagreement lasts and the step of the average, both over those without tracking."""
    with_mu, without = (
        (1 / (1 - analysis.stability(rule, values, graph).consensus_rate), analysis.step_gain(rule, values))
        for values in (hyperparameters, {**hyperparameters, "mu": 0.0})
    )
    return with_mu[0] / without[0], with_mu[1] / without[1]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    ("rule", "others"),
    [("gut", {}), ("gutm", {"momentum": 0.9}), ("qg_gutm", {"momentum": 0.9}), (OWN, {})],
    ids=name_of,
)
def test_auto_mu_is_the_largest_that_costs_no_more_than_a_factor_of_two(rule, others, name):
    graph = GRAPHS[name]
    mu = analysis.auto_mu(rule, graph, {**others, "lr": 0.1})
    assert mu == round(mu, 3) > 0
    assert max(costs(rule, {**others, "mu": mu}, graph)) <= 2.0001
    assert mu >= 0.998 or max(costs(rule, {**others, "mu": mu + 0.002}, graph)) > 2
    assert not grows(rule, {**others, "lr": 0.05, "mu": mu}, graph.matrix(), 1.0)


def test_auto_mu_of_the_usual_graphs():
    found = {name: analysis.auto_mu("gut", graph) for name, graph in GRAPHS.items()}
    assert found == {"ring": 0.949, "torus": 0.148, "lazy torus": 0.999, "star": 0.999}
    assert 0.04 < analysis.auto_mu("qg_gutm", GRAPHS["ring"]) < 0.06
    assert analysis.auto_mu("gut", topology.ring(50_000)) == 0.999


def test_a_parameter_group_or_a_constructor_takes_auto():
    parameters = [torch.nn.Parameter(torch.zeros(16, 3)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "mu": 0.2}]
    optimizer = gf.GUTm(groups, lr=0.1, momentum=0.5, mu="auto", topology=GRAPHS["ring"])
    assert optimizer.defaults["mu"] == analysis.auto_mu("gutm", GRAPHS["ring"], {"momentum": 0.5})
    assert [group["mu"] for group in optimizer.param_groups] == [optimizer.defaults["mu"], 0.2]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(16))], "momentum": 0.9, "mu": "auto"})
    assert optimizer.param_groups[2]["mu"] == analysis.auto_mu("gutm", GRAPHS["ring"], {"momentum": 0.9})
    for parameter in (entry for group in optimizer.param_groups for entry in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameters[0].isfinite().all()


@pytest.mark.parametrize(
    ("rule", "graph", "message", "error"),
    [
        ("dsgd", GRAPHS["ring"], "'?dsgd'?(: unexpected keyword argument| has no hyper-parameter) 'mu'", TypeError),
    ],
)
def test_where_auto_cannot_choose_it_says_why(rule, graph, message, error):
    with pytest.raises(ValueError, match=message):
        analysis.auto_mu(rule, graph)
    parameter = torch.nn.Parameter(torch.zeros(graph.num_agents, 2))
    with pytest.raises(error, match=message):
        gf.GossipOptimizer([parameter], rule, lr=0.1, mu="auto", topology=graph)


def test_auto_without_a_stable_mu_and_other_words():
    repels = UpdateRule("repels", (), lambda lr, mu=0.0: Coefficients([[1, -lr]], [[0, 0]], [[1]], [[-1]]))
    with pytest.raises(ValueError, match="no mu is stable on ring"):
        analysis.auto_mu(repels, GRAPHS["ring"])
    parameter = torch.nn.Parameter(torch.zeros(16, 2))
    with pytest.raises(TypeError, match="mu must be a number, got str 'best'"):
        gf.GUT([parameter], lr=0.1, mu="best", topology=GRAPHS["ring"])


# All in one


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS[::5], ids=name_of)
def test_predict_gathers_what_the_functions_say(rule, hyperparameters):
    graph, values = GRAPHS["ring"], {**hyperparameters, "lr": 0.2, "weight_decay": 0.01}
    found = analysis.predict(rule, values, graph, curvature=3.0)
    assert found.stability == analysis.stability(rule, values, graph)
    assert found.learning_rate_limit == analysis.learning_rate_limit(rule, values, graph, 3.0)
    assert found.bias_factor == analysis.bias_factor(rule, values, graph)
    assert found.step_gain == analysis.step_gain(rule, values)
    assert found.noise == analysis.noise_amplification(rule, values, graph, 3.0)
    assert (found.rule, found.topology, found.curvature) == (get_rule(rule).name, "ring(16)", 3.0)
    has_mu = "mu" in get_rule(rule).hyperparameters
    assert found.mu_limit == (analysis.stability_limit(rule, graph, values) if has_mu else None)
    assert found.auto_mu == (analysis.auto_mu(rule, graph, values) if has_mu else None)
    assert pickle.loads(pickle.dumps(found)) == found


def test_predict_takes_auto():
    found = analysis.predict("gut", {"mu": "auto"}, GRAPHS["ring"])
    assert found.hyperparameters == {"mu": found.auto_mu, "kappa": 1.0}
    assert math.isclose(found.bias_factor, 1 - found.auto_mu)


def test_predictions_of_large_structured_graphs():
    found = analysis.predict("gut", {"mu": 0.9, "lr": 0.1}, topology.torus(50, 50).lazy(0.5))
    assert found.stability.verdict == "stable"
    assert math.isclose(found.bias_factor, 0.1, rel_tol=1e-6)


@pytest.mark.parametrize("function", [analysis.predict, analysis.learning_rate_limit])
def test_bad_input_is_named(function):
    for curvature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="curvature must be positive and finite"):
            function("gut", {}, GRAPHS["ring"], curvature)
    with pytest.raises(ValueError, match="'gut' has no hyper-parameter 'beta'"):
        function("gut", {"beta": 0.9}, GRAPHS["ring"])


def test_every_rule_is_covered_here():
    assert {name for name, _ in SETTINGS if isinstance(name, str)} == RULES.keys()


@pytest.mark.parametrize("local_steps", [2, 3, 6, 13])
@pytest.mark.parametrize("name", ["gut", "gutm", "qgt", "k_gt", "edm"])
def test_a_round_is_its_steps_one_after_the_other(name, local_steps):
    rule, curvature, eigenvalue = get_rule(name), 0.3, 0.6
    (local,), (push,) = transitions(rule.coefficients(0.1, is_local=True), [1.0], curvature)
    (mixing,), (last_push,) = transitions(rule.coefficients(0.1, drift_lr=0.1 * local_steps), [eigenvalue], curvature)
    expected = mixing @ np.linalg.matrix_power(local, local_steps - 1)
    pushes = [mixing @ np.linalg.matrix_power(local, left) @ push for left in reversed(range(local_steps - 1))]
    found, inputs = round_of(name, {"lr": 0.1}, curvature, local_steps).at(np.array([[eigenvalue]]))
    assert np.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert np.allclose(inputs, np.stack([*pushes, last_push], axis=1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_a_round_may_have_a_million_steps(name):
    """As who averages once, at the end, may say: the analysis of the constructor goes on as many."""
    parameter = torch.nn.Parameter(torch.zeros(16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rules are unstable at such rounds
        optimizer = gf.GossipOptimizer([parameter], name, topology=GRAPHS["ring"], local_steps=10**6)
    parameter.grad = torch.ones(16, 3)
    optimizer.step()
    assert optimizer.num_rounds == 0
    assert parameter.abs().min() > 0


def test_predictions_of_long_rounds_see_that_rates_beyond_the_limit_overflow():
    found = analysis.predict("gut", {"lr": 0.1, "mu": 0.5}, GRAPHS["ring"], local_steps=10_000)
    assert found.learning_rate_limit == pytest.approx(2.0, abs=1e-6)
    assert found.mu_limit == pytest.approx(1.0, abs=1e-3)
