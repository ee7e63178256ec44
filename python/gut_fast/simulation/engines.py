"""Gradient engines: the losses and gradients of all agents, each on its own batch.

An engine is called with inputs [N, B, ...] and targets [N, B, ...], leaves the gradients in ``.grad`` of the stacked
parameters and returns the losses [N]. Convolutional networks on a CPU are fastest with one agent on each core, small
networks and GPUs with all agents at once.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from gut_fast.simulation import randomness
from gut_fast.simulation.stacked import StackedModule
from gut_fast.simulation.workers import Job, Workers

__all__ = [
    "ENGINES",
    "AutoEngine",
    "Engine",
    "LoopEngine",
    "Loss",
    "VmapEngine",
    "WorkersEngine",
    "make_engine",
    "undo_on_error",
]

Loss = Callable[[Any, Tensor], Tensor]
"""Mean loss of one agent's batch: (outputs [B, ...], targets [B, ...]) -> scalar."""


class Engine(Protocol):
    """Computes the gradients of all agents."""

    @property
    def name(self) -> str:
        """As in `ENGINES`."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Losses [N] of the batches; the gradients are left in ``.grad`` of the stacked parameters."""


class LoopEngine:
    """One agent after the other; each backward pass accumulates straight into the flat gradient buffer."""

    name = "loop"

    def __init__(self, stacked: StackedModule, loss: Loss) -> None:
        self._stacked = stacked
        self._loss = loss
        self._agents = [stacked.agent(i) for i in range(stacked.num_agents)]
        self._has_buffers = bool(stacked.named_buffers())
        for agent in self._agents:
            if not agent.training:
                agent.train()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`."""
        self._stacked.zero_grad()
        return torch.stack([self._backward(i, self._forward(i, inputs, targets)) for i in range(len(self._agents))])

    def _forward(self, i: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Agent i's loss."""
        return self._loss(self._agents[i](inputs[i]), targets[i])

    def _backward(self, i: int, loss: Tensor) -> Tensor:
        """Fills agent i's rows of the gradients and buffers, and returns the loss without its graph."""
        loss.backward()
        if self._has_buffers:
            self._stacked.keep_buffers(i)
        return loss.detach()


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

    def __init__(self, stacked: StackedModule, loss: Loss) -> None:
        if stacked.device.type != "cpu":
            raise ValueError(f"engine 'workers' is for the CPU, the model is on {stacked.device}; use 'vmap' or 'loop'")
        super().__init__(stacked, loss)
        self._workers = Workers(max_threads=stacked.num_agents)
        self._draws_random_numbers = False

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`. An error in any agent is raised when no thread computes any more."""
        if not self._draws_random_numbers:
            undo, random_state = _remember(self._stacked), torch.get_rng_state()
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
        def gradient(i: int) -> Tensor:
            return self._backward(i, self._forward(i, inputs, targets))

        return (partial(gradient, i) for i in range(len(self._agents)))

    def _in_order(self, inputs: Tensor, targets: Tensor) -> Iterator[Job[Tensor]]:
        """Forward passes are done as the jobs are made, one after the other."""
        for i in range(len(self._agents)):
            yield partial(self._backward, i, self._forward(i, inputs, targets))


class VmapEngine:
    """All agents at once through `torch.func.vmap`; random operations such as dropout differ between agents."""

    name = "vmap"

    def __init__(self, stacked: StackedModule, loss: Loss) -> None:
        self._stacked = stacked
        self._names = list(stacked.state_dict())
        self._losses = _batched_loss(loss)
        self._forward = vmap(self._agent_forward, randomness="different")
        if not stacked.module.training:
            stacked.module.train()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`; the gradients are separate tensors, not views of the flat buffer."""
        parameters = self._stacked.parameters()
        buffers = [buffer for _, buffer in self._stacked.named_buffers()]
        outputs, *new_buffers = self._forward(inputs, *parameters, *buffers)
        losses = self._losses(outputs, targets)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new_buffer)
        return losses.detach()

    def _agent_forward(self, inputs: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """Outputs and new buffers of one agent; a flat argument list, because vmap walks nested ones in Python."""
        by_name = dict(zip(self._names, tensors, strict=True))
        outputs, new_buffers = self._stacked.call(self._stacked.module, by_name, inputs)
        return outputs, *new_buffers.values()


class AutoEngine:
    """Takes the engines in turns for the first steps, then keeps the one with the smallest median time.

    These are the loop, vmap and, where the model is on the CPU and `torch.get_num_threads()` is above 1, workers. A
    model that vmap does not support is left to the others, with one warning.
    """

    turns = 5
    """Measured steps of each engine, after one that is not counted."""

    def __init__(self, stacked: StackedModule, loss: Loss) -> None:
        self._stacked = stacked
        self._engines: dict[str, Engine] = {"loop": LoopEngine(stacked, loss), "vmap": VmapEngine(stacked, loss)}
        if stacked.device.type == "cpu":
            self._engines["workers"] = WorkersEngine(stacked, loss)
        has_threads = torch.get_num_threads() > 1
        self._seconds: dict[str, list[float]] = {name: [] for name in self._engines if has_threads or name != "workers"}
        self.chosen: str | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Engine`."""
        if self.chosen is not None:
            return self._engines[self.chosen](inputs, targets)
        name = min(self._seconds, key=lambda name: len(self._seconds[name]))
        start = self._now()
        losses = self._try_vmap(inputs, targets) if name == "vmap" else self._engines[name](inputs, targets)
        if name in self._seconds:
            self._seconds[name].append(self._now() - start)
        if len(self._seconds) == 1:
            self.chosen = next(iter(self._seconds))
        elif all(len(seconds) > self.turns for seconds in self._seconds.values()):
            self.chosen = min(self._seconds, key=lambda name: statistics.median(self._seconds[name][1:]))
        return losses

    @property
    def name(self) -> str:
        """The engine it has chosen; ``"auto"`` until then."""
        return self.chosen or "auto"

    def state_dict(self) -> dict[str, Any]:
        """The choice, or the times measured so far."""
        return {"chosen": self.chosen, "seconds": {name: list(seconds) for name, seconds in self._seconds.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the run that saved `state` was, so that the same steps are done by the same engine."""
        self.chosen = state["chosen"] if state["chosen"] in self._engines else None
        self._seconds = {name: list(seconds) for name, seconds in state["seconds"].items() if name in self._engines}

    def _try_vmap(self, inputs: Tensor, targets: Tensor) -> Tensor:
        try:
            with undo_on_error(self._stacked):
                return self._engines["vmap"](inputs, targets)
        except Exception as error:
            # Not only RuntimeError: what vmap raises depends on the operation. An error of the model's own comes again.
            losses = self._engines["loop"](inputs, targets)
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"the agents run one by one: torch.func.vmap failed with {reason!r}", stacklevel=2)
            del self._seconds["vmap"]
            return losses

    def _now(self) -> float:
        if self._stacked.device.type == "cuda":
            torch.cuda.synchronize(self._stacked.device)
        return time.perf_counter()


ENGINES: dict[str, type[AutoEngine] | type[LoopEngine] | type[VmapEngine]] = {
    "auto": AutoEngine,
    "loop": LoopEngine,
    "vmap": VmapEngine,
    "workers": WorkersEngine,
}
"""All engines by name."""


def make_engine(name: str, stacked: StackedModule, loss: Loss) -> AutoEngine | LoopEngine | VmapEngine:
    """The engine of that name. Raises ValueError for an unknown one, or one that is not for the model's device."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; known are {', '.join(ENGINES)}")
    return ENGINES[name](stacked, loss)


@contextlib.contextmanager
def undo_on_error(stacked: StackedModule) -> Iterator[None]:
    """If the block raises, puts buffers and random state back: what a gradient changes besides the gradient."""
    undo = _remember(stacked)
    try:
        yield
    except BaseException:
        undo()
        raise


def _remember(stacked: StackedModule) -> Callable[[], None]:
    """A function that puts buffers and random state back to what they are now."""
    buffers = [(buffer, buffer.clone()) for _, buffer in stacked.named_buffers()]
    random_state = randomness.get_state(stacked.device)

    def undo() -> None:
        for buffer, before in buffers:
            buffer.copy_(before)
        randomness.set_state(random_state, stacked.device)

    return undo


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
