"""The modes of a rule: the eigenvalues of one step along each eigenvector of the mixing matrix.

One step of a rule acts on the component of (z, state) along an eigenvector of W as a small matrix, whose eigenvalues
are the modes. All that the analysis asks of a topology is therefore the `Spectrum` of its W.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gut_fast.rules import Coefficients, UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = [
    "TOLERANCE",
    "Array",
    "Spectrum",
    "coefficients_of",
    "modes",
    "radius",
    "reachable",
    "spectrum_of",
    "transitions",
    "without_decay",
]

Array = NDArray[Any]

TOLERANCE = 1e-9
"""The distance from one below which a modulus is marginal."""

DENSE_AGENTS = 512
"""The largest number of agents for which the spectrum of any W is computed exactly, in tens of milliseconds."""

GRID = 257
"""The number of points all over the interval of a spectrum that is not computed exactly."""

SEARCHED = 1025
"""The largest number of real eigenvalues in each step of a search: both ends, and evenly between them."""


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
    matrices, _ = transitions(coefficients_of(rule, hyperparameters), eigenvalue, curvature)
    return np.linalg.eigvals(matrices).astype(complex)


def coefficients_of(rule: str | UpdateRule, hyperparameters: Mapping[str, Any]) -> Coefficients:
    """The coefficients of a step; a learning rate that is missing or zero counts as one."""
    return get_rule(rule).coefficients(**{**hyperparameters, "lr": hyperparameters.get("lr", 1.0) or 1.0})


def without_decay(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters without weight decay and ascent, so that gradients act as they are."""
    return {name: value for name, value in hyperparameters.items() if name not in ("weight_decay", "maximize")}


def transitions(coefficients: Coefficients, eigenvalue: ArrayLike, curvature: float = 0.0) -> tuple[Array, Array]:
    """The matrices T(λ), [..., K − 1, K − 1], and the change of (z, state) by a unit gradient, [..., K − 1]."""
    if not math.isfinite(curvature):
        raise ValueError(f"curvature must be finite, got {curvature}")
    A, B, C, E = (np.asarray(getattr(coefficients, name), dtype=float) for name in "ABCE")
    shift = np.asarray(eigenvalue)[..., None, None] - 1
    full = B + (C + shift * E) @ A
    matrices, gradient = full[..., :-1].copy(), full[..., -1]
    matrices[..., 0] += curvature * gradient
    return matrices, gradient


def radius(matrices: Array) -> Array:
    """The spectral radius of each matrix; zero for an empty one."""
    rates: Array = np.abs(np.linalg.eigvals(matrices)).max(axis=-1, initial=0.0)
    return rates


def reachable(transition: Array, start: Sequence[Array]) -> Array:
    """Orthonormal rows that span all powers of `transition` applied to the vectors of `start`, start[0] first."""
    basis = np.empty((0, len(transition)))
    pending = list(start)
    while pending:
        vector = pending.pop(0)
        rest = vector - basis.T @ (basis @ vector)
        if np.linalg.norm(rest) > TOLERANCE * np.linalg.norm(vector):
            basis = np.vstack([basis, rest / np.linalg.norm(rest)])
            pending.append(transition @ basis[-1])
    return basis


@dataclass(frozen=True)
class Spectrum:
    """The consensus eigenvalues of W, empty for one agent."""

    eigenvalues: Array
    """The distinct eigenvalues, [k], ascending where W is symmetric; complex where it is not."""
    weights: Array
    """The multiplicity of each eigenvalue over N, [k]: Σ weights f(eigenvalues) is a mean over agents."""
    is_normal: bool = True
    """True if W's eigenvectors are orthogonal, so that disagreement is a sum over modes."""
    keeps_mean: bool = True
    """True if W's columns sum to one, so that the average over agents moves by itself."""

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def lazy(self, gamma: float) -> Spectrum:
        """The spectrum of ``I + γ (W − I)``."""
        return dataclasses.replace(self, eigenvalues=1 + gamma * (self.eigenvalues - 1))

    def thinned(self) -> Array:
        """Enough of the eigenvalues to find where a rule's slowest mode crosses a limit: at most `SEARCHED` real ones.

        Of a pair of conjugates, whose modes are conjugates too, it is the one above the real line.
        """
        if np.iscomplexobj(self.eigenvalues):
            upper: Array = self.eigenvalues[self.eigenvalues.imag >= 0]
            return upper
        if len(self) <= SEARCHED:
            return self.eigenvalues
        places = np.linspace(0, len(self) - 1, SEARCHED).round().astype(int)
        found: Array = self.eigenvalues[places]
        return found


def spectrum_of(topology: Topology) -> Spectrum:
    """The spectrum of a topology: exact except for unstructured symmetric graphs of more than 512 agents.

    For these the ends are good to about 1e-4, far closer on graphs without a bottleneck, and means over agents to some
    per cent.

    Raises:
        ValueError: the topology is not static.
    """
    if not topology.is_static:
        raise ValueError(f"{topology.name} changes from step to step; stability is defined for static topologies only")
    if _is_costly(topology):
        nodes, weights = _lanczos(topology)
        grid = np.linspace(nodes[0], nodes[-1], GRID)
        return Spectrum(np.concatenate([grid, nodes]), np.concatenate([np.zeros(GRID), weights]))
    eigenvalues = topology.eigenvalues[1:].numpy()
    # Rounding finds equal eigenvalues; the values themselves stay unrounded, for verdicts at the limit.
    _, first, counts = np.unique(eigenvalues.round(9), return_index=True, return_counts=True)
    found, weights, mixing = eigenvalues[first], counts / topology.num_agents, topology.cycle[0]
    if not isinstance(mixing, MixingMatrix):
        return Spectrum(found, weights)
    return Spectrum(found, weights, mixing.is_normal, mixing.is_doubly_stochastic)


def _is_costly(topology: Topology) -> bool:
    """True if the spectrum takes dense linear algebra on a large W: neither small nor a Fourier transform."""
    mixing = topology.cycle[0]
    if topology.num_agents <= DENSE_AGENTS or not isinstance(mixing, MixingMatrix):
        return False
    return mixing.group is None and mixing.is_symmetric


def _lanczos(topology: Topology, num_steps: int = 80) -> tuple[Array, Array]:
    """Nodes, ascending, and weights that integrate over the spectrum of a large symmetric W without its leading one.

    Lanczos's method from one random vector of mean zero: the first and last node are the ends of the spectrum, and the
    weights are those of Gauss quadrature over the density of the eigenvalues.

    Source: Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010.
    """
    num_agents = topology.num_agents
    row_start, neighbor, weight = (array.numpy() for array in topology.csr())
    rows = np.repeat(np.arange(num_agents), np.diff(row_start))
    basis = np.zeros((num_steps + 1, num_agents))
    basis[0] = np.random.default_rng(0).standard_normal(num_agents)
    basis[0] -= basis[0].mean()
    basis[0] /= np.linalg.norm(basis[0])
    tridiagonal = np.zeros((num_steps + 1, num_steps + 1))
    for k in range(num_steps):
        x, past = basis[k], basis[: k + 1]
        image = x + np.bincount(rows, weight * (x[neighbor] - x[rows]), minlength=num_agents)
        tridiagonal[k, k] = image @ x
        for _ in range(2):  # the second time removes what rounding has left of the mean and the earlier vectors
            image -= image.mean()
            image -= (past @ image) @ past
        length = np.linalg.norm(image)
        if length < TOLERANCE:  # W has few eigenvalues, as a star does, and all are found
            break
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = length
        basis[k + 1] = image / length
    nodes, vectors = np.linalg.eigh(tridiagonal[: k + 1, : k + 1])
    return nodes, vectors[0] ** 2 * (1 - 1 / num_agents)
