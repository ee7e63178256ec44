"""One step of a rule along one eigenvector of the mixing matrix: a small matrix, whose eigenvalues are the modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gut_fast.rules import Coefficients, UpdateRule, get_rule

__all__ = ["TOLERANCE", "Array", "coefficients_of", "modes", "radius", "reachable", "transitions", "without_decay"]

Array = NDArray[Any]

TOLERANCE = 1e-9
"""Moduli this close to one are marginal."""


def modes(
    rule: str | UpdateRule, hyperparameters: Mapping[str, Any], eigenvalue: ArrayLike, curvature: float = 0.0
) -> Array:
    """The modes of `rule` at an eigenvalue of W, or at each of an array: complex, [..., number of states + 1].

    Args:
        rule: a rule or its name.
        hyperparameters: the rule's own, and optionally ``lr``, ``weight_decay`` and ``maximize``. A learning rate that
            is missing or zero counts as one.
        eigenvalue: λ, real or complex. λ = 1 gives all modes of the average, the free and unreached ones too.
        curvature: h, the curvature of every agent's loss.

    Raises:
        TypeError, ValueError: a bad rule or hyper-parameter.
    """
    matrices, _ = transitions(coefficients_of(rule, hyperparameters), eigenvalue, curvature)
    return np.linalg.eigvals(matrices).astype(complex)


def coefficients_of(rule: str | UpdateRule, hyperparameters: Mapping[str, Any]) -> Coefficients:
    """The coefficients of a step; a learning rate that is missing or zero counts as one."""
    return get_rule(rule).coefficients(**{**hyperparameters, "lr": hyperparameters.get("lr", 1.0) or 1.0})


def without_decay(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters for gradients as they are: neither weight decay nor ascent."""
    return {name: value for name, value in hyperparameters.items() if name not in ("weight_decay", "maximize")}


def transitions(coefficients: Coefficients, eigenvalue: ArrayLike, curvature: float = 0.0) -> tuple[Array, Array]:
    """T(λ) for each eigenvalue, [..., K − 1, K − 1], and what a unit gradient adds to (z, state), [..., K − 1]."""
    if not math.isfinite(curvature):
        raise ValueError(f"curvature must be finite, got {curvature}")
    A, B, C, E = (np.asarray(getattr(coefficients, name), dtype=float) for name in "ABCE")
    shift = np.asarray(eigenvalue)[..., None, None] - 1
    full = B + (C + shift * E) @ A
    matrices, gradient = full[..., :-1].copy(), full[..., -1]
    matrices[..., 0] += curvature * gradient
    return matrices, gradient


def radius(matrices: Array) -> Array:
    """The spectral radius of each matrix; zero of an empty one."""
    rates: Array = np.abs(np.linalg.eigvals(matrices)).max(axis=-1, initial=0.0)
    return rates


def reachable(transition: Array, start: Sequence[Array]) -> Array:
    """Orthonormal rows, the first along start[0], that span all that `transition` makes of the vectors of `start`."""
    basis = np.empty((0, len(transition)))
    pending = list(start)
    while pending:
        vector = pending.pop(0)
        rest = vector - basis.T @ (basis @ vector)
        if np.linalg.norm(rest) > TOLERANCE * np.linalg.norm(vector):
            basis = np.vstack([basis, rest / np.linalg.norm(rest)])
            pending.append(transition @ basis[-1])
    return basis
