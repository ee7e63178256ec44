"""VGG-11 for small images."""

from __future__ import annotations

from torch import nn

from gut_fast.models.convolution import Convolution
from gut_fast.models.norms import get_norm

__all__ = ["VGG11_MIN_SIZE", "vgg11"]

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of the convolutions between one pooling and the next."""

VGG11_MIN_SIZE = 2 ** len(STAGES)
"""Smaller images vanish in the poolings."""


def vgg11(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm", width: float = 1.0) -> nn.Sequential:
    """VGG-11 for images [B, in_channels, height, width] of at least 32×32: 9,231,114 parameters by default.

    The eight convolutions of the source's configuration A, with biases, then the mean over the pixels left (of images
    of 32×32 one), and one linear layer: the form usual for CIFAR-10. The source has three linear layers, 124 million.

    Args:
        in_channels: of the images.
        num_classes: how many outputs.
        norm: behind every convolution; the source has none, the usual form for CIFAR-10 batch normalisation.
        width: factor on the channels of every convolution. Experiments of decentralized learning often have a quarter,
            0.58 million parameters.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.

    Raises:
        ValueError: an unknown norm, or a width that is not positive or leaves a convolution without channels.
    """
    if not 1 <= width * STAGES[0][0] < float("inf"):
        raise ValueError(f"vgg11: width must be a factor of at least 1/{STAGES[0][0]}, got {width}")
    behind, layers = get_norm(norm), list[nn.Module]()
    for stage in STAGES:
        for channels in stage:
            outputs = round(width * channels)
            layers += [Convolution(in_channels, outputs, 3, bias=True), behind.hidden(outputs)]
            in_channels = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
