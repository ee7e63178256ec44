"""What is timed: a table of named cases, each a rule on a topology with parameters of given shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gut_fast.kernels.backends import HALVES
from gut_fast.models import lenet5
from gut_fast.rules import UpdateRule, get_rule
from gut_fast.topology import Topology
from gut_fast.topology.names import parse_topology

__all__ = ["CASES", "DTYPES", "GROUPS", "SHAPES", "Case", "resnet20_shapes"]

Shapes = tuple[tuple[int, ...], ...]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

STEP_SIZE = {"lr": 0.05}
MU = {"mu": 0.3}
"""Stable on every topology of the table; the torus ends at 1/3."""


def resnet20_shapes(num_classes: int = 10, width: int = 16) -> Shapes:
    """Parameter shapes of ResNet-20 for CIFAR with 1 × 1 shortcuts: 65 tensors, 272,474 numbers for 10 classes.

    Of twice or four times the width, with 32 or 64 channels in its first layers: 1,084,586 or 4,327,754.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def convolution(inputs: int, outputs: int, size: int) -> Shapes:
        """The filters, and scale and shift of the normalisation after them."""
        return ((outputs, inputs, size, size), (outputs,), (outputs,))

    shapes = convolution(3, width, 3)
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(3):
            shapes += convolution(inputs, outputs, 3) + convolution(outputs, outputs, 3)
            shapes += convolution(inputs, outputs, 1) if inputs != outputs else ()
            inputs = outputs
    return (*shapes, (num_classes, inputs), (num_classes,))


def _lenet5_shapes() -> Shapes:
    with torch.device("meta"):
        return tuple(tuple(parameter.shape) for parameter in lenet5().parameters())


SHAPES: dict[str, Shapes] = {
    "resnet20": resnet20_shapes(),
    "lenet5": _lenet5_shapes(),
    "resnet20-wide": resnet20_shapes(width=32),
    "resnet20-wider": resnet20_shapes(width=64),
}
"""Models by name: the shapes of their parameters are all that a step sees of them."""

RESNET20 = sum(map(math.prod, SHAPES["resnet20"]))
LENET5 = sum(map(math.prod, SHAPES["lenet5"]))


@dataclass(frozen=True)
class Case:
    """One step to be timed.

    Args:
        name: in the table, on the command line and in results.
        rule: name of the update rule.
        topology: as on the command line, for example ``"ring:16"``.
        shapes: one agent's parameter tensors; a single ``(D,)`` is the whole model as one flat row.
        hyperparameters: ``lr`` and those of the rule that are not to be at their defaults.
        dtype: of parameters and gradients, a name out of `DTYPES`.
        state_dtype: of the state; None is `dtype`.
        backend: of the optimizer that is timed.
        goals: the fraction of the ceiling's speed that the step is to reach, by number of threads.
        gpu_goal: the same on a GPU.
    """

    name: str
    rule: str
    topology: str
    shapes: Shapes
    hyperparameters: Mapping[str, Any] = field(default_factory=lambda: STEP_SIZE | MU)
    dtype: str = "float32"
    state_dtype: str | None = None
    backend: str = "auto"
    goals: Mapping[int, float] = field(default_factory=dict)
    gpu_goal: float | None = None

    def __post_init__(self) -> None:
        for dtype in filter(None, (self.dtype, self.state_dtype)):
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not self.shapes or not all(math.prod(shape) > 0 for shape in self.shapes):
            raise ValueError(f"{self.name}: expected shapes of at least one number each, got {self.shapes}")
        get_rule(self.rule).coefficients(**self.hyperparameters)

    def make_rule(self) -> UpdateRule:
        """The update rule."""
        return get_rule(self.rule)

    def make_topology(self) -> Topology:
        """The topology."""
        return parse_topology(self.topology)

    @property
    def columns(self) -> int:
        """D, the parameters of one agent."""
        return sum(map(math.prod, self.shapes))

    @property
    def storage(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of parameters and of state."""
        return DTYPES[self.dtype], DTYPES[self.state_dtype or self.dtype]

    @property
    def stores_halves(self) -> bool:
        """Whether anything is stored in bfloat16 or float16."""
        return not set(HALVES).isdisjoint(self.storage)

    @property
    def bytes_held(self) -> int:
        """Of parameters, gradients and states of one agent."""
        parameter, state = (dtype.itemsize for dtype in self.storage)
        return self.columns * (2 * parameter + len(self.make_rule().states) * state)

    def bytes_per_step(self, num_agents: int) -> int:
        """What a step has to move at least: reads z, every state and g, writes z and every state."""
        parameter, state = (dtype.itemsize for dtype in self.storage)
        return num_agents * self.columns * (3 * parameter + 2 * len(self.make_rule().states) * state)

    @property
    def storage_name(self) -> str:
        """For example ``"float32, state bfloat16"``."""
        same = self.state_dtype in (None, self.dtype)
        return self.dtype if same else f"{self.dtype}, state {self.state_dtype}"


def _flat(columns: int) -> Shapes:
    return ((columns,),)


def _gut(name: str, topology: str, shapes: Shapes, *goals: float, **options: Any) -> Case:
    return Case(name, "gut", topology, shapes, goals=dict(enumerate(goals, start=1)), **options)


def _slower(times: float) -> tuple[float, float]:
    """Goals for a step that may take `times` as long as the ceiling."""
    return 1 / times, 1 / times


TABLE = (
    _gut("ring-16", "ring:16", _flat(RESNET20), 0.88, 0.92),
    _gut("ring-16-segments", "ring:16", SHAPES["resnet20"], 0.85, 0.88),
    _gut("torus-32", "torus:4x8", _flat(RESNET20), 0.85, 0.90),
    _gut("torus-32-segments", "torus:4x8", SHAPES["resnet20"]),
    _gut("petersen", "petersen", _flat(RESNET20), 0.85, 0.90),
    _gut("complete-16", "complete:16", _flat(RESNET20), 0.80, 0.80),
    _gut("ring-16-lenet5", "ring:16", _flat(LENET5), 0.75, 0.65),
    _gut("ring-64-lenet5", "ring:64", _flat(LENET5), 0.75, 0.75),
    Case("qg-gutm", "qg_gutm", "ring:16", _flat(RESNET20), STEP_SIZE, goals={1: 0.85, 2: 0.88}),
    Case("gradient-tracking", "gradient_tracking", "ring:16", _flat(RESNET20), STEP_SIZE, goals={1: 0.80, 2: 0.85}),
    Case("dsgd", "dsgd", "ring:16", _flat(RESNET20), STEP_SIZE),
)

LARGE = (
    _gut("ring-256", "ring:256", _flat(LENET5), *_slower(1.3)),
    _gut("ring-1024", "ring:1024", _flat(LENET5), *_slower(1.4)),
    _gut("regular-1024", "random-regular:1024:4:0", _flat(LENET5), *_slower(2.0)),
    _gut("regular-4096", "random-regular:4096:4:0", _flat(30_000), *_slower(3.5)),
)

STORAGE = (
    _gut("bf16-state", "ring:16", _flat(RESNET20), state_dtype="bfloat16"),
    _gut("bf16", "ring:16", _flat(RESNET20), dtype="bfloat16"),
    _gut("bf16-parameters", "ring:16", _flat(RESNET20), dtype="bfloat16", state_dtype="float32"),
)


def _gpu(name: str, topology: str, model: str, gpu_goal: float | None = None, **options: Any) -> Case:
    return _gut(f"gpu-{name}", topology, SHAPES[model], gpu_goal=gpu_goal, **options)


GPU = (
    _gpu("ring-16", "ring:16", "resnet20", 0.90),
    _gpu("ring-16-1m", "ring:16", "resnet20-wide", 0.90),
    _gpu("ring-16-4m", "ring:16", "resnet20-wider", 0.90),
    _gpu("ring-64", "ring:64", "resnet20", 0.90),
    _gpu("torus-64", "torus:8x8", "resnet20", 0.90),
    _gpu("ring-256", "ring:256", "lenet5", 0.85),
    _gpu("complete-16", "complete:16", "resnet20-wide", 0.85),
    _gpu("complete-64", "complete:64", "resnet20", 0.85),
    _gpu("ring-1024", "ring:1024", "lenet5", 0.75),
    _gpu("regular-1024", "random-regular:1024:4:0", "lenet5", 0.60),
    _gpu("bf16", "ring:16", "resnet20-wide", dtype="bfloat16"),
    _gpu("f16", "ring:16", "resnet20-wide", dtype="float16"),
    _gpu("bf16-state", "ring:16", "resnet20-wide", state_dtype="bfloat16"),
    Case("gpu-qg-gutm", "qg_gutm", "ring:16", SHAPES["resnet20-wide"], STEP_SIZE),
    Case("gpu-gradient-tracking", "gradient_tracking", "ring:16", SHAPES["resnet20-wide"], STEP_SIZE),
)
"""Large enough that nothing stays in a GPU's cache; where the model is small, sets of its buffers take turns."""

GROUPS: dict[str, Sequence[Case]] = {
    "table": TABLE,
    "large": LARGE,
    "storage": STORAGE,
    "all": (*TABLE, *LARGE, *STORAGE),
    "gpu": GPU,
}
"""Cases that go by one name: the everyday ones, those of many agents, those stored in bfloat16, all of these, and those
for a GPU."""

CASES: dict[str, Case] = {case.name: case for group in ("all", "gpu") for case in GROUPS[group]}
"""All cases by name."""
