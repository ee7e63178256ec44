"""The optimizer of every update rule: a `torch.optim.Optimizer` that takes the gradient step and mixes all agents.

Every parameter is stacked: shape (N, *shape), row i is agent i's. The gradient is taken at the parameters, so a normal
``loss.backward(); optimizer.step()`` loop is the whole algorithm.

A step reads the parameter groups, brings their coefficients up to date, makes one `GossipStep` for each group, and
gives these to the kernel; with a process_group, to the `Exchange` with the other ranks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gut_fast import analysis
from gut_fast.arguments import as_integer
from gut_fast.distributed import (
    DEFAULT_TIMEOUT,
    Exchange,
    Group,
    RankOptions,
    Together,
    Wire,
    mix_together,
    telling_the_others,
)
from gut_fast.kernels import ops, validation
from gut_fast.kernels.backends import GossipStep
from gut_fast.optim import checks
from gut_fast.optim.compiled import register
from gut_fast.optim.counts import Counts
from gut_fast.optim.options import Options, Parameters, check_group, check_implementation, check_names
from gut_fast.optim.prepared import Prepared, Views
from gut_fast.optim.state import DRIFT_MEMORY, KeepsState
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import CSR, Topology, nobody

__all__ = ["GossipOptimizer"]


class GossipOptimizer(KeepsState):
    """Any update rule, by name or an `UpdateRule` of your own; the other classes are this one with a rule set.

    Args:
        params: stacked parameters, or parameter groups; every one of shape (N, *shape), contiguous, and in one group
            of one floating dtype and device. Groups may have their own lr, weight_decay, maximize and hyper-parameters.
        rule: for example ``"gut"``; `gut_fast.rules.RULES` lists them.
        topology: who mixes with whom, for N agents. For another one load the state into another optimizer.
        lr: learning rate η >= 0, a number or a tensor of one, which schedulers fill in place and every step reads (from
            a GPU it waits for it). At 0 the parameters mix and the state stays as it is.
        weight_decay: λ >= 0, adds λz to the gradient, of frozen parameters too: give these a group with λ = 0.
        maximize: ascends instead of descending.
        drift_memory: γ in [0, 1). Rules that divide the drift D by η divide it by ρ = max(η, γ · the ρ of the step
            before): the same while η is constant or grows, and stable where a schedule restarts a tiny η. 0 divides by
            η, as the methods were published. None is 0.95, with `capturable` 0.
        local_steps: H >= 1, the number of steps in a round: the last one mixes, those before are local and send
            nothing. The attribute of this name may be changed at any time, on all ranks alike. A time-varying topology
            advances once a round. What the state does in a local step is part of the rule: see `gut_fast.rules`.
        foreach: None or False: one kernel takes the step of all tensors.
        fused: None or False: every step is fused, by the kernel that `backend` names.
        differentiable: False: steps work in place, below autograd.
        backend: ``"auto"``, or one of `gut_fast.kernels.backends.BACKENDS`.
        state_dtype: dtype of the state; None is the parameters'. It may be float32 beside parameters of bfloat16 or
            float16, or the other way round: such steps are computed in float32, and rounded once, when stored. Rules
            that never forget (D², gradient and momentum tracking, μ = 1) need at least float32: see `recentre`.
        capturable: steps can be captured in a CUDA graph, with the backends ``"cuda"`` and ``"triton"`` on a static
            topology. The coefficients live on the device; after a change of the learning rate or a hyper-parameter
            call `update_coefficients`, then replay. Capture anew after `load_state_dict`.
        process_group: this process is one of its ranks and holds one agent, number ``rank``; parameters have no leading
            dimension. Make it with ``torch.distributed.init_process_group``; see docs/how-to/machines.md.
        agents_per_rank: this process holds k agents, numbers ``rank · k …``, and parameters are (k, *shape).
        overlap: messages leave during backward, as soon as a bucket's gradients are there. All backward passes of a
            step but the last go into `no_sync`. If gradients are touched between backward and step (clipping, AMP)
            messages leave in `step` as without it; attribute `overlap` says which.
        wire_dtype: dtype of messages, None is the parameters'; ``"int8"`` and ``"int4"`` code them, 256 with one scale.
            Beside parameters of float32 it may be bfloat16, beside half-width ones float32, which gives the
            stacked numbers bit for bit. Without a process_group the agents mix what ranks would. On a static topology,
            with ``on_peer_failure="raise"``, differences are coded or rounded, which loses nothing in the end; else
            8 and 4 bits are coded by modulo, and bfloat16 is rounded. See `gut_fast.kernels.codes`.
        wire_seed: seed of rounding at random in ``"int8"`` and ``"int4"``; None rounds to the nearest.
        bucket_bytes: about how much travels at once; None is 25 MiB, or with `overlap` a quarter of the model if that
            is less (256 KiB at least).
        timeout: limit of any wait for another rank, in seconds.
        on_peer_failure: ``"raise"``, or ``"continue"``: the ranks that are left drop the lost ones from the topology,
            weigh it anew (`Topology.without`), zero the state of rules that track, and go on. Only with gloo.
        shared_memory: ranks of one machine read each other's messages where they are written, if their parameters are
            on the CPU and the group is one of gloo. False sends everything through the connections of the group.
        sync_initial: True overwrites the parameters of all agents by those of rank 0's first agent, here and in a group
            that is added later; the state stays zero. False leaves them, so that ranks keep what they have loaded, and
            warns if agents start from different ones.
        **hyperparameters: those of the rule; ``mu="auto"`` and ``kappa="auto"`` are chosen for the topology
            (`gut_fast.analysis.with_auto`).

    The state of parameter p is ``state[p][name]`` for each of the rule's state names, of p's shape, zero at the start;
    what is cleared or deleted is zero again. A group's ``drift_lr`` is ρ of the last step that mixed, ``round_lr`` the
    sum of the learning rates of the local steps since then.

    Raises:
        TypeError, ValueError: a bad or unknown option, hyper-parameter or parameter; nothing has been changed.
        RuntimeError: the backend asked for is not available for these parameters.
        MismatchError, PeerError: the ranks do not have the same settings, or one did not come (`gut_fast.distributed`).

    Warns:
        UserWarning: the hyper-parameters are unstable on the topology, the message gives the limit and what to do; or
            weight decay shrinks frozen parameters; or the parameters look like those of one plain module whose widths
            happen to be N; or agents on several ranks start from different weights without `sync_initial`.
    """

    def __init__(
        self,
        params: Parameters,
        rule: str | UpdateRule,
        *,
        topology: Topology,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        drift_memory: float | None = None,
        local_steps: int = 1,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        process_group: dist.ProcessGroup | Group | None = None,
        agents_per_rank: int | None = None,
        overlap: bool = False,
        wire_dtype: torch.dtype | str | None = None,
        wire_seed: int | None = None,
        bucket_bytes: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        on_peer_failure: Literal["raise", "continue"] = "raise",
        shared_memory: bool = True,
        sync_initial: bool = False,
        **hyperparameters: Any,
    ) -> None:
        ranks = overlap, wire_dtype, wire_seed, bucket_bytes, timeout, on_peer_failure, shared_memory, sync_initial
        options = RankOptions(agents_per_rank, *ranks)
        with telling_the_others(lambda: process_group if self._exchange is None else self._exchange.group):
            if not isinstance(topology, Topology):
                raise TypeError(f"topology must be a gut_fast.topology.Topology, got {type(topology).__name__}")
            if isinstance(params, torch.nn.Module):  # whose iteration, if it has one, is of something else
                raise TypeError(
                    f"{self._name}: give the parameters of the module, {type(params).__name__}.parameters()"
                )
            self.rule, self._topology, self.backend = get_rule(rule), topology, backend
            check_names(hyperparameters, self.rule.hyperparameters, Options.__annotations__, self._name)
            check_implementation({"foreach": foreach, "fused": fused, "differentiable": differentiable}, self._name)
            if capturable:
                checks.check_capturable(topology, process_group is not None, drift_memory, self._name)
                if wire_dtype is not None:
                    raise ValueError(
                        f"{self._name}: capturable=True with wire_dtype={wire_dtype}: messages that are coded or "
                        "rounded cannot be captured in a CUDA graph"
                    )
            self.state_dtype, self.capturable = state_dtype, capturable
            self._counts = Counts(1)
            self.local_steps = local_steps
            self._prepared: list[Prepared] = []  # one per group
            self._views = Views()
            self._number = register(self)
            memory = drift_memory if drift_memory is not None else 0.0 if capturable else DRIFT_MEMORY
            defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "drift_memory": memory}
            hyperparameters = self.rule.check(analysis.with_auto(self.rule, hyperparameters, topology, local_steps))
            if process_group is None:
                options.check_alone(self._name)
                wire = Wire(wire_dtype, wire_seed, topology.num_agents, topology.is_static)
                self._together = None if wire_dtype is None else Together(wire, topology, backend)
            else:
                own = self.rule, backend, options, local_steps, self.mix_state
                self._exchange = Exchange(process_group, topology, *own)
            super().__init__(params, {**defaults, **hyperparameters})
        self._is_made = True
        self._warn_if_unstacked()
        self._meet()

    @property
    def _name(self) -> str:
        return self.rule.name if type(self) is GossipOptimizer else type(self).__name__

    @property
    def _num_here(self) -> int:
        """The number of agents in this process."""
        return self.topology.num_agents if self._exchange is None else self._exchange.agents_per_rank

    @property
    def num_steps(self) -> int:
        """The number of steps taken."""
        return self._counts.steps

    @property
    def num_rounds(self) -> int:
        """The number of steps that have mixed; a time-varying topology mixes with ``topology.matrix(num_rounds)`` next.

        Without local steps it is `num_steps`.
        """
        return self._counts.rounds

    @property
    def local_steps(self) -> int:
        """H, the number of steps in a round, of which the last one mixes; a new value holds from the next step on."""
        return self._counts.local_steps

    @local_steps.setter
    def local_steps(self, local_steps: int) -> None:
        if as_integer(local_steps, f"{self._name}: local_steps", minimum=1) > 1 and self.capturable:
            raise ValueError(
                f"{self._name}: capturable=True with local_steps={local_steps}: a CUDA graph repeats one step, and "
                "local steps are others than those that mix"
            )
        self._counts.local_steps = local_steps

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with state zero. Raises as the constructor does, before anything has changed.

        All ranks call it; one that cannot add the group tells the others, which raise PeerError.
        """
        if self._exchange is not None:
            self._exchange.check_idle()
        with telling_the_others(lambda: self._exchange and self._is_made and self._exchange.group):
            self._take_group(param_group)
        try:
            self._meet()
        except BaseException:
            self._drop_group()
            raise

    def _take_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group that the other ranks have not yet met about."""
        params, tensors = checks.listed(param_group, self.rule, self._name)
        check_group(param_group, self.rule.hyperparameters, self._name)
        check_implementation(param_group, self._name)
        group = {**self.defaults, "drift_lr": 0.0, "round_lr": 0.0, **param_group}
        group = analysis.with_auto(self.rule, group, self.topology, self.local_steps)
        checks.checked_coefficients(self._settings(group), self.rule, self._name)
        validation.check_parameters(tensors, self._num_here, f"{self._name}: ")
        for tensor in tensors[:1]:
            dtype, state_dtype = tensor.dtype, self.state_dtype or tensor.dtype
            validation.check_dtypes(dtype, state_dtype, f"{self._name}: ")
            num_states, num_messages = len(self.rule.states), self.rule.num_messages
            function = "gossip_step" if self._wire is None else "combine"
            ops.select_backend(self.backend, tensor.device.type, dtype, num_states, num_messages, state_dtype, function)
            if self._wire is not None:
                self._wire.check(dtype)
        prepared = self._prepare(tensors)
        prepared.update(group, self.defaults["lr"], self._name, stays=self.capturable, local_before=0)
        self._warn_if_unstable(group)
        super().add_param_group({**group, "params": params})
        self._prepared.append(prepared)
        self._adopt_state()
        self._begin_wire_anew()
        self._stacks = None
        if self.capturable and tensors and tensors[0].is_cuda:
            self._counts.to(tensors[0].device)

    def _prepare(self, parameters: Sequence[Tensor]) -> Prepared:
        """Makes what the kernels read of a group, the state zero and the coefficients not computed yet."""
        mixing = None
        if self.topology.is_static and self._exchange is None and parameters:
            mixing = self.topology.csr(0, parameters[0].device)
        return Prepared(parameters, self.rule, mixing, self.state_dtype)

    def _drop_group(self) -> None:
        """Takes the last group out again."""
        self._prepared.pop()
        for parameter in self.param_groups.pop()["params"]:
            self.state.pop(parameter, None)

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return checks.settings_of(group, self.rule, self.defaults["lr"])

    def _warn_if_unstable(self, group: dict[str, Any]) -> None:
        if self._exchange is not None and self._exchange.group.rank:
            return  # one rank says it for all
        settings = {name: value for name, value in self._settings(group).items() if not name.startswith("drift_")}
        advice = analysis.advice(self.rule, settings, self.topology, local_steps=self.local_steps)
        code = None if self._wire is None else self._wire.code(torch.float32)
        if advice is None and code is not None and code.kind == "difference":
            about = self.rule, settings, self.topology, code.bits
            advice = analysis.coding_advice(*about, at_random=code.seed is not None, local_steps=self.local_steps)
        if advice is not None:
            warnings.warn(f"{self._name}: {advice}", UserWarning, stacklevel=checks.frames_to_the_caller())

    def _warn_if_unstacked(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self._num_here > 1 and not self._looked_up_stacks():
            checks.warn_if_unstacked(parameters, self._num_here, self._name)

    def update_coefficients(self) -> None:
        """Brings the coefficients up to date with the hyper-parameters, and the state with what was put there.

        A step does the same. For ``capturable=True``: a graph reads coefficients and state from the device and does not
        look at ``param_groups``.

        Raises:
            TypeError, ValueError: a bad learning rate or hyper-parameter; its group's coefficients stay as they are.
        """
        self._follow_state()
        for index in range(len(self.param_groups)):
            self._update_coefficients(index)

    def _update_coefficients(self, index: int) -> None:
        group, default_lr = self.param_groups[index], self.defaults["lr"]
        before = None if self._counts.is_local else self._counts.local_before
        self._prepared[index].update(group, default_lr, self._name, stays=self.capturable, local_before=before)

    def _up_to_date(self) -> list[Tensor]:
        """Does what a step does before the kernel and after it; returns the coefficients and state that it reads."""
        if not self._is_captured():
            self.update_coefficients()
            self._recentre_if_due()
            self._close_step()
        coefficients = [prepared.coefficients for prepared in self._prepared]
        return [*coefficients, *(buffer for prepared in self._prepared for buffer in prepared.state.buffers)]

    def _close_step(self) -> None:
        """Takes down that a step was taken, and at which rates."""
        for group, prepared in zip(self.param_groups, self._prepared, strict=True):
            if self._counts.is_local:
                group["round_lr"] += prepared.settings["lr"]
            else:
                group["drift_lr"], group["round_lr"] = prepared.drift_lr, 0.0
        self._counts.advance()

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None
    ) -> float | None:
        """Takes one step of all agents, in place.

        Args:
            closure: evaluates the loss again and returns it, as in `torch.optim`.
            grad_scale: [N], a factor on each agent's gradient; zero lets the agent mix without a gradient of its own.
                With a process_group [k], for the agents here.

        A gradient of None counts as zero: momentum and weight decay go on. NaN and Inf are carried as in `torch.optim`.

        Raises:
            TypeError, ValueError: a bad learning rate, hyper-parameter or gradient; nothing has been changed.
            PeerError: a rank died or did not send in time; parameters and state are as before, and no more steps can
                be taken. Nor can they after any other exception that breaks off what ranks do together, as Ctrl-C does.
        """
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        if not (hooks or torch.autograd.profiler._is_profiler_enabled):
            return self._step(closure, grad_scale)
        given: dict[str, Any] = {
            "closure": closure,
            "grad_scale": grad_scale,
        }  # hooks see, and may change, what the caller gave
        return self._watched_step(**{name: value for name, value in given.items() if value is not None})

    step.hooked = True  # type: ignore[attr-defined]  # or torch puts a profiler's range around it, half of a small step

    def _step(self, closure: Callable[[], float] | None = None, grad_scale: Tensor | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_agents()
        if torch.compiler.is_compiling():
            self._step_in_graph(grad_scale)
            return loss
        is_captured = self._is_captured()
        if not is_captured:
            self.update_coefficients()
            self._recentre_if_due()
        if grad_scale is not None:
            grad_scale = checks.checked_grad_scale(grad_scale, self._num_here, self._name)
        if self._exchange is not None:
            self._step_across(self._exchange, grad_scale, self._counts.is_local)
        else:
            for run in self._prepared_steps(self._group_steps(grad_scale)):
                run()
        if is_captured:
            self._counts.advance_captured()
        else:
            self._close_step()
        return loss

    def _prepared_steps(self, steps: list[GossipStep | None]) -> list[Callable[[], None]]:
        """Checks the steps of all groups, and returns what takes them."""
        given = [step for step in steps if step is not None]
        if self._counts.is_local:
            return [ops.prepare(step, self.backend) for step in given]
        states = [functools.partial(mix_together, step, self.backend) for step in self._state_steps() if step]
        if self._together is None:
            return [*(ops.prepare(step, self.backend) for step in given), *states]
        for step in given:
            validation.check(step)
        return [functools.partial(self._together.run, steps, self.num_rounds), *states]

    def _step_in_graph(self, grad_scale: Tensor | None) -> None:
        """Takes a step that is traced: what depends on learning rates, state and step count is done by an op."""
        if self._exchange is not None:
            raise RuntimeError(f"{self._name}: with a process_group, leave step() out of torch.compile")
        plain = {"local_steps": self.local_steps == 1, "wire_dtype": self._together is None}
        for option, is_plain in {**plain, "mix_state": not self.mix_state}.items():
            if not is_plain:
                raise RuntimeError(f"{self._name}: with {option}, leave step() out of torch.compile")
        if grad_scale is not None:
            grad_scale = checks.checked_grad_scale(grad_scale, self._num_here, self._name)
        steps = [step for step in self._group_steps(grad_scale) if step is not None]
        coefficients = [prepared.coefficients for prepared in self._prepared]
        state = [buffer for prepared in self._prepared for buffer in prepared.state.buffers]
        torch.ops.gut_fast.bring_up_to_date_(coefficients, state, self._number)
        for step in steps:
            ops.gossip_step_(*step, self.backend)

    _watched_step = Optimizer.profile_hook_step(_step)
    """`_step` with the hooks and the profiler's range of torch."""

    def _gradients(self) -> list[list[Tensor | None]]:
        """Returns the gradients of each group; None stands for zero."""
        return [[parameter.grad for parameter in group["params"]] for group in self.param_groups]

    def _group_steps(self, grad_scale: Tensor | None) -> list[GossipStep | None]:
        """Makes the step of each group; None for a group without parameters."""
        return [
            self._group_step(index, gradients, grad_scale) if gradients else None
            for index, gradients in enumerate(self._gradients())
        ]

    def _group_step(self, index: int, gradients: list[Tensor | None], grad_scale: Tensor | None) -> GossipStep:
        """Makes the step of a group whose coefficients are up to date."""
        parameters, prepared = list(self.param_groups[index]["params"]), self._prepared[index]
        device, state = parameters[0].device, prepared.state.buffers
        mixing, scale = self._mixing(prepared, device), None if grad_scale is None else grad_scale.to(device)
        messages = self.rule.num_messages
        step = GossipStep(parameters, state, gradients, prepared.coefficients, messages, *mixing, scale)
        if state and state[0].dtype != (self.state_dtype or parameters[0].dtype):
            now = f"{self._name}: the parameters are now {parameters[0].dtype}, their state is {state[0].dtype}; make "
            now += "the optimizer after the conversion"
            validation.check_dtypes(parameters[0].dtype, state[0].dtype, f"{now}: ")
            validation.check(step)
            raise TypeError(f"{now}, or give it this state_dtype")
        return step

    def _mixing(self, prepared: Prepared, device: torch.device) -> CSR:
        """Returns the off-diagonal weights of the next step."""
        if self._counts.is_local:
            return nobody(self._num_here, device)
        if self._exchange is not None:
            return self._exchange.mixing(self.num_rounds, device)
        if prepared.mixing is not None:
            if prepared.mixing.row_start.device != device:
                raise TypeError(f"{self._name}: the parameters are now on {device}; make the optimizer after the move")
            return prepared.mixing
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self._name}: {self.topology} varies with time; leave step() out of torch.compile")
        return self.topology.csr(self.num_rounds, device)

    def _is_captured(self) -> bool:
        """Returns whether a CUDA graph is being captured, which is refused unless the optimizer is made for it."""
        for group in self.param_groups:
            if group["params"] and group["params"][0].is_cuda and torch.cuda.is_current_stream_capturing():
                break
        else:
            return False
        if not self.capturable:
            raise RuntimeError(
                f"{self._name}: to capture steps in a CUDA graph, make the optimizer with capturable=True"
            )
        settings = [self._settings(group) for group in self.param_groups if not _is_on_gpu(group["lr"])]
        known = [
            prepared.settings
            for group, prepared in zip(self.param_groups, self._prepared, strict=True)
            if not _is_on_gpu(group["lr"])  # reading it would wait for the GPU, which a capture cannot
        ]
        if settings != known or not self._views.are_in(self.__dict__["state"]):
            raise RuntimeError(f"{self._name}: call update_coefficients() before the capture")
        return True

    def _snapshot(self, index: int) -> GossipStep:
        """Makes the step of a group as it would be taken now, with the gradients that are there."""
        self._follow_state()
        self._update_coefficients(index)
        return self._group_step(index, [parameter.grad for parameter in self.param_groups[index]["params"]], None)

    def __repr__(self) -> str:
        head, _, groups = super().__repr__().partition("(")
        return f"{head}(\nrule: {self.rule.name}, topology: {self.topology}, backend: {self.backend}{groups}"


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
