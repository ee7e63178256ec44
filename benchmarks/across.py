"""Times training steps of several processes beside PyTorch's DDP and decent-dp, and beside what bounds them.

    python benchmarks/across.py --output benchmarks/results
    sudo python benchmarks/across.py --rate 200mbit --model lenet5      # a network namespace and a shaped link for each
    sudo python benchmarks/across.py --rate 200mbit --fewer-bytes       # local steps and coded messages, and DiLoCo

Everyone is compared with the recurrence it should compute first, and the bytes that we send are counted. Images are
noise. decent-dp is no dependency: ``pip install --no-deps --target FOLDER decent-dp loguru``, and FOLDER in PYTHONPATH.
"""

import argparse
import importlib
import importlib.util
import math
import operator
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD

from crews import check_rate, crew
from gut_fast import models
from gut_fast.agents import stack
from gut_fast.bench import results
from gut_fast.bench.results import Measurement, Result
from gut_fast.bench.step import WrongResultError
from gut_fast.bench.timing import interleave, threads, watch
from gut_fast.kernels import machine
from gut_fast.optim import GossipOptimizer
from gut_fast.simulation.engines import make_engine
from gut_fast.simulation.objective import Supervised
from gut_fast.topology import complete, from_matrix, ring, sequence

LR, MU = 0.01, 0.5
NUM_CLASSES = 10
CHECKED_STEPS = 4
"""The steps that are compared; messages overlap with computation from the second one on."""

TOLERANCE, TOLERANCES = 1e-4, {torch.bfloat16: 2.0**-5, "int8": 0.05, "int4": 0.3}
"""The largest error of parameters in units of the largest one, and where messages are rounded. Agents begin with
different parameters, so without mixing, or with the wrong agents, the error is about 1. Where float32 alone does more,
four times that: in 32 steps of ResNet-20 a rounding of the starts comes to 2e-4."""

LOCAL_STEPS = 16
"""The steps of a round where not every step sends something."""


class Setting(NamedTuple):
    """The images of a network, the samples of an agent in a step, and the bytes that travel at once."""

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
class Case:
    """The network that all ranks train, and its sizes.

    `shares_memory` says whether ranks of one machine may read each other's memory.
    """

    model: str
    ranks: int = 4
    batch_size: int = 0
    bucket_bytes: int = 0
    shares_memory: bool = True

    @property
    def setting(self):
        """The network's setting with the numbers of this case, where they are given."""
        usual = SETTINGS[self.model]
        return usual._replace(
            batch_size=self.batch_size or usual.batch_size, bucket_bytes=self.bucket_bytes or usual.bucket_bytes
        )

    def make_module(self, rank):
        """The network as an agent begins with it, every one differently, so that mixing shows at once."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            return models.build(self.setting.spec, self.setting.image, NUM_CLASSES)

    def make_batch(self, rank):
        """An agent's images and labels, the same in every step."""
        generator, samples = torch.Generator().manual_seed(rank), self.setting.batch_size
        images = torch.randn(samples, *self.setting.image, generator=generator)
        return images, torch.randint(NUM_CLASSES, (samples,), generator=generator)


def ring_of(ranks):
    """A ring; of two agents it is an edge."""
    return ring(ranks) if ranks > 2 else complete(2)


def one_peer_ring(ranks):
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


class Contender:
    """Someone who trains on this rank, as others do on theirs; by itself it computes and sends nothing."""

    options: dict[str, Any] = {}  # noqa: RUF012  replaced, never changed
    local_steps = 1

    def __init__(self, case, rank):
        self.case, self.rank = case, rank
        self.module = case.make_module(rank)
        self.images, self.labels = case.make_batch(rank)
        self.prepare()

    def prepare(self):
        """Makes the optimizer."""
        self.optimizer = SGD(self.module.parameters(), LR, fused=True)

    def step(self):
        """Makes a training step, or the part of one that is timed."""
        self.optimizer.zero_grad()
        self.backward(self.module)
        self.optimizer.step()

    def backward(self, module):
        """Computes the gradients of the batch."""
        cross_entropy(module(self.images), self.labels).backward()

    def outcome(self):
        """The row that is compared with the truth: the parameters. Rank 0 may have the rows of all agents."""
        return parameters_to_vector(self.module.parameters()).detach()

    def bytes_sent(self):
        """The bytes of messages so far, or None if the contender does not count them."""
        return

    @classmethod
    def checked_steps(cls):
        """The steps that are compared: some rounds."""
        return CHECKED_STEPS if cls.local_steps == 1 else 2 * cls.local_steps

    @classmethod
    def truth(cls, agents):
        """The rows that should come out on the ranks, [N, D] in float64. Here z' = z − ηg."""
        z = agents.start
        for _ in range(CHECKED_STEPS):
            z = z - LR * agents.gradients(z)
        return z


class Gossip(Contender):
    """This library: a rule on a graph, one agent here."""

    rule, hyperparameters, graph = "gut", {"lr": LR, "mu": MU}, staticmethod(ring_of)

    def prepare(self):
        self.optimizer = GossipOptimizer(
            self.module.parameters(),
            self.rule,
            topology=self.graph(self.case.ranks),
            process_group=dist.group.WORLD,
            bucket_bytes=self.case.setting.bucket_bytes,
            local_steps=self.local_steps,
            **self.hyperparameters,
            **{"shared_memory": self.case.shares_memory, **self.options},
        )

    def outcome(self):
        """The parameters. Raises RuntimeError if messages did not leave during backward though they should."""
        if self.options.get("overlap") and self.optimizer.overlap != "on":
            raise RuntimeError(f"{self.rule}: overlap is {self.optimizer.overlap}")
        return super().outcome()

    def bytes_sent(self):
        return sum(self.optimizer.bytes_sent.values())

    @classmethod
    def expected_bytes(cls, case, numbers):
        """The bytes that each rank sends in the first steps: degree × message a round, the first in float32."""
        topology, rounds = cls.graph(case.ranks), cls.checked_steps() // cls.local_steps
        sizes = [4 * numbers] + [cls.message_bytes(case, numbers)] * (rounds - 1)
        degrees = [[len(topology.neighbors(rank, k)) for k in range(rounds)] for rank in range(case.ranks)]
        return [sum(map(operator.mul, sizes, each)) for each in degrees]

    @classmethod
    def message_bytes(cls, case, numbers):
        """The bytes of a message: its numbers; of 8 and 4 bits in words of 32, and a scale for 256 of a tensor."""
        wire = cls.options.get("wire_dtype", torch.float32)
        if isinstance(wire, torch.dtype):
            return numbers * wire.itemsize
        sizes = [parameter.numel() for parameter in case.make_module(0).parameters()]
        bits = int(wire.removeprefix("int"))
        return sum(4 * math.ceil(size * bits / 32) + 4 * math.ceil(size / 256) for size in sizes)

    @classmethod
    def truth(cls, agents, *, keeps_gradient=False):
        """GUT: ``S = z − η(g + μr);  D = W S − S;  z' = S + D;  r' = μr − D/(ηH)``; and DSGD, which is μ = 0.

        Of H steps the last one mixes; those before are ``z' = S``.
        """
        topology, mu = cls.graph(agents.case.ranks), cls.hyperparameters.get("mu", 0.0)
        z, r = agents.start, torch.zeros_like(agents.start)
        g = agents.gradients(z)
        for step in range(cls.checked_steps()):
            g = g if keeps_gradient else agents.gradients(z)
            S = z - LR * (g + mu * r)
            if (step + 1) % cls.local_steps:
                z = S
                continue
            D = topology.matrix(step // cls.local_steps) @ S - S
            z, r = S + D, mu * r - D / (LR * cls.local_steps)
        return z


class GossipDSGD(Gossip):
    """This library's DSGD."""

    rule, hyperparameters = "dsgd", {"lr": LR}


class Communication(GossipDSGD):
    """No computation: the exchange and the mixing of DSGD, with gradients at hand."""

    def prepare(self):
        super().prepare()
        self.backward(self.module)

    def step(self):
        self.optimizer.step()

    @classmethod
    def truth(cls, agents):
        """DSGD with the first gradients in all steps."""
        return super().truth(agents, keeps_gradient=True)


class OneProcess(Gossip):
    """This library's simulator: GUT of all agents in the process of rank 0, on all processors; the others rest."""

    def prepare(self):
        if self.rank:
            return
        ranks = self.case.ranks
        self.stacked = stack(self.module, ranks)
        for i in range(ranks):
            for mine, start in zip(
                self.stacked.agent(i).parameters(), self.case.make_module(i).parameters(), strict=True
            ):
                mine.detach().copy_(start.detach())
        batches = [self.case.make_batch(i) for i in range(ranks)]
        self.images, self.labels = (torch.stack(each) for each in zip(*batches, strict=True))
        self.engine = make_engine("auto", self.stacked, Supervised(cross_entropy))
        self.optimizer = GossipOptimizer(
            self.stacked.parameters(), self.rule, topology=self.graph(ranks), **self.hyperparameters
        )

    def step(self):
        if self.rank:
            return
        with threads(os.cpu_count() or 1):
            self.engine((self.images, self.labels))
            self.optimizer.step()

    def outcome(self):
        if self.rank:
            return torch.empty(0)
        return torch.cat([parameter.detach().flatten(1) for parameter in self.stacked.parameters()], 1)

    def bytes_sent(self):
        return


class BareSends(Contender):
    """The transport alone: a model to each neighbour on the ring and one from each, nothing else."""

    def prepare(self):
        self.row = super().outcome()
        self.peers = sorted({(self.rank - 1) % self.case.ranks, (self.rank + 1) % self.case.ranks})
        self.received = [torch.empty_like(self.row) for _ in self.peers]

    def step(self):
        works = [dist.irecv(row, peer) for row, peer in zip(self.received, self.peers, strict=True)]
        works += [dist.isend(self.row, peer) for peer in self.peers]
        for work in works:
            work.wait()

    def outcome(self):
        """The sum of what has come."""
        return torch.stack(self.received).sum(0)

    @classmethod
    def truth(cls, agents):
        """The sum of the neighbours' models."""
        graph = ring_of(agents.case.ranks)
        return torch.stack([agents.start[graph.neighbors(rank)].sum(0) for rank in range(agents.case.ranks)])


class DDP(Contender):
    """PyTorch's DistributedDataParallel: one model, gradients averaged over all ranks, the same SGD."""

    def prepare(self):
        super().prepare()
        megabytes = self.case.setting.bucket_bytes / (1 << 20)
        self.parallel = DistributedDataParallel(self.module, bucket_cap_mb=megabytes, gradient_as_bucket_view=True)

    def step(self):
        self.optimizer.zero_grad()
        self.backward(self.parallel)
        self.optimizer.step()

    @classmethod
    def truth(cls, agents):
        """The recurrence z' = z − η mean g, from the first rank's parameters."""
        z = agents.start[:1].expand_as(agents.start)
        for _ in range(CHECKED_STEPS):
            z = z - LR * agents.gradients(z).mean(0)
        return z


class DiLoCo(Contender):
    """DiLoCo's pattern: rounds of SGD alone, then one all-reduce and an outer step of Nesterov's momentum for all."""

    local_steps = LOCAL_STEPS
    outer_lr, outer_momentum = 0.7, 0.9

    def prepare(self):
        super().prepare()
        self.start = super().outcome().clone()
        dist.broadcast(self.start, 0)
        vector_to_parameters(self.start.clone(), self.module.parameters())
        self.momentum, self.number = torch.zeros_like(self.start), 0

    def step(self):
        super().step()
        self.number += 1
        if self.number % self.local_steps == 0:
            moved = self.start - super().outcome()
            dist.all_reduce(moved)
            moved /= self.case.ranks
            self.momentum.mul_(self.outer_momentum).add_(moved)
            self.start.sub_(moved.add_(self.momentum, alpha=self.outer_momentum), alpha=self.outer_lr)
            vector_to_parameters(self.start.clone(), self.module.parameters())

    @classmethod
    def truth(cls, agents):
        """The recurrence of Douillard et al., 2023, with SGD inside, from the first rank's parameters."""
        start = agents.start[:1].expand_as(agents.start)
        z, m = start, torch.zeros_like(start)
        for step in range(cls.checked_steps()):
            z = z - LR * agents.gradients(z)
            if (step + 1) % cls.local_steps == 0:
                moved = (start - z).mean(0)
                m = cls.outer_momentum * m + moved
                z = start = start - cls.outer_lr * (moved + cls.outer_momentum * m)
        return z


class DecentDP(Contender):
    """The ring of decent-dp: everyone mixes with one neighbour a step, in turn. Its buckets are whole MiB."""

    def prepare(self):
        importlib.import_module("loguru").logger.disable("decent_dp")
        megabytes = max(1, self.case.setting.bucket_bytes >> 20)
        self.parallel = importlib.import_module("decent_dp.ddp").DecentralizedDataParallel(
            self.module,
            lambda named: SGD([parameter for _, parameter in named], LR, fused=True),
            topology="ring",
            bucket_size_in_mb=megabytes,
        )

    def step(self):
        """Makes a training step; decent-dp steps and zeroes the gradients itself."""
        self.backward(self.parallel)

    @classmethod
    def truth(cls, agents):
        """The recurrence z' = W z − ηg, from rank 0; W is first I, and the second pairs come twice."""
        pairs = [one_peer_ring(agents.case.ranks).matrix(first) for first in (0, 1)]
        z = agents.start[:1].expand_as(agents.start)
        for step in range(CHECKED_STEPS):
            mixed = z if step == 0 else pairs[1 if step == 1 else (step + 1) % 2] @ z
            z = mixed - LR * agents.gradients(z)
        return z


def variant(base, **attributes):
    """A contender that differs from another in some class attributes."""
    return type(base.__name__, (base,), attributes)


OVERLAP = {"overlap": True}
CONTENDERS = {
    "computation": Contender,
    "communication": Communication,
    "bare sends": BareSends,
    "DSGD": GossipDSGD,
    "DSGD overlap": variant(GossipDSGD, options=OVERLAP),
    "GUT": Gossip,
    "GUT sockets": variant(Gossip, options={"shared_memory": False}),
    "GUT overlap": variant(Gossip, options=OVERLAP),
    "GUT overlap bfloat16": variant(Gossip, options={**OVERLAP, "wire_dtype": torch.bfloat16}),
    "DSGD one peer overlap": variant(GossipDSGD, options=OVERLAP, graph=staticmethod(one_peer_ring)),
    "GUT one process": OneProcess,
    "DDP": DDP,
    "decent-dp": DecentDP,
}
"""The contenders in the order in which every rank makes them. The first two bound what can be reached."""

WIRES = {"float32": {}, "bfloat16": {"wire_dtype": torch.bfloat16}} | {
    name: {"wire_dtype": name} for name in ("int8", "int4")
}
FEWER = {
    "computation": Contender,
    "DDP": DDP,
    "DiLoCo H = 16": DiLoCo,
    **{f"GUT {name}": variant(Gossip, options={**OVERLAP, **wire}) for name, wire in WIRES.items()},
    **{
        f"GUT {name} H = 16": variant(Gossip, options={**OVERLAP, **wire}, local_steps=LOCAL_STEPS)
        for name, wire in WIRES.items()
    },
}
"""Contenders that send less than a model in every step, with overlap, beside those that do not."""


def absent(case):
    """The contenders that cannot take part, and why."""
    reasons = {} if case.shares_memory else {"GUT sockets": "all that we send goes through sockets here"}
    if case.ranks % 2:
        reasons |= dict.fromkeys(["DSGD one peer overlap", "decent-dp"], "it needs an even number of ranks")
    elif importlib.util.find_spec("decent_dp") is None:
        reasons["decent-dp"] = "it is not installed"
    return reasons


class Rank:
    """The contenders of one rank. The process that measures calls the methods through `crews.Crew`."""

    def __init__(self, rank, place):
        self.rank, self.place = rank, place

    def make(self, case, names):
        """Makes these contenders; returns how many parameters the network has."""
        self.contenders = {name: (CONTENDERS | FEWER)[name](case, self.rank) for name in names}
        return sum(parameter.numel() for parameter in self.contenders["computation"].module.parameters())

    def train(self, name, steps):
        """Makes so many steps; returns what came out, and the bytes of messages that were sent, if it counts them."""
        contender = self.contenders[name]
        before = contender.bytes_sent()
        for _ in range(steps):
            contender.step()
        return contender.outcome().numpy(), None if before is None else contender.bytes_sent() - before

    def time(self, name, steps):
        """Makes so many steps, begun together; returns seconds, processor seconds, and bytes through the interface.

        A step of a contender with rounds is a whole round, and what is returned a mean over its steps.
        """
        contender = self.contenders[name]
        rounds = contender.local_steps
        dist.barrier()
        cpu, out, start = time.process_time(), self.place.bytes_out(), time.perf_counter()
        for _ in range(steps * rounds):
            contender.step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        dist.barrier()
        return seconds / rounds, cpu / rounds, (self.place.bytes_out() - out) / rounds

    def cpu_seconds(self):
        """Returns the processor seconds of this process so far."""
        return time.process_time()


class Agents:
    """All agents' modules and batches in this process; `start` is their parameters at the start, [N, D]."""

    def __init__(self, case):
        self.case, self._module = case, case.make_module(0)
        self._batches = [case.make_batch(rank) for rank in range(case.ranks)]
        modules = [case.make_module(rank) for rank in range(case.ranks)]
        self.start = torch.stack([parameters_to_vector(m.parameters()).detach() for m in modules]).double()

    def gradients(self, z):
        """The gradient of every agent at its own parameters, [N, D]."""
        rows = []
        for row, (images, labels) in zip(z.float(), self._batches, strict=True):
            vector_to_parameters(row, self._module.parameters())
            loss = cross_entropy(self._module(images), labels)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self._module.parameters()))]))
        return torch.stack(rows).double()

    def moved_by_rounding(self, contender):
        """How far the truth moves, in units of its largest entry, if the starts do by a unit of float32's rounding."""
        right, start = contender.truth(self), self.start
        noise = 2 * torch.rand(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
        self.start = start * (1 + 2.0**-24 * noise)
        moved, self.start = contender.truth(self), start
        return float((moved - right).abs().max() / right.abs().max())


def compare(ranks, case, names, numbers):
    """Returns the largest error of each contender after the first steps, in units of the largest parameter.

    Raises:
        WrongResultError: a contender is wrong, or one of ours has not sent degree × model size.
    """
    errors, agents = {}, Agents(case)
    for name in names:
        contender = (CONTENDERS | FEWER)[name]
        steps = contender.checked_steps()
        rows, sent = zip(*ranks.ask("train", name, steps), strict=True)
        if None not in sent and list(sent) != (expected := contender.expected_bytes(case, numbers)):
            raise WrongResultError(f"{name}: it sent {list(sent)} bytes in {steps} steps, expected {expected}")
        found = [torch.from_numpy(row).double() for row in rows]
        found, right = found[0] if found[0].dim() == 2 else torch.stack(found), contender.truth(agents)
        errors[name] = float((found - right).abs().max() / right.abs().max())
        limit = TOLERANCES.get(contender.options.get("wire_dtype"), TOLERANCE)
        if not errors[name] < limit and not errors[name] < (limit := 4 * agents.moved_by_rounding(contender)):
            raise WrongResultError(
                f"{name}: its parameters are off by {errors[name]:.1e} of the largest one after {steps} steps, "
                f"more than {limit:.1e}"
            )
    return errors


def measure(case, seconds, rate=None, contenders=CONTENDERS):
    """Compares these contenders with their recurrences, then times them in turns, for about so many seconds.

    A step's time is the mean of a turn on the rank that took longest. With a rate, links stand for those between
    machines, and no memory is shared.
    """
    missing, counts = absent(case), {}
    names = [name for name in contenders if name not in missing]
    with threads(1), crew(Rank, case.ranks, rate) as ranks:
        numbers = ranks.ask("make", case, names)[0]
        errors = compare(ranks, case, names, numbers)
        shared = case.ranks if rate is None else 1  # ranks that send through one interface

        def sampler(name):
            def sample(steps):
                each, cpu, out = zip(*ranks.ask("time", name, steps), strict=True)
                counts.setdefault(name, []).append(
                    (statistics.fmean(out) / steps / shared / 1e6, 1e3 * sum(cpu) / steps)
                )
                return [max(each) / steps]

            return sample

        with watch(lambda: time.process_time() + sum(ranks.ask("cpu_seconds"))) as noise:
            times = interleave({name: sampler(name) for name in names}, seconds)
    measured = {}
    for name in names:
        out, cpu = (statistics.median(column) for column in zip(*counts[name], strict=True))
        measured[name] = Measurement(times[name], error=errors[name], counts={"MB out": out, "CPU ms": cpu})
    samples, link = case.setting.batch_size, rate or "loopback"
    about = {"model": case.model, "ranks": case.ranks, "batch size": samples, "columns": numbers, "link": link}
    about |= {"bucket bytes": case.setting.bucket_bytes, "processors": os.cpu_count(), "samples": case.ranks * samples}
    versions = machine.versions()
    if (version := machine.installed_version("decent-dp")) is not None:
        versions["decent-dp"] = version
    missing = {name: reason for name, reason in missing.items() if name in contenders}
    what = ", fewer bytes" if contenders is FEWER else ""
    name = f"{case.model}, {case.ranks} ranks × {samples}, {link}{what}"
    return Result(
        "across", name, about, "DDP", measured, missing, noise, machine=machine.machine_line(), versions=versions
    )


def main():
    """Measures, prints and adds to the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--ranks", type=int, default=4, help="processes, with one agent and one thread each")
    parser.add_argument("--batch-size", type=int, default=0, help="samples per agent; by default the network's own")
    parser.add_argument("--bucket-bytes", type=int, default=0, help="what travels at once; default: the network's own")
    parser.add_argument("--rate", help="gives each rank a link of this rate, for example 200mbit; needs root")
    parser.add_argument(
        "--fewer-bytes", action="store_true", help="local steps and coded messages beside DDP and DiLoCo"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for each network; three rounds at least")
    parser.add_argument("--output", type=Path, help="a folder for JSON and Markdown; results add up")
    options = parser.parse_args()
    if options.ranks < 2 or min(options.batch_size, options.bucket_bytes) < 0:
        parser.error("expected two ranks or more and positive sizes")
    if options.rate is not None:
        check_rate(options.rate)
    measured = []
    for model in options.model:
        case = Case(model, options.ranks, options.batch_size, options.bucket_bytes, options.rate is None)
        contenders = FEWER if options.fewer_bytes else CONTENDERS
        measured.append(measure(case, options.seconds, options.rate, contenders))
        print(results.describe(measured[-1]), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        print(f"wrote {results.add(measured, options.output)}")


if __name__ == "__main__":
    main()
