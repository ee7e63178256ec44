"""Each agent's own stream of batches, a pure function of (seed, agent, step)."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gut_fast.data import Augmentation, ImageFiles, Inputs, RandomResizedCropFlip
from gut_fast.data.image_files import Request
from gut_fast.simulation.randomness import derive_seed

__all__ = ["Batches"]

STEPS_PER_BLOCK = 64

Plan = Callable[[int], tuple[Tensor, Tensor | None]]
"""Of a step: the indices [N, B] of its samples, and what its augmentation has drawn, [N, B, ...]."""

Read = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]
"""Of a step: its samples [N, B, ...], and its plan."""

MAX_EPOCHS_PER_BATCH = 100
"""No agent sees its samples more often in one step; a larger batch is a slip, and would fill the memory."""


class Batches:
    """Batches for all agents at once.

    Agent i goes through its samples epoch after epoch; the order in epoch e is a permutation drawn from a generator
    seeded by (seed, i, e). Step t takes the positions t·B … (t + 1)·B − 1 of that endless stream, so a batch may cross
    the border of two epochs, and an agent with fewer than B samples sees some more than once in a batch.

    Random numbers are drawn on the CPU, so that all devices see the same batches, for many steps at once; between, a
    batch is a few kernels and no wait for the device.

    Images that stay in files are read by worker processes, some steps ahead of the one asked for.

    Args:
        inputs, targets: all samples, [samples, ...], on the device of the model. Batches of images that lie in
            channels-last memory do so too.
        parts: one index tensor per agent.
        batch_size: B.
        seed: of the orders.
        augment: changes the inputs of each batch, with random numbers that are a function of (seed, agent, step) too.
        agents: numbers of those that batches are made for; None is all.

    Raises:
        TypeError, ValueError: a bad batch size or seed, a part that is empty, not 1-D, not integer or out of range, or
            a batch of more than 100 times the samples of the agent that has most.
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
        for name, value, minimum in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        self.parts = [_checked_part(part, agent, len(inputs)) for agent, part in enumerate(parts)]
        largest = max(map(len, self.parts), default=0)
        if batch_size > MAX_EPOCHS_PER_BATCH * largest > 0:
            raise ValueError(
                f"batch_size={batch_size} is more than {MAX_EPOCHS_PER_BATCH} times the samples of any agent; "
                f"the largest part has {largest}"
            )
        self.agents = range(len(self.parts)) if agents is None else agents
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self._targets = targets
        self._block_start = -1
        self._indices = self._draws = torch.empty(0, device="cpu")
        # Weak, or in a circle samples and worker processes would live on until the garbage collector comes by.
        itself: Any = weakref.proxy(self)
        plan: Plan = partial(Batches._plan, itself)
        if isinstance(inputs, ImageFiles):
            self._device = torch.device("cpu")
            self._read: Read = _ReadAhead(inputs, plan, len(self.agents), augment)
        else:
            self._device = inputs.device
            self._read = partial(_gather, inputs, plan)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, B, ...] and targets [N, B, ...] of a step."""
        inputs, indices, draws = self._read(step)
        targets = _take(self._targets, indices.to(self._targets.device))
        if self.augment is not None and draws is not None:
            inputs = self.augment(inputs, draws.to(inputs.device))
        return inputs, targets

    def indices(self, step: int) -> Tensor:
        """Indices [N, B] of the samples of a step, on the device of the samples; the CPU where they are in files."""
        return self._plan(step)[0]

    def _plan(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Indices [N, B] of a step, and what its augmentation has drawn, [N, B, ...]."""
        start = step - step % STEPS_PER_BLOCK
        if start != self._block_start:
            positions = (start * self.batch_size, (start + STEPS_PER_BLOCK) * self.batch_size)
            self._indices = self._block([self._stream(agent, *positions) for agent in self.agents])
            if self.augment is not None:
                self._draws = self._block([self._draw(self.augment, agent, start) for agent in self.agents])
            self._block_start = start
        return self._indices[step - start], None if self.augment is None else self._draws[step - start]

    def _block(self, agents: Sequence[Tensor]) -> Tensor:
        """One tensor [steps, N, B, ...] of each agent's [steps · B, ...], on its way to the device of the samples."""
        stacked, device = torch.stack(list(agents)), self._device
        by_step = stacked.view(len(agents), STEPS_PER_BLOCK, self.batch_size, *stacked.shape[2:]).transpose(0, 1)
        block = by_step.contiguous()
        # From pinned memory, or the host would wait for the device.
        return block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block.to(device)

    def _draw(self, augment: Augmentation, agent: int, start: int) -> Tensor:
        """The random numbers of the agent's samples in the block of steps that begins at `start`."""
        generator = torch.Generator().manual_seed(derive_seed("augment", self.seed, agent, start))
        return augment.draw(STEPS_PER_BLOCK * self.batch_size, generator)

    def _stream(self, agent: int, start: int, stop: int) -> Tensor:
        """Positions start … stop − 1 of the agent's stream of samples."""
        part = self.parts[agent]
        first_epoch, last_epoch = start // len(part), (stop - 1) // len(part)
        orders = torch.cat([self._order(agent, epoch) for epoch in range(first_epoch, last_epoch + 1)])
        skipped = first_epoch * len(part)
        return part[orders[start - skipped : stop - skipped]]

    def _order(self, agent: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, agent, epoch))
        return torch.randperm(len(self.parts[agent]), generator=generator, device="cpu")


def _gather(samples: Tensor, plan: Plan, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples of a step, and its plan."""
    indices, draws = plan(step)
    return _take(samples, indices), indices, draws


class _ReadAhead:
    """As `_gather`, from files that are read some steps ahead; any step but the next starts anew."""

    steps_ahead = 2

    def __init__(self, files: ImageFiles, plan: Plan, num_agents: int, augment: Augmentation | None) -> None:
        self._files, self._plan, self._num_agents = files, plan, num_agents
        self._crop = augment if isinstance(augment, RandomResizedCropFlip) else None
        self._next_step = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images [N, B, C, H, W], their indices [N, B], and the draws unless they have been used in reading."""
        if step != self._next_step:
            self._planned: deque[tuple[Tensor, Tensor | None]] = deque()
            requests = _requests(self._plan, step, self._planned, with_draws=self._crop is not None)
            self._images = self._files.batches(requests, self._crop, self.steps_ahead * self._num_agents)
        self._next_step = -1  # until all has been read, or the same step is started anew
        images = torch.cat([next(self._images) for _ in range(self._num_agents)])
        indices, draws = self._planned.popleft()
        self._next_step = step + 1
        return images.unflatten(0, indices.shape), indices, None if self._crop else draws


def _requests(
    plan: Plan, step: int, planned: deque[tuple[Tensor, Tensor | None]], *, with_draws: bool
) -> Iterator[Request]:
    """Those of each agent in this step and all that follow, whose plans are put into `planned`."""
    while True:
        indices, draws = plan(step)
        planned.append((indices, draws))
        yield from zip(indices, draws if with_draws and draws is not None else [None] * len(indices), strict=True)
        step += 1


def _take(samples: Tensor, indices: Tensor) -> Tensor:
    """The samples at indices [N, B], as [N, B, ...] in one kernel."""
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
