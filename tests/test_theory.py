"""The theory of the rules, exactly: fixed points, what r learns, the average's motion, modes and limits.

Everything runs `reference.step`, in float64, without noise unless the test adds it. The heterogeneous problem is
f_i(x) = ½ (x − b_i)ᵀ H_i (x − b_i); its optimum is that of Σ_i f_i.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from gut_fast import topology
from gut_fast.reference import drift, step, zero_state
from gut_fast.rules import RULES

LR = 0.1


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Quadratics(NamedTuple):
    """N quadratics in d dimensions: curvatures H [N, d, d], optima b [N, d]."""

    H: torch.Tensor
    b: torch.Tensor

    def gradient(self, z):
        """The gradients at z [N, d, B], where B experiments lie side by side."""
        return self.H @ (z - self.b[..., None])

    @property
    def optimum(self):
        return torch.linalg.solve(self.H.sum(0), (self.H @ self.b[..., None]).sum(0))


def quadratics(num_agents, dim=2, seed=0):
    factors = randn(num_agents, dim, dim, seed=seed)
    return Quadratics(factors @ factors.mT / dim + 0.3 * torch.eye(dim), randn(num_agents, dim, seed=seed + 1))


class Rest(NamedTuple):
    """The end of a run: z, gradients and states [N, d]."""

    z: torch.Tensor
    g: torch.Tensor
    state: dict


def at_rest(rule, hyperparameters, W, problem):
    """Runs a million steps from zero: one step is an affine map, 2^k of them are k squarings of it."""
    names = ("z", *RULES[rule].states)
    shape = (len(names), *problem.b.shape)
    size = math.prod(shape)
    probes = torch.cat([torch.eye(size, dtype=torch.float64), torch.zeros(size, 1, dtype=torch.float64)], dim=1)
    z, *state = probes.view(*shape, size + 1)
    state = dict(zip(names[1:], state, strict=True))
    new_z, new_state = step(rule, {"lr": LR, **hyperparameters}, z, state, problem.gradient(z), W)
    image = torch.stack([new_z, *new_state.values()]).reshape(size, size + 1)
    offset = image[:, -1:]
    power = image[:, :-1] - offset
    for _ in range(20):
        offset, power = offset + power @ offset, power @ power
    z, *state = offset.view(shape)
    return Rest(z, problem.gradient(z[..., None])[..., 0], dict(zip(names[1:], state, strict=True)))


def bias(rest, problem):
    """The largest distance of an agent at rest from the optimum."""
    return float((rest.z - problem.optimum.T).abs().max())


STATIC = {
    "ring": topology.ring(7),
    "star": topology.star(5),
    "petersen": topology.petersen(),
    "torus": topology.torus(4, 4).lazy(0.5),
}


@pytest.fixture(name="W", params=STATIC)
def mixing_matrix(request):
    return STATIC[request.param].matrix()


@pytest.fixture
def problem(W):
    return quadratics(len(W))


# Fixed points


def _fixed_points():
    for mu in (0.0, 0.5, 0.9):
        yield "gut", {"mu": mu}, 1 - mu
    for beta, mu in ((0.5, 0.3), (0.9, 0.8), (0.9, 0.0)):
        yield "gutm", {"momentum": beta, "mu": mu}, 1 - mu
    for beta, mu in ((0.5, 0.2), (0.9, 0.1), (0.9, 0.5)):
        yield "qgt", {"momentum": beta, "mu": mu}, (1 - beta) / ((1 - beta) ** 2 + beta * mu)
    for beta, mu in ((0.5, 0.3), (0.9, 0.06), (0.9, 0.0)):
        yield "qg_gutm", {"momentum": beta, "mu": mu}, (1 - mu) / (1 + mu * beta)
    for beta in (0.5, 0.9):
        yield "qg_dsgdm", {"momentum": beta}, 1.0
        yield "qg_dsgdm", {"momentum": beta, "nesterov": True}, 1 + beta
        yield "dsgdm", {"momentum": beta}, 1 / (1 - beta)
        yield "dsgdm", {"momentum": beta, "nesterov": True}, 1 / (1 - beta)


@pytest.mark.parametrize(("rule", "hyperparameters", "factor"), list(_fixed_points()))
def test_fixed_point_is_that_of_dsgd_at_another_learning_rate(rule, hyperparameters, factor, W, problem):
    lr = 0.02  # DSGDm at β = 0.9 rests where DSGD does at a ten-fold learning rate
    rest = at_rest(rule, {**hyperparameters, "lr": lr}, W, problem)
    dsgd = at_rest("dsgd", {"lr": factor * lr}, W, problem)
    torch.testing.assert_close(rest.z, dsgd.z, rtol=0, atol=1e-9)
    assert bias(dsgd, problem) > 1e-4


@pytest.mark.parametrize(
    ("rule", "hyperparameters"),
    [
        ("gradient_tracking", {}),
        ("momentum_tracking", {"momentum": 0.5}),
        ("momentum_tracking", {"momentum": 0.9}),
        ("d2", {}),
        ("gut", {"mu": 1.0}),
    ],
)
def test_tracking_methods_and_d2_rest_at_the_exact_optimum(rule, hyperparameters, W, problem):
    rest = at_rest(rule, {**hyperparameters, "lr": 0.05}, W, problem)
    torch.testing.assert_close(rest.z, problem.optimum.T.expand_as(rest.z), rtol=0, atol=1e-9)


# What r learns


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_at_rest_r_is_minus_the_gradient_agent_by_agent(mu, W, problem):
    rest = at_rest("gut", {"mu": mu}, W, problem)
    assert rest.g.abs().amax(1).min() > 1e-2
    torch.testing.assert_close(rest.state["r"], -rest.g, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("beta", "mu"), [(0.5, 0.3), (0.9, 0.8), (0.9, 0.0)])
def test_gutm_at_rest_has_no_momentum_and_r_is_minus_the_gradient(beta, mu, W, problem):
    rest = at_rest("gutm", {"momentum": beta, "mu": mu}, W, problem)
    torch.testing.assert_close(rest.state["m"], torch.zeros_like(rest.z), rtol=0, atol=1e-9)
    torch.testing.assert_close(rest.state["r"], -rest.g, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_steady_drift_is_one_minus_mu_times_that_of_dsgd(mu, W):
    """The drift is exactly (1−μ)ηg, which is (1−μ) times DSGD's own to first order in η."""
    problem = quadratics(len(W))

    def steady_drift(rule, mu, lr):
        rest = at_rest(rule, {"lr": lr, **({"mu": mu} if mu else {})}, W, problem)
        direction = rest.g + mu * rest.state["r"] if mu else rest.g
        steady = drift(rest.z - lr * direction, W)
        torch.testing.assert_close(steady, (1 - mu) * lr * rest.g, rtol=0, atol=1e-10)
        return steady

    def relative_difference(lr):
        gut, dsgd = steady_drift("gut", mu, lr), steady_drift("dsgd", 0.0, lr)
        return float((gut - (1 - mu) * dsgd).abs().max() / gut.abs().max())

    coarse, fine = relative_difference(0.02), relative_difference(0.002)
    assert 0 < fine < 0.2 * coarse < 0.2


@pytest.mark.parametrize("rule", [name for name in RULES if "r" in RULES[name].states])
def test_the_mean_of_r_is_zero_at_every_step(rule, W):
    z = randn(len(W), 3, seed=0)
    state = zero_state(rule, z)
    for k in range(100):
        z, state = step(rule, {"lr": LR}, z, state, randn(*z.shape, seed=k), W)
        assert state["r"].mean(0).abs().max() < 1e-12 * state["r"].abs().max()


# How the average moves


def averages(rule, hyperparameters, W, num_steps=60):
    """Yields the means over agents of z, states and g at each step, under gradients that are pure noise."""
    z = randn(len(W), 3, seed=0)
    state = zero_state(rule, z)
    for k in range(num_steps):
        g = randn(*z.shape, seed=k)
        before = {"z": z, **state, "g": g}
        z, state = step(rule, {"lr": LR, **hyperparameters}, z, state, g, W)
        after = {"z": z, **state}
        yield ({name: value.mean(0) for name, value in values.items()} for values in (before, after))


@pytest.mark.parametrize(("beta", "mu"), [(0.9, 0.06), (0.5, 0.3), (0.9, 0.0)])
def test_the_average_of_qg_gutm_moves_with_momentum_beta_plus_mu(beta, mu, W):
    for before, after in averages("qg_gutm", {"momentum": beta, "mu": mu}, W):
        expected = (beta + mu) * before["p"] + beta * before["g"]
        torch.testing.assert_close(after["p"], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after["c"], torch.zeros_like(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "hyperparameters", "plain"),
    [
        ("gut", {"mu": 0.5}, "dsgd"),
        ("gutm", {"mu": 0.3}, "qg_dsgdm"),
        ("qgt", {"momentum": 0.5, "mu": 0.3}, "qg_dsgdm"),
    ],
)
def test_tracking_does_not_change_how_the_average_moves(rule, hyperparameters, plain, W):
    shared = {name: value for name, value in hyperparameters.items() if name == "momentum"}
    for (_, ours), (_, theirs) in zip(averages(rule, hyperparameters, W), averages(plain, shared, W), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10)


# Which rule is which


def trajectory(rule, hyperparameters, W, num_steps=60):
    problem = quadratics(len(W))
    z = randn(2, seed=9).expand(len(W), 2)
    state = zero_state(rule, z)
    for _ in range(num_steps):
        g = problem.gradient(z[..., None])[..., 0]
        z, state = step(rule, {"lr": LR, **hyperparameters}, z, state, g, W)
        yield z


def assert_same_trajectory(first, second):
    for z, other in zip(first, second, strict=True):
        torch.testing.assert_close(z, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_without_momentum_both_momentum_rules_are_gut(mu, W):
    gut = list(trajectory("gut", {"mu": mu}, W))
    assert_same_trajectory(trajectory("qg_gutm", {"momentum": 0.0, "mu": mu}, W), gut)
    assert_same_trajectory(trajectory("gutm", {"momentum": 0.0, "mu": mu}, W), gut)


def test_qg_gutm_without_tracking_is_the_heavy_ball_on_the_whole_displacement(W):
    """x^{t+1} = Wx^t − ηg + β (x^t − x^{t−1}), g at Wx^t. QG-DSGDm is another method."""
    beta, problem = 0.9, quadratics(len(W))
    x = x_previous = randn(2, seed=9).expand(len(W), 2)
    for z in trajectory("qg_gutm", {"momentum": beta, "mu": 0.0}, W):
        g = problem.gradient((W @ x)[..., None])[..., 0]
        x, x_previous = W @ x - LR * g + beta * (x - x_previous), x
        torch.testing.assert_close(z, W @ x, rtol=1e-10, atol=1e-10)
    *_, qg_dsgdm = trajectory("qg_dsgdm", {"momentum": beta}, W)
    assert (z - qg_dsgdm).abs().max() > 1e-2


# Consensus modes and stability


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9, 1.0])
def test_a_consensus_mode_obeys_its_characteristic_equation(mu, W):
    """Along an eigenvector of W, z^{t+2} = λ(1+μ) z^{t+1} − μλ z^t: that is x² − λ(1+μ)x + μλ = 0."""
    eigenvalues, eigenvectors = torch.linalg.eigh(W)
    z, state = eigenvectors, zero_state("gut", eigenvectors)
    modes = [eigenvectors]
    for _ in range(6):
        z, state = step("gut", {"lr": LR, "mu": mu}, z, state, torch.zeros_like(z), W)
        modes.append(z)
    for oldest, older, new in zip(modes, modes[1:], modes[2:], strict=False):
        expected = eigenvalues * ((1 + mu) * older - mu * oldest)
        expected[:, -1] = eigenvectors[:, -1]  # λ = 1 is the average, which stays
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-12)


def disagreement(rule, hyperparameters, W, num_steps):
    """The distance of z and state from their means, after each step of plain mixing from a random z of mean zero."""
    z = randn(len(W), 3, seed=0)
    z = z - z.mean(0)
    state = zero_state(rule, z)
    for _ in range(num_steps):
        z, state = step(rule, {"lr": 1.0, **hyperparameters}, z, state, torch.zeros_like(z), W)
        yield math.hypot(*(float((x - x.mean(0)).norm()) for x in (z, *state.values())))


def decay(rule, hyperparameters, W):
    """The factor by which disagreement changes in a step, over the last 200 of 300 steps."""
    sizes = list(disagreement(rule, hyperparameters, W, num_steps=300))
    return (sizes[-1] / sizes[99]) ** (1 / 200)


@pytest.mark.parametrize(
    ("static", "limit"),
    [(topology.ring(16), 1.0), (topology.torus(4, 4), 1 / 3), (topology.dyck(), 1 / 2), (topology.torus(4, 8), 1 / 3)],
    ids=lambda value: getattr(value, "name", None),
)
def test_gut_is_stable_below_its_limit_and_not_above(static, limit):
    """λ_min > −1/(1+2μ)."""
    assert math.isclose(static.lambda_min, -1 / (1 + 2 * limit), abs_tol=1e-9)
    W = static.matrix()
    assert decay("gut", {"mu": limit - 0.02}, W) < 0.99
    if limit < 1:
        assert decay("gut", {"mu": limit + 0.02}, W) > 1.01
    else:
        assert math.isclose(decay("gut", {"mu": 1.0}, W), 1.0, abs_tol=1e-4)


def test_the_authors_mu_blows_up_on_a_torus_and_lazy_weights_restore_it():
    torus = topology.torus(4, 8)
    assert decay("gut", {"mu": 0.9}, torus.matrix()) > 1.4
    assert decay("gut", {"mu": 0.9}, torus.lazy(0.5).matrix()) < 0.96
    assert decay("gut", {"mu": 0.999}, torus.lazy(0.5).matrix()) < 1.0


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_qg_gutm_needs_beta_plus_mu_below_one(beta):
    """Under a steady gradient the average's momentum settles at β/(1−β−μ) ḡ, or grows for ever."""
    W, g = topology.ring(5).matrix(), torch.ones(5, 1, dtype=torch.float64)

    def momentum(mu, num_steps=400):
        z, state = torch.zeros_like(g), zero_state("qg_gutm", g)
        for _ in range(num_steps):
            z, state = step("qg_gutm", {"lr": LR, "momentum": beta, "mu": mu}, z, state, g, W)
        return float(state["p"].mean())

    at_limit = 1 - beta
    assert math.isclose(momentum(at_limit - 0.05), beta / 0.05, rel_tol=1e-8)
    assert math.isclose(momentum(at_limit), 400 * beta, rel_tol=1e-9)
    assert momentum(at_limit + 0.05) > 1e6


@pytest.mark.parametrize(
    ("static", "limit"),
    [(topology.ring(16), 0.9095), (topology.ring(15), 0.975), (topology.torus(4, 4), 0.273)],
    ids=str,
)
def test_gutm_is_stable_below_its_limit_and_not_above(static, limit):
    W = static.matrix()
    assert decay("gutm", {"momentum": 0.9, "mu": limit - 0.01}, W) < 1.0
    assert decay("gutm", {"momentum": 0.9, "mu": limit + 0.01}, W) > 1.0


def test_lazy_weights_lift_the_limit_of_gutm_on_a_torus():
    assert decay("gutm", {"momentum": 0.9, "mu": 0.8}, topology.torus(4, 4).matrix()) > 1.4
    assert decay("gutm", {"momentum": 0.9, "mu": 0.8}, topology.torus(4, 4).lazy(0.5).matrix()) < 0.95


def test_gutm_agrees_faster_than_qg_dsgdm_on_a_16_ring():
    W = topology.ring(16).matrix()
    assert math.isclose(decay("gutm", {"momentum": 0.9, "mu": 0.8}, W), 0.942, abs_tol=0.003)
    assert math.isclose(decay("qg_dsgdm", {"momentum": 0.9}, W), 0.969, abs_tol=0.003)


@pytest.mark.parametrize("num_agents", [16, 64, 1000])
def test_the_fastest_mu_makes_gossip_accelerated(num_agents):
    """λ₂(1+μ)² = 4μ, √μ = (1 − √(1−λ₂)) / √λ₂, shrinks the mode of λ₂ by √(μλ₂) a step, and no other μ by more."""
    lambda_2 = topology.ring(num_agents).lambda_2
    best = ((1 - math.sqrt(1 - lambda_2)) / math.sqrt(lambda_2)) ** 2

    def rate(mu):
        return np.abs(np.roots([1, -lambda_2 * (1 + mu), mu * lambda_2])).max()

    assert math.isclose(lambda_2 * (1 + best) ** 2, 4 * best)
    assert math.isclose(rate(best), math.sqrt(best * lambda_2), abs_tol=1e-6)
    assert all(rate(mu) > rate(best) for mu in np.linspace(0, 1, 1000))


def test_on_the_16_ring_the_fastest_mu_agrees_at_081_a_step_where_dsgd_does_at_095():
    """The mode of λ₂ alone would shrink by 0.775; λ_min = −1/3 is the slower one at this μ."""
    W = topology.ring(16).matrix()
    assert math.isclose(decay("gut", {"mu": 0.63}, W), 0.805, abs_tol=0.005)
    assert math.isclose(decay("dsgd", {}, W), 0.949, abs_tol=0.001)
