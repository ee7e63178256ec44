"""Experiments from plain settings to finished runs: the command line and the demo are made of this."""

from __future__ import annotations

from gut_fast.study.experiment import Experiment
from gut_fast.study.run import Run, make_simulator, train
from gut_fast.topology.names import TOPOLOGIES, parse_topology

__all__ = ["TOPOLOGIES", "Experiment", "Run", "make_simulator", "parse_topology", "train"]
