"""Deep convolutional networks for small images: ResNet, VGG-11 and MobileNet-V2.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; Simonyan and Zisserman,
"Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015; Sandler et al., "MobileNetV2: Inverted
Residuals and Linear Bottlenecks", CVPR 2018, table 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from gut_fast.models.layers import Convolution, Norm, get_norm

__all__ = [
    "VGG11_MIN_SIZE",
    "InvertedResidual",
    "ResidualBlock",
    "mobilenet_v2",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg11",
]

RESNET_STAGES = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
"""Channels of the input and output of each stage of a ResNet, and the stride of the stage's first block."""

VGG11_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of VGG-11's convolutions between one pooling and the next."""

VGG11_MIN_SIZE = 2 ** len(VGG11_STAGES)
"""The smallest side of an image that survives VGG-11's poolings."""

MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, number of blocks and stride of the first block, for each stage of MobileNet-V2."""

LARGEST_SMALL_IMAGE = 64
"""The largest side for which MobileNet-V2 leaves out its first two strides of 2, so that 32×32 ends as 4×4."""


class ResidualBlock(nn.Module):
    """The block activation(F(x) + shortcut(x)): F is two 3×3 convolutions, each with its norm, an activation between.

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
        """The output for images [B, inputs, height, width]."""
        activated: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return activated


def resnet20(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-20 for images [B, in_channels, height, width]: 272,474 parameters in 65 tensors by default.

    It has three stages of three blocks, with 16, 32 and 64 channels. The source has batch normalisation. Shortcuts that
    change the shape are the source's option B, a projection with a norm; with its option A, which has no parameters
    there, ResNets have 2,752 parameters fewer (ResNet-20: 269,722).

    Raises:
        ValueError: the norm is unknown.
    """
    return _resnet(3, in_channels, num_classes, get_norm(norm))


def resnet32(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-32: `resnet20` with five blocks in each stage; 466,906 parameters by default."""
    return _resnet(5, in_channels, num_classes, get_norm(norm))


def resnet56(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm") -> nn.Sequential:
    """ResNet-56: `resnet20` with nine blocks in each stage; 855,770 parameters by default."""
    return _resnet(9, in_channels, num_classes, get_norm(norm))


def _resnet(blocks_per_stage: int, in_channels: int, num_classes: int, norm: Norm) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in RESNET_STAGES:
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


def vgg11(in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm", width: float = 1.0) -> nn.Sequential:
    """VGG-11 for images [B, in_channels, height, width] of at least 32×32: 9,231,114 parameters by default.

    It has the eight convolutions of the source's configuration A, with biases, then the mean over the remaining pixels
    (one pixel for images of 32×32) and one linear layer: the form usual for CIFAR-10. The source has three linear
    layers with 124 million parameters.

    Args:
        in_channels: channels of the images.
        num_classes: number of outputs.
        norm: name of the norm behind every convolution; the source has none, the form for CIFAR-10 has "batchnorm".
        width: factor on the channels of every convolution. Experiments of decentralized learning often use 0.25, which
            leaves 0.58 million parameters.

    Raises:
        ValueError: the norm is unknown, or the width is not positive or leaves a convolution without channels.
    """
    if not 1 <= width * VGG11_STAGES[0][0] < float("inf"):
        raise ValueError(f"vgg11: width must be a factor of at least 1/{VGG11_STAGES[0][0]}, got {width}")
    behind, layers = get_norm(norm), list[nn.Module]()
    for stage in VGG11_STAGES:
        for channels in stage:
            outputs = round(width * channels)
            layers += [Convolution(in_channels, outputs, 3, bias=True), behind.hidden(outputs)]
            in_channels = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


class InvertedResidual(nn.Module):
    """The block x + F(x), or F(x) where the shape changes.

    F is a 1×1 convolution to `expansion` times the channels, a 3×3 convolution within each channel, and a 1×1
    convolution. No activation follows the last convolution or the addition.
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
        """The output for images [B, inputs, height, width]."""
        residual: Tensor = self.residual(x)
        return x + residual if self.adds else residual


def mobilenet_v2(
    in_channels: int = 3, num_classes: int = 10, norm: str = "groupnorm", image_size: int = 32
) -> nn.Sequential:
    """MobileNet-V2 for images [B, in_channels, height, width]: 2,236,682 parameters; 3,504,872 with 1,000 classes.

    It is the published network with ReLU in place of ReLU6 and no dropout; its parameters do not depend on the size of
    the images. A form much used for CIFAR-10 has 2,296,922 parameters: it adds projections to four blocks, where the
    shape changes without a stride, and an expansion by 1 to the first.

    Args:
        in_channels: channels of the images.
        num_classes: number of outputs.
        norm: name of the norm behind every convolution; the source has batch normalisation.
        image_size: the smaller side of the images. Up to 64 the first convolution and the second stage have stride 1,
            the form usual for 32×32; above they have 2, as published for 224×224.

    Raises:
        ValueError: the norm is unknown.
    """
    behind = get_norm(norm)
    is_small = image_size <= LARGEST_SMALL_IMAGE
    blocks: list[nn.Module] = []
    inputs = 32
    for stage, (expansion, outputs, num_blocks, stride) in enumerate(MOBILENET_STAGES):
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
