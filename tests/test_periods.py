"""The stability of what varies with time, of κ and of local steps: predictions against runs of `reference.step`."""

import math
import re
import time
from functools import cache

import numpy as np
import pytest
import torch

import gut_fast as gf
from gut_fast import analysis, topology
from gut_fast.analysis.periods import Blocks, Iterated, mixing_of
from gut_fast.reference import step, zero_state
from gut_fast.rules import RULES, get_rule
from products import covering

IDENTITY = topology.from_matrix(np.eye(16), connected=False)
REGULAR = topology.sequence([topology.random_regular(60, 3, seed) for seed in (0, 1)])

GRAPHS = {
    "torus": topology.torus(4, 4),
    "one peer": topology.one_peer_exponential(16),
    "rare ring": topology.sequence([IDENTITY] * 3 + [topology.ring(16)]),
    "ring and star": topology.sequence([topology.ring(16), topology.star(16)]),
    "base": topology.base(25, 1),
    "regular": REGULAR,
    "matching": topology.random_matching(16, seed=0),
    "large matching": topology.random_matching(100, seed=1),
}

ESTIMATED = ("regular", "matching", "large matching")


def growth(rule, hyperparameters, graph, num_rounds=500, local_steps=1):
    """The factor per step of the disagreement of a run without gradients, after the first 150 of its rounds."""
    rule, settings = get_rule(rule), {"lr": 1.0, **hyperparameters}
    z = torch.randn(graph.num_agents, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, state, logarithm = z - z.mean(0), zero_state(rule, z), 0.0
    for number in range(num_rounds):
        for place in range(local_steps):
            is_local = place < local_steps - 1
            own = {"is_local": True} if is_local else {"drift_lr": float(local_steps)} if local_steps > 1 else {}
            z, state = _moved(rule, {**settings, **own}, z, state, _matrix(graph, None if is_local else number))
        size = math.hypot(*(float(x.norm()) for x in (z, *state.values())))
        if not size:
            return 0.0
        logarithm += math.log(size) if number >= 150 else 0.0
        z, state = z / size, {name: x / size for name, x in state.items()}
    return math.exp(logarithm / ((num_rounds - 150) * local_steps))


def _moved(rule, settings, z, state, W):
    """A step without gradients, with the mean over agents taken out."""
    z, state = _stepped(rule, settings, z, state, torch.zeros_like(z), W)
    return z - z.mean(0), {name: x - x.mean(0) for name, x in state.items()}


@cache
def _matrix(graph, number):
    """The matrix of a round; that of a local step, which sends nothing, has no weights."""
    return torch.eye(graph.num_agents, dtype=torch.float64) if number is None else graph.matrix(number)


@pytest.mark.parametrize(
    ("name", "tracked", "slow", "slower"),
    [("torus", 1.500, 0.816, 0.904), ("one peer", 1.250, 0.693, 0.895), ("base", 1.223, 1.063, 0.900)],
)
def test_the_rates_of_gut_that_are_known(name, tracked, slow, slower):
    settings = ({"mu": 0.9}, {"mu": 1.0, "kappa": 0.3}, {"mu": 1.0, "kappa": 0.1})
    found = [analysis.stability("gut", each, GRAPHS[name]).spectral_radius for each in settings]
    assert np.allclose(found, [tracked, slow, slower], atol=6e-4)


def test_gut_at_its_defaults_warns_on_the_one_peer_exponential_graph_on_which_it_grows_beyond_all_bounds():
    graph = GRAPHS["one peer"]
    assert growth("gut", {}, graph, num_rounds=400) ** 400 > 1e30
    with pytest.warns(UserWarning, match=r"unstable on one_peer_exponential\(16\).*1.25-fold.*or kappa <= 0.54"):
        gf.GUT([torch.nn.Parameter(torch.zeros(16, 2))], lr=0.1, topology=graph)


@pytest.mark.parametrize(
    ("mu", "kappa", "name"), covering([0.3, 0.6, 0.9, 1.0], [0.1, 0.3, 0.6, 1.0], list(GRAPHS)[:4])
)
def test_the_rate_of_a_period_is_that_of_a_run(mu, kappa, name):
    settings = {"mu": mu, "kappa": kappa}
    found = analysis.stability("gut", settings, GRAPHS[name])
    assert math.isclose(growth("gut", settings, GRAPHS[name]), found.consensus_rate, rel_tol=1e-2)


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("settings", [{"mu": 0.5}, {"mu": 1.0}, {"mu": 1.0, "kappa": 0.3}, {"mu": 1.0, "kappa": 0.1}])
def test_rates_that_are_estimated_are_those_of_a_run_within_four_errors(settings, name):
    found = analysis.stability("gut", settings, GRAPHS[name])
    assert 0 < found.error < 0.03
    assert abs(math.log(growth("gut", settings, GRAPHS[name])) - math.log(found.consensus_rate)) < 4 * found.error
    assert analysis.stability("gut", settings, GRAPHS[name]) == found


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("parameter", "others"), [("mu", {}), ("kappa", {"mu": 1.0}), ("kappa", {"mu": 0.9})])
def test_runs_settle_below_each_limit_and_grow_above_it(parameter, others, name):
    limit, margin = analysis.stability_limit("gut", GRAPHS[name], others, parameter), 0.02
    assert growth("gut", {**others, parameter: limit - margin}, GRAPHS[name]) < 1
    if limit < 1:
        margin = 0.1 if name in ESTIMATED else margin  # the limit is beyond doubt, so the run may bear somewhat more
        assert growth("gut", {**others, parameter: min(limit + margin, 1.0)}, GRAPHS[name]) > 1


@pytest.mark.parametrize("name", GRAPHS)
def test_the_averaging_rate_limit_divides_runs_on_graphs_that_vary(name):
    gamma = analysis.averaging_rate_limit("gut", {"mu": 0.95}, GRAPHS[name])
    assert growth("gut", {"mu": 0.95}, GRAPHS[name].lazy(gamma - 0.03)) < 1
    if gamma < 1:
        assert growth("gut", {"mu": 0.95}, GRAPHS[name].lazy(min(gamma + 0.1, 1.0))) > 1


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_the_limit_of_kappa_on_a_static_graph_is_that_of_the_formula(mu):
    """(1 + λ)(2 − κ(1 − μ)) > κμ(1 − λ) for every mode."""
    for graph in (topology.torus(4, 4), topology.dyck(), topology.ring(16), topology.star(7), topology.torus(4, 8)):
        lowest = graph.lambda_min
        limit = 2 * (1 + lowest) / (mu * (1 - lowest) + (1 - mu) * (1 + lowest))
        found = analysis.stability_limit("gut", graph, {"mu": mu}, "kappa")
        assert math.isclose(found, min(limit, 1.0), rel_tol=1e-6)


def test_exact_averages_in_a_period_leave_no_disagreement():
    for graph in (GRAPHS["one peer"], GRAPHS["base"], topology.one_peer_exponential(64)):
        assert analysis.stability("dsgd", {}, graph).consensus_rate < 1e-2
    assert analysis.stability("dsgd", {}, topology.random_matching(2, seed=0)).consensus_rate < 1e-9


def test_modes_and_one_block_of_all_agents_agree():
    """A grid that is shuffled has no Fourier transform, so its matrices make one block."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    members = [topology.torus(4, 4), topology.ring(16).lazy(0.7)]
    with_modes = topology.sequence([members[0], topology.torus(4, 4).lazy(0.5)])
    W = [members[0].matrix()[order][:, order], members[0].lazy(0.5).matrix()[order][:, order]]
    with_block = topology.sequence([topology.from_matrix(each) for each in W])
    first, second = mixing_of(with_modes), mixing_of(with_block)
    assert first.matrices.shape[-1] == 1
    assert second.matrices.shape[-1] == 15
    for settings in ({"mu": 0.5}, {"mu": 1.0, "kappa": 0.3}):
        for function in (
            lambda graph, own=settings: analysis.stability("gut", own, graph).consensus_rate,
            lambda graph, own=settings: analysis.bias_factor("gut", own, graph),
            lambda graph, own=settings: analysis.noise("gut", {**own, "lr": 0.1}, graph, 2.0).disagreement,
        ):
            assert math.isclose(function(with_modes), function(with_block), rel_tol=1e-6, abs_tol=1e-9)


def test_which_form_the_rounds_of_a_topology_have():
    assert all(isinstance(mixing_of(GRAPHS[name]), Iterated) for name in ESTIMATED)
    assert all(isinstance(mixing_of(graph), Blocks) for name, graph in GRAPHS.items() if name not in ESTIMATED)
    assert mixing_of(GRAPHS["one peer"]).matrices.shape[1:] == (4, 1, 1)
    assert mixing_of(GRAPHS["rare ring"]).matrices.shape[1:] == (4, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.1, 1.0])
def test_advice_on_thousands_of_agents_takes_less_than_a_second(kappa):
    for graph in (topology.one_peer_exponential(4096), topology.random_matching(4000, seed=0)):
        start = time.process_time()
        advice = analysis.advice("gut", {"mu": 0.9, "kappa": kappa}, graph)
        assert (advice is None) == (kappa < 1)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("seed", [0, 1])
def test_what_advice_names_for_large_matchings_is_found_among_fewer_agents_and_stable_for_all(seed):
    graph = topology.random_matching(2000, seed)
    advice = analysis.advice("gut", {"mu": 0.9}, graph)
    gamma, mu, kappa = map(float, re.search(r"gamma <= (\S+) or mu <= (\S+) or kappa <= (\S+)", advice).groups())
    for settings, lazier in (
        ({"mu": 0.9}, graph.lazy(gamma)),
        ({"mu": mu}, graph),
        ({"mu": 0.9, "kappa": kappa}, graph),
    ):
        assert analysis.stability("gut", settings, lazier).verdict != "unstable"
    for settings, lazier in (({"mu": 0.9}, graph.lazy(gamma + 0.05)), ({"mu": mu + 0.05}, graph)):
        assert analysis.stability("gut", settings, lazier).verdict == "unstable"


def test_among_many_agents_without_structure_advice_says_that_it_does_not_search():
    graph = topology.sequence([topology.random_regular(300, 3, seed) for seed in (0, 1)])
    advice = analysis.advice("gut", {"mu": 0.99}, graph)
    assert "use topology.lazy(gamma) or a smaller mu or a smaller kappa; how small is not searched for" in advice
    assert "gut_fast.analysis.stability_limit" in advice
    advice = analysis.advice("dsgdm", {"momentum": 0.9}, graph)
    assert advice is None


# What is chosen


@pytest.mark.parametrize("name", GRAPHS)
def test_mu_and_kappa_that_are_chosen_settle(name):
    mu = analysis.auto_mu("gut", GRAPHS[name])
    kappa = analysis.auto_kappa("gut", GRAPHS[name], {"mu": 1.0})
    assert growth("gut", {"mu": mu}, GRAPHS[name]) < 1
    assert 0 < kappa <= 1
    assert growth("gut", {"mu": 1.0, "kappa": kappa}, GRAPHS[name]) < 1
    both = analysis.with_auto("gut", {"mu": "auto", "kappa": "auto"}, GRAPHS[name])
    assert both["mu"] == 0.999
    assert growth("gut", both, GRAPHS[name]) < 1


@pytest.mark.parametrize("mu", [0.9, 1.0])
@pytest.mark.parametrize("graph", [topology.ring(15), topology.torus(4, 4), topology.dyck()], ids=str)
def test_kappa_is_the_largest_that_costs_no_more_than_a_factor_of_two_or_the_fastest(graph, mu):
    untracked = analysis.stability("dsgd", {}, graph).consensus_rate
    kappa = analysis.auto_kappa("gut", graph, {"mu": mu})

    def rate(kappa):
        return analysis.stability("gut", {"mu": mu, "kappa": kappa}, graph).consensus_rate

    longest = 1 - (1 - untracked) / 2 + 1e-6
    grid = np.linspace(0.01, 1, 100)
    if min(rate(each) for each in grid) <= longest:
        assert rate(kappa) <= longest
        assert all(rate(each) > longest for each in grid if each > kappa + 1e-3)
    else:
        assert rate(kappa) <= min(rate(each) for each in grid) + 1e-9


def test_an_optimizer_takes_auto_for_both_on_a_topology_that_varies():
    graph = topology.one_peer_exponential(8)
    parameter = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = gf.GUT([parameter], lr=0.1, mu="auto", kappa="auto", topology=graph)
    expected = analysis.auto_kappa("gut", graph, {"mu": 0.999})
    assert (optimizer.defaults["mu"], optimizer.defaults["kappa"]) == (0.999, expected)


def test_predictions_of_a_topology_that_varies_say_what_is_known():
    known = analysis.predict("gut", {"mu": 0.5, "lr": 0.1}, GRAPHS["one peer"])
    assert all(map(math.isfinite, (known.bias_factor, known.noise.average, known.noise.disagreement)))
    unknown = analysis.predict("gut", {"mu": 0.5, "lr": 0.1}, GRAPHS["matching"])
    assert math.isnan(unknown.bias_factor)
    assert math.isnan(unknown.noise.disagreement)
    assert math.isfinite(unknown.noise.average)
    assert 0 < unknown.mu_limit < 1


def at_rest(rule, settings, graph, curvature, num_rounds=4000, local_steps=1):
    """The models of a run with gradients h (z_i − b_i) after whole periods, b = one column for each agent."""
    rule, n = get_rule(rule), graph.num_agents
    b = torch.eye(n, dtype=torch.float64)
    z, state = torch.zeros_like(b), zero_state(rule, b)
    rounds = num_rounds // graph.period * graph.period
    trace = []
    for number in range(rounds):
        for place in range(local_steps):
            own = {"drift_lr": local_steps * settings["lr"]} if local_steps > 1 else {}
            is_local = place < local_steps - 1
            own = {"is_local": True} if is_local else own
            W = _matrix(graph, None if is_local else number % graph.period)
            z, state = _stepped(rule, {**settings, **own}, z, state, curvature * (z - b), W)
        trace.append(z)
    return trace[-graph.period :]


@cache
def _coefficients(rule, settings):
    coefficients = rule.coefficients(**dict(settings))
    return [torch.tensor(getattr(coefficients, name), dtype=torch.float64) for name in "ABCE"]


def _stepped(rule, settings, z, state, g, W):
    A, B, C, E = _coefficients(rule, tuple(settings.items()))
    u = torch.stack([z, *state.values(), g])
    S = torch.tensordot(A, u, 1)
    new, *others = torch.tensordot(B, u, 1) + torch.tensordot(C, S, 1) + torch.tensordot(E, W @ S - S, 1)
    return new, dict(zip(state, others, strict=True))


def disagreement(trace):
    return math.sqrt(sum(float((z - z.mean(0)).norm()) ** 2 for z in trace) / len(trace))


@pytest.mark.parametrize("settings", [{"mu": 0.4}, {"mu": 0.9, "kappa": 0.3}])
@pytest.mark.parametrize("name", ["one peer", "ring and star"])
def test_the_bias_factor_on_a_graph_that_varies_is_that_of_a_run(settings, name):
    ours = disagreement(at_rest("gut", {**settings, "lr": 0.1}, GRAPHS[name], 1e-4))
    dsgd = disagreement(at_rest("dsgd", {"lr": 0.1}, GRAPHS[name], 1e-4))
    assert math.isclose(ours / dsgd, analysis.bias_factor("gut", settings, GRAPHS[name]), rel_tol=5e-3)


# Local steps


@pytest.mark.parametrize(("rule", "local_steps", "name"), covering(list(RULES), [2, 3], ["ring", "one peer"]))
def test_the_rate_of_rounds_is_that_of_a_run(rule, local_steps, name):
    graph = topology.ring(7).lazy(0.5) if name == "ring" else GRAPHS["one peer"].lazy(0.5)
    found = analysis.stability(rule, {}, graph, local_steps=local_steps).consensus_rate
    assert math.isclose(growth(rule, {}, graph, local_steps=local_steps), found, rel_tol=1e-2)


@pytest.mark.parametrize("local_steps", [4, 16])
def test_modes_of_local_gut_in_a_round_are_those_of_single_steps(local_steps):
    for settings in ({"mu": 0.9}, {"mu": 1.0, "kappa": 0.3}):
        single = analysis.stability("gut", settings, GRAPHS["torus"]).consensus_rate
        rounds = analysis.stability("gut", settings, GRAPHS["torus"], local_steps=local_steps).consensus_rate
        assert math.isclose(rounds**local_steps, single, rel_tol=1e-9)


@pytest.mark.parametrize("settings", [{"mu": 0.5}, {"mu": 0.9, "kappa": 0.3}])
def test_the_bias_factor_with_local_steps_is_that_of_a_run_and_one_minus_mu(settings):
    ring, own = topology.ring(8), {**settings, "lr": 0.1}
    ours = disagreement(at_rest("gut", own, ring, 1e-4, 1000, local_steps=4))
    dsgd = disagreement(at_rest("dsgd", {"lr": 0.1}, ring, 1e-4, 1000, local_steps=4))
    assert math.isclose(analysis.bias_factor("gut", own, ring, local_steps=4), 1 - settings["mu"], rel_tol=1e-9)
    assert math.isclose(ours / dsgd, 1 - settings["mu"], rel_tol=5e-3)


def test_the_average_moves_as_far_in_a_local_step_as_in_one_that_mixes():
    assert math.isclose(analysis.step_gain("gut", {}, local_steps=8), 1.0)
    assert math.isclose(analysis.step_gain("dsgdm", {"momentum": 0.8}, local_steps=8), 5.0)


def test_bad_numbers_of_local_steps_are_named():
    for bad, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="local_steps"):
            analysis.stability("gut", {}, GRAPHS["torus"], local_steps=bad)


def test_steps_here_are_those_of_the_reference():
    z = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W, settings = GRAPHS["torus"].matrix(), {"lr": 0.3, "mu": 0.7, "kappa": 0.4}
    expected = step("gut", settings, z, {"r": 2 * z}, z**2, W)
    found = _stepped(get_rule("gut"), settings, z, {"r": 2 * z}, z**2, W)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1]["r"], expected[1]["r"])


@pytest.mark.parametrize("rule", ["gradient_tracking", "momentum_tracking", "gut"])
def test_the_search_for_a_learning_rate_ends_where_rounds_of_large_rates_overflow(rule):
    ring = topology.ring(16)
    limit = analysis.learning_rate_limit(rule, {}, ring, local_steps=16)
    below, above = (
        analysis.stability(rule, {"lr": factor * limit}, ring, 1.0, local_steps=16).consensus_rate
        for factor in (0.5, 2.0)
    )
    assert below < 1 < above
