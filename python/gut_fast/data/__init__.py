"""Data sets, their division among agents, and random changes to their images."""

from __future__ import annotations

from gut_fast.data import partition
from gut_fast.data.augmentation import Augmentation, RandomCropFlip
from gut_fast.data.datasets import DATASETS, Dataset, digits, load

__all__ = ["DATASETS", "Augmentation", "Dataset", "RandomCropFlip", "digits", "load", "partition"]
