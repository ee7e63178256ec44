"""The two ways through the agents, one after the other or all at once, and how to undo a gradient that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from gut_fast import randomness
from gut_fast.agents import StackedModule
from gut_fast.agents.precision import at_least_float32, forward_precision

__all__ = ["Compiler", "Engine", "LoopEngine", "Loss", "VmapEngine", "remember", "undo_on_error"]

Loss = Callable[[Any, Tensor], Tensor]
"""The mean loss of one agent's batch: (outputs [B, ...], targets [B, ...]) -> scalar."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a faster function of the same arguments and results, as `torch.compile` does."""


class Engine(Protocol):
    """Computes the gradients of all agents."""

    @property
    def name(self) -> str:
        """The engine's name in `ENGINES`."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Puts the gradients into ``.grad`` of the stacked parameters, and returns the losses [N] of the batches."""


class LoopEngine:
    """An engine that computes one agent after the other, each backward pass straight into the flat gradient buffer.

    Args:
        stacked: the agents' models; they are put into training mode.
        loss: loss of one agent; outputs of half precision reach it in float32.
        autocast: dtype of `torch.autocast` around the forward passes, or None.
        compiler: compiles one agent's loss, once for all agents. Python code of the forward pass that computes no
            tensors then runs at the first call only, and random numbers differ from those without a compiler.
    """

    name: str = "loop"

    def __init__(
        self,
        stacked: StackedModule,
        loss: Loss,
        autocast: torch.dtype | None = None,
        *,
        compiler: Compiler | None = None,
    ) -> None:
        if compiler is not None:
            self.name = f"compiled-{self.name}"
        self._stacked = stacked
        self._loss = loss
        self._autocast = autocast
        self._agents = [stacked.agent(i) for i in range(stacked.num_agents)]
        self._module = stacked.skeleton()
        self._agent_forward = _agent_forward(stacked, self._module, autocast)
        self._compiled = None if compiler is None else compiler(self._loss_and_buffers)
        for module in (self._module, *self._agents):
            if not module.training:
                module.train()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the gradients as an `Engine` does, in the flat gradient buffer."""
        self._stacked.zero_grad()
        return torch.stack([self._gradient(i, inputs, targets) for i in range(len(self._agents))])

    def _gradient(self, i: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Fills agent i's rows of the gradients and buffers, and returns its loss."""
        if self._compiled is None:
            return self._backward(i, self._forward(i, inputs, targets))
        buffers = [buffer[i] for _, buffer in self._stacked.named_buffers()]
        loss: Tensor
        loss, *new_buffers = self._compiled(inputs[i], targets[i], *self._agents[i].parameters(), *buffers)
        loss.backward()
        for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new_buffer)
        return loss.detach()

    def _forward(self, i: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of agent i."""
        with forward_precision(self._autocast, inputs.device):
            outputs = self._agents[i](inputs[i])
        return self._loss(at_least_float32(outputs), targets[i])

    def _backward(self, i: int, loss: Tensor) -> Tensor:
        """Fills agent i's rows of the gradients and buffers, and returns the loss without its graph."""
        loss.backward()
        if self._stacked.flat_buffers:
            self._stacked.keep_buffers(i)
        return loss.detach()

    def _loss_and_buffers(self, inputs: Tensor, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The loss and new buffers of one agent, as a function of its parameters and buffers."""
        outputs, *buffers = self._agent_forward(inputs, *tensors)
        return self._loss(outputs, targets), *buffers


class VmapEngine:
    """An engine that computes all agents at once through `torch.func.vmap`; dropout and the like differ between agents.

    There are few, large operators, so the fewest launches; but convolutions become grouped ones, at which some
    libraries are slow.

    Args:
        stacked, loss, autocast: see `LoopEngine`.
        compiler: compiles the losses of all agents; see `LoopEngine`.
    """

    name: str = "vmap"

    def __init__(
        self,
        stacked: StackedModule,
        loss: Loss,
        autocast: torch.dtype | None = None,
        *,
        compiler: Compiler | None = None,
    ) -> None:
        if compiler is not None:
            self.name = f"compiled-{self.name}"
        self._stacked = stacked
        self._forward = vmap(_agent_forward(stacked, stacked.skeleton().train(), autocast), randomness="different")
        self._batched_loss = _batched_loss(loss)
        self._evaluate = self._losses_and_buffers if compiler is None else compiler(self._losses_and_buffers)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the gradients as an `Engine` does, in separate tensors, not views of the flat buffer."""
        parameters = self._stacked.parameters()
        buffers = [buffer for _, buffer in self._stacked.named_buffers()]
        losses, *new_buffers = self._evaluate(inputs, targets, *parameters, *buffers)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new_buffer)
        return losses.detach()

    def _losses_and_buffers(self, inputs: Tensor, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The losses and new buffers of all agents, as a function of the stacked parameters and buffers."""
        outputs, *new_buffers = self._forward(inputs, *tensors)
        return self._batched_loss(outputs, targets), *new_buffers


def _agent_forward(
    stacked: StackedModule, module: nn.Module, autocast: torch.dtype | None
) -> Callable[..., tuple[Any, ...]]:
    """A function of one agent's inputs, parameters and buffers that returns its outputs and new buffers.

    The function's argument list is flat, because vmap walks nested arguments in Python.
    """
    names = list(stacked.tensors())

    def forward(inputs: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        by_name = dict(zip(names, tensors, strict=True))
        outputs, new_buffers = stacked.call(module, by_name, inputs, autocast)
        return outputs, *new_buffers.values()

    return forward


def _batched_loss(loss: Loss) -> Callable[[Any, Tensor], Tensor]:
    """The `loss` of every agent: (outputs [N, B, ...], targets [N, B, ...]) -> losses [N]."""
    each = vmap(loss, randomness="different")

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim != 3 or targets.ndim != 2:
            return each(outputs, targets)
        # One call takes all samples: vmap decomposes this loss in Python, which costs more than a small model.
        losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    return cross_entropy if loss is functional.cross_entropy else each


@contextlib.contextmanager
def undo_on_error(stacked: StackedModule) -> Iterator[None]:
    """A context that puts buffers and random state back if its block raises."""
    undo = remember(stacked)
    try:
        yield
    except BaseException:
        undo()
        raise


def remember(stacked: StackedModule) -> Callable[[], None]:
    """A function that puts buffers and random state back to their values of now.

    Besides the gradient they are all that computing it changes.
    """
    before = [flat.clone() for flat in stacked.flat_buffers]
    random_state = randomness.get_state(stacked.device)

    def undo() -> None:
        for flat, values in zip(stacked.flat_buffers, before, strict=True):
            flat.copy_(values)
        randomness.set_state(random_state, stacked.device)

    return undo
