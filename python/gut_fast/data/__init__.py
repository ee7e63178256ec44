"""Data sets, their division among agents, and random changes to their images."""

from __future__ import annotations

from gut_fast.data import partition
from gut_fast.data.augmentation import Augmentation, RandomCropFlip, RandomResizedCropFlip
from gut_fast.data.catalog import DATASETS, digits, load
from gut_fast.data.datasets import Dataset, Inputs
from gut_fast.data.image_files import ImageFiles
from gut_fast.data.sampler import AgentBatchSampler
from gut_fast.data.text import text_folders

__all__ = [
    "DATASETS",
    "AgentBatchSampler",
    "Augmentation",
    "Dataset",
    "ImageFiles",
    "Inputs",
    "RandomCropFlip",
    "RandomResizedCropFlip",
    "digits",
    "load",
    "partition",
    "text_folders",
]
