"""The cost of a step and of a target on a network, for each topology and method, up to 100,000 agents.

Two plain models give the answers, so they are worth an order of magnitude and a ranking, not the seconds of a given
cluster. For finished runs `measured` needs the first model alone: the runs themselves say how many steps they took.

**The time of a step.** A message of b bytes takes ``latency + b / bandwidth`` (the model of Hockney, Parallel Computing
20, 1994). An agent has one port, which sends its messages one after the other, in ascending order of the receivers,
while it receives; arriving messages do not queue, and switches never fill up. Agents wait for their neighbours only:
with t_i(k) the time at which agent i is through with step k,

    t_i(k + 1) = max( own messages sent,  max over the neighbours j that i hears of: message j → i has arrived ),

and the computation of step k + 1 begins at t_i(k). So a delay spreads by one hop a step instead of stopping everyone,
as in Neglia et al., "The Role of Network Topology for Distributed Machine Learning", INFOCOM 2019. Stragglers are
independent from step to step: a machine that is slow for good slows every synchronous method to its pace. With H local
steps an agent computes H gradients before its messages leave; k then counts rounds.

All-reduce in every step is the yardstick. It waits for the slowest of all agents, then takes, for a model of n bytes,
on a ring 2 (N − 1) rounds of n / N bytes, as a tree (recursive halving and doubling) 2 ⌈log₂ N⌉ rounds, 2 (1 −
2^−⌈log₂ N⌉) n bytes in all: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH", 2005.

**The steps to a target.** They are those of `gut_fast.study.quadratics`, each method at the best learning rate and μ of
a grid: what separates the topologies there is the agents' disagreement alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gut_fast.arguments import as_integer, as_number
from gut_fast.rules import RULES
from gut_fast.study.quadratics import EXACT_AVERAGE, Quadratics, consensus_quadrature, steps_to_target
from gut_fast.study.results import Results
from gut_fast.topology import Topology
from gut_fast.topology.names import parse_topology

__all__ = [
    "METHODS",
    "Network",
    "Question",
    "allreduce_seconds",
    "bytes_per_step",
    "compare",
    "measured",
    "round_ends",
    "step_seconds",
]

Array = NDArray[Any]

METHODS = {
    "dsgd": "DSGD",
    "gut": "GUT",
    "gutm": "GUTm",
    "qg_dsgdm": "QG-DSGDm",
    "gradient_tracking": "gradient tracking",
}
"""The rules that are compared, and their names in tables."""

ALLREDUCE_METHODS = ("dsgd", "qg_dsgdm")
"""With exact averages these are SGD and SGD with momentum; every other rule equals one of the two."""

ALLREDUCE = ("ring", "tree")
"""The algorithms of all-reduce."""

MAX_AGENTS_COMPLETE = 500
"""The size up to which the complete graph is compared: beyond, a step has more than 250,000 messages."""

DEGREE = 4
"""The degree of the random regular graph."""

MESSAGES_SIMULATED, MIN_ROUNDS_SIMULATED, MAX_ROUNDS_SIMULATED = 50_000_000, 40, 400
"""How long `step_seconds` simulates: about so many messages, within these numbers of rounds."""

LONGEST = 1e15
"""The seconds that a network's times and a message must stay below, so that sums over steps keep their digits."""

COLUMNS = (
    "family",
    "topology",
    "agents",
    "method",
    "bytes_per_step",
    "seconds_per_step",
    "steps_to_target",
    "lr",
    "mu",
)


@dataclass(frozen=True)
class Network:
    """Machines and links, all alike.

    Args:
        bandwidth: bytes per second that the port of an agent sends.
        latency: seconds from the moment a message has left until it has arrived.
        compute: seconds that an agent computes in a step.
        overlap: the last fraction of the computation, in [0, 1], in which messages are sent already, layer by layer;
            no message has left before the computation is over.
        straggler_probability: the probability that an agent's computation in a step takes `straggler_factor` times as
            long.
        straggler_factor: at least 1.
        link_straggler_probability: the probability that a message takes `link_straggler_factor` times as long, at the
            port and on its way.
        link_straggler_factor: at least 1.

    Raises:
        TypeError, ValueError: a value is not a number, or out of range.
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
        for name, value in vars(self).items():
            low = 1.0 if name.endswith("factor") else 0.0
            high = 1.0 if name == "overlap" or name.endswith("probability") else LONGEST
            if name == "bandwidth":
                low, high = 1 / LONGEST, LONGEST
            if not low <= as_number(value, f"Network: {name}") <= high:
                raise ValueError(f"Network: {name} must be in [{low:g}, {high:g}], got {value}")

    def slowness(self, rng: np.random.Generator, shape: Any, *, of_links: bool = False) -> Array:
        """Factors by which computations, or messages, take longer: 1, or a straggler's."""
        probability = self.link_straggler_probability if of_links else self.straggler_probability
        factor = self.link_straggler_factor if of_links else self.straggler_factor
        if probability == 0 or factor == 1:
            return np.ones(shape)
        return np.where(rng.random(shape) < probability, factor, 1.0)


@dataclass(frozen=True)
class Question:
    """The network, the model and the problem that a comparison is made for.

    Args:
        network: machines and links.
        model_bytes: bytes of a model; a rule of two messages sends twice as many.
        problem: what is learned, and the target.
        seed: draws the stragglers.
        local_steps: H, the steps of a round, in the last of which messages leave; all-reduce is done in every step.
    """

    network: Network
    model_bytes: float
    problem: Quadratics
    seed: int = 0
    local_steps: int = 1


def compare(num_agents: int, question: Question, also: Topology | None = None) -> pd.DataFrame:
    """The cost of a step and of the target for all `METHODS`, on the usual topologies of N agents and by all-reduce.

    Args:
        num_agents: N.
        question: network, model and problem.
        also: one more topology of as many agents, which comes first.

    Returns:
        A row for each topology and method. Its columns are those of `COLUMNS`, bytes_to_target and seconds_to_target.
        Bytes are those that an agent sends, the mean over agents; steps are infinite if the target is not reached and
        NaN if they are not known for the topology; lr and mu are the best of those tried.

    Raises:
        TypeError, ValueError: a bad number.
    """
    named = {} if also is None else {also.name: (also.name, also)}
    for family, make in CANDIDATES.items():
        if spec := make(num_agents):
            topology = parse_topology(spec)
            named[topology.name] = (family, topology)
    rows: list[tuple[Any, ...]] = []
    H, drawn = question.local_steps, {"seed": question.seed, "local_steps": question.local_steps}
    for name, (family, topology) in named.items():
        quadrature = consensus_quadrature(topology)
        sizes = {rule: RULES[rule].num_messages * question.model_bytes for rule in METHODS}
        seconds = {size: step_seconds(topology, question.network, size, **drawn) for size in sizes.values()}
        for rule, size in sizes.items():
            steps = steps_to_target(rule, quadrature, num_agents, question.problem, local_steps=H)
            rows.append((family, name, num_agents, rule, bytes_per_step(topology, size, H), seconds[size], *steps))
    for algorithm, rule in itertools.product(ALLREDUCE, ALLREDUCE_METHODS):
        name = f"all-reduce, {algorithm}"
        sent = float(sum(sent for _, sent in _rounds(num_agents, question.model_bytes, algorithm)))
        took = allreduce_seconds(num_agents, question.network, question.model_bytes, algorithm, question.seed)
        steps = steps_to_target(rule, EXACT_AVERAGE, num_agents, question.problem)
        rows.append((name, name, num_agents, rule, sent, took, *steps))
    costs = pd.DataFrame(rows, columns=list(COLUMNS))
    for unit in ("bytes", "seconds"):
        costs[f"{unit}_to_target"] = costs["steps_to_target"] * costs[f"{unit}_per_step"]
    return costs


def _torus(num_agents: int) -> str | None:
    """The spec of the torus nearest to a square; None for a prime number of agents."""
    rows = next(rows for rows in range(math.isqrt(num_agents), 0, -1) if num_agents % rows == 0)
    return f"torus:{rows}x{num_agents // rows}" if rows > 1 else None


CANDIDATES: Mapping[str, Callable[[int], str | None]] = {
    "ring": lambda n: f"ring:{n}",
    "torus": _torus,
    "random regular": lambda n: f"random-regular:{n}:{DEGREE}:0" if n > DEGREE else None,
    "exponential": lambda n: f"exponential:{n}",
    "one-peer exponential": lambda n: f"one-peer-exponential:{n}",
    "complete": lambda n: f"complete:{n}" if n <= MAX_AGENTS_COMPLETE else None,
}
"""The spec of each family's topology of N agents; None where it has none, or none that can be afforded."""


def measured(results: Results, network: Network, accuracy: float, seed: int = 0) -> pd.DataFrame:
    """The cost of finished runs, had they run on a network, until their averaged model first had a test accuracy.

    The time of a step is simulated for the topology and the local steps of the runs and the bytes that they have
    counted.

    Args:
        results: the runs.
        network: machines and links.
        accuracy: the target, a fraction.
        seed: draws the stragglers.

    Returns:
        A row for each method and point, the fastest first, with columns method, point, topology, local_steps, runs,
        reached (how many runs reached the target), steps (the mean number of steps; infinite if a run did not reach
        it), bytes_per_step (an agent's), seconds_per_step, bytes and seconds (until then).

    Raises:
        ValueError: an accuracy that is no fraction.
    """
    if not 0 < accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in (0, 1], got {accuracy}")
    history, final = results.history, results.final()
    runs = results.runs[["method", "point", "topology", "local_steps"]].assign(
        bytes_per_step=(final["mean_bytes_sent"] / final["step"]).fillna(0.0),
        steps=history[history["test_accuracy"] >= accuracy].groupby("run")["step"].min(),
    )
    groups = runs.fillna({"steps": math.inf}).groupby([*runs.columns[:-1]], sort=False)["steps"]
    found = groups.agg(runs="size", reached=lambda steps: np.isfinite(steps).sum(), steps="mean").reset_index()

    @lru_cache
    def seconds(spec: str, H: int, sent: float) -> float:
        topology = parse_topology(spec)
        message_bytes = sent / (bytes_per_step(topology, 1, H) or 1)
        return step_seconds(topology, network, message_bytes, seed=seed, local_steps=H)

    found["seconds_per_step"] = list(map(seconds, found["topology"], found["local_steps"], found["bytes_per_step"]))
    for unit in ("bytes", "seconds"):
        found[unit] = found["steps"] * found[f"{unit}_per_step"]
    return found.sort_values("seconds", kind="stable", ignore_index=True)


def bytes_per_step(topology: Topology, message_bytes: float, local_steps: int = 1) -> float:
    """Bytes that an agent sends in a step, the mean over agents, rounds of H steps and a period of the topology."""
    rounds = range(topology.period or 1)
    messages = sum(len(topology.csr(number).neighbor) for number in rounds)
    return message_bytes * messages / (len(rounds) * topology.num_agents * local_steps)


def step_seconds(
    topology: Topology,
    network: Network,
    message_bytes: float,
    num_rounds: int | None = None,
    seed: int = 0,
    local_steps: int = 1,
) -> float:
    """Seconds a step in the long run: the mean over agents and over the second half of `num_rounds` simulated rounds.

    Without stragglers, where everyone sends to d agents and all rounds are alike, a round of H steps takes
    ``max(H compute, (H − overlap) compute + d message_bytes / bandwidth) + latency``, and a step 1/H of it.

    Args:
        topology: who sends to whom in each round.
        network: machines and links.
        message_bytes: what an agent sends to each of its receivers in a round: the bytes of a model times the messages
            of the rule, which travel as one.
        num_rounds: at least 2; None is as many as the number of messages lets it be.
        seed: draws the stragglers.
        local_steps: H >= 1, the steps of a round, in the last of which messages leave.

    Raises:
        TypeError, ValueError: a bad seed or number of steps or rounds; message_bytes is not a number, negative or too
            many.
    """
    as_integer(local_steps, "local_steps", minimum=1)
    if not 0 <= as_number(message_bytes, "message_bytes") / network.bandwidth < LONGEST:
        raise ValueError(
            f"message_bytes must be at least 0 and take less than {LONGEST:g} s to send, got {message_bytes:g} bytes "
            f"at {network.bandwidth:g} bytes/s"
        )
    if topology.num_agents == 1:
        return network.compute * (1 + (network.straggler_factor - 1) * network.straggler_probability)
    period = topology.period or 1
    if num_rounds is None:
        affordable = MESSAGES_SIMULATED // len(topology.csr(0).neighbor)
        num_rounds = min(max(affordable, MIN_ROUNDS_SIMULATED), MAX_ROUNDS_SIMULATED)
    half = math.ceil(as_integer(num_rounds, "num_rounds", minimum=2) / (2 * period)) * period
    ends = round_ends(topology, network, message_bytes, as_integer(seed, "seed", minimum=0), local_steps)
    middle, end = (next(itertools.islice(ends, half - 1, None)).mean() for _ in range(2))
    return float(end - middle) / (half * local_steps)


def round_ends(
    topology: Topology, network: Network, message_bytes: float, seed: int = 0, local_steps: int = 1
) -> Iterator[Array]:
    """When each agent is through with round 1, 2, …: seconds, [N]; without end. The arguments are `step_seconds`'."""
    rng = np.random.default_rng(seed)
    messages = lru_cache(maxsize=topology.period or 1)(partial(_messages, topology))
    ends = np.zeros(topology.num_agents)
    for number in itertools.count():
        sender, receiver, first = messages(number if topology.period is None else number % topology.period)
        *before, computing = network.compute * network.slowness(rng, (local_steps, topology.num_agents))
        computed = ends + sum(before) + computing
        slowness = network.slowness(rng, len(sender), of_links=True)
        total = np.append(0.0, np.cumsum(slowness * (message_bytes / network.bandwidth)))
        queued = total[1:] - total[first]
        sent = np.maximum(computed[sender], (computed - network.overlap * computing)[sender] + queued)
        ends = computed.copy()
        np.maximum.at(ends, sender, sent)
        np.maximum.at(ends, receiver, sent + slowness * network.latency)
        yield ends


def _messages(topology: Topology, step: int) -> tuple[Array, Array, Array]:
    """Sender and receiver of a step's messages, as they queue at the ports, and the place of the sender's first one."""
    row_start, neighbor, _ = (array.numpy() for array in topology.csr(step))
    order = np.argsort(neighbor, kind="stable")
    sender, receiver = neighbor[order], np.repeat(np.arange(len(row_start) - 1), np.diff(row_start))[order]
    return sender, receiver, np.searchsorted(sender, sender)


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
    """Each round's hop from sender to receiver, and the bytes that every agent sends in it."""
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
    simulated = rounds[:MAX_ROUNDS_SIMULATED]
    ends = np.zeros((max(1, 20_000 // num_agents), num_agents))
    for hop, sent_bytes in simulated:
        slowness = network.slowness(rng, ends.shape, of_links=True)
        sent = ends + slowness * (sent_bytes / network.bandwidth)
        ends = np.maximum(sent, np.roll(sent + slowness * network.latency, hop, axis=1))
    return float(ends.max(axis=1).mean()) * len(rounds) / max(len(simulated), 1)
