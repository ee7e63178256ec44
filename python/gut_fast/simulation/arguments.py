"""What the simulator is given, checked and moved to where the model is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from gut_fast.data import Dataset, Inputs
from gut_fast.distributed import Group
from gut_fast.simulation.stacked import StackedModule
from gut_fast.topology import Topology

__all__ = ["check_ranks", "checked_optimizer", "like_model"]


def checked_optimizer(optimizer: Any, stacked: StackedModule, topology: Topology) -> Optimizer:
    """Raises TypeError or ValueError unless it is an optimizer of these models over this topology."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in stacked.parameters()}
    if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer has other parameters than the stacked ones that it was given")
    mixes_with = getattr(optimizer, "topology", topology)
    if mixes_with != topology:
        raise ValueError(f"the optimizer mixes over {mixes_with}, but the simulator's topology is {topology}")
    return optimizer


def check_ranks(group: Group | None, process_group: dist.ProcessGroup | Group | None) -> None:
    """Raises ValueError unless the ranks over which the optimizer mixes are as many as those of `process_group`."""
    sizes = [None if each is None else Group.size_of(each) for each in (process_group, group)]
    if sizes[0] != sizes[1]:
        given, has = ("no process_group" if size is None else f"one of {size} ranks" for size in sizes)
        raise ValueError(
            f"the simulator was given {given}, its optimizer {has}; give both the same, and the optimizer "
            "agents_per_rank= beside it"
        )


def like_model(data: Dataset, stacked: StackedModule, channels_last: bool) -> Dataset:
    """The data on the model's device, floating-point inputs in its dtype, images in channels-last memory if asked."""
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
