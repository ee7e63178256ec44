"""Multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

__all__ = ["mlp"]


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
