"""Whole training steps: the simulator's with each gradient engine, a plain loop's over agents, and one model's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from gut_fast import models
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.device import CPU, Device
from gut_fast.optim import GUT
from gut_fast.simulation.batches import Batches
from gut_fast.simulation.engines import CHOICES, ENGINES, make_engine, undo_on_error
from gut_fast.simulation.stacked import stack
from gut_fast.topology import ring

__all__ = [
    "ENGINE_NAMES",
    "IMAGES",
    "OneModel",
    "PlainLoop",
    "Simulated",
    "Task",
    "Trainer",
    "compare",
    "engines_of",
    "enter",
]

IMAGES = {"mlp": (1, 8, 8), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}
"""Shape of the images that each network is trained on: digits, Fashion-MNIST's and CIFAR's. The pixels are noise."""

ENGINE_NAMES = tuple(name for name in ENGINES if name != "auto")

NUM_CLASSES = 10
BATCHES_PER_AGENT = 4
LR, MU, MOMENTUM = 0.01, 0.5, 0.9

MAX_ERROR = 1e-3
"""Of a gradient, relative to its largest entry. Twenty layers in float32 round it by 1e-5; a wrong one is off by 1."""


@dataclass(frozen=True)
class Task:
    """N agents on a ring, each with its own images, train one network with GUT.

    Raises:
        ValueError: an unknown model, or a number below 1.
    """

    model: str
    agents: int = 16
    batch_size: int = 32
    device: Device = CPU

    def __post_init__(self) -> None:
        if self.model not in IMAGES:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(IMAGES)}")
        if min(self.agents, self.batch_size) < 1:
            raise ValueError(f"expected at least one agent and one sample, got {self.agents} × {self.batch_size}")

    @property
    def samples(self) -> int:
        """Of all agents, in a step."""
        return self.agents * self.batch_size

    def make_module(self) -> nn.Module:
        """The network, always with the same parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return models.build(self.model, IMAGES[self.model], NUM_CLASSES).to(self.device.torch_device)

    def make_batches(self) -> Batches:
        """Every agent's own stream of images and labels, which lie on the device."""
        generator = torch.Generator().manual_seed(0)
        total = BATCHES_PER_AGENT * self.samples
        images = torch.randn(total, *IMAGES[self.model], generator=generator)
        labels = torch.randint(NUM_CLASSES, (total,), generator=generator)
        images, labels = (tensor.to(self.device.torch_device) for tensor in (images, labels))
        return Batches(images, labels, list(torch.arange(total).view(self.agents, -1)), self.batch_size)


def engines_of(device: Device) -> tuple[str, ...]:
    """The engines that are timed on a device unless told otherwise: those that ``"auto"`` chooses from."""
    return CHOICES[device.torch_device.type]


class Trainer(ABC):
    """Someone who trains: ``gradient(); step()`` again and again is the training loop.

    Attributes:
        kind: what it is, for tables and pictures.
    """

    kind: str

    def __init__(self, task: Task) -> None:
        self._batches = task.make_batches()
        self._step = 0

    def gradient(self) -> None:
        """Takes the next batch of every agent and computes the gradients."""
        inputs, targets = self._batches(self._step)
        self._backward(inputs, targets)
        self._step += 1

    @abstractmethod
    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Of inputs [N, B, ...] and targets [N, B]."""

    @abstractmethod
    def step(self) -> None:
        """What is done between two gradients."""


class Simulated(Trainer):
    """What `Simulator.run` does between two evaluations: batches, an engine's gradient, the optimizer's step.

    Args:
        task: what is trained.
        engine: name of the gradient engine.
        between: ``"gut"``, or to see what the step costs the gradient after it, ``"sgd"`` (torch's fused momentum SGD
            on the same tensors, without gossip) or ``"nothing"``.
    """

    def __init__(self, task: Task, engine: str, between: str = "gut") -> None:
        super().__init__(task)
        self.kind = "simulator" if between == "gut" else "control"
        self.stacked = stack(task.make_module(), task.agents)
        self._engine = make_engine(engine, self.stacked, cross_entropy)
        parameters = self.stacked.parameters()
        self.optimizer: Optimizer | None = None
        if between == "gut":
            self.optimizer = GUT(parameters, LR, MU, topology=ring(task.agents))
        elif between == "sgd":
            self.optimizer = SGD(parameters, LR, momentum=MOMENTUM, fused=True)

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        with undo_on_error(self.stacked):
            self._engine(inputs, targets)

    def step(self) -> None:
        """The optimizer's, if there is one."""
        if self.optimizer is not None:
            self.optimizer.step()


class PlainLoop(Trainer):
    """The same without the library: a module for each agent, one after the other, and GUT in PyTorch's operators.

    For each tensor, with z, g and r of all agents stacked: ``S = z − η(g + μr);  D = (W − I) S;  z' = S + D;
    r' = μr − D/η``.
    """

    kind = "plain loop"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        module = task.make_module()
        self.modules = [copy.deepcopy(module) for _ in range(task.agents)]
        self.parameters = list(zip(*(agent.parameters() for agent in self.modules), strict=True))
        self.tracking = [parameter.new_zeros(task.agents, *parameter.shape) for parameter in module.parameters()]
        laplacian = ring(task.agents).matrix() - torch.eye(task.agents)
        self._laplacian = laplacian.to(task.device.torch_device, torch.float32)

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        for i, module in enumerate(self.modules):
            module.zero_grad()
            cross_entropy(module(inputs[i]), targets[i]).backward()

    @torch.no_grad()
    def step(self) -> None:
        """GUT on all agents, tensor by tensor."""
        for agents, r in zip(self.parameters, self.tracking, strict=True):
            g = torch.stack([parameter.grad for parameter in agents])
            S = torch.stack(agents) - LR * (g + MU * r)
            D = torch.tensordot(self._laplacian, S, dims=1)
            r.mul_(MU).sub_(D / LR)
            for parameter, row in zip(agents, S + D, strict=True):
                parameter.copy_(row)


class OneModel(Trainer):
    """One model on the batches of all agents together, with momentum SGD or, as a control, without any step."""

    def __init__(self, task: Task, between: str = "sgd") -> None:
        super().__init__(task)
        self.kind = "one model" if between == "sgd" else "control"
        self.module = task.make_module()
        self._optimizer = SGD(self.module.parameters(), LR, momentum=MOMENTUM) if between == "sgd" else None

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        self.module.zero_grad()
        cross_entropy(self.module(inputs.flatten(0, 1)), targets.flatten()).backward()

    def step(self) -> None:
        """``torch.optim.SGD``'s, if it has one."""
        if self._optimizer is not None:
            self._optimizer.step()


def enter(task: Task, engines: Sequence[str], *, controls: bool = True) -> dict[str, Trainer]:
    """All trainers by name; with `controls`, also those that leave the step out or make torch's instead.

    Raises:
        ValueError: an unknown engine, or one that is not for the task's device.
    """
    if unknown := [name for name in engines if name not in ENGINE_NAMES]:
        raise ValueError(f"unknown engine {unknown[0]!r}; known are {', '.join(ENGINE_NAMES)}")
    trainers: dict[str, Trainer] = {name: Simulated(task, name) for name in engines}
    trainers |= {"plain loop": PlainLoop(task), "one model": OneModel(task)}
    if controls:
        for name in engines:
            trainers[f"{name}, SGD"] = Simulated(task, name, "sgd")
            trainers[f"{name}, alone"] = Simulated(task, name, "nothing")
        trainers["one model, alone"] = OneModel(task, "nothing")
    return trainers


def compare(trainers: dict[str, Trainer]) -> dict[str, float]:
    """Largest error of each trainer's first gradient beside the plain loop's, relative to its largest entry.

    One model's gradient is compared with the mean over agents. The parameters and the state after two steps on that
    gradient are compared as well.

    Raises:
        WrongResultError: something differs; the message says who and by how much.
    """
    plain = trainers["plain loop"]
    assert isinstance(plain, PlainLoop)
    plain.gradient()
    truth = [torch.stack([parameter.grad for parameter in agents]) for agents in plain.parameters]
    _two_steps(plain)
    z, r = [torch.stack(agents).detach() for agents in plain.parameters], plain.tracking
    errors = {}
    for name, trainer in trainers.items():
        if isinstance(trainer, OneModel):
            trainer.gradient()
            mean = [gradient.mean(0) for gradient in truth]
            errors[name] = _error(name, "gradient", _gradients(list(trainer.module.parameters())), mean)
        elif isinstance(trainer, Simulated):
            trainer.gradient()
            errors[name] = _error(name, "gradient", _gradients(trainer.stacked.parameters()), truth)
            if isinstance(trainer.optimizer, GUT):
                _two_steps(trainer)
                state = [trainer.optimizer.state[parameter]["r"] for parameter in trainer.stacked.parameters()]
                _error(name, "step", [parameter.detach() for parameter in trainer.stacked.parameters()], z)
                _error(name, "step's r", state, r, [*truth, *r])  # r is made of gradients, and inherits their error
    return errors


def _two_steps(trainer: Trainer) -> None:
    trainer.step()
    trainer.step()


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _error(
    name: str, what: str, mine: Sequence[Tensor], truth: Sequence[Tensor], scale: Sequence[Tensor] | None = None
) -> float:
    """Raises WrongResultError unless all tensors are equal, to rounding of the largest entry of `scale` or `truth`."""
    largest = max(float(tensor.abs().max()) for tensor in scale or truth)
    error = max(float((a - b).abs().max()) for a, b in zip(mine, truth, strict=True)) / largest
    if not error < MAX_ERROR:
        raise WrongResultError(f"{name}: its {what} differs from the plain loop's by {error:.1e} of the largest entry")
    return error
