"""CIFAR-10 and CIFAR-100, in the files that torchvision fetches."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    # Pickles can run any code, so none is opened before all are known to be the published ones; and what is opened
    # are the bytes that were checked, not the files again.
    pickles = {file: _read(source, place / file, md5) for file, md5 in checksums.items()}
    (train_images, train_labels), (test_images, test_labels) = (
        _unpickled([pickles[file] for file, _ in split]) for split in (reader.train_list, reader.test_list)
    )
    train_inputs, test_inputs = standardised(train_images, test_images)
    return Dataset(
        name,
        num_classes=num_classes,
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        source=f"{place}, md5 of every file correct",
    )


def _read(source: Source, path: Path, md5: str) -> bytes:
    """The content of a file, which has this check sum."""
    content = path.read_bytes()
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise source.damaged(path, f"has the md5 {actual}, expected {md5}")
    return content


def _unpickled(contents: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Images [samples, 3, 32, 32], uint8, and int64 labels of batches in the authors' format.

    A batch is a dict of Python 2 with the rows of "data", the 1,024 pixels of each channel in turn, and a list of
    labels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pickles are of 2009, and numpy says so
        batches = [pickle.loads(content, encoding="latin1") for content in contents]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64, device="cpu")
