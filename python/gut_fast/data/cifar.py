"""CIFAR-10 and CIFAR-100, in the authors' files, which are pickles."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gut_fast.data.datasets import Dataset, standardised
from gut_fast.data.sources import Download, Source
from gut_fast.files import FileError, read_within

__all__ = ["cifar10", "cifar100"]

MAX_BYTES = 160_000_000
"""The most bytes of a file; the largest is CIFAR-100's training set, 50,000 images of 3,072 bytes and their labels."""


@dataclass(frozen=True)
class Publication:
    """The published files of one set: the md5 of every file by name, and the archive that has them."""

    num_classes: int
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    names: dict[str, str]
    archive: Download


PUBLICATIONS = {
    "cifar10": Publication(
        num_classes=10,
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        names={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        archive=Download("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    ),
    "cifar100": Publication(
        num_classes=100,
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        names={"meta": "7973b15100ade9c7d40fb424638fde48"},
        archive=Download(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
        ),
    ),
}


def cifar10(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten classes, 3×32×32.

    `gut_fast.data.load` explains the arguments, the errors and the scaling of the pixels.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _load("cifar10", folder, download)


def cifar100(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """CIFAR-100: photographs like those of `cifar10`, of a hundred classes."""
    return _load("cifar100", folder, download)


def _load(name: str, folder: str | Path | None, download: bool) -> Dataset:
    published = PUBLICATIONS[name]
    checksums = {**published.train, **published.test, **published.names}
    source = Source(name, files=tuple(checksums), subfolders=(published.folder,), downloads=(published.archive,))
    place = source.find(folder, download)
    # Pickles can run any code. So none is opened before all are known to be the published ones, and the bytes that were
    # checked are unpickled, not the files, which are read once.
    pickles = {file: _read(source, place / file, md5) for file, md5 in checksums.items()}
    (train_images, train_labels), (test_images, test_labels) = (
        _unpickled([pickles[file] for file in split]) for split in (published.train, published.test)
    )
    train_inputs, test_inputs = standardised(train_images, test_images)
    return Dataset(
        name,
        num_classes=published.num_classes,
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        source=f"{place}, md5 of every file correct",
    )


def _read(source: Source, path: Path, md5: str) -> bytes:
    """The content of a file; raises FileError if it is larger than any of theirs, or its check sum is not `md5`."""
    try:
        content = read_within(path, MAX_BYTES)
    except FileError as error:
        raise source.damaged(path, f"is larger than {MAX_BYTES:,} bytes") from error
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise source.damaged(path, f"has the md5 {actual}, expected {md5}")
    return content


def _unpickled(contents: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """The images [samples, 3, 32, 32], uint8, and int64 labels of batches in the authors' format.

    A batch is a dict, pickled by Python 2, with the rows of "data", the 1,024 pixels of each channel in turn, and a
    list of labels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns that the pickles of 2009 are old
        batches = [pickle.loads(content, encoding="latin1") for content in contents]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64, device="cpu")
