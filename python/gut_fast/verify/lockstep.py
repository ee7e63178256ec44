"""Steps of the op beside steps of the reference, on the same problem: the comparison that every kernel must pass.

A `Problem` is solved three times: by `gut_fast.reference` in float64 (the truth), by the same plain PyTorch in the
precision under test (what that precision costs), and by the op on some backend (`OpRun`). `excess_error` is the op's
error in units of what plain PyTorch loses; a right kernel stays below `LIMIT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gut_fast import reference
from gut_fast.kernels import ops
from gut_fast.kernels.backends import arithmetic
from gut_fast.kernels.buffers import segment_views
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology

__all__ = [
    "EXACT",
    "LIMIT",
    "PRECISIONS",
    "ROUNDINGS",
    "OpRun",
    "Precision",
    "Problem",
    "compare",
    "excess_error",
    "same_bits",
    "seeded",
]

LIMIT = 2.0
"""The largest `excess_error` of a right kernel: its sums may run in another order than plain PyTorch's."""

ROUNDINGS = {torch.float64: 32, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
"""The smallest unit of error, in roundings of the largest entry; in float64 it is the unit: there is no truth above."""

GUARD = 7.5
GUARD_LENGTH = 64


class Precision(NamedTuple):
    """The dtypes in which parameters and state are stored; half-width numbers are computed with in float32."""

    dtype: torch.dtype
    state_dtype: torch.dtype

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of sums and products."""
        return arithmetic(self.dtype)

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(self)]
        return "/".join(names)


EXACT = Precision(torch.float64, torch.float64)

PRECISIONS: dict[str, Precision] = {
    str(precision): precision
    for precision in (
        Precision(torch.float32, torch.float32),
        EXACT,
        Precision(torch.float32, torch.bfloat16),
        Precision(torch.bfloat16, torch.bfloat16),
        Precision(torch.bfloat16, torch.float32),
        Precision(torch.float32, torch.float16),
        Precision(torch.float16, torch.float16),
        Precision(torch.float16, torch.float32),
    )
}
"""All precisions that a kernel may serve, by name: the parameters' dtype, and after a slash the state's."""


@dataclass
class Problem:
    """N agents with segments of `columns` numbers each, every agent on a quadratic of its own: g_i = h_i (z_i − b_i).

    Start, curvatures h and optima b are numbers that bfloat16 and float16 hold, so all precisions solve the same
    problem. The curvatures are a few hundredths of 1/η, so that no learning rate diverges.

    Attributes:
        hyperparameters: the rule's own, and perhaps ``weight_decay`` and ``maximize``.
        lr_factors: factors on the learning rate of step 0, 1, …; the last one holds from there on.
        grad_scale: float64 [N], or None.
        idle: indices of the segments that never get a gradient.
        settings: learning rate and hyper-parameters.
        start, curvature, optimum: float64 [N, ΣD].
    """

    rule: UpdateRule
    topology: Topology
    columns: tuple[int, ...]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    lr_factors: Sequence[float] = (1.0,)
    grad_scale: Tensor | None = None
    idle: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self.settings: dict[str, Any] = {"lr": self.lr, **self.hyperparameters}
        self._coefficients: dict[float, Tensor] = {}
        shape = (self.num_agents, sum(self.columns))
        curvature, optimum, start = (seeded(*shape, seed=3 * self.seed + k) for k in (1, 2, 3))
        self.curvature = ((curvature.abs() + 0.5) / (20 * self.lr)).bfloat16().half().double()
        self.optimum, self.start = optimum.bfloat16().half().double(), start.bfloat16().half().double()
        for index, block in enumerate(self.curvature.split(self.columns, dim=1)):
            if index in self.idle:
                block.zero_()

    @property
    def num_agents(self) -> int:
        """The number N of agents."""
        return self.topology.num_agents

    def settings_at(self, step: int) -> dict[str, Any]:
        """The learning rate and hyper-parameters of a step."""
        factor = self.lr_factors[min(step, len(self.lr_factors) - 1)]
        return {**self.settings, "lr": self.settings["lr"] * factor}

    def coefficients(self, step: int) -> Tensor:
        """The rule's coefficients at a step, as the op takes them."""
        settings = self.settings_at(step)
        if settings["lr"] not in self._coefficients:
            flat = self.rule.coefficients(**settings).flat()
            self._coefficients[settings["lr"]] = torch.tensor(flat, dtype=torch.float64)
        return self._coefficients[settings["lr"]]

    def gradient(self, z: Tensor) -> Tensor:
        """The gradients at z [N, ΣD], in z's dtype; half-width numbers are rounded once, at the end."""
        kind = arithmetic(z.dtype)
        return (self.curvature.to(kind) * (z.to(kind) - self.optimum.to(kind))).to(z.dtype)

    def run_reference(self, num_steps: int, precision: Precision = EXACT) -> list[Tensor]:
        """Returns z and every state, each [N, ΣD], after steps in plain PyTorch, rounded to `precision` when stored."""
        kind = precision.arithmetic
        z = self.start.to(precision.dtype)
        state = {name: value.to(precision.state_dtype) for name, value in reference.zero_state(self.rule, z).items()}
        for step in range(num_steps):
            new_z, new_state = reference.step(
                self.rule,
                self.settings_at(step),
                z.to(kind),
                {name: value.to(kind) for name, value in state.items()},
                self.gradient(z).to(kind),
                self.topology.matrix(step),
                grad_scale=self.grad_scale,
            )
            z = new_z.to(precision.dtype)
            state = {name: value.to(precision.state_dtype) for name, value in new_state.items()}
        return [z, *state.values()]


class OpRun:
    """The op's steps on a problem.

    Attributes:
        flat: buffer of the parameters, all segments one after the other.
        parameters: its segments, [N, d] each.
        state: buffer of each state.
    """

    def __init__(self, problem: Problem, precision: Precision, backend: str, device: str = "cpu") -> None:
        self.problem, self.backend, self.device = problem, backend, device
        self._wholes: list[Tensor] = []
        self.flat = self._guarded(precision.dtype)
        self.parameters = self._segments(self.flat)
        for parameter, block in zip(self.parameters, problem.start.split(problem.columns, dim=1), strict=True):
            parameter.copy_(block)
        self.state = [self._guarded(precision.state_dtype) for _ in problem.rule.states]

    def run(self, num_steps: int) -> OpRun:
        """Takes `num_steps` steps from step 0 on."""
        for step in range(num_steps):
            self.step(step)
        return self

    def step(self, step: int = 0) -> None:
        """Takes one step, with the learning rate and W of step `step`."""
        problem = self.problem
        gradient = problem.gradient(torch.cat(self.parameters, dim=1).cpu()).to(self.device)
        gradients = [block.contiguous() for block in gradient.split(problem.columns, dim=1)]
        for index in problem.idle:
            gradients[index] = gradient.new_empty(0)
        ops.gossip_step_(
            self.parameters,
            self.state,
            gradients,
            problem.coefficients(step),
            problem.rule.num_messages,
            *problem.topology.csr(step, self.device),
            None if problem.grad_scale is None else problem.grad_scale.to(self.device),
            self.backend,
        )

    def rows(self) -> list[Tensor]:
        """Returns z and every state, each [N, ΣD], on the CPU."""
        return [torch.cat(self._segments(flat), dim=1).cpu() for flat in (self.flat, *self.state)]

    def guards_intact(self) -> bool:
        """True if nothing before and behind the buffers has been written to."""
        zones = [whole[place] for whole in self._wholes for place in (slice(GUARD_LENGTH), slice(-GUARD_LENGTH, None))]
        return all(bool((zone == GUARD).all()) for zone in zones)

    def _segments(self, flat: Tensor) -> list[Tensor]:
        return segment_views(flat, self.problem.num_agents, [(d,) for d in self.problem.columns])

    def _guarded(self, dtype: torch.dtype) -> Tensor:
        """A flat buffer of zeros between two guard zones."""
        num_elements = self.problem.num_agents * sum(self.problem.columns)
        whole = torch.full((num_elements + 2 * GUARD_LENGTH,), GUARD, dtype=dtype, device=self.device)
        self._wholes.append(whole)
        return whole[GUARD_LENGTH : GUARD_LENGTH + num_elements].zero_()


def excess_error(rows: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], lr: float) -> float:
    """The worst error of z and all state, in units of what plain PyTorch in the same precision loses.

    It is infinite where something is not finite that should be. A rounding of z is a rounding of z/η in the state, so a
    small state is measured in roundings of 1/η.
    """
    worst = 0.0
    for index, (mine, truth, twin) in enumerate(zip(rows, exact, plain, strict=True)):
        scale = max(truth.abs().max().item(), 1.0 / lr if index else 1.0)
        floor = ROUNDINGS[twin.dtype] * torch.finfo(twin.dtype).eps * scale
        lost = (twin.double() - truth).abs().max().item()
        error = (mine.double() - truth).abs().max().item()
        if not (math.isfinite(error) and math.isfinite(lost)):
            return math.inf
        worst = max(worst, error / max(lost, floor))
    return worst


def compare(problem: Problem, precision: Precision, backend: str, *, num_steps: int = 30, device: str = "cpu") -> float:
    """The `excess_error` of a backend on a device after `num_steps` steps.

    Raises:
        RuntimeError: the backend is not available.
    """
    rows = OpRun(problem, precision, backend, device).run(num_steps).rows()
    exact, plain = problem.run_reference(num_steps), problem.run_reference(num_steps, precision)
    return excess_error(rows, exact, plain, problem.lr)


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same ones for the same seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """True if tensors of the same shapes and dtypes are equal bit for bit, NaNs and the sign of zero included."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(some, others, strict=True))
