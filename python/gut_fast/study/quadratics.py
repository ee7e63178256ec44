"""How many steps a method takes to a target on noisy quadratics: in expectation, for up to 100,000 agents.

The model is the one on which decentralized methods are analysed. Agent i starts at z = 1 and sees the gradient

    g_i = h (z_i + ζ u_i + σ ξ_i)      in each of several coordinates of curvature h,

ξ_i standard normal and new at every step (the noise of its mini-batch), u_i standard normal, drawn once and centred
over the agents (its data differ from the others'). Each coordinate is measured in a unit of its own, such that all have
the same share of the loss at the start; noise and differences grow with h, as in least squares. The optimum is z = 0,
and what is followed is the mean agent's excess loss: the mean of z_i² over agents and coordinates, 1 at the start, in
expectation over ξ and u.

All update rules are linear, so nothing need be drawn. On the component along an eigenvector of W of eigenvalue λ a
round of H steps is the small matrix T(λ) of `gut_fast.analysis`, and the second moments ``P = E[s sᵀ]`` of
``s = (z, state, u)`` obey

    P ← M P Mᵀ + σ² b bᵀ,      M = [[T, ζ b 1], [0, 1]],      b the rule's column for each of the H gradients, times h.

The excess is the sum over the average mode (λ = 1, noise σ²/N, no u) and an integral over the spectrum of W for the
disagreement between agents, taken by Gauss quadrature. The model leaves out curvatures that differ between agents and
losses that are not convex. Topology then acts through the agents' disagreement alone, and the average speeds up with N
as in Lian et al., NeurIPS 2017. Sources: Koloskova et al., "A Unified Theory of Decentralized SGD with Changing
Topology and Local Updates", ICML 2020, for σ and ζ; Golub, Meurant, "Matrices, Moments and Quadrature", 2010.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from gut_fast.analysis.periods import DENSE_AGENTS
from gut_fast.analysis.transition import Array, round_of
from gut_fast.arguments import as_number
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

__all__ = [
    "EXACT_AVERAGE",
    "Quadratics",
    "Quadrature",
    "Steps",
    "consensus_quadrature",
    "excess_losses",
    "steps_to_target",
]

LEARNING_RATES = tuple(2.0 ** (1 - k / 2) for k in range(15))
"""The learning rates that are tried: from 2 down in factors of √2."""

MUS = (0.9, 0.7, 0.5, 0.25)
"""The values that are tried for a rule's μ; those unstable on a topology drop out by diverging."""

NUM_NODES = 32
"""The nodes of the quadrature. They resolve eigenvalues down to about 1/NUM_NODES² from the ends of the spectrum."""

NUM_FOURIER_MODES = 48
"""How many modes of a time-varying topology are drawn, once, where it has more."""

MAX_STEPS = 5_000

DIVERGED = 1e6
"""A loss of this many times that at the start does not come back."""


@dataclass(frozen=True)
class Quadratics:
    """The problem that is learned, and how well.

    Args:
        noise: σ, standard deviation of one agent's gradient noise, in units of the gradient at the start.
        heterogeneity: ζ, standard deviation over agents of their own optima, in units of the way from the start to the
            common optimum. 0 is the same data everywhere.
        target: the excess loss to be reached, as a fraction of that at the start, in (0, 1).
        curvatures: h of each coordinate.

    Raises:
        TypeError, ValueError: a curvature that is not positive, a negative noise or heterogeneity, or a bad target.
    """

    noise: float = 2.0
    heterogeneity: float = 1.0
    target: float = 0.1
    curvatures: tuple[float, ...] = (1.0, 0.1, 0.01)

    def __post_init__(self) -> None:
        if not self.curvatures or not all(0 < as_number(h, "curvature") < math.inf for h in self.curvatures):
            raise ValueError(f"curvatures must be positive and finite, at least one, got {self.curvatures}")
        for name in ("noise", "heterogeneity"):
            if not 0 <= as_number(getattr(self, name), name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < as_number(self.target, "target") < 1:
            raise ValueError(f"target must be a fraction of the loss at the start, in (0, 1), got {self.target}")


class Steps(NamedTuple):
    """The least number of steps to a target over the settings that were tried, and the best setting.

    `steps` is infinite if none reached the target and NaN if the spectrum is not known; `lr` and `mu` are NaN then.
    """

    steps: float
    lr: float = math.nan
    mu: float = math.nan


class Quadrature(NamedTuple):
    """The eigenvalues of W on the disagreement between agents, as nodes and weights of a quadrature."""

    eigenvalues: Array
    """[period, nodes], real or complex: the nodes are common eigenvectors of all matrices of the period."""
    weights: Array
    """[nodes], of sum 1 − 1/N."""


EXACT_AVERAGE = Quadrature(np.zeros((1, 0)), np.zeros(0))
"""Nobody disagrees after a step, as with all-reduce."""


def consensus_quadrature(topology: Topology) -> Quadrature | None:
    """The spectrum of W but its leading 1, as few nodes: the part of a topology that the expected excess loss sees.

    It is a quadrature of at most `NUM_NODES` nodes over the exact eigenvalues up to `DENSE_AGENTS` agents and on graphs
    whose spectrum is a Fourier transform; on other large graphs over those that Lanczos steps find from one random
    vector (fixed), with a relative error of about 1/√N. It moves the steps to a target by one or two in a thousand.

    Returns:
        None unless W is constant and symmetric, or (like that of the one-peer exponential graph) a periodic sequence of
        circulant matrices.
    """
    num_agents, first = topology.num_agents, topology.cycle[0]
    if num_agents == 1:
        return EXACT_AVERAGE
    if topology.is_static and isinstance(first, MixingMatrix) and first.is_symmetric:
        if num_agents <= DENSE_AGENTS or first.group is not None:
            eigenvalues = topology.eigenvalues[1:].numpy()
            nodes, weights = _gauss_quadrature(lambda x: eigenvalues * x, np.ones(num_agents - 1))
        else:
            start = np.random.default_rng(0).standard_normal(num_agents)
            nodes, weights = _gauss_quadrature(_centered_product(first), start - start.mean())
        return Quadrature(nodes[None], weights * (1 - 1 / num_agents))
    if not all(isinstance(mixing, MixingMatrix) and _is_circulant(mixing) for mixing in topology.cycle):
        return None
    drawn = np.random.default_rng(0).permutation(num_agents - 1)[:NUM_FOURIER_MODES] + 1
    rows = [mixing.dense_row(0).numpy() for mixing in topology.cycle if isinstance(mixing, MixingMatrix)]
    eigenvalues = np.stack([np.fft.fft(row)[drawn] for row in rows])
    return Quadrature(eigenvalues, np.full(len(drawn), (1 - 1 / num_agents) / len(drawn)))


def _gauss_quadrature(multiply: Callable[[Array], Array], start: Array) -> tuple[Array, Array]:
    """Nodes and weights (of sum one) of the spectral measure that `start` has under a symmetric linear map: Lanczos."""
    basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(NUM_NODES, len(start))):
        image = multiply(basis[-1])
        diagonal.append(image @ basis[-1])
        known = np.array(basis)
        for _ in range(2):  # twice, so that rounding leaves no trace of the earlier vectors
            image = image - known.T @ (known @ image)
        beside.append(np.linalg.norm(image))
        if beside[-1] < 1e-10:  # the measure has no more points
            break
        basis.append(image / beside[-1])
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], -1))  # it reads the lower triangle
    return nodes, vectors[0] ** 2


def _centered_product(mixing: MixingMatrix) -> Callable[[Array], Array]:
    """The map x → W x, kept free of the mean over agents."""
    row_start, neighbor, weight = (array.numpy() for array in mixing.csr)
    away = csr_matrix((weight, neighbor, row_start))
    kept = 1 - away.sum(axis=1).A1

    def product(x: Array) -> Array:
        image: Array = kept * x + away @ x
        image -= image.mean()
        return image

    return product


def _is_circulant(mixing: MixingMatrix) -> bool:
    """True if every row of W is row 0 shifted."""
    rows, neighbor, weight = (array.numpy() for array in (mixing.rows, *mixing.csr[1:]))
    if len(rows) % mixing.num_agents:
        return False
    hops = (neighbor - rows) % mixing.num_agents
    entries = np.stack([hops, weight])[:, np.lexsort((hops, rows))].reshape(2, mixing.num_agents, -1)
    return np.allclose(entries, entries[:, :1], rtol=0, atol=1e-12)


def excess_losses(
    rule: str | UpdateRule,
    settings: Sequence[Mapping[str, Any]],
    quadrature: Quadrature,
    num_agents: int,
    problem: Quadratics,
    local_steps: int = 1,
) -> Iterator[Array]:
    """The expected excess loss of the mean agent after round 1, 2, …, as a fraction of that at the start.

    Args:
        rule: a rule or its name.
        settings: hyper-parameters, ``lr`` among them, of runs that are followed side by side.
        quadrature: from `consensus_quadrature`, or `EXACT_AVERAGE`.
        num_agents: N.
        problem: what is learned.
        local_steps: H, the steps of a round.

    Yields:
        [settings], infinite or NaN where a run has diverged; without end.

    Raises:
        TypeError, ValueError: a bad rule or hyper-parameter.
    """
    maps, sources = zip(
        *(_moment_maps(rule, settings, nodes, problem, local_steps) for nodes in quadrature.eigenvalues), strict=True
    )
    node_noise = np.append(np.full(len(quadrature.weights), 1.0), 1 / num_agents)[:, None, None]
    node_weights = np.append(quadrature.weights, 1.0)
    moments = np.zeros_like(maps[0])
    moments[..., :-1, -1, -1] = 1.0  # disagreement: z = 0, u of variance one
    moments[..., -1, 0, 0] = 1.0  # average: z = 1, no u
    for step, source in itertools.cycle(zip(maps, sources, strict=True)):
        with np.errstate(over="ignore", invalid="ignore"):
            moments = step @ moments @ step.conj().swapaxes(-1, -2) + node_noise * source
            yield (moments[..., 0, 0].real @ node_weights).mean(axis=1)


def _moment_maps(
    rule: str | UpdateRule,
    settings: Sequence[Mapping[str, Any]],
    eigenvalues: Array,
    problem: Quadratics,
    local_steps: int,
) -> tuple[Array, Array]:
    """M and σ² b bᵀ, each [settings, curvatures, nodes + 1, K, K]; the last node is the average mode."""
    nodes = np.append(eigenvalues, 1.0)
    found = [
        (*round_of(rule, setting, h, local_steps).at(nodes[:, None, None]), h)
        for setting in settings
        for h in problem.curvatures
    ]
    shape = (len(settings), len(problem.curvatures), len(nodes))
    T = np.stack([matrices for matrices, _, _ in found]).reshape(*shape, *found[0][0].shape[1:])
    b = np.stack([h * gradients for _, gradients, h in found]).reshape(*shape, -1, local_steps)
    step = np.concatenate([T, problem.heterogeneity * b.sum(axis=-1, keepdims=True)], axis=-1)
    last_row = np.zeros((*shape, 1, step.shape[-1]))
    last_row[..., -1] = 1.0
    padded = np.concatenate([problem.noise * b, np.zeros((*shape, 1, local_steps))], axis=-2)
    return np.concatenate([step, last_row], axis=-2), padded @ padded.conj().swapaxes(-1, -2)


def steps_to_target(
    rule: str | UpdateRule,
    quadrature: Quadrature | None,
    num_agents: int,
    problem: Quadratics,
    max_steps: int = MAX_STEPS,
    local_steps: int = 1,
) -> Steps:
    """How many steps, in whole rounds, `rule` takes to the problem's target, at the best of its settings.

    `LEARNING_RATES` and, if the rule has μ, `MUS` are tried; other hyper-parameters are at their defaults.

    Args:
        rule: a rule or its name.
        quadrature: from `consensus_quadrature`, or `EXACT_AVERAGE`.
        num_agents: N.
        problem: what is learned, and the target.
        max_steps: where the search ends.
        local_steps: H, the steps of a round.

    Raises:
        TypeError, ValueError: a bad rule or number of local steps.
    """
    rule = get_rule(rule)
    if quadrature is None:
        return Steps(math.nan)
    best = Steps(math.inf)
    for mu in MUS if "mu" in rule.hyperparameters else (None,):
        settings = [{"lr": lr} if mu is None else {"lr": lr, "mu": mu} for lr in LEARNING_RATES]
        losses = excess_losses(rule, settings, quadrature, num_agents, problem, local_steps)
        last = min(max_steps, best.steps - 1) // local_steps
        for number, loss in enumerate(itertools.islice(losses, int(last)), 1):
            if (loss <= problem.target).any():
                best = Steps(number * local_steps, **settings[int(np.nanargmin(loss))])
                break
            if not (loss < DIVERGED).any():
                break
    return best
