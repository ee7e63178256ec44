"""The learning rate over the steps of an experiment: schedules by name, after a warm-up.

A schedule is a factor on the initial learning rate, a function of the fraction of the steps after the warm-up that are
done. In the warm-up of w steps the factor of step t = 0, 1, … is (t + 1) / w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["MILESTONES", "SCHEDULES", "make_schedule", "warmup_steps"]

MILESTONES = "milestones"

SCHEDULES: dict[str, Callable[[float], float]] = {
    MILESTONES: lambda fraction: 1.0,
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
    "linear": lambda fraction: 1 - fraction,
    "none": lambda fraction: 1.0,
}
"""The factors by name. With milestones it is multiplied by the decay at each; ``"none"`` keeps the learning rate."""


def warmup_steps(warmup: float, steps: int) -> int:
    """The number of steps of a warm-up: of a fraction of all steps if it is below 1.

    Raises:
        ValueError: it is neither a fraction nor a number of steps, or not shorter than the run.
    """
    is_fraction = 0 <= warmup < 1
    if not is_fraction and not (warmup >= 1 and float(warmup).is_integer() and warmup < steps):
        raise ValueError(
            f"warmup must be a fraction from 0 to below 1, or a number of steps below {steps}, got {warmup}"
        )
    return round(warmup * steps) if is_fraction else int(warmup)


def make_schedule(
    name: str, steps: int, warmup: float, milestones: Sequence[float], decay: float
) -> Callable[[Optimizer], LRScheduler]:
    """A function that makes the scheduler of an optimizer, to be stepped after each of `steps` steps.

    Args:
        name: one of `SCHEDULES`.
        steps: the number of steps of the run.
        warmup: as for `warmup_steps`.
        milestones: steps, or fractions of all steps if below 1, after which the factor is multiplied by `decay`.
        decay: that factor.
    """
    first, shape = warmup_steps(warmup, steps), SCHEDULES[name]
    falls = [round(place * steps) if place < 1 else place for place in milestones]

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        return shape((step - first) / max(steps - first, 1)) * decay ** sum(step >= fall for fall in falls)

    return lambda optimizer: LambdaLR(optimizer, factor)
