"""The optimizer of every update rule: a `torch.optim.Optimizer` that takes the gradient step and mixes all agents.

Every parameter is stacked: shape (N, *shape), row i is agent i's. The gradient is taken at the parameters, so a normal
``loss.backward(); optimizer.step()`` loop is the whole algorithm.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gut_fast import analysis
from gut_fast.distributed import DEFAULT_TIMEOUT, SCALED, Group, RankOptions, Ranks
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.optim.checks import check_range, checked_grad_scale, frames_to_the_caller, listed
from gut_fast.optim.flat import FlatOptimizer
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import CSR, Topology

__all__ = ["GossipOptimizer"]


class GossipOptimizer(FlatOptimizer):
    """Any update rule, by name or an `UpdateRule` of your own; the other classes are this one with a rule set.

    Args:
        params: stacked parameters, or parameter groups; every one of shape (N, *shape), contiguous, and in one group
            of one floating dtype and device. Groups may have their own lr, weight_decay, maximize and hyper-parameters.
        rule: for example ``"gut"``; `gut_fast.rules.RULES` lists them.
        topology: who mixes with whom, of N agents.
        lr: learning rate η >= 0; at 0 the parameters mix and the state stays as it is.
        weight_decay: λ >= 0, adds λz to the gradient.
        maximize: ascends instead of descending.
        backend: ``"auto"``, or one of `gut_fast.kernels.backends.BACKENDS`.
        state_dtype: of the state; None is the parameters'. It may be float32 beside parameters of bfloat16 or float16,
            or the other way round: such steps are computed in float32, and rounded once, when stored.
        capturable: steps can be captured in a CUDA graph, with the backends ``"cuda"`` and ``"triton"`` on a static
            topology. The coefficients live on the device; after a change of the learning rate or a hyper-parameter
            call `update_coefficients`, then replay. Capture anew after `load_state_dict`.
        process_group: this process is one of its ranks and holds one agent, number ``rank``; parameters have no leading
            dimension. Make it with ``torch.distributed.init_process_group``; see "Across machines" in the README.
        agents_per_rank: this process holds k agents, numbers ``rank · k …``, and parameters are (k, *shape).
        overlap: messages leave during backward, as soon as a bucket's gradients are there. What is not the last
            backward pass of a step goes into `no_sync`. If gradients are touched between backward and step (clipping,
            AMP) messages leave in `step` as without it; attribute `overlap` says which.
        wire_dtype: of messages; None is the parameters'. Beside parameters of float32 it may be bfloat16, with the
            rounding error fed back; beside half-width ones float32, which gives the stacked numbers bit for bit.
        bucket_bytes: about how much travels at once; None is 25 MiB, or with `overlap` a quarter of the model if that
            is less (256 KiB at least).
        timeout: seconds any wait for another rank may take.
        on_peer_failure: ``"raise"``, or ``"continue"``: the ranks that are left drop the lost ones from the topology,
            weigh it anew (`Topology.without`), zero the state of rules that track, and go on. Only with gloo.
        shared_memory: ranks of one machine read each other's messages where they are written, if their parameters are
            on the CPU and the group is one of gloo. False sends everything through the connections of the group.
        **hyperparameters: those of the rule; ``mu="auto"`` is `gut_fast.analysis.auto_mu`, on a static topology.

    The state of parameter p is ``state[p][name]`` for each of the rule's state names, of p's shape, zero at the start.

    Raises:
        TypeError, ValueError: a bad hyper-parameter or parameter; nothing has been changed.
        RuntimeError: the backend asked for is not available for these parameters.
        MismatchError, PeerError: the ranks do not have the same settings, or one did not come (`gut_fast.distributed`).

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
        process_group: dist.ProcessGroup | Group | None = None,
        agents_per_rank: int | None = None,
        overlap: bool = False,
        wire_dtype: torch.dtype | None = None,
        bucket_bytes: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        on_peer_failure: Literal["raise", "continue"] = "raise",
        shared_memory: bool = True,
        **hyperparameters: Any,
    ) -> None:
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a gut_fast.topology.Topology, got {type(topology).__name__}")
        if capturable and not topology.is_static:
            raise ValueError(f"capturable=True needs a topology that does not vary with time, got {topology}")
        if capturable and process_group is not None:
            raise ValueError("capturable=True: steps of several ranks cannot be captured in a CUDA graph")
        self.rule = get_rule(rule)
        self.topology = topology
        self.backend = backend
        self.state_dtype = state_dtype
        self.capturable = capturable
        self._static_mixing = {}
        self._cached_coefficients = []
        self._begin_without_state()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        hyperparameters = self.rule.check(analysis.with_auto_mu(self.rule, hyperparameters, topology))
        options = RankOptions(
            agents_per_rank, overlap, wire_dtype, bucket_bytes, timeout, on_peer_failure, shared_memory
        )
        self._ranks: Ranks | None = None
        if process_group is None:
            options.check_alone(self._name)
        else:
            self._ranks = Ranks(process_group, topology, self.rule, backend, options)
        self._is_made = False
        super().__init__(params, {**defaults, **hyperparameters})
        self._is_made = True
        self._meet()

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
        if self._ranks is not None:
            self._ranks.check_idle()
        params, tensors = listed(param_group, self.rule, self._name)
        group = analysis.with_auto_mu(self.rule, {**self.defaults, **param_group}, self.topology)
        self.rule.coefficients(**self._hyperparameters(group))
        ops.check_parameters(tensors, self._num_here, f"{self._name}: ")
        for tensor in tensors[:1]:
            dtype, state_dtype = tensor.dtype, self.state_dtype or tensor.dtype
            ops.check_dtypes(dtype, state_dtype, f"{self._name}: ")
            num_states, num_messages = len(self.rule.states), self.rule.num_messages
            function = "gossip_step" if self._ranks is None else "combine"
            ops.select_backend(self.backend, tensor.device.type, dtype, num_states, num_messages, state_dtype, function)
            if self._ranks is not None:
                self._ranks.check_wire(dtype)
        flat_state = self._new_flat_state(tensors)
        self._warn_if_unstable(group)
        super().add_param_group({**group, "params": params})
        flat_state.adopt(self.state)
        self._flat_states.append(flat_state)
        is_static = self.topology.is_static and self._ranks is None
        for device in {tensor.device for tensor in tensors} if is_static else ():
            self._static_mixing[device] = self.topology.csr(0, device)
            if self.capturable:
                self._traced_steps = self._traced_steps.to(device)
        self._cached_coefficients.append(({}, torch.empty(0, device="cpu")))
        try:
            self._meet()
        except BaseException:
            self._drop_last_group()
            raise

    def _drop_last_group(self) -> None:
        for own in (self._flat_states, self._cached_coefficients):
            own.pop()
        for parameter in self.param_groups.pop()["params"]:
            self.state.pop(parameter, None)

    def _meet(self) -> None:
        """Compares the settings with those of the other ranks, once all groups are there."""
        if self._ranks is not None and self._is_made:
            step = self._ranks.begin(self.rule, self.param_groups, self._step_of_group, lambda: self.num_steps)
            self._eager_steps = self._eager_steps if step is None else step

    @property
    def _num_here(self) -> int:
        """How many agents live in this process."""
        return self.topology.num_agents if self._ranks is None else self._ranks.agents_here

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None
    ) -> float | None:
        """One step of all agents, in place.

        Args:
            closure: evaluates the loss again and returns it, as in `torch.optim`.
            grad_scale: [N], a factor on each agent's gradient; zero lets the agent mix without a gradient of its own.
                With a process_group [k], of the agents here.

        A gradient of None counts as zero. NaN and Inf in gradients are carried, as in `torch.optim`.

        Raises:
            TypeError, ValueError: a bad learning rate, hyper-parameter or gradient; nothing has been changed.
            PeerError: a rank died or did not send in time; parameters and state are as before, and no more steps can
                be taken. Nor can they after any other exception that breaks off what ranks do together, as Ctrl-C does.
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
            grad_scale = checked_grad_scale(grad_scale, self._num_here, self._name)
        if not torch.compiler.is_compiling():
            self._follow_state()
        if self._ranks is not None:
            self._step_across(self._ranks, coefficients, grad_scale)
            return loss
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

    def _step_across(self, ranks: Ranks, coefficients: Sequence[Tensor], grad_scale: Tensor | None) -> None:
        """One step of the agents here, with those of other ranks."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self._name}: with a process_group, leave step() out of torch.compile")
        scale = self._amp_scale(grad_scale)
        steps = [
            self._group_step(index, coefficients[index], gradients, scale) if gradients else None
            for index, gradients in enumerate(self._gradients())
        ]
        for step in filter(None, steps):
            ops.check(step)
        ranks.run(steps, self.num_steps, None if scale is None else SCALED)
        self._eager_steps += 1
        if self.topology is not ranks.exchange.topology:
            self.topology = ranks.exchange.topology
            for group in self.param_groups:
                self._warn_if_unstable(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves the scale, and what to do about infinities, to `step`.

        Across ranks it must: a step that one rank skips is one its neighbours wait for.
        """
        return self._ranks is not None

    def _amp_scale(self, grad_scale: Tensor | None) -> Tensor | None:
        """`grad_scale`, with what GradScaler has left in `grad_scale` and `found_inf`."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return grad_scale
        factor = 0.0 if found_inf else 1.0 if scale is None else 1.0 / float(scale)
        factors = torch.full((self._num_here,), factor, dtype=torch.float64, device="cpu")
        return factors if grad_scale is None else grad_scale.cpu() * factors

    def _step_of_group(self, index: int) -> GossipStep:
        """With the gradients that are there."""
        self._follow_state()
        gradients = [parameter.grad for parameter in self.param_groups[index]["params"]]
        return self._group_step(index, self._coefficients(index), gradients, None)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Around all backward passes of a step but the last: with ``overlap=True`` no message leaves in it."""
        return contextlib.nullcontext() if self._ranks is None else self._ranks.no_sync()

    @property
    def group(self) -> Group | None:
        """The ranks that are there, or None if this process holds all agents."""
        return None if self._ranks is None else self._ranks.exchange.group

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """Of messages to other ranks; None is the parameters'."""
        return None if self._ranks is None else self._ranks.exchange.wire_dtype

    @property
    def overlap(self) -> str:
        """Whether messages leave during backward: "on", or "off" and why."""
        ranks = self._ranks
        return "off" if ranks is None or ranks.overlap is None else str(ranks.overlap)

    @property
    def bytes_sent(self) -> dict[tuple[int, int], int]:
        """Bytes of messages sent so far, by (agent, rank), as numbered at the start."""
        return {} if self._ranks is None else dict(self._ranks.exchange.bytes_sent)

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
        if self._ranks is not None:
            return self._ranks.mixing(self.num_steps, device)
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
            check_range(flat, hyperparameters["lr"], self.param_groups[index]["params"], self._name)
            fresh = torch.tensor(flat, dtype=torch.float64, device="cpu")
            if not self.capturable:
                coefficients = fresh
            elif known:
                coefficients.copy_(fresh, non_blocking=True)
            else:
                coefficients = fresh.to(next((each.device for each in self.param_groups[index]["params"]), "cpu"))
            self._cached_coefficients[index] = (hyperparameters, coefficients)
        return coefficients

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
        if self._ranks is not None and self._ranks.exchange.group.rank:
            return  # one rank says it for all
        advice = analysis.advice(self.rule, self._hyperparameters(group), self.topology)
        if advice is not None:
            warnings.warn(f"{self._name}: {advice}", UserWarning, stacklevel=frames_to_the_caller())

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim`, with the rule's name and the number of steps taken beside it.

        With a process_group that of the agents here, and what rounding has left of messages.
        """
        residuals = {} if self._ranks is None else {"residuals": self._ranks.state_dict()}
        return {**super().state_dict(), **residuals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state_dict)
        if self._ranks is not None:
            self._ranks.load_state_dict(state_dict.get("residuals", []), self.param_groups)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._check_state_dict(state_dict)
        if self._ranks is not None:
            self._ranks.check_idle()
            self._ranks.checked_residuals(state_dict.get("residuals", []), self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks is not None:
            raise TypeError(f"{self._name}: with a process_group it cannot be copied or pickled; keep its state_dict()")
        return {**super().__getstate__(), "_ranks": None, "_is_made": True}

    def __repr__(self) -> str:
        head, _, groups = super().__repr__().partition("(")
        return f"{head}(\nrule: {self.rule.name}, topology: {self.topology}, backend: {self.backend}{groups}"
