"""The stability of a rule on a topology: how fast its modes decay, and the limits up to which it stays stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gut_fast.analysis.transition import TOLERANCE, Array, coefficients_of, radius, reachable, spectrum_of, transitions
from gut_fast.rules import Coefficients, UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = [
    "Stability",
    "averaging_rate_limit",
    "domain_ends",
    "end_of_interval",
    "hyperparameter_limit",
    "learning_rate_limit",
    "learning_rate_limit_of",
    "round_down",
    "stability",
    "stability_limit",
    "stability_of",
]


@dataclass(frozen=True)
class Stability:
    """The rates at which the modes of a rule on a topology grow or decay."""

    consensus_rate: float
    """The largest modulus of the consensus modes: the factor of the disagreement between agents per step."""
    average_rate: float
    """The largest modulus of the average mode, such as the momentum of the agents' average."""
    worst_eigenvalue: complex
    """The eigenvalue λ of W with the largest mode, 1 if that is the average mode; a float where W is symmetric."""

    @property
    def spectral_radius(self) -> float:
        """The largest modulus of all modes."""
        return max(self.consensus_rate, self.average_rate)

    @property
    def verdict(self) -> str:
        """The text "stable" if every mode decays, "unstable" if one grows, "marginal" between the two."""
        if abs(self.spectral_radius - 1) <= TOLERANCE:
            return "marginal"
        return "stable" if self.spectral_radius < 1 else "unstable"


def stability(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, curvature: float = 0.0
) -> Stability:
    """The rates of `rule` on `topology` where every agent's loss has this `curvature`; see `modes` for the arguments.

    They are exact except for unstructured graphs of more than 512 agents: there the ends of W's spectrum are estimated
    (to about 1e-4, far closer on graphs without a bottleneck) and the modes are taken at eigenvalues all over the
    interval.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, or the topology is not static.
    """
    return stability_of(coefficients_of(rule, hyperparameters), spectrum_of(topology).eigenvalues, curvature)


def stability_limit(
    rule: str | UpdateRule,
    topology: Topology,
    hyperparameters: Mapping[str, Any] | None = None,
    name: str = "mu",
) -> float:
    """The largest value of the hyper-parameter `name` up to which the rule is stable on `topology`.

    The limit is the end of the stable interval that begins at the low end of the hyper-parameter's domain: the high end
    if all of the domain is stable, NaN if its low end is not. At the limit itself the rule is marginal.
    `hyperparameters` holds the other hyper-parameters, as in `modes`.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, the domain of `name` has no ends, or the topology
            is not static.
    """
    return hyperparameter_limit(get_rule(rule), hyperparameters or {}, name, spectrum_of(topology).thinned())


def averaging_rate_limit(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> float:
    """The largest averaging rate γ in (0, 1] at which the rule is stable on ``topology.lazy(γ)``; NaN if there is none.

    The rule need not be stable at every smaller γ: GUTm with μ > 0.93 at β = 0.9 is unstable at very small γ.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    coefficients, eigenvalues = coefficients_of(rule, hyperparameters), spectrum_of(topology).thinned()

    def is_stable(gamma: float) -> bool:
        return stability_of(coefficients, 1 + gamma * (eigenvalues - 1)).verdict != "unstable"

    if is_stable(1.0):
        return 1.0
    change = _first_change(is_stable, np.linspace(1.0, 1e-3, 101))
    return math.nan if change is None else change


def learning_rate_limit(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, curvature: float = 1.0
) -> float:
    """The learning rate up to which the rule is stable where every agent's loss has this curvature h > 0.

    The limit is the end of the stable interval that begins at zero: ``2/h`` for DSGD, NaN if there is no such interval,
    infinity if it ends beyond ``1000/h``. A rule whose state is in gradient units depends on ηh alone, so smaller
    curvatures are stable too. An ``lr`` among the hyper-parameters is ignored; weight decay adds to h.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad, or the curvature is not positive.
    """
    return learning_rate_limit_of(rule, hyperparameters, spectrum_of(topology).thinned(), curvature)


def stability_of(coefficients: Coefficients, eigenvalues: Array, curvature: float = 0.0) -> Stability:
    """The rates that `stability` gives, from the coefficients of a step and the consensus eigenvalues."""
    average_rate = _average_rate(coefficients, curvature)
    if not len(eigenvalues):
        return Stability(0.0, average_rate, 1.0)
    rates = radius(transitions(coefficients, eigenvalues, curvature)[0])
    worst = int(rates.argmax())
    consensus_rate = float(rates[worst])
    return Stability(consensus_rate, average_rate, eigenvalues[worst].item() if consensus_rate > average_rate else 1.0)


def _average_rate(coefficients: Coefficients, curvature: float) -> float:
    """The average mode's largest modulus on the space that z and the gradients reach from zero state.

    The eigenvalue 1 of a free translation of all agents is left out.
    """
    transition, gradient = transitions(coefficients, 1.0, curvature)
    translation = np.eye(len(transition))[0]
    basis = reachable(transition, [translation, gradient])
    reduced = basis @ transition @ basis.T
    if np.allclose(transition[:, 0], translation, rtol=0, atol=TOLERANCE):
        reduced = reduced[1:, 1:]
    return float(radius(reduced))


def hyperparameter_limit(rule: UpdateRule, hyperparameters: Mapping[str, Any], name: str, eigenvalues: Array) -> float:
    """The limit that `stability_limit` gives, from the consensus eigenvalues."""

    def is_stable(value: float) -> bool:
        return stability_of(coefficients_of(rule, {**hyperparameters, name: value}), eigenvalues).verdict != "unstable"

    low, high = domain_ends(rule, name)
    return end_of_interval(is_stable, np.linspace(low, high, 101), beyond=high)


def learning_rate_limit_of(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], eigenvalues: Array, curvature: float
) -> float:
    """The limit that `learning_rate_limit` gives, from the consensus eigenvalues."""
    if not 0 < curvature < math.inf:
        raise ValueError(f"curvature must be positive and finite to limit the learning rate, got {curvature}")

    def is_stable(lr: float) -> bool:
        coefficients = coefficients_of(rule, {**hyperparameters, "lr": lr})
        return stability_of(coefficients, eigenvalues, curvature).verdict != "unstable"

    return end_of_interval(is_stable, np.geomspace(1e-4, 1e3, 71) / curvature, beyond=math.inf)


def domain_ends(rule: UpdateRule, name: str) -> tuple[float, float]:
    """The smallest and the largest value in the hyper-parameter's domain."""
    if name not in rule.hyperparameters:
        known = ", ".join(rule.hyperparameters) or "none"
        raise ValueError(f"rule {rule.name!r} has no hyper-parameter {name!r}; it has: {known}")
    domain = rule.domain(name)
    if not math.isfinite(domain.high - domain.low):
        raise ValueError(
            f"rule {rule.name!r}: the domain of {name!r} has no ends, so its stability limit is not defined"
        )
    return domain.low, math.nextafter(domain.high, domain.low) if domain.open_above else domain.high


def end_of_interval(holds: Callable[[float], bool], values: Array, beyond: float) -> float:
    """The value up to which `holds` is true from values[0] on: NaN if false there, `beyond` if true at all values."""
    if not holds(float(values[0])):
        return math.nan
    change = _first_change(holds, values)
    return beyond if change is None else change


def _first_change(holds: Callable[[float], bool], values: Iterable[float]) -> float | None:
    """The first point along the values where `holds` changes, on the side where it is true; None if there is none."""
    before, *others = map(float, values)
    holds_at_start = holds(before)
    for value in others:
        if holds(value) != holds_at_start:
            return _bisect(holds, before, value) if holds_at_start else _bisect(holds, value, before)
        before = value
    return None


def _bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def round_down(limit: float) -> float:
    """The largest number of three decimals safely below `limit`, so that it is stable and not marginal."""
    return math.floor((limit - 1e-6) * 1000) / 1000
