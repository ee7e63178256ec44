"""Engines for a GPU: agents on several streams, and all kernels of a gradient recorded once in a CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from gut_fast.agents import StackedModule
from gut_fast.simulation.gradients import Compiler, Engine, LoopEngine, remember
from gut_fast.simulation.objective import Objective

__all__ = ["Capture", "GraphedEngine", "StreamsEngine", "capture_cuda_graph"]

WARM_UPS = 3
"""The number of calls before a capture, in which libraries choose their kernels and allocate workspaces."""

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records a function without arguments; returns its result and a function that repeats the recorded kernels."""


class StreamsEngine(LoopEngine):
    """The loop over agents with the agents dealt out to CUDA streams, so that small kernels run side by side.

    Gradients and random numbers are those of `LoopEngine` bit for bit, since random numbers are counted in the order of
    the launches. This engine is meant for `GraphedEngine`: while Python launches every kernel, one stream is hardly
    full.
    """

    max_streams = 4

    def __init__(self, stacked: StackedModule, objective: Objective, *, compiler: Compiler | None = None) -> None:
        super().__init__(stacked, objective, compiler=compiler)
        num_streams = min(self.max_streams, stacked.num_agents)
        self._streams = [torch.cuda.Stream(stacked.device) for _ in range(num_streams)]

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does, on several streams."""
        self._prepare()
        here = torch.cuda.current_stream(self._stacked.device)
        for stream in self._streams:
            stream.wait_stream(here)
        losses = []
        try:
            for i in range(self._stacked.num_agents):
                with torch.cuda.stream(self._streams[i % len(self._streams)]):
                    losses.append(self._gradient(i, batch))
        finally:  # after an error too, or its effects would be undone while streams still write
            for stream in self._streams:
                here.wait_stream(stream)
        return torch.stack(losses)


@dataclass
class _Recording:
    """A captured gradient: the layout of its batches, the memory that it reads and writes, and its replay."""

    layout: tuple[Any, ...]
    batch: Any
    losses: Tensor
    gradients: list[Tensor | None]
    replay: Callable[[], None]


class GraphedEngine:
    """Another engine's kernels, recorded at the first call and from then on launched all at once.

    It serves networks whose kernels take less time than launching them from Python does. Batches are copied into memory
    that belongs to the recording; a batch of another shape, or a parameter that is frozen or trained anew, makes a new
    recording. Buffers, dropout and autocasting are part of the recording. Python code of the module and the loss that
    launches no kernels runs while recording only, and must not wait for the GPU, as `Tensor.item` does.

    Args:
        engine: the engine to record; nothing else may call it.
        stacked: the agents' models, whose parameters and buffers stay where they are.
        capture: records a function; the default is `capture_cuda_graph`.

    Raises:
        RuntimeError: at the first call, the module or the loss waits for the GPU; random state, buffers and gradients
            may have changed, as after any engine's error.
    """

    def __init__(self, engine: Engine, stacked: StackedModule, capture: Capture | None = None) -> None:
        self._engine = engine
        self._stacked = stacked
        self._capture = partial(capture_cuda_graph, stacked.device) if capture is None else capture
        self._recording: _Recording | None = None

    @property
    def name(self) -> str:
        """The engine's name in `ENGINES`."""
        return f"graphed-{self._engine.name}"

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does, in the same memory at every call."""
        layout = self._layout(batch)
        if self._recording is None or self._recording.layout != layout:
            self._recording = None  # frees the old memory before new memory is needed
            self._recording = self._record(batch, layout)
        recording = self._recording
        for memory, tensor in zip(tree_leaves(recording.batch), tree_leaves(batch), strict=True):
            memory.copy_(tensor)
        recording.replay()
        for parameter, gradient in zip(self._stacked.parameters(), recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.losses.clone()

    def _record(self, batch: Any, layout: tuple[Any, ...]) -> _Recording:
        """Records the gradient and puts buffers and random state back; the first replay is still to come."""
        memory = tree_map(torch.clone, batch)
        undo = remember(self._stacked)
        losses, replay = self._capture(lambda: self._engine(memory))
        undo()
        gradients = [parameter.grad for parameter in self._stacked.parameters()]
        return _Recording(layout, memory, losses, gradients, replay)

    def _layout(self, batch: Any) -> tuple[Any, ...]:
        """The structure and tensors of the batch, and which parameters are trained: what a recording depends on."""
        leaves, structure = tree_flatten(batch)
        trained = tuple(parameter.requires_grad for parameter in self._stacked.parameters())
        tensors = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in leaves)
        return structure, tensors, trained


def capture_cuda_graph(device: torch.device, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A `Capture` on a CUDA device; the function is called a few times before it is recorded.

    Raises:
        RuntimeError: the function waits for the GPU. A call before the capture finds this out, because a capture that
            fails leaves torch's random generator and allocator unusable.
    """
    with torch.cuda.device(device):
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS - 1):
                    function()
                with _synchronisation_is_an_error():
                    function()
        finally:
            here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                result = function()
        finally:
            torch.cuda.set_stream(here)  # a capture that fails does not do this
    return result, graph.replay


@contextlib.contextmanager
def _synchronisation_is_an_error() -> Iterator[None]:
    """A context in which operations that torch knows to wait for the GPU raise RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
