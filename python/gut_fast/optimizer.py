"""The optimizer of every update rule: a `torch.optim.Optimizer` that takes the gradient step and mixes all agents.

Every parameter is stacked: shape (N, *shape), row i is agent i's. The gradient is taken at the parameters, so a normal
``loss.backward(); optimizer.step()`` loop is the whole algorithm.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gut_fast import analysis, ops
from gut_fast.backends import GossipStep, arithmetic
from gut_fast.buffers import FlatState
from gut_fast.rules import RULES, UpdateRule, get_rule
from gut_fast.topology import CSR, Topology

__all__ = ["GossipOptimizer"]


class GossipOptimizer(Optimizer):
    """Any update rule, by name or an `UpdateRule` of your own; the other classes are this one with a rule set.

    Args:
        params: stacked parameters, or parameter groups; every one of shape (N, *shape), contiguous, and in one group
            of one floating dtype and device. Groups may have their own lr, weight_decay, maximize and hyper-parameters.
        rule: for example ``"gut"``; `gut_fast.rules.RULES` lists them.
        topology: who mixes with whom, of N agents.
        lr: learning rate η >= 0; at 0 the parameters mix and the state stays as it is.
        weight_decay: λ >= 0, adds λz to the gradient.
        maximize: ascends instead of descending.
        backend: ``"auto"``, or one of `gut_fast.backends.BACKENDS`.
        state_dtype: of the state; None is the parameters'. It may be float32 beside parameters of bfloat16 or float16,
            or the other way round: such steps are computed in float32, and rounded once, when stored.
        capturable: steps can be captured in a CUDA graph, with the backends ``"cuda"`` and ``"triton"`` on a static
            topology. The coefficients live on the device; after a change of the learning rate or a hyper-parameter
            call `update_coefficients`, then replay. Capture anew after `load_state_dict`.
        **hyperparameters: those of the rule; ``mu="auto"`` is `gut_fast.analysis.auto_mu`, on a static topology.

    The state of parameter p is ``state[p][name]`` for each of the rule's state names, of p's shape, zero at the start.

    Raises:
        TypeError, ValueError: a bad hyper-parameter or parameter; nothing has been changed.
        RuntimeError: the backend asked for is not available for these parameters.

    Warns:
        UserWarning: the hyper-parameters are unstable on the topology; the message gives the limit and what to do.
    """

    def __init__(
        self,
        params: Any,
        rule: str | UpdateRule,
        *,
        topology: Topology,
        lr: float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        **hyperparameters: Any,
    ) -> None:
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a gut_fast.topology.Topology, got {type(topology).__name__}")
        if capturable and not topology.is_static:
            raise ValueError(f"capturable=True needs a topology that does not vary with time, got {topology}")
        self.rule = get_rule(rule)
        self.topology = topology
        self.backend = backend
        self.state_dtype = state_dtype
        self.capturable = capturable
        self._eager_steps = 0
        # torch.compile and CUDA graphs lose a number's change, so their steps are counted in a tensor.
        self._traced_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._static_mixing: dict[torch.device, CSR] = {}
        self._flat_states: list[FlatState] = []  # one per group
        self._followed: tuple[list[Tensor], dict[str, list[Tensor]]] = [], {}
        self._cached_coefficients: list[tuple[dict[str, Any], Tensor]] = []
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        hyperparameters = analysis.with_auto_mu(self.rule, hyperparameters, topology)
        super().__init__(params, {**defaults, **self.rule.check(hyperparameters)})

    @property
    def num_steps(self) -> int:
        """Steps taken; a time-varying topology mixes with ``topology.matrix(num_steps)`` next."""
        return self._eager_steps + int(self._traced_steps)

    def update_coefficients(self) -> None:
        """Brings the coefficients up to date with the hyper-parameters, and the state with what was put there.

        As a step would. For ``capturable=True``: a graph reads coefficients and state from the device and does not
        look at ``param_groups``.

        Raises:
            TypeError, ValueError: a bad learning rate or hyper-parameter; its group's coefficients stay as they are.
        """
        self._follow_state()
        for index in range(len(self.param_groups)):
            self._coefficients(index)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with state zero. Raises as the constructor does, before anything has changed."""
        params, tensors = self._listed(param_group)
        group = analysis.with_auto_mu(self.rule, {**self.defaults, **param_group}, self.topology)
        self.rule.coefficients(**self._hyperparameters(group))
        ops.check_parameters(tensors, self.topology.num_agents, f"{self._name}: ")
        for tensor in tensors[:1]:
            dtype, state_dtype = tensor.dtype, self.state_dtype or tensor.dtype
            ops.check_dtypes(dtype, state_dtype, f"{self._name}: ")
            num_states, num_messages = len(self.rule.states), self.rule.num_messages
            ops.select_backend(self.backend, tensor.device.type, dtype, num_states, num_messages, state_dtype)
        flat_state = self._new_flat_state(tensors)
        self._warn_if_unstable(group)
        super().add_param_group({**group, "params": params})
        flat_state.adopt(self.state)
        self._flat_states.append(flat_state)
        for device in {tensor.device for tensor in tensors} if self.topology.is_static else ():
            self._static_mixing[device] = self.topology.csr(0, device)
            if self.capturable:
                self._traced_steps = self._traced_steps.to(device)
        self._cached_coefficients.append(({}, torch.empty(0, device="cpu")))

    def _new_flat_state(self, parameters: Sequence[Tensor]) -> FlatState:
        return FlatState(parameters, self.rule.states, self.topology.num_agents, self.state_dtype)

    def _listed(self, param_group: dict[str, Any]) -> tuple[list[Any], list[Tensor]]:
        """The group's parameters, possibly named, as a list, and the tensors in it."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(
                f"{self._name}: a parameter group is a dict with 'params', got {type(param_group).__name__}"
            )
        others = set().union(*(rule.hyperparameters for rule in RULES.values())) - set(self.rule.hyperparameters)
        if unknown := sorted(others & set(param_group)):
            raise ValueError(f"{self._name}: rule {self.rule.name!r} has no hyper-parameter {', '.join(unknown)}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(f"{self._name}: parameters must have an order, got a set; pass a list")
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise TypeError(f"{self._name}: parameters must be tensors, got {[type(t).__name__ for t in tensors]}")
        if len(set(tensors)) < len(tensors):
            raise ValueError(f"{self._name}: a parameter stands more than once in the group")
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError(f"{self._name}: a parameter was made in inference mode and cannot be trained; clone it")
        return params, tensors

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None
    ) -> float | None:
        """One step of all agents, in place.

        Args:
            closure: evaluates the loss again and returns it, as in `torch.optim`.
            grad_scale: [N], a factor on each agent's gradient; zero lets the agent mix without a gradient of its own.

        A gradient of None counts as zero. NaN and Inf in gradients are carried, as in `torch.optim`.

        Raises:
            TypeError, ValueError: a bad learning rate, hyper-parameter or gradient; nothing has been changed.
        """
        step = self._watched_step if self._is_watched() else self._step
        return step(closure, grad_scale=grad_scale)

    step.hooked = True  # type: ignore[attr-defined]  # or torch puts a profiler's range around it, half of a small step

    def _is_watched(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )

    def _step(self, closure: Callable[[], float] | None, *, grad_scale: Tensor | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_captured = self._is_captured()
        coefficients = [self._coefficients(index) for index in range(len(self.param_groups))]
        if grad_scale is not None:
            grad_scale = self._checked_grad_scale(grad_scale)
        if not torch.compiler.is_compiling():
            self._follow_state()
        steps = [
            self._group_step(index, coefficients[index], gradients, grad_scale)
            for index, gradients in enumerate(self._gradients())
            if gradients
        ]
        if torch.compiler.is_compiling():
            for step in steps:
                ops.gossip_step_(*step, self.backend)
            self._traced_steps += 1
        else:
            for run in [ops.prepare(step, self.backend) for step in steps]:
                run()
            if is_captured:
                self._traced_steps += 1
            else:
                self._eager_steps += 1
        return loss

    _watched_step = Optimizer.profile_hook_step(_step)
    """With the hooks and the profiler's range of torch."""

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is being captured, which is refused unless the optimizer is made for it."""
        is_on_gpu = any(group["params"] and group["params"][0].is_cuda for group in self.param_groups)
        if torch.compiler.is_compiling() or not is_on_gpu or not torch.cuda.is_current_stream_capturing():
            return False
        if not self.capturable:
            raise RuntimeError(
                f"{self._name}: to capture steps in a CUDA graph, make the optimizer with capturable=True"
            )
        known = [hyperparameters for hyperparameters, _ in self._cached_coefficients]
        if [*map(self._hyperparameters, self.param_groups)] != known or not self._is_followed():
            raise RuntimeError(f"{self._name}: call update_coefficients() before the capture")
        return True

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

    def _gradients(self) -> list[list[Tensor | None]]:
        """The gradients of each group; None stands for zero."""
        return [[parameter.grad for parameter in group["params"]] for group in self.param_groups]

    def _group_step(
        self, index: int, coefficients: Tensor, gradients: list[Tensor | None], grad_scale: Tensor | None
    ) -> GossipStep:
        parameters, state = list(self.param_groups[index]["params"]), self._flat_states[index].buffers
        device = parameters[0].device
        step = GossipStep(
            parameters,
            state,
            gradients,
            coefficients,
            self.rule.num_messages,
            *self._mixing(device),
            grad_scale if grad_scale is None else grad_scale.to(device),
        )
        if state and state[0].dtype != (self.state_dtype or parameters[0].dtype):
            ops.check(step)
            raise TypeError(
                f"{self._name}: the parameters are now {parameters[0].dtype}, their state is {state[0].dtype}; make "
                "the optimizer after the conversion, or give it this state_dtype"
            )
        return step

    def _mixing(self, device: torch.device) -> CSR:
        if device in self._static_mixing:
            return self._static_mixing[device]
        if self.topology.is_static:
            raise TypeError(f"{self._name}: the parameters are now on {device}; make the optimizer after the move")
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self._name}: {self.topology} varies with time; leave step() out of torch.compile")
        return self.topology.csr(self.num_steps, device)

    def _coefficients(self, index: int) -> Tensor:
        """The group's coefficients as the kernels read them, computed anew only when a hyper-parameter changed."""
        hyperparameters = self._hyperparameters(self.param_groups[index])
        known, coefficients = self._cached_coefficients[index]
        if hyperparameters != known:
            flat = self.rule.coefficients(**hyperparameters).flat()
            self._check_range(flat, hyperparameters["lr"], self.param_groups[index]["params"])
            fresh = torch.tensor(flat, dtype=torch.float64, device="cpu")
            if not self.capturable:
                coefficients = fresh
            elif known:
                coefficients.copy_(fresh, non_blocking=True)
            else:
                coefficients = fresh.to(next((each.device for each in self.param_groups[index]["params"]), "cpu"))
            self._cached_coefficients[index] = (hyperparameters, coefficients)
        return coefficients

    def _check_range(self, coefficients: list[float], lr: float, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters[:1]:
            dtype = arithmetic(parameter.dtype)
            largest, most = max(map(abs, coefficients)), torch.finfo(dtype).max
            if largest > most:
                raise ValueError(
                    f"{self._name}: lr={lr} makes a coefficient of {largest:.3g}, more than {dtype} holds "
                    f"({most:.3g}); use a larger lr, or 0"
                )

    def _checked_grad_scale(self, grad_scale: Tensor) -> Tensor:
        n = self.topology.num_agents
        if not isinstance(grad_scale, Tensor) or grad_scale.shape != (n,) or grad_scale.is_complex():
            given = f"{grad_scale.dtype} {[*grad_scale.shape]}" if isinstance(grad_scale, Tensor) else type(grad_scale)
            raise ValueError(f"{self._name}: grad_scale must be a real tensor [{n}], got {given}")
        return grad_scale.to(torch.float64).contiguous()

    @property
    def _name(self) -> str:
        return self.rule.name if type(self) is GossipOptimizer else type(self).__name__

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the coefficients are a function of.

        Schedules that end at zero may miss it by a rounding, on either side, and the drift is divided by lr: what is
        so small beside the group's first learning rate is zero.
        """
        values = {name: group[name] for name in ("lr", "weight_decay", "maximize", *self.rule.hyperparameters)}
        first = group.get("initial_lr", self.defaults["lr"])
        if (
            isinstance(first, (int, float))
            and isinstance(values["lr"], (int, float))
            and abs(values["lr"]) < 1e-12 * first
        ):
            values["lr"] = 0.0
        return values

    def _warn_if_unstable(self, group: dict[str, Any]) -> None:
        advice = analysis.advice(self.rule, self._hyperparameters(group), self.topology)
        if advice is not None:
            warnings.warn(f"{self._name}: {advice}", UserWarning, stacklevel=_frames_to_the_caller())

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
                self._check_saved_state(index, state_dict["state"].get(index, {}), parameter)

    def _check_saved_state(self, index: int, entries: Any, parameter: Tensor) -> None:
        def describe(tensor: Any) -> str:
            is_right = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return str(tuple(tensor.shape)) if is_right else f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}"

        found = {name: describe(tensor) for name, tensor in entries.items()} if isinstance(entries, dict) else entries
        expected = dict.fromkeys(self.rule.states, describe(parameter))
        if found != expected:
            raise ValueError(f"{self._name}: state of parameter {index} is {found}, expected {expected}")

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

    def __repr__(self) -> str:
        head, _, groups = super().__repr__().partition("(")
        return f"{head}(\nrule: {self.rule.name}, topology: {self.topology}, backend: {self.backend}{groups}"


def _frames_to_the_caller() -> int:
    """The `stacklevel` of the first frame outside gut_fast and torch, so that a warning points at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gut_fast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
