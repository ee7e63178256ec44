"""Divisions of labelled samples among agents, from identically distributed to one class per agent.

Every function returns one int64 index tensor per agent, ascending; together they hold every sample exactly once, and
every agent has at least one. The division depends on the arguments alone, never on a global random state.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gut_fast.arguments import all_known, as_integer, as_number

__all__ = [
    "PARTITIONS",
    "class_histogram",
    "dirichlet",
    "dirichlet_blocks",
    "heterogeneity",
    "iid",
    "partition",
    "shards",
]

Indices = np.ndarray[Any, np.dtype[np.int64]]

AGENTS_PER_BLOCK = 10

NEGLIGIBLE = 60.0
"""The logarithm of a ratio of weights beyond which the smaller one gets no sample beside the larger one."""


def dirichlet(
    labels: Tensor, num_agents: int, alpha: float, seed: int = 0, *, equal: bool = True, min_size: int = 1
) -> list[Tensor]:
    """The division of each class among the agents in proportions drawn from a symmetric Dirichlet(α).

    A small α gives each agent few classes, a large one gives all agents the same mix.

    Args:
        labels: class of each sample, a 1-D integer tensor.
        num_agents: number of agents N.
        alpha: concentration α > 0.
        seed: seed of the draw.
        equal: makes sizes that differ by at most one; a full agent takes no more samples, and the rest of a class goes
            to the other agents in proportion. With ``equal=False`` the draw alone determines the sizes.
        min_size: with ``equal=False``, agents below this size take samples from the largest agent.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it.

    Source: the draw per class is that of Yurochkin et al., "Bayesian Nonparametric Federated Learning", ICML 2019.
    """
    classes, num_agents = _checked(labels, num_agents)
    alpha, min_size = _checked_alpha(alpha), as_integer(min_size, "min_size", minimum=0)
    if min_size < 1 or min_size * num_agents > len(classes):
        raise ValueError(
            f"min_size={min_size} must be at least 1 and, for {len(classes)} samples and {num_agents} agents, "
            f"at most {len(classes) // num_agents}"
        )
    random = _generator(seed)
    groups = _shuffled_classes(classes, random)
    if equal:
        return _tensors(_divide(groups, _equal_sizes(len(classes), num_agents), alpha, random))
    unlimited = np.full(num_agents, len(classes))
    return _tensors(_refill(_divide(groups, unlimited, alpha, random), min_size))


def dirichlet_blocks(labels: Tensor, num_agents: int, alpha: float, seed: int = 0) -> list[Tensor]:
    """The division in the GUT paper's experiments: Dirichlet(α) within blocks of 10 agents, cut again to equal sizes.

    The shuffled samples are dealt to blocks of at most 10 agents. In a block each class is divided as by `dirichlet`
    with ``equal=False``, except that an agent that holds its share takes no samples of later classes. The samples of
    all agents in a row are then cut into N runs whose sizes differ by at most one. The possible mixes of classes depend
    on the blocks, so results compare only with results on the same division.

    Args:
        labels: class of each sample, a 1-D integer tensor.
        num_agents: number of agents N.
        alpha: concentration α > 0.
        seed: seed of the draw.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it.
    """
    classes, num_agents = _checked(labels, num_agents)
    alpha = _checked_alpha(alpha)
    random = _generator(seed)
    order = random.permutation(len(classes))
    shares = _equal_sizes(len(classes), num_agents)
    runs: list[Indices] = []
    for first in range(0, num_agents, AGENTS_PER_BLOCK):
        block = shares[first : first + AGENTS_PER_BLOCK]
        samples, order = np.split(order, [block.sum()])
        runs += _divide(_shuffled_classes(classes, random, samples), block, alpha, random, overfill=True)
    return _tensors(np.split(np.concatenate(runs), np.cumsum(shares)[:-1]))


def shards(labels: Tensor, num_agents: int, classes_per_agent: int, seed: int = 0) -> list[Tensor]:
    """The division into pure shards: no agent sees more than `classes_per_agent` classes, and every class is seen.

    The classes are cut into N · classes_per_agent shards of one class each and about the same size, and every agent is
    dealt `classes_per_agent` of them, of different classes where the class sizes allow.

    Args:
        labels: class of each sample, a 1-D integer tensor.
        num_agents: number of agents N.
        classes_per_agent: from 1 to the number of classes; N · classes_per_agent must not be below that number.
        seed: seed of the draw.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    whose shards may straddle two classes; these do not.
    """
    classes, num_agents = _checked(labels, num_agents)
    num_classes = len(np.unique(classes))
    classes_per_agent = as_integer(classes_per_agent, "classes_per_agent", minimum=0)
    num_shards = num_agents * classes_per_agent
    if not 1 <= classes_per_agent <= num_classes:
        raise ValueError(f"classes_per_agent={classes_per_agent} must be from 1 to the {num_classes} classes there are")
    if num_shards < num_classes:
        raise ValueError(
            f"{num_agents} agents of {classes_per_agent} classes hold at most {num_shards} of the {num_classes} "
            f"classes; use classes_per_agent >= {math.ceil(num_classes / num_agents)}"
        )
    if num_shards > len(classes):
        raise ValueError(f"{num_shards} shards cannot be cut from {len(classes)} samples; use fewer agents or classes")
    random = _generator(seed)
    parts: list[list[Indices]] = [[] for _ in range(num_agents)]
    dealt = np.zeros(num_agents, dtype=np.int64)
    groups = _shuffled_classes(classes, random)
    for group, count in zip(groups, _shards_per_class(groups, num_shards), strict=True):
        pieces = np.array_split(group, count)
        while pieces:
            # The agents with the most free places come first, so later classes always find enough different agents.
            turns = np.lexsort((random.permutation(num_agents), dealt))
            turns = turns[dealt[turns] < classes_per_agent][: len(pieces)]
            for agent, piece in zip(turns, pieces, strict=False):
                parts[agent].append(piece)
            dealt[turns] += 1
            pieces = pieces[len(turns) :]
    return _tensors([np.concatenate(part) for part in parts])


def iid(labels: Tensor, num_agents: int, seed: int = 0) -> list[Tensor]:
    """The division of shuffled samples into N runs whose sizes differ by at most one: every agent sees the same mix.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it.
    """
    classes, num_agents = _checked(labels, num_agents)
    return _tensors(np.array_split(_generator(seed).permutation(len(classes)), num_agents))


PARTITIONS: dict[str, Callable[..., list[Tensor]]] = {
    "dirichlet": dirichlet,
    "dirichlet-blocks": dirichlet_blocks,
    "shards": shards,
    "iid": iid,
}
"""All divisions by name."""


def partition(name: str, labels: Tensor, num_agents: int, seed: int = 0, **options: Any) -> list[Tensor]:
    """The division called `name`, for example ``partition("dirichlet", labels, 16, alpha=0.1)``.

    Raises:
        TypeError, ValueError: the name is unknown, or an option is unknown, missing or bad.
    """
    if name not in PARTITIONS:
        raise ValueError(f"unknown partition {name!r}; {all_known(name, PARTITIONS)}")
    parameters = inspect.signature(PARTITIONS[name]).parameters
    known = {option: parameter for option, parameter in parameters.items() if option not in _COMMON_ARGUMENTS}
    for option in options:
        if option not in known:
            raise ValueError(f"partition {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"partition {name!r} needs {option}=")
    return PARTITIONS[name](labels, num_agents, seed=seed, **options)


_COMMON_ARGUMENTS = ("labels", "num_agents", "seed")


def class_histogram(labels: Tensor, parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """The number of samples of each class that every agent holds: an int64 tensor [N, num_classes].

    Raises:
        ValueError: a label is outside 0 … num_classes − 1, or the labels are not a 1-D integer tensor.
    """
    classes = torch.from_numpy(_checked(labels, 1)[0])
    if not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"labels span {int(classes.min())} … {int(classes.max())}, expected 0 … {num_classes - 1} "
            f"for num_classes={num_classes}"
        )
    return torch.stack([torch.bincount(classes[part], minlength=num_classes) for part in parts])


def heterogeneity(histogram: Tensor) -> float:
    """The distance of the agents' class mixes from the mix of all samples, from 0 (equal mixes) to below 1.

    It is the mean over agents of the total variation distance ``½ Σ_c |p_i(c) − p(c)|``: the share of an agent's
    samples that would have to be of another class.

    Args:
        histogram: samples of each agent and class, [N, classes], as `class_histogram` counts them.

    Raises:
        ValueError: an agent has no samples, or there is no agent.
    """
    counts = histogram.to(torch.float64)
    if counts.ndim != 2 or not counts.numel() or not bool((counts.sum(1) > 0).all()):
        raise ValueError(f"every agent must have a sample, got a histogram of shape {tuple(histogram.shape)}")
    mixes, total = counts / counts.sum(1, keepdim=True), counts.sum(0)
    return float((mixes - total / total.sum()).abs().sum(1).mean() / 2)


def _divide(
    groups: Sequence[Indices], capacity: Indices, alpha: float, random: np.random.Generator, *, overfill: bool = False
) -> list[Indices]:
    """Divides the samples of each group among the agents by Dirichlet(α) proportions.

    An agent that holds its capacity takes part in no later group; within a group it stops at its capacity, or exceeds
    it if `overfill` is set. The capacities sum to at least the number of samples.
    """
    owners: list[Indices] = []
    room = capacity.copy()
    for group in groups:
        log_weights = _log_dirichlet(alpha, len(capacity), random)
        counts = np.zeros_like(room)
        waiting = np.argsort(-log_weights)  # from the largest weight to the smallest
        waiting = waiting[room[waiting] > 0]
        left = len(group)
        while left > 0:
            floor = log_weights[waiting[0]] - NEGLIGIBLE
            first = np.sort(waiting[: np.searchsorted(-log_weights[waiting], -floor, side="right")])
            offered = _apportion(left, log_weights[first])
            taken = offered if overfill else np.minimum(offered, room[first])
            counts[first] += taken
            room[first] -= taken
            left -= int(taken.sum())
            waiting = waiting[room[waiting] > 0]
        owners.append(np.repeat(np.arange(len(capacity)), counts))
    owner = np.concatenate(owners)
    by_owner = np.concatenate(groups)[np.argsort(owner, kind="stable")]
    return np.split(by_owner, np.cumsum(np.bincount(owner, minlength=len(capacity)))[:-1])


def _log_dirichlet(alpha: float, size: int, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The logarithms of unnormalised Dirichlet(α) proportions.

    For small α all proportions underflow at once; the logarithm of Gamma(α) = Gamma(α + 1) · U^(1/α) does not.

    Source: Marsaglia, Tsang, "A Simple Method for Generating Gamma Variables", ACM TOMS 2000, section 6.
    """
    uniform = 1 - random.random(size)
    return np.log(random.standard_gamma(alpha + 1, size)) + np.log(uniform) / max(alpha, 1e-300)


def _apportion(count: int, log_weights: np.ndarray[Any, np.dtype[np.float64]]) -> Indices:
    """Integers that sum to `count`, each within one of its exact share; zero where the weight is zero."""
    weights = np.exp(log_weights - log_weights.max())
    edges = np.rint(np.cumsum(weights) / weights.sum() * count).astype(np.int64)
    counts: Indices = np.diff(edges, prepend=0)
    return counts


def _shards_per_class(groups: Sequence[Indices], num_shards: int) -> list[int]:
    """The number of shards of each class: one each, then each further shard for the class with the largest shards."""
    sizes = np.array([len(group) for group in groups])
    counts = np.ones_like(sizes)
    for _ in range(num_shards - len(sizes)):
        counts[np.argmax(sizes / counts)] += 1
    return [int(count) for count in counts]


def _refill(parts: list[Indices], min_size: int) -> list[Indices]:
    """The parts after samples have moved from the largest agent to those below `min_size` until there is none."""
    parts = list(parts)
    donors = [(-len(part), agent) for agent, part in enumerate(parts)]  # the largest comes first
    heapq.heapify(donors)
    for agent in range(len(parts)):
        while (missing := min_size - len(parts[agent])) > 0:
            donor = donors[0][1]
            kept, given = np.split(parts[donor], [max(len(parts[donor]) - missing, min_size)])
            parts[donor], parts[agent] = kept, np.concatenate([parts[agent], given])
            heapq.heapreplace(donors, (-len(kept), donor))
    return parts


def _equal_sizes(num_samples: int, num_agents: int) -> Indices:
    each, larger = divmod(num_samples, num_agents)
    return np.full(num_agents, each) + (np.arange(num_agents) < larger)


def _shuffled_classes(classes: Indices, random: np.random.Generator, samples: Indices | None = None) -> list[Indices]:
    """The shuffled samples (all by default) of each class, in a random order of classes so that none is always last."""
    order = random.permutation(len(classes) if samples is None else samples)
    return [order[classes[order] == label] for label in random.permutation(np.unique(classes[order]))]


def _tensors(parts: Sequence[Indices]) -> list[Tensor]:
    return [torch.from_numpy(np.sort(part)) for part in parts]


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(as_integer(seed, "seed", minimum=0))


def _checked(labels: Tensor, num_agents: int) -> tuple[Indices, int]:
    """The class of each sample, and the number of agents as Python's integer: NumPy's small ones overflow."""
    classes = torch.as_tensor(labels)
    if classes.ndim != 1 or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(
            f"labels must be a 1-D tensor of integers, got shape {tuple(classes.shape)} of {classes.dtype}"
        )
    num_agents = as_integer(num_agents, "num_agents", minimum=0)
    if not 1 <= num_agents <= len(classes):
        raise ValueError(f"num_agents={num_agents} must be from 1 to the number of samples, {len(classes)}")
    return classes.to("cpu", torch.int64).numpy(), num_agents


def _checked_alpha(alpha: float) -> float:
    number = as_number(alpha, "alpha")
    if not 0 < number < math.inf:
        raise ValueError(f"alpha={alpha} must be positive and finite; for the same mix everywhere use iid")
    return number
