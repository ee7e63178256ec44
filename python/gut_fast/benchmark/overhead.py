"""The Python part of a step: what is left of it without the time inside the compiled kernel, or until it is queued."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from gut_fast.benchmark.contenders import GutFast, Unavailable
from gut_fast.benchmark.device import Device
from gut_fast.benchmark.timing import Quantiles

__all__ = ["GOAL", "python_part", "queueing"]

GOAL = 60e-6
"""Seconds of Python that a step of 65 tensors may take."""

MIN_STEPS, MAX_STEPS = 10, 1000
STEPS_QUEUED = 20
"""Fewer than any queue holds."""


class _Clock:
    """Adds up the time inside the functions it has wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, its time counted."""

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            self.seconds += time.perf_counter() - start

        return timed


def python_part(ours: GutFast, seconds: float) -> Quantiles:
    """Seconds of ``optimizer.step()`` outside the kernel, on the tensors as they are.

    So the caches are those that the kernel leaves behind, which makes Python slower than it is by itself. Reading the
    tensors' addresses counts as Python.

    Raises:
        Unavailable: the step does not go through the compiled kernel.
    """
    clock = _Clock()
    samples: list[float] = []
    with _kernel_under(clock):
        ours.step()
        if clock.seconds == 0:
            raise Unavailable("the step does not go through the compiled kernel")
        end = time.perf_counter() + seconds
        while len(samples) < MIN_STEPS or (len(samples) < MAX_STEPS and time.perf_counter() < end):
            clock.seconds = 0.0
            start = time.perf_counter()
            ours.step()
            samples.append(time.perf_counter() - start - clock.seconds)
    return Quantiles.of(samples)


def queueing(ours: GutFast, device: Device) -> Quantiles:
    """Seconds until ``optimizer.step()`` returns, its work queued on a device that has nothing else to do."""
    samples: list[float] = []
    for _ in range(MIN_STEPS * STEPS_QUEUED):
        if len(samples) % STEPS_QUEUED == 0:
            device.synchronize()
        start = time.perf_counter()
        ours.step()
        samples.append(time.perf_counter() - start)
    return Quantiles.of(samples)


@contextmanager
def _kernel_under(clock: _Clock) -> Iterator[None]:
    """Both ways into the kernel, by addresses and by tensors, under the clock."""
    from gut_fast import _core

    core: Any = _core
    by_address, by_tensors = core.gossip_step, core.tensor_step

    def tensor_step(*arguments: Any) -> Any:
        step = by_tensors(*arguments)
        return None if step is None else SimpleNamespace(run=clock.wrap(step.run))

    core.gossip_step, core.tensor_step = clock.wrap(by_address), tensor_step
    try:
        yield
    finally:
        core.gossip_step, core.tensor_step = by_address, by_tensors
