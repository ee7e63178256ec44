"""The reference beside the methods as their papers write them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gut_fast import topology
from gut_fast.reference import PUBLISHED
from gut_fast.rules import UpdateRule
from gut_fast.verify.lockstep import ROUNDINGS, Problem

__all__ = ["published_errors"]

HALF_THE_BITS = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def published_errors(rule: UpdateRule, seed: int, num_steps: int) -> Iterator[tuple[str, float]]:
    """Labels of cases, and the largest difference between z of the reference and of the published form, in float64.

    In units of what the published form loses: nothing is more exact than float64, but in float32 it loses 2²⁹ times as
    much, and that can be measured. Nothing for a rule that has no published form.
    """
    if rule.name not in PUBLISHED:
        return
    flags = [{}, *({name: not value} for name, value in rule.hyperparameters.items() if isinstance(value, bool))]
    for graph in (
        topology.ring(5),
        topology.torus(3, 3),
        topology.star(6),
        topology.petersen(),
        topology.erdos_renyi(7, 0.5, seed),
    ):
        for changed in flags:
            hyperparameters = {**rule.hyperparameters, **changed}
            problem = Problem(rule, graph.lazy(0.5), (101,), hyperparameters, seed=seed)
            problem.start = problem.start[:1].expand_as(problem.start)
            yield ", ".join((graph.name, *changed)), _error(problem, hyperparameters, num_steps)


def _error(problem: Problem, hyperparameters: Mapping[str, Any], num_steps: int) -> float:
    z = problem.run_reference(num_steps)[0]
    exact = _run_published(problem, hyperparameters, num_steps, torch.float64)
    lost = (_run_published(problem, hyperparameters, num_steps, torch.float32) - exact).abs().max().item()
    floor = ROUNDINGS[torch.float64] * torch.finfo(torch.float64).eps * exact.abs().max().item()
    error = (z - exact).abs().max().item()
    return error / max(HALF_THE_BITS * lost, floor) if math.isfinite(error) else math.inf


def _run_published(problem: Problem, hyperparameters: Mapping[str, Any], num_steps: int, dtype: torch.dtype) -> Tensor:
    W, x = problem.topology.matrix().to(dtype), problem.start.to(dtype)
    method = PUBLISHED[problem.rule.name](W, x, problem.lr, **hyperparameters)
    for _ in range(num_steps):
        method.step(problem.gradient(method.z))
    return method.z
