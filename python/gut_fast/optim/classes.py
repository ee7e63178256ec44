"""Decentralized optimizers, a class for each of the main rules; `GossipOptimizer` takes every rule by name.

Every parameter is stacked: shape (N, *shape), row i is agent i's. The gradient is taken at the parameters, so a normal
``loss.backward(); optimizer.step()`` loop is the whole algorithm.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from gut_fast.optim.optimizer import GossipOptimizer
from gut_fast.optim.options import Options, Parameters, with_shared_options
from gut_fast.topology import Topology

__all__ = [
    "D2",
    "DSGD",
    "GUT",
    "QGT",
    "DSGDm",
    "GUTm",
    "GossipOptimizer",
    "GradientTracking",
    "MomentumTracking",
    "QGDSGDm",
    "QGGUTm",
]


@with_shared_options
class DSGD(GossipOptimizer):
    """Decentralized SGD: ``S = z − ηg;  z' = S + D`` (Lian et al., NeurIPS 2017).

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "dsgd", lr=lr, topology=topology, **options)


@with_shared_options
class GUT(GossipOptimizer):
    """Global Update Tracking: ``S = z − η(g + μr);  z' = S + D;  r' = (1 − κ(1−μ))r − κD/η``.

    One message a step as in DSGD, one buffer r that learns minus the local bias. μ = 0 is DSGD, μ = 1 is D²; κ = 1 is
    the method of Aketi et al., NeurIPS 2023. Stable on a static topology iff
    ``(1 + λ)(2 − κ(1−μ)) > κμ(1 − λ)`` at every eigenvalue λ of W, which for κ = 1 is ``λ > −1/(1 + 2μ)``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        mu: μ in [0, 1]; ``"auto"`` is `gut_fast.analysis.auto_mu`.
        kappa: κ in [0, 1], how fast r follows; small values are stable on every topology, those that vary included.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        mu: float | Literal["auto"] = 0.9,
        kappa: float = 1.0,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "gut", lr=lr, mu=mu, kappa=kappa, topology=topology, **options)


@with_shared_options
class GUTm(GossipOptimizer):
    """Quasi-global momentum with global update tracking beside it, a rule of our own.

    ``d = g + βm + μr;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η);  r' = μr − D/η``. The average moves as
    QG-DSGDm's does.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        mu: μ in [0, 1]; ``"auto"`` is `gut_fast.analysis.auto_mu`.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        mu: float | Literal["auto"] = 0.8,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "gutm", lr=lr, momentum=momentum, mu=mu, topology=topology, **options)


@with_shared_options
class QGT(GossipOptimizer):
    """Quasi-global tracking: momentum and update tracking in one buffer, a rule of our own.

    ``d = g + βm;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)d − μD/η``. μ = 1 − β is QG-DSGDm, and the average moves as
    that does. Stable on a topology iff ``μβ < (1 + lambda_min)/(1 − lambda_min) · (1 + β(2 − β))``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        mu: μ in [0, 1]; ``"auto"`` is `gut_fast.analysis.auto_mu`.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        mu: float | Literal["auto"] = 1.0,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "qgt", lr=lr, momentum=momentum, mu=mu, topology=topology, **options)


@with_shared_options
class D2(GossipOptimizer):
    """D² / Exact Diffusion: ``S = z − η(g + r);  z' = S + D;  r' = r − κD/η`` (Tang et al., ICML 2018: κ = 1).

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        kappa: κ in [0, 1], how fast r follows.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        kappa: float = 1.0,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "d2", lr=lr, kappa=kappa, topology=topology, **options)


@with_shared_options
class QGGUTm(GossipOptimizer):
    """GUT with quasi-global momentum, as published (Aketi et al., NeurIPS 2023).

    ``S = z − η(g + p);  z' = S + D;  p' = βg + (β+μ)p − μD/η − β(1+μ)c;  c' = D/η``. The average moves with
    momentum β + μ, which must stay below 1; the fair control is ``QGGUTm(momentum=β+μ, mu=0)``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        mu: μ in [0, 1]; ``"auto"`` is `gut_fast.analysis.auto_mu`.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        mu: float | Literal["auto"] = 0.06,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "qg_gutm", lr=lr, momentum=momentum, mu=mu, topology=topology, **options)


@with_shared_options
class DSGDm(GossipOptimizer):
    """DSGD with local momentum: ``S = z − η(g + βm);  z' = S + D;  m' = βm + g`` (Yu et al., ICML 2019).

    With `nesterov`, ``S = z − η(g + β(βm + g))``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        nesterov: whether the momentum is Nesterov's.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "dsgdm", lr=lr, momentum=momentum, nesterov=nesterov, topology=topology, **options)


@with_shared_options
class QGDSGDm(GossipOptimizer):
    """DSGD with quasi-global momentum, in the moving-average form of Lin et al., ICML 2021.

    ``d = g + βm;  S = z − ηd;  z' = S + D;  m' = βm + (1−β)(d − D/η)``; with `nesterov`, ``d = g + β(βm + g)``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        nesterov: whether the momentum is Nesterov's.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "qg_dsgdm", lr=lr, momentum=momentum, nesterov=nesterov, topology=topology, **options)


@with_shared_options
class GradientTracking(GossipOptimizer):
    """DSGT, two messages a step: ``y = v + g − q;  z' = W(z − ηy);  v' = Wy;  q' = g`` (Pu and Nedić, 2021).

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "gradient_tracking", lr=lr, topology=topology, **options)


@with_shared_options
class MomentumTracking(GossipOptimizer):
    """Momentum tracking, two messages a step (Takezawa et al., TMLR 2023).

    ``y = v + (β−1)m + g;  z' = W(z − ηy);  v' = Wy;  m' = βm + g``.

    Args:
        params: stacked parameters, or parameter groups; see `GossipOptimizer`.
        lr: learning rate η >= 0.
        momentum: β in [0, 1).
        topology: who mixes with whom, for N agents.
        **options: the options that all optimizers share; see `GossipOptimizer`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        topology: Topology,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, "momentum_tracking", lr=lr, momentum=momentum, topology=topology, **options)
