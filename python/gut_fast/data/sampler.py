"""Batches of all agents from any data set of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gut_fast.arguments import as_integer

__all__ = ["AgentBatchSampler"]


class AgentBatchSampler(Sampler[list[int]]):
    """A batch sampler that takes B samples of each agent's part: agent 0's indices, then agent 1's, and so on.

    With it a `torch.utils.data.DataLoader` of any data set gives the batches of all agents::

        sampler = gf.data.AgentBatchSampler(parts, batch_size=32)
        for batch in DataLoader(dataset, batch_sampler=sampler):
            inputs, targets = (each.unflatten(0, (num_agents, -1)) for each in batch)  # (N, B, ...)
            outputs = agents(inputs)

    An epoch is as many batches as the largest part fills, the last one filled up. Every agent goes through its samples
    in a random order, and, if they are fewer, through all of them again in another one.

    Args:
        parts: the indices of each agent's samples, as `gut_fast.data.partition` makes them.
        batch_size: samples of each agent in a batch, B.
        generator: draws the orders; None is torch's default generator, as in `torch.utils.data.RandomSampler`.

    Raises:
        TypeError, ValueError: there are no parts, one is empty or no 1-D sequence of integers, or B is below 1.
    """

    def __init__(self, parts: Sequence[Any], batch_size: int, generator: torch.Generator | None = None) -> None:
        self.parts = [_checked(part, agent) for agent, part in enumerate(parts)]
        if not self.parts:
            raise ValueError("parts must hold the indices of at least one agent's samples, got none")
        self.batch_size = as_integer(batch_size, "batch_size", minimum=1)
        self.generator = generator

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return -(-max(map(len, self.parts)) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of each batch, N · B of them."""
        orders = [self._order(part) for part in self.parts]
        for batch in torch.stack(orders, 1):
            yield batch.flatten().tolist()

    def _order(self, part: Tensor) -> Tensor:
        """The agent's samples in this epoch, [batches, B]."""
        size = len(self) * self.batch_size
        keys = torch.rand(-(-size // len(part)), len(part), generator=self.generator, dtype=torch.float64, device="cpu")
        return part[keys.argsort(1).flatten()[:size]].view(-1, self.batch_size)


def _checked(part: Any, agent: int) -> Tensor:
    indices = torch.as_tensor(part, device="cpu")
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(
            f"the part of agent {agent} must be a 1-D sequence of integers, got shape {tuple(indices.shape)} of "
            f"{indices.dtype}"
        )
    if not len(indices):
        raise ValueError(f"agent {agent} has no samples")
    return indices.to(torch.int64)
