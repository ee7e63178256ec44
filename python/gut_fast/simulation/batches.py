"""Each agent's own stream of batches, a pure function of (seed, agent, step)."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gut_fast.agents import StackedModule
from gut_fast.arguments import as_integer
from gut_fast.data import Augmentation, Dataset, ImageFiles, Inputs, RandomResizedCropFlip
from gut_fast.data.image_files import Request
from gut_fast.randomness import derive_seed

__all__ = ["Batches", "like_model"]

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

Read = Callable[[int], tuple[Tensor, Selection]]
"""Gives the samples [N, B, ...] of a step and their selection, without the draws if reading has used them."""


def like_model(data: Dataset, stacked: StackedModule, channels_last: bool) -> Dataset:
    """The data on the model's device, floating-point inputs in its dtype, images in channels-last memory if asked.

    Raises:
        ValueError: `channels_last` is set and the inputs are not images.
    """
    if channels_last and data.train_inputs.ndim != 4:
        shape = tuple(data.train_inputs.shape)
        raise ValueError(f"channels_last=True is for images [samples, C, H, W], the inputs have shape {shape}")

    def move(inputs: Inputs) -> Inputs:
        moved = inputs.to(stacked.values if inputs.is_floating_point() else stacked.device)
        return moved.contiguous(memory_format=torch.channels_last) if channels_last else moved.contiguous()

    return replace(
        data,
        train_inputs=move(data.train_inputs),
        train_labels=data.train_labels.to(stacked.device),
        test_inputs=move(data.test_inputs),
        test_labels=data.test_labels.to(stacked.device),
    )


class Batches:
    """Batches for all agents at once.

    Agent i goes through its samples epoch after epoch; the order in epoch e is a permutation drawn from a generator
    seeded by (seed, i, e). Step t takes the positions t·B … (t + 1)·B − 1 of this endless stream, so a batch may cross
    the border of two epochs, and an agent with fewer than B samples sees some more than once in a batch.

    Random numbers are drawn on the CPU, so that all devices see the same batches, and for many steps at once, so that
    most batches take a few kernels and no wait for the device. Images in files are read by worker processes, some steps
    ahead.

    Args:
        inputs, targets: all samples, [samples, ...], on the device of the model. If images lie in channels-last memory,
            so do their batches.
        parts: one index tensor per agent.
        batch_size: samples per agent and step, B.
        seed: seed of the orders.
        augment: changes the inputs of each batch, with random numbers that are a function of (seed, agent, step) too.
        agents: numbers of the agents that batches are made for; None is all.

    Raises:
        TypeError, ValueError: the batch size or seed is bad, a part is empty, not 1-D, not integer or out of range, or
            a batch has more than 100 times the samples of the agent that has most.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: Tensor,
        parts: Sequence[Tensor],
        batch_size: int,
        seed: int = 0,
        augment: Augmentation | None = None,
        agents: range | None = None,
    ) -> None:
        self.batch_size = as_integer(batch_size, "batch_size", minimum=1)
        self.seed = as_integer(seed, "seed", minimum=0)
        self.parts = [_checked_part(part, agent, len(inputs)) for agent, part in enumerate(parts)]
        largest = max(map(len, self.parts), default=0)
        if batch_size > MAX_EPOCHS_PER_BATCH * largest > 0:
            raise ValueError(
                f"batch_size={batch_size} is more than {MAX_EPOCHS_PER_BATCH} times the samples of any agent; "
                f"the largest part has {largest}"
            )
        self.agents = range(len(self.parts)) if agents is None else agents
        self.augment = augment
        self._targets = targets
        self._block_start = -1
        self._indices = self._draws = torch.empty(0, device="cpu")
        # A strong reference would be a cycle, which keeps samples and worker processes alive until garbage collection.
        itself: Any = weakref.proxy(self)
        select: Select = partial(Batches.select, itself)
        if isinstance(inputs, ImageFiles):
            self._device = torch.device("cpu")
            self._read: Read = _ReadAhead(inputs, select, len(self.agents), augment)
        else:
            self._device = inputs.device
            self._read = partial(_gather, inputs, select)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The inputs [N, B, ...] and targets [N, B, ...] of a step."""
        inputs, (indices, draws) = self._read(step)
        targets = _take(self._targets, indices.to(self._targets.device))
        if self.augment is not None and draws is not None:
            inputs = self.augment(inputs, draws.to(inputs.device))
        return inputs, targets

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


def _gather(samples: Tensor, select: Select, step: int) -> tuple[Tensor, Selection]:
    """A `Read` of samples in memory."""
    selection = select(step)
    return _take(samples, selection.indices), selection


class _ReadAhead:
    """A `Read` of files, which are read some steps ahead; any step but the next one starts the reading anew."""

    steps_ahead = 2

    def __init__(self, files: ImageFiles, select: Select, num_agents: int, augment: Augmentation | None) -> None:
        self._files, self._select, self._num_agents = files, select, num_agents
        self._crop = augment if isinstance(augment, RandomResizedCropFlip) else None
        self._next_step = -1

    def __call__(self, step: int) -> tuple[Tensor, Selection]:
        """The images [N, B, C, H, W] of a step and their selection."""
        if step != self._next_step:
            self._selected: deque[Selection] = deque()
            requests = _requests(self._select, step, self._selected, with_draws=self._crop is not None)
            self._images = self._files.batches(requests, self._crop, self.steps_ahead * self._num_agents)
        self._next_step = -1  # an error while reading starts the same step anew
        images = torch.cat([next(self._images) for _ in range(self._num_agents)])
        indices, draws = self._selected.popleft()
        self._next_step = step + 1
        return images.unflatten(0, indices.shape), Selection(indices, None if self._crop else draws)


def _requests(select: Select, step: int, selected: deque[Selection], *, with_draws: bool) -> Iterator[Request]:
    """The requests of each agent in this step and all later ones; their selections are appended to `selected`."""
    while True:
        indices, draws = select(step)
        selected.append(Selection(indices, draws))
        yield from zip(indices, draws if with_draws and draws is not None else [None] * len(indices), strict=True)
        step += 1


def _take(samples: Tensor, indices: Tensor) -> Tensor:
    """The samples at indices [N, B], as [N, B, ...], in one kernel."""
    is_channels_last = (
        samples.ndim == 4 and samples.is_contiguous(memory_format=torch.channels_last) and not samples.is_contiguous()
    )
    if is_channels_last:
        return _take(samples.permute(0, 2, 3, 1), indices).permute(0, 1, 4, 2, 3)
    return samples.index_select(0, indices.flatten()).view(*indices.shape, *samples.shape[1:])


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
