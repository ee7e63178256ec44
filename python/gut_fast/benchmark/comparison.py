"""Who makes the same steps as the float64 reference, and so may be timed."""

from __future__ import annotations

import torch
from torch import Tensor

from gut_fast import reference
from gut_fast.benchmark.contenders import Blocks, Contender, Workload

__all__ = [
    "MAX_ELEMENTS",
    "MAX_ELEMENTS_OF_PEERS",
    "NUM_STEPS",
    "WrongResultError",
    "checked_columns",
    "largest_error",
    "tolerance",
]

NUM_STEPS = 3
MAX_ELEMENTS, MAX_ELEMENTS_OF_PEERS = 2**24, 2**19
"""Up to this many numbers all are compared, of more a sample."""


class WrongResultError(Exception):
    """A contender's steps are not those of the reference; it is not timed."""


def tolerance(workload: Workload) -> float:
    """The largest error of a right contender, relative to the largest entry of each tensor.

    The drift is divided by the learning rate, so a rounding of z is some twenty of a state; what is stored in half
    precision is rounded to that at the end of each step.
    """
    storage = workload.case.storage
    if workload.case.stores_halves:
        return max(float(torch.finfo(dtype).eps) for dtype in storage)
    return 256 * float(torch.finfo(storage[0]).eps)


def checked_columns(workload: Workload, max_elements: int = MAX_ELEMENTS) -> Tensor | None:
    """The columns that are compared, ascending; None for all.

    Of a large model the first and last ones of every tensor, where kernels change from one path to another, and some
    by chance.
    """
    budget = max(max_elements // workload.num_agents, 1)
    if workload.columns <= budget:
        return None
    ends = torch.tensor([0, *(parameter[0].numel() for parameter in workload.parameters)]).cumsum(0)
    share = max(1, min(64, budget // (4 * len(ends))))
    near = ends[:, None] + torch.arange(-share, share)
    chance = torch.randint(workload.columns, (budget // 2,), generator=torch.Generator().manual_seed(1))
    columns = torch.cat([near.flatten(), chance]).unique()
    inside: Tensor = columns[(columns >= 0) & (columns < workload.columns)]
    return inside


@torch.no_grad()
def largest_error(contender: Contender, workload: Workload, columns: Tensor | None) -> float:
    """Makes `NUM_STEPS` steps and compares each with one of the reference, begun from what the contender held.

    The result is relative to the largest entry of each tensor. State that the contender does not show is the
    reference's own, carried from step to step.

    Raises:
        WrongResultError: an error above the `tolerance`, or NaN.
    """
    rule, settings = workload.rule, workload.case.hyperparameters
    g = _taken(workload.gradient_rows(by_tensor=True), columns)
    state = reference.zero_state(rule, g)
    worst = 0.0
    for step in range(NUM_STEPS):
        held = _shown(contender, columns)
        z = held.pop("z")
        W = workload.topology.matrix(step)
        z, state = reference.step(rule, settings, z, {**state, **held}, g, W)
        contender.step()
        for name, mine in _shown(contender, columns).items():
            truth = z if name == "z" else state[name]
            scale = truth.abs().max()
            error = float((mine - truth).abs().max() / (scale if scale != 0 else 1.0))
            if not error <= tolerance(workload):
                raise WrongResultError(
                    f"{name} is off by {error:.1e} after step {step + 1}, more than {tolerance(workload):.1e}"
                )
            worst = max(worst, error)
    return worst


def _shown(contender: Contender, columns: Tensor | None) -> dict[str, Tensor]:
    blocks: Blocks = contender.blocks() or {}
    return {name: _taken(parts, columns) for name, parts in blocks.items()}


def _taken(blocks: list[Tensor], columns: Tensor | None) -> Tensor:
    """The columns of blocks that stand side by side, in float64 on the CPU: [N, len(columns)]."""
    if columns is None:
        return torch.cat(blocks, dim=1).cpu().double()
    taken, start = [], 0
    for block in blocks:
        width = block.shape[1]
        mine = columns[(columns >= start) & (columns < start + width)] - start
        taken.append(block[:, mine.to(block.device)].cpu().double())
        start += width
    return torch.cat(taken, dim=1)
