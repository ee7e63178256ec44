"""Eigenvalues of large mixing matrices: by a Fourier transform that several share, or estimated by Lanczos's method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gut_fast.analysis.transition import TOLERANCE, Array
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["lanczos", "shared_transform"]


def shared_transform(mixings: Sequence[MixingMatrix]) -> Array | None:
    """The eigenvalues of mixing matrices of one period along eigenvectors that all share, [N − 1, L]; None if not.

    They are found where all are invariant under the shifts of the same ring or grid of agents: the eigenvectors are
    then those of a Fourier transform, and the eigenvalues are the transforms of the first rows.
    """
    num_agents = mixings[0].num_agents
    group = next((mixing.group for mixing in mixings if mixing.group is not None), (num_agents,))
    probe = np.random.default_rng(0).standard_normal(group)
    found = []
    for mixing in mixings:
        transformed = np.fft.fftn(mixing.dense_row(0).numpy().reshape(group))
        image = np.fft.ifftn(transformed.conj() * np.fft.fftn(probe)).real.flatten()
        if not np.allclose(image, _mixed(mixing, probe.flatten()), rtol=0, atol=TOLERANCE):
            return None
        found.append(transformed.flatten()[1:])
    eigenvalues = np.stack(found, axis=1)
    is_real = np.abs(eigenvalues.imag).max(initial=0.0) < 1e-12
    return eigenvalues.real if is_real else eigenvalues


def lanczos(mixing: MixingMatrix, num_steps: int = 80) -> tuple[Array, Array]:
    """Nodes, ascending, and weights that integrate over the spectrum of a large symmetric W without its leading one.

    Lanczos's method from one random vector of mean zero: the first and last node are the ends of the spectrum, and the
    weights are those of Gauss quadrature over the density of the eigenvalues.

    Source: Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010.
    """
    num_agents = mixing.num_agents
    basis = np.zeros((num_steps + 1, num_agents))
    basis[0] = np.random.default_rng(0).standard_normal(num_agents)
    basis[0] -= basis[0].mean()
    basis[0] /= np.linalg.norm(basis[0])
    tridiagonal = np.zeros((num_steps + 1, num_steps + 1))
    for k in range(num_steps):
        past = basis[: k + 1]
        image = _mixed(mixing, basis[k])
        tridiagonal[k, k] = image @ basis[k]
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


def _mixed(mixing: MixingMatrix, x: Array) -> Array:
    """The vector W x."""
    rows, neighbor, weight = mixing.rows.numpy(), mixing.csr.neighbor.numpy(), mixing.csr.weight.numpy()
    found: Array = x + np.bincount(rows, weight * (x[neighbor] - x[rows]), minlength=mixing.num_agents)
    return found
