"""Experiments from plain settings to finished runs: the command line and the demo are made of this."""

from __future__ import annotations

from gut_fast.requirements import what_is_missing

if missing := what_is_missing(["rich"]):  # every module here prints with it
    raise ModuleNotFoundError(f"gut_fast.study: {missing}", name="rich")

from gut_fast.study.experiment import Experiment
from gut_fast.study.run import Run, make_simulator, train
from gut_fast.topology.names import TOPOLOGIES, parse_topology

__all__ = ["TOPOLOGIES", "Experiment", "Run", "make_simulator", "parse_topology", "train"]
