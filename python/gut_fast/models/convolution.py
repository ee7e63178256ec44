"""The convolution of ResNet, VGG and MobileNet."""

from __future__ import annotations

from typing import Literal

from torch import nn

__all__ = ["Convolution"]


class Convolution(nn.Conv2d):
    """Convolution with a padding of half its kernel, and He's initialisation.

    Weights are drawn with variance 2 / fan-in and biases are zero, so that ReLU networks keep the size of their signals
    with or without a norm; `torch.nn` draws with 1 / (3 fan-in).

    Args:
        inputs, outputs, kernel_size, stride, groups, bias: as in `torch.nn.Conv2d`.
        behind_relu: whether an activation has made the inputs; if not, the variance is 1 / fan-in.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        behind_relu: bool = True,
    ) -> None:
        self.nonlinearity: Literal["relu", "linear"] = "relu" if behind_relu else "linear"
        super().__init__(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.kaiming_normal_(self.weight, nonlinearity=self.nonlinearity)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
