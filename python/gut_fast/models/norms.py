"""Norms: what stands behind the convolutions of a network, by the place where it stands.

A network asks its `Norm` for a module of so many channels in each of four places::

    hidden       behind a convolution that is followed by an activation: norm and activation together
    linear       behind a convolution without activation, such as a shortcut's projection: the norm alone
    branch       behind the last convolution of a residual branch, before the addition: the norm alone
    activation   behind the addition

so that norms which bring their own activation, and networks without a norm, are rows of the table like the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["NORMS", "NUM_GROUPS", "EvoNormS0", "Norm", "ScaleAndShift", "get_norm", "group_norm"]

NUM_GROUPS = 8
"""Of group normalisation and EvoNorm-S0; with channels that 8 does not divide, their greatest common divisor."""


@dataclass(frozen=True)
class Norm:
    """What stands in each place of a network; `hidden`, `linear` and `branch` are given the number of channels."""

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
        """v = 1, weight = 1, bias = 0."""
        nn.init.ones_(self.v)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, channels, height, width]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        v, weight, bias = (parameter.view(-1, 1, 1) for parameter in (self.v, self.weight, self.bias))
        groups = wide.unflatten(1, (self.num_groups, -1))
        std: Tensor = (groups.var(dim=(2, 3, 4), correction=0) + self.eps).sqrt()
        # The division is done on [B, channels, 1, 1], where it costs nothing.
        scale: Tensor = weight / std.repeat_interleave(x.shape[1] // self.num_groups, dim=1)[..., None, None]
        normalised: Tensor = wide * torch.sigmoid(v * wide) * scale + bias
        return normalised.to(x.dtype)

    def extra_repr(self) -> str:
        """What the module's representation shows."""
        return f"{len(self.v)}, num_groups={self.num_groups}, eps={self.eps}"


class ScaleAndShift(nn.Module):
    """x · weight + bias, one of each per channel and both 0 at the start.

    At the end of a residual branch: every block begins as its shortcut, so that signals and gradients pass through any
    number of blocks without a norm.

    Source: De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks",
    NeurIPS 2020, section 3 (SkipInit; there with one weight per branch and no bias).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight = 0, bias = 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of images [B, channels, height, width]."""
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation within each sample: unlike batch statistics, it does not carry an agent's own mix of classes."""
    return nn.GroupNorm(math.gcd(NUM_GROUPS, channels), channels)


def _with_relu(norm: Callable[[int], nn.Module]) -> Norm:
    """A norm as published networks have it, with ReLU for its activation."""
    return Norm(lambda channels: nn.Sequential(norm(channels), nn.ReLU()), norm, norm, nn.ReLU)


NORMS: dict[str, Norm] = {
    "evonorm": Norm(EvoNormS0, EvoNormS0, EvoNormS0, nn.Identity),
    "groupnorm": _with_relu(group_norm),
    "batchnorm": _with_relu(nn.BatchNorm2d),
    "none": Norm(lambda channels: nn.ReLU(), lambda channels: nn.Identity(), ScaleAndShift, nn.ReLU),
}
"""All norms by name.

``"evonorm"`` has EvoNorm-S0 wherever a norm stands, its activation with it, and nothing behind the addition, which is
how the experiments of decentralized learning use it: EvoNorm-S0 for every batch normalisation, and every ReLU left out.
"""


def get_norm(name: str) -> Norm:
    """The norm of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known are {', '.join(NORMS)}")
    return NORMS[name]
