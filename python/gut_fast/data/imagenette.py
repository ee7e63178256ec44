"""Imagenette, whose images are read from its folders during a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gut_fast.data.augmentation import RandomResizedCropFlip
from gut_fast.data.datasets import Dataset
from gut_fast.data.image_files import ImageFiles, check_can_read_images
from gut_fast.data.sources import Download, Source

__all__ = ["imagenette"]

CLASSES = (
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
)
"""The numbers in WordNet of tench, English springer, cassette player, chain saw, church, French horn, garbage truck,
gas pump, golf ball and parachute."""

NUM_IMAGES = {"train": 9_469, "val": 3_925}
"""The number of images in each folder of the second release."""

ARCHIVE = Download("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3")
"""The second release, with images whose shorter side has 320 pixels."""


def imagenette(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """Imagenette: 9,469 training and 3,925 test photographs of ten classes of ImageNet, 3×224×224.

    The images stay in their files (`ImageFiles`). The usual augmentation is a random resized crop and flip. A download
    takes the release whose shorter sides have 320 pixels; in a folder the release in full size comes first. Only the
    archives have published check sums, so in a folder only the classes and the number of images are checked.

    `gut_fast.data.load` explains the arguments and errors.

    Source: Howard, "Imagenette", https://github.com/fastai/imagenette.
    """
    check_can_read_images()
    source = Source(
        "imagenette",
        files=tuple(f"{split}/{name}" for split in NUM_IMAGES for name in CLASSES),
        subfolders=("imagenette2", "imagenette2-320", ""),
        downloads=(ARCHIVE,),
    )
    place = source.find(folder, download)
    (train_inputs, train_labels), (test_inputs, test_labels) = (_split(source, place / name) for name in NUM_IMAGES)
    return Dataset(
        source.name,
        num_classes=len(CLASSES),
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        source=f"{place}, number of images correct",
        augmentation=RandomResizedCropFlip(),
    )


def _split(source: Source, folder: Path) -> tuple[ImageFiles, Tensor]:
    """The images and labels in one of the two folders."""
    files = [sorted((folder / name).glob("*.JPEG")) for name in CLASSES]
    counts = torch.tensor([len(of_class) for of_class in files], device="cpu")
    expected = NUM_IMAGES[folder.name]
    if counts.sum() != expected:
        raise source.damaged(folder, f"has {int(counts.sum()):,} images, expected {expected:,}")
    labels = torch.repeat_interleave(torch.arange(len(CLASSES), device="cpu"), counts)
    return ImageFiles(tuple(path for of_class in files for path in of_class)), labels
