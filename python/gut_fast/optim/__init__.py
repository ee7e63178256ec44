"""Decentralized optimizers: the optimizer of every update rule, a class for each rule, and `Gossip` for any other."""

from gut_fast.optim.classes import (
    D2,
    DSGD,
    GUT,
    QGT,
    DSGDm,
    GradientTracking,
    GUTm,
    MomentumTracking,
    QGDSGDm,
    QGGUTm,
)
from gut_fast.optim.gossip import Gossip, clip_grad_norm_per_agent_
from gut_fast.optim.optimizer import GossipOptimizer

__all__ = [
    "D2",
    "DSGD",
    "GUT",
    "QGT",
    "DSGDm",
    "GUTm",
    "Gossip",
    "GossipOptimizer",
    "GradientTracking",
    "MomentumTracking",
    "QGDSGDm",
    "QGGUTm",
    "clip_grad_norm_per_agent_",
]
