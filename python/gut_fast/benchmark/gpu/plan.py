"""What is measured on a device; on a CPU a small stand-in for each part, to see that all of them work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gut_fast.benchmark.cases import CASES, GROUPS, MU, SHAPES, STEP_SIZE, Case
from gut_fast.benchmark.device import Device
from gut_fast.benchmark.peers import FAMILIES
from gut_fast.rules import RULES

__all__ = ["BESIDE", "PARTS", "Plan", "plan_for"]

PARTS = {
    "environment": 15.0,
    "verify": 80.0,
    "determinism": 30.0,
    "steps": 140.0,
    "peers": 130.0,
    "training": 115.0,
    "ncu": 30.0,
}
"""Parts in their order, and the seconds that each may take out of `TOTAL`."""

BESIDE = ("ceiling", "copy", "gut_fast", "backend", "kernel", "graph", "sgd")
"""Families in every case; the others, most of which have to be compiled, in some."""


@dataclass(frozen=True)
class Plan:
    """What the parts do.

    Attributes:
        rules: those to verify, as far as the time reaches.
        columns: of the segments in which determinism is looked for.
        cases, peer_cases: timed beside `BESIDE`, and beside `peers`.
        peers: families.
        models, agents: each trained with each number of agents.
        batch_size: samples per agent.
        seconds: for each case, at most.
        profiled: the case whose kernel is looked into.
        threads: of the CPU.
    """

    rules: Sequence[str]
    columns: tuple[int, ...]
    cases: Sequence[Case]
    peer_cases: Sequence[Case]
    peers: Sequence[str]
    models: Sequence[str]
    agents: Sequence[int]
    batch_size: int
    seconds: float
    profiled: Case
    threads: int


def plan_for(device: Device) -> Plan:
    """The whole plan for a GPU, a small one for a CPU."""
    if device.is_gpu:
        peer_cases = [CASES[f"gpu-{name}"] for name in ("ring-16-1m", "torus-64", "ring-16", "complete-16")]
        return Plan(
            rules=list(RULES),
            columns=tuple(map(math.prod, SHAPES["resnet20"])),
            cases=GROUPS["gpu"],
            peer_cases=peer_cases,
            peers=list(FAMILIES),
            models=("lenet5", "mlp", "resnet20"),
            agents=(16, 64),
            batch_size=32,
            seconds=5.0,
            profiled=CASES["gpu-ring-16-1m"],
            threads=torch.get_num_threads(),
        )
    small = [
        Case(f"dry-{rule}", rule, "ring:5", ((7,), (3, 2)), STEP_SIZE | (MU if rule == "gut" else {}), gpu_goal=0.9)
        for rule in ("gut", "dsgd")
    ]
    return Plan(
        rules=("dsgd",),
        columns=(5, 3),
        cases=small,
        peer_cases=small[:1],
        peers=("ceiling", "sgd", "eager"),
        models=("mlp",),
        agents=(3,),
        batch_size=2,
        seconds=0.0,
        profiled=small[0],
        threads=1,
    )
