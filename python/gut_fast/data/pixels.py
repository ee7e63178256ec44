"""From the pixels of images to the inputs of a network."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standardised"]


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Images of bytes [samples, channels, height, width] as float32, with the mean and standard deviation of training.

    Each channel is shifted and scaled by the mean and the standard deviation of its pixels in the training images. They
    come from a count of the 256 values, so they are exact and the same on every machine.
    """
    levels = torch.arange(256, dtype=torch.float64, device="cpu")
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in train.unbind(1)]).to(
        torch.float64
    )
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts * (levels - mean[:, None]).square()).sum(1).sqrt()

    def scale(images: Tensor) -> Tensor:
        shift, factor = (statistic.to(torch.float32).view(-1, 1, 1) for statistic in (mean, std))
        return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(shift).div_(factor)

    return scale(train), scale(test)
