"""Every method in its published form, for a constant learning rate, in the notation of its paper.

``g`` are the agents' gradients at ``z``, ``eta`` is the learning rate, ``W`` the mixing matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["KGT", "LED", "PUBLISHED", "GASLoC", "Published"]


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
        """Advances one step with the gradients `g` at `z`; of a round of local steps it is the last."""

    def local_step(self, g: Tensor) -> None:
        """Advances one step in which nothing is sent."""
        raise NotImplementedError(f"{type(self).__name__} has been published without local steps")


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
    """QG-GUTm at β = 0. Aketi, Hashemi, Roy, NeurIPS 2023, GUT. With κ below 1, gut_fast's own:

    x^{t+1} = W (x^t − η (g^t + μ r^t));  r^{t+1} = (1−κ) r^t + κ ((x^t − x^{t+1})/η − g^t): a moving average of what
    the neighbours did to the agent's displacement.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float, kappa: float = 1.0) -> None:
        super().__init__(W, x, eta, mu, momentum=0.0)
        self.kappa, self.r = kappa, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        if self.kappa == 1:
            super().step(g)
            return
        x = self.W @ (self.z - self.eta * (g + self.mu * self.r))
        self.r = (1 - self.kappa) * self.r + self.kappa * ((self.z - x) / self.eta - g)
        self.z = x


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
    """x^{t+1} = W (2x^t − x^{t−1} − η g^t + η g^{t−1}), begun with x^1 = W (x^0 − η g^0). Tang et al., ICML 2018.

    With κ below 1 the primal-dual form of Exact Diffusion: φ = x^t − η (g^t + y^t);  x^{t+1} = Wφ;
    y^{t+1} = y^t + (κ/η) (φ − Wφ). Alghunaim and Yuan, "A Unified and Refined Convergence Analysis", IEEE TSP 2022.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, kappa: float = 1.0) -> None:
        super().__init__(W, x, eta)
        self.kappa, self.y = kappa, torch.zeros_like(x)
        self.x_previous, self.g_previous = x, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        if self.kappa == 1:
            local = 2 * self.z - self.x_previous - self.eta * (g - self.g_previous)
            self.x_previous, self.g_previous = self.z, g
            self.z = self.W @ local
            return
        phi = self.z - self.eta * (g + self.y)
        self.z = self.W @ phi
        self.y = self.y + self.kappa / self.eta * (phi - self.z)


class EDM(Published):
    """m^{t+1} = β m^t + (1−β) g^t;  ψ^{t+1} = x^t − η m^{t+1};  x^{t+1} = W (ψ^{t+1} + x^t − ψ^t).

    Begun with ψ^0 = x^0. Exact Diffusion (Yuan et al., IEEE TSP 2019) of a moving average of the gradients.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.beta, self.m, self.psi = momentum, torch.zeros_like(x), x

    def step(self, g: Tensor) -> None:
        self.m = self.beta * self.m + (1 - self.beta) * g
        psi = self.z - self.eta * self.m
        self.z, self.psi = self.W @ (psi + self.z - self.psi), psi


class EXTRA(Published):
    """x^{t+2} = (I + W) x^{t+1} − (I + W)/2 x^t − η (g^{t+1} − g^t), begun with x^1 = W x^0 − η g^0.

    Shi et al., SIAM J. Optim. 2015.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float) -> None:
        super().__init__(W, x, eta)
        self.before: tuple[Tensor, Tensor] | None = None

    def step(self, g: Tensor) -> None:
        x = self.W @ self.z - self.eta * g
        if self.before is not None:
            x_previous, g_previous = self.before
            x = x + self.z - (x_previous + self.W @ x_previous) / 2 + self.eta * g_previous
        self.before, self.z = (self.z, g), x


class AWCGUT(Published):
    """x^{t+1} = W x^t − η g^t + μ (x^t − x^{t−1} + η g^{t−1}), begun with x^1 = W x^0 − η g^0. gut_fast's own."""

    def __init__(self, W: Tensor, x: Tensor, eta: float, mu: float) -> None:
        super().__init__(W, x, eta)
        self.mu, self.correction = mu, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        x = self.W @ self.z - self.eta * g + self.mu * self.correction
        self.correction = x - self.z + self.eta * g
        self.z = x


class DecentLaM(Published):
    """ĝ^t = (x^t − W (x^t − η g^t))/η;  m^{t+1} = β m^t + ĝ^t;  x^{t+1} = x^t − η m^{t+1}. Yuan et al., ICCV 2021."""

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.beta, self.m = momentum, torch.zeros_like(x)

    def step(self, g: Tensor) -> None:
        self.m = self.beta * self.m + (self.z - self.W @ (self.z - self.eta * g)) / self.eta
        self.z = self.z - self.eta * self.m


class GASLoC(Published):
    """S^t is where the local steps of round t end;  x^{t+1} = W S^t + γ (S^t − S^{t−1}), begun with S^{−1} = x^0."""

    def __init__(self, W: Tensor, x: Tensor, eta: float, momentum: float) -> None:
        super().__init__(W, x, eta)
        self.gamma, self.S_previous = momentum, x

    def local_step(self, g: Tensor) -> None:
        self.z = self.z - self.eta * g

    def step(self, g: Tensor) -> None:
        S = self.z - self.eta * g
        self.z, self.S_previous = self.W @ S + self.gamma * (S - self.S_previous), S


class LED(Published):
    """φ ← φ − η (g + βy), H times from φ = x^t;  x^{t+1} = Wφ;  y^{t+1} = y^t + (φ − Wφ)/η, with β = 1/H.

    Local Exact Diffusion: D² with local steps. Alghunaim, "Local Exact-Diffusion for Decentralized Optimization and
    Learning", IEEE TAC 2024.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, local_steps: int) -> None:
        super().__init__(W, x, eta)
        self.beta, self.y = 1 / local_steps, torch.zeros_like(x)

    def local_step(self, g: Tensor) -> None:
        self.z = self.z - self.eta * (g + self.beta * self.y)

    def step(self, g: Tensor) -> None:
        self.local_step(g)
        phi, self.z = self.z, self.W @ self.z
        self.y = self.y + (phi - self.z) / self.eta


class KGT(Published):
    """x ← x − η (g + c^t), K times from x^t to x^{t,K};  u^t = (x^t − x^{t,K})/(Kη);  c^{t+1} = c^t − u^t + Wu^t;

    x^{t+1} = W (x^t − Kη u^t). Liu, Lin, Koloskova, Stich, 2024, Algorithm 1 with one step size.
    """

    def __init__(self, W: Tensor, x: Tensor, eta: float, local_steps: int = 1) -> None:
        super().__init__(W, x, eta)
        self.K, self.c, self.x = local_steps, torch.zeros_like(x), x

    def local_step(self, g: Tensor) -> None:
        self.z = self.z - self.eta * (g + self.c)

    def step(self, g: Tensor) -> None:
        self.local_step(g)
        u = (self.x - self.z) / (self.K * self.eta)
        self.c = self.c - u + self.W @ u
        self.z = self.x = self.W @ (self.x - self.K * self.eta * u)


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
    "edm": EDM,
    "extra": EXTRA,
    "awc_gut": AWCGUT,
    "decentlam": DecentLaM,
    "gasloc": GASLoC,
    "k_gt": KGT,
    "qg_gutm": QGGUTm,
    "dsgdm": DSGDm,
    "qg_dsgdm": QGDSGDm,
    "gradient_tracking": DSGT,
    "momentum_tracking": MomentumTracking,
}
"""The published form of each rule of the library, by the rule's name; hyper-parameters have the rule's names."""
