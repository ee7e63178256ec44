"""How many steps a method takes to a target on noisy quadratics: in expectation, for up to 100,000 agents.

The model is the one on which decentralized methods are analysed. Agent i starts at z = 1 and sees the gradient

    g_i = h (z_i + ζ u_i + σ ξ_i)      in each of several coordinates of curvature h,

ξ_i standard normal and new at every step (the noise of its mini-batch), u_i standard normal, drawn once and centred
over the agents (its data differ from the others'). Each coordinate is measured in a unit of its own, such that all have
the same share of the loss at the start; noise and differences grow with h, as in least squares. The optimum is z = 0,
and what is followed is the mean agent's excess loss: the mean of z_i² over agents and coordinates, 1 at the start, in
expectation over ξ and u.

All update rules are linear, so nothing need be drawn. On the component along an eigenvector of W of eigenvalue λ a step
is the small matrix T(λ) of `gut_fast.analysis`, and the second moments ``P = E[s sᵀ]`` of ``s = (z, state, u)`` obey

    P ← M P Mᵀ + σ² b bᵀ,      M = [[T, ζ b], [0, 1]],      b the rule's gradient column times h.

The excess is the sum over the average mode (λ = 1, noise σ²/N, no u) and an integral over the spectrum of W for the
disagreement between agents, taken by Gauss quadrature. What the model leaves out: curvatures that differ between agents
and losses that are not convex. Topology then acts through the agents' disagreement alone, and the average speeds up
with N as in Lian et al., NeurIPS 2017. Sources: Koloskova et al., "A Unified Theory of Decentralized SGD with Changing
Topology and Local Updates", ICML 2020, for σ and ζ; Golub, Meurant, "Matrices, Moments and Quadrature", 2010.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gut_fast.arguments import as_integer, as_number
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix, RandomMatching

__all__ = ["Convergence", "Spectrum", "Task", "consensus_spectrum", "excess_losses", "steps_to_target"]

Array = NDArray[Any]

LEARNING_RATES = tuple(2.0 ** (1 - k / 2) for k in range(15))
"""What is tried: from 2 down in factors of √2."""

MUS = (0.9, 0.7, 0.5, 0.25)
"""What is tried where a rule has the hyper-parameter μ; those unstable on a topology drop out by diverging."""

NUM_NODES = 32
"""Of the quadrature. It resolves eigenvalues down to about 1/NUM_NODES² from the ends of the spectrum."""

NUM_FOURIER_MODES = 48
"""How many are drawn, evenly, of a time-varying topology that has more."""

DENSE_AGENTS = 512
"""Up to here the spectrum of any W is computed exactly."""

MAX_STEPS = 5_000

DIVERGED = 1e6
"""A loss of this many times that at the start does not come back."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        curvatures: h of each coordinate.
        noise: σ, standard deviation of one agent's gradient noise, in units of the gradient at the start.
        heterogeneity: ζ, standard deviation over agents of their own optima, in units of the way from the start to the
            common optimum. 0 is the same data everywhere.

    Raises:
        TypeError, ValueError: a curvature that is not positive, a noise or heterogeneity that is negative.
    """

    curvatures: tuple[float, ...] = (1.0, 0.1, 0.01)
    noise: float = 2.0
    heterogeneity: float = 1.0

    def __post_init__(self) -> None:
        curvatures = tuple(as_number(value, "Task: curvature") for value in self.curvatures)
        if not curvatures or not all(0 < value < math.inf for value in curvatures):
            raise ValueError(f"Task: curvatures must be positive and finite, at least one, got {self.curvatures}")
        object.__setattr__(self, "curvatures", curvatures)
        for name in ("noise", "heterogeneity"):
            value = as_number(getattr(self, name), f"Task: {name}")
            if not 0 <= value < math.inf:
                raise ValueError(f"Task: {name} must be at least 0 and finite, got {value}")


@dataclass(frozen=True)
class Convergence:
    """The least number of steps to a target over the learning rates and μ that were tried, and which these are."""

    steps: float
    """Infinite if none reached the target."""
    hyperparameters: Mapping[str, float]
    """The best ones, ``lr`` among them; empty if none reached the target."""


class Spectrum(NamedTuple):
    """The eigenvalues of W on the disagreement between agents, as nodes and weights of a quadrature."""

    eigenvalues: Array
    """[period, nodes], real or complex: the nodes are common eigenvectors of all matrices of the period."""
    weights: Array
    """[nodes], of sum 1 − 1/N."""


def consensus_spectrum(topology: Topology) -> Spectrum:
    """The spectrum of W but its leading 1, as few nodes: what the expected excess loss depends on.

    A quadrature of at most `NUM_NODES` nodes over the exact eigenvalues up to 512 agents and on graphs whose spectrum
    is a Fourier transform; on other large graphs over those that Lanczos steps find from one random vector (fixed),
    with a relative error of about 1/√N. It moves the steps to a target by one or two in a thousand. Of a time-varying
    sequence `NUM_FOURIER_MODES` of the modes, drawn once, where there are more.

    Raises:
        ValueError: W is neither constant and symmetric, nor (like that of the one-peer exponential graph) a periodic
            sequence of circulant matrices.
    """
    num_agents = topology.num_agents
    first = topology.cycle[0]
    if num_agents == 1:
        return Spectrum(np.zeros((1, 0)), np.zeros(0))
    if topology.is_static and isinstance(first, MixingMatrix) and first.is_symmetric:
        if num_agents <= DENSE_AGENTS or first.group is not None:
            eigenvalues = topology.eigenvalues[1:].numpy()
            nodes, weights = _gauss_quadrature(lambda x: eigenvalues * x, np.ones(num_agents - 1))
        else:
            start = np.random.default_rng(0).standard_normal(num_agents)
            nodes, weights = _gauss_quadrature(_multiplication_by(first), start - start.mean())
        return Spectrum(nodes[None], weights * (1 - 1 / num_agents))
    rows = [row for mixing in topology.cycle if (row := _circulant_row(mixing)) is not None]
    if len(rows) < len(topology.cycle):
        raise ValueError(
            f"{topology.name}: the steps to a target are known for a constant symmetric W and for periodic sequences "
            "of circulant ones, such as the one-peer exponential graph"
        )
    drawn = np.random.default_rng(0).permutation(num_agents - 1)[:NUM_FOURIER_MODES] + 1
    eigenvalues = np.stack([np.fft.fft(row)[drawn] for row in rows])
    return Spectrum(eigenvalues, np.full(len(drawn), (1 - 1 / num_agents) / len(drawn)))


def _gauss_quadrature(multiply: Callable[[Array], Array], start: Array) -> tuple[Array, Array]:
    """Nodes and weights (of sum one) of the spectral measure that `start` has under a symmetric linear map: Lanczos."""
    num_steps = min(NUM_NODES, len(start))
    basis = np.zeros((num_steps + 1, len(start)))
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = np.zeros(num_steps), np.zeros(num_steps)
    for k in range(num_steps):
        image = multiply(basis[k])
        diagonal[k] = image @ basis[k]
        for _ in range(2):  # twice, so that rounding leaves no trace of the earlier vectors
            image -= basis[: k + 1].T @ (basis[: k + 1] @ image)
        beside[k] = np.linalg.norm(image)
        if beside[k] < 1e-10:  # the measure has no more than k + 1 points
            num_steps = k + 1
            break
        basis[k + 1] = image / beside[k]
    diagonal, beside = diagonal[:num_steps], beside[: num_steps - 1]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return nodes, vectors[0] ** 2


def _multiplication_by(mixing: MixingMatrix) -> Callable[[Array], Array]:
    """x → W x, kept free of the mean over agents."""
    rows, neighbor, weight = (array.numpy() for array in (mixing.rows, *mixing.csr[1:]))

    def multiply(x: Array) -> Array:
        image = x + np.bincount(rows, weight * (x[neighbor] - x[rows]), minlength=len(x))
        centered: Array = image - image.mean()
        return centered

    return multiply


def _circulant_row(mixing: MixingMatrix | RandomMatching) -> Array | None:
    """Row 0 of W, [N], if every other row is this one shifted; else None."""
    if not isinstance(mixing, MixingMatrix):
        return None
    num_agents = mixing.num_agents
    rows, neighbor, weight = (array.numpy() for array in (mixing.rows, *mixing.csr[1:]))
    if len(neighbor) % num_agents or (mixing.csr.row_start.diff() != len(neighbor) // num_agents).any():
        return None
    hops = (neighbor - rows) % num_agents
    order = np.lexsort((hops, rows))
    hops, weight = (array[order].reshape(num_agents, -1) for array in (hops, weight))
    if (hops != hops[0]).any() or not np.allclose(weight, weight[0], rtol=0, atol=1e-12):
        return None
    row: Array = mixing.dense_row(0).numpy()
    return row


def excess_losses(
    rule: str | UpdateRule,
    settings: Sequence[Mapping[str, Any]],
    spectrum: Spectrum,
    num_agents: int,
    task: Task,
) -> Iterator[Array]:
    """The expected excess loss of the mean agent after step 1, 2, …, as a fraction of that at the start.

    Args:
        rule: a rule or its name.
        settings: hyper-parameters, ``lr`` among them, of runs that are followed side by side.
        spectrum: of `consensus_spectrum`; one without nodes stands for exact averaging, as by all-reduce.
        num_agents: N.
        task: what is learned.

    Yields:
        [settings], infinite or NaN where a run has diverged; without end.

    Raises:
        TypeError, ValueError: a bad rule or hyper-parameter.
    """
    rule = get_rule(rule)
    maps, sources = zip(*(_moment_maps(rule, settings, nodes, task) for nodes in spectrum.eigenvalues), strict=True)
    node_noise = np.append(np.full(len(spectrum.weights), 1.0), 1 / num_agents)[:, None, None]
    node_weights = np.append(spectrum.weights, 1.0)
    moments = np.zeros_like(maps[0])
    moments[..., :-1, -1, -1] = 1.0  # disagreement: z = 0, u of variance one
    moments[..., -1, 0, 0] = 1.0  # average: z = 1, no u
    for turn in itertools.cycle(range(len(maps))):
        with np.errstate(over="ignore", invalid="ignore"):
            moments = maps[turn] @ moments @ maps[turn].conj().swapaxes(-1, -2) + node_noise * sources[turn]
            yield (moments[..., 0, 0].real @ node_weights).mean(axis=1)


def _moment_maps(
    rule: UpdateRule, settings: Sequence[Mapping[str, Any]], eigenvalues: Array, task: Task
) -> tuple[Array, Array]:
    """M and σ² b bᵀ, each [settings, curvatures, nodes + 1, K, K]; the last node is the average mode."""
    coefficients = [rule.coefficients(**setting) for setting in settings]
    A, B, C, E = (np.array([getattr(each, name) for each in coefficients])[:, None, None] for name in "ABCE")
    shift = np.append(eigenvalues, 1.0)[:, None, None] - 1
    step = B + (C + shift * E) @ A  # [settings, 1, nodes + 1, K − 1, K], the last column is the gradient's
    gradient = np.array(task.curvatures)[:, None, None] * step[..., -1]
    step = np.repeat(step, len(task.curvatures), axis=1)
    step[..., 0] += gradient
    step[..., -1] = task.heterogeneity * gradient
    last_row = np.zeros((*step.shape[:-2], 1, step.shape[-1]))
    last_row[..., -1] = 1.0
    source = np.zeros((*step.shape[:-2], step.shape[-1], step.shape[-1]), step.dtype)
    source[..., :-1, :-1] = task.noise**2 * gradient[..., :, None] * gradient[..., None, :].conj()
    return np.concatenate([step, last_row], axis=-2), source


def steps_to_target(
    rule: str | UpdateRule,
    spectrum: Spectrum,
    num_agents: int,
    task: Task,
    target: float = 0.1,
    max_steps: int = MAX_STEPS,
) -> Convergence:
    """How many steps `rule` takes to an expected excess loss of at most `target`, at the best of its settings.

    Tried are `LEARNING_RATES` and, if the rule has μ, `MUS`; other hyper-parameters are at their defaults.

    Args:
        rule: a rule or its name.
        spectrum: of `consensus_spectrum`.
        num_agents: N.
        task: what is learned.
        target: a fraction of the excess loss at the start, in (0, 1).
        max_steps: where the search ends.

    Raises:
        TypeError, ValueError: a bad rule, target or number of steps.
    """
    rule = get_rule(rule)
    if not 0 < as_number(target, "target") < 1:
        raise ValueError(f"target must be a fraction of the loss at the start, in (0, 1), got {target}")
    best = Convergence(math.inf, {})
    last_step = as_integer(max_steps, "max_steps", minimum=1)
    for mu in MUS if "mu" in rule.hyperparameters else (None,):
        settings = [{"lr": lr} if mu is None else {"lr": lr, "mu": mu} for lr in LEARNING_RATES]
        losses = excess_losses(rule, settings, spectrum, num_agents, task)
        for step, loss in enumerate(itertools.islice(losses, last_step), 1):
            if (loss <= target).any():
                best, last_step = Convergence(step, settings[int(np.nanargmin(loss))]), step - 1
                break
            if not (loss < DIVERGED).any():
                break
    return best
