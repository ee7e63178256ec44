"""The `Dataset`: samples and labels, ready to be divided among agents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from gut_fast.arguments import as_integer, as_number
from gut_fast.data.augmentation import Augmentation, RandomCropFlip
from gut_fast.data.image_files import ImageFiles

__all__ = ["Dataset", "Inputs", "hold_out", "standardised"]

Inputs = Tensor | ImageFiles
"""Samples in memory, or in files that are read batch by batch."""


@dataclass(frozen=True)
class Dataset:
    """The samples and labels of a classification task.

    Args:
        name: for example ``"digits"``.
        num_classes: number of classes; labels are 0 … num_classes − 1.
        train_inputs, test_inputs: tensors [samples, *input_shape], or `ImageFiles`.
        train_labels, test_labels: int64 tensors [samples].
        source: where the samples come from, and which check sums are correct.
        augmentation: the usual random changes to training images of this set.

    Raises:
        ValueError: a split is empty, inputs and labels differ in number, or a label is not a class.
    """

    name: str
    num_classes: int
    train_inputs: Inputs = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_inputs: Inputs = field(repr=False)
    test_labels: Tensor = field(repr=False)
    source: str = field(default="", repr=False)
    augmentation: Augmentation = field(default=RandomCropFlip(), repr=False)

    def __post_init__(self) -> None:
        for split, inputs, labels in (
            ("train", self.train_inputs, self.train_labels),
            ("test", self.test_inputs, self.test_labels),
        ):
            if labels.ndim != 1 or labels.dtype != torch.int64:
                raise ValueError(
                    f"data set {self.name!r}: {split}_labels must be a 1-D int64 tensor, "
                    f"got shape {tuple(labels.shape)} of {labels.dtype}"
                )
            if len(inputs) != len(labels):
                raise ValueError(
                    f"data set {self.name!r}: {len(inputs)} {split} inputs but {len(labels)} {split} labels"
                )
            if not len(labels):
                raise ValueError(f"data set {self.name!r} has no {split} samples")
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"data set {self.name!r}: {split}_labels span {int(labels.min())} … {int(labels.max())}, "
                    f"expected 0 … {self.num_classes - 1}"
                )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, for example (1, 8, 8)."""
        return tuple(self.train_inputs.shape[1:])

    def pooled(self, factor: int) -> Dataset:
        """The data set with smaller images: each pixel is the mean of ``factor × factor`` pixels.

        The values are not scaled again: their mean stays zero, their standard deviation falls somewhat below one.

        Raises:
            TypeError, ValueError: factor is not an integer >= 1, the inputs are not images in memory, or their height
                or width is not a multiple of factor.
        """
        factor = as_integer(factor, "factor", minimum=1)
        train, test = self.train_inputs, self.test_inputs
        if isinstance(train, ImageFiles) or isinstance(test, ImageFiles):
            raise ValueError(f"data set {self.name!r} stays in files; only images in memory can be pooled")
        if len(self.input_shape) != 3 or any(side % factor for side in self.input_shape[1:]):
            raise ValueError(
                f"data set {self.name!r}: pooling by {factor} is for images (channels, height, width) whose sides are "
                f"multiples of {factor}, the inputs have shape {self.input_shape}"
            )
        if factor == 1:
            return self
        pooled_train, pooled_test = (functional.avg_pool2d(images, factor) for images in (train, test))
        return replace(self, train_inputs=pooled_train, test_inputs=pooled_test)

    def with_validation(self, fraction: float, seed: int = 0) -> Dataset:
        """The data set with some training samples, drawn class by class, in place of the test samples.

        So tuning never sees a test sample. The draw is a function of the labels, the fraction and the seed.

        Args:
            fraction: share of the training samples of each class that is held out, rounded to whole samples.
            seed: seed of the draw.

        Raises:
            TypeError, ValueError: the seed is bad, or the fraction leaves a class without a sample on either side.
        """
        kept, held = hold_out(self.train_labels, fraction, seed)
        return replace(
            self,
            train_inputs=self.train_inputs[kept],
            train_labels=self.train_labels[kept],
            test_inputs=self.train_inputs[held],
            test_labels=self.train_labels[held],
        )


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The ascending indices of the samples that stay, and of those held out; see `Dataset.with_validation`."""
    seed = as_integer(seed, "seed", minimum=0)
    if not 0 < as_number(fraction, "fraction") < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    is_held_out = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique().tolist():
        samples = order[labels[order] == label]
        count = round(fraction * len(samples))
        if not 1 <= count < len(samples):
            raise ValueError(
                f"holding out {fraction} of the {len(samples)} samples of class {label} would leave "
                f"{len(samples) - count} to train on and {count} to validate on; both need at least one"
            )
        is_held_out[samples[:count]] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """The images of bytes [samples, channels, height, width] as float32, standardised by the training images.

    Each channel is shifted and scaled by the mean and the standard deviation of its pixels in the training images,
    which come from a count of the 256 values and so are exact and the same on every machine.
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
