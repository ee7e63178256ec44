"""The layers that the networks are made of: a convolution, and the norm and activation that follow it.

A network asks its `Norm` for a module in each of four places::

    hidden       behind a convolution that is followed by an activation: norm and activation together
    linear       behind a convolution without activation, such as a shortcut's projection: the norm alone
    branch       behind the last convolution of a residual branch, before the addition: the norm alone
    activation   behind the addition

so that norms which bring their own activation, and networks without a norm, are rows of `NORMS` like the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gut_fast.arguments import all_known

__all__ = ["NORMS", "NUM_GROUPS", "Convolution", "EvoNormS0", "Norm", "ScaleAndShift", "get_norm", "group_norm"]

NUM_GROUPS = 8
"""Groups of group normalisation and EvoNorm-S0; their gcd with the channels if 8 does not divide these."""


class Convolution(nn.Conv2d):
    """A convolution with a padding of half its kernel, and He's initialisation.

    Weights are drawn with variance 2 / fan-in and biases are zero, so that ReLU networks keep the size of their signals
    with or without a norm; `torch.nn` draws with 1 / (3 fan-in).

    Args:
        inputs, outputs, kernel_size, stride, groups, bias: as in `torch.nn.Conv2d`.
        behind_relu: whether the inputs come out of an activation; if not, the variance is 1 / fan-in.

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


@dataclass(frozen=True)
class Norm:
    """The module for each place of a network; `hidden`, `linear` and `branch` take the number of channels."""

    hidden: Callable[[int], nn.Module]
    linear: Callable[[int], nn.Module]
    branch: Callable[[int], nn.Module]
    activation: Callable[[], nn.Module]


class EvoNormS0(nn.Module):
    """Normalisation and activation in one, within each sample: x · sigmoid(v x) / std(x) · weight + bias.

    std² = variance + eps over each sample's channels of one group and all their pixels, not corrected for the mean.
    v, weight and bias are learnt, one of each per channel. Images [B, channels, height, width] keep their shape, dtype
    and memory format; half precision is computed in float32.

    Source: Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2.
    """

    def __init__(self, channels: int, num_groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = math.gcd(NUM_GROUPS, channels) if num_groups is None else num_groups
        if channels % self.num_groups != 0:
            raise ValueError(f"EvoNormS0: {channels} channels cannot be divided into {self.num_groups} equal groups")
        self.eps = eps
        self.v = nn.Parameter(torch.empty(channels))
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets v = 1, weight = 1, bias = 0."""
        nn.init.ones_(self.v)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output for images [B, channels, height, width]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        v, weight, bias = (parameter.view(-1, 1, 1) for parameter in (self.v, self.weight, self.bias))
        groups = wide.unflatten(1, (self.num_groups, -1))
        std: Tensor = (groups.var(dim=(2, 3, 4), correction=0) + self.eps).sqrt()
        # The division is done on [B, channels, 1, 1], where it costs nothing.
        scale: Tensor = weight / std.repeat_interleave(x.shape[1] // self.num_groups, dim=1)[..., None, None]
        normalised: Tensor = wide * torch.sigmoid(v * wide) * scale + bias
        return normalised.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments in the module's representation."""
        return f"{len(self.v)}, num_groups={self.num_groups}, eps={self.eps}"


class ScaleAndShift(nn.Module):
    """The module computes x · weight + bias, one of each per channel and both 0 at the start.

    It ends a residual branch without a norm: every block begins as its shortcut, so that signals and gradients pass
    through any number of blocks.

    Source: De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
    NeurIPS 2020, section 3 (SkipInit; there with one weight per branch and no bias).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight = 0, bias = 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output for images [B, channels, height, width]."""
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation within each sample: unlike batch statistics, it does not carry an agent's own mix of classes."""
    return nn.GroupNorm(math.gcd(NUM_GROUPS, channels), channels)


def _with_relu(norm: Callable[[int], nn.Module]) -> Norm:
    """The norm with ReLU for its activation, as published networks have it."""
    return Norm(lambda channels: nn.Sequential(norm(channels), nn.ReLU()), norm, norm, nn.ReLU)


NORMS: dict[str, Norm] = {
    "evonorm": Norm(EvoNormS0, EvoNormS0, EvoNormS0, nn.Identity),
    "groupnorm": _with_relu(group_norm),
    "batchnorm": _with_relu(nn.BatchNorm2d),
    "none": Norm(lambda channels: nn.ReLU(), lambda channels: nn.Identity(), ScaleAndShift, nn.ReLU),
}
"""All norms by name.

``"evonorm"`` puts EvoNorm-S0, with its own activation, wherever a norm stands, and nothing behind the addition, as the
experiments of decentralized learning do: EvoNorm-S0 for every batch normalisation, and every ReLU left out.
"""


def get_norm(name: str) -> Norm:
    """The norm called `name`.

    Raises:
        ValueError: there is no such norm.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; {all_known(name, NORMS)}")
    return NORMS[name]
