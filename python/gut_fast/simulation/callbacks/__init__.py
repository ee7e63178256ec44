"""Callbacks: objects that are told of the events of a run, for early stopping, trackers and code of one's own.

A callback is an object with methods for the events of `Callback`; `gut_fast.Simulator.run` takes any number of them::

    simulator.run(500, eval_every=50, callbacks=[gf.callbacks.TensorBoard("runs/a"), gf.callbacks.CSV("a.csv")])
"""

from __future__ import annotations

from gut_fast.simulation.callbacks.events import AfterCheckpoint, Callback, around, checked
from gut_fast.simulation.callbacks.progress import Progress, ShowProgress
from gut_fast.simulation.callbacks.stopping import EarlyStopping
from gut_fast.simulation.callbacks.trackers import CSV, MLflow, TensorBoard, Tracker, WandB

__all__ = [
    "CSV",
    "AfterCheckpoint",
    "Callback",
    "EarlyStopping",
    "MLflow",
    "Progress",
    "ShowProgress",
    "TensorBoard",
    "Tracker",
    "WandB",
    "around",
    "checked",
]
