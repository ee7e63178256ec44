"""Whole training steps: the simulator's with each gradient engine, a user's plain loop and vmap, and one model's.

All agents train one network with GUT on a ring, each on its own images, which are noise. "One model" is a single model
on the samples of all agents, with momentum SGD: what the computation costs without decentralization.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from gut_fast import models
from gut_fast.agents import stack
from gut_fast.bench.cases import NUM_CLASSES, image_shape
from gut_fast.bench.device import CPU, exact_float32, machine_line, versions
from gut_fast.bench.results import Measurement, Result
from gut_fast.bench.step import WrongResultError
from gut_fast.bench.timing import interleave, threads, wall_sampler, watch
from gut_fast.optim import GUT
from gut_fast.simulation.batches import Batches
from gut_fast.simulation.engines import CHOICES, ENGINES, make_engine, undo_on_error
from gut_fast.simulation.objective import Supervised
from gut_fast.simulation.samples import TensorSamples
from gut_fast.topology import ring

__all__ = ["Trainer", "Training", "compare", "enter", "measure"]

BATCHES_PER_AGENT = 4
LR, MU, MOMENTUM = 0.01, 0.5, 0.9

MAX_ERROR = 1e-3
"""The largest error of a right gradient or step: twenty layers in float32 round by 1e-5; a wrong one is off by 1."""


@dataclass(frozen=True)
class Training:
    """The case of a training step: so many agents on a ring train this network of `gut_fast.models`.

    Raises:
        ValueError: an unknown network, or a number below 1.
    """

    model: str
    agents: int = 16
    batch_size: int = 32
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if min(self.agents, self.batch_size) < 1:
            raise ValueError(f"expected at least one agent and one sample, got {self.agents} × {self.batch_size}")
        with torch.device("meta"):
            models.build(self.model, image_shape(self.model), NUM_CLASSES)

    @property
    def name(self) -> str:
        """The name in tables and results."""
        return f"{self.model}, {self.agents} × {self.batch_size}"

    def make_module(self) -> nn.Module:
        """The network, always with the same parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return models.build(self.model, image_shape(self.model), NUM_CLASSES).to(self.device)

    def make_batches(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that returns the next batch of every agent: inputs [N, B, ...] and labels [N, B] on the device."""
        generator = torch.Generator().manual_seed(0)
        total = BATCHES_PER_AGENT * self.agents * self.batch_size
        images = torch.randn(total, *image_shape(self.model), generator=generator).to(self.device)
        labels = torch.randint(NUM_CLASSES, (total,), generator=generator).to(self.device)
        batches = Batches(
            TensorSamples((images, labels)), list(torch.arange(total).view(self.agents, -1)), self.batch_size
        )
        steps = itertools.count()
        return lambda: batches(next(steps))


class Trainer(NamedTuple):
    """Someone who trains: ``update(gradient())`` again and again is the training loop.

    Attributes:
        gradient: takes the next batches and returns the gradients, (N, *shape) for each parameter; those of one model
            have no dimension of agents.
        update: makes the optimizer's step with gradients that `gradient` has returned.
        tensors: returns z and GUT's r, (N, *shape) for each parameter; None of a trainer that does not have GUT.
    """

    gradient: Callable[[], list[Tensor]]
    update: Callable[[list[Tensor]], object]
    tensors: Callable[[], tuple[Sequence[Tensor], list[Tensor]]] | None

    def step(self) -> None:
        """Makes one training step."""
        self.update(self.gradient())


def simulated(training: Training, engine: str) -> Trainer:
    """The loop of `Simulator.run` between two evaluations: batches, an engine's gradient, the optimizer's step."""
    stacked, batches = stack(training.make_module(), training.agents), training.make_batches()
    compute, parameters = make_engine(engine, stacked, Supervised(cross_entropy)), stacked.parameters()
    optimizer = GUT(parameters, LR, MU, topology=ring(training.agents))

    def gradient() -> list[Tensor]:
        with undo_on_error(stacked):
            compute(batches())
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    tensors = lambda: (parameters, [optimizer.state[parameter]["r"] for parameter in parameters])  # noqa: E731
    return Trainer(gradient, lambda _: optimizer.step(), tensors)


def _plain_gut(training: Training) -> tuple[list[Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """GUT in PyTorch's operators: the state r, zero, and a function that returns the new z and changes r in place.

    For each tensor, all agents stacked: ``S = z − η(g + μr);  D = (W − I) S;  z' = S + D;  r' = μr − D/η``.
    """
    laplacian = (ring(training.agents).matrix() - torch.eye(training.agents)).to(training.device, torch.float32)

    def mixed(z: Tensor, g: Tensor, r: Tensor) -> Tensor:
        S = z - LR * (g + MU * r)
        D: Tensor = torch.tensordot(laplacian, S, dims=1)
        r.mul_(MU).sub_(D / LR)
        return S + D

    return [p.new_zeros(training.agents, *p.shape) for p in training.make_module().parameters()], mixed


def plain_loop(training: Training) -> Trainer:
    """The same without the library: a module for each agent, one after the other, and GUT tensor by tensor."""
    states, mixed = _plain_gut(training)
    batches, module = training.make_batches(), training.make_module()
    modules = [copy.deepcopy(module) for _ in range(training.agents)]
    parameters = list(zip(*(agent.parameters() for agent in modules), strict=True))

    def gradient() -> list[Tensor]:
        for agent, inputs, targets in zip(modules, *batches(), strict=True):
            agent.zero_grad()
            cross_entropy(agent(inputs), targets).backward()
        return [torch.stack([parameter.grad for parameter in agents]) for agents in parameters]

    @torch.no_grad()
    def update(gradients: list[Tensor]) -> None:
        for agents, g, r in zip(parameters, gradients, states, strict=True):
            for parameter, row in zip(agents, mixed(torch.stack(agents), g, r), strict=True):
                parameter.copy_(row)

    return Trainer(gradient, update, lambda: ([torch.stack(agents).detach() for agents in parameters], states))


def plain_vmap(training: Training) -> Trainer:
    """The same with ``torch.func.vmap`` over the agents, as PyTorch's tutorial on ensembles of models does it."""
    states, mixed = _plain_gut(training)
    batches, module = training.make_batches(), training.make_module()
    stacked, buffers = stack_module_state([module] * training.agents)
    parameters = {name: parameter.detach() for name, parameter in stacked.items()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(functional_call(module, (parameters, buffers), (inputs,)), targets)

    gradient_of_loss = vmap(grad(loss))

    def update(gradients: list[Tensor]) -> None:
        for name, g, r in zip(parameters, gradients, states, strict=True):
            parameters[name] = mixed(parameters[name], g, r)

    gradient = lambda: list(gradient_of_loss(parameters, buffers, *batches()).values())  # noqa: E731
    return Trainer(gradient, update, lambda: (list(parameters.values()), states))


def one_model(training: Training) -> Trainer:
    """One model on the batches of all agents together, with momentum SGD."""
    batches, module = training.make_batches(), training.make_module()
    optimizer = SGD(module.parameters(), LR, momentum=MOMENTUM)

    def gradient() -> list[Tensor]:
        inputs, targets = batches()
        optimizer.zero_grad()
        cross_entropy(module(inputs.flatten(0, 1)), targets.flatten()).backward()
        return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]

    return Trainer(gradient, lambda _: optimizer.step(), None)


def enter(training: Training, engines: Sequence[str]) -> dict[str, Trainer]:
    """Makes all trainers, by name.

    Raises:
        ValueError: an unknown engine, or one that is not for the device.
    """
    known = [name for name in ENGINES if name != "auto"]
    if unknown := [name for name in engines if name not in known]:
        raise ValueError(f"unknown engine {unknown[0]!r}; known are {', '.join(known)}")
    makers: dict[str, Callable[[Training], Trainer]] = {
        f"gut_fast, {engine}": partial(simulated, engine=engine) for engine in engines
    }
    makers |= {"plain loop": plain_loop, "plain vmap": plain_vmap, "one model": one_model}
    return {name: make(training) for name, make in makers.items()}


def compare(trainers: Mapping[str, Trainer], training: Training) -> dict[str, float]:
    """Makes two training steps and returns the largest error of each trainer beside the plain loop.

    Compared are the first gradient, of one model with the mean over agents, and after two steps r and how far z has
    moved, each in units of its largest entry.

    Raises:
        WrongResultError: something differs; the message says who and by how much.
    """
    start = [parameter.detach() for parameter in training.make_module().parameters()]

    def first_steps(trainer: Trainer) -> dict[str, list[Tensor]]:
        gradients = trainer.gradient()
        found = {"gradient": [gradient.clone() for gradient in gradients]}
        trainer.update(gradients)
        trainer.step()
        if trainer.tensors is not None:
            z, found["r"] = trainer.tensors()
            found["step"] = [(a - b).detach() for a, b in zip(z, start, strict=True)]
        return found

    truth, errors = first_steps(trainers["plain loop"]), {"plain loop": 0.0}
    for name, trainer in trainers.items():
        if name == "plain loop":
            continue
        found, errors[name] = first_steps(trainer), 0.0
        for what, mine in found.items():
            right = truth[what] if trainer.tensors else [gradient.mean(0) for gradient in truth[what]]
            largest = max(float(tensor.abs().max()) for tensor in right)
            error = max(float((a - b).abs().max()) for a, b in zip(mine, right, strict=True)) / largest
            if not error < MAX_ERROR:
                raise WrongResultError(f"{name}: its {what} is off by {error:.1e} of the plain loop's largest entry")
            errors[name] = max(errors[name], error)
    return errors


def measure(training: Training, engines: Sequence[str] | None, num_threads: int, seconds: float = 20.0) -> Result:
    """Compares all trainers with the plain loop, then times them in turns, for about so many seconds together.

    They are compared in full float32; then they are made anew and timed with what PyTorch usually does. `engines` are
    the simulator's; None are those that ``"auto"`` chooses from on the device.

    Raises:
        WrongResultError: two trainers' gradients or steps are not equal; nothing has been timed.
        ValueError: an unknown engine.
    """
    device, agents, batch_size = training.device, training.agents, training.batch_size
    engines = CHOICES[device.type] if engines is None else engines
    if any("compiled" in engine for engine in engines):
        torch.compiler.reset()  # its limit of compiled variants is per process; beyond, it goes back to eager
    with threads(num_threads):
        with exact_float32():
            errors = compare(enter(training, engines), training)
        trainers = enter(training, engines)
        with watch() as noise:
            times = interleave({name: wall_sampler(each.step, device) for name, each in trainers.items()}, seconds)
        settings = {"model": training.model, "agents": agents, "batch size": batch_size, "samples": agents * batch_size}
        measurements = {name: Measurement(times[name], error=errors[name]) for name in trainers}
        about = (device.type, num_threads, machine_line(device), versions(device))
        return Result("train", training.name, settings, "plain loop", measurements, {}, noise, *about)
