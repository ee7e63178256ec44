"""The truth for all tests: one step of any update rule, and every method a second time in its published form.

`step` is the equations of `gut_fast.rules` in plain PyTorch, on any floating dtype and any device, with nothing in
place. The classes of `PUBLISHED` are the methods as their papers write them, in the papers' notation: ``g`` are the
agents' gradients at ``z``, ``eta`` the learning rate. Given the same gradients both produce the same models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.rules import UpdateRule, get_rule

__all__ = ["KEPT", "PUBLISHED", "Published", "drift", "recentred", "step", "zero_state"]


def zero_state(rule: str | UpdateRule, z: Tensor) -> dict[str, Tensor]:
    """The state at the start: zeros like `z` under each of the rule's state names."""
    return {name: torch.zeros_like(z) for name in get_rule(rule).states}


def drift(S: Tensor, W: Tensor) -> Tensor:
    """D(i) = Σ_j W[i, j] (S(j) − S(i)) over the agents j with W[i, j] ≠ 0; no other agent's values are touched.

    Differences, never W S − S: near consensus they are tiny, and low precision keeps their digits.
    """
    W = W.to(device=S.device, dtype=S.dtype)
    agents, neighbors = W.nonzero(as_tuple=True)
    total = torch.zeros_like(S)
    # N edges at a time, so memory stays O(N d).
    for i, j in zip(agents.split(len(S)), neighbors.split(len(S)), strict=True):
        total = total.index_add(0, i, _per_agent(W[i, j], S) * (S[j] - S[i]))
    return total


@torch.no_grad()
def step(
    rule: str | UpdateRule,
    hyperparameters: Mapping[str, Any],
    z: Tensor,
    state: Mapping[str, Tensor],
    grad: Tensor,
    W: Any,
    *,
    grad_scale: Any = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of `rule` for N agents; returns the new z and the new state and changes nothing.

    Args:
        rule: a rule or its name.
        hyperparameters: ``lr``, and optionally ``weight_decay``, ``maximize`` and the rule's own.
        z: parameters, [N, ...], any floating dtype and device; the arithmetic is done in it.
        state: a tensor like `z` for each of the rule's states, see `zero_state`.
        grad: the agents' gradients at `z`, like `z`.
        W: mixing matrix, [N, N], a tensor or anything `torch.as_tensor` takes.
        grad_scale: one factor per agent on its gradient, [N]; zero drops the gradient, even one that is not finite.

    Raises:
        TypeError: an input that is no tensor, or not of z's floating dtype.
        ValueError: a wrong shape or device, a missing or unknown state or hyper-parameter, entries of W or
            grad_scale that are not finite.
    """
    rule = get_rule(rule)
    if "lr" not in hyperparameters:
        raise ValueError(f"rule {rule.name!r}: hyperparameters must include 'lr', got {sorted(hyperparameters)}")
    coefficients = rule.coefficients(**hyperparameters)
    _check_tensors(rule, z, state, grad)
    W = _per_agent_input("W", W, (len(z), len(z)), z)
    if grad_scale is not None:
        scale = _per_agent(_per_agent_input("grad_scale", grad_scale, (len(z),), z), z)
        grad = torch.where(scale == 0, torch.zeros_like(grad), scale * grad)

    inputs = [z, *(state[name] for name in rule.states), grad]
    messages = [_combine(row, inputs) for row in coefficients.A]
    terms = [*inputs, *messages, *(drift(message, W) for message in messages)]
    rows = zip(coefficients.B, coefficients.C, coefficients.E, strict=True)
    new_z, *new_state = [_combine([*b, *c, *e], terms) for b, c, e in rows]
    return new_z, dict(zip(rule.states, new_state, strict=True))


KEPT: Mapping[str, tuple[str, str | None]] = {
    "d2": ("r", None),
    "gradient_tracking": ("v", "q"),
    "momentum_tracking": ("v", "m"),
}
"""The rules that keep a sum over agents for ever, zero at the start: of a state, or of one state less another."""


def recentred(rule: str | UpdateRule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the sum of `KEPT` zero again: the first state less the mean over agents of what is summed up.

    Optimizers do this every `gut_fast.analysis.RECENTRING` steps, against what rounding adds to the sum in a long run;
    without rounding it changes nothing. The state of other rules stays as it is.
    """
    name = get_rule(rule).name
    if name not in KEPT:
        return dict(state)
    first, second = KEPT[name]
    excess = state[first] if second is None else state[first] - state[second]
    return {**state, first: state[first] - excess.mean(0)}


def _combine(row: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Σ row[k] terms[k] over the coefficients that are not zero: what a rule does not read cannot bring in NaN."""
    total = torch.zeros_like(terms[0])
    for coefficient, term in zip(row, terms, strict=True):
        if coefficient != 0:
            total = total + coefficient * term
    return total


def _per_agent(values: Tensor, like: Tensor) -> Tensor:
    """One value per agent, shaped to multiply tensors [N, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _per_agent_input(name: str, values: Any, shape: tuple[int, ...], z: Tensor) -> Tensor:
    tensor = torch.as_tensor(values)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {len(z)} agents")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    return tensor.to(device=z.device, dtype=z.dtype)


def _check_tensors(rule: UpdateRule, z: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> None:
    if set(state) != set(rule.states):
        raise ValueError(f"rule {rule.name!r}: state must have exactly {list(rule.states)}, got {list(state)}")
    for name, tensor in {"z": z, **state, "grad": grad}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.dtype != z.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; all must have one floating dtype, z has {z.dtype}")
        if tensor.dim() == 0 or len(tensor) == 0 or tensor.shape != z.shape:
            shapes = f"{name} has shape {tuple(tensor.shape)}, z {tuple(z.shape)}"
            raise ValueError(f"{shapes}; all must have one shape [N, ...], N >= 1 agents")
        if tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z on {z.device}")


class Published(ABC):
    """A method as published, for a constant learning rate.

    Args:
        W: mixing matrix, [N, N], of the dtype of `x`.
        x: the model all agents start from, one row per agent, [N, D].
        eta: learning rate.

    Attributes:
        z: where the next gradients are to be taken, [N, D].
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float) -> None:
        self.W, self.eta = W, eta
        self.z = x

    @abstractmethod
    def step(self, g: Tensor) -> None:
        """Advances one step with the gradients `g` at `z`."""


class DSGD(Published):
    """x^{t+1} = W (x^t − η g^t). Lian et al., NeurIPS 2017, in the adapt-then-combine order."""

    def step(self, g: Tensor) -> None:
        self.z = self.W @ (self.z - self.eta * g)


class _GUTAgent:
    """Agent i of GUT: copies of its neighbourhood's x^t and x^{t−1}, its own among them, δ^{t−1} and m^{t−1}."""

    def __init__(self, i: int, W: Tensor, x: Tensor) -> None:
        identity = torch.eye(len(W), dtype=W.dtype)
        self.own_x = x[i]
        self.neighborhood = (W[i].abs() + identity[i]).nonzero().squeeze(1)
        self.w = W[i, self.neighborhood]
        self.w_minus_identity = (W - identity)[i, self.neighborhood]
        self.x = self.x_previous = x[self.neighborhood]
        self.delta_previous = torch.zeros_like(x[i])
        self.m = torch.zeros_like(x[i])

    def z(self) -> Tensor:
        return self.w @ self.x

    def update(self, g: Tensor, eta: float, mu: float, beta: float) -> Tensor:
        """The agent's x^{t+1}, which it sends to its neighbours."""
        delta = g - self.w_minus_identity @ self.x / eta
        change = self.w @ (self.x - self.x_previous)
        past_drift = self.w_minus_identity @ self.x_previous
        y = delta - mu / eta * (change + (1 + beta) * past_drift) - mu * self.delta_previous
        self.delta_previous = delta
        self.m = beta * self.m + y
        self.own_x = self.own_x - eta * self.m
        return self.own_x

    def receive(self, x: Tensor) -> None:
        self.x_previous, self.x = self.x, x[self.neighborhood]


class QGGUTm(Published):
    """δ^t = g^t − (1/η) Σ_j (w_ij − I_ij) x_j^t, the gradient taken at z_i = Σ_j w_ij x_j;

    y^t = δ^t − (μ/η) [Σ_j w_ij (x_j^t − x_j^{t−1}) + (1+β) Σ_j (w_ij − I_ij) x_j^{t−1}] − μ δ^{t−1};
    m^t = β m^{t−1} + y^t;  x^{t+1} = x^t − η m^t. Aketi, Hashemi, Roy, NeurIPS 2023, QG-GUTm.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.mu, self.beta = mu, momentum
        self.agents = [_GUTAgent(i, W, x) for i in range(len(W))]

    def step(self, g: Tensor) -> None:
        x = torch.stack([agent.update(g[i], self.eta, self.mu, self.beta) for i, agent in enumerate(self.agents)])
        for agent in self.agents:
            agent.receive(x)
        self.z = torch.stack([agent.z() for agent in self.agents])


class GUT(QGGUTm):
    """QG-GUTm at β = 0. Aketi, Hashemi, Roy, NeurIPS 2023, GUT."""

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float) -> None:
        super().__init__(W, x, eta, mu, momentum=0.0)


class GUTm(Published):
    """GUT fed with g^t + β m^{t−1} in the gradient's place;  m^t = β m^{t−1} + (1−β) (z^t − z^{t+1})/η.

    The tracking is GUT's in the paper's words, the momentum that of Lin et al.: of the displacement. gut_fast's own.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.gut = GUT(W, x, eta, mu)
        self.beta, self.m = momentum, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        self.gut.step(g + self.beta * self.m)
        self.m = self.beta * self.m + (1 - self.beta) * (self.z - self.gut.z) / self.eta
        self.z = self.gut.z


class QGT(Published):
    """h^t = x^t − η (g^t + β m^{t−1});  x^{t+1} = W h^t;

    m^t = β m^{t−1} + (1−β) (x^t − h^t)/η + μ (h^t − x^{t+1})/η. The agent's own displacement and the one that its
    neighbours made, each with a weight of its own; Lin et al. have μ = 1 − β. gut_fast's own.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.mu, self.beta, self.m = mu, momentum, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        h = self.z - self.eta * (g + self.beta * self.m)
        x = self.W @ h
        own, neighbors = (self.z - h) / self.eta, (h - x) / self.eta
        self.m = self.beta * self.m + (1 - self.beta) * own + self.mu * neighbors
        self.z = x


class D2(Published):
    """x^{t+1} = W (2x^t − x^{t−1} − η g^t + η g^{t−1}), begun with x^1 = W (x^0 − η g^0). Tang et al., ICML 2018."""

    def __init__(self, W: Tensor, x: Tensor, eta: float) -> None:
        super().__init__(W, x, eta)
        self.x_previous, self.g_previous = x, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        local = 2 * self.z - self.x_previous - self.eta * (g - self.g_previous)
        self.x_previous, self.g_previous = self.z, g
        self.z = self.W @ local


class DSGDm(Published):
    """m^t = β m^{t−1} + g^t;  x^{t+1} = W (x^t − η m^t) [Nesterov: m^t replaced by g^t + β m^t].

    Yu et al., ICML 2019.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float, nesterov: bool = False) -> None:
        super().__init__(W, x, eta)
        self.beta, self.nesterov, self.m = momentum, nesterov, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        self.m = self.beta * self.m + g
        direction = g + self.beta * self.m if self.nesterov else self.m
        self.z = self.W @ (self.z - self.eta * direction)


class QGDSGDm(Published):
    """m^t = β m̂^{t−1} + g^t;  x^{t+1} = W (x^t − η m^t) [Nesterov: m^t replaced by g^t + β m^t];

    d^t = (x^t − x^{t+1})/η;  m̂^t = β m̂^{t−1} + (1−β) d^t. Lin et al., ICML 2021, Algorithm 1.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float, nesterov: bool = False) -> None:
        super().__init__(W, x, eta)
        self.beta, self.nesterov, self.m_hat = momentum, nesterov, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        m = self.beta * self.m_hat + g
        direction = g + self.beta * m if self.nesterov else m
        x = self.W @ (self.z - self.eta * direction)
        self.m_hat = self.beta * self.m_hat + (1 - self.beta) * (self.z - x) / self.eta
        self.z = x


class DSGT(Published):
    """x^{t+1} = W (x^t − η y^t);  y^{t+1} = W y^t + g^{t+1} − g^t, begun with y^0 = g^0. Pu, Nedić, 2021."""

    def __init__(self, W: Tensor, x: Tensor, eta: float) -> None:
        super().__init__(W, x, eta)
        self.y = self.g_previous = torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        self.y = self.W @ self.y + g - self.g_previous
        self.g_previous = g
        self.z = self.W @ (self.z - self.eta * self.y)


class MomentumTracking(Published):
    """u^{t+1} = β u^t + g^t;  x^{t+1} = W (x^t − η (u^{t+1} − c^t));  c^{t+1} = W (c^t − u^{t+1}) + u^{t+1}.

    Takezawa et al., TMLR 2023, Algorithm 1, with u = c = 0 at the start.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.beta, self.u, self.c = momentum, torch.zeros_like(x), torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        self.u = self.beta * self.u + g
        self.z = self.W @ (self.z - self.eta * (self.u - self.c))
        self.c = self.W @ (self.c - self.u) + self.u


PUBLISHED: dict[str, type[Published]] = {
    "dsgd": DSGD,
    "gut": GUT,
    "gutm": GUTm,
    "qgt": QGT,
    "d2": D2,
    "qg_gutm": QGGUTm,
    "dsgdm": DSGDm,
    "qg_dsgdm": QGDSGDm,
    "gradient_tracking": DSGT,
    "momentum_tracking": MomentumTracking,
}
"""The published form of each rule of the library, by the rule's name; hyper-parameters have the rule's names."""
