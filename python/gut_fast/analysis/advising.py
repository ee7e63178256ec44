"""What is unstable about a rule on a topology, in words: the warning of the optimizers' constructors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gut_fast.analysis.limits import averaging_rate_limit, hyperparameter_limit, round_down, stability_of
from gut_fast.analysis.linear import Array, coefficients_of
from gut_fast.analysis.spectrum import spectrum_of
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["advice"]


def advice(rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology) -> str | None:
    """What is unstable about `rule` on `topology` and what to do, as a clause to put behind its name; None if nothing.

    Consensus modes that are only marginal pass: curvature damps them, as it does D² on an even ring. An average that
    keeps its momentum for ever (QG-GUTm at β + μ = 1) does not. On a topology that changes from step to step only the
    average is looked at.

    Raises:
        TypeError, ValueError: a bad rule or hyper-parameter.
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
