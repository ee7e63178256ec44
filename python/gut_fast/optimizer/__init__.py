"""The optimizer of every update rule."""

from gut_fast.optimizer.base import GossipOptimizer

__all__ = ["GossipOptimizer"]
