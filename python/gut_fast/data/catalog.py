"""All data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gut_fast.data.cifar import cifar10, cifar100
from gut_fast.data.datasets import Dataset
from gut_fast.data.idx import fashion_mnist, mnist
from gut_fast.data.imagenette import imagenette
from gut_fast.data.packaged import digits, mnist_5k

__all__ = ["DATASETS", "load"]

FROM_FILES: dict[str, Callable[[str | Path | None, bool], Dataset]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "imagenette": imagenette,
    "mnist": mnist,
}
"""Functions of a folder and whether to download."""

FROM_PACKAGES: dict[str, Callable[[int], Dataset]] = {"digits": digits, "mnist-5k": mnist_5k}
"""Functions of a seed."""

DATASETS: dict[str, Callable[..., Dataset]] = {**FROM_FILES, **FROM_PACKAGES}
"""All data sets by name."""


def load(name: str, *, folder: str | Path | None = None, download: bool = False, seed: int = 0) -> Dataset:
    """The data set of that name; see `DATASETS`.

    Images in memory are float32, each channel shifted and scaled by the mean and standard deviation of its pixels in
    the training images. Contents are checked against published check sums before they are used.

    Args:
        name: for example ``"fashion-mnist"``.
        folder: where the files are, either this set's own folder or one of several sets, with the subfolders that
            torchvision makes. Default: what the environment variable GUT_FAST_DATA names, then the folders of Debian's
            dataset packages. Sets that come in a Python package need none.
        download: fetch files that are missing into that folder, through torchvision.
        seed: splits the sets that have no test samples of their own, those that come in a Python package.

    Raises:
        ValueError: an unknown name, or a download without a folder.
        FileNotFoundError: a file is missing; the message names it and says how to get it.
        RuntimeError: a file is truncated, damaged or of another format; the message names it.
        ImportError: a package is missing.
        OSError: a download failed.
    """
    if name in FROM_PACKAGES:
        return FROM_PACKAGES[name](seed)
    if name in FROM_FILES:
        return FROM_FILES[name](folder, download)
    raise ValueError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
