"""An optimizer whose state lies in flat buffers, however it came there: by steps, by hand, from a file or a pickle."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.kernels.buffers import FlatState
from gut_fast.optim.checks import check_entries
from gut_fast.rules import UpdateRule
from gut_fast.topology import CSR, Topology

__all__ = ["FlatOptimizer"]


class FlatOptimizer(Optimizer):
    """The state of a rule, for each group one flat buffer for each of its names, and the number of steps taken.

    ``state[parameter][name]`` are views of the buffers. What is assigned there moves into them at the next step.
    """

    rule: UpdateRule
    topology: Topology
    backend: str
    state_dtype: torch.dtype | None
    capturable: bool
    _static_mixing: dict[torch.device, CSR]
    _cached_coefficients: list[tuple[dict[str, Any], Tensor]]

    def _begin_without_state(self) -> None:
        self._eager_steps = 0
        # torch.compile and CUDA graphs lose a number's change, so their steps are counted in a tensor.
        self._traced_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._flat_states: list[FlatState] = []  # one per group
        self._followed: tuple[list[Tensor], dict[str, list[Tensor]]] = [], {}

    @property
    def num_steps(self) -> int:
        """Steps taken; a time-varying topology mixes with ``topology.matrix(num_steps)`` next."""
        return self._eager_steps + int(self._traced_steps)

    @property
    def _name(self) -> str:
        raise NotImplementedError

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _new_flat_state(self, parameters: Sequence[Tensor]) -> FlatState:
        return FlatState(parameters, self.rule.states, self.state_dtype)

    def _follow_state(self) -> None:
        """Moves what has been assigned to, or deleted from, the state since the last step into the flat buffers."""
        if not self._is_followed():
            for flat_state in self._flat_states:
                flat_state.adopt(self.state)
            views = {name: [own[name] for own in self.state.values() if name in own] for name in self.rule.states}
            self._followed = list(self.state), views

    def _is_followed(self) -> bool:
        """Whether the state holds what it held then: asked at every step, so it compares identities and no more."""
        keys, views = self._followed
        return (
            len(keys) == len(self.state)
            and all(map(operator.is_, keys, self.state))
            and all(
                all(map(operator.is_, own_views, map(dict.get, self.state.values(), repeat(name))))
                for name, own_views in views.items()
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim`, with the rule's name and the number of steps taken beside it."""
        return {**super().state_dict(), "rule": self.rule.name, "step": self.num_steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a run that goes on from it equals the uninterrupted one bit for bit.

        State saved in another dtype is converted.

        Raises:
            ValueError: it is of another rule, other parameters or agents; nothing has been changed.
            RuntimeError: it has no step count and the topology varies with time.
        """
        self._check_state_dict(state_dict)
        loaded: dict[str, Any] = {}
        # Torch casts state to the parameters' dtype; `loaded` keeps what it was, after the user's own hooks.
        handle = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for saved_group, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                for name, view in self.state[parameter].items():
                    view.copy_(loaded["state"][index][name])
        self._eager_steps = state_dict.get("step", 0)
        self._traced_steps.zero_()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"{self._name}: the state is not that of an optimizer: it needs 'state' and 'param_groups'"
            )
        if state_dict.get("rule", self.rule.name) != self.rule.name:
            raise ValueError(f"{self._name}: the state is of rule {state_dict['rule']!r}, expected {self.rule.name!r}")
        if "step" not in state_dict and not self.topology.is_static:
            raise RuntimeError(
                f"{self._name}: the state has no step count, and {self.topology} varies with time: set "
                "state_dict['step'] to the number of steps taken"
            )
        step = state_dict.get("step", 0)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"{self._name}: the state's step count must be an integer >= 0, got {step!r}")
        saved, groups = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
            raise ValueError(f"{self._name}: the state's parameter groups have other sizes than this optimizer's")
        for saved_group, group in zip(saved, groups, strict=True):
            if missing := sorted(self.defaults.keys() - saved_group.keys() - {"differentiable"}):
                raise ValueError(f"{self._name}: a parameter group of the state has no {', '.join(missing)}")
            self.rule.coefficients(**self._hyperparameters(saved_group))
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                entries = state_dict["state"].get(index, {})
                check_entries(entries, self.rule.states, parameter, index, self._name)

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "rule",
            "topology",
            "backend",
            "state_dtype",
            "capturable",
            "_eager_steps",
            "_traced_steps",
            "_static_mixing",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when unpickling and when loading; either way the state's tensors move into flat buffers."""
        super().__setstate__(state)
        # A shallow copy shares these with its original.
        self.state = defaultdict(dict, {parameter: dict(own) for parameter, own in self.state.items()})
        self._traced_steps = self._traced_steps.clone()
        self._cached_coefficients = [({}, torch.empty(0, device="cpu")) for _ in self.param_groups]
        self._flat_states = [self._new_flat_state(group["params"]) for group in self.param_groups]
        self._followed = [], {}
        for flat_state in self._flat_states:
            flat_state.adopt(self.state)
