"""Engines made of PyTorch's operators alone: agent by agent, agents on threads, and all agents at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from gut_fast.simulation.precision import at_least_float32, forward_precision
from gut_fast.simulation.stacked import StackedModule
from gut_fast.simulation.undo import remember
from gut_fast.simulation.workers import Job, Workers

__all__ = ["Compiler", "Engine", "LoopEngine", "Loss", "VmapEngine", "WorkersEngine"]

Loss = Callable[[Any, Tensor], Tensor]
"""Mean loss of one agent's batch: (outputs [B, ...], targets [B, ...]) -> scalar."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a faster function of the same arguments and results, as `torch.compile` does."""


class Engine(Protocol):
    """Computes the gradients of all agents."""

    @property
    def name(self) -> str:
        """As in `ENGINES`."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [N] of the batches; the gradients are left in ``.grad`` of the stacked parameters."""


class LoopEngine:
    """One agent after the other; each backward pass accumulates straight into the flat gradient buffer.

    Args:
        stacked: the agents' models; they are put into training mode.
        loss: of one agent; it is given outputs of half precision in float32.
        autocast: dtype of `torch.autocast` around the forward passes, or None.
        compiler: compiles one agent's loss, once for all agents. What the forward pass does in Python besides
            computing tensors is then done at the first call only, and random numbers are others.
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
        self._agent_forward = _agent_forward(stacked, autocast)
        self._compiled = None if compiler is None else compiler(self._loss_and_buffers)
        for module in (stacked.module, *self._agents):
            if not module.training:
                module.train()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`."""
        self._stacked.zero_grad()
        return torch.stack([self._gradient(i, inputs, targets) for i in range(len(self._agents))])

    def _gradient(self, i: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Agent i's loss; its rows of the gradients and buffers are filled."""
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
        """Agent i's loss."""
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
        """Loss and new buffers of one agent, as a function of its parameters and buffers."""
        outputs, *buffers = self._agent_forward(inputs, *tensors)
        return self._loss(outputs, targets), *buffers


class WorkersEngine(LoopEngine):
    """The agents shared out among `torch.get_num_threads()` threads, each of which computes one agent at a time.

    Small operators leave most of a machine's cores idle; whole agents do not. PyTorch releases Python's lock inside its
    operators and runs a backward pass in the thread that starts it, and agents write to different rows, so threads are
    enough. Within an agent every operator has one thread: the results are those of `LoopEngine` with
    ``torch.set_num_threads(1)``, bit for bit, however many threads there are. (With several threads `LoopEngine` itself
    may add up in another order.)

    That holds for dropout and whatever else draws from torch's default generator in the forward pass: a gradient after
    which the generator has moved is computed again, and from then on forward passes run in the order of the agents, and
    backward passes beside them. Random numbers from elsewhere, or drawn in the backward pass, come in any order.
    The module and the loss are called in several threads, with the caller's gradient mode and autocasting; other
    contexts of the calling thread do not reach them.

    Raises:
        ValueError: the model is not on the CPU.
    """

    name = "workers"

    def __init__(self, stacked: StackedModule, loss: Loss, autocast: torch.dtype | None = None) -> None:
        if stacked.device.type != "cpu":
            raise ValueError(f"engine 'workers' is for the CPU, the model is on {stacked.device}; use 'vmap' or 'loop'")
        super().__init__(stacked, loss, autocast)
        self._workers = Workers(max_threads=stacked.num_agents)
        self._draws_random_numbers = False

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`. An error in any agent is raised when no thread computes any more."""
        if not self._draws_random_numbers:
            undo, random_state = remember(self._stacked), torch.get_rng_state()
            losses = self._run(self._in_any_order(inputs, targets))
            if torch.equal(torch.get_rng_state(), random_state):
                return losses
            undo()
            self._draws_random_numbers = True
        return self._run(self._in_order(inputs, targets))

    def _run(self, jobs: Iterator[Job[Tensor]]) -> Tensor:
        self._stacked.zero_grad()
        return torch.stack(self._workers.run(jobs))

    def _in_any_order(self, inputs: Tensor, targets: Tensor) -> Iterator[Job[Tensor]]:
        return (partial(self._gradient, i, inputs, targets) for i in range(len(self._agents)))

    def _in_order(self, inputs: Tensor, targets: Tensor) -> Iterator[Job[Tensor]]:
        """Forward passes are done as the jobs are made, one after the other."""
        for i in range(len(self._agents)):
            yield partial(self._backward, i, self._forward(i, inputs, targets))


class VmapEngine:
    """All agents at once through `torch.func.vmap`; random operations such as dropout differ between agents.

    Few, large operators: the fewest launches, but convolutions become grouped ones, which some libraries are slow at.

    Args:
        stacked, loss, autocast: as for `LoopEngine`.
        compiler: compiles the losses of all agents; see there.
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
        self._forward = vmap(_agent_forward(stacked, autocast), randomness="different")
        self._batched_loss = _batched_loss(loss)
        self._evaluate = self._losses_and_buffers if compiler is None else compiler(self._losses_and_buffers)
        if not stacked.module.training:
            stacked.module.train()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`; the gradients are separate tensors, not views of the flat buffer."""
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
        """Losses and new buffers of all agents, as a function of the stacked parameters and buffers."""
        outputs, *new_buffers = self._forward(inputs, *tensors)
        return self._batched_loss(outputs, targets), *new_buffers


def _agent_forward(stacked: StackedModule, autocast: torch.dtype | None) -> Callable[..., tuple[Any, ...]]:
    """Outputs and new buffers of one agent: a function of its inputs, parameters and buffers.

    The function's argument list is flat, because vmap walks nested ones in Python.
    """
    names = list(stacked.state_dict())

    def forward(inputs: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        by_name = dict(zip(names, tensors, strict=True))
        outputs, new_buffers = stacked.call(stacked.module, by_name, inputs, autocast)
        return outputs, *new_buffers.values()

    return forward


def _batched_loss(loss: Loss) -> Callable[[Any, Tensor], Tensor]:
    """`loss` of every agent: (outputs [N, B, ...], targets [N, B, ...]) -> losses [N]."""
    each = vmap(loss, randomness="different")

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim != 3 or targets.ndim != 2:
            return each(outputs, targets)
        # One call for all samples: vmap takes this loss apart in Python, which costs more than a small model.
        losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    return cross_entropy if loss is functional.cross_entropy else each
