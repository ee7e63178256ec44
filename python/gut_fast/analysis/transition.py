"""The modes of a rule: the eigenvalues of one round along each eigenvector of the mixing matrix.

A *round* is what happens from one mixing to the next: one step, or several of which all but the last are local. It acts
on the component of (z, state) along an eigenvector of W as a small matrix, whose eigenvalues are the modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gut_fast.arguments import as_integer
from gut_fast.rules import Coefficients, UpdateRule, get_rule

__all__ = [
    "TOLERANCE",
    "Array",
    "Round",
    "learning_rate",
    "modes",
    "radius",
    "reachable",
    "round_of",
    "transitions",
    "without_decay",
]

Array = NDArray[Any]

TOLERANCE = 1e-9
"""The distance from one below which a modulus is marginal."""


@dataclass(frozen=True)
class Round:
    """The linear map of a round: ``x' = (still ⊗ I + exchange ⊗ (W − I)) x``, and the same for the gradients."""

    still: Array
    """The map of (z, state) for one agent alone, and for the average of all: [s, s] for s − 1 states."""
    exchange: Array
    """The factor of the differences between agents, [s, s]."""
    still_inputs: Array
    """The change of (z, state) by a unit gradient in each of the H steps, without mixing: [s, H]."""
    exchange_inputs: Array
    """The factor of the differences between the agents' gradients, [s, H]."""

    @property
    def num_steps(self) -> int:
        """The number of steps in the round."""
        return int(self.still_inputs.shape[1])

    def pushed(self, inputs: Array) -> list[Array]:
        """Vectors that span what gradients do to (z, state), of `still_inputs` or `exchange_inputs`.

        Those of the last steps do: a local step's map of s numbers is a root of its characteristic polynomial (Cayley
        and Hamilton), so its powers beyond s − 1 add nothing to the span.
        """
        return list(inputs.T[-len(self.still) - 1 :])

    def lazy(self, gamma: float) -> Round:
        """The round with ``I + γ (W − I)`` in place of W."""
        return replace(self, exchange=gamma * self.exchange, exchange_inputs=gamma * self.exchange_inputs)

    def at(self, blocks: Array) -> tuple[Array, Array]:
        """The matrices of the round, [..., s b, s b], and of its gradients, [..., s b, H b], for W in [..., b, b]."""
        identity = np.eye(blocks.shape[-1])

        def placed(still: Array, exchange: Array) -> Array:
            both = np.einsum("st,bc->sbtc", still, identity)
            both = both + np.einsum("st,...bc->...sbtc", exchange, blocks - identity)
            rows, columns = (size * len(identity) for size in still.shape)
            matrices: Array = both.reshape(*blocks.shape[:-2], rows, columns)
            return matrices

        return placed(self.still, self.exchange), placed(self.still_inputs, self.exchange_inputs)

    def reached(self) -> Round:
        """The round among the combinations of (z, state) that z and the gradients reach from zero state."""
        pushed = *self.pushed(self.still_inputs), *self.pushed(self.exchange_inputs)
        basis = reachable([self.still, self.exchange], [np.eye(len(self.still))[0], *pushed])
        if len(basis) == len(self.still):
            return self
        still, exchange = (basis @ each @ basis.T for each in (self.still, self.exchange))
        return Round(still, exchange, basis @ self.still_inputs, basis @ self.exchange_inputs)

    def per_step(self, factor: float, rounds: int = 1) -> float:
        """The factor of one step, from that of a number of rounds."""
        return float(factor ** (1 / (rounds * self.num_steps)))


def round_of(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], curvature: float = 0.0, local_steps: int = 1
) -> Round:
    """The round of a rule where every agent's loss has this curvature h.

    With H local steps it is ``T_mix T_local^(H − 1)``: all steps but the last send nothing, and the drift in the states
    of the last one is divided by the sum of the learning rates.

    Args:
        rule: a rule or its name.
        hyperparameters: those of `modes`.
        curvature: h; the gradients are ``h z`` and the round's inputs.
        local_steps: H >= 1, the steps in a round.

    Raises:
        TypeError, ValueError: the rule or an argument is bad.
    """
    rule, lr = get_rule(rule), learning_rate(hyperparameters)
    settings = {**hyperparameters, "lr": lr}
    if as_integer(local_steps, "local_steps", minimum=1) == 1:
        return Round(*_parts(rule.coefficients(**settings), curvature))
    mixing = Round(*_parts(rule.coefficients(**{**settings, "drift_lr": local_steps * lr}), curvature))
    step, _, step_inputs, _ = _parts(rule.coefficients(**settings, is_local=True), curvature)
    moved, inputs = np.eye(len(step)), np.empty((len(step), 0))
    with np.errstate(all="ignore"):  # a rate far beyond its limit overflows
        for digit in f"{local_steps - 1:b}":  # of the exponent: all steps so far once more, and one more
            moved, inputs = moved @ moved, np.column_stack([moved @ inputs, inputs])
            if digit == "1":
                moved, inputs = step @ moved, np.column_stack([step @ inputs, step_inputs])
        return Round(
            mixing.still @ moved,
            mixing.exchange @ moved,
            np.column_stack([mixing.still @ inputs, mixing.still_inputs]),
            np.column_stack([mixing.exchange @ inputs, mixing.exchange_inputs]),
        )


def learning_rate(hyperparameters: Mapping[str, Any]) -> float:
    """The learning rate among the hyper-parameters; one that is missing or zero counts as one."""
    lr: float = hyperparameters.get("lr", 1.0) or 1.0
    return lr


def modes(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], eigenvalue: ArrayLike, curvature: float = 0.0
) -> Array:
    """The modes of `rule` at an eigenvalue of W, or at each of an array: complex, [..., number of states + 1].

    Args:
        rule: a rule or its name.
        hyperparameters: those of the rule, and optionally ``lr``, ``weight_decay`` and ``maximize``. A learning rate
            that is missing or zero counts as one.
        eigenvalue: λ, real or complex. λ = 1 gives all modes of the average, also the free and the unreached ones.
        curvature: h, the curvature of every agent's loss.

    Raises:
        TypeError, ValueError: the rule or a hyper-parameter is bad.
    """
    matrices, _ = round_of(rule, hyperparameters, curvature).at(np.asarray(eigenvalue)[..., None, None])
    return np.linalg.eigvals(matrices).astype(complex)


def without_decay(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters without weight decay and ascent, so that gradients act as they are."""
    return {name: value for name, value in hyperparameters.items() if name not in ("weight_decay", "maximize")}


def transitions(coefficients: Coefficients, eigenvalue: ArrayLike, curvature: float = 0.0) -> tuple[Array, Array]:
    """The matrices T(λ) of one step, [..., K − 1, K − 1], and the change of (z, state) by a unit gradient."""
    matrices, inputs = Round(*_parts(coefficients, curvature)).at(np.asarray(eigenvalue)[..., None, None])
    return matrices, inputs[..., 0]


def _parts(coefficients: Coefficients, curvature: float) -> Iterator[Array]:
    """The four matrices of the `Round` of one step."""
    if not math.isfinite(curvature):
        raise ValueError(f"curvature must be finite, got {curvature}")
    A, B, C, E = (np.asarray(getattr(coefficients, name), dtype=float) for name in "ABCE")
    full = np.stack([B + C @ A, E @ A])
    gradient = full[..., -1:]
    yield from full[..., :-1] + curvature * gradient * np.eye(len(B))[0]
    yield from gradient


def radius(matrices: Array) -> Array:
    """The spectral radius of each matrix; zero for an empty one, infinite for one that has overflowed."""
    is_finite: Array = np.asarray(np.isfinite(matrices).all(axis=(-2, -1)))
    finite = np.where(is_finite[..., None, None], matrices, 0.0)
    rates: Array = np.where(is_finite, np.abs(np.linalg.eigvals(finite)).max(axis=-1, initial=0.0), np.inf)
    return rates


def reachable(transitions: Sequence[Array], starts: Sequence[Array]) -> Array:
    """Orthonormal rows that span what `transitions` in any order make of the vectors `starts`, starts[0] first."""
    basis = np.empty((0, len(starts[0])))
    with np.errstate(all="ignore"):  # numbers that overflow
        pending = [(start, float(np.linalg.norm(start))) for start in starts]  # with what their rounding is measured by
        while pending and len(basis) < basis.shape[1]:  # numbers that overflow leave rests for ever
            vector, size = pending.pop(0)
            rest = vector - basis.T @ (basis @ vector)
            if np.linalg.norm(rest) > TOLERANCE * size:
                basis = np.vstack([basis, rest / np.linalg.norm(rest)])
                pending.extend(
                    (transition @ basis[-1], float(np.linalg.norm(transition))) for transition in transitions
                )
    return basis
