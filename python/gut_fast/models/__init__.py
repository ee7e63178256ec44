"""Networks, as plain `torch.nn` modules."""

from __future__ import annotations

from gut_fast.models.networks import MODELS, build, lenet5, mlp, resnet20

__all__ = ["MODELS", "build", "lenet5", "mlp", "resnet20"]
