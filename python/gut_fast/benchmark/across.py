"""Who trains on several ranks: this library, PyTorch's DistributedDataParallel, decent-dp, and what bounds them all."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from gut_fast import models
from gut_fast.benchmark.across_link import Place
from gut_fast.kernels import machine
from gut_fast.optim.optimizer import GossipOptimizer
from gut_fast.topology import Topology, complete, from_matrix, ring, sequence

__all__ = [
    "CONTENDERS",
    "LR",
    "SETTINGS",
    "Communication",
    "OnGraph",
    "Rank",
    "Task",
    "absent",
    "one_peer_ring",
    "ring_of",
]

LR, MU = 0.01, 0.5
NUM_CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """What a model is trained on.

    Attributes:
        spec: as `gut_fast.models.build` takes it.
        image: shape of a sample; the pixels are noise.
        batch_size: samples of an agent in a step.
        bucket_bytes: that travel at once, so that there are a few buckets to overlap.
    """

    spec: str
    image: tuple[int, ...]
    batch_size: int
    bucket_bytes: int


SETTINGS = {
    "lenet5": Setting("lenet5", (1, 28, 28), 32, 1 << 16),
    "resnet20": Setting("resnet20", (3, 32, 32), 8, 1 << 18),
    "mlp": Setting("mlp:1024-1024-1024-1024-1024", (1, 28, 28), 16, 1 << 20),
}
"""Small networks, for several share a processor; and a wide one of 5 million parameters that is soon computed."""


@dataclass(frozen=True)
class Task:
    """What all ranks train.

    Attributes:
        shares_memory: whether our ranks may read each other's memory, as those of one machine do.

    Raises:
        ValueError: an unknown model, or a number that is too small.
    """

    model: str
    ranks: int = 4
    batch_size: int | None = None
    bucket_bytes: int | None = None
    shares_memory: bool = True

    def __post_init__(self) -> None:
        if self.model not in SETTINGS:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(SETTINGS)}")
        if self.ranks < 2 or min(self.samples, self.bucket) < 1:
            raise ValueError(f"expected two ranks or more and at least one sample and byte, got {self}")

    @property
    def samples(self) -> int:
        """Of each agent, in a step."""
        return SETTINGS[self.model].batch_size if self.batch_size is None else self.batch_size

    @property
    def bucket(self) -> int:
        """Bytes that travel at once."""
        return SETTINGS[self.model].bucket_bytes if self.bucket_bytes is None else self.bucket_bytes

    def make_module(self, rank: int) -> nn.Module:
        """The network as an agent begins with it, every one differently, so that mixing shows at once."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            setting = SETTINGS[self.model]
            return models.build(setting.spec, setting.image, NUM_CLASSES)

    def make_batch(self, rank: int) -> tuple[Tensor, Tensor]:
        """An agent's images and labels, the same in every step."""
        generator = torch.Generator().manual_seed(rank)
        images = torch.randn(self.samples, *SETTINGS[self.model].image, generator=generator)
        return images, torch.randint(NUM_CLASSES, (self.samples,), generator=generator)


def ring_of(ranks: int) -> Topology:
    """A ring; of two it is an edge."""
    return ring(ranks) if ranks > 2 else complete(2)


def one_peer_ring(ranks: int) -> Topology:
    """Everyone mixes with the left and the right neighbour in turn, half and half: decent-dp's ring."""
    if ranks % 2:
        raise ValueError(f"a ring with one peer at a time needs an even number of ranks, got {ranks}")
    steps = []
    for first in (0, 1):
        W = torch.zeros(ranks, ranks, dtype=torch.float64)
        for i in range(first, ranks + first, 2):
            pair = torch.tensor([i % ranks, (i + 1) % ranks])
            W[pair[:, None], pair] = 0.5
        steps.append(from_matrix(W, connected=False, name=f"pairs from {first}"))
    return sequence(steps)


class Rule(NamedTuple):
    """An update rule and what it is set to."""

    name: str
    hyperparameters: Mapping[str, Any]


class Contender(ABC):
    """Someone who trains on this rank, as others do on theirs."""

    def __init__(self, task: Task, rank: int) -> None:
        self.module = task.make_module(rank)
        self._images, self._labels = task.make_batch(rank)

    @abstractmethod
    def step(self) -> None:
        """A training step, or the part of one that is timed."""

    def backward(self, module: nn.Module) -> None:
        """The gradients of a batch."""
        cross_entropy(module(self._images), self._labels).backward()

    def outcome(self) -> Tensor:
        """What is compared with the truth, in one row: the parameters."""
        return parameters_to_vector(self.module.parameters()).detach()

    def bytes_sent(self) -> int | None:
        """Of messages so far, where the contender counts them."""
        return None


class Computation(Contender):
    """No communication: the gradient and a step of SGD, torch's fused one."""

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__(task, rank)
        self._optimizer = SGD(self.module.parameters(), LR, fused=True)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self.backward(self.module)
        self._optimizer.step()


class Gossip(Contender):
    """This library: a rule on a topology, one agent here."""

    def __init__(self, task: Task, rank: int, rule: Rule, topology: Topology, options: Mapping[str, Any]) -> None:
        super().__init__(task, rank)
        self.optimizer = GossipOptimizer(
            self.module.parameters(),
            rule.name,
            topology=topology,
            process_group=dist.group.WORLD,
            bucket_bytes=task.bucket,
            **rule.hyperparameters,
            **{"shared_memory": task.shares_memory, **options},
        )
        self._wants_overlap = options.get("overlap", False)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward(self.module)
        self.optimizer.step()

    def outcome(self) -> Tensor:
        """As of everybody. Raises RuntimeError if messages did not leave during backward though they should."""
        if self._wants_overlap and self.optimizer.overlap != "on":
            raise RuntimeError(f"{self.optimizer.rule.name}: overlap is {self.optimizer.overlap}")
        return super().outcome()

    def bytes_sent(self) -> int:
        return sum(self.optimizer.bytes_sent.values())


class Communication(Gossip):
    """No computation: the exchange and the mixing, with gradients at hand."""

    def __init__(self, task: Task, rank: int, rule: Rule, topology: Topology, options: Mapping[str, Any]) -> None:
        super().__init__(task, rank, rule, topology, options)
        self.backward(self.module)

    def step(self) -> None:
        """The optimizer's alone."""
        self.optimizer.step()


class BareSends(Contender):
    """What the transport itself takes: a model to each neighbour on the ring and one from each, nothing else."""

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__(task, rank)
        self._row = super().outcome()
        self._peers = sorted({(rank - 1) % task.ranks, (rank + 1) % task.ranks})
        self._received = [torch.empty_like(self._row) for _ in self._peers]

    def step(self) -> None:
        works = [dist.irecv(row, peer) for row, peer in zip(self._received, self._peers, strict=True)]
        works += [dist.isend(self._row, peer) for peer in self._peers]
        for work in works:
            assert work is not None
            work.wait()

    def outcome(self) -> Tensor:
        """The sum of what has come."""
        return torch.stack(self._received).sum(0)


class DDP(Contender):
    """PyTorch's DistributedDataParallel: one model, gradients averaged over all ranks, the same SGD."""

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__(task, rank)
        megabytes = task.bucket / (1 << 20)
        self._parallel = DistributedDataParallel(self.module, bucket_cap_mb=megabytes, gradient_as_bucket_view=True)
        self._optimizer = SGD(self.module.parameters(), LR, fused=True)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self.backward(self._parallel)
        self._optimizer.step()


class DecentDP(Contender):
    """decent-dp's ring: everyone mixes with one neighbour a step, in turn; it zeroes gradients itself.

    Its buckets are whole MiB.
    """

    def __init__(self, task: Task, rank: int) -> None:
        importlib.import_module("loguru").logger.disable("decent_dp")
        super().__init__(task, rank)
        megabytes = max(1, task.bucket >> 20)
        self._parallel = importlib.import_module("decent_dp.ddp").DecentralizedDataParallel(
            self.module, self._make_optimizer, topology="ring", bucket_size_in_mb=megabytes
        )

    @staticmethod
    def _make_optimizer(named_parameters: list[tuple[str, Tensor]]) -> SGD:
        return SGD([parameter for _, parameter in named_parameters], LR, fused=True)

    def step(self) -> None:
        self.backward(self._parallel)


@dataclass(frozen=True)
class OnGraph:
    """One of ours: makes the contender on a rank; what it should compute and send follows from rule and topology."""

    rule: Rule
    topology: Callable[[int], Topology]
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: type[Gossip] = Gossip

    def __call__(self, task: Task, rank: int) -> Contender:
        """The contender on this rank."""
        return self.kind(task, rank, self.rule, self.topology(task.ranks), self.options)


DSGD, GUT = Rule("dsgd", {"lr": LR}), Rule("gut", {"lr": LR, "mu": MU})
OVERLAP = {"overlap": True}

CONTENDERS: Mapping[str, Callable[[Task, int], Contender]] = {
    "computation": Computation,
    "communication": OnGraph(DSGD, ring_of, kind=Communication),
    "bare sends": BareSends,
    "DSGD": OnGraph(DSGD, ring_of),
    "DSGD, overlap": OnGraph(DSGD, ring_of, OVERLAP),
    "GUT": OnGraph(GUT, ring_of),
    "GUT, sockets": OnGraph(GUT, ring_of, {"shared_memory": False}),
    "GUT, overlap": OnGraph(GUT, ring_of, OVERLAP),
    "GUT, overlap, bfloat16": OnGraph(GUT, ring_of, {**OVERLAP, "wire_dtype": torch.bfloat16}),
    "DSGD, one peer, overlap": OnGraph(DSGD, one_peer_ring, OVERLAP),
    "DDP": DDP,
    "decent-dp": DecentDP,
}
"""All of them, in the order in which every rank makes them. The first two bound what can be reached."""


def absent(task: Task) -> dict[str, str]:
    """Who cannot take part, and why."""
    reasons = {}
    if not task.shares_memory:
        reasons["GUT, sockets"] = "all that we send goes through sockets here"
    if task.ranks % 2:
        reasons |= dict.fromkeys(["DSGD, one peer, overlap", "decent-dp"], "it needs an even number of ranks")
    if "decent-dp" not in reasons and (missing := machine.missing_packages("decent_dp")) is not None:
        reasons["decent-dp"] = missing.partition(";")[0]
    return reasons


class Rank:
    """Serves the process that measures: see `gut_fast.benchmark.across_ranks.Crew`."""

    def __init__(self, rank: int, size: int, place: Place) -> None:
        self._rank, self._place = rank, place
        self._contenders: dict[str, Contender] = {}

    def enter(self, task: Task, names: list[str]) -> int:
        """Makes these contenders; returns how many parameters the model has."""
        self._contenders = {name: CONTENDERS[name](task, self._rank) for name in names}
        return sum(p.numel() for p in self._contenders[names[0]].module.parameters())

    def train(self, name: str, steps: int) -> tuple[np.ndarray, int | None]:
        """So many steps; what came out, and the bytes of messages that were sent for them, if it counts them."""
        contender = self._contenders[name]
        before = contender.bytes_sent()
        for _ in range(steps):
            contender.step()
        after = contender.bytes_sent()
        sent = None if before is None or after is None else after - before
        return contender.outcome().numpy(), sent

    def time(self, name: str, steps: int) -> tuple[float, float, int]:
        """So many steps, begun together: seconds, seconds of processors, bytes that left through the interface."""
        contender = self._contenders[name]
        contender.step()
        dist.barrier()
        cpu, out, start = time.process_time(), self._place.bytes_out(), time.perf_counter()
        for _ in range(steps):
            contender.step()
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
        dist.barrier()
        return seconds, cpu, self._place.bytes_out() - out

    def cpu_seconds(self) -> float:
        """Of this process so far."""
        return time.process_time()
