"""Everything that is known of a rule on a topology before a run, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gut_fast.analysis.choice import auto_mu_of, with_auto_mu
from gut_fast.analysis.limits import Stability, hyperparameter_limit, learning_rate_limit_of, stability_of
from gut_fast.analysis.linear import coefficients_of
from gut_fast.analysis.spectrum import spectrum_of
from gut_fast.analysis.steady import Noise, bias_factor_of, noise_amplification_of, step_gain
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What `predict` finds; each entry is that of the function named."""

    rule: str
    hyperparameters: Mapping[str, Any]
    """The rule's own, defaults filled in."""
    topology: str
    curvature: float
    stability: Stability
    """`stability` at curvature zero."""
    learning_rate_limit: float
    """`learning_rate_limit` at the curvature."""
    mu_limit: float | None
    """`stability_limit` of μ, None for a rule without it."""
    auto_mu: float | None
    """`auto_mu`, None for a rule without it, NaN where no μ is stable."""
    bias_factor: float
    step_gain: float
    noise: Noise
    """`noise_amplification` at the learning rate and the curvature."""


def predict(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, curvature: float = 1.0
) -> Prediction:
    """Everything of this package about one rule on one topology.

    Args:
        rule: a rule or its name.
        hyperparameters: as in `modes`; ``mu="auto"`` is chosen.
        topology: a static one.
        curvature: h > 0, for the learning rate's limit and the noise, in units of one over the learning rate.

    Raises:
        TypeError, ValueError: a bad rule, hyper-parameter or curvature; the topology is not static.
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
    )
