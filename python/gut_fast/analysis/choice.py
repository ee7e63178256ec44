"""The choices that suit a topology: ``mu="auto"``, ``kappa="auto"``, and remedies for what is unstable.

GUT's bias is ``1 − μ`` times DSGD's, so as much tracking as possible is wanted. Its price is known before a run as
well: tracking is an integrator in a feedback loop, and as μ grows the loop's slowest mode, at one end of W's spectrum
or the other, decays more and more slowly, until it does not decay at all. A slow mode prolongs the transient after
every change of the gradients and stores up their noise. So ``mu="auto"`` is the largest μ that keeps two quantities
within a factor of two (`COST`) of their values without tracking, at the low end of its domain, where GUT is DSGD, GUTm
is QG-DSGDm, and QGT has momentum that is never averaged:

1. the time that disagreement takes to die out, ``1/(1 − rate)`` steps, and no less than the period of a topology that
   varies, as a one-peer exponential graph needs all of its rounds to average;
2. the step of the average under a steady gradient, which grows in rules that track through their momentum: the average
   of QG-GUTm moves with momentum β + μ.

For GUT this μ is 0.95 on a ring of 16, 0.99 on a ring of 32, 0.15 on the 4 × 4 torus with uniform weights and 0.99 with
lazy weights; for QG-GUTm at β = 0.9 it is 0.05. Another criterion would be the fastest consensus, on a ring at
``√μ = (1 − √(1 − λ₂))/√λ₂``. It makes the transient shorter than DSGD's but leaves a bias: on the ring of
16 it is μ = 0.63, with seven times the bias.

κ is how much of the drift tracking takes up at once. The bias does not depend on it: a smaller κ is stable on every
graph, but learns more slowly. So ``kappa="auto"`` is the largest κ at which disagreement dies out within twice the time
that it takes DSGD, and where none does, as on graphs that average exactly after a few rounds, the κ at which it dies
out fastest. Where both are to be chosen, κ takes care of stability, and μ is the largest that still forgets: 0.999.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gut_fast.analysis.limits import (
    Search,
    Stability,
    averaging_rate_limit_of,
    domain_ends,
    effort,
    hyperparameter_limit,
    round_down,
    stabilities_of,
)
from gut_fast.analysis.periods import Blocks, Iterated, mixing_of
from gut_fast.analysis.steady import step_gain
from gut_fast.analysis.transition import Round, round_of, without_decay
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["AUTO", "advice", "auto_kappa", "auto_kappa_of", "auto_mu", "auto_mu_of", "with_auto"]

AUTO = "auto"
"""The value of ``mu`` and of ``kappa`` that asks for `auto_mu` and `auto_kappa`."""

COST = 2.0
"""The factor by which tracking may prolong disagreement and the steps of the average."""

ROUNDING = 1e-6
"""The error that rounding may leave in a rate where two modes meet."""


def auto_mu(
    rule: str | UpdateRule,
    topology: Topology,
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    local_steps: int = 1,
) -> float:
    """The hyper-parameter μ that ``mu="auto"`` stands for, to three decimals, by the criterion of this module.

    It is the low end of the domain if any tracking is too much, and never quite the high end: at μ = 1 an agent would
    never forget what rounding leaves in r.

    Args:
        rule: a rule with a hyper-parameter ``mu``, or its name.
        topology: the topology, which may vary with time.
        hyperparameters: the other hyper-parameters, such as the momentum; a ``mu`` among them is ignored.
        local_steps: H >= 1, the number of steps in a round.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, the rule has no ``mu`` with a bounded domain, or
            the rule is unstable on the topology even at the low end of the domain.
    """
    rule, mixing = get_rule(rule), mixing_of(topology).thinned()
    return _found("mu", auto_mu_of(rule, hyperparameters or {}, mixing, local_steps), rule, topology)


def auto_kappa(
    rule: str | UpdateRule,
    topology: Topology,
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    local_steps: int = 1,
) -> float:
    """The hyper-parameter κ that ``kappa="auto"`` stands for, to three decimals, by the criterion of this module.

    Args:
        rule: a rule with a hyper-parameter ``kappa``, or its name.
        topology: the topology, which may vary with time.
        hyperparameters: the other hyper-parameters, such as μ; a ``kappa`` among them is ignored.
        local_steps: H >= 1, the number of steps in a round.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, the rule has no ``kappa`` with a bounded domain, or
            no κ is stable on the topology.
    """
    rule, mixing = get_rule(rule), mixing_of(topology).thinned()
    return _found("kappa", auto_kappa_of(rule, hyperparameters or {}, mixing, local_steps), rule, topology)


def _found(name: str, value: float, rule: UpdateRule, topology: Topology) -> float:
    if math.isnan(value):
        raise ValueError(
            f'rule {rule.name!r}: no {name} is stable on {topology.name}, so {name}="auto" has nothing to choose; '
            "use another topology, or topology.lazy(gamma)"
        )
    return value


def auto_mu_of(
    rule: UpdateRule, hyperparameters: Mapping[str, Any], mixing: Blocks | Iterated, local_steps: int
) -> float:
    """The μ that `auto_mu` gives, from the rounds of the topology; NaN if the low end of the domain is not stable."""
    values = without_decay(hyperparameters)
    low, high = domain_ends(rule, "mu")
    untracked_gain = step_gain(rule, {**values, "mu": low}, local_steps=local_steps)
    (untracked,) = stabilities_of([round_of(rule, {**values, "mu": low}, 0.0, local_steps)], mixing)

    def are_free(mus: Sequence[float]) -> list[bool]:
        settings = [{**values, "mu": mu} for mu in mus]
        found = stabilities_of([round_of(rule, each, 0.0, local_steps) for each in settings], mixing)
        gains = [step_gain(rule, each, local_steps=local_steps) for each in settings]
        return [
            _dies_out_in_time(each, untracked, mixing.period * local_steps) and not gain > COST * untracked_gain
            for each, gain in zip(found, gains, strict=True)
        ]

    end = Search(are_free, mixing).end_of_interval(np.linspace(low, high, effort(mixing)[0] // 2 + 1), beyond=high)
    return end if math.isnan(end) else max(low, round_down(end))


def auto_kappa_of(
    rule: UpdateRule, hyperparameters: Mapping[str, Any], mixing: Blocks | Iterated, local_steps: int
) -> float:
    """The κ that `auto_kappa` gives, from the rounds of the topology; NaN if none is stable."""
    values = without_decay(hyperparameters)
    low, high = domain_ends(rule, "kappa")

    def stabilities(kappas: Sequence[float]) -> list[Stability]:
        settings = [{**values, "kappa": kappa} for kappa in kappas]
        return stabilities_of([round_of(rule, each, 0.0, local_steps) for each in settings], mixing)

    (untracked,) = stabilities([low])

    def are_free(kappas: Sequence[float]) -> list[bool]:
        return [_dies_out_in_time(found, untracked, mixing.period * local_steps) for found in stabilities(kappas)]

    kappas = np.linspace(high, low, effort(mixing)[0] + 1)[:-1].tolist()  # at the low end nothing is tracked
    largest = Search(are_free, mixing).first_true(np.array(kappas))
    if not math.isnan(largest):
        return high if largest == high else round_down(largest)
    found = stabilities(kappas)
    rates = [each.consensus_rate if each.verdict == "stable" else math.inf for each in found]
    return round(kappas[rates.index(min(rates))], 3) if min(rates) < math.inf else math.nan


def _dies_out_in_time(found: Stability, untracked: Stability, period: int) -> bool:
    """True if the rule is stable, and disagreement lives no longer than `COST` times as long as without tracking.

    Without tracking it lives at least for a `period`, in steps.
    """
    pace = min(1 - untracked.consensus_rate, 1 / period)
    return found.never_grows and pace <= COST * (1 - found.consensus_rate) + ROUNDING


def with_auto(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, local_steps: int = 1
) -> dict[str, Any]:
    """The hyper-parameters, or all settings of a parameter group, with numbers in place of ``"auto"``.

    Without ``mu="auto"`` and ``kappa="auto"`` nothing is checked. If both are there, μ is the largest that `auto_mu`
    ever gives, and κ what `auto_kappa` gives there.

    Raises:
        TypeError, ValueError: `auto_mu` or `auto_kappa` cannot choose.
    """
    rule, settings = get_rule(rule), dict(hyperparameters)
    asked = [name for name in ("mu", "kappa") if isinstance(settings.get(name), str) and settings[name] == AUTO]
    if asked == ["mu", "kappa"]:
        settings["mu"] = round_down(domain_ends(rule, "mu")[1])
        asked = ["kappa"]
    for name in asked:
        others = {key: value for key, value in settings.items() if key in rule.hyperparameters and key != name}
        settings[name] = {"mu": auto_mu, "kappa": auto_kappa}[name](rule, topology, others, local_steps=local_steps)
    return settings


def advice(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], topology: Topology, *, local_steps: int = 1
) -> str | None:
    """A clause that says what is unstable about `rule` on `topology` and what to do; None if nothing is.

    The clause goes behind the rule's name, as in the warning of the optimizers' constructors. Consensus modes that are
    only marginal pass: curvature damps them, as it does D² on an even ring. An average that keeps its momentum for ever
    (QG-GUTm at β + μ = 1) does not pass. Where rates are estimated, only what is unstable beyond doubt does not pass,
    and only values that are stable beyond doubt are named; none are searched for among more than 256 agents, but for
    random matchings, where 192 agents stand for all.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    rule, mixing = get_rule(rule), mixing_of(topology)
    searched = mixing.thinned()
    each = round_of(rule, hyperparameters, 0.0, local_steps)
    (found,) = stabilities_of([each], searched if isinstance(mixing, Iterated) else mixing)
    settings = _settings(rule, hyperparameters)
    if found.average_rate >= 1 - 1e-12:
        cause = f"the average over agents moves with momentum {found.average_rate:.4g}, which must stay below 1"
        return f"{settings}unstable: {cause}; use {_remedies(rule, hyperparameters, searched, local_steps)}"
    if found.verdict == "unstable":
        who = "the disagreement between agents"
        if found.worst_eigenvalue is not None:
            who = f"the mode at W's eigenvalue {found.worst_eigenvalue:.3g}"
        cause = f"{who} grows {found.consensus_rate:.4g}-fold a step"
        remedies = _remedies(rule, hyperparameters, searched, local_steps, lazier=each)
        return f"{settings}unstable on {topology.name}: {cause}; use {remedies}"
    return None


def _settings(rule: UpdateRule, hyperparameters: Mapping[str, Any]) -> str:
    values = rule.check({name: value for name, value in hyperparameters.items() if name in rule.hyperparameters})
    numbers = [f"{name}={value:g}" for name, value in values.items() if not isinstance(value, bool)]
    return f"{', '.join(numbers)} is " if numbers else ""


def _remedies(
    rule: UpdateRule,
    hyperparameters: Mapping[str, Any],
    mixing: Blocks | Iterated,
    local_steps: int,
    lazier: Round | None = None,
) -> str:
    """Names what to use instead: smaller values, or an averaging rate below that of the round `lazier`."""
    names = [name for name in ("mu", "kappa", "momentum") if name in rule.hyperparameters]
    if isinstance(mixing, Iterated) and mixing.is_large:
        values = " or ".join(
            [*["topology.lazy(gamma)"] * (lazier is not None), *(f"a smaller {name}" for name in names)]
        )
        return (
            f"{values or 'another topology'}; how small is not searched for among so many agents, which takes seconds: "
            "see gut_fast.analysis.stability_limit and averaging_rate_limit"
        )
    gamma = math.nan if lazier is None else averaging_rate_limit_of(lazier, mixing)
    limits = [round_down(hyperparameter_limit(rule, hyperparameters, name, mixing, local_steps)) for name in names]
    remedies = [] if math.isnan(gamma) else [f"topology.lazy(gamma) with gamma <= {round_down(gamma)}"]
    remedies += [f"{name} <= {limit}" for name, limit in zip(names, limits, strict=True) if limit > 0]
    return " or ".join(remedies) or "another topology"
