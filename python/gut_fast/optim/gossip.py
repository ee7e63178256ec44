"""Decentralized versions of any local optimizer, and clipping per agent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gut_fast.arguments import as_number, shown
from gut_fast.distributed import DEFAULT_TIMEOUT, Group, telling_the_others
from gut_fast.kernels import validation
from gut_fast.kernels.backends import GossipStep
from gut_fast.optim.local import check_inner_state, why_not_local
from gut_fast.optim.mixed_state import checked_names, mixed_state
from gut_fast.optim.optimizer import GossipOptimizer
from gut_fast.optim.options import check_group
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = ["Gossip", "clip_grad_norm_per_agent_"]

NOT_AROUND = {
    "capturable": "a CUDA graph would keep the learning rate of its capture",
    "overlap": "what is sent is known only after the inner optimizer's step",
    "lr": "it is that of the inner optimizer",
    "weight_decay": "give it to the inner optimizer",
    "maximize": "give it to the inner optimizer",
}
"""Options of other optimizers that `Gossip` cannot have, and why."""


class Gossip(GossipOptimizer):
    """Lets an inner torch optimizer make the local move, and a rule make the agents agree.

    The inner optimizer's move, divided by the learning rate, is the gradient of the rule::

        g = (z − z_inner) / η,   then one step of the rule from z

    so ``Gossip(torch.optim.AdamW(params, lr=1e-3), rule="gut", topology=...)`` is decentralized AdamW with tracking,
    and with `torch.optim.SGD` inside it equals the plain class to rounding, where all parameters have gradients: torch
    leaves one without as it is, the plain class takes it for zero. Weight decay and momentum of the inner optimizer act
    in its move, the factors of ``step(grad_scale=...)`` on the gradients that it sees. The learning rate is first that
    of the inner optimizer's groups; attach schedulers to the Gossip optimizer, which hands the learning rate on at
    every step. Keys of an added group, besides the rule's, are the inner optimizer's.

    Args:
        optimizer: a `torch.optim.Optimizer` over stacked parameters whose step needs no closure and treats every number
            by itself, as SGD, Adam and most others do. Those that look at a whole tensor (Adafactor, Muon, LAMB) would
            mix agents outside the topology and are refused, torch's by their class, others by trial steps of two
            agents, with a warning if it takes none; with one agent on each rank they serve.
        rule: as for `GossipOptimizer`.
        topology: who mixes with whom, for N agents.
        drift_memory: as for `GossipOptimizer`.
        local_steps: as for `GossipOptimizer`; the inner optimizer moves in every step.
        backend: as for `GossipOptimizer`.
        state_dtype: dtype of the rule's state; None is the parameters'.
        process_group: as for `GossipOptimizer`.
        agents_per_rank: as for `GossipOptimizer`.
        wire_dtype: as for `GossipOptimizer`.
        wire_seed: as for `GossipOptimizer`.
        bucket_bytes: as for `GossipOptimizer`.
        timeout: as for `GossipOptimizer`.
        on_peer_failure: as for `GossipOptimizer`.
        shared_memory: as for `GossipOptimizer`.
        sync_initial: as for `GossipOptimizer`.
        mix_state: names of the inner optimizer's state that are mixed at the end of each round, as the models are:
            ``("exp_avg_sq",)`` mixes Adam's second moments, without which agents whose data differ settle elsewhere
            than all data together would have them. They travel in bfloat16, whatever `wire_dtype` is, and leave in
            `step`. An agent that has no such state of a parameter yet, as it had no gradient, neither gives nor takes.
            Where ranks have left the others keep it; a rank that comes back begins without.
        **hyperparameters: those of the rule.

    Raises:
        TypeError, ValueError, RuntimeError: as `GossipOptimizer`; nothing has been changed. After a step that fails in
            or behind the inner optimizer's, parameters are as before, its own state is as its step left it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: str | UpdateRule = "gut",
        *,
        topology: Topology,
        drift_memory: float | None = None,
        local_steps: int = 1,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | Group | None = None,
        agents_per_rank: int | None = None,
        wire_dtype: torch.dtype | str | None = None,
        wire_seed: int | None = None,
        bucket_bytes: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        on_peer_failure: Literal["raise", "continue"] = "raise",
        shared_memory: bool = True,
        sync_initial: bool = False,
        mix_state: Sequence[str] = (),
        **hyperparameters: Any,
    ) -> None:
        with telling_the_others(lambda: process_group):
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"Gossip: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
            mixes = isinstance(optimizer, GossipOptimizer)
            is_of_one = process_group is not None and agents_per_rank in (None, 1)
            if reason := "it mixes the agents itself" if mixes else why_not_local(optimizer, is_of_one):
                raise TypeError(f"Gossip: {type(optimizer).__name__} cannot make the local move: {reason}")
            for option, reason in NOT_AROUND.items():
                if hyperparameters.pop(option, None):
                    raise ValueError(f"Gossip: no {option}=; {reason}")
            self.mix_state = checked_names(mix_state, optimizer)
        self.inner: Optimizer = optimizer
        self._handed_on: list[float] = []  # the learning rate each inner group was last given
        groups: list[dict[str, Any]]
        groups = [{"params": _named(group), "lr": _own(group["lr"])} for group in optimizer.param_groups]
        super().__init__(
            groups,
            rule,
            topology=topology,
            lr=groups[0]["lr"],
            drift_memory=drift_memory,
            local_steps=local_steps,
            backend=backend,
            state_dtype=state_dtype,
            process_group=process_group,
            agents_per_rank=agents_per_rank,
            wire_dtype=wire_dtype,
            wire_seed=wire_seed,
            bucket_bytes=bucket_bytes,
            timeout=timeout,
            on_peer_failure=on_peer_failure,
            shared_memory=shared_memory,
            sync_initial=sync_initial,
            **hyperparameters,
        )

    def _take_group(self, param_group: dict[str, Any]) -> None:
        if not self._is_made:  # the inner optimizer has the group already
            super()._take_group(param_group)
            self._handed_on.append(float(param_group["lr"]))
            return
        check_group(param_group, (*self.rule.hyperparameters, *self.inner.defaults), self._name)
        params, lr = param_group["params"], param_group.get("lr", self.inner.defaults["lr"])
        params = params if isinstance(params, (Tensor, set)) else list(params)
        names = [name for name in self.rule.hyperparameters if name in param_group]
        others = {name: value for name, value in param_group.items() if name not in names}
        try:
            self.inner.add_param_group({**others, "params": params})
            super()._take_group({"params": params, "lr": _own(lr), **{name: param_group[name] for name in names}})
        except BaseException:
            del self.inner.param_groups[len(self.param_groups) :]
            raise
        self._handed_on.append(float(lr))

    def _drop_group(self) -> None:
        super()._drop_group()
        del self.inner.param_groups[-1], self._handed_on[-1]

    def _group_steps(self, grad_scale: Tensor | None) -> list[GossipStep | None]:
        """Makes the step of each group; the factors are on the gradients that the inner optimizer is given."""
        if grad_scale is None:
            return super()._group_steps(None)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        with _scaled_gradients(parameters, grad_scale):
            return super()._group_steps(None)

    @torch.no_grad()
    def _gradients(self) -> list[list[Tensor | None]]:
        """Lets the inner optimizer move, takes the move back, and returns it divided by the learning rate."""
        for index, group in enumerate(self.param_groups):
            if group["params"]:
                validation.check(self._group_step(index, [None] * len(group["params"]), None))
        self._hand_on_learning_rates()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        try:
            self.inner.step()
            moved = iter([start - parameter for start, parameter in zip(before, parameters, strict=True)])
        finally:
            for start, parameter in zip(before, parameters, strict=True):
                parameter.copy_(start)
        return [
            [next(moved).div_(lr or 1.0) for _ in group["params"]]  # at lr = 0 the rule ignores gradients
            for group, lr in zip(self.param_groups, self._handed_on, strict=True)
        ]

    def _state_steps(self) -> list[GossipStep | None]:
        steps: list[GossipStep | None] = []
        for prepared, group in zip(self._prepared, self.param_groups, strict=True) if self.mix_state else ():
            params = group["params"]
            mixing = self._mixing(prepared, params[0].device) if params else None
            steps.append(mixing and mixed_state(self.mix_state, self.inner.state, params, mixing))
        return steps

    def _hand_on_learning_rates(self) -> None:
        current = [float(group["lr"]) for group in self.inner.param_groups]
        if current != self._handed_on:
            raise RuntimeError(
                f"Gossip: the inner optimizer's learning rates changed from {self._handed_on} to {current}; attach "
                "schedulers to the Gossip optimizer, it hands the learning rate on"
            )
        self._handed_on = [float(group["lr"]) for group in self.param_groups]
        for inner_group, lr in zip(self.inner.param_groups, self._handed_on, strict=True):
            if isinstance(inner_group["lr"], Tensor):
                inner_group["lr"].fill_(lr)
            else:
                inner_group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as `GossipOptimizer.state_dict`, with the inner optimizer's under ``"inner"``."""
        return {**super().state_dict(), "inner": self.inner.state_dict(), "inner_type": type(self.inner).__name__}

    def _with_inner(self) -> list[Optimizer]:
        return [self, self.inner]

    def _take_over(self, loaded: dict[str, Any]) -> None:
        super()._take_over(loaded)
        try:
            self.inner.load_state_dict(loaded["inner"])
        except Exception as error:
            raise ValueError(
                f"Gossip: {type(self.inner).__name__} cannot load the inner state: {type(error).__name__} {error}"
            ) from error
        self._handed_on = [float(group["lr"]) for group in self.inner.param_groups]

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._check_state_dict(state_dict)
        if "inner" not in state_dict:
            raise ValueError("Gossip: the state has no 'inner' entry; it was not saved by a Gossip optimizer")
        if state_dict.get("inner_type") != type(self.inner).__name__:
            given, expected = state_dict.get("inner_type"), type(self.inner).__name__
            raise ValueError(f"Gossip: the inner state is of {shown(given)}, expected {expected!r}")
        check_inner_state(self.inner, state_dict["inner"], self._name)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "inner": self.inner,
            "_handed_on": self._handed_on,
            "mix_state": self.mix_state,
        }


def _named(group: dict[str, Any]) -> list[Any]:
    """Returns the parameters of a group, with their names if it has them."""
    names, params = group.get("param_names"), group["params"]
    return list(params) if names is None else list(zip(names, params, strict=True))


def _own(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr


@contextmanager
def _scaled_gradients(parameters: Sequence[Tensor], factors: Tensor) -> Iterator[None]:
    """Within the context an agent's gradients are multiplied by its factor; zero makes zero of NaN and Inf too."""
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                rows = gradient.to_dense().reshape(len(factors), gradient.numel() // len(factors))
                factor = factors.to(gradient.device)[:, None]
                scaled = torch.where(factor == 0, 0.0, rows * factor)  # in float64, as the factors are
                parameter.grad = scaled.to(gradient.dtype).view(gradient.shape)
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@torch.no_grad()
def clip_grad_norm_per_agent_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales each agent's gradient, in place, so that its norm over all parameters is at most `max_norm`.

    The agent's row of every stacked gradient is multiplied by ``min(1, max_norm / (norm + 1e-6))``, as
    `torch.nn.utils.clip_grad_norm_` does for one model. Gradients that are None are left out.

    Returns:
        The norms before clipping, shape [N] (shape [0] if there is no gradient).

    Raises:
        TypeError: `max_norm` is not a number.
        ValueError: `max_norm` is negative or NaN, or the leading dimensions differ.
        RuntimeError: `error_if_nonfinite` and some agent's norm is NaN or Inf; the message names the agents.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not isinstance(max_norm, Tensor):
        max_norm = as_number(max_norm, "clip_grad_norm_per_agent_: max_norm")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_per_agent_: max_norm must be >= 0, got {max_norm}")
    if not gradients:
        return torch.empty(0)
    num_agents = {gradient.shape[0] if gradient.dim() else None for gradient in gradients}
    if len(num_agents) != 1 or None in num_agents:
        shapes = [tuple(gradient.shape) for gradient in gradients]
        raise ValueError(f"clip_grad_norm_per_agent_: gradients must share the leading dimension N, got {shapes}")
    rows = [gradient.reshape(len(gradient), gradient[0].numel()) for gradient in gradients if gradient.numel()]
    per_tensor = [torch.linalg.vector_norm(row, norm_type, dim=1) for row in rows]
    per_tensor = per_tensor or [gradients[0].new_zeros(len(gradients[0]))]  # of gradients without a number
    norms: Tensor = torch.linalg.vector_norm(torch.stack(per_tensor), norm_type, dim=0)
    if error_if_nonfinite and not bool(norms.isfinite().all()):
        bad = torch.nonzero(~norms.isfinite()).flatten().tolist()
        raise RuntimeError(f"clip_grad_norm_per_agent_: the gradient norm of agents {bad} is not finite")
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
    return norms
