"""Mixing matrices that are drawn anew at every step: each agent hears one other agent, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
import torch

from gut_fast.topology.mixing import CSR, MixingMatrix

__all__ = ["DrawnMixing", "RandomMatching", "RandomShift", "ShiftMatching"]

Agents: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True)
class DrawnMixing(ABC):
    """A doubly stochastic W at every step, a function of the seed and the step alone, so all processes draw the same.

    Args:
        num_agents: the number of agents N.
        seed: the seed of all steps.
        gamma: the factor of the weights: γ of `lazy`, or η of EquiTopo graphs times γ.
    """

    num_agents: int
    seed: int
    gamma: float = 1.0

    @property
    @abstractmethod
    def full_weight(self) -> float:
        """The weight that an agent gives to the one it hears, at γ = 1."""

    @abstractmethod
    def heard(self, rng: np.random.Generator) -> Agents:
        """The agent that each agent hears, int64 [N], a permutation; those who hear nobody have their own number."""

    def at(self, step: int) -> MixingMatrix:
        """The matrix of a step."""
        return _drawn(self, step)

    def graph(self) -> nx.Graph:
        """The complete graph, since every pair meets in time."""
        graph: nx.Graph = nx.complete_graph(self.num_agents)
        return graph

    def lazy(self, gamma: float) -> DrawnMixing:
        """The drawn matrices as ``I + γ (W − I)`` at every step."""
        return replace(self, gamma=gamma * self.gamma)

    def without(self, agents: Collection[int]) -> DrawnMixing:
        """New draws among the other agents."""
        return replace(self, num_agents=self.num_agents - len(agents))

    def with_weights(self, weights: str) -> DrawnMixing:
        """The same draws with weights 1/2, which Metropolis–Hastings and uniform weights both are on a pair."""
        return replace(self, gamma=0.5 / self.full_weight)


@dataclass(frozen=True)
class RandomMatching(DrawnMixing):
    """A uniformly random maximal matching at every step: pairs mix with weights γ/2, an odd agent out rests."""

    @property
    def full_weight(self) -> float:
        """One half: pairs average."""
        return 0.5

    def heard(self, rng: np.random.Generator) -> Agents:
        """The partner of each agent, itself where it has none."""
        order = rng.permutation(self.num_agents)
        one, other = order[: self.num_agents // 2 * 2].reshape(-1, 2).T
        partner = np.arange(self.num_agents)
        partner[one], partner[other] = other, one
        return partner


@dataclass(frozen=True)
class RandomShift(DrawnMixing):
    """OD-EquiDyn: at every step agent i hears agent ``i + a mod N``, a drawn from 1 … N − 1, weight ``γ (N − 1)/N``."""

    @property
    def full_weight(self) -> float:
        """The weight (N − 1)/N of EquiTopo's basis graphs, whose mean over all shifts a is ``11ᵀ/N``."""
        return 1 - 1 / max(self.num_agents, 2)

    def heard(self, rng: np.random.Generator) -> Agents:
        """The agent ``i + a mod N`` of each agent i."""
        return (np.arange(self.num_agents) + _draw_shift(rng, self.num_agents)) % self.num_agents

    def without(self, agents: Collection[int]) -> DrawnMixing:
        """New draws among the other agents, in both directions."""
        return ShiftMatching(self.num_agents - len(agents), self.seed, self.gamma)

    def with_weights(self, weights: str) -> DrawnMixing:
        """Raises ValueError: the graph is directed."""
        raise ValueError(f"the graph is directed; {weights} weights need an undirected one")


@dataclass(frozen=True)
class ShiftMatching(RandomShift):
    """OU-EquiDyn: pairs ``{i, i + a mod N}``, formed from a drawn agent onwards of those that are still free."""

    def heard(self, rng: np.random.Generator) -> Agents:
        """The partner of each agent, itself where it has none."""
        n = self.num_agents
        shift, start = _draw_shift(rng, n), int(rng.integers(n))
        partner = list(range(n))
        for place in range(start, start + n):
            agent, other = place % n, (place + shift) % n
            if partner[agent] == agent and partner[other] == other:
                partner[agent], partner[other] = other, agent
        return np.array(partner)

    def without(self, agents: Collection[int]) -> DrawnMixing:
        """New draws among the other agents."""
        return DrawnMixing.without(self, agents)

    def with_weights(self, weights: str) -> DrawnMixing:
        """The same draws with weights 1/2, which Metropolis–Hastings and uniform weights both are on a pair."""
        return DrawnMixing.with_weights(self, weights)


def _draw_shift(rng: np.random.Generator, num_agents: int) -> int:
    """A number in 1 … N − 1; of a single agent 1, which is no shift there."""
    return int(rng.integers(1, max(num_agents, 2)))


@lru_cache(maxsize=64)  # all parameters of a step share its matrix; a past step rarely comes back
def _drawn(mixing: DrawnMixing, step: int) -> MixingMatrix:
    heard = mixing.heard(np.random.default_rng((mixing.seed, step)))
    is_hearing = heard != np.arange(mixing.num_agents)
    row_start = np.concatenate([[0], is_hearing.cumsum()])
    weight = np.full(row_start[-1], mixing.gamma * mixing.full_weight)
    return MixingMatrix(CSR(*map(torch.from_numpy, (row_start, heard[is_hearing], weight))))
