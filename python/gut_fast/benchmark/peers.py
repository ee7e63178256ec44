"""Everyone who takes part: the published sequence of operations, JAX, and the list of all contenders."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gut_fast.benchmark.contenders import (
    Blocks,
    Ceiling,
    Contender,
    GutFast,
    Kernel,
    MomentumSGD,
    Unavailable,
    Workload,
)
from gut_fast.benchmark.formulations import Compiled, Eager, Rolls
from gut_fast.rules import Coefficients

__all__ = ["FAMILIES", "Field", "enter"]

FAMILIES = {
    "ceiling": "the same streams in a plain compiled loop, no mixing",
    "gut_fast": "optimizer.step() of this library",
    "kernel": "its op, called directly",
    "sgd": "torch.optim.SGD(momentum=0.9, fused=True) on the same tensors: no gossip",
    "compile": "torch.compile",
    "eager": "PyTorch, eager",
    "scipy": "eager with scipy's sparse product",
    "jax": "jax.jit, on threads of its own",
    "authors": "the published algorithm, agent by agent and tensor by tensor",
}
"""Families of contenders and what they are."""

OPTIONS = {"tiled": "tiles", "by_tensor": "by tensor", "in_place": "z in place"}
"""Options of formulations, and what their names say of them."""

COMPILED: Sequence[tuple[str, Sequence[str]]] = (
    *((mixing, options) for mixing in ("rolls", "index", "mean") for options in ((), ("tiled",))),
    ("matmul", ()),
    ("rolls", ("in_place",)),
)
EAGER: Sequence[tuple[str, Sequence[str]]] = (
    *((mixing, options) for mixing in ("rolls", "index", "matmul", "mean") for options in ((), ("tiled",))),
    *((mixing, ("by_tensor",)) for mixing in ("rolls", "index", "matmul", "mean")),
    ("sparse", ()),
)
"""Ways to mix, each with options."""

MEMORY_SHARE = 0.5
"""The part of this machine's memory that the contenders of one case may fill together."""


class AuthorsSequence(Contender):
    """GUT or QG-GUTm as its paper states it, an operation at a time for every agent and parameter tensor.

    Agent i keeps x, m, δ of the step before, x of the step before, and copies of its neighbours' x, now and before:

        δ = g − (1/η) Σ_j (w_ij − I_ij) x_j
        y = δ − (μ/η) [Σ_j w_ij (x_j − x_j') + (1+β) Σ_j (w_ij − I_ij) x_j'] − μ δ'
        m ← β m + y;  x ← x − η m;  then x goes to the neighbours, and g is taken at z = Σ_j w_ij x_j.

    On a ring some 25 operations and 4 copies, two of them what is received. Source: Aketi, Hashemi, Roy, NeurIPS 2023.
    """

    family = "authors"

    def __init__(self, workload: Workload) -> None:
        rule, values = workload.rule, {**workload.rule.hyperparameters, **workload.case.hyperparameters}
        if rule.name not in ("gut", "qg_gutm"):
            raise Unavailable("the paper's algorithm is GUT and QG-GUTm")
        if not workload.topology.is_static:
            raise Unavailable(f"{workload.topology} changes from step to step")
        if torch.bfloat16 in workload.case.storage:
            raise Unavailable("its arithmetic would be done in bfloat16, which the reference does not equal")
        self.eta, self.mu, self.beta = values["lr"], values["mu"], values.get("momentum", 0.0)
        W = workload.topology.matrix()
        self.z, gradients = workload.first_rows(by_tensor=True), workload.gradient_rows(by_tensor=True)
        self.tensors = [
            _AgentTensor(i, W, z[i], g[i]) for i in range(len(W)) for z, g in zip(self.z, gradients, strict=True)
        ]
        self.num_tensors = len(self.z)

    @torch.no_grad()
    def step(self) -> None:
        """One step: all agents, then all messages, then the points where the next gradients are taken."""
        for tensor in self.tensors:
            tensor.update(self.eta, self.mu, self.beta)
        for index, tensor in enumerate(self.tensors):
            segment = index % self.num_tensors
            tensor.receive({j: self.tensors[j * self.num_tensors + segment].x for j in tensor.weights})

    def blocks(self) -> Blocks:
        """The parameters; what it keeps beside them is not what the rule keeps."""
        return {"z": self.z}


class _AgentTensor:
    """One parameter tensor of one agent; `z` is where the gradient `g` is taken."""

    def __init__(self, agent: int, W: Tensor, z: Tensor, g: Tensor) -> None:
        self.z, self.g = z, g
        self.own_weight = float(W[agent, agent])
        self.weights = {j: float(W[agent, j]) for j in W[agent].nonzero().flatten().tolist() if j != agent}
        # All agents start from one model, so that z = x.
        self.x, self.x_before = z.clone(), z.clone()
        self.heard, self.heard_before = ({j: z.clone() for j in self.weights} for _ in range(2))
        self.delta_before, self.m = torch.zeros_like(z), torch.zeros_like(z)

    def update(self, eta: float, mu: float, beta: float) -> None:
        """The agent's new x."""
        drift = (self.own_weight - 1) * self.x
        change = self.own_weight * (self.x - self.x_before)
        drift_before = (self.own_weight - 1) * self.x_before
        for j, weight in self.weights.items():
            drift = drift + weight * self.heard[j]
            change = change + weight * (self.heard[j] - self.heard_before[j])
            drift_before = drift_before + weight * self.heard_before[j]
        delta = self.g - drift / eta
        y = delta - mu / eta * (change + (1 + beta) * drift_before) - mu * self.delta_before
        self.delta_before = delta.clone()
        self.m = beta * self.m + y
        self.x_before = self.x.clone()
        self.x = self.x - eta * self.m

    def receive(self, messages: dict[int, Tensor]) -> None:
        """Copies of the neighbours' new x, and the point they lead to."""
        self.heard_before, self.heard = self.heard, {j: message.clone() for j, message in messages.items()}
        z = self.own_weight * self.x
        for j, weight in self.weights.items():
            z = z + weight * self.heard[j]
        self.z.copy_(z)


class Jax(Contender):
    """The step as one function under jax.jit, its inputs donated; XLA's threads do not follow PyTorch's setting."""

    family = "jax"

    def __init__(self, workload: Workload, mixing: str) -> None:
        try:
            jax: Any = importlib.import_module("jax")
        except ImportError as error:
            raise Unavailable("jax is not installed") from error
        if set(workload.case.storage) != {torch.float32}:
            raise Unavailable("tried in float32 only")
        self.names = ("z", *workload.rule.states)
        coefficients = workload.rule.coefficients(**workload.case.hyperparameters)
        self.block_until_ready = jax.block_until_ready
        self.function = jax.jit(_jax_step(coefficients, _jax_drift(workload, mixing)), donate_argnums=0)
        (z,), (gradient,) = workload.first_rows(), workload.gradient_rows()
        zeros = [torch.zeros_like(z) for _ in workload.rule.states]
        self.places = [jax.numpy.array(tensor.numpy()) for tensor in (z, *zeros)]
        self.gradient = jax.numpy.array(gradient.numpy())

    def step(self) -> None:
        """One step, until its results are there."""
        self.places = self.block_until_ready(self.function(self.places, self.gradient))

    def blocks(self) -> Blocks:
        """Parameters and state, copied."""
        arrays = {name: np.array(place) for name, place in zip(self.names, self.places, strict=True)}
        return {name: [torch.from_numpy(array)] for name, array in arrays.items()}


def _jax_drift(workload: Workload, mixing: str) -> Callable[[Any], Any]:
    jnp: Any = importlib.import_module("jax.numpy")
    if mixing == "matmul":
        laplacian = jnp.array((workload.topology.matrix() - torch.eye(workload.num_agents)).float().numpy())
        return lambda S: laplacian @ S
    rolls = Rolls(workload.topology, torch.float32)
    axes = tuple(range(len(rolls.group)))

    def drift(S: Any) -> Any:
        grid = S.reshape(*rolls.group, -1)
        moved = [weight * (jnp.roll(grid, [-s for s in shift], axes) - grid) for shift, weight in rolls.shifts]
        return sum(moved[1:], moved[0]).reshape(S.shape)

    return drift


def _jax_step(coefficients: Coefficients, drift: Callable[[Any], Any]) -> Callable[[list[Any], Any], list[Any]]:
    def combine(row: Any, terms: Any) -> Any:
        return sum(factor * term for factor, term in zip(row, terms, strict=True) if factor != 0)

    def step(places: list[Any], gradient: Any) -> list[Any]:
        inputs = [*places, gradient]
        messages = [combine(row, inputs) for row in coefficients.A]
        terms = [*inputs, *messages, *map(drift, messages)]
        rows = zip(coefficients.B, coefficients.C, coefficients.E, strict=True)
        return [combine([*b, *c, *e], terms) for b, c, e in rows]

    return step


@dataclass(frozen=True)
class _Candidate:
    """A contender that may or may not be able to take part; `buffers`: how many matrices [N, D] it adds, roughly."""

    name: str
    family: str
    buffers: int
    make: Callable[[], Contender]


@dataclass
class Field:
    """Those who take part, by name, and why others do not."""

    contenders: dict[str, Contender]
    absent: dict[str, str]


def enter(workload: Workload, families: Collection[str]) -> Field:
    """All contenders of these families that can make the workload's steps.

    The library itself is always among them. A contender whose buffers would take more than a share of this machine's
    memory, with those before it, stays away.

    Raises:
        ValueError: an unknown family.
    """
    if unknown := sorted(set(families) - FAMILIES.keys()):
        raise ValueError(f"unknown peers {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
    ours = GutFast(workload)
    field = Field({}, {})
    size, used = workload.values.numel() * workload.values.element_size(), 2 + len(workload.rule.states)
    room = MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for candidate in _candidates(workload, ours):
        if candidate.family not in {"gut_fast", *families}:
            continue
        needed = (used + candidate.buffers) * size
        if needed > room:
            field.absent[candidate.name] = f"all together would need {needed / 1e9:.1f} GB of memory"
            continue
        try:
            field.contenders[candidate.name] = candidate.make()
        except Unavailable as reason:
            field.absent[candidate.name] = str(reason)
        except RuntimeError as error:  # fused SGD where torch has it not for such tensors
            if candidate.family != "sgd":
                raise
            field.absent[candidate.name] = str(error)
        else:
            used += candidate.buffers
    return field


def _candidates(workload: Workload, ours: GutFast) -> list[_Candidate]:
    """In the order in which memory is given out."""
    states, messages = len(workload.rule.states), workload.rule.num_messages
    rows, scratch = 1 + states, 2 * messages
    # Every neighbour's x now and before, and x, x before, m and δ.
    copies = 5 + 2 * (len(workload.topology.csr(0).neighbor) // workload.num_agents)
    candidates = [
        _Candidate("ceiling", "ceiling", 0, lambda: Ceiling(ours)),
        _Candidate("gut_fast", "gut_fast", 0, lambda: ours),
        _Candidate("kernel", "kernel", 0, lambda: Kernel(ours)),
        _Candidate("momentum SGD, fused", "sgd", 1, lambda: MomentumSGD(workload)),
    ]
    for mixing, options in COMPILED:
        make = partial(Compiled, workload, mixing, **dict.fromkeys(options, True))
        name = ", ".join(["compile", mixing, *(OPTIONS[option] for option in options)])
        candidates.append(_Candidate(name, "compile", 2 * rows, make))
    for mixing, options in EAGER:
        if "by_tensor" in options and len(workload.parameters) == 1:
            continue
        make_eager = partial(Eager, workload, mixing, **dict.fromkeys(options, True))
        name = ", ".join(["eager", mixing, *(OPTIONS[option] for option in options)])
        candidates.append(_Candidate(name, "eager", rows + (1 if options else scratch + 1), make_eager))
    candidates.append(_Candidate("scipy, sparse", "scipy", rows + scratch, partial(Eager, workload, "scipy")))
    candidates += [
        _Candidate(f"jax, {mixing}", "jax", rows + 1, partial(Jax, workload, mixing)) for mixing in ("rolls", "matmul")
    ]
    candidates.append(_Candidate("authors' sequence", "authors", copies, lambda: AuthorsSequence(workload)))
    return candidates
