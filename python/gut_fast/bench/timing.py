"""The timer: contenders take turns in shuffled order in one process, on a CPU, a GPU or several ranks."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Quantiles", "Sampler", "gpu_sampler", "interleave", "threads", "wall_sampler", "watch"]

Sampler = Callable[[int], list[float]]
"""A function that makes so many steps and returns measured seconds of one step, one or several values."""

TURN_SECONDS, MAX_STEPS_A_TURN = 0.05, 50
"""A contender's turn lasts about so long and has at most so many steps."""

MIN_ROUNDS = 3
FLUSHED_BYTES = 2**30
"""The bytes that are overwritten before each step timed on a GPU: many times any L2 cache, a third of a millisecond."""

MAX_OTHERS, MAX_STOLEN = 0.15, 0.02
"""A quiet machine: other processes keep fewer processors busy, and the host takes a smaller part of the time away."""


@dataclass(frozen=True)
class Quantiles:
    """Seconds of a step: the median, and the tenth and the ninetieth percentile of so many samples."""

    p10: float
    p50: float
    p90: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Quantiles:
        """The quantiles of a sample."""
        p10, p50, p90 = (float(each) for each in np.quantile(seconds, (0.1, 0.5, 0.9)))
        return Quantiles(p10, p50, p90, len(seconds))

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.p90 - self.p10) / self.p50


def interleave(samplers: Mapping[str, Sampler], seconds: float, seed: int = 0) -> dict[str, Quantiles]:
    """Times all contenders for about so many seconds together, and for at least three rounds.

    In each round every contender has one turn, in an order drawn anew. A turn begins with a step whose time is thrown
    away, because it brings the contender's own data and threads back.
    """
    steps = {}
    for name, sample in samplers.items():
        sample(1)  # the first step may compile
        steps[name] = min(max(1, round(TURN_SECONDS / max(min(sample(2)), 1e-9))), MAX_STEPS_A_TURN)
    order, shuffle = list(samplers), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in samplers}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            samplers[name](1)
            times[name] += samplers[name](steps[name])
        rounds += 1
    return {name: Quantiles.of(sample) for name, sample in times.items()}


def wall_sampler(step: Callable[[], object], device: torch.device) -> Sampler:
    """Returns a sampler by the caller's clock.

    On a CPU every step is a sample. On a GPU the only sample is the mean of steps that are queued one after the other
    and waited for once, which is what a training loop sees.
    """

    def on_cpu(steps: int) -> list[float]:
        samples = []
        for _ in range(steps):
            start = time.perf_counter_ns()
            step()
            samples.append((time.perf_counter_ns() - start) * 1e-9)
        return samples

    def on_gpu(steps: int) -> list[float]:
        torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
        return [(time.perf_counter_ns() - start) * 1e-9 / steps]

    return on_gpu if device.type == "cuda" else on_cpu


def gpu_sampler(step: Callable[[], object], flushed: Tensor) -> Sampler:
    """Returns a sampler of the time that the GPU itself is busy with a step, by CUDA events around each step.

    Before each step the GPU overwrites `flushed`, a large tensor. So the step finds none of its data in the cache, and
    Python has time to queue the step's kernels before the GPU is ready for them. A step whose kernels Python needs
    longer to queue than the GPU to overwrite the tensor is timed as fast as Python queues it.
    """

    def sample(steps: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
        for begin, end in events:
            flushed.zero_()
            begin.record()
            step()
            end.record()
        events[-1][1].synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in events]

    return sample


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Gives PyTorch and the kernels so many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def watch(own_seconds: Callable[[], float] = time.process_time) -> Iterator[list[str]]:
    """Watches the machine and yields a list, which is filled when the block ends: why its times are noisy, if they are.

    Args:
        own_seconds: returns the processor seconds that the benchmark itself has used so far.
    """
    noise: list[str] = []
    start, own, (busy, stolen) = time.perf_counter(), own_seconds(), _processor_seconds()
    yield noise
    busy_after, stolen_after = _processor_seconds()
    seconds = time.perf_counter() - start
    others = (busy_after - busy - (own_seconds() - own)) / seconds
    taken = (stolen_after - stolen) / (seconds * (os.cpu_count() or 1))
    if others > MAX_OTHERS:
        noise.append(f"other processes kept {others:.2f} processors busy")
    if taken > MAX_STOLEN:
        noise.append(f"the host took {taken:.0%} of the processors' time away")


def _processor_seconds() -> tuple[float, float]:
    """Returns the seconds that all processors were busy, and that the host took away, since the system started.

    Both are zero where there is no ``/proc/stat``.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _, _, interrupt, soft, stolen = map(int, stat.read_text(encoding="ascii").split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupt + soft) / tick, stolen / tick
