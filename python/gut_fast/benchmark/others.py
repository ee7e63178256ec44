"""Peers that are neither ours nor formulations in PyTorch: the published sequence of operations, and JAX."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gut_fast.benchmark.contenders import Blocks, Contender, Unavailable, Workload
from gut_fast.benchmark.mixings import Rolls
from gut_fast.rules import Coefficients

__all__ = ["AuthorsSequence", "Jax"]


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
        if workload.case.stores_halves:
            raise Unavailable("its arithmetic would be done in half precision, which the reference does not equal")
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
        if workload.device.is_gpu:
            raise Unavailable("tried on the CPU only")
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
    rolls = Rolls(workload, torch.float32)
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
