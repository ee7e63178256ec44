"""Networks, as plain `torch.nn` modules.

A network asks for the norm behind its convolutions by place, and does not know which norm it gets. To add a network,
write a function of (input_shape, num_classes, norm, argument) and its row of `networks.MODELS`; to add a norm, write a
row of `layers.NORMS`.
"""

from __future__ import annotations

from gut_fast.models.deep import mobilenet_v2, resnet20, resnet32, resnet56, vgg11
from gut_fast.models.layers import NORMS, EvoNormS0, Norm
from gut_fast.models.networks import MODELS, Network, build
from gut_fast.models.small import lenet5, mlp
from gut_fast.models.transformer import Transformer

__all__ = [
    "MODELS",
    "NORMS",
    "EvoNormS0",
    "Network",
    "Norm",
    "Transformer",
    "build",
    "lenet5",
    "mlp",
    "mobilenet_v2",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg11",
]
