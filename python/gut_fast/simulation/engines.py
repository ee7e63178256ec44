"""Gradient engines: the losses and gradients of all agents, each on its own batch.

An engine is called with the batches of all agents, tensors [N, B, ...], leaves the gradients in ``.grad`` of the
stacked parameters and returns the losses [N]. There are two ways to go through the agents, one after the other
(`LoopEngine`) or all at once (`VmapEngine`), and three ways to make either faster: on a CPU `WorkersEngine` puts one
agent on each core; on a GPU, where Python launches the kernels of small networks more slowly than they run,
`GraphedEngine` records them once and launches them together, with the kernels of several agents side by side by
`StreamsEngine`; and a compiler makes fewer and larger kernels. `ENGINES` lists the combinations, `AutoEngine` measures.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gut_fast.agents import StackedModule
from gut_fast.arguments import all_known
from gut_fast.simulation.cuda_graphs import GraphedEngine, StreamsEngine
from gut_fast.simulation.gradients import Engine, LoopEngine, VmapEngine, undo_on_error
from gut_fast.simulation.objective import Objective
from gut_fast.simulation.workers import WorkersEngine

__all__ = [
    "CHOICES",
    "ENGINES",
    "AutoEngine",
    "Engine",
    "GraphedEngine",
    "LoopEngine",
    "StreamsEngine",
    "VmapEngine",
    "WorkersEngine",
    "make_engine",
    "undo_on_error",
]

CHOICES = {"cpu": ("loop", "vmap", "workers"), "cuda": ("loop", "vmap", "graphed-loop", "graphed-vmap")}
"""The engines that `AutoEngine` chooses from, by type of device; none compiles, which takes longer than many a run."""


class AutoEngine:
    """An engine that takes others in turns for the first steps, then keeps the one with the smallest median time.

    It chooses among `CHOICES`, without workers if `torch.get_num_threads()` is 1. The first turn of each engine, with
    its warm-up and capture, is not counted. An engine that fails is left out, with one warning.
    """

    turns = 5
    """The number of measured steps of each engine, after one that is not counted."""

    def __init__(self, stacked: StackedModule, objective: Objective) -> None:
        self._stacked = stacked
        self._make = partial(make_engine, stacked=stacked, objective=objective)
        self._engines: dict[str, Engine] = {}
        self._choices = CHOICES.get(stacked.device.type, ("loop", "vmap"))
        has_threads = torch.get_num_threads() > 1
        self._seconds: dict[str, list[float]] = {name: [] for name in self._choices if has_threads or name != "workers"}
        self.chosen: str | None = None

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does."""
        if self.chosen is not None:
            return self._engine(self.chosen)(batch)
        name = min(self._seconds, key=lambda name: len(self._seconds[name]))
        start = self._now()
        losses = self._engine(name)(batch) if name == "loop" else self._try(name, batch)
        if name in self._seconds:
            self._seconds[name].append(self._now() - start)
        if len(self._seconds) == 1:
            self._choose(next(iter(self._seconds)))
        elif all(len(seconds) > self.turns for seconds in self._seconds.values()):
            self._choose(min(self._seconds, key=lambda name: statistics.median(self._seconds[name][1:])))
        return losses

    @property
    def name(self) -> str:
        """The name of the chosen engine; ``"auto"`` until there is one."""
        return self.chosen or "auto"

    def state_dict(self) -> dict[str, Any]:
        """The choice, or the times measured so far."""
        return {"chosen": self.chosen, "seconds": {name: list(seconds) for name, seconds in self._seconds.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another run, so that the same engine does the same steps."""
        self.chosen = state["chosen"] if state["chosen"] in self._choices else None
        self._seconds = {name: list(seconds) for name, seconds in state["seconds"].items() if name in self._choices}

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = self._make(name)
        return self._engines[name]

    def _choose(self, name: str) -> None:
        self.chosen = name
        self._engines = {name: self._engine(name)}  # drops the memory of the other engines' graphs

    def _try(self, name: str, batch: Any) -> Tensor:
        try:
            with undo_on_error(self._stacked):
                return self._engine(name)(batch)
        except Exception as error:
            # The type of an error of vmap depends on the operation.
            reason = str(error).strip().split("\n")[0]
        # Outside the handler the failed attempt's memory is free again. The loop repeats an error of the model itself.
        losses = self._engine("loop")(batch)
        # Engines built upon the failed one would fail in the same way.
        self._seconds = {other: times for other, times in self._seconds.items() if not other.endswith(name)}
        warnings.warn(f"engine {name!r} is left out: it failed with {reason!r}", stacklevel=2)
        return losses

    def _now(self) -> float:
        if self._stacked.device.type == "cuda":
            torch.cuda.synchronize(self._stacked.device)
        return time.perf_counter()


Factory = Callable[[StackedModule, Objective], Engine]
"""Makes an engine from the agents and the loss of one of them."""


def _graphed(factory: Factory) -> Factory:
    def make(stacked: StackedModule, objective: Objective) -> GraphedEngine:
        if stacked.device.type != "cuda":
            raise ValueError(
                f"a graphed engine is for CUDA devices, the model is on {stacked.device}; use 'loop', 'vmap' or 'auto'"
            )
        return GraphedEngine(factory(stacked, objective), stacked)

    return make


_compiler = partial(torch.compile, dynamic=False)

ENGINES: dict[str, Factory] = {
    "auto": AutoEngine,
    "loop": LoopEngine,
    "vmap": VmapEngine,
    "workers": WorkersEngine,
    "compiled-loop": partial(LoopEngine, compiler=_compiler),
    "compiled-vmap": partial(VmapEngine, compiler=_compiler),
    "graphed-loop": _graphed(StreamsEngine),
    "graphed-vmap": _graphed(VmapEngine),
    "graphed-compiled-loop": _graphed(partial(StreamsEngine, compiler=_compiler)),
    "graphed-compiled-vmap": _graphed(partial(VmapEngine, compiler=_compiler)),
}
"""All engines by name."""


def make_engine(name: str, stacked: StackedModule, objective: Objective) -> Engine:
    """The engine called `name`.

    Args:
        name: a name in `ENGINES`.
        stacked: the agents' models.
        objective: the loss of one agent.

    Raises:
        ValueError: the name is unknown, or the engine is not for the model's device.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; {all_known(name, ENGINES)}")
    return ENGINES[name](stacked, objective)
