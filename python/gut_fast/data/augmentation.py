"""Random changes to training images, for many images at once and on their device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gut_fast.arguments import as_integer

__all__ = ["Augmentation", "RandomCropFlip", "RandomResizedCropFlip"]


class Augmentation(Protocol):
    """A random change to samples, whose random numbers are drawn on the CPU and so are the same for every device.

    The `repr` goes into checkpoints, which only a simulator with an equal `repr` can load; that of a frozen dataclass
    is a good one.
    """

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """The random numbers for so many samples, a CPU tensor [num_samples, ...]."""

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """The changed samples, in the shape and layout of `inputs` [N, B, ...]; `draws` [N, B, ...] is beside them."""


@dataclass(frozen=True)
class RandomCropFlip:
    """The augmentation that pads images with zeros, cuts out their size at a random place, and mirrors half of them.

    With the draws (top, left, mirrored) of an image x of width W, and x zero outside its borders::

        out[c, h, w] = x[c, h + top − padding, v + left − padding],   v = W − 1 − w where mirrored, else w

    Zero is the mean of samples that are standardised as in `gut_fast.data`.

    Args:
        padding: rows and columns added on each side; top and left are uniform in 0 … 2 · padding.
        flip: whether images are mirrored, left to right, with probability 1/2.

    Raises:
        TypeError, ValueError: padding is not an integer >= 0, or flip not a bool.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        as_integer(self.padding, "padding", minimum=0)
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Top, left and whether mirrored, for each sample: int64 [num_samples, 3]."""
        offsets = torch.randint(2 * self.padding + 1, (num_samples, 2), generator=generator, device="cpu")
        mirrored = torch.randint(1 + self.flip, (num_samples, 1), generator=generator, device="cpu")
        return torch.cat([offsets, mirrored], 1)

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """The changed images [N, B, C, H, W], in the layout of `inputs`, by the same number of kernels for any N and B.

        Raises:
            ValueError: the inputs are not images, or `draws` is not an int64 tensor [N, B, 3] on their device or, on
                the CPU, holds numbers that `draw` never returns.
        """
        self._check(inputs, draws)
        height, width = inputs.shape[-2:]
        padded = functional.pad(inputs.flatten(0, 1), (self.padding,) * 4)
        return _gather_pixels(padded, self._positions(draws.flatten(0, 1), height, width)).view_as(inputs)

    def _positions(self, draws: Tensor, height: int, width: int) -> Tensor:
        """The place in the padded image that each pixel of a sample comes from, [samples, height, width]."""
        top, left, mirrored = draws.unbind(1)
        h, w = (torch.arange(size, device=draws.device) for size in (height, width))
        rows = top[:, None] + h
        columns = left[:, None] + torch.where(mirrored[:, None] == 1, width - 1 - w, w)
        return rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]

    def _check(self, inputs: Tensor, draws: Tensor) -> None:
        if inputs.ndim != 5:
            raise ValueError(f"{self} is for images [N, B, C, H, W], got inputs of shape {tuple(inputs.shape)}")
        expected = (*inputs.shape[:2], 3)
        if draws.shape != expected or draws.dtype != torch.int64 or draws.device != inputs.device:
            raise ValueError(
                f"{self}: draws is {draws.dtype} of shape {tuple(draws.shape)} on {draws.device}, "
                f"expected torch.int64 of shape {expected} on {inputs.device}"
            )
        # On another device reading the numbers would wait for it.
        if draws.device.type == "cpu" and draws.numel():
            limits = torch.tensor([2 * self.padding, 2 * self.padding, 1], device="cpu")
            if bool(((draws < 0) | (draws > limits)).any()):
                raise ValueError(
                    f"{self}: top and left go from 0 to {2 * self.padding} and mirrored from 0 to 1, "
                    f"got {draws.flatten(0, 1).amin(0).tolist()} … {draws.flatten(0, 1).amax(0).tolist()}"
                )


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """The augmentation that resizes a random part of each image to the size of the inputs, and mirrors half of them.

    For images in files, the part is cut from the image in the file, in the file's resolution.

    Args:
        scale: lowest and highest share of the area; the share is uniform between them.
        ratio: lowest and highest ratio of width to height; the ratio's logarithm is uniform between their logarithms.
        flip: whether images are mirrored, left to right, with probability 1/2.

    Raises:
        TypeError, ValueError: an interval is not two positive numbers in order, a scale above 1, or flip not a bool.

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6, as in `torchvision.transforms`.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        for name, (low, high), limit in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= limit or not math.isfinite(high):
                raise ValueError(f"{name} must be two numbers in order, above 0 and at most {limit}, got {(low, high)}")

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """A seed for each sample: int64 [num_samples, 1]."""
        return torch.randint(2**63 - 1, (num_samples, 1), generator=generator, device="cpu")

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """The changed images [N, B, C, H, W], computed one after the other.

        Raises:
            ValueError: the inputs are not images.
        """
        if inputs.ndim != 5:
            raise ValueError(f"{self} is for images [N, B, C, H, W], got inputs of shape {tuple(inputs.shape)}")
        height, width = inputs.shape[-2:]
        seeds = draws.flatten().tolist()
        images = [self.crop(*pair, (height, width)) for pair in zip(inputs.flatten(0, 1), seeds, strict=True)]
        return torch.empty_like(inputs).copy_(torch.stack(images).view_as(inputs))

    def crop(self, image: Any, seed: int, size: tuple[int, int]) -> Any:
        """An image of height and width `size` from a part of one, both tensors [C, H, W] or PIL images."""
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import hflip, resized_crop

        # torchvision draws from the default generator, which fork_rng puts back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            part = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
            is_mirrored = self.flip and bool(torch.rand((), device="cpu") < 0.5)
        resized = resized_crop(image, *part, list(size))
        return hflip(resized) if is_mirrored else resized


def _gather_pixels(images: Tensor, positions: Tensor) -> Tensor:
    """The pixels of images [S, C, H', W'] at h · W' + w = positions [S, H, W], as [S, C, H, W] in the same layout."""
    (samples, height, width), channels = positions.shape, images.shape[1]
    if images.is_contiguous():
        indices = positions.flatten(1)[:, None, :].expand(-1, channels, -1)
        return images.flatten(2).gather(2, indices).view(samples, channels, height, width)
    indices = positions.flatten(1)[:, :, None].expand(-1, -1, channels)
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2).gather(1, indices)
    return pixels.view(samples, height, width, channels).permute(0, 3, 1, 2)
