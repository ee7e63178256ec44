"""Networks, as plain `torch.nn` modules.

`networks` is the table of them. Each is a few convolutions and what stands behind them, a row of `norms`: no network
knows which norm it is given. To add a network, write a function of (input_shape, num_classes, norm, argument) and its
row of `MODELS`; to add a norm, write a row of `NORMS`.
"""

from __future__ import annotations

from gut_fast.models.lenet import lenet5
from gut_fast.models.mobilenet import mobilenet_v2
from gut_fast.models.networks import MODELS, Network, build
from gut_fast.models.norms import NORMS, EvoNormS0, Norm
from gut_fast.models.perceptron import mlp
from gut_fast.models.resnet import resnet20, resnet32, resnet56
from gut_fast.models.vgg import vgg11

__all__ = [
    "MODELS",
    "NORMS",
    "EvoNormS0",
    "Network",
    "Norm",
    "build",
    "lenet5",
    "mlp",
    "mobilenet_v2",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg11",
]
