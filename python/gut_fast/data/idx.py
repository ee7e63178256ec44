"""Fashion-MNIST and MNIST: IDX files, raw or gzipped, read without torchvision.

An IDX file is the bytes 0, 0, 8 (unsigned bytes), the number of dimensions, each of them as four bytes, the most
significant first, and the values. Both sets have files of the same names and shapes; the check sums tell them apart.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gut_fast.data.datasets import Dataset
from gut_fast.data.files import Source, torchvision_datasets
from gut_fast.data.pixels import standardised

__all__ = ["fashion_mnist", "mnist"]

UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class IdxFile:
    """What a file must be: the shape of its values and the sha256 of its raw content, header included."""

    name: str
    shape: tuple[int, ...]
    sha256: str


def _files(train_images: str, train_labels: str, test_images: str, test_labels: str) -> tuple[IdxFile, ...]:
    return (
        IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), train_images),
        IdxFile("train-labels-idx1-ubyte", (60_000,), train_labels),
        IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), test_images),
        IdxFile("t10k-labels-idx1-ubyte", (10_000,), test_labels),
    )


FILES = {
    "fashion-mnist": _files(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist": _files(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
"""Training images and labels, test images and labels of each set."""


def fashion_mnist(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images of ten kinds of clothing, 1×28×28.

    Arguments, errors and what is done to the pixels: see `gut_fast.data.load`. The folder may be that of the Debian
    package dataset-fashion-mnist, which is found without being named, or one that torchvision has filled.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
    arXiv 1708.07747.
    """
    source = _source("fashion-mnist", "FashionMNIST", package="dataset-fashion-mnist")
    return _load(source, folder, download)


def mnist(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 1×28×28.

    Arguments, errors and what is done to the pixels: see `gut_fast.data.load`.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998.
    """
    return _load(_source("mnist", "MNIST"), folder, download)


def _source(name: str, torchvision_name: str, package: str | None = None) -> Source:
    return Source(
        name,
        files=tuple(file.name for file in FILES[name]),
        subfolders=(name, f"{torchvision_name}/raw", ""),
        download=lambda root: getattr(torchvision_datasets(), torchvision_name)(root, download=True),
        package=package,
    )


def _load(source: Source, folder: str | Path | None, download: bool) -> Dataset:
    place = source.find(folder, download)
    train_images, train_labels, test_images, test_labels = (
        _read(source, file, source.file(place, file.name)) for file in FILES[source.name]
    )
    train_inputs, test_inputs = standardised(train_images.unsqueeze(1), test_images.unsqueeze(1))
    return Dataset(
        source.name,
        num_classes=10,
        train_inputs=train_inputs,
        train_labels=train_labels.to(torch.int64),
        test_inputs=test_inputs,
        test_labels=test_labels.to(torch.int64),
        source=f"{place}, sha256 of the raw content correct",
    )


def _read(source: Source, file: IdxFile, path: Path) -> Tensor:
    """The values of a file, uint8, checked in every byte."""
    header = struct.pack(f">HBB{len(file.shape)}I", 0, UNSIGNED_BYTE, len(file.shape), *file.shape)
    size = len(header) + math.prod(file.shape)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            content = stream.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise source.damaged(path, f"is truncated, damaged or not a gzip file ({error})") from error
    if content[: len(header)] != header:
        raise source.damaged(path, _header_mistake(content, header))
    if len(content) != size:
        actual = "more" if len(content) > size else f"{len(content):,}"
        raise source.damaged(path, f"holds {actual} bytes where {size:,} are expected")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise source.damaged(path, f"has the sha256 {digest}, expected {file.sha256}{_owner(digest)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(file.shape)


def _header_mistake(content: bytes, header: bytes) -> str:
    if content[:4] != header[:4]:
        return f"is not the IDX file expected: it begins with {content[:4].hex(' ')}, not {header[:4].hex(' ')}"
    count = (len(header) - 4) // 4
    sizes = content[4 : len(header)].ljust(4 * count, b"\0")
    actual, expected = struct.unpack(f">{count}I", sizes), struct.unpack(f">{count}I", header[4:])
    return f"holds values of shape {actual}, expected {expected}"


def _owner(digest: str) -> str:
    """Which file has that check sum: the names are easily mixed up."""
    owners = (
        f"; it is {name}'s {file.name}" for name, files in FILES.items() for file in files if file.sha256 == digest
    )
    return next(owners, "")
