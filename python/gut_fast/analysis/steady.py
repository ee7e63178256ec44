"""The steady state of a stable rule: its bias at rest, the length of the average's steps, and its answer to noise.

All three follow from linear systems theory, mode by mode: the response of a linear system to a steady or a white input,
here the agents' gradients. Each is compared with DSGD at the same learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gut_fast.analysis.transition import (
    TOLERANCE,
    Array,
    Spectrum,
    coefficients_of,
    radius,
    reachable,
    spectrum_of,
    transitions,
    without_decay,
)
from gut_fast.rules import Coefficients, UpdateRule
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

ROUNDING = 1e-12
"""The size of a disagreement of zero after rounding, in units of the learning rate."""


@dataclass(frozen=True)
class Noise:
    """The variances in the long run under white noise in the agents' gradients."""

    average: float
    """The variance E (z̄ − rest)² of the agents' average z̄ per coordinate; NaN if W's columns do not sum to one."""
    disagreement: float
    """The consensus error E (1/N) Σ_i (z_i − z̄)² per coordinate; NaN if W is not normal."""


def bias_factor(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> float:
    """The distance at which agents rest from one another because their data differ, over that of DSGD.

    DSGD is taken at the same learning rate.

    With full gradients ``g_i = h (z_i − b_i)`` a rule rests at ``x = F(λ) x + G(λ) g`` on the mode of eigenvalue λ,
    where x is (z, state), F the rule's transition and G its gradient column. To first order in η that is
    ``z(λ) = [(I − F(λ))⁻¹ G(λ)]_0 g(λ)``, with g the local gradients at the average; DSGD has ``−ηλ/(1−λ)``. The factor
    is the ratio of the two disagreements ``Σ_λ |z(λ)|²``, root mean square over local gradients that are independent.

    A rule of the table has the same ratio in every mode, so it rests exactly where DSGD rests with the learning rate
    times this factor: GUT and GUTm at ``1 − μ``, QGT at ``(1 − β)/((1 − β)² + βμ)``, QG-GUTm at ``(1 − μ)/(1 + μβ)``,
    QG-DSGDm at 1, DSGDm at ``1/(1 − β)``, D², gradient and momentum tracking at 0. NaN where DSGD has no bias (one
    agent, the complete graph), where the rule has no single resting point, or where the ratio differs between the modes
    of a W that is not normal. `stability` says whether the rule gets to rest.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, or the topology is not static.
    """
    return bias_factor_of(rule, hyperparameters, spectrum_of(topology))


def step_gain(rule: str | UpdateRule, hyperparameters: Mapping[str, Any]) -> float:
    """The distance that the agents' average moves per step under a steady gradient g, over the step −ηg of DSGD.

    ``1/(1 − β)`` for rules with momentum β, ``(1 − μ)/(1 − β − μ)`` for QG-GUTm. Infinite where the average's momentum
    does not decay, NaN for a rule under which a translation of all agents is not free.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    coefficients = coefficients_of(rule, without_decay(hyperparameters))
    transition, gradient = transitions(coefficients, 1.0)
    if not np.allclose(transition[:, 0], np.eye(len(transition))[0], rtol=0, atol=TOLERANCE):
        return math.nan
    among_states, to_states = transition[1:, 1:], gradient[1:]
    basis = reachable(among_states, [to_states])
    reduced = basis @ among_states @ basis.T
    if radius(reduced) >= 1 - TOLERANCE:
        return math.inf
    states = basis.T @ np.linalg.solve(np.eye(len(reduced)) - reduced, basis @ to_states)
    return float(transition[0, 1:] @ states + gradient[0]) / -_learning_rate(hyperparameters)


def noise(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, curvature: float = 1.0
) -> Noise:
    """Variances in the long run where every agent's gradient is ``h (z_i − b_i) + ξ_i``, curvature h.

    The noise ξ_i is independent over agents, steps and coordinates, with mean zero and variance one. On a mode
    ``x' = T(λ) x + G(λ) ξ`` has the covariance ``P = T P Tᴴ + G Gᴴ`` (a discrete Lyapunov equation); the average has
    ``P(1)_00 / N``, the disagreement ``(1/N) Σ_λ P(λ)_00``. They are infinite where a mode does not decay, as the
    average at curvature zero.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    spectrum = spectrum_of(topology)
    result = _noise(coefficients_of(rule, hyperparameters), spectrum, curvature)
    return Noise(result.average / topology.num_agents, result.disagreement)


def noise_amplification(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, curvature: float = 1.0
) -> Noise:
    """The variances of `noise` divided by those of DSGD with the same learning rate and weight decay.

    As ηh falls, the ratio of the average tends to the `step_gain`, its value at curvature zero. The ratio of the
    disagreement is NaN where DSGD has none (one agent, the complete graph).

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    return noise_amplification_of(rule, hyperparameters, spectrum_of(topology), curvature)


def bias_factor_of(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], spectrum: Spectrum) -> float:
    """The factor that `bias_factor` gives, from the spectrum."""
    hyperparameters, lr = without_decay(hyperparameters), _learning_rate(hyperparameters)
    ours, theirs = (
        _at_rest(each, spectrum.eigenvalues) / lr
        for each in (coefficients_of(rule, hyperparameters), _dsgd(hyperparameters))
    )
    factor = _ratio(*(math.sqrt(spectrum.weights @ each**2) for each in (ours, theirs)))
    if spectrum.is_normal or not math.isfinite(factor):
        return factor
    return factor if np.allclose(ours, factor * theirs, rtol=1e-6, atol=TOLERANCE) else math.nan


def _at_rest(coefficients: Coefficients, eigenvalues: Array) -> Array:
    """The modulus |z| of each mode at rest under a gradient of one; all NaN if a mode does not rest."""
    matrices, gradient = transitions(coefficients, eigenvalues)
    try:
        rest = np.linalg.solve(np.eye(matrices.shape[-1]) - matrices, gradient[..., None])[..., 0, 0]
    except np.linalg.LinAlgError:
        return np.full(len(eigenvalues), math.nan)
    found: Array = np.abs(rest)
    return found


def noise_amplification_of(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], spectrum: Spectrum, curvature: float
) -> Noise:
    """The ratios that `noise_amplification` gives, from the spectrum."""
    ours = _noise(coefficients_of(rule, hyperparameters), spectrum, curvature)
    theirs = _noise(_dsgd(hyperparameters), spectrum, curvature)
    is_flat = curvature + hyperparameters.get("weight_decay", 0.0) == 0
    average = step_gain(rule, hyperparameters) if is_flat else ours.average / theirs.average
    unit = _learning_rate(hyperparameters) ** 2
    return Noise(average, _ratio(ours.disagreement / unit, theirs.disagreement / unit))


def _noise(coefficients: Coefficients, spectrum: Spectrum, curvature: float) -> Noise:
    """The variances that `noise` gives, except that the average is that of a single agent."""
    transition, gradient = transitions(coefficients, 1.0, curvature)
    basis = reachable(transition, [gradient])
    reduced = (basis @ transition @ basis.T)[None], (basis @ gradient)[None], basis[:, 0]
    average = _variance(*reduced, np.ones(1)) if spectrum.keeps_mean else math.nan
    matrices, gradients = transitions(coefficients, spectrum.eigenvalues, curvature)
    z = np.eye(len(transition))[0]
    disagreement = _variance(matrices, gradients, z, spectrum.weights) if spectrum.is_normal else math.nan
    return Noise(average, disagreement)


def _variance(matrices: Array, gradients: Array, output: Array, weights: Array) -> float:
    """The sum Σ weights · outputᵀ P output, where P = T P Tᴴ + G Gᴴ for each T [k, n, n] and G [k, n].

    It is infinite if a mode does not decay.
    """
    if not (radius(matrices) < 1 - TOLERANCE).all():
        return math.inf
    size = len(output)
    doubled = np.einsum("kia,kjb->kijab", matrices, matrices.conj()).reshape(-1, size**2, size**2)
    driven = np.einsum("ki,kj->kij", gradients, gradients.conj()).reshape(-1, size**2, 1)
    covariance = np.linalg.solve(np.eye(size**2) - doubled, driven).reshape(-1, size, size)
    return float(weights @ (output @ covariance @ output).real)


def _learning_rate(hyperparameters: Mapping[str, Any]) -> float:
    return float(hyperparameters.get("lr", 1.0) or 1.0)


def _dsgd(hyperparameters: Mapping[str, Any]) -> Coefficients:
    return coefficients_of("dsgd", {name: hyperparameters[name] for name in COMMON if name in hyperparameters})


def _ratio(ours: float, theirs: float) -> float:
    """The ratio ours / theirs; if theirs is zero it is infinite where ours is not, else NaN."""
    if theirs > ROUNDING:
        return ours / theirs
    return math.inf if ours > ROUNDING else math.nan
