"""Residual networks for small images: ResNet-20, -32 and -56.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Shortcuts that change the
shape are those it calls option B, a projection with a norm; with its option A, which has no parameters there, each
network has 2,752 parameters fewer (ResNet-20: 269,722).
"""

from __future__ import annotations

from torch import Tensor, nn

from gut_fast.models.convolution import Convolution
from gut_fast.models.norms import Norm, get_norm

__all__ = ["ResidualBlock", "resnet20", "resnet32", "resnet56"]

STAGES = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
"""Channels of the input and output of each stage, and the stride of its first block."""


class ResidualBlock(nn.Module):
    """activation(F(x) + shortcut(x)), where F is two 3×3 convolutions, each with its norm, one activation between them.

    The shortcut is the identity, or a 1×1 convolution with a norm where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Convolution(inputs, outputs, 3, stride),
            norm.hidden(outputs),
            Convolution(outputs, outputs, 3),
            norm.branch(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(Convolution(inputs, outputs, 1, stride), norm.linear(outputs))
        self.activation = norm.activation()

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, inputs, height, width]."""
        activated: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return activated


def resnet20(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-20 for images [B, in_channels, height, width]: 272,474 parameters in 65 tensors by default.

    Three stages of three blocks, with 16, 32 and 64 channels. The source has batch normalisation.

    Raises:
        ValueError: an unknown norm.
    """
    return _resnet(3, in_channels, num_classes, get_norm(norm))


def resnet32(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-32: as `resnet20`, with five blocks in each stage; 466,906 parameters by default."""
    return _resnet(5, in_channels, num_classes, get_norm(norm))


def resnet56(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-56: as `resnet20`, with nine blocks in each stage; 855,770 parameters by default."""
    return _resnet(9, in_channels, num_classes, get_norm(norm))


def _resnet(blocks_per_stage: int, in_channels: int, num_classes: int, norm: Norm) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in STAGES:
        blocks.append(ResidualBlock(inputs, outputs, stride, norm))
        blocks += [ResidualBlock(outputs, outputs, 1, norm) for _ in range(blocks_per_stage - 1)]
    return nn.Sequential(
        Convolution(in_channels, 16, 3),
        norm.hidden(16),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
