"""A data set: samples and labels, ready to be divided among agents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from gut_fast.data.augmentation import Augmentation, RandomCropFlip
from gut_fast.data.image_files import ImageFiles

__all__ = ["Dataset", "Inputs", "hold_out"]

Inputs = Tensor | ImageFiles
"""Samples in memory, or in files that are read batch by batch."""


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    Args:
        name: for example ``"digits"``.
        num_classes: labels are 0 … num_classes − 1.
        train_inputs, test_inputs: tensors [samples, *input_shape], or `ImageFiles`.
        train_labels, test_labels: int64 tensors [samples].
        source: where the samples were read from, and what was checked about them.
        augmentation: the random changes to training images that are usual with this set.

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
        """Shape of one input, for example (1, 8, 8)."""
        return tuple(self.train_inputs.shape[1:])

    def pooled(self, factor: int) -> Dataset:
        """The same with smaller images: each pixel is the mean of ``factor × factor`` pixels.

        The values are not scaled anew: their mean stays zero, their standard deviation falls somewhat below one.

        Raises:
            TypeError, ValueError: factor is not an integer >= 1, the inputs are not images in memory, or their height
                or width is not a multiple of it.
        """
        if isinstance(factor, bool) or not isinstance(factor, int):
            raise TypeError(f"factor must be an integer, got {type(factor).__name__} {factor!r}")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
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
        """The same with training samples held out, class by class, that stand in for the test samples.

        Tuning on this set cannot see a test sample of this set; where a seed has divided it, those of another seed are
        others. What is held out is a function of the labels, fraction and seed.

        Args:
            fraction: of the training samples of each class, rounded to whole samples.
            seed: of the draw.

        Raises:
            TypeError, ValueError: a bad seed, or a fraction that leaves some class without a sample on either side.
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
    """Indices of the samples that stay and of those held out, ascending; see `Dataset.with_validation`."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__} {fraction!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__} {seed!r}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
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
