"""Update rules: every decentralized method is one row of coefficients.

N agents hold D parameters each; ``W`` is the [N, N] mixing matrix. All methods here are linear in the parameters, the
gradient and the state, so one step of any of them is::

    inputs    u      = (z, state_1 … state_q, g)                       K = q + 2 rows of shape [N, d]
    message   S_m    = Σ_k A[m, k] u_k                                 m < M: the models sent to each neighbour per step
    drift     D_m(i) = Σ_j W[i, j] (S_m(j) − S_m(i))                   the only term that looks at other agents
    outputs   o_l    = Σ_k B[l, k] u_k + Σ_m C[l, m] S_m + E[l, m] D_m     o_0 is the new z, o_1 … the new state

An `UpdateRule` is the function from hyper-parameters to ``(A, B, C, E)``. The gradient ``g`` is taken at ``z``, so
``z`` is the model's parameters and ``loss.backward(); optimizer.step()`` is the whole algorithm. States are zero at the
start and kept in gradient units, so a learning-rate schedule rescales them as `torch.optim.SGD` does its momentum.

Where a schedule makes η tiny and then large again, as with warm restarts, D/η of the tiny η is noise that the large one
multiplies. So the drift can be divided by a rate of its own, ``ρ_t = max(η_t, γ ρ_{t−1})`` (`next_drift_lr`), which is
η while η is constant or grows, and follows a falling η at the pace of γ only: ρ takes the place of η in E.

In a **local step** nothing is sent and D is zero. With H local steps a round only the last one mixes, and its states
take the drift of the whole round, divided by the sum of the round's learning rates: E of `drift_lr` Σ η. What the
states do in between follows from the matrices (`Coefficients.local`), or the rule says it by a matrix L of its own.

To add a method, write one function under ``@update_rule``; every backend, test, benchmark and command picks it up.
"""

from __future__ import annotations

from gut_fast.coefficients import Coefficients, Interval
from gut_fast.rule import RULES, UpdateRule, get_rule, next_drift_lr, update_rule

__all__ = ["RULES", "Coefficients", "Interval", "UpdateRule", "get_rule", "next_drift_lr", "update_rule"]


@update_rule()
def dsgd(lr: float) -> Coefficients:
    """S = z − ηg;  z' = S + D

    Decentralized SGD, adapt then combine. Lian et al., "Can Decentralized Algorithms Outperform Centralized
    Algorithms?", NeurIPS 2017.
    """
    return Coefficients(A=[[1, -lr]], B=[[0, 0]], C=[[1]], E=[[1]])


@update_rule("r")
def gut(lr: float, mu: float = 0.9, kappa: float = 1.0) -> Coefficients:
    """S = z − η(g + μr);  z' = S + D;  r' = (1 − κ(1−μ))r − κD/η

    Global Update Tracking: DSGD plus one buffer r, a leaky sum of the agent's own past drifts; at rest r = −g whatever
    κ is. κ = 1 is the method as published, r' = μr − D/η; a smaller κ tracks more slowly and is stable where that is
    not. Aketi, Hashemi, Roy, "Global Update Tracking", NeurIPS 2023 (arXiv 2305.04792), with z = Wx substituted; κ is
    gut_fast's own.
    """
    return Coefficients(
        A=[[1, -lr * mu, -lr]],
        B=[[0, 0, 0], [0, mu + (1 - kappa) * (1 - mu), 0]],
        C=[[1], [0]],
        E=[[1], [-kappa / lr]],
    )


@update_rule("m", "r")
def gutm(lr: float, momentum: float = 0.9, mu: float = 0.8) -> Coefficients:
    """d = g + βm + μr;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η);  r' = μr − D/η

    Quasi-global momentum with global update tracking beside it, decoupled: the average moves as QG-DSGDm's does. In a
    local step the momentum takes g + βm, without μr, which no drift offsets yet: so the consensus modes of a round are
    those of a step. gut_fast's own rule.
    """
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * momentum, -lr * mu, -lr]],
        B=[[0, 0, 0, 0], [0, momentum + keep * momentum, keep * mu, keep], [0, 0, mu, 0]],
        C=[[1], [0], [0]],
        E=[[1], [-keep / lr], [-1 / lr]],
        L=[[1, -lr * momentum, -lr * mu, -lr], [0, momentum + keep * momentum, 0, keep], [0, 0, 1, 0]],
    )


@update_rule("m")
def qgt(lr: float, momentum: float = 0.9, mu: float = 1.0) -> Coefficients:
    """d = g + βm;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)d − μD/η

    Quasi-global tracking: momentum and update tracking in one buffer. It is QG-DSGDm with the weight of the drift set
    free, which is μ = 1 − β there; the average moves as QG-DSGDm's does whatever μ is. gut_fast's own rule.
    """
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * momentum, -lr]],
        B=[[0, 0, 0], [0, momentum + keep * momentum, keep]],
        C=[[1], [0]],
        E=[[1], [-mu / lr]],
    )


@update_rule("r")
def d2(lr: float, kappa: float = 1.0) -> Coefficients:
    """S = z − η(g + r);  z' = S + D;  r' = r − κD/η

    D² / Exact Diffusion: GUT at μ = 1; κ = 1 is the method as published, other κ set its dual step size free. Tang et
    al., "D²: Decentralized Training over Decentralized Data", ICML 2018; Yuan et al., "Exact Diffusion for Distributed
    Optimization and Learning", IEEE TSP 2019.
    """
    return Coefficients(
        A=[[1, -lr, -lr]],
        B=[[0, 0, 0], [0, 1, 0]],
        C=[[1], [0]],
        E=[[1], [-kappa / lr]],
    )


@update_rule("m", "r")
def edm(lr: float, momentum: float = 0.9) -> Coefficients:
    """d = βm + (1−β)g + r;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)g;  r' = r − D/η

    Exact Diffusion with momentum: D² with a moving average of the agent's own gradients in the gradient's place. Huang,
    Pu, Nedić, "Distributed Stochastic Momentum Tracking with Local Updates: Achieving Optimal Communication and
    Iteration Complexities", and Yuan et al., IEEE TSP 2019.
    """
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * momentum, -lr, -lr * keep]],
        B=[[0, 0, 0, 0], [0, momentum, 0, keep], [0, 0, 1, 0]],
        C=[[1], [0], [0]],
        E=[[1], [0], [-1 / lr]],
    )


@update_rule("r")
def extra(lr: float) -> Coefficients:
    """S = z;  z' = S + D − η(g + r);  r' = r − D/(2η)

    EXTRA: exact, and mixes before it moves. Shi, Ling, Wu, Yin, "EXTRA: An Exact First-Order Algorithm for
    Decentralized Consensus Optimization", SIAM J. Optim. 2015.
    """
    return Coefficients(
        A=[[1, 0, 0]],
        B=[[0, -lr, -lr], [0, 1, 0]],
        C=[[1], [0]],
        E=[[1], [-0.5 / lr]],
    )


@update_rule("r")
def awc_gut(lr: float, mu: float = 0.9) -> Coefficients:
    """S = z;  z' = S + D − η(g + μr);  r' = μr − D/η

    GUT that adapts while it communicates: the message is the model itself, known before the gradient, so it travels
    during the whole step. Stable on every static graph for μ < 1. gut_fast's own rule.
    """
    return Coefficients(
        A=[[1, 0, 0]],
        B=[[0, -lr * mu, -lr], [0, mu, 0]],
        C=[[1], [0]],
        E=[[1], [-1 / lr]],
    )


@update_rule("m")
def decentlam(lr: float, momentum: float = 0.9) -> Coefficients:
    """S = z − ηg;  z' = S + D − ηβm;  m' = βm + g − D/η

    DecentLaM: momentum of the gradient less the drift, so that the bias does not grow with the momentum. Yuan, Chen,
    Huang, Zhang, Pan, Xu, Yin, "DecentLaM", ICCV 2021.
    """
    return Coefficients(
        A=[[1, 0, -lr]],
        B=[[0, -lr * momentum, 0], [0, momentum, 1]],
        C=[[1], [0]],
        E=[[1], [-1 / lr]],
    )


@update_rule("e")
def gasloc(lr: float, momentum: float = 0.9) -> Coefficients:
    """S = z − ηg;  z' = S + D − γ(e + ηg);  e' = γ(e + ηg) − D;  local:  z' = S;  e' = e + ηg

    Gossip with an outer momentum over rounds of local steps: z' = WS + γ(S − S of the round before), and e is what that
    S is ahead of z, in units of the model. The pattern of GASLoC (2026), with DiLoCo's Nesterov momentum.
    """
    return Coefficients(
        A=[[1, 0, -lr]],
        B=[[0, -momentum, -lr * momentum], [0, momentum, lr * momentum]],
        C=[[1], [0]],
        E=[[1], [-1]],
        L=[[1, 0, -lr], [0, 1, lr]],
    )


@update_rule("p", "c")
def qg_gutm(lr: float, momentum: float = 0.9, mu: float = 0.06) -> Coefficients:
    """S = z − η(g + p);  z' = S + D;  p' = βg + (β+μ)p − μD/η − β(1+μ)c;  c' = D/η

    Global Update Tracking with quasi-global momentum; at μ = 0 it is QG-DSGDm in heavy-ball form, and its average moves
    with momentum β + μ, which must stay below 1. In a local step p' = βg + (β+μ)p, and c stays. Aketi, Hashemi, Roy,
    "Global Update Tracking", NeurIPS 2023 (arXiv 2305.04792), QG-GUTm, with z = Wx substituted.
    """
    return Coefficients(
        A=[[1, -lr, 0, -lr]],
        B=[[0, 0, 0, 0], [0, momentum + mu, -momentum * (1 + mu), momentum], [0, 0, 0, 0]],
        C=[[1], [0], [0]],
        E=[[1], [-mu / lr], [1 / lr]],
        L=[[1, -lr, 0, -lr], [0, momentum + mu, 0, momentum], [0, 0, 1, 0]],
    )


@update_rule("m")
def dsgdm(lr: float, momentum: float = 0.9, nesterov: bool = False) -> Coefficients:
    """S = z − η(g + βm) [Nesterov: z − η(g + β(βm + g))];  z' = S + D;  m' = βm + g

    Decentralized SGD with local momentum. Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient
    Momentum SGD", ICML 2019.
    """
    from_momentum, from_gradient = (momentum**2, 1 + momentum) if nesterov else (momentum, 1.0)
    return Coefficients(
        A=[[1, -lr * from_momentum, -lr * from_gradient]],
        B=[[0, 0, 0], [0, momentum, 1]],
        C=[[1], [0]],
        E=[[1], [0]],
    )


@update_rule("m")
def qg_dsgdm(lr: float, momentum: float = 0.9, nesterov: bool = False) -> Coefficients:
    """d = g + βm [Nesterov: g + β(βm + g)];  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η)

    Quasi-global momentum in moving-average form: the momentum of the agent's whole displacement. Lin et al.,
    "Quasi-Global Momentum", ICML 2021.
    """
    from_momentum, from_gradient = (momentum**2, 1 + momentum) if nesterov else (momentum, 1.0)
    keep = 1 - momentum
    return Coefficients(
        A=[[1, -lr * from_momentum, -lr * from_gradient]],
        B=[[0, 0, 0], [0, momentum + keep * from_momentum, keep * from_gradient]],
        C=[[1], [0]],
        E=[[1], [-keep / lr]],
    )


@update_rule("v", "q")
def gradient_tracking(lr: float) -> Coefficients:
    """y = v + g − q;  S₁ = z − ηy;  S₂ = y;  z' = S₁ + D₁;  v' = S₂ + D₂;  q' = g

    Distributed stochastic gradient tracking: y tracks the mean gradient exactly, at two messages a step. Pu, Nedić,
    "Distributed Stochastic Gradient Tracking Methods", Math. Programming 2021.
    """
    return Coefficients(
        A=[[1, -lr, lr, -lr], [0, 1, -1, 1]],
        B=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
        C=[[1, 0], [0, 1], [0, 0]],
        E=[[1, 0], [0, 1], [0, 0]],
    )


@update_rule("c", "a")
def k_gt(lr: float) -> Coefficients:
    """S₁ = z − η(g + c);  S₂ = a + η(g + c);  z' = S₁ + D₁;  c' = c + D₂/η;  a' = 0;  local:  z' = S₁;  a' = S₂

    K-GT, gradient tracking with local steps, at two messages a round: a is how far the round has moved the agent, and
    c corrects its gradients. Without local steps it is gradient tracking. Liu, Lin, Koloskova, Stich, "Decentralized
    Gradient Tracking with Local Steps", Optim. Methods Softw. 2024.
    """
    return Coefficients(
        A=[[1, -lr, 0, -lr], [0, lr, 1, lr]],
        B=[[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
        C=[[1, 0], [0, 0], [0, 0]],
        E=[[1, 0], [0, 1 / lr], [0, 0]],
        L=[[1, -lr, 0, -lr], [0, 1, 0, 0], [0, lr, 1, lr]],
    )


@update_rule("v", "m")
def momentum_tracking(lr: float, momentum: float = 0.9) -> Coefficients:
    """y = v + (β−1)m + g;  S₁ = z − ηy;  S₂ = y;  z' = S₁ + D₁;  v' = S₂ + D₂;  m' = βm + g

    Gradient tracking of the momentum, at two messages a step. Takezawa et al., "Momentum Tracking", TMLR 2023.
    """
    fade = momentum - 1
    return Coefficients(
        A=[[1, -lr, -lr * fade, -lr], [0, 1, fade, 1]],
        B=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, momentum, 1]],
        C=[[1, 0], [0, 1], [0, 0]],
        E=[[1, 0], [0, 1], [0, 0]],
    )
