"""The two ways through the agents, one after the other or all at once, and how to undo a gradient that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from gut_fast import randomness
from gut_fast.agents import StackedModule
from gut_fast.simulation.objective import Objective, applied

__all__ = ["Compiler", "Engine", "LoopEngine", "VmapEngine", "remember", "undo_on_error"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a faster function of the same arguments and results, as `torch.compile` does."""


class Engine(Protocol):
    """Computes the gradients of all agents."""

    @property
    def name(self) -> str:
        """The engine's name in `ENGINES`."""

    def __call__(self, batch: Any) -> Tensor:
        """Puts the gradients into ``.grad`` of the stacked parameters, and returns the losses [N].

        Args:
            batch: the agents' batches, tensors [N, B, ...] in nested tuples, lists and dicts. A parameter that is
                frozen has no gradient afterwards, or zero.
        """


class LoopEngine:
    """An engine that computes one agent after the other, each backward pass straight into the flat gradient buffer.

    Args:
        stacked: the agents' models; they are put into training mode.
        objective: the loss of one agent.
        compiler: compiles one agent's loss, once for all agents. Python code of the forward pass that computes no
            tensors then runs at the first call only, and random numbers differ from those without a compiler.
    """

    name: str = "loop"

    def __init__(self, stacked: StackedModule, objective: Objective, *, compiler: Compiler | None = None) -> None:
        if compiler is not None:
            self.name = f"compiled-{self.name}"
        self._stacked = stacked
        self._objective = objective
        self._agents: list[nn.Module] = []
        self._compiled = None if compiler is None else compiler(applied(stacked, objective, training=True))
        self._layout: list[tuple[int, bool]] = []

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does, in the flat gradient buffer."""
        self._prepare()
        return torch.stack([self._gradient(i, batch) for i in range(self._stacked.num_agents)])

    def _prepare(self) -> None:
        """Zeroes the gradients, which the stacked parameters that are trained share with the agents' modules."""
        self._stacked.follow_agents()
        parameters = self._stacked.parameters()
        layout = [(parameter.data_ptr(), parameter.requires_grad) for parameter in parameters]
        if layout != self._layout:
            self._make_agents(parameters)
            self._layout = layout
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient.zero_() if parameter.requires_grad else None

    def _make_agents(self, parameters: Sequence[nn.Parameter]) -> None:
        self._gradients = self._stacked.spare_gradients()
        made = [self._stacked.unlinked_agent(i) for i in range(self._stacked.num_agents)]
        self._agents, self._keep_buffers = [module.train() for module, _ in made], [keep for _, keep in made]
        for i, module in enumerate(self._agents):
            for own, gradient in zip(module.parameters(), self._gradients, strict=True):
                own.grad = gradient[i] if own.requires_grad else None

    def _gradient(self, i: int, batch: Any) -> Tensor:
        """Fills agent i's rows of the gradients and buffers, and returns its loss."""
        if self._compiled is None:
            return self._backward(i, self._forward(i, batch))
        own = {**dict(self._agents[i].named_parameters()), **dict(self._agents[i].named_buffers())}
        tensors = [own[name] for name in self._stacked.tensors()]
        loss: Tensor
        loss, *new_buffers = self._compiled(_row(batch, i), *tensors)
        self._add_gradient(loss)
        buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new_buffer)
        return loss.detach()

    def _forward(self, i: int, batch: Any) -> Tensor:
        """The loss of agent i."""
        return self._objective(self._agents[i], _row(batch, i))

    def _backward(self, i: int, loss: Tensor) -> Tensor:
        """Fills agent i's rows of the gradients and buffers, and returns the loss without its graph."""
        self._add_gradient(loss)
        if self._stacked.flat_buffers:
            self._keep_buffers[i]()
        return loss.detach()

    def _add_gradient(self, loss: Tensor) -> None:
        if any(
            is_trained for _, is_trained in self._layout
        ):  # else torch would complain that the loss needs no gradient
            loss.backward()


class VmapEngine:
    """An engine that computes all agents at once through `torch.func.vmap`; dropout and the like differ between agents.

    There are few, large operators, so the fewest launches; but convolutions become grouped ones, at which some
    libraries are slow.

    Args:
        stacked, objective: see `LoopEngine`.
        compiler: compiles the losses of all agents; see `LoopEngine`.
    """

    name: str = "vmap"

    def __init__(self, stacked: StackedModule, objective: Objective, *, compiler: Compiler | None = None) -> None:
        if compiler is not None:
            self.name = f"compiled-{self.name}"
        self._stacked = stacked
        of_one_agent, self._losses_of_all = objective.halves()
        self._of_all = vmap(applied(stacked, of_one_agent, training=True), randomness="different")
        self._evaluate = self._losses_and_buffers if compiler is None else compiler(self._losses_and_buffers)

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does, in separate tensors, not views of the flat buffer."""
        tensors = list(self._stacked.tensors().values())
        losses, *new_buffers = self._evaluate(batch, *tensors)
        trained = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True) if trained else ()
        self._stacked.zero_grad()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new_buffer)
        return losses.detach()

    def _losses_and_buffers(self, batch: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The losses and new buffers of all agents, as a function of the stacked parameters and buffers."""
        results, *new_buffers = self._of_all(batch, *tensors)
        return self._losses_of_all(results, batch), *new_buffers


def _row(batch: Any, i: int) -> Any:
    """Agent i's batch."""
    return tree_map(lambda tensor: tensor[i], batch)


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
