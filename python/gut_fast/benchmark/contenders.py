"""Contenders on the buffers of the library: its step, the kernel alone, momentum SGD, and the ceiling of a CPU.

All four work on the same parameters and gradients, and but for SGD on the same state, so that neither alignment nor
pages favour one. What there is on a GPU alone is in `gut_fast.benchmark.gpu_contenders`; peers on buffers of their own
are in `gut_fast.benchmark.formulations` and `gut_fast.benchmark.others`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.benchmark.cases import DTYPES, Case
from gut_fast.benchmark.device import CPU, Device
from gut_fast.kernels import ops
from gut_fast.kernels.buffers import allocate, segment_views
from gut_fast.optim import GossipOptimizer

__all__ = ["Ceiling", "Contender", "GutFast", "Kernel", "MomentumSGD", "Unavailable", "Workload"]

Blocks = dict[str, list[Tensor]]
"""``"z"`` and each state by its name: one tensor [N, d_k] per segment, or a single one [N, D] with all side by side."""

NOISE_LENGTH = 1_000_003
"""A prime: rows of any width begin at different places of the repeated noise."""


class Unavailable(Exception):  # noqa: N818  nothing went wrong
    """A contender cannot take part in this case; the message says why."""


class Workload:
    """The tensors of a case: all agents start from one model, each has a gradient of its own.

    Attributes:
        parameters: stacked, (N, *shape) each, views of one flat buffer as `gut_fast.stack` makes them; their
            gradients are views of another.
        values, gradients: the flat buffers.
    """

    def __init__(self, case: Case, device: Device = CPU) -> None:
        self.case, self.rule, self.topology, self.device = case, case.make_rule(), case.make_topology(), device
        self.num_agents, self.columns = self.topology.num_agents, case.columns
        self.values, self.gradients = (self._allocate(self.num_agents * self.columns) for _ in range(2))
        noise = torch.randn(NOISE_LENGTH, generator=torch.Generator().manual_seed(0))
        self._noise = noise.to(device.torch_device)
        for piece in self.gradients.split(NOISE_LENGTH):
            piece.copy_(self._noise[: len(piece)])
        views, gradients = (segment_views(flat, self.num_agents, case.shapes) for flat in (self.values, self.gradients))
        for view in views:
            view.copy_(self._first_model(view[0].numel()).view_as(view[0]))
        self.parameters = [torch.nn.Parameter(view) for view in views]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    @property
    def kind(self) -> tuple[str, torch.dtype, int, int, torch.dtype]:
        """What a backend is asked whether it serves."""
        dtype, state_dtype = self.case.storage
        return self.device.torch_device.type, dtype, len(self.rule.states), self.rule.num_messages, state_dtype

    def _allocate(self, num_elements: int) -> Tensor:
        return allocate(num_elements, DTYPES[self.case.dtype], self.device.torch_device)

    def _first_model(self, columns: int) -> Tensor:
        return self._noise.repeat(-(-columns // NOISE_LENGTH))[:columns]

    def first_rows(self, by_tensor: bool = False) -> list[Tensor]:
        """The parameters at the start, in new memory: one matrix [N, D], or one [N, d_k] for each tensor."""
        parts = [self._first_model(parameter[0].numel()) for parameter in self.parameters]
        rows = parts if by_tensor else [torch.cat(parts)]
        copies = []
        for row in rows:
            flat = self._allocate(self.num_agents * len(row))
            copies.append(flat.view(self.num_agents, -1).copy_(row))
        return copies

    def gradient_rows(self, by_tensor: bool = False) -> list[Tensor]:
        """The gradients: one matrix [N, D], or one [N, d_k] for each tensor. To be read only; views where they can."""
        blocks = [_rows(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        if by_tensor or len(blocks) == 1:
            return blocks
        if not hasattr(self, "_gradient_matrix"):
            flat = self._allocate(self.gradients.numel())
            self._gradient_matrix = torch.cat(blocks, dim=1, out=flat.view(self.num_agents, -1))
        return [self._gradient_matrix]


class Contender(ABC):
    """Someone who makes the steps of a workload.

    Attributes:
        family: contenders of a family differ in formulation; the best of them counts.
        steps_a_call: whose bytes one call of `step` moves, in steps; the ceiling's may be another number than 1.
    """

    family: str
    steps_a_call: float = 1.0

    @abstractmethod
    def step(self) -> None:
        """One step of all agents."""

    def blocks(self) -> Blocks | None:
        """What it has computed so far, to be compared with the reference; None if it makes no gossip step at all.

        A contender with state of another kind shows ``"z"`` alone.
        """
        return None

    def members(self) -> Sequence[Contender]:
        """Those who step in turns in its name, each to be compared; itself, if there are no others."""
        return [self]


class GutFast(Contender):
    """``optimizer.step()``, as a user calls it; with the case's backend, or with another beside it."""

    def __init__(self, workload: Workload, backend: str | None = None, **options: Any) -> None:
        case = workload.case
        self.family = "gut_fast" if backend is None else "backend"
        if case.state_dtype is not None:
            options["state_dtype"] = DTYPES[case.state_dtype]
        self.workload = workload
        self.optimizer = GossipOptimizer(
            workload.parameters,
            case.rule,
            topology=workload.topology,
            backend=backend or case.backend,
            **case.hyperparameters,
            **options,
        )

    def step(self) -> None:
        """One step."""
        self.optimizer.step()

    def blocks(self) -> Blocks:
        """Parameters and state."""
        parameters = self.workload.parameters
        states = {
            name: [_rows(self.optimizer.state[parameter][name]) for parameter in parameters]
            for name in self.workload.rule.states
        }
        return {"z": [_rows(parameter) for parameter in parameters], **states}

    def flat_state(self) -> list[Tensor]:
        """The state buffers whole: each state of the first parameter is the beginning of one."""
        first, size = self.workload.parameters[0], self.workload.values.numel()
        return [self.optimizer.state[first][name].as_strided((size,), (1,)) for name in self.workload.rule.states]


class Kernel(Contender):
    """The op alone, without what the optimizer looks at before it calls it."""

    family = "kernel"

    def __init__(self, ours: GutFast) -> None:
        workload, case = ours.workload, ours.workload.case
        if not workload.topology.is_static:
            raise Unavailable(f"{workload.topology} changes from step to step")
        coefficients = workload.rule.coefficients(**case.hyperparameters)
        self.ours = ours
        self.arguments = (
            [parameter.detach() for parameter in workload.parameters],
            ours.flat_state(),
            [parameter.grad for parameter in workload.parameters],
            torch.tensor(coefficients.flat(), dtype=torch.float64),
            workload.rule.num_messages,
            *workload.topology.csr(0, workload.device.torch_device),
            None,
            case.backend,
        )

    def step(self) -> None:
        """One call."""
        ops.gossip_step_(*self.arguments)

    def blocks(self) -> Blocks:
        """The same buffers as the optimizer's."""
        return self.ours.blocks()


class MomentumSGD(Contender):
    """``torch.optim.SGD(momentum=0.9, fused=True)`` on the same tensors: no gossip, one state."""

    family = "sgd"

    def __init__(self, workload: Workload) -> None:
        lr = workload.case.hyperparameters["lr"]
        self.optimizer = torch.optim.SGD(workload.parameters, lr=lr, momentum=0.9, fused=True)

    def step(self) -> None:
        """One step."""
        self.optimizer.step()


class Ceiling(Contender):
    """A compiled loop with the streams of the step and nothing else, on the same threads.

    It reads parameters, state and gradients and writes parameters and state in place, all as one flat row.
    """

    family = "ceiling"

    def __init__(self, ours: GutFast) -> None:
        try:
            from gut_fast import _core
        except ImportError as error:
            raise Unavailable(f"the compiled extension gut_fast._core did not import ({error})") from error
        workload = ours.workload
        dtype, state_dtype = (getattr(_core.DType, str(each).removeprefix("torch.")) for each in workload.case.storage)
        self.buffers = (workload, ours.flat_state())  # keeps what the addresses point to
        self.call: Callable[..., None] = _core.stream_step
        self.arguments: Sequence[Any] = (
            dtype,
            state_dtype,
            workload.num_agents,
            [workload.values.data_ptr()],
            [workload.gradients.data_ptr()],
            [workload.columns],
            [buffer.data_ptr() for buffer in self.buffers[1]],
            *(0, workload.rule.num_messages, 0, 0, 0, 0),  # no coefficients, no neighbours, no factors on gradients
        )

    def step(self) -> None:
        """One pass."""
        self.call(*self.arguments, torch.get_num_threads())


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().view(len(tensor), -1)
