"""Fashion-MNIST and MNIST: a reader of IDX files, raw or gzipped.

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

from gut_fast.data.datasets import Dataset, standardised
from gut_fast.data.sources import Download, Source

__all__ = ["fashion_mnist", "mnist"]

UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class IdxFile:
    """A published file: the shape of its values, the sha256 of its raw content, and the md5 of the gzipped file."""

    name: str
    shape: tuple[int, ...]
    sha256: str
    gzip_md5: str


def _files(*checksums: tuple[str, str]) -> tuple[IdxFile, ...]:
    names = (
        ("train-images-idx3-ubyte", (60_000, 28, 28)),
        ("train-labels-idx1-ubyte", (60_000,)),
        ("t10k-images-idx3-ubyte", (10_000, 28, 28)),
        ("t10k-labels-idx1-ubyte", (10_000,)),
    )
    return tuple(IdxFile(*name, *sums) for name, sums in zip(names, checksums, strict=True))


FILES = {
    "fashion-mnist": _files(
        ("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", "25c81989df183df01b3e8a0aad5dffbe"),
        ("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", "bef4ecab320f06d8554ea6380940ec79"),
        ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "mnist": _files(
        ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", "d53e105ee54ea40749a09fcbcd1e9432"),
        ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", "9fb629c4189551a2d022fa330f9573f3"),
        ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}
"""Training images and labels, test images and labels of each set, with sha256 and md5."""

URLS = {
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
}
"""The folder of the gzipped files of each set."""


def fashion_mnist(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images of ten kinds of clothing, 1×28×28.

    `gut_fast.data.load` explains the arguments, the errors and the scaling of the pixels. The folder may be that of the
    Debian package dataset-fashion-mnist, which is found without being named, or one that torchvision has filled.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
    arXiv 1708.07747.
    """
    return _load("fashion-mnist", "FashionMNIST/raw", "dataset-fashion-mnist", folder, download)


def mnist(folder: str | Path | None = None, download: bool = False) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 1×28×28.

    `gut_fast.data.load` explains the arguments, the errors and the scaling of the pixels.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998.
    """
    return _load("mnist", "MNIST/raw", None, folder, download)


def _load(
    name: str, torchvision_folder: str, package: str | None, folder: str | Path | None, download: bool
) -> Dataset:
    source = Source(
        name,
        files=tuple(file.name for file in FILES[name]),
        subfolders=(name, torchvision_folder, ""),
        downloads=tuple(
            Download(f"{URLS[name]}/{file.name}.gz", file.gzip_md5, torchvision_folder) for file in FILES[name]
        ),
        package=package,
    )
    place = source.find(folder, download)
    train_images, train_labels, test_images, test_labels = (
        _read(source, file, source.file(place, file.name)) for file in FILES[name]
    )
    train_inputs, test_inputs = standardised(train_images.unsqueeze(1), test_images.unsqueeze(1))
    return Dataset(
        name,
        num_classes=10,
        train_inputs=train_inputs,
        train_labels=train_labels.to(torch.int64),
        test_inputs=test_inputs,
        test_labels=test_labels.to(torch.int64),
        source=f"{place}, sha256 of the raw content correct",
    )


def _read(source: Source, file: IdxFile, path: Path) -> Tensor:
    """The values of a file, uint8, after a check of every byte."""
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
    """A clause that names the file with this check sum, since both sets have the same file names."""
    owners = (
        f"; it is {name}'s {file.name}" for name, files in FILES.items() for file in files if file.sha256 == digest
    )
    return next(owners, "")
