"""What everyone should compute and send: the recurrences, for all agents in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gut_fast.benchmark.across import CONTENDERS, LR, Communication, OnGraph, Task, one_peer_ring, ring_of
from gut_fast.benchmark.across_ranks import Crew
from gut_fast.benchmark.comparison import WrongResultError

__all__ = ["CHECKED_STEPS", "compare", "expected_bytes"]

CHECKED_STEPS = 4
"""Overlap begins with the second one."""

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
"""By the type of messages, in units of the largest parameter: what four roundings add up to where errors are tracked.
Agents begin with different parameters, so without mixing, or with the wrong agents, the error is about 1."""


def compare(crew: Crew, task: Task, names: list[str], numbers: int) -> dict[str, float]:
    """Largest error of each contender's parameters after the first steps, in units of the largest parameter.

    Raises:
        WrongResultError: one of them is not right, or one of ours has not sent degree × model size; the message says
            which, and by how much.
    """
    errors, known = {}, _Truths(task)
    for name in names:
        rows, sent = zip(*crew.ask("train", name, CHECKED_STEPS), strict=True)
        expected = expected_bytes(task, name, numbers)
        if expected is not None and list(sent) != expected:
            raise WrongResultError(f"{name}: it sent {list(sent)} bytes in {CHECKED_STEPS} steps, expected {expected}")
        right = known.of(name)
        found = torch.from_numpy(np.stack(rows)).double()
        errors[name] = float((found - right).abs().max() / right.abs().max())
        tolerance = TOLERANCES[_wire(name)]
        if not errors[name] < tolerance:
            raise WrongResultError(
                f"{name}: its parameters are off by {errors[name]:.1e} of the largest one after {CHECKED_STEPS} steps, "
                f"more than {tolerance:.1e}"
            )
    return errors


def expected_bytes(task: Task, name: str, numbers: int) -> list[int] | None:
    """That each rank sends in the first steps: degree × model size a step; None of those who do not count them."""
    contender = CONTENDERS[name]
    if not isinstance(contender, OnGraph):
        return None
    topology = contender.topology(task.ranks)
    size = numbers * _wire(name).itemsize
    return [
        sum(size * len(topology.neighbors(rank, step)) for step in range(CHECKED_STEPS)) for rank in range(task.ranks)
    ]


def _wire(name: str) -> torch.dtype:
    contender = CONTENDERS[name]
    options = contender.options if isinstance(contender, OnGraph) else {}
    dtype: torch.dtype = options.get("wire_dtype", torch.float32)
    return dtype


class _Truths:
    """What should come out on each rank after the first steps, [N, D] in float64; gradients are the modules' own."""

    def __init__(self, task: Task) -> None:
        self._agents = _Agents(task)
        self._known: dict[object, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """For a contender."""
        contender = CONTENDERS[name]
        if not isinstance(contender, OnGraph):
            return _RECURRENCES[name](self._agents)
        key = contender.rule.name, contender.topology, contender.kind
        if key not in self._known:
            self._known[key] = _on_graph(self._agents, contender)
        return self._known[key]


class _Agents:
    """All agents' modules and batches.

    Attributes:
        start: their parameters at the start, [N, D].
    """

    def __init__(self, task: Task) -> None:
        self.num_agents = task.ranks
        self._module = task.make_module(0)
        self._batches = [task.make_batch(rank) for rank in range(task.ranks)]
        modules = [task.make_module(rank) for rank in range(task.ranks)]
        self.start = torch.stack([parameters_to_vector(m.parameters()).detach() for m in modules]).double()

    def gradients(self, z: Tensor) -> Tensor:
        """Of every agent at its own parameters, [N, D]."""
        rows = []
        for row, (images, labels) in zip(z.float(), self._batches, strict=True):
            vector_to_parameters(row, self._module.parameters())
            loss = cross_entropy(self._module(images), labels)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self._module.parameters()))]))
        return torch.stack(rows).double()


def _on_graph(agents: _Agents, contender: OnGraph) -> Tensor:
    """GUT: ``S = z − η(g + μr);  D = W S − S;  z' = S + D;  r' = μr − D/η``; and DSGD, which is it without r.

    Of communication alone the first gradients serve in all steps.
    """
    topology, mu = contender.topology(agents.num_agents), contender.rule.hyperparameters.get("mu", 0.0)
    z, r = agents.start, torch.zeros_like(agents.start)
    g = agents.gradients(z)
    for step in range(CHECKED_STEPS):
        if step > 0 and contender.kind is not Communication:
            g = agents.gradients(z)
        S = z - LR * (g + mu * r)
        D = topology.matrix(step) @ S - S
        z, r = S + D, mu * r - D / LR
    return z


def _alone(agents: _Agents) -> Tensor:
    """z' = z − ηg."""
    z = agents.start
    for _ in range(CHECKED_STEPS):
        z = z - LR * agents.gradients(z)
    return z


def _averaged(agents: _Agents) -> Tensor:
    """z' = z − η mean g, from the first rank's parameters."""
    z = agents.start[:1].expand_as(agents.start)
    for _ in range(CHECKED_STEPS):
        z = z - LR * agents.gradients(z).mean(0)
    return z


def _decent_dp(agents: _Agents) -> Tensor:
    """z' = W z − ηg, from the first rank's parameters; it begins with W = I, and takes the second pairs twice."""
    pairs = [one_peer_ring(agents.num_agents).matrix(first) for first in (0, 1)]
    z = agents.start[:1].expand_as(agents.start)
    for step in range(CHECKED_STEPS):
        mixed = z if step == 0 else pairs[1 if step == 1 else (step + 1) % 2] @ z
        z = mixed - LR * agents.gradients(z)
    return z


def _received(agents: _Agents) -> Tensor:
    """The sum of the neighbours' models."""
    ring = ring_of(agents.num_agents)
    return torch.stack([agents.start[ring.neighbors(rank)].sum(0) for rank in range(agents.num_agents)])


_RECURRENCES: Mapping[str, Callable[[_Agents], Tensor]] = {
    "computation": _alone,
    "bare sends": _received,
    "DDP": _averaged,
    "decent-dp": _decent_dp,
}
