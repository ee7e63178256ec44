"""Peers of a step beside those of `gut-fast bench step`: the published algorithm, JAX, and the op alone."""

import importlib

import numpy as np
import torch
from torch import Tensor

from gut_fast.bench.step import Contender, Unavailable
from gut_fast.kernels import ops
from gut_fast.kernels.backends import HALVES


class AgentTensor:
    """One parameter tensor of one agent in the paper's words; `z` is where the gradient `g` is taken.

    Agent i keeps x, m, δ of the step before, x of the step before, and copies of its neighbours' x, now and before:

        δ = g − (1/η) Σ_j (w_ij − I_ij) x_j
        y = δ − (μ/η) [Σ_j w_ij (x_j − x_j') + (1+β) Σ_j (w_ij − I_ij) x_j'] − μ δ'
        m ← β m + y;  x ← x − η m;  then x goes to the neighbours, and g is taken at z = Σ_j w_ij x_j.
    """

    def __init__(self, agent: int, W: Tensor, z: Tensor, g: Tensor) -> None:
        self.z, self.g = z, g
        self.own_weight = float(W[agent, agent])
        self.weights = {j: float(W[agent, j]) for j in W[agent].nonzero().flatten().tolist() if j != agent}
        self.x, self.x_before = z.clone(), z.clone()  # all agents start from one model, so z = x
        self.heard, self.heard_before = ({j: z.clone() for j in self.weights} for _ in range(2))
        self.delta_before, self.m = torch.zeros_like(z), torch.zeros_like(z)

    def update(self, eta: float, mu: float, beta: float) -> None:
        """Computes the agent's new x."""
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
        """Copies the neighbours' new x, and computes the point to which they lead."""
        self.heard_before, self.heard = self.heard, {j: message.clone() for j, message in messages.items()}
        z = self.own_weight * self.x
        for j, weight in self.weights.items():
            z = z + weight * self.heard[j]
        self.z.copy_(z)


def authors(workload):
    """GUT or QG-GUTm as its paper states it, an operation at a time for every agent and parameter tensor.

    On a ring that is some 25 operations and 4 copies, two of them what is received. Source: Aketi, Hashemi, Roy,
    "Global Update Tracking", NeurIPS 2023.
    """
    rule = workload.rule
    if rule.name not in ("gut", "qg_gutm"):
        raise Unavailable("the paper's algorithm is GUT and QG-GUTm")
    if not workload.topology.is_static:
        raise Unavailable(f"{workload.topology} changes from step to step")
    if not set(HALVES).isdisjoint(workload.case.dtypes):
        raise Unavailable("its arithmetic would be done in half precision, which the reference does not equal")
    values = {**rule.hyperparameters, **workload.case.hyperparameters}
    z, _, g = workload.copies()
    widths = [parameter[0].numel() for parameter in workload.parameters]
    W, pieces = workload.topology.matrix(), list(zip(z.split(widths, 1), g.split(widths, 1), strict=True))
    tensors = [[AgentTensor(i, W, piece[i], gradient[i]) for piece, gradient in pieces] for i in range(len(W))]

    @torch.no_grad()
    def step() -> None:
        for agent in tensors:
            for tensor in agent:
                tensor.update(values["lr"], values["mu"], values.get("momentum", 0.0))
        for agent in tensors:
            for place, tensor in enumerate(agent):
                tensor.receive({j: tensors[j][place].x for j in tensor.weights})

    return Contender(step, lambda: {"z": [z]})


def jax(workload):
    """The step as one function under jax.jit, its inputs donated; XLA's threads do not follow PyTorch's setting."""
    try:
        library = importlib.import_module("jax")
    except ImportError as error:
        raise Unavailable("jax is not installed") from error
    if workload.device.type != "cpu" or set(workload.case.dtypes) != {torch.float32} or workload.num_agents > 512:
        raise Unavailable("it is tried on the CPU, in float32, with up to 512 agents")
    rule = workload.coefficients
    laplacian = library.numpy.array((workload.topology.matrix() - torch.eye(workload.num_agents)).float().numpy())
    z, states, gradient = workload.copies()

    def combine(row, terms):
        return sum(factor * term for factor, term in zip(row, terms, strict=True) if factor != 0)

    def function(places, g):
        messages = [combine(row, [*places, g]) for row in rule.A]
        terms = [*places, g, *messages, *(laplacian @ S for S in messages)]
        return [combine([*b, *c, *e], terms) for b, c, e in zip(rule.B, rule.C, rule.E, strict=True)]

    run = library.jit(function, donate_argnums=0)
    now = [library.numpy.array(place.numpy()) for place in (z, *states)]
    g = library.numpy.array(gradient.numpy())

    def step():
        now[:] = library.block_until_ready(run(now, g))

    names = ("z", *workload.rule.states)
    return Contender(
        step, lambda: {name: [torch.tensor(np.array(each))] for name, each in zip(names, now, strict=True)}
    )


def kernel(workload):
    """The op alone on the optimizer's tensors, without what the optimizer looks at before it calls it."""
    if not workload.topology.is_static:
        raise Unavailable(f"{workload.topology} changes from step to step")
    arguments = (
        [parameter.detach() for parameter in workload.parameters],
        workload.flat_state(),
        [parameter.grad for parameter in workload.parameters],
        torch.tensor(workload.coefficients.flat(), dtype=torch.float64),
        workload.rule.num_messages,
        *workload.topology.csr(0, workload.device),
        None,
        workload.case.backend,
    )
    return Contender(lambda: ops.gossip_step_(*arguments), lambda: workload.blocks_of(workload.optimizer))


MORE_PEERS = {"kernel": kernel, "authors": authors, "jax": jax}
"""The peers by name."""
