"""MobileNet-V2.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from gut_fast.models.convolution import Convolution
from gut_fast.models.norms import Norm, get_norm

__all__ = ["InvertedResidual", "mobilenet_v2"]

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, number of blocks and stride of the first, for each stage."""

LARGEST_SMALL_IMAGE = 64
"""Up to this side the first two strides of 2 are left out, so that images of 32×32 end as 4×4, not as 1×1."""


class InvertedResidual(nn.Module):
    """x + F(x), or F(x) where the shape changes; F is a 1×1 convolution to `expansion` times the channels, a 3×3 one
    within each channel, and a 1×1 one without activation. There is none behind the addition either.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        hidden = expansion * inputs
        expand = [Convolution(inputs, hidden, 1, behind_relu=False), norm.hidden(hidden)] if expansion != 1 else []
        self.residual = nn.Sequential(
            *expand,
            Convolution(hidden, hidden, 3, stride, groups=hidden),
            norm.hidden(hidden),
            Convolution(hidden, outputs, 1),
            norm.branch(outputs) if self.adds else norm.linear(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, inputs, height, width]."""
        residual: Tensor = self.residual(x)
        return x + residual if self.adds else residual


def mobilenet_v2(
    in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm", image_size: int = 32
) -> nn.Sequential:
    """MobileNet-V2 for images [B, in_channels, height, width]: 2,236,682 parameters; 3,504,872 with 1,000 classes.

    The published network, but for ReLU in place of ReLU6 and no dropout; its parameters do not depend on the size of
    the images. A form much used for CIFAR-10 has 2,296,922: it adds projections to four blocks, where the shape changes
    without a stride, and an expansion by 1 to the first.

    Args:
        in_channels: of the images.
        num_classes: how many outputs.
        norm: behind every convolution; the source has batch normalisation.
        image_size: the smaller side of the images. Up to 64 the first convolution and the second stage have stride 1,
            the form usual for 32×32; above they have 2, as published for 224×224.

    Raises:
        ValueError: an unknown norm.
    """
    behind = get_norm(norm)
    is_small = image_size <= LARGEST_SMALL_IMAGE
    blocks: list[nn.Module] = []
    inputs = 32
    for stage, (expansion, outputs, num_blocks, stride) in enumerate(STAGES):
        first_stride = 1 if is_small and stage == 1 else stride
        for block in range(num_blocks):
            blocks.append(InvertedResidual(inputs, outputs, expansion, first_stride if block == 0 else 1, behind))
            inputs = outputs
    return nn.Sequential(
        Convolution(in_channels, 32, 3, stride=1 if is_small else 2),
        behind.hidden(32),
        *blocks,
        Convolution(inputs, 1280, 1, behind_relu=False),
        behind.hidden(1280),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1280, num_classes),
    )
