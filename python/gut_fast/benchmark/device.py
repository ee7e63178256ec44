"""Where steps are computed, and what is particular about taking times there.

A call on a GPU returns when its work is queued. So there are two times: what a training loop sees, and what the GPU
itself is busy with. On a CPU they are one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch

from gut_fast.kernels import machine
from gut_fast.simulation.cuda_graphs import capture_cuda_graph

__all__ = ["CPU", "DEVICES", "Clock", "Device", "EventClock", "Gpu", "WallClock", "find_device"]

Step = Callable[[], object]

COPY_BYTES = 2**30
"""Of each of the two buffers of the copy that a GPU's steps are measured by: many times any L2."""

CACHES = 4
"""What is timed on a GPU works on so many times its L2, so that nothing is read from there."""

MEMORY_SHARE = 0.5
"""The part of the memory that the contenders of one case may fill together."""


class Clock(Protocol):
    """A way to take times.

    Attributes:
        min_seconds: shorter steps are timed several at a time.
    """

    min_seconds: float

    def time(self, step: Step, repeats: int) -> float:
        """Seconds of a step: the mean of so many, one after the other."""


class WallClock:
    """What the caller waits for: so many steps one after the other, and once, at the end, for what is still queued."""

    def __init__(self, min_seconds: float, synchronize: Callable[[], object] = lambda: None) -> None:
        self.min_seconds, self._synchronize = min_seconds, synchronize

    def time(self, step: Step, repeats: int) -> float:
        """As `Clock`."""
        self._synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            step()
        self._synchronize()
        return (time.perf_counter_ns() - start) / repeats * 1e-9


class EventClock:
    """What a CUDA device is busy with: events around steps that are queued while it is kept asleep.

    So it never waits for Python between two of them, as long as the queue holds them all (about a thousand kernels): of
    a step of hundreds of kernels the time is that of launching them.
    """

    min_seconds = 2e-3
    max_repeats = 50
    min_cycles, max_cycles = 2**20, 2**27
    """Of sleep: half a millisecond, and 70."""

    cycles_a_second = 3e9
    """Half as many again as any such device makes, so that it oversleeps."""

    def __init__(self) -> None:
        self._cycles = self.min_cycles

    def time(self, step: Step, repeats: int) -> float:
        """As `Clock`."""
        repeats = min(repeats, self.max_repeats)
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cycles, start = self._cycles, time.perf_counter()
            torch.cuda._sleep(cycles)
            begin.record()
            for _ in range(repeats):
                step()
            end.record()
            has_begun_early = begin.query()
            queueing = time.perf_counter() - start
            end.synchronize()
            self._cycles = min(max(round(queueing * self.cycles_a_second), self.min_cycles), self.max_cycles)
            if not has_begun_early or cycles >= self._cycles:
                milliseconds: float = begin.elapsed_time(end)
                return 1e-3 * milliseconds / repeats


class Device:
    """The CPU, and what other devices have in common with it.

    Attributes:
        name: as on the command line.
        torch_device: of tensors.
        is_gpu: whether calls return before their work is done.
        wall: the clock of whoever calls.
        busy: the clock of the device alone; None where that is the same.
        cache_bytes: what is worked on in turns should be larger than this; 0 where each step is timed as a whole loop
            would see it, cache and all.
        copy_bytes: of each buffer of the copy that steps are measured by, where there is one.
    """

    name = "cpu"
    torch_device = torch.device("cpu")
    is_gpu = False
    wall: Clock = WallClock(50e-6)
    busy: Clock | None = None
    cache_bytes = 0
    copy_bytes = 0

    def synchronize(self) -> None:
        """Waits for everything that is queued."""

    def room(self) -> float:
        """Bytes that the contenders of a case may fill."""
        return MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def machine_line(self) -> str:
        """What it is, in a line that begins with the processor that computes."""
        return machine.machine_line()

    def versions(self) -> dict[str, str]:
        """Of what is particular to it."""
        return {}

    def captured(self, step: Step) -> Step | None:
        """What repeats the step with one launch, by a CUDA graph; None where there are none."""
        return None

    def exact_float32(self) -> contextlib.AbstractContextManager[Any]:
        """Where products of float32 are computed in float32 and nothing less."""
        return contextlib.nullcontext()


class Gpu(Device):
    """The current CUDA device."""

    name = "cuda"
    is_gpu = True
    copy_bytes = COPY_BYTES

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.wall = WallClock(EventClock.min_seconds, self.synchronize)
        self.busy = EventClock()
        self.cache_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size

    def synchronize(self) -> None:
        """Waits for all streams."""
        torch.cuda.synchronize(self.torch_device)

    def room(self) -> float:
        """Of what is free or already ours."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        ours = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return MEMORY_SHARE * (free + ours)

    def machine_line(self) -> str:
        """The GPU before its host."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        memory, cache = properties.total_memory / 2**30, self.cache_bytes / 2**20
        size = f"{memory:.0f} GiB, L2 {cache:.0f} MiB, {properties.multi_processor_count} multiprocessors"
        return f"{properties.name}, {size}; {machine.machine_line()}"

    def versions(self) -> dict[str, str]:
        """CUDA, its driver and Triton."""
        found = {
            "cuda": torch.version.cuda,
            "driver": nvidia_smi("driver_version"),
            "triton": machine.installed_version("triton"),
        }
        return {name: version for name, version in found.items() if version}

    def captured(self, step: Step) -> Step | None:
        """As `Device`. The step is called a few times before it is captured."""
        result = torch.empty(0, device=self.torch_device)

        def function() -> torch.Tensor:
            step()
            return result

        _, replay = capture_cuda_graph(self.torch_device, function)
        return replay

    @contextlib.contextmanager
    def exact_float32(self) -> Iterator[None]:
        """Convolutions without TF32, which PyTorch allows them."""
        before = _allow_tf32(False)
        try:
            yield
        finally:
            _allow_tf32(before)


def _allow_tf32(value: bool) -> bool:
    """Sets whether convolutions may use TF32; returns what it was. Some versions of torch call it by a newer name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before: bool = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = value
    return before


@lru_cache
def nvidia_smi(*fields: str) -> str | None:
    """What the driver's tool says of the first GPU, or None where it is not installed or says nothing.

    It is asked once: an answer may take seconds.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() or None


CPU = Device()
DEVICES: dict[str, Callable[[], Device]] = {"cpu": lambda: CPU, "cuda": Gpu}
"""Devices by name."""


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: an unknown name.
        RuntimeError: PyTorch sees no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device 'cuda': PyTorch {torch.__version__} sees no GPU here; use 'cpu'")
    return DEVICES[name]()
