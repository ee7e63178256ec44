"""The rounds of a topology, as the analysis sees them: how the disagreement between agents moves.

A topology that is static repeats after one round, one that varies after several, and random matchings never do. Where
the matrices of a period share their eigenvectors, as those of a static graph and of one-peer exponential graphs do, the
disagreement is a sum of modes; where they do not, few agents are one block of all. Both are `Blocks`, whose products
over the period linear algebra solves. Large periods without structure and random matchings are `Iterated`: vectors are
followed through the rounds, and their growth is what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from gut_fast.analysis.spectrum import lanczos, shared_transform
from gut_fast.analysis.transition import Array, Round, radius
from gut_fast.topology import Topology
from gut_fast.topology.drawn import RandomMatching
from gut_fast.topology.mixing import MixingMatrix

__all__ = ["Blocks", "Consensus", "Iterated", "mixing_of"]

DENSE_AGENTS = 512
"""The largest number of agents for which the spectrum of any W is computed exactly, in tens of milliseconds."""

BLOCK_AGENTS = 48
"""The largest number of agents that make one block where matrices of a period share no eigenvectors."""

SEARCHED = 1025
"""The largest number of modes in each step of a search: both ends, and evenly between them."""

GRID = 257
"""The number of points all over the interval of a spectrum that is not computed exactly."""

ROUNDS, FIRST, PARTS = 400, 60, 20
"""How many rounds are followed where the growth of a vector is estimated, after those that the start still shows in,
and into how many parts they are divided for the error."""

CENTRED = 5
"""After how many rounds vectors are brought back to length one without a mean; `ROUNDS` and `FIRST` are multiples."""

LIKE_ALL = 192
"""The number of agents that stand for more than 256 in random matchings: pairs that hardly meet again grow alike."""

NOTHING = 1e-13
"""The factor of a whole period below which disagreement is gone but for rounding."""


class Consensus(NamedTuple):
    """The factor of the disagreement per step."""

    rate: float
    error: float = 0.0
    """The standard error of the rate's logarithm, where it is estimated."""
    eigenvalue: complex | None = None
    """The eigenvalue of W with the largest mode, where there is one W."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The matrices of a period, in a basis that makes them block-diagonal without the agents' average."""

    matrices: Array
    """[k, L, b, b] for k blocks and L rounds: eigenvalues with b = 1, of conjugate ones only the one above."""
    weights: Array
    """How often each block occurs, over N, [k]: Σ weights f(block) is a mean over agents."""
    is_normal: bool = True
    """True if the basis is orthonormal, so that disagreement is a sum over blocks."""
    keeps_mean: bool = True
    """True if the columns of every W sum to one, so that the average over agents moves by itself."""

    at_once = 1

    @property
    def period(self) -> int:
        """The number of rounds."""
        return int(self.matrices.shape[1])

    @property
    def eigenvalues(self) -> Array:
        """The eigenvalues of a single W, [k]."""
        found: Array = self.matrices[:, 0, 0, 0]
        return found

    def thinned(self) -> Blocks:
        """Enough of the blocks to find where a rule's slowest mode crosses a limit."""
        if len(self.matrices) <= SEARCHED:
            return self
        places = np.linspace(0, len(self.matrices) - 1, SEARCHED).round().astype(int)
        return Blocks(self.matrices[places], self.weights[places], self.is_normal, self.keeps_mean)

    def consensus(self, rounds: Sequence[Round]) -> list[Consensus]:
        """The factor per step for each of several rounds."""
        return [self._consensus(each) for each in rounds]

    def _consensus(self, each: Round) -> Consensus:
        if not len(self.matrices):
            return Consensus(0.0, eigenvalue=1.0)
        with np.errstate(all="ignore"):  # a rate far beyond its limit overflows
            product = self.over_a_period(each)
        if not np.isfinite(product).all():
            return Consensus(math.inf)
        factors = radius(product)
        worst = int(factors.argmax())
        factor = float(factors[worst]) if self.period == 1 or factors[worst] > NOTHING else 0.0
        is_single = self.matrices.shape[1:] == (1, 1, 1)
        return Consensus(
            each.per_step(factor, self.period), eigenvalue=self.eigenvalues[worst].item() if is_single else None
        )

    def over_a_period(self, each: Round, phase: int = 0) -> Array:
        """The matrices of all rounds of a period that begins at a phase of the topology's, [k, s b, s b]."""
        product, *others = (matrices for matrices, _ in self.steps(each, phase))
        for matrices in others:
            product = matrices @ product
        return product

    def steps(self, each: Round, phase: int = 0) -> Iterator[tuple[Array, Array]]:
        """The matrices of `Round.at` for each of the rounds of a period."""
        for place in range(self.period):
            yield each.at(self.matrices[:, (place + phase) % self.period])


@dataclass(frozen=True, eq=False)
class Iterated:
    """The rounds of a topology that has no small blocks."""

    topology: Topology
    keeps_mean: bool = True

    @property
    def period(self) -> int:
        """The number of rounds; 1 where they never repeat, as there is nothing to wait for."""
        return self.topology.period or 1

    @property
    def is_large(self) -> bool:
        """True if there are so many agents that a search takes seconds."""
        return self.topology.num_agents > 256

    @property
    def at_once(self) -> int:
        """How many values a search tries in one go: many where a step takes as long for one value as for several."""
        return 1 if self.is_large else 12

    def thinned(self) -> Iterated:
        """Fewer agents that stand for all in random matchings; other rounds are the same."""
        (*others, mixing) = self.topology.cycle
        if others or not (self.is_large and isinstance(mixing, RandomMatching)):
            return self
        found = mixing_of(Topology(self.topology.name, (replace(mixing, num_agents=LIKE_ALL),)))
        assert isinstance(found, Iterated)
        return found

    def consensus(self, rounds: Sequence[Round]) -> list[Consensus]:
        """The factor per step for each of several rounds, which take the same number of steps."""
        if len({len(each.still) for each in rounds}) > 1:
            return [found for each in rounds for found in self.consensus([each])]
        return [
            Consensus(each.per_step(math.exp(rate)), error / each.num_steps)
            for each, rate, error in zip(rounds, *self._growth(rounds), strict=True)
        ]

    @cached_property
    def _mixings(self) -> list[_Mixing]:
        """The matrices of the rounds of a period, or of as many as are followed: the more agents, the fewer tell."""
        followed = min(max(ROUNDS * 256 // self.topology.num_agents, ROUNDS // 4), ROUNDS) // CENTRED * CENTRED + FIRST
        return [_Mixing.at(self.topology, step) for step in range(self.topology.period or followed)]

    def _growth(self, rounds: Sequence[Round]) -> tuple[list[float], list[float]]:
        """The mean growth of a vector's logarithm a round, for each of the rounds' maps, and its standard error.

        The error follows from the means of 20 parts of the rounds, and is no less than half of what the second half of
        the parts has changed.
        """
        maps, period = _Maps(rounds), len(self._mixings)
        x, sizes = maps.start(self.topology.num_agents), []
        followed = max(period, FIRST + ROUNDS // 2) if self.topology.period else period
        for place in range(0, followed, CENTRED):
            for step in range(place, place + CENTRED):
                x = maps.apply(x, self._mixings[step % period])
            x -= x.mean(axis=1, keepdims=True)
            size = np.linalg.norm(x.reshape(len(x), -1), axis=1).clip(1e-200)
            x /= size[:, None, None]
            sizes.append(np.log(size) / CENTRED)
        means = np.stack([part.mean(axis=0) for part in np.array_split(sizes[FIRST // CENTRED :], PARTS)])
        errors = means.std(axis=0, ddof=1) / math.sqrt(PARTS)
        change = np.abs(means[: PARTS // 2].mean(axis=0) - means[PARTS // 2 :].mean(axis=0)) / 2
        return means.mean(axis=0).tolist(), np.maximum(errors, change).tolist()


class _Maps:
    """Several rounds, applied to a vector of each, [V, N, s] for V rounds, N agents and s rows of (z, state)."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._still, self._exchange = (
            np.stack([getattr(each, name).T for each in rounds]) for name in ("still", "exchange")
        )

    def start(self, num_agents: int) -> Array:
        """A random vector of disagreement, the same for all rounds."""
        x = np.random.default_rng(0).standard_normal((1, num_agents, self._still.shape[1]))
        found: Array = (x - x.mean(axis=1, keepdims=True)).repeat(len(self._still), axis=0)
        return found

    def apply(self, x: Array, mixing: _Mixing) -> Array:
        """The vectors after the round in which the agents mix so."""
        moved: Array = x @ self._still
        moved += mixing.drift(x @ self._exchange)
        return moved


class _Mixing(NamedTuple):
    """One mixing matrix, without a neighbour for agents that rest."""

    start: Array
    """The first entry of each agent that hears another."""
    rows: Array
    """The row of every entry."""
    neighbor: Array
    weight: Array

    @classmethod
    def at(cls, topology: Topology, step: int) -> _Mixing:
        """The matrix of a step."""
        row_start, neighbor, weight = (array.numpy() for array in topology.csr(step))
        degrees = np.diff(row_start)
        rows = np.repeat(np.arange(len(degrees)), degrees)
        return cls(row_start[:-1][degrees > 0], rows, neighbor, weight[:, None])

    def drift(self, x: Array) -> Array:
        """The sums ``Σ_j W_ij (x_j − x_i)`` over the second axis."""
        if len(self.start) == len(self.neighbor) == x.shape[1]:  # everyone hears one other
            alone: Array = self.weight * (x.take(self.neighbor, axis=1) - x)
            return alone
        drift = np.zeros_like(x)
        if len(self.start):
            differences = self.weight * (x.take(self.neighbor, axis=1) - x.take(self.rows, axis=1))
            drift[:, self.rows[self.start]] = np.add.reduceat(differences, self.start, axis=1)
        return drift


@lru_cache(maxsize=8)
def mixing_of(topology: Topology) -> Blocks | Iterated:
    """The rounds of a topology, in the form in which the analysis solves them fastest.

    They are exact but for unstructured graphs of more than 512 agents whose W is symmetric, where the ends of the
    spectrum are good to about 1e-4, far closer without a bottleneck, and means over agents to some per cent; for those
    that vary and share no eigenvectors of more than 48 agents; and for those that never repeat.
    """
    cycle = topology.cycle
    keeps_mean = all(mixing.is_doubly_stochastic for mixing in cycle if isinstance(mixing, MixingMatrix))
    fixed = [mixing for mixing in cycle if isinstance(mixing, MixingMatrix)]
    if len(fixed) < len(cycle):
        return Iterated(topology, keeps_mean)
    distinct = {mixing for mixing in fixed if len(mixing.csr.weight)} or {fixed[0]}
    if len(distinct) == 1:
        (mixing,) = distinct
        moves = np.array([each == mixing for each in fixed])
        if _is_costly(mixing):
            nodes, weights = lanczos(mixing)
            values = np.concatenate([np.linspace(nodes[0], nodes[-1], GRID), nodes])
            return Blocks(_taking_turns(values, moves), np.concatenate([np.zeros(GRID), weights]))
        values = _taking_turns(mixing.eigenvalues[1:].numpy(), moves)
        return _merged(values, mixing.is_normal, keeps_mean)
    if (transformed := shared_transform(fixed)) is not None:
        return _merged(transformed[:, :, None, None], True, keeps_mean)
    if topology.num_agents > BLOCK_AGENTS:
        return Iterated(topology, keeps_mean)
    return _one_block(fixed, keeps_mean)


def _is_costly(mixing: MixingMatrix) -> bool:
    """True if the spectrum takes dense linear algebra on a large W: neither small nor a Fourier transform."""
    return mixing.num_agents > DENSE_AGENTS and mixing.group is None and mixing.is_symmetric


def _taking_turns(eigenvalues: Array, moves: Array) -> Array:
    """The eigenvalues as blocks over a period, in which W mixes in the rounds that `moves` says."""
    return np.where(moves, eigenvalues[:, None], 1.0)[:, :, None, None]


def _merged(values: Array, is_normal: bool, keeps_mean: bool) -> Blocks:
    """Blocks of one row each, N − 1 of them, with equal and conjugate ones taken together."""
    rounded = values[:, :, 0, 0].round(9)
    if np.iscomplexobj(rounded):
        first = (rounded.imag != 0).argmax(axis=1)[:, None]
        is_below = np.take_along_axis(rounded.imag, first, axis=1) < 0
        rounded = np.where(is_below, rounded.conj(), rounded)
        values = np.where(is_below[:, :, None, None], values.conj(), values)
        rounded = np.concatenate([rounded.real, rounded.imag], axis=1)
    # Rounding finds equal eigenvalues; the values themselves stay unrounded, for verdicts at the limit.
    _, places, counts = np.unique(rounded + 0.0, axis=0, return_index=True, return_counts=True)
    return Blocks(values[places], counts / (len(values) + 1), is_normal, keeps_mean)


def _one_block(mixings: Sequence[MixingMatrix], keeps_mean: bool) -> Blocks:
    num_agents = mixings[0].num_agents
    basis = np.linalg.qr(np.eye(num_agents) - 1 / num_agents)[0][:, : num_agents - 1]
    matrices = np.stack([basis.T @ mixing.dense().numpy() @ basis for mixing in mixings])
    return Blocks(matrices[None], np.array([1 / num_agents]), True, keeps_mean)
