"""Errors of coded messages die out, or grow from round to round, as the rule and the topology have it.

A code of differences sends ``S − X`` with an error in proportion to it, e = X − S (`gut_fast.kernels.codes`), and e is
in the next difference:

    d = A (x' − x) − e,    x' = T(λ) x + (λ − 1) E e,    mean of |e|² over all numbers = δ² · mean of |d|²

for the component x of (z, state) along an eigenvector of W of eigenvalue λ. Errors of different rounds are taken as
uncorrelated, and as equal along all eigenvectors, for the agents' are independent. Then |e|² grows by ``δ² G`` in the
end, with G the mean over eigenvectors of what a unit error makes of d; it dies out while δ < 1/√G. Rules that follow
all of the drift and hardly forget make much of an error; following a part of it (κ of 0.3) they make little.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from gut_fast.analysis.periods import Blocks, mixing_of
from gut_fast.analysis.transition import Array, Round, learning_rate, radius, round_of
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology

__all__ = ["coding_advice", "coding_error", "coding_limit"]

LARGEST = 3.0
"""The largest of 256 normal numbers, in standard deviations: what a scale is made of."""

DAMPING = 0.01
"""The ηh, learning rate times curvature, for which advice is given: a network's loss is flat in most directions."""

MARGIN = 0.8
"""The part of its limit that an error has at most with what advice names."""


def coding_error(bits: int, *, at_random: bool = False) -> float:
    """The error δ of a coded difference, in units of its size, root mean square: 0.12 of 4 bits, 0.007 of 8.

    Args:
        bits: 16 (bfloat16), 8 or 4.
        at_random: whether numbers are rounded up or down at random, which doubles the error's square.
    """
    if bits == 16:
        return float(2.0**-9 / np.sqrt(3))
    step = LARGEST / (2 ** (bits - 1) - 1)
    return float(step / np.sqrt(6 if at_random else 12))


def coding_limit(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    *,
    curvature: float = 1.0,
    local_steps: int = 1,
) -> float:
    """The largest error δ of coded differences, in units of the difference, that dies out; see this module.

    Args:
        rule: a rule or its name.
        hyperparameters: those of the rule, and ``lr``; one that is missing or zero counts as one.
        topology: a static topology.
        curvature: h > 0, the curvature of every agent's loss.
        local_steps: H >= 1, the steps in a round.

    Returns:
        The limit; NaN where the topology varies or its W has no orthogonal eigenvectors, and where the rule is not
        stable without codes.

    Raises:
        TypeError, ValueError: the rule or an argument is bad.
    """
    rule, mixing = get_rule(rule), mixing_of(topology)
    each = round_of(rule, hyperparameters, curvature, local_steps)
    if not isinstance(mixing, Blocks) or mixing.matrices.shape[1:] != (1, 1, 1) or not mixing.is_normal:
        return float("nan")
    messages, errors = _messages(rule, hyperparameters, curvature, local_steps)
    gains = _gains(each, messages, errors, mixing.eigenvalues)
    if gains is None:
        return float("nan")
    # The agents' average has no part in mixing: there an error is in the next difference as it is.
    total = np.einsum("k,kij->ij", mixing.weights, gains) + np.eye(len(messages)) / topology.num_agents
    return float(1 / np.sqrt(radius(total)))


def coding_advice(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    topology: Topology,
    bits: int,
    *,
    at_random: bool = False,
    local_steps: int = 1,
) -> str | None:
    """A clause that says that errors of coded differences grow on `topology`, and what to do; None if they die out.

    It is for ηh = 0.01: the smaller the curvature, the longer a rule remembers an error.

    Raises:
        TypeError, ValueError: the rule or an argument is bad.
    """
    rule, error = get_rule(rule), coding_error(bits, at_random=at_random)

    def limit(settings: Mapping[str, Any]) -> float:
        curvature = DAMPING / learning_rate(settings)
        return coding_limit(rule, settings, topology, curvature=curvature, local_steps=local_steps)

    if not error > (found := limit(hyperparameters)):
        return None
    remedies = ["messages of more bits"]
    for name in ("kappa", "mu"):
        if name in rule.hyperparameters:
            given = hyperparameters.get(name, 1.0)
            values = (value for value in np.arange(19, 0, -1) / 20 if value < given)
            safe = (value for value in values if error <= MARGIN * limit({**hyperparameters, name: value}))
            remedies += [f"{name} <= {value:g}" for value in itertools.islice(safe, 1)]
    return (
        f"messages of {bits} bits change a difference by {error:.1%}, and on {topology.name} what is more than "
        f"{found:.1%} grows from round to round; use {' or '.join(remedies)}"
    )


def _messages(
    rule: UpdateRule, hyperparameters: Mapping[str, Any], curvature: float, local_steps: int
) -> tuple[Array, Array]:
    """The messages [M, s] that (z, state) at the start of a round becomes, and what their errors do, E, [s, M]."""
    settings = {**hyperparameters, "lr": learning_rate(hyperparameters)}
    rounds = {"drift_lr": local_steps * settings["lr"]} if local_steps > 1 else {}
    mixing = rule.coefficients(**settings, **rounds)

    def of_state(rows: Array) -> Array:
        found: Array = rows[:, :-1] + curvature * rows[:, -1:] * np.eye(rows.shape[1] - 1)[0]
        return found

    messages = of_state(np.asarray(mixing.A, dtype=float))
    if local_steps > 1:
        local = rule.coefficients(**settings, is_local=True)
        A, B, C = (np.asarray(getattr(local, name), dtype=float) for name in "ABC")
        messages = messages @ np.linalg.matrix_power(of_state(B + C @ A), local_steps - 1)
    return messages, np.asarray(mixing.E, dtype=float)


def _gains(each: Round, messages: Array, errors: Array, eigenvalues: Array) -> Array | None:
    """The mean square of message i's difference that unit errors of message j make, [k, M, M]; None if not finite."""
    T, _ = each.at(eigenvalues[:, None, None])
    if len(T) and radius(T).max() >= 1 - 1e-9:
        return None
    k, s = T.shape[:2]
    F = (eigenvalues[:, None, None] - 1) * errors
    moves, same = messages @ (T - np.eye(s)), messages @ F - np.eye(len(messages))
    # The variance P of (z, state), for each message: P = T P T* + F_j F_j*, with the columns F_j of F.
    kept = np.eye(s * s) - np.einsum("kac,kbd->kabcd", T, T.conj()).reshape(k, s * s, s * s)
    made = np.einsum("kaj,kbj->kabj", F, F.conj()).reshape(k, s * s, len(messages))
    P = np.linalg.solve(kept, made).reshape(k, s, s, len(messages))
    gains: Array = (np.einsum("kia,kabj,kib->kij", moves, P, moves.conj()) + np.abs(same) ** 2).real
    return gains
