"""All results of the analysis for one rule on one topology."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gut_fast.analysis.choice import auto_kappa_of, auto_mu_of, with_auto
from gut_fast.analysis.limits import Stability, hyperparameter_limit, learning_rate_limit_of, stabilities_of
from gut_fast.analysis.periods import mixing_of
from gut_fast.analysis.rounding import Rounding, rounding
from gut_fast.analysis.steady import Noise, bias_factor_of, noise_amplification_of, step_gain
from gut_fast.analysis.transition import round_of
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
    kappa_limit: float | None
    """The `stability_limit` of κ; None for a rule without κ."""
    auto_kappa: float | None
    """The result of `auto_kappa`; None for a rule without κ, NaN if no κ is stable."""
    bias_factor: float
    """NaN where there is none, or on a topology that `bias_factor` does not solve."""
    step_gain: float
    noise: Noise
    """The result of `noise_amplification` at the given learning rate and curvature; NaN as `bias_factor`."""
    rounding: Rounding
    """The result of `rounding` at the given learning rate, curvature, steps and dtype of the state."""


def predict(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    local_steps: int = 1,
    steps: int = 100_000,
    state_dtype: torch.dtype = torch.float32,
) -> Prediction:
    """All results of this package for one rule on one topology.

    Args:
        rule: a rule or its name.
        hyperparameters: those of `modes`; ``"auto"`` is replaced by what it stands for.
        topology: the topology, which may vary with time.
        curvature: h > 0, for the learning rate's limit and the noise, in units of one over the learning rate.
        local_steps: H >= 1, the number of steps in a round.
        steps: the length of the run, for the rounding.
        state_dtype: the dtype of the state, for the rounding.

    Raises:
        TypeError, ValueError: the rule, a hyper-parameter or the curvature is bad.
    """
    rule = get_rule(rule)
    hyperparameters = with_auto(rule, hyperparameters, topology, local_steps)
    mixing = mixing_of(topology)
    searched = mixing.thinned()
    (found,) = stabilities_of([round_of(rule, hyperparameters, 0.0, local_steps)], mixing)
    has_mu, has_kappa = ("mu" in rule.hyperparameters), ("kappa" in rule.hyperparameters)
    return Prediction(
        rule=rule.name,
        hyperparameters=rule.check({k: v for k, v in hyperparameters.items() if k in rule.hyperparameters}),
        topology=topology.name,
        curvature=curvature,
        stability=found,
        learning_rate_limit=learning_rate_limit_of(rule, hyperparameters, searched, curvature, local_steps),
        mu_limit=hyperparameter_limit(rule, hyperparameters, "mu", searched, local_steps) if has_mu else None,
        auto_mu=auto_mu_of(rule, hyperparameters, searched, local_steps) if has_mu else None,
        kappa_limit=hyperparameter_limit(rule, hyperparameters, "kappa", searched, local_steps) if has_kappa else None,
        auto_kappa=auto_kappa_of(rule, hyperparameters, searched, local_steps) if has_kappa else None,
        bias_factor=bias_factor_of(rule, hyperparameters, mixing, local_steps),
        step_gain=step_gain(rule, hyperparameters, local_steps=local_steps),
        noise=noise_amplification_of(rule, hyperparameters, mixing, curvature, local_steps),
        rounding=rounding(
            rule, hyperparameters, topology, curvature, steps=steps, dtype=state_dtype, local_steps=local_steps
        ),
    )
