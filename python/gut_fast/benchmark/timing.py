"""How times are taken: everyone in turns of shuffled order in one process, and what disturbed them meanwhile."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gut_fast.benchmark.device import CPU, Clock

__all__ = ["Disturbance", "Quantiles", "interleave", "threads", "watch"]

TURN_SECONDS = 0.02
"""How long a contender steps before the next one has its turn."""

MAX_STEPS_A_TURN = 20

MIN_ROUNDS, MAX_ROUNDS = 3, 400
MAX_OVERTIME = 2

MAX_OTHERS = 0.15
"""Processors that others may keep busy, on average, in a quiet run."""

MAX_STOLEN = 0.02
MAX_SPREAD = 0.25
MAX_SWITCHES_A_SECOND = 40


@dataclass(frozen=True)
class Quantiles:
    """Seconds of a step: the median, and the tenth and ninetieth of a hundred."""

    p10: float
    p50: float
    p90: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Quantiles:
        """Those of a sample."""
        p10, p50, p90 = (float(each) for each in np.quantile(seconds, (0.1, 0.5, 0.9)))
        return Quantiles(p10, p50, p90, len(seconds))

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.p90 - self.p10) / self.p50

    def divided(self, number: float) -> Quantiles:
        """Those of a part of what was timed."""
        return Quantiles(self.p10 / number, self.p50 / number, self.p90 / number, self.samples)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch and the kernels on so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Turn:
    """What a contender does when it has its turn: `samples` times `repeats` steps, after one that is not timed."""

    samples: int
    repeats: int
    seconds: float


def interleave(
    steps: Mapping[str, Callable[[], None]], seconds: float, seed: int = 0, clock: Clock = CPU.wall
) -> dict[str, Quantiles]:
    """Times every function for about so many seconds in all, three rounds at least.

    In every round each has one turn, in an order drawn anew. A turn begins with a step that is not timed: it brings
    its own data and threads back, whoever was before.
    """
    turns = {name: _turn(step, clock) for name, step in steps.items()}
    rounds = round(seconds / sum(turn.seconds for turn in turns.values()))
    order, shuffle = list(steps), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + MAX_OVERTIME * seconds
    for done in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        if done >= MIN_ROUNDS and time.perf_counter() > end:  # taking times may itself take time
            break
        shuffle(order)
        for name in order:
            times[name] += _sample(steps[name], turns[name], clock)
    return {name: Quantiles.of(sample) for name, sample in times.items()}


def _turn(step: Callable[[], None], clock: Clock) -> _Turn:
    """How long a step takes decides how many a turn has; the first one may compile."""
    step()
    seconds = min(_sample(step, _Turn(2, 1, 0.0), clock))
    repeats = max(1, round(clock.min_seconds / seconds))
    samples = min(max(1, round(TURN_SECONDS / (repeats * seconds))), MAX_STEPS_A_TURN)
    return _Turn(samples, repeats, seconds * (1 + samples * repeats))


def _sample(step: Callable[[], None], turn: _Turn, clock: Clock) -> list[float]:
    step()
    return [clock.time(step, turn.repeats) for _ in range(turn.samples)]


@dataclass
class Disturbance:
    """What else happened on the machine while times were taken.

    Attributes:
        load_before, load_after: of the last minute, this process included.
        seconds: how long it took.
        others: processors that other processes kept busy, on average; None where the system does not tell.
        stolen: the part of the processors' time that the host gave to other machines; None likewise.
        switches: how often this process had to leave a processor to another.
        spread: of the ceiling, or of whoever is steadiest: (p90 − p10) / median.
    """

    load_before: float
    load_after: float = 0.0
    seconds: float = 0.0
    others: float | None = None
    stolen: float | None = None
    switches: int = 0
    spread: float = 0.0

    def reasons(self) -> list[str]:
        """Why the times are not to be trusted to the last per cent; none if the machine was quiet."""
        reasons = []
        if self.others is not None and self.others > MAX_OTHERS:
            reasons.append(f"other processes kept {self.others:.2f} processors busy")
        if self.stolen is not None and self.stolen > MAX_STOLEN:
            reasons.append(f"the host took {self.stolen:.0%} of the processors' time away")
        if self.switches > MAX_SWITCHES_A_SECOND * self.seconds:
            reasons.append(f"{self.switches / self.seconds:.0f} involuntary context switches a second")
        if self.spread > MAX_SPREAD:
            reasons.append(f"the ceiling's own times spread by {self.spread:.0%} of their median")
        return reasons


@contextmanager
def watch() -> Iterator[Disturbance]:
    """Looks at the machine while times are taken; complete when the block ends."""
    seen = Disturbance(os.getloadavg()[0])
    busy, stolen, own, switches, start = *_processor_seconds(), time.process_time(), _switches(), time.perf_counter()
    yield seen
    seen.seconds = time.perf_counter() - start
    seen.load_after = os.getloadavg()[0]
    seen.switches = _switches() - switches
    busy_after, stolen_after = _processor_seconds()
    if busy is not None and busy_after is not None and stolen is not None and stolen_after is not None:
        others = busy_after - busy - (time.process_time() - own)
        seen.others = max(0.0, others / seen.seconds)
        seen.stolen = (stolen_after - stolen) / (seen.seconds * (os.cpu_count() or 1))


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _processor_seconds() -> tuple[float | None, float | None]:
    """Seconds that all processors were busy for this machine, and that its host took away, since it started."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None, None
    user, nice, system, _, _, interrupt, soft_interrupt, stolen = (int(each) for each in line.split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupt + soft_interrupt) / tick, stolen / tick
