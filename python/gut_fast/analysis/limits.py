"""The stability of a rule on a topology: how fast its modes decay, and the limits up to which it stays stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gut_fast.analysis.periods import Blocks, Iterated, mixing_of
from gut_fast.analysis.transition import TOLERANCE, Array, Round, radius, reachable, round_of
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = [
    "Search",
    "Stability",
    "averaging_rate_limit",
    "averaging_rate_limit_of",
    "domain_ends",
    "effort",
    "hyperparameter_limit",
    "learning_rate_limit",
    "learning_rate_limit_of",
    "round_down",
    "stabilities_of",
    "stability",
    "stability_limit",
]

FINE, COARSE, ROUGH = (100, 24), (25, 12), (12, 7)
"""Into how many parts a search divides a domain, and how often it halves the one in which the limit lies: for modes of
a single W, over a period, and where a rate is estimated."""


@dataclass(frozen=True)
class Stability:
    """The rates at which the modes of a rule on a topology grow or decay, per step."""

    consensus_rate: float
    """The largest modulus of the consensus modes: the factor of the disagreement between agents per step."""
    average_rate: float
    """The largest modulus of the average mode, such as the momentum of the agents' average."""
    worst_eigenvalue: complex | None = None
    """The eigenvalue λ of W with the largest mode, a float where W is symmetric; 1 if that is the average mode, None
    where W varies with time."""
    error: float = 0.0
    """The standard error of the logarithm of `consensus_rate`, where it is estimated and not computed."""

    @property
    def spectral_radius(self) -> float:
        """The largest modulus of all modes."""
        return max(self.consensus_rate, self.average_rate)

    @property
    def verdict(self) -> str:
        """The text "stable" if every mode decays, "unstable" if one grows, "marginal" between the two.

        Where the rate is estimated, two standard errors are granted: "marginal" means that neither is certain.
        """
        if self._at(-2) > 1 + TOLERANCE:
            return "unstable"
        return "stable" if self._at(2) < 1 - TOLERANCE else "marginal"

    @property
    def never_grows(self) -> bool:
        """True if no mode grows, beyond doubt where the rate is estimated."""
        return self._at(2) <= 1 + TOLERANCE

    def _at(self, errors: float) -> float:
        return max(self.average_rate, self.consensus_rate * math.exp(errors * self.error))


def stability(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 0.0,
    *,
    local_steps: int = 1,
) -> Stability:
    """The rates of `rule` on `topology` where every agent's loss has this `curvature`; see `modes` for the arguments.

    With `local_steps` H agents mix at the end of each round of H steps, and a topology that varies moves on by a round.
    On a topology that varies the rate is that of a whole period, per step: the root of the spectral radius of the
    product of its rounds. On one that never repeats it is the Lyapunov exponent of its first 460 rounds, of fewer with
    many agents, and has an error.

    Rates are exact except for unstructured graphs of more than 512 agents, where the ends of W's spectrum are estimated
    (to about 1e-4, far closer on graphs without a bottleneck) and the modes are taken at eigenvalues all over the
    interval; and for matrices that vary and share no eigenvectors, of more than 48 agents, where `Stability.error` is
    what the last half of an iteration has changed.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    (found,) = stabilities_of([round_of(rule, hyperparameters, curvature, local_steps)], mixing_of(topology))
    return found


def stability_limit(
    rule: str | UpdateRule,
    topology: Topology,
    hyperparameters: Mapping[str, Any] | None = None,
    name: str = "mu",
    *,
    local_steps: int = 1,
) -> float:
    """The largest value of the hyper-parameter `name` up to which the rule is stable on `topology`.

    The limit is the end of the stable interval that begins at the low end of the hyper-parameter's domain: the high end
    if all of the domain is stable, NaN if its low end is not. At the limit itself the rule is marginal; where rates are
    estimated, it is beyond doubt no more than that. `hyperparameters` holds the other hyper-parameters, as in `modes`.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, or the domain of `name` has no ends.
    """
    mixing = mixing_of(topology).thinned()
    return hyperparameter_limit(get_rule(rule), hyperparameters or {}, name, mixing, local_steps)


def averaging_rate_limit(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, *, local_steps: int = 1
) -> float:
    """The largest averaging rate γ in (0, 1] at which the rule is stable on ``topology.lazy(γ)``; NaN if there is none.

    The rule need not be stable at every smaller γ: GUTm with μ > 0.93 at β = 0.9 is unstable at very small γ.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad.
    """
    return averaging_rate_limit_of(round_of(rule, hyperparameters, 0.0, local_steps), mixing_of(topology).thinned())


def averaging_rate_limit_of(each: Round, mixing: Blocks | Iterated) -> float:
    """The limit that `averaging_rate_limit` gives."""

    def are_stable(gammas: Sequence[float]) -> list[bool]:
        return [found.never_grows for found in stabilities_of([each.lazy(gamma) for gamma in gammas], mixing)]

    return Search(are_stable, mixing).first_true(np.linspace(1.0, 1e-3, effort(mixing)[0] + 1))


def learning_rate_limit(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    local_steps: int = 1,
) -> float:
    """The learning rate up to which the rule is stable where every agent's loss has this curvature h > 0.

    The limit is the end of the stable interval that begins at zero: ``2/h`` for DSGD, NaN if there is no such interval,
    infinity if it ends beyond ``1000/h``. A rule whose state is in gradient units depends on ηh alone, so smaller
    curvatures are stable too. An ``lr`` among the hyper-parameters is ignored; weight decay adds to h.

    Raises:
        TypeError, ValueError: an argument of `stability` is bad, or the curvature is not positive.
    """
    return learning_rate_limit_of(rule, hyperparameters, mixing_of(topology).thinned(), curvature, local_steps)


def stabilities_of(rounds: Sequence[Round], mixing: Blocks | Iterated) -> list[Stability]:
    """The rates that `stability` gives, for several rounds of equally many steps."""
    results, reached = [], [each.reached() for each in rounds]
    for each, found in zip(rounds, mixing.consensus(reached), strict=True):
        average = _average_rate(each)
        eigenvalue = 1.0 if average >= found.rate else found.eigenvalue
        results.append(Stability(found.rate, average, eigenvalue, found.error))
    return results


def _average_rate(each: Round) -> float:
    """The average mode's largest modulus per step on the space that z and the gradients reach from zero state.

    The eigenvalue 1 of a free translation of all agents is left out.
    """
    translation = np.eye(len(each.still))[0]
    basis = reachable([each.still], [translation, *each.pushed(each.still_inputs)])
    reduced = basis @ each.still @ basis.T
    if np.allclose(each.still[:, 0], translation, rtol=0, atol=TOLERANCE):
        reduced = reduced[1:, 1:]
    return each.per_step(float(radius(reduced)))


def hyperparameter_limit(
    rule: UpdateRule, hyperparameters: Mapping[str, Any], name: str, mixing: Blocks | Iterated, local_steps: int
) -> float:
    """The limit that `stability_limit` gives, from the rounds of the topology."""

    def are_stable(values: Sequence[float]) -> list[bool]:
        rounds = [round_of(rule, {**hyperparameters, name: value}, 0.0, local_steps) for value in values]
        return [found.never_grows for found in stabilities_of(rounds, mixing)]

    low, high = domain_ends(rule, name)
    return Search(are_stable, mixing).end_of_interval(np.linspace(low, high, effort(mixing)[0] + 1), beyond=high)


def learning_rate_limit_of(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    mixing: Blocks | Iterated,
    curvature: float,
    local_steps: int,
) -> float:
    """The limit that `learning_rate_limit` gives, from the rounds of the topology."""
    if not 0 < curvature < math.inf:
        raise ValueError(f"curvature must be positive and finite to limit the learning rate, got {curvature}")

    def are_stable(rates: Sequence[float]) -> list[bool]:
        rounds = [round_of(rule, {**hyperparameters, "lr": lr}, curvature, local_steps) for lr in rates]
        return [found.never_grows for found in stabilities_of(rounds, mixing)]

    return Search(are_stable, mixing).end_of_interval(np.geomspace(1e-4, 1e3, 71) / curvature, beyond=math.inf)


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


def effort(mixing: Blocks | Iterated) -> tuple[int, int]:
    """The parts and halvings of a search: `FINE`, `COARSE` or `ROUGH`."""
    if isinstance(mixing, Iterated):
        return ROUGH
    return FINE if mixing.period == 1 else COARSE


@dataclass(frozen=True)
class Search:
    """A search for the point where a property of a number changes, which is asked for several numbers at once."""

    holds: Callable[[Sequence[float]], list[bool]]
    mixing: Blocks | Iterated

    def end_of_interval(self, values: Array, beyond: float) -> float:
        """The value up to which the property holds from values[0] on: NaN if not there, `beyond` if at all values."""
        found, (start, *others) = self._answers(values), map(float, values)
        if not next(found):
            return math.nan
        for value, is_true in zip(others, found, strict=True):
            if not is_true:
                return self._bisect(start, value)
            start = value
        return beyond

    def first_true(self, values: Array) -> float:
        """The first point along the values where the property holds: NaN if at none of them."""
        before = None
        for value, is_true in zip(map(float, values), self._answers(values), strict=True):
            if is_true:
                return value if before is None else self._bisect(value, before)
            before = value
        return math.nan

    def _answers(self, values: Array) -> Iterator[bool]:
        """The property at each value, found for the first alone, as it often decides, and for the others in groups."""
        yield from self.holds([float(values[0])])
        for start in range(1, len(values), self.mixing.at_once):
            yield from self.holds([float(value) for value in values[start : start + self.mixing.at_once]])

    def _bisect(self, inside: float, outside: float) -> float:
        """The end of the interval in which the property holds, divided into several parts each time."""
        parts = self.mixing.at_once + 1
        for _ in range(math.ceil(effort(self.mixing)[1] / math.log2(parts))):
            points = np.linspace(inside, outside, parts + 1)
            held = [True, *self.holds([float(point) for point in points[1:-1]]), False]
            first = held.index(False)
            inside, outside = float(points[first - 1]), float(points[first])
        return inside


def round_down(limit: float) -> float:
    """The largest number of three decimals safely below `limit`, so that it is stable and not marginal; NaN of NaN."""
    return limit if math.isnan(limit) else math.floor((limit - 1e-6) * 1000) / 1000
