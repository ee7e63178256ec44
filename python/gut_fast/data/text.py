"""Text in folders, one for each agent: bytes are tokens, a sample is a run of them with the byte after each as target.

Debian's manual pages in eight languages are such text, which differs between agents as natural data do.
"""

from __future__ import annotations

import gzip
import os
import random
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gut_fast.arguments import as_integer, as_number
from gut_fast.data.datasets import Dataset, hold_out
from gut_fast.data.sources import FOLDER_VARIABLE
from gut_fast.files import FileError, read_within

__all__ = ["LANGUAGES", "manual_pages", "text_folders"]

VOCABULARY = 256

LANGUAGES = {
    "en": "manpages",
    "de": "manpages-de",
    "es": "manpages-es",
    "fr": "manpages-fr",
    "ja": "manpages-ja",
    "nl": "manpages-nl",
    "pl": "manpages-pl",
    "ru": "manpages-ru",
}
"""Debian's packages of manual pages, by language."""

DPKG_INFO = Path("/var/lib/dpkg/info")
"""The folder in which dpkg lists the files of each package."""

MAX_LIST_BYTES = 16 << 20
MANUAL_LENGTH, MANUAL_TEST_FRACTION, MANUAL_BYTES = 64, 1 / 64, 1 << 20
"""The length of samples of the manual pages, the share of test samples, and the most bytes of a language."""

INSTALL = f"apt-get install {' '.join(LANGUAGES.values())}"


def text_folders(
    path: str | Path, *, length: int = 64, test_fraction: float = 0.1, seed: int = 0, max_bytes: int = 4 << 20
) -> Dataset:
    """The text in each folder of `path`, in the order of their names: a folder is one agent's data, of any encoding.

    All files in a folder and below it are its text, one after the other, in an order that the seed draws; those that
    end in ``.gz`` are decompressed. Symbolic links and names with a dot in front are left out. The text is cut into
    samples: inputs are `length` bytes as numbers 0 … 255, targets the `length` bytes that are one place further on. The
    seed draws the test samples, the same share of each folder. ``Simulator(model, topology, data=text_folders(path),
    ...)`` gives agent i the training samples of folder i; the test samples of all folders are for all agents.

    Args:
        path: the folder of the agents' folders.
        length: bytes of a sample, the context of a language model.
        test_fraction: share of each folder's samples that are test samples, rounded to whole samples.
        seed: draws the order of the files and the test samples.
        max_bytes: the most bytes of text that are taken of a folder; what goes beyond is left out.

    Returns:
        A `Dataset` of 256 classes, with `train_groups`, the number of each sample's folder, and `group_names`.

    Raises:
        TypeError, ValueError: an argument is bad.
        OSError: a file or folder cannot be read, or there is none.
        FileError: there are no folders, one has too little text for a training and a test sample, or a file that ends
            in ``.gz`` is damaged.
    """
    root = Path(path)
    with os.scandir(root) as entries:
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    names = sorted(name for name in folders if not name.startswith("."))
    if not names:
        raise FileError(
            f"{root} has no folders; expected a folder of text for each agent in it; symbolic links are left out"
        )
    files = {name: _files_below(root / name) for name in names}
    return _dataset(root.name, str(root), files, length, test_fraction, seed, max_bytes)


def manual_pages(folder: str | Path | None = None, seed: int = 0) -> Dataset:
    """Debian's manual pages in eight languages, a folder of text each: English, German, Spanish, French, Japanese,
    Dutch, Polish and Russian, at most 1 MiB of each, in samples of 64 bytes, of which one in 64 is a test sample.

    Without a folder the pages are those of the installed packages `LANGUAGES`. `gut_fast.data.load` explains the
    arguments; the folder has the folders en, de, es, fr, ja, nl, pl and ru, or has them in a folder called manpages.

    Raises:
        FileNotFoundError: pages are missing; the message names them and says how to get them.
        FileError: as `text_folders`.
    """
    place = _manual_folder(folder)
    if place is not None:
        files, where = {name: _files_below(place / name) for name in LANGUAGES}, str(place)
    else:
        files = {name: _installed(package) for name, package in LANGUAGES.items()}
        where = f"Debian's packages {', '.join(LANGUAGES.values())}"
    return _dataset("manpages", where, files, MANUAL_LENGTH, MANUAL_TEST_FRACTION, seed, MANUAL_BYTES)


def _manual_folder(folder: str | Path | None) -> Path | None:
    """The folder that has one for each language, the given one or else that of GUT_FAST_DATA; None if neither."""
    chosen = os.environ.get(FOLDER_VARIABLE) if folder is None else folder
    if not chosen:
        return None
    root = Path(chosen).expanduser()
    for place in (root, root / "manpages"):
        if all((place / name).is_dir() for name in LANGUAGES):
            return place
    if folder is None:
        return None
    raise FileNotFoundError(
        f"manpages: {root} has no folders {', '.join(LANGUAGES)}; copy text in these languages there, or leave the "
        f"folder out and get the pages by `{INSTALL}`"
    )


def _installed(package: str) -> list[Path]:
    """The manual pages of an installed Debian package."""
    try:
        listed = read_within(DPKG_INFO / f"{package}.list", MAX_LIST_BYTES).decode()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"manpages: the Debian package {package} is not installed; get it by `{INSTALL}`, or name a folder with "
            f"folders {', '.join(LANGUAGES)} of text by folder= (--data-folder) or {FOLDER_VARIABLE}"
        ) from None
    pages = [Path(line) for line in listed.splitlines() if "/man/" in line and Path(line).suffix]
    found = [page for page in pages if _is_file(page)]
    if not found:
        raise FileNotFoundError(
            f"manpages: the package {package} is installed without its pages, which dpkg leaves out where its settings "
            "exclude /usr/share/man, as in small images; get them by "
            f"`apt-get install --reinstall -o DPkg::Options::=--path-include='/usr/share/man/*' {package}`"
        )
    return found


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, without links and hidden ones. Raises OSError for a folder it cannot read."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return [path for path in found if _is_file(path)]


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _dataset(
    name: str,
    where: str,
    files: Mapping[str, Sequence[Path]],
    length: int,
    test_fraction: float,
    seed: int,
    max_bytes: int,
) -> Dataset:
    """The data set of each folder's files. Raises as `text_folders`."""
    length, seed = as_integer(length, "length", minimum=1), as_integer(seed, "seed", minimum=0)
    max_bytes = as_integer(max_bytes, "max_bytes", minimum=1)
    if not 0 < as_number(test_fraction, "test_fraction") < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    texts = {folder: _text(paths, seed, max_bytes) for folder, paths in files.items()}
    samples = []
    for folder, text in texts.items():
        count = max(len(text) - 1, 0) // length
        if not 1 <= round(test_fraction * count) < count:
            raise FileError(
                f"{name}: folder {folder} has {len(text):,} bytes of text in {len(files[folder]):,} files, {count} "
                f"samples of {length} bytes; with test_fraction={test_fraction:g} that is too little for a training "
                "and a test sample; add text, or take a shorter length"
            )
        samples.append(_samples(text, count, length))
    inputs, targets = (torch.cat(parts) for parts in zip(*samples, strict=True))
    sizes = torch.tensor([len(part) for part, _ in samples], device="cpu")
    groups = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
    train, test = hold_out(groups, test_fraction, seed)
    return Dataset(
        name=name,
        num_classes=VOCABULARY,
        train_inputs=inputs[train],
        train_labels=targets[train],
        test_inputs=inputs[test],
        test_labels=targets[test],
        source=f"{where}, {sum(map(len, texts.values())):,} bytes of {sum(map(len, files.values())):,} files",
        augmentation=None,
        train_groups=groups[train],
        group_names=tuple(files),
    )


def _text(paths: Sequence[Path], seed: int, max_bytes: int) -> bytearray:
    """The text of files in an order that the seed draws, cut off after so many bytes."""
    order = sorted(paths)
    random.Random(seed).shuffle(order)
    text = bytearray()
    for path in order:
        if len(text) == max_bytes:
            break
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                text += file.read(max_bytes - len(text))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FileError(f"{path} is no whole gzip file ({error}); remove or replace it") from error
    return text


def _samples(text: bytearray, count: int, length: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of so many samples, int64 [count, length] each."""
    tokens = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    end = count * length
    return tokens[:end].view(count, length), tokens[1 : end + 1].view(count, length)
