"""The cases whose steps are timed: a rule on a topology, with parameters of given shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from gut_fast import models
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.names import parse_topology

__all__ = ["CASES", "DTYPES", "GROUPS", "IMAGES", "NUM_CLASSES", "Case", "image_shape"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NUM_CLASSES = 10
IMAGES = {"mlp": (1, 8, 8), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}
"""The shapes of the images that the usual networks take: digits, Fashion-MNIST's and CIFAR's."""


def image_shape(model: str) -> tuple[int, ...]:
    """The shape of the images that a network of `gut_fast.models` takes in a benchmark."""
    return IMAGES.get(model.partition(":")[0], IMAGES["resnet20"])


@lru_cache
def _shapes(model: str) -> tuple[tuple[int, ...], ...]:
    with torch.random.fork_rng(devices=[]):  # the meta device would load the compiler
        module = models.build(model, image_shape(model), NUM_CLASSES)
    return tuple(tuple(parameter.shape) for parameter in module.parameters())


RESNET20, LENET5 = 272_474, 61_706
"""How many parameters the two networks have."""


@dataclass(frozen=True)
class Case:
    """One step to be timed.

    Args:
        name: the name in tables, on the command line and in results.
        rule: the name of the update rule.
        topology: a topology as on the command line, for example ``"ring:16"``.
        parameters: the parameters of one agent: so many numbers as one flat row, or the tensors of this network, as
            `gut_fast.models.build` takes it.
        dtype: the dtype of parameters and gradients, a name from `DTYPES`.
        state_dtype: the dtype of the state; None is `dtype`.
        backend: the optimizer's backend.

    Raises:
        ValueError: an unknown rule, topology, network, dtype or backend.
    """

    name: str
    rule: str = "gut"
    topology: str = "ring:16"
    parameters: int | str = RESNET20
    dtype: str = "float32"
    state_dtype: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for dtype in filter(None, (self.dtype, self.state_dtype)):
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if self.columns < 1:
            raise ValueError(f"{self.name}: expected at least one parameter, got {self.parameters}")
        self.make_rule().coefficients(**self.hyperparameters)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The learning rate, and for GUT a μ that is stable on every topology of the table; the torus ends at 1/3."""
        return {"lr": 0.05, "mu": 0.3} if self.rule == "gut" else {"lr": 0.05}

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one agent's parameter tensors."""
        return _shapes(self.parameters) if isinstance(self.parameters, str) else ((self.parameters,),)

    @property
    def columns(self) -> int:
        """D, the number of parameters of one agent."""
        return sum(map(math.prod, self.shapes))

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of parameters and of state."""
        return DTYPES[self.dtype], DTYPES[self.state_dtype or self.dtype]

    def make_rule(self) -> UpdateRule:
        """The update rule."""
        return get_rule(self.rule)

    def make_topology(self) -> Topology:
        """The topology."""
        return parse_topology(self.topology)

    def bytes_per_step(self, num_agents: int) -> int:
        """The bytes that a step must move: it reads z, every state and g, and writes z and every state."""
        parameter, state = (dtype.itemsize for dtype in self.dtypes)
        return num_agents * self.columns * (3 * parameter + 2 * len(self.make_rule().states) * state)


GROUPS: dict[str, Sequence[Case]] = {
    "table": (
        Case("ring-16"),
        Case("ring-16-segments", parameters="resnet20"),
        Case("torus-32", topology="torus:4x8"),
        Case("torus-32-segments", topology="torus:4x8", parameters="resnet20"),
        Case("petersen", topology="petersen"),
        Case("complete-16", topology="complete:16"),
        Case("ring-16-lenet5", parameters=LENET5),
        Case("ring-64-lenet5", topology="ring:64", parameters=LENET5),
        Case("qg-gutm", "qg_gutm"),
        Case("gradient-tracking", "gradient_tracking"),
        Case("dsgd", "dsgd"),
    ),
    "large": (
        Case("ring-256", topology="ring:256", parameters=LENET5),
        Case("ring-1024", topology="ring:1024", parameters=LENET5),
        Case("regular-1024", topology="random-regular:1024:4:0", parameters=LENET5),
        Case("regular-4096", topology="random-regular:4096:4:0", parameters=30_000),
    ),
    "storage": (
        Case("bf16-state", state_dtype="bfloat16"),
        Case("bf16", dtype="bfloat16"),
        Case("bf16-parameters", dtype="bfloat16", state_dtype="float32"),
    ),
}
"""The everyday cases, those of many agents, and those stored in half precision."""

CASES: dict[str, Case] = {case.name: case for cases in GROUPS.values() for case in cases}
"""All cases by name."""
