"""Samples of any kind, behind one interface: tensors in memory, image files, and torch data sets.

A batch has the structure of a sample: tensors in nested tuples, lists and dicts, with a dimension for the samples in
front.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_map_with_path
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from gut_fast.data import Dataset as LabelledDataset
from gut_fast.data import ImageFiles

__all__ = ["FileSamples", "LoadedSamples", "Samples", "TensorSamples", "given_parts", "joined", "training_and_test"]

Convert = Callable[[Any], Any]
"""Moves a batch to the model's device, floating-point tensors of it into the model's dtype."""


class Samples(ABC):
    """Samples that batches are made of."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Any]:
        """All samples in order, in batches of `size`; the last batch may be smaller."""

    @abstractmethod
    def fingerprint(self) -> list[Tensor]:
        """Tensors that tell these samples from others, as far as that is known without reading them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Samples:
        return self  # samples are never changed


class TensorSamples(Samples):
    """Samples in memory: tensors of equal length in nested tuples, lists and dicts."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors
        self._first: Tensor = tree_leaves(tensors)[0]

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        return self._first.device

    def __len__(self) -> int:
        return len(self._first)

    def take(self, indices: Tensor) -> Any:
        """The samples at indices [N, B], as tensors [N, B, ...], with one kernel for each."""
        return tree_map(lambda tensor: _take(tensor, indices), self.tensors)

    def chunks(self, size: int) -> Iterator[Any]:
        """All samples in order, in batches of `size`; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield tree_map(lambda tensor, start=start: tensor[start : start + size], self.tensors)

    def fingerprint(self) -> list[Tensor]:
        """The samples themselves."""
        leaves: list[Tensor] = tree_leaves(self.tensors)
        return leaves


class FileSamples(Samples):
    """Images in files, and their labels in memory."""

    def __init__(self, files: ImageFiles, labels: Tensor) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.labels)

    def chunks(self, size: int) -> Iterator[Any]:
        """All samples in order, in batches of `size`; the last batch may be smaller."""
        yield from zip(self.files.split(size), self.labels.split(size), strict=True)

    def fingerprint(self) -> list[Tensor]:
        """A digest of the files' names and sizes, and the labels."""
        return [self.files.fingerprint(), self.labels]


class LoadedSamples(Samples):
    """Samples of a map-style data set, which are read when they are needed.

    Args:
        dataset: gives sample i as ``dataset[i]``; the samples of a batch must have tensors of equal shapes.
        convert: moves a batch to the model.
        workers: number of processes that read batches ahead; 0 reads in this process. Random numbers that the data set
            draws from torch's default generator are part of the run, and repeated by a resumed one, with 0 only.
    """

    def __init__(self, dataset: Any, convert: Convert, workers: int) -> None:
        self.dataset, self._convert, self.workers = dataset, convert, workers

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, requests: Iterable[Sequence[int]]) -> Iterator[Any]:
        """A batch of the samples of each request, in order; `requests` may be endless, and is taken a bit ahead."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=requests,  # type: ignore[arg-type]
            collate_fn=_collate,
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # leaves the default generator alone
        )
        for batch in loader:
            yield self._convert(batch)

    def chunks(self, size: int) -> Iterator[Any]:
        """All samples in order, in batches of `size`; the last batch may be smaller."""
        return self.read([list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)])

    def fingerprint(self) -> list[Tensor]:
        """The number of samples."""
        return [torch.tensor([len(self)], device="cpu")]


def training_and_test(data: Any, test_data: Any) -> tuple[Any, Any]:
    """The training and the test samples that the simulator's arguments stand for, test samples None if there are none.

    A `gut_fast.data.Dataset` has both.
    """
    if not isinstance(data, LabelledDataset):
        training = data
    else:
        training = (data.train_inputs, data.train_labels)
        test_data = (data.test_inputs, data.test_labels) if test_data is None else test_data
    if isinstance(test_data, LabelledDataset):
        test_data = (test_data.test_inputs, test_data.test_labels)
    return training, test_data


def joined(data: Any, what: str, like: Tensor, *, channels_last: bool, workers: int) -> tuple[Samples, list[Tensor]]:
    """The samples of data sets, one after the other, and each one's indices.

    Args:
        data: one data set, or a list of data sets.
        what: names the data in messages.
        like: a tensor on the model's device, of its dtype.
        channels_last: whether images of pairs (inputs, targets) lie in channels-last memory.
        workers: number of processes that read samples which are not in memory.

    Raises:
        TypeError, ValueError: there is something in the data that no model takes; the message says where.
    """
    given = data if isinstance(data, list) else [data]
    if not given:
        raise ValueError(f"{what} is an empty list; give a data set for each agent")
    sets = [_arrays(each, f"{what}[{i}]" if isinstance(data, list) else what) for i, each in enumerate(given)]
    convert = _converter(like, channels_last)
    sizes = [_length(each, what) for each in sets]
    parts = list(torch.arange(sum(sizes), device="cpu").split(sizes))
    loaded = [isinstance(each, _Loaded) for each in sets]
    if any(loaded):
        if not all(loaded):
            raise TypeError(f"{what} has tensors for some agents and data sets for others; give one kind to all")
        datasets = [each.dataset for each in sets]
        dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
        convert(_collate([dataset[0], dataset[0]]))
        return LoadedSamples(dataset, convert, workers), parts
    if len(sets) == 1 and isinstance(sets[0], tuple) and isinstance(sets[0][0], ImageFiles):
        inputs, labels = convert(sets[0])
        return FileSamples(inputs, labels), parts
    try:
        together = sets[0] if len(sets) == 1 else tree_map(lambda *rows: torch.cat(rows), *sets)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the agents' samples in {what} differ: {error}") from error
    return TensorSamples(convert(together)), parts


class _Loaded:
    """A data set whose samples are read one by one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


def _arrays(data: Any, what: str) -> Any:
    """Tensors in nested tuples and dicts, or a data set that is read one by one."""
    if isinstance(data, IterableDataset):
        raise TypeError(f"{what} is an IterableDataset, which has no sample number i; give a map-style data set")
    if isinstance(data, TensorDataset):
        return data.tensors
    is_tree = isinstance(data, (Tensor, np.ndarray, tuple, dict))
    if isinstance(data, TorchDataset) or (not is_tree and hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return _Loaded(data)
    if not is_tree:
        raise TypeError(
            f"{what} must be tensors (a tensor, a tuple or a dict of them), a torch.utils.data.Dataset, a "
            f"gut_fast.data.Dataset, or a list with one of these for each agent; got {type(data).__name__}"
        )
    return tree_map_with_path(
        lambda path, leaf: _tensor(leaf, f"{what}{keystr(path)}"), data, is_leaf=lambda leaf: isinstance(leaf, list)
    )


def _tensor(leaf: Any, where: str) -> Any:
    """A tensor of a leaf. Raises TypeError if it is none."""
    if isinstance(leaf, (Tensor, ImageFiles)):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind in "USO":
        example = array.flat[0] if array.size else leaf
        raise TypeError(
            f"{where} holds {str(example)!r}, which is no number; labels are class numbers 0 … C − 1, for example "
            "torch.tensor([classes.index(label) for label in labels]), texts are numbers of tokens"
        )
    return torch.as_tensor(array)


def _length(data: Any, what: str) -> int:
    """The number of samples. Raises ValueError if there are none, or if tensors differ in it."""
    if isinstance(data, _Loaded):
        lengths = {"": len(data.dataset)}
    else:
        leaves, _ = tree_flatten_with_path(data)
        lengths = {keystr(path): len(leaf) if leaf.ndim else 0 for path, leaf in leaves}
    if not lengths or 0 in lengths.values():
        raise ValueError(f"{what} has no samples")
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{what}{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"all tensors of {what} need the same number of samples, but {each}")
    return next(iter(lengths.values()))


def _converter(like: Tensor, channels_last: bool) -> Convert:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def move(leaf: Any, dtype: torch.dtype) -> Any:
        if isinstance(leaf, ImageFiles):
            return leaf.to(like).contiguous(memory_format=layout)
        return leaf.to(like.device, dtype if leaf.is_floating_point() else leaf.dtype, non_blocking=True)

    def convert(batch: Any) -> Any:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            if channels_last:
                raise ValueError("channels_last=True is for pairs (images, targets), the samples are others")
            return tree_map(lambda leaf: move(leaf, like.dtype).contiguous(), batch)
        inputs = tree_map(lambda leaf: move(leaf, like.dtype), batch[0])
        # The loss gets outputs of half precision in float32, so it gets such targets too.
        targets = tree_map(lambda leaf: move(leaf, torch.promote_types(like.dtype, torch.float32)), batch[1])
        if channels_last and getattr(inputs, "ndim", 0) != 4:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"channels_last=True is for images [samples, C, H, W], the inputs have shape {shape}")
        return tree_map(lambda leaf: leaf.contiguous(memory_format=layout), inputs), targets

    return convert


def _collate(samples: list[Any]) -> Any:
    """The batch of some samples. Raises TypeError with our own words if they hold something that is no number."""
    leaves, _ = tree_flatten_with_path(samples[0])
    for path, leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, np.number, np.ndarray)):
            _tensor(leaf, f"a sample{keystr(path)}")
            raise TypeError(f"a sample{keystr(path)} is {type(leaf).__name__}; give tensors, arrays or numbers")
    return default_collate(samples)


def _take(samples: Tensor, indices: Tensor) -> Tensor:
    """The samples at indices [N, B], as [N, B, ...], in one kernel."""
    is_channels_last = (
        samples.ndim == 4 and samples.is_contiguous(memory_format=torch.channels_last) and not samples.is_contiguous()
    )
    if is_channels_last:
        return _take(samples.permute(0, 2, 3, 1), indices).permute(0, 1, 4, 2, 3)
    return samples.index_select(0, indices.flatten()).view(*indices.shape, *samples.shape[1:])


def _ignore_interrupts(worker: int) -> None:
    """Makes a worker ignore Ctrl-C, which reaches it too: the simulator decides, and may still need the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def given_parts(data: Any, parts: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """The parts of the agents, those of a data set that has its own if none are given; None for a list of data sets.

    Raises:
        ValueError: both the data and the arguments have parts, or neither.
    """
    if isinstance(data, list):
        if parts is not None:
            raise ValueError(
                "data is a list with a data set for each agent, and parts= would divide it again; leave it out"
            )
        return None
    if parts is None and isinstance(data, LabelledDataset):
        parts = data.parts
    if parts is None:
        raise ValueError(
            "data is one data set for all agents; divide it by parts=, for example "
            "gut_fast.data.partition.iid(labels, N), or give a list with a data set for each agent"
        )
    return parts
