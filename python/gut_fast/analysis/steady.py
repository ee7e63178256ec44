"""The steady state of a stable rule: its bias at rest, the length of the average's steps, and its answer to noise.

All three follow from linear systems theory, mode by mode: the response of a linear system to a steady or a white input,
here the agents' gradients. Each is compared with DSGD at the same learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gut_fast.analysis.periods import Blocks, Iterated, mixing_of
from gut_fast.analysis.transition import (
    TOLERANCE,
    Array,
    Round,
    learning_rate,
    radius,
    reachable,
    round_of,
    without_decay,
)
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = [
    "Noise",
    "bias_factor",
    "bias_factor_of",
    "noise",
    "noise_amplification",
    "noise_amplification_of",
    "step_gain",
]

COMMON = ("lr", "weight_decay", "maximize")
"""The hyper-parameters that every rule has, which DSGD takes from the rule that it is compared with."""

NOTHING = 1e-9
"""The size of a product of rounds, of which the square is added, that no longer counts."""

ROUNDING = 1e-12
"""The size of a disagreement of zero after rounding, in units of the learning rate."""


@dataclass(frozen=True)
class Noise:
    """The variances in the long run under white noise in the agents' gradients."""

    average: float
    """The variance E (z̄ − rest)² of the agents' average z̄ per coordinate; NaN if W's columns do not sum to one."""
    disagreement: float
    """The consensus error E (1/N) Σ_i (z_i − z̄)² per coordinate; NaN if W is not normal, or not solved for."""


def bias_factor(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, *, local_steps: int = 1
) -> float:
    """The distance at which agents rest from one another because their data differ, over that of DSGD.

    DSGD is taken at the same learning rate, and with as many local steps.

    With full gradients ``g_i = h (z_i − b_i)`` a rule rests at ``x = F(λ) x + G(λ) g`` on the mode of eigenvalue λ,
    where x is (z, state), F the rule's transition and G its gradient column. To first order in η that is
    ``z(λ) = [(I − F(λ))⁻¹ G(λ)]_0 g(λ)``, with g the local gradients at the average; DSGD has ``−ηλ/(1−λ)``. The factor
    is the ratio of the two disagreements ``Σ_λ |z(λ)|²``, root mean square over local gradients that are independent.

    A rule of the table has the same ratio in every mode, so it rests exactly where DSGD rests with the learning rate
    times this factor: GUT and GUTm at ``1 − μ``, QGT at ``(1 − β)/((1 − β)² + βμ)``, QG-GUTm at ``(1 − μ)/(1 + μβ)``,
    QG-DSGDm at 1, DSGDm at ``1/(1 − β)``, D², gradient and momentum tracking at 0. On a topology that varies agents
    come to rest in a cycle, over whose rounds the mean is taken; the ratio is then no longer the same in every mode.
    NaN where DSGD has no bias (one agent, the complete graph), where the rule has no single resting point, where the
    ratio differs between the modes of a W that is not normal, and where the topology never repeats, or varies without
    shared eigenvectors among more than 48 agents. `stability` says whether the rule gets to rest.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    return bias_factor_of(rule, hyperparameters, mixing_of(topology), local_steps)


def step_gain(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], *, local_steps: int = 1) -> float:
    """The distance that the agents' average moves per step under a steady gradient g, over the step −ηg of DSGD.

    ``1/(1 − β)`` for rules with momentum β, ``(1 − μ)/(1 − β − μ)`` for QG-GUTm. Infinite where the average's momentum
    does not decay, NaN for a rule under which a translation of all agents is not free.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    each = round_of(rule, without_decay(hyperparameters), 0.0, local_steps)
    transition, gradient = each.still, each.still_inputs.sum(axis=1)
    if not np.allclose(transition[:, 0], np.eye(len(transition))[0], rtol=0, atol=TOLERANCE):
        return math.nan
    among_states, to_states = transition[1:, 1:], gradient[1:]
    basis = reachable([among_states], [to_states])
    reduced = basis @ among_states @ basis.T
    if radius(reduced) >= 1 - TOLERANCE:
        return math.inf
    states = basis.T @ np.linalg.solve(np.eye(len(reduced)) - reduced, basis @ to_states)
    return float(transition[0, 1:] @ states + gradient[0]) / (-learning_rate(hyperparameters) * each.num_steps)


def noise(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    local_steps: int = 1,
) -> Noise:
    """Variances in the long run where every agent's gradient is ``h (z_i − b_i) + ξ_i``, curvature h.

    The noise ξ_i is independent over agents, steps and coordinates, with mean zero and variance one. On a mode
    ``x' = T(λ) x + G(λ) ξ`` has the covariance ``P = T P Tᴴ + G Gᴴ`` (a discrete Lyapunov equation); the average has
    ``P(1)_00 / N``, the disagreement ``(1/N) Σ_λ P(λ)_00``; on a topology that varies it is the mean over its rounds.
    They are infinite where a mode does not decay, as the average at curvature zero. The disagreement is NaN where the
    topology never repeats, or varies without shared eigenvectors among more than 48 agents. With `local_steps` both are
    those after a mixing.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    result = _noise(round_of(rule, hyperparameters, curvature, local_steps), mixing_of(topology))
    return Noise(result.average / topology.num_agents, result.disagreement)


def noise_amplification(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    local_steps: int = 1,
) -> Noise:
    """The variances of `noise` divided by those of DSGD with the same learning rate and weight decay.

    As ηh falls, the ratio of the average tends to the `step_gain`, its value at curvature zero. The ratio of the
    disagreement is NaN where DSGD has none (one agent, the complete graph).

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    return noise_amplification_of(rule, hyperparameters, mixing_of(topology), curvature, local_steps)


def bias_factor_of(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], mixing: Blocks | Iterated, local_steps: int
) -> float:
    """The factor that `bias_factor` gives, from the rounds of the topology."""
    if isinstance(mixing, Iterated):
        return math.nan
    hyperparameters, lr = without_decay(hyperparameters), learning_rate(hyperparameters)
    rounds = round_of(rule, hyperparameters, 0.0, local_steps), _dsgd(hyperparameters, 0.0, local_steps)
    ours, theirs = (_at_rest(each, mixing) / lr for each in rounds)
    factor = _ratio(*(math.sqrt(mixing.weights @ each**2) for each in (ours, theirs)))
    if mixing.is_normal or not math.isfinite(factor):
        return factor
    return factor if np.allclose(ours, factor * theirs, rtol=1e-6, atol=TOLERANCE) else math.nan


def _at_rest(each: Round, mixing: Blocks) -> Array:
    """The size of z in each block at rest, [k], under a gradient of one in every direction, over all rounds.

    Sizes are root mean squares over the rounds; all are NaN if a mode does not rest.
    """
    squares = []
    for phase in range(mixing.period):
        product, gradients = _over_a_period(mixing.steps(each, phase))
        size = mixing.matrices.shape[-1]
        steady = gradients.reshape(*product.shape[:-1], gradients.shape[-1] // size, size).sum(axis=-2)
        try:
            rest = np.linalg.solve(np.eye(product.shape[-1]) - product, steady)[:, :size]
        except np.linalg.LinAlgError:
            return np.full(len(product), math.nan)
        squares.append((np.abs(rest) ** 2).sum(axis=(1, 2)))
    found: Array = np.sqrt(np.mean(squares, axis=0))
    return found


def _over_a_period(steps: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The map of x over several rounds, and the columns by which all gradients of the rounds change its end."""
    (product, gradients), *others = steps
    for matrices, inputs in others:
        product, gradients = matrices @ product, np.concatenate([matrices @ gradients, inputs], axis=-1)
    return product, gradients


def noise_amplification_of(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    mixing: Blocks | Iterated,
    curvature: float,
    local_steps: int,
) -> Noise:
    """The ratios that `noise_amplification` gives, from the rounds of the topology."""
    ours = _noise(round_of(rule, hyperparameters, curvature, local_steps), mixing)
    theirs = _noise(_dsgd(hyperparameters, curvature, local_steps), mixing)
    is_flat = curvature + hyperparameters.get("weight_decay", 0.0) == 0
    average = step_gain(rule, hyperparameters, local_steps=local_steps) if is_flat else ours.average / theirs.average
    unit = learning_rate(hyperparameters) ** 2
    return Noise(average, _ratio(ours.disagreement / unit, theirs.disagreement / unit))


def _noise(each: Round, mixing: Blocks | Iterated) -> Noise:
    """The variances that `noise` gives, except that the average is that of a single agent."""
    basis = reachable([each.still], each.pushed(each.still_inputs))
    reduced = _covariance((basis @ each.still @ basis.T)[None], (basis @ each.still_inputs)[None])[0]
    average = float(basis[:, 0] @ reduced @ basis[:, 0]) if mixing.keeps_mean else math.nan
    if isinstance(mixing, Iterated) or not mixing.is_normal:
        return Noise(average, math.nan)
    size, variances = mixing.matrices.shape[-1], []
    for phase in range(mixing.period):
        covariance = _covariance(*_over_a_period(mixing.steps(each, phase)))[:, :size, :size]
        variances.append(float(mixing.weights @ covariance.trace(axis1=1, axis2=2).real))
    return Noise(average, math.fsum(variances) / mixing.period)


def _covariance(product: Array, gradients: Array) -> Array:
    """The P with ``P = T P Tᴴ + G Gᴴ`` for each T [k, n, n] and G [k, n, m]: by doubling the sum ``Σ Tᵗ G Gᴴ Tᵗᴴ``.

    All are infinite if a mode does not decay.
    """
    covariance, power = gradients @ _adjoint(gradients), product
    if not (radius(product) < 1 - TOLERANCE).all():
        return np.full(covariance.shape, math.inf)
    while np.abs(power).max(initial=0.0) > NOTHING:
        covariance = covariance + power @ covariance @ _adjoint(power)
        power = power @ power
    found: Array = covariance
    return found


def _adjoint(matrices: Array) -> Array:
    found: Array = matrices.conj().swapaxes(-1, -2)
    return found


def _dsgd(hyperparameters: Mapping[str, Any], curvature: float, local_steps: int) -> Round:
    own = {name: hyperparameters[name] for name in COMMON if name in hyperparameters}
    return round_of("dsgd", own, curvature, local_steps)


def _ratio(ours: float, theirs: float) -> float:
    """The ratio ours / theirs; if theirs is zero it is infinite where ours is not, else NaN."""
    if theirs > ROUNDING:
        return ours / theirs
    return math.inf if ours > ROUNDING else math.nan
