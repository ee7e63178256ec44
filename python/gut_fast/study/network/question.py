"""Which topology and method to take on a network: plans side by side, over numbers of agents, and of finished runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gut_fast.study.network.convergence import Task
from gut_fast.study.network.planning import Network, Plan, bytes_per_step, plan, plan_allreduce, step_seconds
from gut_fast.study.records import Record
from gut_fast.topology.names import parse_topology

__all__ = ["METHODS", "MeasuredPlan", "Question", "compare", "measure", "sweep_sizes"]

METHODS = {
    "dsgd": "DSGD",
    "gut": "GUT",
    "gutm": "GUTm",
    "qg_dsgdm": "QG-DSGDm",
    "gradient_tracking": "gradient tracking",
}
"""The rules that are compared, and what they are called."""

ALLREDUCE_METHODS = ("dsgd", "qg_dsgdm")
"""With exact averages these are SGD and SGD with momentum; the other rules are one of the two."""

MAX_AGENTS_COMPLETE = 500
"""Everyone sends to everyone: beyond, a step has more than 250,000 messages."""

DEGREE = 4
"""Of the random regular graph."""


@dataclass(frozen=True)
class Question:
    """What a comparison is made for.

    Args:
        network: machines and links.
        model_bytes: bytes of a model; a rule of two messages sends twice as many.
        task: what is learned.
        target: the excess loss to be reached, as a fraction of that at the start.
        seed: draws the stragglers.
    """

    network: Network
    model_bytes: float
    task: Task
    target: float = 0.1
    seed: int = 0


def compare(num_agents: int, question: Question, also: str | None = None, gamma: float = 1.0) -> list[Plan]:
    """Plans of all `METHODS` on the usual topologies of that many agents, and of all-reduce.

    Args:
        num_agents: N.
        question: network, model and target.
        also: spec of one more topology, which comes first.
        gamma: averaging rate of that one.

    Raises:
        TypeError, ValueError: a bad spec or number, or a spec of another number of agents.
    """
    topologies = [] if also is None else [parse_topology(also, gamma)]
    topologies += [parse_topology(spec) for make in CANDIDATES.values() if (spec := make(num_agents))]
    if topologies[0].num_agents != num_agents:
        raise ValueError(f"{also} has {topologies[0].num_agents:,} agents, expected {num_agents:,}")
    distinct = {topology.name: topology for topology in topologies}
    plans = [plan(topology, list(METHODS), **vars(question)) for topology in distinct.values()]
    return [*itertools.chain(*plans), *plan_allreduce(num_agents, ALLREDUCE_METHODS, **vars(question))]


def sweep_sizes(sizes: Sequence[int], question: Question) -> Iterator[tuple[str, Plan]]:
    """Each family of topologies with its plans at each size, smallest first. Raises as `compare`."""
    for num_agents in sorted(set(sizes)):
        for family, make in CANDIDATES.items():
            if spec := make(num_agents):
                plans = plan(parse_topology(spec), list(METHODS), **vars(question))
                yield from ((family, entry) for entry in plans)
        exact = plan_allreduce(num_agents, ALLREDUCE_METHODS, **vars(question))
        yield from ((entry.topology, entry) for entry in exact)


def _torus(num_agents: int) -> str | None:
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


@dataclass(frozen=True)
class MeasuredPlan:
    """What finished runs of a method at a point of a sweep, one for each seed, would have cost on a network."""

    method: str
    point: Mapping[str, Any]
    topology: str
    num_agents: int
    step_seconds: float
    bytes_per_step: float
    """Sent by an agent, the mean over agents, as counted in the runs."""
    steps: tuple[float, ...]
    """Of each run, to the first evaluation at which its accuracy was the target's; infinite if it never was."""
    histories: tuple[list[dict[str, Any]], ...]

    @property
    def num_reached(self) -> int:
        """How many runs reached the target."""
        return sum(math.isfinite(steps) for steps in self.steps)

    @property
    def mean_steps(self) -> float:
        """Steps to the target, the mean over runs; infinite if one did not reach it."""
        return statistics.fmean(self.steps)

    @property
    def seconds(self) -> float:
        """Seconds to the target."""
        return self.mean_steps * self.step_seconds

    @property
    def bytes(self) -> float:
        """Bytes sent by an agent to the target."""
        return self.mean_steps * self.bytes_per_step


def measure(
    records: Sequence[Record], network: Network, accuracy: float, metric: str = "test_accuracy", seed: int = 0
) -> list[MeasuredPlan]:
    """The records, grouped by method and point, on a network.

    The time of a step is simulated for the topology of the runs and the bytes that they have counted.

    Args:
        records: finished runs.
        network: machines and links.
        accuracy: the target, a fraction.
        metric: the accuracy that is to reach it.
        seed: draws the stragglers.

    Raises:
        ValueError: an accuracy that is no fraction, or a history without `metric`.
    """
    if not 0 < accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in (0, 1], got {accuracy}")
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        experiment = record.run.experiment
        where = (experiment.topology, experiment.gamma, experiment.rule, _message_bytes(record))
        groups.setdefault((record.method, repr(sorted(record.point.items())), *where), []).append(record)
    seconds: dict[tuple[Any, ...], float] = {}
    plans = []
    for key, group in groups.items():
        spec, _, _, sent = where = key[2:]
        if where not in seconds:
            seconds[where] = step_seconds(parse_topology(spec), network, sent, seed=seed)
        plans.append(_measured(group, seconds[where], accuracy, metric))
    return plans


def _measured(group: Sequence[Record], seconds: float, accuracy: float, metric: str) -> MeasuredPlan:
    histories = tuple(record.run.history for record in group)
    if any(metric not in row for history in histories for row in history):
        raise ValueError(f"the runs of {group[0].method} have no {metric!r} in their histories")
    reached = ((row["step"] for row in history if row[metric] >= accuracy) for history in histories)
    experiment = group[0].run.experiment
    return MeasuredPlan(
        group[0].method,
        group[0].point,
        experiment.topology,
        parse_topology(experiment.topology).num_agents,
        seconds,
        _counted(group[0]),
        tuple(float(next(steps, math.inf)) for steps in reached),
        histories,
    )


def _counted(record: Record) -> float:
    """Bytes a step that the mean agent has sent."""
    final = record.run.final
    return float(final["mean_bytes_sent"]) / final["step"] if final["step"] else 0.0


def _message_bytes(record: Record) -> float:
    """Bytes that an agent has sent to each of its receivers in a step."""
    sent_per_byte = bytes_per_step(parse_topology(record.run.experiment.topology), 1)
    return _counted(record) / sent_per_byte if sent_per_byte else 0.0
