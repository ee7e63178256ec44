"""Each agent's own stream of batches, a pure function of (seed, agent, step)."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gut_fast.arguments import as_integer
from gut_fast.data import Augmentation, RandomResizedCropFlip
from gut_fast.data.image_files import Request
from gut_fast.randomness import derive_seed
from gut_fast.simulation.samples import FileSamples, LoadedSamples, Samples, TensorSamples

__all__ = ["Batches"]

STEPS_PER_BLOCK = 64
"""The number of steps whose random numbers are drawn at once."""

MAX_EPOCHS_PER_BATCH = 100
"""The largest ratio of the batch size to an agent's samples; a larger batch is a slip, and would fill the memory."""


class Selection(NamedTuple):
    """The samples of a step, and the random numbers of their augmentation."""

    indices: Tensor
    """The indices of the samples, [N, B]."""
    draws: Tensor | None
    """The numbers that the augmentation has drawn, [N, B, ...], or None."""


Select = Callable[[int], Selection]
"""Gives the selection of a step."""

Read = Callable[[int], tuple[Any, Selection]]
"""Gives the batch [N, B, ...] of a step and its selection, without the draws if reading has used them."""


class Batches:
    """Batches for all agents at once.

    Agent i goes through its samples epoch after epoch; the order in epoch e is a permutation drawn from a generator
    seeded by (seed, i, e). Step t takes the positions t·B … (t + 1)·B − 1 of this endless stream, so a batch may cross
    the border of two epochs, and an agent with fewer than B samples sees some more than once in a batch.

    Random numbers are drawn on the CPU, so that all devices see the same batches, and for many steps at once, so that
    most batches take a few kernels and no wait for the device. Images in files are read by worker processes, some steps
    ahead, and other samples that are not in memory by as many processes as asked for.

    Args:
        samples: all samples. If images lie in channels-last memory, so do their batches.
        parts: one index tensor per agent.
        batch_size: samples per agent and step, B.
        seed: seed of the orders.
        augment: changes the inputs of each batch, which must be pairs (inputs, targets), with random numbers that are
            a function of (seed, agent, step) too.
        agents: numbers of the agents that batches are made for; None is all.

    Raises:
        TypeError, ValueError: the batch size or seed is bad, a part is empty, not 1-D, not integer or out of range, or
            a batch has more than 100 times the samples of the agent that has most.
    """

    def __init__(
        self,
        samples: Samples,
        parts: Sequence[Tensor],
        batch_size: int,
        seed: int = 0,
        augment: Augmentation | None = None,
        agents: range | None = None,
    ) -> None:
        self.batch_size = as_integer(batch_size, "batch_size", minimum=1)
        self.seed = as_integer(seed, "seed", minimum=0)
        self.parts = [_checked_part(part, agent, len(samples)) for agent, part in enumerate(parts)]
        largest = max(map(len, self.parts), default=0)
        if batch_size > MAX_EPOCHS_PER_BATCH * largest > 0:
            raise ValueError(
                f"batch_size={batch_size} is more than {MAX_EPOCHS_PER_BATCH} times the samples of any agent; "
                f"the largest part has {largest}"
            )
        self.agents = range(len(self.parts)) if agents is None else agents
        self.augment = augment
        self.samples = samples
        self._start()
        if augment is not None and not isinstance(samples, FileSamples):
            _check_augmentable(samples)

    def _start(self) -> None:
        """Makes the reader and forgets the block of random numbers."""
        self._block_start = -1
        self._indices = self._draws = torch.empty(0, device="cpu")
        samples = self.samples
        # A strong reference would be a cycle, which keeps samples and worker processes alive until garbage collection.
        itself: Any = weakref.proxy(self)
        select: Select = partial(Batches.select, itself)
        self._device = samples.device if isinstance(samples, TensorSamples) else torch.device("cpu")
        self._read: Read
        if isinstance(samples, TensorSamples):
            self._read = partial(_gather, samples, select)
        elif isinstance(samples, FileSamples):
            self._read = _FilesAhead(samples, select, len(self.agents), self.augment)
        else:
            self._read = _SamplesAhead(cast(LoadedSamples, samples), select)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_read", "_block_start", "_indices", "_draws", "_device")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, step: int) -> Any:
        """The batches of all agents in a step: tensors [N, B, ...] in the structure of a sample."""
        batch, (_, draws) = self._read(step)
        if self.augment is not None and draws is not None:
            inputs, targets = batch
            return self.augment(inputs, draws.to(inputs.device)), targets
        return batch

    def indices(self, step: int) -> Tensor:
        """The indices [N, B] of the samples of a step, on the samples' device, or on the CPU for samples in files."""
        return self.select(step).indices

    def select(self, step: int) -> Selection:
        """The selection of a step."""
        start = step - step % STEPS_PER_BLOCK
        if start != self._block_start:
            positions = (start * self.batch_size, (start + STEPS_PER_BLOCK) * self.batch_size)
            self._indices = self._block([self._stream(agent, *positions) for agent in self.agents])
            if self.augment is not None:
                self._draws = self._block([self._draw(self.augment, agent, start) for agent in self.agents])
            self._block_start = start
        return Selection(self._indices[step - start], None if self.augment is None else self._draws[step - start])

    def _block(self, agents: Sequence[Tensor]) -> Tensor:
        """The agents' tensors [steps · B, ...] as one tensor [steps, N, B, ...] on the device of the samples."""
        stacked, device = torch.stack(list(agents)), self._device
        by_step = stacked.view(len(agents), STEPS_PER_BLOCK, self.batch_size, *stacked.shape[2:]).transpose(0, 1)
        block = by_step.contiguous()
        # A copy from pinned memory does not wait for the device.
        return block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block.to(device)

    def _draw(self, augment: Augmentation, agent: int, start: int) -> Tensor:
        """The random numbers for the agent's samples in the block of steps that begins at `start`."""
        generator = torch.Generator().manual_seed(derive_seed("augment", self.seed, agent, start))
        return augment.draw(STEPS_PER_BLOCK * self.batch_size, generator)

    def _stream(self, agent: int, start: int, stop: int) -> Tensor:
        """The positions start … stop − 1 of the agent's stream of samples."""
        part = self.parts[agent]
        first_epoch, last_epoch = start // len(part), (stop - 1) // len(part)
        orders = torch.cat([self._order(agent, epoch) for epoch in range(first_epoch, last_epoch + 1)])
        skipped = first_epoch * len(part)
        return part[orders[start - skipped : stop - skipped]]

    def _order(self, agent: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, agent, epoch))
        return torch.randperm(len(self.parts[agent]), generator=generator, device="cpu")


def _gather(samples: TensorSamples, select: Select, step: int) -> tuple[Any, Selection]:
    """A `Read` of samples in memory."""
    selection = select(step)
    return samples.take(selection.indices), selection


class _Ahead(ABC):
    """A `Read` that reads some steps ahead; any step but the next one starts the reading anew."""

    def __init__(self, select: Select) -> None:
        self._select, self._next_step = select, -1
        self._selected: deque[Selection] = deque()

    def __call__(self, step: int) -> tuple[Any, Selection]:
        """The batch [N, B, ...] of a step and its selection."""
        if step != self._next_step:
            self._selected = deque()
            self._begin(step)
        self._next_step = -1  # an error while reading starts the same step anew
        batch = self._next()
        selection = self._selected.popleft()
        self._next_step = step + 1
        return self._finish(batch, selection)

    @abstractmethod
    def _begin(self, step: int) -> None:
        """Starts reading at a step."""

    @abstractmethod
    def _next(self) -> Any:
        """The samples [N · B, ...] of the next step."""

    @abstractmethod
    def _finish(self, batch: Any, selection: Selection) -> tuple[Any, Selection]:
        """The batch [N, B, ...] of these samples, and the selection without draws that have been used."""


class _FilesAhead(_Ahead):
    """A reader of image files."""

    steps_ahead = 2

    def __init__(self, samples: FileSamples, select: Select, num_agents: int, augment: Augmentation | None) -> None:
        super().__init__(select)
        self._samples, self._num_agents = samples, num_agents
        self._crop = augment if isinstance(augment, RandomResizedCropFlip) else None

    def _begin(self, step: int) -> None:
        requests = _requests(self._select, step, self._selected, with_draws=self._crop is not None)
        self._images = self._samples.files.batches(requests, self._crop, self.steps_ahead * self._num_agents)

    def _next(self) -> Tensor:
        return torch.cat([next(self._images) for _ in range(self._num_agents)])

    def _finish(self, batch: Any, selection: Selection) -> tuple[Any, Selection]:
        indices, draws = selection
        labels = self._samples.labels
        targets = labels[indices.to(labels.device)]
        return (batch.unflatten(0, indices.shape), targets), Selection(indices, None if self._crop else draws)


class _SamplesAhead(_Ahead):
    """A reader of a data set."""

    def __init__(self, samples: LoadedSamples, select: Select) -> None:
        super().__init__(select)
        self._samples = samples

    def _begin(self, step: int) -> None:
        self._batches = self._samples.read(self._requests(step))

    def _requests(self, step: int) -> Iterator[list[int]]:
        while True:
            selection = self._select(step)
            self._selected.append(selection)
            yield selection.indices.flatten().tolist()
            step += 1

    def _next(self) -> Any:
        return next(self._batches)

    def _finish(self, batch: Any, selection: Selection) -> tuple[Any, Selection]:
        return tree_map(lambda tensor: tensor.unflatten(0, selection.indices.shape), batch), selection


def _requests(select: Select, step: int, selected: deque[Selection], *, with_draws: bool) -> Iterator[Request]:
    """The requests of each agent in this step and all later ones; their selections are appended to `selected`."""
    while True:
        indices, draws = select(step)
        selected.append(Selection(indices, draws))
        yield from zip(indices, draws if with_draws and draws is not None else [None] * len(indices), strict=True)
        step += 1


def _check_augmentable(samples: Samples) -> None:
    """Raises ValueError unless the samples are pairs of a tensor of inputs and targets in memory."""
    tensors = samples.tensors if isinstance(samples, TensorSamples) else None
    if not (isinstance(tensors, tuple) and len(tensors) == 2 and isinstance(tensors[0], Tensor)):
        raise ValueError(
            "augment= is for pairs (inputs, targets) of tensors in memory and for image files; a torch data set can "
            "change its samples itself"
        )


def _checked_part(part: Tensor, agent: int, num_samples: int) -> Tensor:
    part = torch.as_tensor(part, device="cpu")
    if part.ndim != 1 or part.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"agent {agent}'s part must be a 1-D tensor of indices, got shape {tuple(part.shape)} of {part.dtype}"
        )
    if len(part) == 0:
        raise ValueError(f"agent {agent} has no samples")
    if not 0 <= int(part.min()) <= int(part.max()) < num_samples:
        raise ValueError(
            f"agent {agent}'s part has indices {int(part.min())} … {int(part.max())}, "
            f"but there are {num_samples} samples"
        )
    return part.to(torch.int64)
