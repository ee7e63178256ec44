"""Base-(k+1) graphs: a few steps in which every agent talks to at most k others, and after which all have the average.

Source: Takezawa, Sato, Bao, Niwa, Yamada, "Beyond Exponential Graph: Communication-Efficient Topologies for
Decentralized Learning via Finite-time Convergence", NeurIPS 2023, algorithms 1 to 3.

Sets of agents are arrays [sets, n]: all sets do the same side by side. A step is a list of `Edges` without a pair in
common.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from gut_fast.topology.mixing import MixingMatrix, from_edges

__all__ = ["base_cycle"]

Agents: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


class Edges(NamedTuple):
    """Pairs of agents that give the same weight to each other."""

    pairs: Agents
    """The agents of each pair, int64 [pairs, 2]."""
    weight: float


Step: TypeAlias = list[Edges]


def base_cycle(n: int, k: int) -> tuple[MixingMatrix, ...]:
    """The mixing matrices of the Base-(k+1) graph of n agents, whose product is ``11ᵀ/N``; one agent alone has W = 1.

    The graph is the shorter one of two: the simple one, and for n = pq, p the largest divisor without a prime factor
    above k + 1, the simple one in p sets of q agents, and then averages across the sets.
    """
    agents = np.arange(n)
    sets = agents.reshape(_largest_divisor(n, k + 1), -1)
    across = [*simple_base(sets, k), *hyper_hypercube(sets.T, k)]
    steps = min(across, simple_base(agents.reshape(1, n), k), key=len)
    return tuple(_mixing_matrix(n, step) for step in steps or [[]])


def hyper_hypercube(agents: Agents, k: int) -> list[Step]:
    """The k-peer hyper-hypercube in every set: n = n_1 ⋯ n_L, n_l ≤ k + 1; step l averages along digit l of the place.

    Each set of agents [sets, n] averages exactly. The factors are as few as possible; n has no prime above k + 1.
    """
    steps: list[Step] = []
    stride = 1
    for factor in _fewest_factors(agents.shape[1], k + 1):
        groups = agents.reshape(-1, factor, stride).swapaxes(1, 2).reshape(-1, factor)
        steps.append([_averaging(groups)])
        stride *= factor
    return steps


def simple_base(agents: Agents, k: int) -> list[Step]:
    """The simple Base-(k+1) graph in every set of agents [sets, n], for any n."""
    within, onward = _simple_base(agents, k)
    return within + onward


def _simple_base(agents: Agents, k: int) -> tuple[list[Step], list[Step]]:
    """The steps before and after the first exchange, which opens the second list where there is one.

    The first a·p of n agents, p = (k + 1)^m the largest power up to n and a = ⌊n/p⌋, average among themselves, and so
    do those of the rest. Then each agent of the rest exchanges with one agent of each of a parts of p agents. This
    gives every part, and the rest, the average of all; so the parts go on by themselves, and the rest does so too.
    """
    sets, n = agents.shape
    power = (k + 1) ** _floor_log(n, k + 1)
    first, rest = np.split(agents, [n // power * power], axis=1)
    within = hyper_hypercube(first, k)
    if not rest.size:
        return within, []
    parts = first.reshape(sets, -1, power)
    rest_within, rest_onward = _simple_base(rest, k)
    exchange = [_exchange(parts, rest, power / n), *_idle_averaging(parts[:, :, rest.shape[1] :], k)]
    onward = hyper_hypercube(parts.reshape(-1, power), k)
    return _side_by_side(within, rest_within), [exchange, *_side_by_side(onward, rest_onward or rest_within)]


def _exchange(parts: Agents, rest: Agents, weight: float) -> Edges:
    """Agent r of the rest [sets, r] exchanges with agent r of each part [sets, a, p]."""
    met = parts[:, :, : rest.shape[1]]
    return Edges(np.stack([np.broadcast_to(rest[:, None], met.shape), met], axis=-1).reshape(-1, 2), weight)


def _idle_averaging(idle: Agents, k: int) -> Step:
    """Averages among agents [sets, a, b] that meet nobody in a step, in groups of k + 1, the last one smaller.

    All of them have the same value where each step mixes alone; where agents also learn, they mix what they learned.
    """
    idle = idle.reshape(len(idle), -1)
    whole = idle.shape[1] // (k + 1) * (k + 1)
    return [_averaging(idle[:, :whole].reshape(-1, k + 1)), _averaging(idle[:, whole:])]


def _averaging(groups: Agents) -> Edges:
    """The exact average in every group [groups, size]."""
    size = groups.shape[1]
    pairs = np.stack(np.triu_indices(size, 1), axis=-1)
    return Edges(groups[:, pairs].reshape(-1, 2), 1 / max(size, 1))


def _side_by_side(steps: list[Step], others: list[Step]) -> list[Step]:
    """Each step with one of the others, which are not more and begin again at their end, where they change nothing."""
    return [step + other for step, other in zip(steps, itertools.cycle(others or [[]]), strict=False)]


def _mixing_matrix(n: int, step: Step) -> MixingMatrix:
    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *(edges.pairs for edges in step)])
    weights = np.concatenate([np.empty(0), *(np.full(len(edges.pairs), edges.weight) for edges in step)])
    return from_edges(n, torch.from_numpy(pairs), torch.from_numpy(weights))


def _largest_divisor(n: int, largest: int) -> int:
    """The largest divisor of n without a prime factor above `largest`."""
    if n <= largest:
        return n
    divisor, rest = 1, n
    for factor in range(2, largest + 1):
        while rest % factor == 0:
            divisor, rest = divisor * factor, rest // factor
    return divisor


@cache
def _fewest_factors(n: int, largest: int) -> tuple[int, ...]:
    """The fewest factors up to `largest` whose product is n, which has no prime factor above it."""
    if n <= largest:
        return (n,) * (n > 1)
    divisors = [factor for factor in range(largest, 1, -1) if n % factor == 0]
    return min(((*_fewest_factors(n // factor, largest), factor) for factor in divisors), key=len)


def _floor_log(n: int, base: int) -> int:
    """The largest m with ``base^m`` ≤ n, in whole numbers."""
    m = 0
    while base ** (m + 1) <= n:
        m += 1
    return m
