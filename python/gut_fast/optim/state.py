"""State in flat buffers, saved and loaded, and the agents' modules: what an optimizer has beside its parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gut_fast import analysis
from gut_fast.agents import StackedModule, stacks_of
from gut_fast.kernels import validation
from gut_fast.optim.across import AcrossRanks
from gut_fast.optim.compiled import register
from gut_fast.optim.loading import check_state_dict, older_values, unchanged_if_raised
from gut_fast.optim.prepared import Prepared, Views
from gut_fast.rules import UpdateRule
from gut_fast.topology import CSR

__all__ = ["DRIFT_MEMORY", "KeepsState"]

DRIFT_MEMORY = 0.95
"""How slowly the rate that the drift is divided by follows a falling learning rate, unless the user says."""


class KeepsState(AcrossRanks):
    """The part of `GossipOptimizer` that keeps the rule's state, whoever assigns, clears, saves or copies it.

    Attributes:
        rule: the update rule, which names the states.
        state_dtype: dtype of the state; None is the parameters'.
        capturable: whether steps can be captured in a CUDA graph.
    """

    rule: UpdateRule
    backend: str
    state_dtype: torch.dtype | None
    capturable: bool
    _prepared: list[Prepared]  # one per group
    _views: Views
    _number: int
    _stacks: list[StackedModule] | None = None  # whose parameters these are; None is not looked up yet

    @abstractmethod
    def _prepare(self, parameters: Sequence[Tensor]) -> Prepared: ...

    @abstractmethod
    def _mixing(self, prepared: Prepared, device: torch.device) -> CSR: ...

    @abstractmethod
    def update_coefficients(self) -> None:
        """Brings the coefficients up to date with the hyper-parameters, and the state with what was put there."""

    @abstractmethod
    def _up_to_date(self) -> list[Tensor]: ...

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter by the rule's names, see the class; one that has been cleared is zero."""
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        if not state and self._prepared:
            self._follow_state()
        return state

    @state.setter
    def state(self, state: MutableMapping[Tensor, Any]) -> None:
        if not isinstance(state, MutableMapping):
            raise TypeError(f"{self._name}: state must be a dict by parameters, got {type(state).__name__}")
        # One with a default, as torch's code expects; the same object if it has, so that who keeps it sees the state.
        self.__dict__["state"] = state if isinstance(state, defaultdict) else defaultdict(dict, state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets all gradients to None, or to zero, those of agents' modules too."""
        super().zero_grad(set_to_none)
        if set_to_none:
            for stacked in self._looked_up_stacks():
                stacked.cut_gradients()

    def _follow_agents(self) -> None:
        """Moves gradients, and whatever else has been put into agents' modules, into the stack."""
        for stacked in self._looked_up_stacks():
            stacked.follow_agents()

    def _looked_up_stacks(self) -> list[StackedModule]:
        if self._stacks is None:
            self._stacks = stacks_of(parameter for group in self.param_groups for parameter in group["params"])
        return self._stacks

    def _follow_state(self) -> None:
        """Moves what has been assigned to, or deleted from, the state since the last step into the flat buffers."""
        if self._exchange is None and not all(map(Prepared.is_of, self._prepared, self.param_groups)):
            self._take_parameters()
        if not self._views.are_in(self.__dict__["state"]):
            self._adopt_state()

    def recentre(self) -> None:
        """Makes the sums over agents zero again that rules without a leak keep, and with them all that rounding adds.

        These are the sums of r in D² and in GUT at μ = 1, of v − q in gradient tracking, of v − m in momentum tracking
        (`gut_fast.analysis.conserved`). Steps do this every `gut_fast.analysis.RECENTRING` steps, but for two that
        cannot: replays of a CUDA graph, and steps of several ranks, which know their neighbours only. There call it now
        and then, between two steps, on all ranks: they add the sums up with an all-reduce. It does nothing for other
        rules, nor where mixing changes the mean.

        Raises:
            RuntimeError: messages of the next step have left already, as with `overlap` after backward.
            PeerError: a rank did not come in time, or died.
        """
        self.update_coefficients()
        exchange = self._exchange
        if exchange is not None:
            exchange.check_idle()
        add_up = None if exchange is None else exchange.group.all_reduce
        for prepared in self._prepared if analysis.keeps_mean(self.topology) else ():
            prepared.recentre(self._num_here, self.topology.num_agents, add_up)

    def _recentre_if_due(self) -> None:
        if (steps := self._counts.eager_steps) and steps % analysis.RECENTRING == 0 and self._exchange is None:
            self.recentre()

    def _take_parameters(self) -> None:
        """Follows parameters that were put into groups, or taken out, past `add_param_group`: their state is zero."""
        for index, (prepared, group) in enumerate(zip(self._prepared, self.param_groups, strict=True)):
            if not prepared.is_of(group):
                for first in group["params"][:1]:
                    self._mixing(prepared, first.device)  # raises if they have moved
                validation.check_parameters(group["params"], self._num_here, f"{self._name}: ")
                self._prepared[index] = self._prepare(group["params"])
        there = {each for group in self.param_groups for each in group["params"]}
        for optimizer in self._with_inner():
            for own, group in zip(optimizer.param_groups, self.param_groups, strict=True):
                own["params"] = group["params"]
            state = vars(optimizer)["state"]
            for gone in [key for key in state if isinstance(key, Tensor) and key not in there]:
                del state[gone]  # which state_dict could not number
        self._stacks = None
        self._adopt_state()
        self._begin_wire_anew()

    def _begin_wire_anew(self) -> None:
        """Begins with whole messages, as the parameters are others; across ranks this is done where they meet."""
        if self._together is not None:
            self._together.begin_anew([group["params"] for group in self.param_groups], self.rule.num_messages)

    def _adopt_state(self) -> None:
        """Puts views of the flat buffers into the state, with the values that are there, or zero."""
        state = self.__dict__["state"]
        for prepared, group in zip(self._prepared, self.param_groups, strict=True):
            prepared.state.adopt(state)
            for parameter in group["params"]:
                state[parameter]  # makes an entry, if an empty one: without any a state looks as if not yet made
        self._views.take(state, self.rule.states)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as in `torch.optim`, with the rule's name and the numbers of steps and rounds beside it.

        With a process_group it is the state of the agents here. If messages are coded, "wire" is what others know of
        them.
        """
        self._follow_state()
        part = self._exchange or self._together
        wire = {"wire": state} if part is not None and (state := part.state()) else {}
        return {**super().state_dict(), "rule": self.rule.name, **self._counts.state(), **wire}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; a run that goes on from it equals the uninterrupted one bit for bit.

        State saved in another dtype is converted.

        Raises:
            TypeError, ValueError: it is of another rule, other parameters or agents, or an entry is not of the form
                that `state_dict` gives it; nothing has been changed, nor is it after any other exception.
            RuntimeError: it has no step count and the topology varies with time, or messages have left already.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, final: dict[str, Any]) -> None:
            self._check_state_dict(final)
            loaded.update(final)

        if not isinstance(state_dict, dict):
            raise TypeError(
                f"{self._name}: a state is a dict, as state_dict() returns, got {type(state_dict).__name__}"
            )
        self._follow_state()
        # Torch casts state to the parameters' dtype; `loaded` keeps what it was, after the user's own hooks.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            with unchanged_if_raised(*self._with_inner()):
                super().load_state_dict(state_dict)
                self._take_over(loaded)
            if (part := self._exchange or self._together) is not None:
                part.load_state(loaded.get("wire", {}))
        finally:
            handle.remove()

    def _with_inner(self) -> list[Optimizer]:
        """Returns this optimizer, and what else has a state of its parameters."""
        return [self]

    def _take_over(self, loaded: dict[str, Any]) -> None:
        """Copies a checked state's numbers into the flat buffers, after `torch.optim` has loaded everything else."""
        for saved_group, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                for name in self.rule.states:
                    self.state[parameter][name].copy_(loaded["state"][index][name])
        self._counts.load_state(loaded)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = self.__dict__["state"]
        check_state_dict(state_dict, self.rule, self.topology, self.param_groups, state, self.defaults, self._name)
        if (part := self._exchange or self._together) is not None:
            part.check_state(state_dict.get("wire", {}), self._name)

    def __getstate__(self) -> dict[str, Any]:
        if self._exchange is not None:
            raise TypeError(f"{self._name}: with a process_group it cannot be copied or pickled; keep its state_dict()")
        names = "rule", "_topology", "backend", "state_dtype", "capturable", "_is_made", "_together", "_counts"
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}, "_stacks": None}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when unpickling and when loading; either way the state's tensors move into flat buffers."""
        super().__setstate__(state)
        for group in self.param_groups:  # what older states do not have
            for name, value in older_values(self.rule).items():
                group.setdefault(name, self.defaults.get(name, value))
        # A shallow copy shares these with its original.
        self.state = defaultdict(dict, {parameter: dict(own) for parameter, own in self.__dict__["state"].items()})
        self._counts, self._together = self._counts.copied(), self._together and self._together.copied()
        self._prepared = [self._prepare(group["params"]) for group in self.param_groups]
        self._views = Views()
        self._adopt_state()
        self._number = register(self)
