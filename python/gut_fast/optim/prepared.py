"""The flat state, weights and coefficients that an optimizer keeps from step to step, beside its parameter groups."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from gut_fast.analysis import conserved
from gut_fast.kernels.buffers import FlatState
from gut_fast.optim import checks
from gut_fast.rules import UpdateRule
from gut_fast.topology import CSR

__all__ = ["Prepared", "Views"]


class Prepared:
    """The inputs of a kernel for a parameter group, beside parameters and gradients.

    Args:
        parameters: the parameters of the group.
        rule: the update rule.
        mixing: the off-diagonal weights, on the parameters' device; None if they depend on the step or the rank.
        state_dtype: the dtype of the state; None is the parameters'.

    Attributes:
        state: the rule's state, zero; for each name one flat buffer of which ``state[parameter][name]`` are views.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rule: UpdateRule, mixing: CSR | None, state_dtype: torch.dtype | None
    ) -> None:
        self.mixing, self._rule, self._parameters = mixing, rule, list(parameters)
        self.state = FlatState(parameters, rule.states, state_dtype)
        self._read = operator.itemgetter("lr", "drift_lr", "round_lr", *checks.OPTIONS, *rule.hyperparameters)
        rows, messages = len(rule.states) + 1, rule.num_messages
        size = messages * (rows + 1) + rows * (rows + 1) + 2 * rows * messages
        nothing = torch.zeros(size, dtype=torch.float64, device="cpu")
        self._mixing_step, self._local_step = _Computed(nothing), _Computed(nothing)
        self._next = self._mixing_step
        self._has_warned = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the coefficients were computed from; empty at the start."""
        return self._next.settings

    @property
    def coefficients(self) -> Tensor:
        """The coefficients of the next step, A, B, C, E one after the other; zero at the start."""
        return self._next.coefficients

    @property
    def drift_lr(self) -> float:
        """The rate ρ of the next step, if it mixes and divides the drift by another rate than η; else 0."""
        steps = (self._next.given[0] or 0) + 1 if self._next.given else 1
        return float(self.settings.get("drift_lr", 0.0)) / steps

    def is_of(self, group: Mapping[str, Any]) -> bool:
        """Returns whether the group has the parameters that this was made for; every step asks."""
        params = group["params"]
        return len(params) == len(self._parameters) and all(map(operator.is_, params, self._parameters))

    def update(
        self, group: Mapping[str, Any], default_lr: Any, name: str, stays: bool, local_before: int | None
    ) -> None:
        """Computes the coefficients anew if one of the group's options has changed; every step asks.

        Args:
            group: the parameter group.
            default_lr: the optimizer's first learning rate.
            name: the optimizer's name, for messages.
            local_before: as for `checks.settings_of`.
            stays: whether the coefficients lie on the parameters' device, always in the same memory.

        Raises:
            TypeError, ValueError: a bad option; the coefficients stay as they are.
        """
        self._next = self._local_step if local_before is None else self._mixing_step
        given = (local_before, *self._read(group))
        if not isinstance(given[1], Tensor) and given == self._next.given:
            return
        settings = checks.settings_of(group, self._rule, default_lr, local_before)
        if settings != self._next.settings:
            self._compute(settings, name, stays)
        self._next.given = given

    @property
    def keeps_sums(self) -> bool:
        """True if the rule, as it is set, keeps a sum over agents for ever, and with it what rounding has put there."""
        return len(conserved(self._rule, self._hyperparameters)[0]) > 0

    @property
    def _hyperparameters(self) -> dict[str, Any]:
        return {name: self.settings[name] for name in self._rule.hyperparameters}

    def recentre(self, num_here: int, num_agents: int, add_up: Callable[[Tensor], None] | None) -> None:
        """Makes the sums over agents zero that the rule keeps; see `FlatState.recentre` for the arguments."""
        if self._parameters and self.keeps_sums:
            device, kept = self._parameters[0].device, conserved(self._rule, self._hyperparameters)
            sums, stays = (torch.as_tensor(matrix, dtype=torch.float64, device=device) for matrix in kept)
            self.state.recentre(sums, stays, num_here, num_agents, add_up)

    def _compute(self, settings: dict[str, Any], name: str, stays: bool) -> None:
        checks.check_state_dtype(settings, self._rule, self.state.buffers, name)
        flat = checks.checked_coefficients(settings, self._rule, name).flat()
        checks.check_range(flat, settings["lr"], self._parameters, name)
        if not self._has_warned:
            self._has_warned = checks.warns_of_frozen(self._parameters, settings["weight_decay"], name)
        fresh = torch.tensor(flat, dtype=torch.float64, device="cpu")
        if not stays:
            self._next.coefficients = fresh
        elif self.settings:
            self.coefficients.copy_(fresh, non_blocking=True)
        else:
            self._next.coefficients = fresh.to(next((each.device for each in self._parameters), "cpu"))
        self._next.settings = settings


@dataclass
class _Computed:
    """The coefficients of a step, the settings they were computed from, and the options these were read from."""

    coefficients: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    given: tuple[Any, ...] = ()


class Views:
    """The views of flat buffers that an optimizer's state held at the last look."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._views: dict[str, list[Tensor]] = {}

    def take(self, state: Mapping[Tensor, dict[str, Tensor]], names: Sequence[str]) -> None:
        """Remembers what the state holds now."""
        self._keys = list(state)
        owns = [own for own in state.values() if isinstance(own, dict)]
        self._views = {name: [own[name] for own in owns if name in own] for name in names}

    def are_in(self, state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Returns whether the state still holds them: every step asks, so this compares identities and no more."""
        if len(self._keys) != len(state) or not all(map(operator.is_, self._keys, state)):
            return False
        try:
            return all(
                all(map(operator.is_, views, map(dict.get, state.values(), repeat(name))))
                for name, views in self._views.items()
            )
        except TypeError:  # an entry is no dict
            return False
