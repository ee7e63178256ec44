"""Small networks: a multilayer perceptron and LeNet-5."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from gut_fast.models.layers import get_norm

__all__ = ["LENET5_PADDING", "lenet5", "mlp"]

LENET5_PADDING = {28: 2, 32: 0}
"""The padding of the first convolution, by the side of the images: its outputs are 28×28 for both."""


def mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """Linear layers of the widths `hidden` with ReLU between them; inputs [B, ...] are flattened to [B, in_features].

    Raises:
        ValueError: a width is below 1.
    """
    widths = [in_features, *hidden, num_classes]
    if min(widths) < 1:
        raise ValueError(f"mlp: widths must be at least 1, got {widths}")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5(in_channels: int = 1, num_classes: int = 10, norm: str = "none", image_size: int = 28) -> nn.Sequential:
    """LeNet-5 for images [B, in_channels, image_size, image_size], with ReLU and max pooling.

    It has 61,706 parameters for one channel, 10 classes and no norm. The published network takes images of 32×32;
    images of 28×28 are padded with zeros. A norm stands behind the two convolutions.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998.

    Raises:
        ValueError: the norm is unknown, or the images have another size.
    """
    if image_size not in LENET5_PADDING:
        raise ValueError(f"lenet5: image_size must be 28 or 32, got {image_size}")
    behind = get_norm(norm)
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, kernel_size=5, padding=LENET5_PADDING[image_size]),
        behind.hidden(6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        behind.hidden(16),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
