"""gut_fast: many agents train one model by talking to neighbours only, at the speed of memory.

Global Update Tracking (Aketi, Hashemi, Roy, NeurIPS 2023) and the methods it is compared with, each one row of
coefficients (`gut_fast.rules`) for one fused kernel.
"""

from gut_fast import analysis, data, distributed, models, reference, rules, topology
from gut_fast.agents import StackedModule, stack
from gut_fast.distributed import consolidate
from gut_fast.optim import (
    D2,
    DSGD,
    GUT,
    QGT,
    DSGDm,
    GossipOptimizer,
    GradientTracking,
    GUTm,
    MomentumTracking,
    QGDSGDm,
    QGGUTm,
)
from gut_fast.optim.gossip import Gossip, clip_grad_norm_per_agent_
from gut_fast.rules import Coefficients, UpdateRule, update_rule
from gut_fast.simulation import Simulator, callbacks, consensus_error
from gut_fast.topology import Topology

__version__ = "0.2.0"

__all__ = [
    "D2",
    "DSGD",
    "GUT",
    "QGT",
    "Coefficients",
    "DSGDm",
    "GUTm",
    "Gossip",
    "GossipOptimizer",
    "GradientTracking",
    "MomentumTracking",
    "QGDSGDm",
    "QGGUTm",
    "Simulator",
    "StackedModule",
    "Topology",
    "UpdateRule",
    "__version__",
    "analysis",
    "callbacks",
    "clip_grad_norm_per_agent_",
    "consensus_error",
    "consolidate",
    "data",
    "distributed",
    "models",
    "reference",
    "rules",
    "stack",
    "topology",
    "update_rule",
]
