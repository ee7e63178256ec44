"""How far an optimizer has come: the steps it has taken, and the rounds they make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Counts"]


class Counts:
    """Counts steps and rounds: a round is `local_steps` steps, of which the last one mixes.

    Attributes:
        local_steps: H; a new value holds from the next step on.
        eager_steps: the steps that this process has taken itself, which replays of a CUDA graph are not.
        local_before: how many local steps the present round has had.
    """

    def __init__(self, local_steps: int) -> None:
        self.local_steps = local_steps
        self.eager_steps = self.local_before = self._eager_rounds = 0
        # CUDA graphs lose a number's change, so their steps, each of which mixes, are counted in a tensor.
        self._captured = torch.zeros((), dtype=torch.int64, device="cpu")

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return self.eager_steps + int(self._captured)

    @property
    def rounds(self) -> int:
        """The number of steps that have mixed."""
        return self._eager_rounds + int(self._captured)

    @property
    def is_local(self) -> bool:
        """True if the next step sends nothing."""
        return self.local_before + 1 < self.local_steps

    def advance(self) -> None:
        """Counts one step more."""
        if self.is_local:
            self.local_before += 1
        else:
            self._eager_rounds, self.local_before = self._eager_rounds + 1, 0
        self.eager_steps += 1

    def advance_captured(self) -> None:
        """Counts one step more with every replay of the CUDA graph that is being captured."""
        self._captured += 1

    def to(self, device: torch.device) -> None:
        """Counts the steps of CUDA graphs on this device."""
        self._captured = self._captured.to(device)

    def state(self) -> dict[str, int]:
        """Returns what a state dict holds of it."""
        return {"step": self.steps, "round": self.rounds, "local_before": self.local_before}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state dict; older ones have no rounds, or no counts at all."""
        self.eager_steps = state.get("step", 0)
        self._eager_rounds, self.local_before = state.get("round", self.eager_steps), state.get("local_before", 0)
        self._captured.zero_()

    def go_to_end_of(self, rounds: int) -> None:
        """Makes the next step the one that mixes in this round, counted from 0."""
        steps = (rounds + 1) * self.local_steps - 1
        self.load_state({"step": steps, "round": rounds, "local_before": self.local_steps - 1})

    def copied(self) -> Counts:
        """Returns a copy that shares nothing which changes."""
        return copy.deepcopy(self)
