"""The problems on which rules are compared.

Graphs are made lazy unless W has no negative eigenvalue already, so that every rule is stable on them at its defaults:
where a run diverges, two right computations drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gut_fast import topology
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology
from gut_fast.verify.lockstep import Problem, seeded

__all__ = ["THREADS", "Case", "cases"]

COLUMNS = (515,)
ODD_COLUMNS = (1, 2, 63, 4097)
THREADS = (1, 2, 3)
AGENTS = (1, 2, 3, 16, 257)
ROUNDING = 1e-12
WARM_UP_AND_DROP = (0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.5)
"""Factors on the learning rate; they find a kernel out that divides by it or keeps coefficients of an earlier step."""


class Case(NamedTuple):
    """One problem, its number of steps, and the thread counts that must give the same bits (empty: the current one)."""

    label: str
    problem: Problem
    num_steps: int
    threads: tuple[int, ...] = ()


def cases(rule: UpdateRule, seed: int, full: bool) -> Iterator[Case]:
    """Yields the cases of a rule; `full` adds larger graphs and every size for itself, and runs longer."""
    num_steps = 60 if full else 12
    graphs = {**_graphs(seed), **(_more_graphs(seed) if full else {})}
    for name, mixing in graphs.items():
        yield Case(name, Problem(rule, mixing, COLUMNS, seed=seed), num_steps)
    for variant, problem in _variants(rule, seed):
        yield Case(variant, problem, num_steps)
    wide = Problem(rule, _lazy(topology.ring(16)), ODD_COLUMNS, seed=seed)
    yield Case(f"{sum(ODD_COLUMNS)} columns", wide, num_steps // 3, THREADS)
    for num_agents in AGENTS if full else ():
        for d in ODD_COLUMNS:
            problem = Problem(rule, _lazy(topology.ring(num_agents)), (d,), seed=seed)
            yield Case(f"ring({num_agents}), {d} column{'s' * (d > 1)}", problem, num_steps // 6)


def _graphs(seed: int) -> dict[str, Topology]:
    graphs = (
        topology.ring(1),
        topology.ring(2),
        topology.ring(3),
        topology.torus(4, 4),
        topology.petersen(),
        topology.complete(9),
        topology.star(7),
        topology.erdos_renyi(12, 0.3, seed),
        topology.one_peer_exponential(8),
        topology.random_matching(5, seed),
    )
    return {graph.name: _lazy(graph) for graph in graphs}


def _more_graphs(seed: int) -> dict[str, Topology]:
    graphs = (
        topology.ring(257),
        topology.torus(8, 8),
        topology.dyck(),
        topology.chain(5),
        topology.exponential(16),
        topology.hypercube(5),
        topology.complete(64),
        topology.random_regular(256, 4, seed),
        topology.base(25, 2),
        topology.equi_dynamic(9, seed),
    )
    return {graph.name: _lazy(graph) for graph in graphs}


def _variants(rule: UpdateRule, seed: int) -> Iterator[tuple[str, Problem]]:
    """Problems on one graph, each with one of the other features of a step, and their labels."""
    ring, columns = _lazy(topology.ring(16)), (*COLUMNS, 5)
    scale = seeded(16, seed=seed).abs()
    scale[3] = 0.0
    yield "weight decay", Problem(rule, ring, columns, {"weight_decay": 0.1}, seed=seed)
    yield "changing lr", Problem(rule, ring, columns, lr_factors=WARM_UP_AND_DROP, seed=seed)
    yield "gradient scale", Problem(rule, ring, columns, grad_scale=scale, seed=seed)
    yield "no gradient", Problem(rule, ring, columns, idle=(0,), seed=seed)
    for name, default in rule.hyperparameters.items():
        if isinstance(default, bool):
            yield name, Problem(rule, ring, columns, {name: not default}, seed=seed)


def _lazy(graph: Topology) -> Topology:
    return graph if graph.is_static and graph.lambda_min > -ROUNDING else graph.lazy(0.5)
