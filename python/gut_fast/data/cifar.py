"""CIFAR-10 and CIFAR-100, read with torchvision."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from gut_fast.data.datasets import Dataset
from gut_fast.data.files import Source, torchvision_datasets
from gut_fast.data.pixels import standardised

__all__ = ["cifar10", "cifar100"]


def cifar10(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten classes, 3×32×32.

    Arguments, errors and what is done to the pixels: see `gut_fast.data.load`.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _load("cifar10", 10, torchvision_datasets().CIFAR10, folder, download)


def cifar100(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """CIFAR-100: as `cifar10`, but of a hundred classes."""
    return _load("cifar100", 100, torchvision_datasets().CIFAR100, folder, download)


def _load(name: str, num_classes: int, reader: Any, folder: str | Path | None, download: bool) -> Dataset:
    checksums = dict([*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])])
    source = Source(
        name,
        files=tuple(checksums),
        subfolders=(reader.base_folder,),
        download=lambda root: reader(root, download=True),
    )
    place = source.find(folder, download)
    # Pickles can run any code, so none is opened before all are known to be the published ones.
    for file, md5 in checksums.items():
        actual = hashlib.md5((place / file).read_bytes(), usedforsecurity=False).hexdigest()
        if actual != md5:
            raise source.damaged(place / file, f"has the md5 {actual}, expected {md5}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pickles are of 2009, and numpy says so
        train, test = (reader(place.parent, train=is_train) for is_train in (True, False))
    train_inputs, test_inputs = standardised(
        *(torch.from_numpy(split.data).permute(0, 3, 1, 2) for split in (train, test))
    )
    return Dataset(
        name,
        num_classes=num_classes,
        train_inputs=train_inputs,
        train_labels=torch.tensor(train.targets, dtype=torch.int64, device="cpu"),
        test_inputs=test_inputs,
        test_labels=torch.tensor(test.targets, dtype=torch.int64, device="cpu"),
        source=f"{place}, md5 of every file correct",
    )
