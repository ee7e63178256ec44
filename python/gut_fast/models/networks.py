"""The networks and a lookup by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "build", "lenet5", "mlp", "resnet20"]

NUM_GROUPS = 8
"""Of group normalisation, in ResNet-20."""


def mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """Linear layers of the widths `hidden` with ReLU between them; inputs [B, ...] are flattened to [B, in_features].

    Raises:
        ValueError: a width below 1.
    """
    widths = [in_features, *hidden, num_classes]
    if min(widths) < 1:
        raise ValueError(f"mlp: widths must be at least 1, got {widths}")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 for images [B, in_channels, 28, 28], with ReLU and max pooling: 61,706 parameters by default.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation within each sample: unlike batch statistics, it does not carry an agent's own mix of classes."""
    return nn.GroupNorm(NUM_GROUPS, channels)


class ResidualBlock(nn.Module):
    """relu(F(x) + shortcut(x)), where F is two 3×3 convolutions, each with its norm, and a ReLU between them.

    The shortcut is the identity, or a 1×1 convolution with a norm where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, inputs, height, width]."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet20(
    in_channels: int = 3, num_classes: int = 10, norm: Callable[[int], nn.Module] = group_norm
) -> nn.Sequential:
    """ResNet-20 for small images [B, in_channels, height, width]: 272,474 parameters in 65 tensors by default.

    Three stages of three blocks, with 16, 32 and 64 channels. `norm` makes the normalisation of so many channels, for
    example ``torch.nn.BatchNorm2d``, which the source has. Its shortcuts are those the source calls option B.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in stages:
        blocks.append(ResidualBlock(inputs, outputs, stride, norm))
        blocks += [ResidualBlock(outputs, outputs, 1, norm) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def _mlp_32(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    return mlp(math.prod(input_shape), [32], num_classes)


def _lenet5(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    if len(input_shape) != 3 or tuple(input_shape[1:]) != (28, 28):
        raise ValueError(f"lenet5 takes images (channels, 28, 28), got {tuple(input_shape)}")
    return lenet5(input_shape[0], num_classes)


def _resnet20(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    if len(input_shape) != 3:
        raise ValueError(f"resnet20 takes images (channels, height, width), got {tuple(input_shape)}")
    return resnet20(input_shape[0], num_classes)


MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "mlp": _mlp_32,
    "lenet5": _lenet5,
    "resnet20": _resnet20,
}
"""All networks by name, as functions of the input shape and the number of classes."""


def build(name: str, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The network of that name for inputs [B, *input_shape]: ``"mlp"`` (one hidden layer of 32), ``"lenet5"`` or
    ``"resnet20"``.

    Raises:
        ValueError: an unknown name, or a shape that the network cannot take.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    return MODELS[name](input_shape, num_classes)
