"""The error that rounding brings into the agents' average in a long run, and the sums that must be kept against it.

A mixing matrix whose columns sum to one leaves the mean over agents alone, so the agents' means follow the transition
T(1) and the mean gradient. In some rules a combination ``ℓ · (mean of the states)`` then keeps its value for ever:
the mean of r in D², of v − q in gradient tracking, of v − m in momentum tracking. It is zero at the start and no
gradient reaches it, but rounding does, and nothing takes it away again: it walks, and the average moves with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gut_fast.analysis.transition import TOLERANCE, Array, learning_rate, round_of
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["RECENTRING", "Rounding", "conserved", "keeps_mean", "rounding"]

RECENTRING = 100
"""The number of steps after which an optimizer that holds all agents makes conserved sums zero again.

It takes about as long as one step, so it costs one per cent of the optimizer's time. The average's error grows with the
square of the number of steps until it is done: for D² on a flat direction, in 100,000 steps of float32, it is 0.4
without, 0.02 with 1000, 0.002 with 100.
"""

USEFUL = 0.1
"""The error of the average, in units of the state's size, from which `Rounding.warning` advises against a dtype."""


def conserved(rule: str | UpdateRule, hyperparameters: Mapping[str, Any]) -> tuple[Array, Array]:
    """The combinations of states whose mean over agents a rule keeps, and how to make them zero.

    Only those count that the mixing of agents changes for each agent by itself, so that rounding reaches them.

    Args:
        rule: a rule or its name.
        hyperparameters: those of the rule; weight decay, ascent and the learning rate make no difference.

    Returns:
        ℓ, [k, q], for q states, and R, [q, k], with ``ℓ R = I``: taking ``R ℓ m`` away from the mean m of the states
        makes the combinations zero, and leaves the part that decays or that gradients drive. k = 0 if there are none.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    rule = get_rule(rule)
    own = rule.check({name: value for name, value in hyperparameters.items() if name in rule.hyperparameters})
    return _conserved(rule, tuple(own.items()))


@lru_cache(maxsize=256)
def _conserved(rule: UpdateRule, own: tuple[tuple[str, Any], ...]) -> tuple[Array, Array]:
    each = round_of(rule, dict(own))
    change = each.still[1:, 1:] - np.eye(len(rule.states))
    sums = _left_null(np.column_stack([change, each.still[1:, 0], each.still_inputs[1:]]))
    drifts = np.column_stack([each.exchange, each.exchange_inputs])[1:]
    sums = _left_null(sums @ drifts, is_null=False) @ sums
    stays = _left_null(change.T).T
    return sums, stays @ np.linalg.pinv(sums @ stays)


def _left_null(matrix: Array, is_null: bool = True) -> Array:
    """Orthonormal rows x with ``x matrix = 0``, or those that span the rest."""
    vectors, values, _ = np.linalg.svd(matrix, full_matrices=True)
    padded = np.zeros(len(matrix))
    padded[: len(values)] = values
    found: Array = vectors.T[(padded <= TOLERANCE) == is_null]
    return found


def keeps_mean(topology: Topology) -> bool:
    """True if every mixing matrix of a topology is doubly stochastic, as those of random matchings are."""
    return all(mixing.is_doubly_stochastic for mixing in topology.cycle if isinstance(mixing, MixingMatrix))


@dataclass(frozen=True)
class Rounding:
    """The root mean square of what rounding the state adds to the agents' average; see `rounding`."""

    steps: int
    dtype: torch.dtype
    average: float
    """At the given curvature."""
    on_flat: float
    """At curvature zero, where nothing pulls the average back."""
    warning: str | None
    """A clause that says that the average moves too far to be useful, and what to do; None if it does not."""


def rounding(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    curvature: float = 1.0,
    *,
    steps: int = 100_000,
    dtype: torch.dtype = torch.float32,
    is_recentred: bool = True,
    local_steps: int = 1,
) -> Rounding:
    """The error that rounding the state to `dtype` brings into the average of the agents in a number of steps.

    Each step rounds each number of the state, taken to be of size one, by an error of its own, of mean zero and
    variance ``ε²/12``, which is ``ε²/(12 N)`` for the mean over agents. The covariance of (z̄, means of the states)
    then grows by ``P' = T(1) P T(1)ᵀ + Q``. A state of another size scales the result. Where gradients do not change at
    all, as in a test problem, the same errors return at every step, and the average walks some ten times as far.

    Args:
        rule: a rule or its name.
        hyperparameters: those of `modes`.
        topology: the topology, of which only the number of agents matters.
        curvature: h >= 0, the curvature of every agent's loss.
        steps: the number of steps.
        dtype: the dtype of the state.
        is_recentred: whether `conserved` sums are made zero every `RECENTRING` steps, as they are unless the agents are
            on several ranks.
        local_steps: H >= 1, the number of steps in a round.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad, or the dtype is no floating one.
    """
    rule, eps = get_rule(rule), torch.finfo(dtype).eps
    own = {name: value for name, value in hyperparameters.items() if name in rule.hyperparameters}
    period = RECENTRING if is_recentred and keeps_mean(topology) else steps
    kept, rounds, period = conserved(rule, own), max(1, steps // local_steps), max(1, period // local_steps)
    at_curvature, on_flat = (
        _deviation(*_walk(*_a_round(rule, hyperparameters, h, local_steps), kept, rounds, max(1, min(period, rounds))))
        * (eps / math.sqrt(12 * topology.num_agents))
        for h in (curvature, 0.0)
    )
    warning = None
    if not on_flat <= USEFUL:
        warning = (
            f"rounding the state to {dtype} moves the average by about {on_flat:.2g} in {steps} steps, for a state of "
            f"size one on a flat direction; use {_remedy(dtype, is_recentred, len(kept[0]) > 0)}"
        )
    return Rounding(steps, dtype, at_curvature, on_flat, warning)


def _remedy(dtype: torch.dtype, is_recentred: bool, is_without_leak: bool) -> str:
    if torch.finfo(dtype).bits < 32:
        return "state_dtype=torch.float32"
    return "all agents in one process, or a rule that forgets" if is_without_leak and not is_recentred else "float64"


def _a_round(
    rule: UpdateRule, hyperparameters: Mapping[str, Any], curvature: float, local_steps: int
) -> tuple[Array, Array]:
    """The transition of the average in a round, and the covariance that unit noise in what its steps change leaves."""
    last = {**hyperparameters, "drift_lr": local_steps * learning_rate(hyperparameters)}
    mixing = round_of(rule, last, curvature).still
    local = round_of(rule, {**hyperparameters, "is_local": True}, curvature)
    each = np.diag([0.0, *np.ones(len(mixing) - 1)])
    stays = (np.column_stack([local.still - np.eye(len(mixing)), local.still_inputs]) == 0).all(axis=1)
    noise, moved = _repeated(each * ~stays, local.still, local_steps - 1)
    return mixing @ moved, mixing @ noise @ mixing.T + each


def _walk(transition: Array, noise: Array, kept: tuple[Array, Array], steps: int, period: int) -> tuple[Array, Array]:
    """The covariance after all rounds, each of which adds `noise`, and the transition of all of them."""
    sums, stays = kept
    recentre = np.eye(len(transition))
    recentre[1:, 1:] -= stays @ sums
    covariance, moved = _repeated(noise, transition, period)
    if period < steps:
        covariance, moved = recentre @ covariance @ recentre.T, recentre @ moved
        covariance, moved = _repeated(covariance, moved, steps // period)
    return covariance, moved


def _repeated(noise: Array, transition: Array, times: int) -> tuple[Array, Array]:
    """``Σ_{t < times} Tᵗ Q Tᵗᵀ`` and ``T^times``, by doubling."""
    total, power = np.zeros_like(noise), np.eye(len(transition))
    with np.errstate(all="ignore"):  # an unstable rule overflows
        for digit in bin(times)[2:]:
            total, power = total + power @ total @ power.T, power @ power
            if digit == "1":
                total, power = noise + transition @ total @ transition.T, transition @ power
    return total, power


def _deviation(covariance: Array, _: Array) -> float:
    return math.sqrt(covariance[0, 0]) if covariance[0, 0] >= 0 else math.inf
