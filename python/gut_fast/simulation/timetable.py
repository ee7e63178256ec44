"""The timetable of a run: its learning rate, evaluations and checkpoints as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gut_fast.arguments import as_integer

__all__ = ["Timetable"]


@dataclass(frozen=True)
class Timetable:
    """The arguments of `gut_fast.Simulator.run`, which explains them, after a check.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it.
    """

    steps: int
    milestones: Sequence[float]
    decay: float
    eval_every: int | None
    checkpoint: Path | None
    checkpoint_every: int | None

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "checkpoint_every"):
            if name == "steps" or getattr(self, name) is not None:
                as_integer(getattr(self, name), name, minimum=1)
        for milestone in self.milestones:
            if not (milestone > 0 and (milestone < 1 or float(milestone).is_integer())):
                raise ValueError(f"milestones are fractions between 0 and 1 or step numbers, got {milestone}")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"decay must be finite and >= 0, got {self.decay}")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} needs checkpoint=, the file to write to")

    def lr_factor(self, step: int) -> float:
        """The factor ``decay ** passed milestones`` on the initial learning rate in the step after `step` steps."""
        passed = sum(
            step >= (round(milestone * self.steps) if milestone < 1 else milestone) for milestone in self.milestones
        )
        return float(self.decay**passed)

    def evaluates_after(self, steps: int) -> bool:
        """True if the run evaluates after so many steps."""
        return steps == self.steps or self.evaluates_regularly_after(steps)

    def evaluates_regularly_after(self, steps: int) -> bool:
        """True if the run evaluates after so many steps whichever its last step is."""
        return _is_multiple(steps, self.eval_every)

    def saves_after(self, steps: int) -> bool:
        """True if the run writes a checkpoint after so many steps."""
        return self.checkpoint is not None and (steps == self.steps or _is_multiple(steps, self.checkpoint_every))


def _is_multiple(steps: int, every: int | None) -> bool:
    return every is not None and steps > 0 and steps % every == 0
