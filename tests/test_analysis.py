"""Predicted modes, rates, limits and advice against simulations with `reference.step`."""

import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from gut_fast import topology
from gut_fast.analysis import Stability, advice, averaging_rate_limit, modes, stability, stability_limit
from gut_fast.reference import step, zero_state
from gut_fast.rules import RULES, Coefficients, Interval, UpdateRule, get_rule
from products import covering

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    DIRECTED = topology.from_matrix(torch.eye(5).roll(1, dims=1) * 0.6 + torch.eye(5) * 0.4)

STATIC = {
    "ring(16)": topology.ring(16),
    "torus(4, 4)": topology.torus(4, 4),
    "star(6)": topology.star(6),
    "dyck": topology.dyck(),
    "random": topology.erdos_renyi(9, 0.4, seed=2),
    "directed": DIRECTED,
}

SETTINGS = [
    ("dsgd", {}),
    ("gut", {"mu": 0.6}),
    ("gut", {"mu": 1.0}),
    ("gutm", {"momentum": 0.9, "mu": 0.8}),
    ("gutm", {"momentum": 0.5, "mu": 0.2}),
    ("d2", {}),
    ("qg_gutm", {"momentum": 0.9, "mu": 0.06}),
    ("qg_gutm", {"momentum": 0.5, "mu": 0.8}),
    ("dsgdm", {"momentum": 0.9}),
    ("dsgdm", {"momentum": 0.5, "nesterov": True}),
    ("qg_dsgdm", {"momentum": 0.9}),
    ("qg_dsgdm", {"momentum": 0.5, "nesterov": True}),
    ("gradient_tracking", {}),
    ("momentum_tracking", {"momentum": 0.9}),
    ("qgt", {"momentum": 0.5, "mu": 0.2}),
    ("gut", {"mu": 1.0, "kappa": 0.3}),
    ("d2", {"kappa": 0.5}),
    ("edm", {"momentum": 0.5}),
    ("extra", {}),
    ("awc_gut", {"mu": 0.6}),
    ("decentlam", {"momentum": 0.5}),
    ("gasloc", {"momentum": 0.5}),
    ("k_gt", {}),
]


def one_step_matrix(rule, hyperparameters, W, curvature=0.0):
    """The linear map of one step on (z, states) of all agents, where every agent has the gradient curvature · z."""
    num_rows = len(get_rule(rule).states) + 1
    z, *state = torch.eye(num_rows * len(W), dtype=torch.float64).view(num_rows, len(W), -1)
    state = dict(zip(get_rule(rule).states, state, strict=True))
    new_z, new_state = step(rule, {"lr": 1.0, **hyperparameters}, z, state, curvature * z, W)
    return torch.stack([new_z, *new_state.values()]).reshape(num_rows * len(W), -1)


def disagreement_rate(rule, hyperparameters, W, curvature=0.0):
    """The growth per step of the disagreement between agents over 2048 steps, for the worst start.

    The columns of W sum to one, so that disagreement, the part orthogonal to the mean, moves by itself.
    """
    complement = torch.linalg.qr(torch.eye(len(W), dtype=torch.float64) - 1 / len(W)).Q[:, : len(W) - 1]
    basis = torch.block_diag(*[complement] * (len(get_rule(rule).states) + 1))
    power = basis.T @ one_step_matrix(rule, hyperparameters, W, curvature) @ basis
    log_size = 0.0
    for _ in range(11):
        power = power @ power
        log_size = 2 * log_size + math.log(power.norm())
        power = power / power.norm()
    return math.exp(log_size / 2**11)


def average_rate(rule, hyperparameters, curvature):
    """The decay per step of a single agent, which moves as the average does, from z = 1 and zero state."""
    z = torch.ones(1, 1, dtype=torch.float64)
    state, sizes = zero_state(rule, z), []
    for _ in range(240):
        z, state = step(rule, {"lr": 1.0, **hyperparameters}, z, state, curvature * z, [[1.0]])
        sizes.append(math.hypot(float(z), *map(float, state.values())))
    return (max(sizes[-30:]) / max(sizes[90:120])) ** (1 / 120)  # the largest of 30 steps, as modes may turn


# Modes


@pytest.mark.parametrize(("rule", "hyperparameters", "name"), covering(SETTINGS, ["torus(4, 4)", "random", "directed"]))
def test_modes_are_the_eigenvalues_of_one_step_of_all_agents(rule, hyperparameters, name):
    """The two multisets agree in all power sums."""
    hyperparameters, curvature = {"lr": 0.7, "weight_decay": 0.1, **hyperparameters}, 0.3
    predicted = modes(rule, hyperparameters, STATIC[name].eigenvalues.numpy(), curvature).flatten()
    matrix = one_step_matrix(rule, hyperparameters, STATIC[name].matrix(), curvature)
    assert len(predicted) == len(matrix)
    power = torch.eye(len(matrix), dtype=torch.float64)
    for k in range(1, 13):
        power = power @ matrix
        expected = complex((predicted**k).sum())
        assert abs(power.trace() - expected) < 1e-9 * (1 + np.abs(predicted**k).sum())


def test_modes_of_gut_solve_the_quadratic():
    found = np.sort(modes("gut", {"mu": 0.2}, 0.9).real)
    np.testing.assert_allclose(found, np.sort(np.roots([1, -0.9 * 1.2, 0.2 * 0.9])))


def test_modes_of_one_eigenvalue_and_of_many():
    assert modes("gutm", {}, 0.5).shape == (3,)
    assert modes("gutm", {}, np.zeros((4, 2))).shape == (4, 2, 3)
    assert modes("dsgd", {}, 0.5).dtype == complex


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS)
def test_at_zero_curvature_the_learning_rate_does_not_matter(rule, hyperparameters):
    predicted = stability(rule, hyperparameters, STATIC["dyck"])
    for lr in (0.0, 1e-4, 0.1):
        other = stability(rule, {"lr": lr, **hyperparameters}, STATIC["dyck"])
        assert math.isclose(other.consensus_rate, predicted.consensus_rate, rel_tol=1e-6)
        assert math.isclose(other.average_rate, predicted.average_rate, rel_tol=1e-6, abs_tol=1e-9)


# Rates


@pytest.mark.parametrize(("curvature", "rule", "hyperparameters", "name"), covering([0.0, 0.3], SETTINGS, list(STATIC)))
def test_consensus_rate_is_the_simulated_one(rule, hyperparameters, name, curvature):
    predicted = stability(rule, hyperparameters, STATIC[name], curvature).consensus_rate
    simulated = disagreement_rate(rule, hyperparameters, STATIC[name].matrix(), curvature)
    assert math.isclose(simulated, predicted, rel_tol=5e-3)


@pytest.mark.parametrize(("rule", "hyperparameters"), SETTINGS)
def test_average_rate_under_curvature_is_the_simulated_one(rule, hyperparameters):
    """Directions that gradients never reach from zero state, such as the mean of r at μ = 1, do not count."""
    predicted = stability(rule, hyperparameters, STATIC["random"], curvature=0.1).average_rate
    assert math.isclose(average_rate(rule, hyperparameters, curvature=0.1), predicted, rel_tol=2e-2)


@pytest.mark.parametrize(
    ("rule", "hyperparameters", "rate"),
    [
        ("dsgd", {}, 0.0),
        ("gut", {"mu": 0.9}, 0.0),
        ("gut", {"mu": 1.0}, 0.0),
        ("d2", {}, 0.0),
        ("gradient_tracking", {}, 0.0),
        ("dsgdm", {"momentum": 0.9}, 0.9),
        ("momentum_tracking", {"momentum": 0.8}, 0.8),
        ("qg_dsgdm", {"momentum": 0.9}, 0.99),
        ("gutm", {"momentum": 0.9, "mu": 0.8}, 0.99),
        ("gutm", {"momentum": 0.9, "mu": 1.0}, 0.99),
        ("qg_gutm", {"momentum": 0.9, "mu": 0.06}, 0.96),
        ("qg_gutm", {"momentum": 0.9, "mu": 0.2}, 1.1),
    ],
)
def test_the_average_rate_is_the_momentum_of_the_average(rule, hyperparameters, rate):
    for static in (topology.ring(1), topology.ring(5)):
        assert math.isclose(stability(rule, hyperparameters, static).average_rate, rate, abs_tol=1e-9)


def test_curvature_and_weight_decay_contract_the_average():
    ring = topology.ring(5)
    assert math.isclose(stability("dsgd", {"lr": 0.1}, ring, curvature=2.0).average_rate, 0.8)
    assert math.isclose(stability("dsgd", {"lr": 0.1, "weight_decay": 2.0}, ring).average_rate, 0.8)
    assert math.isclose(stability("dsgd", {"lr": 0.1}, ring, curvature=30.0).average_rate, 2.0)
    assert math.isclose(stability("dsgd", {"lr": 0.1, "maximize": True}, ring, curvature=2.0).average_rate, 1.2)


def test_one_agent_has_no_consensus_modes():
    assert stability("gut", {}, topology.ring(1)) == Stability(0.0, 0.0, 1.0)


def scaled(lr, factor=0.5):
    """The rule z' = factor · (z − ηg) + D, under which a translation of all agents is not free."""
    return Coefficients(A=[[factor, -factor * lr]], B=[[0, 0]], C=[[1]], E=[[1]])


@pytest.mark.parametrize("factor", [-0.5, 0.5, 1.0, 1.2])
def test_a_rule_of_ones_own_that_moves_a_translation(factor):
    rule = UpdateRule("scaled", (), scaled)
    predicted = stability(rule, {"factor": factor}, topology.complete(4))
    assert math.isclose(predicted.average_rate, 0.0 if factor == 1.0 else abs(factor))
    assert math.isclose(predicted.consensus_rate, 0.0, abs_tol=1e-12)


# Verdicts


def test_verdicts_and_the_worst_eigenvalue():
    torus = topology.torus(4, 4)
    unstable = stability("gut", {"mu": 0.9}, torus)
    assert (unstable.verdict, round(unstable.worst_eigenvalue, 12)) == ("unstable", -0.6)
    assert math.isclose(unstable.spectral_radius, 1.5)
    assert stability("gut", {"mu": 0.9}, torus.lazy(0.5)).verdict == "stable"
    assert stability("gut", {"mu": 1 / 3}, torus).verdict == "marginal"
    assert stability("d2", {}, topology.ring(16)).verdict == "marginal"
    assert stability("d2", {}, topology.ring(15)).verdict == "stable"
    average = stability("qg_gutm", {"momentum": 0.9, "mu": 0.1}, topology.petersen())
    assert (average.verdict, average.worst_eigenvalue) == ("marginal", 1.0)


def test_stability_is_immutable_and_pickles():
    result = stability("gut", {}, topology.ring(4))
    with pytest.raises(AttributeError):
        result.consensus_rate = 0.0
    assert pickle.loads(pickle.dumps(result)) == result


# Limits


WITH_MU = [("gut", {}), ("gutm", {"momentum": 0.9}), ("gutm", {"momentum": 0.5}), ("qg_gutm", {"momentum": 0.5})]


@pytest.mark.parametrize("name", ["ring(16)", "torus(4, 4)"])
@pytest.mark.parametrize(("rule", "others"), WITH_MU)
def test_the_mu_limit_divides_runs_that_settle_from_runs_that_grow(rule, others, name):
    limit = stability_limit(rule, STATIC[name], others)
    assert settles(rule, {**others, "mu": limit - 0.02}, STATIC[name].matrix())
    if limit < 1:
        assert not settles(rule, {**others, "mu": limit + 0.02}, STATIC[name].matrix())


def settles(rule, hyperparameters, W):
    """Whether, after a shock of random gradients, disagreement and the states' averages shrink between two times."""
    generator = torch.Generator().manual_seed(0)
    z = torch.zeros(len(W), 1, dtype=torch.float64)
    state, sizes = zero_state(rule, z), []
    for _ in range(3):
        g = torch.randn(z.shape, dtype=z.dtype, generator=generator)
        z, state = step(rule, {"lr": 1.0, **hyperparameters}, z, state, g, W)
    x = torch.cat([z, *state.values()]).numpy()
    transition = one_step_matrix(rule, hyperparameters, W).numpy()
    for _ in range(300):
        x = transition @ x
        z, states = np.split(x, [len(W)])
        sizes.append(math.hypot(np.linalg.norm(z - z.mean()), np.linalg.norm(states)))
    return max(sizes[-20:]) < max(sizes[100:120])


def test_without_a_stable_value_the_limit_is_nan():
    """Quasi-global momentum does not settle on a directed ring, whose eigenvalues are complex."""
    assert math.isnan(stability_limit("qg_gutm", STATIC["directed"], {"momentum": 0.5}))
    assert not settles("qg_gutm", {"momentum": 0.5, "mu": 0.0}, STATIC["directed"].matrix())


@pytest.mark.parametrize("name", ["torus(4, 4)", "dyck"])
@pytest.mark.parametrize(
    ("rule", "hyperparameters"), [("gut", {"mu": 1.0}), ("gutm", {"momentum": 0.9, "mu": 0.95}), ("d2", {})]
)
def test_the_averaging_rate_limit_divides_runs_that_settle_from_runs_that_grow(rule, hyperparameters, name):
    gamma = averaging_rate_limit(rule, hyperparameters, STATIC[name])
    assert disagreement_rate(rule, hyperparameters, STATIC[name].lazy(gamma - 0.01).matrix()) < 0.999
    assert disagreement_rate(rule, hyperparameters, STATIC[name].lazy(gamma + 0.01).matrix()) > 1.001


def test_where_no_averaging_rate_helps_its_limit_is_nan():
    assert math.isnan(averaging_rate_limit("qg_gutm", {"momentum": 0.9, "mu": 0.2}, STATIC["ring(16)"]))


@pytest.mark.parametrize(
    ("static", "limit"),
    [(topology.torus(4, 8), 1 / 3), (topology.dyck(), 1 / 2), (topology.ring(16), 1.0), (topology.petersen(), 1.0)],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_limit_of_gut_is_that_of_the_formula(static, limit):
    """The formula λ_min > −1/(1+2μ) gives the limits of μ and of the averaging rate."""
    assert math.isclose(stability_limit("gut", static), limit, rel_tol=1e-6)
    gamma = averaging_rate_limit("gut", {"mu": 0.9}, static)
    assert math.isclose(gamma, min(1.0, (1 + 1 / 2.8) / (1 - static.lambda_min)), rel_tol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_limit_of_qg_gutm_is_the_momentum_of_the_average(beta):
    assert math.isclose(stability_limit("qg_gutm", topology.torus(4, 4), {"momentum": beta}), 1 - beta, rel_tol=1e-6)
    limit = stability_limit("qg_gutm", topology.petersen(), {"mu": 1 - beta}, name="momentum")
    assert math.isclose(limit, beta, rel_tol=1e-6)


def test_momentum_of_dsgdm_is_stable_up_to_the_end_of_its_domain():
    assert stability_limit("dsgdm", topology.ring(8), name="momentum") == math.nextafter(1.0, 0.0)


def test_the_limit_is_where_the_first_stable_interval_ends():
    def islands(lr, a=0.0):
        factor = 2.0 if 0.3 < a < 0.6 else 0.5
        return Coefficients(A=[[factor, -lr]], B=[[0, 0]], C=[[1]], E=[[1]])

    rule = UpdateRule("islands", (), islands, {"a": Interval(0.0, 1.0)})
    assert math.isclose(stability_limit(rule, topology.ring(4), name="a"), 0.3, abs_tol=1e-9)


# Large graphs


def test_large_graphs_are_judged_by_the_ends_of_their_spectrum():
    regular = topology.random_regular(700, 4, seed=0)
    exact = (1 / -regular.lambda_min - 1) / 2
    assert math.isclose(stability_limit("gut", regular), exact, abs_tol=2e-3)
    assert math.isclose(stability("dsgd", {}, regular).consensus_rate, regular.lambda_2, abs_tol=1e-3)


def test_large_graphs_with_few_eigenvalues():
    star = topology.star(600)
    assert math.isclose(stability("dsgd", {}, star).consensus_rate, 1 - 1 / 600, rel_tol=1e-9)
    assert stability("gut", {"mu": 1.0}, star).verdict == "stable"


def test_large_structured_graphs_are_exact():
    ring = topology.ring(4096)
    assert stability("dsgd", {}, ring).consensus_rate == ring.lambda_2 > 1 - 1e-6
    assert stability("d2", {}, topology.torus(64, 64)).verdict == "unstable"


# Advice


@pytest.mark.parametrize(
    ("rule", "hyperparameters", "name"),
    [
        ("gut", {"mu": 0.9}, "ring(16)"),
        ("d2", {}, "ring(16)"),
        ("gut", {"mu": 0.3}, "torus(4, 4)"),
        ("gutm", {"momentum": 0.9, "mu": 0.8}, "ring(16)"),
        ("qg_gutm", {"momentum": 0.9, "mu": 0.06}, "torus(4, 4)"),
        ("dsgdm", {"momentum": 0.9, "nesterov": True}, "directed"),
    ],
)
def test_no_advice_where_nothing_is_unstable(rule, hyperparameters, name):
    assert advice(rule, {"lr": 0.1, **hyperparameters}, STATIC[name]) is None


def test_advice_on_gut_says_the_mode_and_both_limits():
    assert advice("gut", {"lr": 0.1, "mu": 0.9}, topology.torus(4, 4)) == (
        "mu=0.9, kappa=1 is unstable on torus(4, 4): the mode at W's eigenvalue -0.6 grows 1.5-fold a step; "
        "use topology.lazy(gamma) with gamma <= 0.848 or mu <= 0.333 or kappa <= 0.54"
    )


def test_advice_on_a_rule_without_hyperparameters_says_the_averaging_rate():
    assert advice("d2", {}, topology.dyck()) == (
        "kappa=1 is unstable on dyck(): the mode at W's eigenvalue -0.5 grows 1.366-fold a step; "
        "use topology.lazy(gamma) with gamma <= 0.888 or kappa <= 0.666"
    )


def test_advice_on_qg_gutm_says_the_momentum_of_the_average():
    assert advice("qg_gutm", {"lr": 0.1, "momentum": 0.95, "mu": 0.06}, topology.ring(16)) == (
        "momentum=0.95, mu=0.06 is unstable: the average over agents moves with momentum 1.01, "
        "which must stay below 1; use mu <= 0.049 or momentum <= 0.939"
    )
    at_limit = advice("qg_gutm", {"momentum": 0.9, "mu": 0.1}, topology.ring(16))
    assert "moves with momentum 1, which must stay below 1; use mu <= 0.099 or momentum <= 0.899" in at_limit


def test_advice_on_a_time_varying_topology_names_the_growth_of_a_period_and_kappa():
    found = advice("gut", {"lr": 0.1}, topology.one_peer_exponential(16))
    assert found == (
        "mu=0.9, kappa=1 is unstable on one_peer_exponential(16): the disagreement between agents grows 1.25-fold a "
        "step; use topology.lazy(gamma) with gamma <= 0.697 or mu <= 0.543 or kappa <= 0.542"
    )
    assert advice("gut", {"mu": 1.0, "kappa": 0.1}, topology.random_matching(8, seed=0)) is None


def test_advice_where_no_value_helps_is_another_topology():
    """The rule is unstable at the low end of every range: its modes at λ < 1 grow for every averaging rate."""

    def repels(lr):
        return Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[-1]])

    found = advice(UpdateRule("repels", (), repels), {}, topology.ring(4))
    assert found.endswith("; use another topology")


@pytest.mark.parametrize("name", ["torus(4, 4)", "dyck", "ring(16)", "random"])
@pytest.mark.parametrize(
    ("rule", "hyperparameters"),
    [
        ("gut", {"mu": 1.0}),
        ("d2", {}),
        ("gutm", {"momentum": 0.9, "mu": 0.95}),
        ("gutm", {"momentum": 0.0, "mu": 0.9}),
        ("qg_gutm", {"momentum": 0.5, "mu": 0.6}),
    ],
)
def test_every_value_that_advice_names_is_stable(rule, hyperparameters, name):
    static = STATIC[name]
    unstable = stability(rule, hyperparameters, static).verdict == "unstable"
    found = advice(rule, hyperparameters, static)
    assert (found is not None) == unstable
    for parameter, value in re.findall(r"(\w+) <= ([\d.]+)", found or ""):
        if parameter == "gamma":
            assert stability(rule, hyperparameters, static.lazy(float(value))).verdict == "stable"
        else:
            assert stability(rule, {**hyperparameters, parameter: float(value)}, static).verdict == "stable"


# Errors


@pytest.mark.parametrize(
    ("rule", "hyperparameters", "error", "message"),
    [
        ("gott", {}, ValueError, "unknown rule 'gott'"),
        (3, {}, TypeError, "a rule is a name or an UpdateRule"),
        ("gut", {"beta": 0.9}, ValueError, "'gut' has no hyper-parameter 'beta'"),
        ("gut", {"mu": 1.5}, ValueError, "mu=1.5 is outside"),
        ("gut", {"lr": math.nan}, ValueError, r"lr=.* is outside \[0, inf\)"),
        ("gut", {"lr": "fast"}, TypeError, "lr must be a number"),
    ],
)
def test_bad_hyperparameters_are_named(rule, hyperparameters, error, message):
    ring = topology.ring(4)
    for call in (stability, advice, averaging_rate_limit):
        with pytest.raises(error, match=message):
            call(rule, hyperparameters, ring)
    with pytest.raises(error, match=message):
        modes(rule, hyperparameters, 0.5)


def test_bad_curvature_is_named():
    with pytest.raises(ValueError, match="curvature must be finite, got nan"):
        stability("gut", {}, topology.ring(4), curvature=math.nan)


def test_limits_need_a_hyperparameter_with_a_bounded_domain():
    ring = topology.ring(4)
    with pytest.raises(ValueError, match="rule 'dsgd' has no hyper-parameter 'mu'; it has: none"):
        stability_limit("dsgd", ring)
    with pytest.raises(ValueError, match="the domain of 'factor' has no ends"):
        stability_limit(UpdateRule("scaled", (), scaled), ring, name="factor")
    with pytest.raises(ValueError, match="the domain of 'nesterov' has no ends"):
        stability_limit("dsgdm", ring, name="nesterov")


def test_every_rule_is_covered_here():
    assert {rule for rule, _ in SETTINGS} == RULES.keys()
