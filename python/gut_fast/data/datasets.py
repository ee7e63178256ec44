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
        train_inputs: a tensor [samples, *input_shape], or `ImageFiles`.
        train_labels: an int64 tensor [samples], or [samples, length] with a class for each of many places.
        test_inputs: as `train_inputs`.
        test_labels: as `train_labels`.
        source: where the samples come from, and which check sums are correct.
        augmentation: the usual random changes to training images of this set; None if there are none.
        train_groups: the group of each training sample, int64 [samples], from 0 to one below their number, for samples
            that are divided among agents by other things than their labels, such as texts by language. A simulator
            without ``parts=`` gives agent i the samples of group i.
        group_names: the names of the groups.

    Raises:
        ValueError: a split or a group is empty, inputs and labels differ in number, a label is not a class, or there
            are no groups although a sample has many labels.
    """

    name: str
    num_classes: int
    train_inputs: Inputs = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_inputs: Inputs = field(repr=False)
    test_labels: Tensor = field(repr=False)
    source: str = field(default="", repr=False)
    augmentation: Augmentation | None = field(default=RandomCropFlip(), repr=False)
    train_groups: Tensor | None = field(default=None, repr=False)
    group_names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for split, inputs, labels in (
            ("train", self.train_inputs, self.train_labels),
            ("test", self.test_inputs, self.test_labels),
        ):
            if labels.dtype != torch.int64 or not (labels.ndim == 1 or (labels.ndim > 1 and self.group_names)):
                raise ValueError(
                    f"data set {self.name!r}: {split}_labels must be a 1-D int64 tensor, or of more dimensions beside "
                    f"train_groups, got shape {tuple(labels.shape)} of {labels.dtype}"
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

        groups, names = self.train_groups, self.group_names
        if (groups is None) != (not names):
            raise ValueError(f"data set {self.name!r}: train_groups and group_names go together, give both or none")
        if groups is not None and not (
            (groups.shape, groups.dtype) == (self.train_labels.shape[:1], torch.int64)
            and set(groups.tolist()) == set(range(len(names)))
        ):
            raise ValueError(
                f"data set {self.name!r}: train_groups must be an int64 tensor with the number of a group for each of "
                f"{len(self.train_labels)} samples, each of 0 … {len(names) - 1} at least once, got shape "
                f"{tuple(groups.shape)} of {groups.dtype}"
            )

    @property
    def groups(self) -> Tensor:
        """The number of the group of each training sample: what `train_groups` says, or else its class."""
        return self.train_labels if self.train_groups is None else self.train_groups

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return self.num_classes if self.train_groups is None else len(self.group_names)

    @property
    def has_tokens(self) -> bool:
        """True if the inputs are numbers of tokens, as those of text, rather than quantities."""
        return isinstance(self.train_inputs, Tensor) and not self.train_inputs.is_floating_point()

    @property
    def parts(self) -> list[Tensor] | None:
        """The indices of the training samples of each group, None without `train_groups`."""
        if self.train_groups is None:
            return None
        return [(self.train_groups == group).nonzero().flatten() for group in range(self.num_groups)]

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
        """The data set with some training samples, drawn group by group (class by class), in place of the test samples.

        So tuning never sees a test sample. The draw is a function of the groups, the fraction and the seed.

        Args:
            fraction: share of the training samples of each group that is held out, rounded to whole samples.
            seed: seed of the draw.

        Raises:
            TypeError, ValueError: the seed is bad, or the fraction leaves a group without a sample on either side.
        """
        kept, held = hold_out(self.groups, fraction, seed)
        return replace(
            self,
            train_inputs=self.train_inputs[kept],
            train_labels=self.train_labels[kept],
            test_inputs=self.train_inputs[held],
            test_labels=self.train_labels[held],
            train_groups=None if self.train_groups is None else self.train_groups[kept],
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
