"""Images that stay in their files; worker processes read and decode them batch by batch."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from gut_fast.arguments import shortened
from gut_fast.data.augmentation import RandomResizedCropFlip
from gut_fast.files import FileError, read_within
from gut_fast.requirements import pip_install

__all__ = ["ImageFiles", "check_can_read_images", "read_image"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The mean and standard deviation of ImageNet's pixels, between 0 and 1, channel by channel."""

RESIZED_PER_CROPPED = 256 / 224
"""The shorter side of a resized image over the side of the square that is cut out."""

MAX_WORKERS = 8

FORMATS = ("JPEG", "PNG")
"""The formats of the images in data sets."""

MAX_BYTES, MAX_PIXELS = 64 << 20, 64 << 20
"""The most bytes and the most pixels of an image; ImageNet's largest have some twenty million."""

CPU = torch.device("cpu")

Request = tuple[Tensor, Tensor | None]
"""The indices [B] of samples, and the numbers that an augmentation has drawn for them, [B, 1], or None."""


def check_can_read_images() -> None:
    """Raises ImportError if torchvision, which reads and crops images, cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision for another torch raises any of these
        raise ImportError(
            f"images in files are read with torchvision, which cannot be imported ({error}); install the one for torch "
            f"{torch.__version__} as pytorch.org says, or {pip_install('torchvision')}, which may replace torch"
        ) from error


@dataclass(frozen=True)
class ImageFiles:
    """A stand-in for a tensor [samples, 3, size, size] of standardised images that would not fit in memory.

    It has the methods of a tensor that the simulator uses: `shape`, ``len``, indices of samples, `to`, `split`. An
    image is resized until its shorter side is size · 256 / 224, and the square in its middle is cut out.

    Args:
        paths: the files, JPEG or PNG.
        size: sides of the squares, in pixels.
        workers: number of processes that read ahead; 0 reads in this process. Results do not depend on it.
        device, dtype, memory_format: device, dtype and layout of the batches.
    """

    paths: tuple[Path, ...]
    size: int = 224
    workers: int = field(default_factory=lambda: min(_num_cores(), MAX_WORKERS))
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return torch.Size((len(self.paths), 3, self.size, self.size))

    @property
    def ndim(self) -> int:
        """The number of the tensor's dimensions."""
        return 4

    def is_floating_point(self) -> bool:
        """True, as the batches are always floating-point."""
        return True

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> ImageFiles:
        """The files at a 1-D tensor of indices."""
        return replace(self, paths=tuple(self.paths[index] for index in indices.tolist()))

    def to(self, other: Tensor | torch.device) -> ImageFiles:
        """The same files with batches on the device of `other`, and in its dtype if it is a tensor."""
        if isinstance(other, torch.device):
            return replace(self, device=other)
        return replace(self, device=other.device, dtype=other.dtype)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> ImageFiles:
        """The same files with batches in this layout."""
        return replace(self, memory_format=memory_format)

    def fingerprint(self) -> Tensor:
        """A digest of 32 bytes, uint8, of the name, the folder's name and the size of every file."""
        listing = "\n".join(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in self.paths)
        return torch.frombuffer(bytearray(hashlib.sha256(listing.encode()).digest()), dtype=torch.uint8)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in batches of `size`; the last batch may be smaller."""
        return self.batches((indices, None) for indices in torch.arange(len(self), device=CPU).split(size))

    def batches(
        self, requests: Iterable[Request], augment: RandomResizedCropFlip | None = None, ahead: int = 2
    ) -> Iterator[Tensor]:
        """The images [B, 3, size, size] of each request, in the order of the requests.

        Args:
            requests: requests, possibly endless, which are taken while batches are read ahead.
            augment: makes the squares from the images in place of resizing, with the numbers in the requests.
            ahead: number of batches that are read ahead at least.

        Raises:
            FileError: a file is missing, too large, in another format or damaged; the message names it.
        """
        loader = DataLoader(
            _Reader(self.paths, self.size, augment),
            sampler=requests,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=max(-(-ahead // self.workers), 1) if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # leaves the default generator alone
        )
        for images in loader:
            if isinstance(images, str):
                raise FileError(images)
            yield self._standardise(images)

    def _standardise(self, images: Tensor) -> Tensor:
        values = images.to(self.device, non_blocking=True).to(self.dtype)
        mean, std = (torch.tensor(v, dtype=self.dtype, device=self.device).view(3, 1, 1) for v in (MEAN, STD))
        return values.div_(255).sub_(mean).div_(std).contiguous(memory_format=self.memory_format)


@dataclass(frozen=True)
class _Reader(TorchDataset):
    """The work of a worker process: it makes images [B, 3, size, size], uint8, or an error message of a request."""

    paths: Sequence[Path]
    size: int
    augment: RandomResizedCropFlip | None

    def __getitem__(self, request: Request) -> Tensor | str:
        from torchvision.transforms.functional import pil_to_tensor

        indices, draws = request
        seeds = [0] * len(indices) if draws is None else draws.flatten().tolist()
        images = []
        for index, seed in zip(indices.tolist(), seeds, strict=True):
            path = self.paths[index]
            try:
                images.append(pil_to_tensor(self._square(path, seed)))
            except (FileError, OSError) as error:
                return str(error)
        return torch.stack(images)

    def _square(self, path: Path, seed: int) -> Any:
        from torchvision.transforms.functional import center_crop, resize

        image = read_image(path)
        if self.augment is not None:
            return self.augment.crop(image, seed, (self.size, self.size))
        return center_crop(resize(image, [round(self.size * RESIZED_PER_CROPPED)]), [self.size])


def read_image(path: Path) -> Any:
    """Reads a JPEG or PNG file as a `PIL.Image.Image` of colours.

    PIL knows some forty formats, and starts other programs for some of them; it is let try these two alone.

    Raises:
        FileError: the file is missing, too large, of another format, or damaged; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = read_within(path, MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"it says that it has {file.width} × {file.height} pixels")
                return file.convert("RGB")
    except Exception as error:  # depending on the damaged byte one of a dozen types
        reason = "it is neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise FileError(f"{path} cannot be read as an image ({shortened(reason)}); get the data set again") from error


def _num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts(worker: int) -> None:
    """Makes a worker ignore Ctrl-C, which reaches it too: the simulator decides, and may still need the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
