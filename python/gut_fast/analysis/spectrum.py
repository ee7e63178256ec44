"""The eigenvalues of a mixing matrix but the leading one, which are all that the analysis asks of a topology."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from gut_fast.analysis.linear import TOLERANCE, Array
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["Spectrum", "spectrum_of"]

DENSE_AGENTS = 512
"""Up to here the spectrum of any W is computed exactly, which costs tens of milliseconds."""

GRID = 257
"""Points all over the interval of a spectrum that is not computed exactly."""

SEARCHED = 1025
"""At most so many real eigenvalues are looked at in each step of a search: both ends, and evenly between."""


@dataclass(frozen=True)
class Spectrum:
    """The consensus eigenvalues of W, empty for one agent."""

    eigenvalues: Array
    """The distinct ones, [k], ascending where W is symmetric; complex where it is not."""
    weights: Array
    """[k], how often each occurs among the N, over N: Σ weights f(eigenvalues) is a mean over agents."""
    is_normal: bool = True
    """Whether W's eigenvectors are orthogonal, so that disagreement is the sum over modes."""
    keeps_mean: bool = True
    """Whether W's columns sum to one, so that the average over agents moves by itself."""

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def lazy(self, gamma: float) -> Spectrum:
        """That of ``I + γ (W − I)``."""
        return dataclasses.replace(self, eigenvalues=1 + gamma * (self.eigenvalues - 1))

    def thinned(self) -> Array:
        """Eigenvalues enough to find where a rule's slowest mode crosses a limit."""
        if len(self) <= SEARCHED or np.iscomplexobj(self.eigenvalues):
            return self.eigenvalues
        places = np.linspace(0, len(self) - 1, SEARCHED).round().astype(int)
        found: Array = self.eigenvalues[places]
        return found


def spectrum_of(topology: Topology) -> Spectrum:
    """Exact, but for unstructured symmetric graphs of more than 512 agents.

    There the ends are good to about 1e-4, at graphs without a bottleneck far closer, and means over agents to some
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
    # Rounding finds equal ones; the values themselves stay unrounded, for verdicts at the limit.
    _, first, counts = np.unique(eigenvalues.round(9), return_index=True, return_counts=True)
    return Spectrum(eigenvalues[first], counts / topology.num_agents, *_is_normal_and_keeps_mean(topology))


def _is_costly(topology: Topology) -> bool:
    """Whether the spectrum takes dense linear algebra on a large W: neither small nor a Fourier transform."""
    mixing = topology.cycle[0]
    if topology.num_agents <= DENSE_AGENTS or not isinstance(mixing, MixingMatrix):
        return False
    return mixing.group is None and mixing.is_symmetric


def _is_normal_and_keeps_mean(topology: Topology) -> tuple[bool, bool]:
    mixing = topology.cycle[0]
    if not isinstance(mixing, MixingMatrix) or mixing.is_symmetric:
        return True, True
    W = topology.matrix().numpy()
    return (
        np.allclose(W @ W.T, W.T @ W, rtol=0, atol=TOLERANCE),
        np.allclose(W.sum(axis=0), 1, rtol=0, atol=TOLERANCE),
    )


def _lanczos(topology: Topology, num_steps: int = 80) -> tuple[Array, Array]:
    """Nodes, ascending, and weights that integrate over the spectrum of a large symmetric W without its leading one.

    Lanczos from one random vector of mean zero: the nodes' ends are those of the spectrum, and the weights, by Gauss
    quadrature, stand for the density of the eigenvalues between them (Golub and Meurant, 2010).
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
        for _ in range(2):  # twice, so that rounding leaves no trace of the mean or the earlier vectors
            image -= image.mean()
            image -= (past @ image) @ past
        length = np.linalg.norm(image)
        if length < TOLERANCE:  # W has few eigenvalues, as a star does, and these are all
            break
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = length
        basis[k + 1] = image / length
    nodes, vectors = np.linalg.eigh(tridiagonal[: k + 1, : k + 1])
    return nodes, vectors[0] ** 2 * (1 - 1 / num_agents)
