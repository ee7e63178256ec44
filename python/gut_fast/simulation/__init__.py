"""Many agents in one process: stacked models, gradient engines, the simulator and its metrics."""

from __future__ import annotations

from gut_fast.agents import StackedModule, stack
from gut_fast.simulation import callbacks
from gut_fast.simulation.files import write_csv, write_json_lines
from gut_fast.simulation.memory import keep_freed_memory
from gut_fast.simulation.metrics import consensus_error
from gut_fast.simulation.simulator import Simulator

__all__ = [
    "Simulator",
    "StackedModule",
    "callbacks",
    "consensus_error",
    "keep_freed_memory",
    "stack",
    "write_csv",
    "write_json_lines",
]
