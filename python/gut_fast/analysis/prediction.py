"""All results of the analysis for one rule on one topology."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gut_fast.analysis.choice import auto_mu_of, with_auto_mu
from gut_fast.analysis.limits import Stability, hyperparameter_limit, learning_rate_limit_of, stability_of
from gut_fast.analysis.rounding import Rounding, rounding
from gut_fast.analysis.steady import Noise, bias_factor_of, noise_amplification_of, step_gain
from gut_fast.analysis.transition import coefficients_of, spectrum_of
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The results of `predict`; each entry is the result of the function of that name."""

    rule: str
    hyperparameters: Mapping[str, Any]
    """The rule's hyper-parameters, with defaults filled in."""
    topology: str
    curvature: float
    stability: Stability
    """The result of `stability` at curvature zero."""
    learning_rate_limit: float
    """The result of `learning_rate_limit` at the given curvature."""
    mu_limit: float | None
    """The `stability_limit` of μ; None for a rule without μ."""
    auto_mu: float | None
    """The result of `auto_mu`; None for a rule without μ, NaN if no μ is stable."""
    bias_factor: float
    step_gain: float
    noise: Noise
    """The result of `noise_amplification` at the given learning rate and curvature."""
    rounding: Rounding
    """The result of `rounding` at the given learning rate, curvature, steps and dtype of the state."""


def predict(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    steps: int = 100_000,
    state_dtype: torch.dtype = torch.float32,
) -> Prediction:
    """All results of this package for one rule on one topology.

    Args:
        rule: a rule or its name.
        hyperparameters: those of `modes`; ``mu="auto"`` is replaced by `auto_mu`.
        topology: a static topology.
        curvature: h > 0, for the learning rate's limit and the noise, in units of one over the learning rate.
        steps: the length of the run, for the rounding.
        state_dtype: the dtype of the state, for the rounding.

    Raises:
        TypeError, ValueError: the rule, a hyper-parameter or the curvature is bad, or the topology is not static.
    """
    rule = get_rule(rule)
    hyperparameters = with_auto_mu(rule, hyperparameters, topology)
    spectrum = spectrum_of(topology)
    searched = spectrum.thinned()
    has_mu = "mu" in rule.hyperparameters
    return Prediction(
        rule=rule.name,
        hyperparameters=rule.check({k: v for k, v in hyperparameters.items() if k in rule.hyperparameters}),
        topology=topology.name,
        curvature=curvature,
        stability=stability_of(coefficients_of(rule, hyperparameters), spectrum.eigenvalues),
        learning_rate_limit=learning_rate_limit_of(rule, hyperparameters, searched, curvature),
        mu_limit=hyperparameter_limit(rule, hyperparameters, "mu", searched) if has_mu else None,
        auto_mu=auto_mu_of(rule, hyperparameters, searched) if has_mu else None,
        bias_factor=bias_factor_of(rule, hyperparameters, spectrum),
        step_gain=step_gain(rule, hyperparameters),
        noise=noise_amplification_of(rule, hyperparameters, spectrum, curvature),
        rounding=rounding(rule, hyperparameters, topology, curvature, steps=steps, dtype=state_dtype),
    )
