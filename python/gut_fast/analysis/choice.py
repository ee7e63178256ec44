"""``mu="auto"``: which tracking scale to take on a topology.

GUT's bias is ``1 − μ`` times DSGD's, so as much tracking as possible is wanted. What speaks against much of it is seen
before a run as well: tracking is an integrator in a feedback loop, and as μ grows the loop's slowest mode, at one end
of W's spectrum or the other, decays more and more slowly, until it does not decay at all. A slow mode prolongs the
transient after every change of the gradients and stores up their noise. So μ is as large as leaves these two things
within a factor of two (`COST`) of what they are without tracking, at the low end of its domain, where GUT is DSGD,
GUTm is QG-DSGDm, and QGT has momentum that is never averaged:

1. the time that disagreement takes to die out, ``1/(1 − rate)`` steps;
2. the step of the average under a steady gradient. It concerns rules that track through their momentum: the average
   of QG-GUTm moves with momentum β + μ.

For GUT that is 0.95 on a ring of 16, 0.99 on one of 32, 0.15 on the 4 × 4 torus with uniform weights and 0.99 with lazy
ones; for QG-GUTm at β = 0.9 it is 0.05. Another criterion would be the fastest consensus, on a ring at
``√μ = (1 − √(1 − λ₂))/√λ₂``. It buys a transient that is shorter than DSGD's with a bias that stays: on the ring of 16
it is 0.63, seven times the bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gut_fast.analysis.limits import domain_ends, end_of_interval, round_down, stability_of
from gut_fast.analysis.linear import Array, coefficients_of, without_decay
from gut_fast.analysis.spectrum import spectrum_of
from gut_fast.analysis.steady import step_gain
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["auto_mu", "auto_mu_of", "with_auto_mu"]

AUTO = "auto"

COST = 2.0
"""By what factor tracking may prolong disagreement and the steps of the average."""

ROUNDING = 1e-6
"""What rounding may do to a rate where two modes meet."""


def auto_mu(rule: str | UpdateRule, topology: Topology, hyperparameters: Mapping[str, Any] | None = None) -> float:
    """The hyper-parameter μ that ``mu="auto"`` stands for: three decimals, by the criterion above.

    It is the low end of the domain where any tracking is too much, and never quite the high end: at μ = 1 an agent
    would never forget what rounding leaves in r.

    Args:
        rule: a rule with a hyper-parameter ``mu``, or its name.
        topology: a static one.
        hyperparameters: the others, such as the momentum; a ``mu`` among them is not looked at.

    Raises:
        TypeError, ValueError: a bad rule or hyper-parameter, no ``mu`` of bounded domain; the topology is not static;
            the rule is unstable on it even at the low end of the domain.
    """
    rule, hyperparameters = get_rule(rule), dict(hyperparameters or {})
    if not topology.is_static:
        raise ValueError(
            f'rule {rule.name!r}: mu="auto" follows from the modes of a static topology, and {topology.name} changes '
            "from step to step; give mu as a number"
        )
    mu = auto_mu_of(rule, hyperparameters, spectrum_of(topology).thinned())
    if math.isnan(mu):
        raise ValueError(
            f'rule {rule.name!r}: no mu is stable on {topology.name}, so mu="auto" has nothing to choose; '
            "use another topology, or topology.lazy(gamma)"
        )
    return mu


def auto_mu_of(rule: UpdateRule, hyperparameters: Mapping[str, Any], eigenvalues: Array) -> float:
    """As `auto_mu`, from the consensus eigenvalues; NaN where the low end of the domain is not stable."""

    def at(mu: float) -> tuple[float, float, bool]:
        values = {**without_decay(hyperparameters), "mu": mu}
        found = stability_of(coefficients_of(rule, values), eigenvalues)
        return found.consensus_rate, step_gain(rule, values), found.verdict != "unstable"

    low, high = domain_ends(rule, "mu")
    untracked_rate, untracked_gain, _ = at(low)

    def is_free(mu: float) -> bool:
        rate, gain, is_stable = at(mu)
        is_lasting = 1 - untracked_rate > COST * (1 - rate) + ROUNDING
        return is_stable and not is_lasting and not gain > COST * untracked_gain

    end = end_of_interval(is_free, np.linspace(low, high, 51), beyond=high)
    return end if math.isnan(end) else max(low, round_down(end))


def with_auto_mu(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """The hyper-parameters, or all settings of a parameter group, with a number for ``mu="auto"``.

    Raises:
        TypeError, ValueError: as `auto_mu`, where "auto" is asked for; else nothing is looked at.
    """
    mu, rule = hyperparameters.get("mu"), get_rule(rule)
    if not isinstance(mu, str) or mu != AUTO:
        return dict(hyperparameters)
    others = {name: value for name, value in hyperparameters.items() if name in rule.hyperparameters and name != "mu"}
    return {**hyperparameters, "mu": auto_mu(rule, topology, others)}
