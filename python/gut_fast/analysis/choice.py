"""The choices that suit a topology: the tracking scale of ``mu="auto"``, and remedies for what is unstable.

GUT's bias is ``1 − μ`` times DSGD's, so as much tracking as possible is wanted. Its price is known before a run as
well: tracking is an integrator in a feedback loop, and as μ grows the loop's slowest mode, at one end of W's spectrum
or the other, decays more and more slowly, until it does not decay at all. A slow mode prolongs the transient after
every change of the gradients and stores up their noise. So ``mu="auto"`` is the largest μ that keeps two quantities
within a factor of two (`COST`) of their values without tracking, at the low end of its domain, where GUT is DSGD, GUTm
is QG-DSGDm, and QGT has momentum that is never averaged:

1. the time that disagreement takes to die out, ``1/(1 − rate)`` steps;
2. the step of the average under a steady gradient, which grows in rules that track through their momentum: the average
   of QG-GUTm moves with momentum β + μ.

For GUT this μ is 0.95 on a ring of 16, 0.99 on a ring of 32, 0.15 on the 4 × 4 torus with uniform weights and 0.99 with
lazy weights; for QG-GUTm at β = 0.9 it is 0.05. Another criterion would be the fastest consensus, on a ring at
``√μ = (1 − √(1 − λ₂))/√λ₂``. It makes the transient shorter than DSGD's but leaves a bias: on the ring of
16 it is μ = 0.63, with seven times the bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gut_fast.analysis.limits import (
    averaging_rate_limit,
    domain_ends,
    end_of_interval,
    hyperparameter_limit,
    round_down,
    stability_of,
)
from gut_fast.analysis.steady import step_gain
from gut_fast.analysis.transition import Array, coefficients_of, spectrum_of, without_decay
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["AUTO", "advice", "auto_mu", "auto_mu_of", "with_auto_mu"]

AUTO = "auto"
"""The value of ``mu`` that asks for `auto_mu`."""

COST = 2.0
"""The factor by which tracking may prolong disagreement and the steps of the average."""

ROUNDING = 1e-6
"""The error that rounding may leave in a rate where two modes meet."""


def auto_mu(rule: str | UpdateRule, topology: Topology, hyperparameters: Mapping[str, Any] | None = None) -> float:
    """The hyper-parameter μ that ``mu="auto"`` stands for, to three decimals, by the criterion of this module.

    It is the low end of the domain if any tracking is too much, and never quite the high end: at μ = 1 an agent would
    never forget what rounding leaves in r.

    Args:
        rule: a rule with a hyper-parameter ``mu``, or its name.
        topology: a static topology.
        hyperparameters: the other hyper-parameters, such as the momentum; a ``mu`` among them is ignored.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, the rule has no ``mu`` with a bounded domain, the
            topology is not static, or the rule is unstable on it even at the low end of the domain.
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
    """The μ that `auto_mu` gives, from the consensus eigenvalues; NaN if the low end of the domain is not stable."""

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
    """The hyper-parameters, or all settings of a parameter group, with a number in place of ``mu="auto"``.

    Without ``mu="auto"`` nothing is checked.

    Raises:
        TypeError, ValueError: `auto_mu` cannot choose.
    """
    mu, rule = hyperparameters.get("mu"), get_rule(rule)
    if not isinstance(mu, str) or mu != AUTO:
        return dict(hyperparameters)
    others = {name: value for name, value in hyperparameters.items() if name in rule.hyperparameters and name != "mu"}
    return {**hyperparameters, "mu": auto_mu(rule, topology, others)}


def advice(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> str | None:
    """A clause that says what is unstable about `rule` on `topology` and what to do; None if nothing is.

    The clause goes behind the rule's name, as in the warning of the optimizers' constructors. Consensus modes that are
    only marginal pass: curvature damps them, as it does D² on an even ring. An average that keeps its momentum for ever
    (QG-GUTm at β + μ = 1) does not pass. On a topology that changes from step to step only the average is examined.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    rule = get_rule(rule)
    settings = _settings(rule, hyperparameters)
    eigenvalues = spectrum_of(topology).eigenvalues if topology.is_static else np.empty(0)
    result = stability_of(coefficients_of(rule, hyperparameters), eigenvalues)
    if result.average_rate >= 1 - 1e-12:
        cause = f"the average over agents moves with momentum {result.average_rate:.4g}, which must stay below 1"
        remedies = _smaller_values(rule, hyperparameters, topology)
        return f"{settings}unstable: {cause}; {_choice(remedies)}"
    if result.verdict == "unstable":
        cause = f"the mode at W's eigenvalue {result.worst_eigenvalue:.3g} grows {result.consensus_rate:.4g}-fold"
        remedies = _smaller_rate(rule, hyperparameters, topology) + _smaller_values(rule, hyperparameters, topology)
        return f"{settings}unstable on {topology.name}: {cause} a step; {_choice(remedies)}"
    return None


def _settings(rule: UpdateRule, hyperparameters: Mapping[str, Any]) -> str:
    values = rule.check({name: value for name, value in hyperparameters.items() if name in rule.hyperparameters})
    numbers = [f"{name}={value:g}" for name, value in values.items() if not isinstance(value, bool)]
    return f"{', '.join(numbers)} is " if numbers else ""


def _smaller_rate(rule: UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> list[str]:
    gamma = averaging_rate_limit(rule, hyperparameters, topology)
    return [] if math.isnan(gamma) else [f"topology.lazy(gamma) with gamma <= {round_down(gamma)}"]


def _smaller_values(rule: UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> list[str]:
    eigenvalues: Array = spectrum_of(topology).thinned() if topology.is_static else np.empty(0)
    names = [name for name in ("mu", "momentum") if name in rule.hyperparameters]
    limits = {name: hyperparameter_limit(rule, hyperparameters, name, eigenvalues) for name in names}
    return [f"{name} <= {round_down(limit)}" for name, limit in limits.items() if limit > 0]


def _choice(remedies: list[str]) -> str:
    return f"use {' or '.join(remedies)}" if remedies else "use another topology"
