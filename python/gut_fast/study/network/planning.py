"""Before a run: how long a step takes on a network, and how long a target takes, for up to 100,000 agents.

A message of b bytes takes ``latency + b / bandwidth`` (the model of Hockney, Parallel Computing 20, 1994). An agent has
one port, which sends its messages one after the other, in ascending order of the receivers, while it receives; what
arrives does not queue, and switches never fill up. Agents wait for their neighbours only: with t_i(k) the time at which
agent i is through with step k,

    t_i(k + 1) = max( own messages sent,  max over the neighbours j that i hears of: message j → i has arrived ),

and the computation of step k + 1 begins at t_i(k). So a delay spreads by one hop a step instead of stopping everyone,
as Neglia et al., "The Role of Network Topology for Distributed Machine Learning", INFOCOM 2019, have it. Stragglers are
independent from step to step: a machine that is slow for good slows every synchronous method to its pace, on any
connected topology.

All-reduce is the yardstick. It waits for the slowest of all agents, then takes, for a model of n bytes, on a ring
2 (N − 1) rounds of n / N bytes, as a tree (recursive halving and doubling) 2 ⌈log₂ N⌉ rounds, 2 (1 − 2^−⌈log₂ N⌉) n
bytes in all: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005. What an
agent sends is the same at any N; the latencies are not, as Lian et al., NeurIPS 2017, argue for decentralized SGD.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gut_fast.arguments import as_integer, as_number
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.study.network.convergence import Convergence, Spectrum, Task, consensus_spectrum, steps_to_target
from gut_fast.topology import CSR, Topology

__all__ = [
    "ALLREDUCE",
    "Network",
    "Plan",
    "allreduce_bytes",
    "allreduce_seconds",
    "bytes_per_step",
    "plan",
    "plan_allreduce",
    "step_ends",
    "step_seconds",
]

Array = NDArray[Any]

ALLREDUCE = ("ring", "tree")
"""Algorithms of all-reduce."""

MESSAGES_SIMULATED = 50_000_000
MAX_STEPS_SIMULATED = 400
MIN_STEPS_SIMULATED = 40
"""Of `step_seconds`: as many as the number of messages lets it, the first half of them to forget the start."""


LONGEST = 1e15
"""Seconds: what a network's times and that of a message must stay below, so that sums over steps mean something."""


@dataclass(frozen=True)
class Network:
    """Machines and links, all alike.

    Args:
        bandwidth: bytes per second that the port of an agent sends.
        latency: seconds from the moment a message has left until it has arrived.
        compute: seconds that an agent computes in a step.
        overlap: the last fraction of the computation, in [0, 1], in which messages are sent already, layer by layer;
            no message has left before the computation is over.
        straggler_probability: of an agent's computation in a step to take `straggler_factor` times as long.
        straggler_factor: at least 1.
        link_straggler_probability: of a message to take `link_straggler_factor` times as long, at the port and on its
            way.
        link_straggler_factor: at least 1.

    Raises:
        TypeError, ValueError: not a number, or out of range.
    """

    bandwidth: float
    latency: float = 0.0
    compute: float = 0.0
    overlap: float = 0.0
    straggler_probability: float = 0.0
    straggler_factor: float = 1.0
    link_straggler_probability: float = 0.0
    link_straggler_factor: float = 1.0

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = as_number(getattr(self, entry.name), f"Network: {entry.name}")
            low = 1.0 if entry.name.endswith("factor") else 0.0
            is_fraction = entry.name == "overlap" or entry.name.endswith("probability")
            high = 1.0 if is_fraction else math.inf if entry.name == "bandwidth" else LONGEST
            if not low <= value <= high or math.isinf(value) or (entry.name == "bandwidth" and value == 0):
                expected = "positive and finite" if entry.name == "bandwidth" else f"in [{low:g}, {high:g}]"
                raise ValueError(f"Network: {entry.name} must be {expected}, got {value}")

    def slowness(self, rng: np.random.Generator, shape: Any, *, of_links: bool = False) -> Array:
        """Factors of the time of computations, or of messages: 1, or a straggler's."""
        probability = self.link_straggler_probability if of_links else self.straggler_probability
        factor = self.link_straggler_factor if of_links else self.straggler_factor
        if probability == 0 or factor == 1:
            return np.ones(shape)
        return np.where(rng.random(shape) < probability, factor, 1.0)


class _Exchange:
    """The messages of one step: sorted by sender, then receiver, as they queue at the senders' ports."""

    def __init__(self, csr: CSR) -> None:
        row_start, neighbor = csr.row_start.numpy(), csr.neighbor.numpy()
        self.num_agents = len(row_start) - 1
        order = np.argsort(neighbor, kind="stable")
        self.sender = neighbor[order]
        self.place_of_received = np.empty_like(order)  # of the messages sorted by receiver
        self.place_of_received[order] = np.arange(len(order))
        num_sent = np.bincount(neighbor, minlength=self.num_agents)
        self.sends = num_sent > 0
        self.first_sent = np.cumsum(num_sent) - num_sent
        self.last_sent = (self.first_sent + num_sent - 1)[self.sends]
        self.hears = np.diff(row_start) > 0
        self.first_received = row_start[:-1][self.hears]

    def ends(self, starts: Array, network: Network, message_bytes: float, rng: np.random.Generator) -> Array:
        """When the agents are through with the step that they begin at `starts`."""
        computing = network.compute * network.slowness(rng, self.num_agents)
        computed = starts + computing
        slowness = network.slowness(rng, len(self.sender), of_links=True)
        sending = slowness * (message_bytes / network.bandwidth)
        total = np.append(0.0, np.cumsum(sending))
        queued = total[1:] - total[self.first_sent[self.sender]]
        sent = np.maximum(computed[self.sender], (computed - network.overlap * computing)[self.sender] + queued)
        arrived = (sent + slowness * network.latency)[self.place_of_received]
        ends = computed.copy()
        ends[self.sends] = sent[self.last_sent]
        if len(arrived):
            last_arrived = np.maximum.reduceat(arrived, self.first_received)
            ends[self.hears] = np.maximum(ends[self.hears], last_arrived)
        return ends


def step_ends(topology: Topology, network: Network, message_bytes: float, seed: int = 0) -> Iterator[Array]:
    """When each agent is through with step 1, 2, …: seconds, [N]; without end.

    Args:
        topology: who sends to whom at each step.
        network: machines and links.
        message_bytes: what an agent sends to each of its receivers in a step: the bytes of a model times the messages
            of the rule, which travel as one.
        seed: draws the stragglers.

    Raises:
        TypeError, ValueError: message_bytes is not a number, negative or more than the network ever sends; a bad seed.
    """
    _check_bytes(message_bytes, "message_bytes")
    if not message_bytes / network.bandwidth < LONGEST:
        raise ValueError(f"{message_bytes:g} bytes take longer than {LONGEST:g} s at {network.bandwidth:g} bytes/s")
    return _step_ends(topology, network, message_bytes, np.random.default_rng(as_integer(seed, "seed", minimum=0)))


def _step_ends(topology: Topology, network: Network, message_bytes: float, rng: np.random.Generator) -> Iterator[Array]:
    exchanges: dict[int, _Exchange] = {}
    ends = np.zeros(topology.num_agents)
    for step in itertools.count():
        turn = step if topology.period is None else step % topology.period
        exchange = exchanges.get(turn) or _Exchange(topology.csr(step))
        if topology.period is not None:
            exchanges[turn] = exchange
        ends = exchange.ends(ends, network, message_bytes, rng)
        yield ends


def step_seconds(
    topology: Topology, network: Network, message_bytes: float, num_steps: int | None = None, seed: int = 0
) -> float:
    """Seconds a step in the long run: the mean over agents and over the second half of `num_steps` simulated ones.

    Without stragglers, where everyone sends to d agents and all steps are alike, that is
    ``max(compute, (1 − overlap) compute + d message_bytes / bandwidth) + latency``.

    Raises:
        TypeError, ValueError: as `step_ends`; less than two steps.
    """
    if topology.num_agents == 1:
        return network.compute * (1 + (network.straggler_factor - 1) * network.straggler_probability)
    period = topology.period or 1
    if num_steps is None:
        affordable = MESSAGES_SIMULATED // len(topology.csr(0).neighbor)
        num_steps = min(max(affordable, MIN_STEPS_SIMULATED), MAX_STEPS_SIMULATED)
    half = math.ceil(as_integer(num_steps, "num_steps", minimum=2) / (2 * period)) * period
    ends = step_ends(topology, network, message_bytes, seed)
    middle, end = (next(itertools.islice(ends, half - 1, None)).mean() for _ in range(2))
    return float(end - middle) / half


def bytes_per_step(topology: Topology, message_bytes: float) -> float:
    """Bytes that an agent sends in a step, the mean over agents and a period of the topology.

    Raises:
        TypeError, ValueError: message_bytes is not a number or negative.
    """
    _check_bytes(message_bytes, "message_bytes")
    steps = range(topology.period or 1)
    return message_bytes * sum(len(topology.csr(step).neighbor) for step in steps) / (len(steps) * topology.num_agents)


def _check_bytes(value: float, name: str) -> None:
    if not 0 <= as_number(value, name) < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def allreduce_bytes(num_agents: int, model_bytes: float, algorithm: str = "ring") -> float:
    """Bytes that an agent sends in an all-reduce of `model_bytes`. Raises as `allreduce_seconds`."""
    return float(sum(sent for _, sent in _rounds(num_agents, model_bytes, algorithm)))


def allreduce_seconds(
    num_agents: int, network: Network, model_bytes: float, algorithm: str = "ring", seed: int = 0
) -> float:
    """Expected seconds of a step with an all-reduce of `model_bytes` at its end.

    With straggling links the rounds are simulated, each agent going on as soon as it has what it needs: on a ring of
    more than 200 agents the first 400 of them, the others taking as long.

    Raises:
        TypeError, ValueError: bad numbers, or an algorithm that is not in `ALLREDUCE`.
    """
    rounds = _rounds(num_agents, model_bytes, algorithm)
    rng = np.random.default_rng(as_integer(seed, "seed", minimum=0))
    all_on_time = (1 - network.straggler_probability) ** num_agents
    slowest = network.compute * (network.straggler_factor + (1 - network.straggler_factor) * all_on_time)
    latencies = _communication_seconds(num_agents, network, [(hop, 0.0) for hop, _ in rounds], rng)
    communication = _communication_seconds(num_agents, network, rounds, rng)
    return max(slowest + latencies, (1 - network.overlap) * slowest + communication)


def _rounds(num_agents: int, model_bytes: float, algorithm: str) -> list[tuple[int, float]]:
    """Each round's hop from sender to receiver and bytes sent by every agent."""
    num_agents = as_integer(num_agents, "num_agents", minimum=1)
    _check_bytes(model_bytes, "model_bytes")
    if algorithm not in ALLREDUCE:
        raise ValueError(f"unknown algorithm of all-reduce {algorithm!r}; known are {', '.join(ALLREDUCE)}")
    if algorithm == "ring":
        return [(1, model_bytes / num_agents)] * (2 * (num_agents - 1))
    halving = [(2**k, model_bytes / 2 ** (k + 1)) for k in range((num_agents - 1).bit_length())]
    return halving + halving[::-1]


def _communication_seconds(
    num_agents: int, network: Network, rounds: Sequence[tuple[int, float]], rng: np.random.Generator
) -> float:
    """The mean time after which all agents are through with the rounds, begun together."""
    if network.link_straggler_probability == 0 or network.link_straggler_factor == 1:
        return sum(network.latency + sent / network.bandwidth for _, sent in rounds)
    simulated = rounds[:MAX_STEPS_SIMULATED]
    ends = np.zeros((max(1, 20_000 // num_agents), num_agents))
    for hop, sent_bytes in simulated:
        slowness = network.slowness(rng, ends.shape, of_links=True)
        sent = ends + slowness * (sent_bytes / network.bandwidth)
        ends = np.maximum(sent, np.roll(sent + slowness * network.latency, hop, axis=1))
    return float(ends.max(axis=1).mean()) * len(rounds) / max(len(simulated), 1)


@dataclass(frozen=True)
class Plan:
    """What a method costs on a topology: bytes and seconds a step, and to a target."""

    topology: str
    method: str
    num_agents: int
    bytes_per_step: float
    """Sent by an agent, the mean over agents."""
    step_seconds: float
    convergence: Convergence | None
    """None where the steps to a target are not known for the topology."""

    @property
    def steps(self) -> float:
        """Steps to the target: infinite if it is not reached, NaN if unknown."""
        return math.nan if self.convergence is None else self.convergence.steps

    @property
    def seconds(self) -> float:
        """Seconds to the target."""
        return self.steps * self.step_seconds

    @property
    def bytes(self) -> float:
        """Bytes sent by an agent to the target."""
        return self.steps * self.bytes_per_step


def plan(
    topology: Topology,
    rules: Sequence[str | UpdateRule],
    network: Network,
    model_bytes: float,
    task: Task | None = None,
    target: float = 0.1,
    seed: int = 0,
) -> list[Plan]:
    """A `Plan` of each rule on the topology; arguments as in `step_seconds` and `gut_fast.study.network.convergence`.

    Raises:
        TypeError, ValueError: a bad rule or number.
    """
    _check_bytes(model_bytes, "model_bytes")
    checked = [get_rule(rule) for rule in rules]
    task = task or Task()
    try:
        spectrum = consensus_spectrum(topology)
    except ValueError:
        spectrum = None
    message_bytes = {rule.num_messages: rule.num_messages * model_bytes for rule in checked}
    seconds = {number: step_seconds(topology, network, sent, seed=seed) for number, sent in message_bytes.items()}
    return [
        Plan(
            topology.name,
            rule.name,
            topology.num_agents,
            bytes_per_step(topology, message_bytes[rule.num_messages]),
            seconds[rule.num_messages],
            steps_to_target(rule, spectrum, topology.num_agents, task, target) if spectrum else None,
        )
        for rule in checked
    ]


def plan_allreduce(
    num_agents: int,
    rules: Sequence[str | UpdateRule],
    network: Network,
    model_bytes: float,
    task: Task | None = None,
    target: float = 0.1,
    seed: int = 0,
) -> list[Plan]:
    """A `Plan` of each rule with the exact average of all gradients, for both algorithms of all-reduce.

    Raises:
        TypeError, ValueError: a bad rule or number.
    """
    exact = Spectrum(np.zeros((1, 0)), np.zeros(0))
    converged = {
        get_rule(rule).name: steps_to_target(rule, exact, num_agents, task or Task(), target) for rule in rules
    }
    costs = {
        algorithm: (
            allreduce_bytes(num_agents, model_bytes, algorithm),
            allreduce_seconds(num_agents, network, model_bytes, algorithm, seed),
        )
        for algorithm in ALLREDUCE
    }
    return [
        Plan(f"all-reduce, {algorithm}", name, num_agents, *cost, convergence)
        for algorithm, cost in costs.items()
        for name, convergence in converged.items()
    ]
