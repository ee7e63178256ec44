"""One step of all agents: compared with the reference first, then timed beside the ceiling and its peers.

The ceiling is what a step costs without mixing: on a CPU a plain compiled loop over the same streams of memory, on the
same buffers and threads; on a GPU a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gut_fast import reference
from gut_fast.bench.cases import DTYPES, Case
from gut_fast.bench.device import CPU, machine_line, versions
from gut_fast.bench.results import Measurement, Result
from gut_fast.bench.timing import FLUSHED_BYTES, gpu_sampler, interleave, threads, wall_sampler, watch
from gut_fast.kernels import ops
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, cpu
from gut_fast.kernels.buffers import allocate, segment_views
from gut_fast.optim import GossipOptimizer
from gut_fast.simulation.cuda_graphs import capture_cuda_graph

__all__ = ["OURS", "Contender", "MakeContender", "Unavailable", "Workload", "WrongResultError", "check", "measure"]

NUM_STEPS = 3
"""The steps that are compared with the reference."""

MAX_COMPARED = 2**20
"""Up to this many numbers all are compared; of more, columns at equal distances, the first and the last among them."""

FOR_GPUS = "it is for GPUs"
NOISE_LENGTH = 1_000_003
"""The length of the repeated noise, a prime: rows of any width begin at different places of it."""


class Unavailable(Exception):  # noqa: N818  nothing went wrong
    """A contender cannot take part in a case; the message says why."""


class WrongResultError(Exception):
    """A contender does not compute what the reference does, so nothing or not this contender is timed."""


class Contender(NamedTuple):
    """Someone who makes the steps of a workload.

    Attributes:
        step: makes one step of all agents.
        blocks: returns what has been computed, ``"z"`` and those states that are the rule's own, each as matrices
            [N, d_k] that stand side by side. None if the contender makes no gossip step at all.
        warm_up: how many steps it takes until one is like the next.
    """

    step: Callable[[], object]
    blocks: Callable[[], dict[str, list[Tensor]]] | None = None
    warm_up: int = 0


class Workload:
    """The tensors of a case: all agents start from one model, and each has a gradient of its own.

    Attributes:
        parameters: the stacked parameters, (N, *shape) each, views of one flat buffer, `values`, as `gut_fast.stack`
            makes them; their gradients are views of another, `gradients`.
        optimizer: the library's optimizer of these parameters.
    """

    def __init__(self, case: Case, device: torch.device = CPU) -> None:
        self.case, self.rule, self.topology, self.device = case, case.make_rule(), case.make_topology(), device
        self.num_agents, self.columns = self.topology.num_agents, case.columns
        self.coefficients = self.rule.coefficients(**case.hyperparameters)
        size, dtype = self.num_agents * self.columns, DTYPES[case.dtype]
        self.values, self.gradients = (allocate(size, dtype, device) for _ in range(2))
        noise = torch.randn(NOISE_LENGTH, generator=torch.Generator().manual_seed(0))
        for piece in self.gradients.split(NOISE_LENGTH):
            piece.copy_(noise[: len(piece)])
        self.start = noise.repeat(-(-self.columns // NOISE_LENGTH))[: self.columns]
        views, gradients = (segment_views(flat, self.num_agents, case.shapes) for flat in (self.values, self.gradients))
        for view, model in zip(views, self.start.split([view[0].numel() for view in views]), strict=True):
            view.copy_(model.view_as(view[0]))
        self.parameters = [torch.nn.Parameter(view) for view in views]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer = self.make_optimizer(case.backend)

    def make_optimizer(
        self, backend: str, parameters: Sequence[torch.nn.Parameter] | None = None, **options: Any
    ) -> GossipOptimizer:
        """Returns an optimizer of the library on the parameters, or on others like them."""
        case = self.case
        options |= {} if case.state_dtype is None else {"state_dtype": DTYPES[case.state_dtype]}
        settings = {"topology": self.topology, "backend": backend, **case.hyperparameters, **options}
        return GossipOptimizer(self.parameters if parameters is None else parameters, case.rule, **settings)

    def blocks_of(self, optimizer: GossipOptimizer) -> dict[str, list[Tensor]]:
        """An optimizer's parameters and states."""
        parameters = optimizer.param_groups[0]["params"]
        states = {name: [_rows(optimizer.state[each][name]) for each in parameters] for name in self.rule.states}
        return {"z": [_rows(parameter) for parameter in parameters], **states}

    def flat_state(self) -> list[Tensor]:
        """The whole buffers of the optimizer's states: the first parameter's state is the beginning of each."""
        states = self.optimizer.state[self.parameters[0]]
        return [states[name].as_strided((self.values.numel(),), (1,)) for name in self.rule.states]

    def gradient_blocks(self) -> list[Tensor]:
        """The gradients as matrices [N, d_k] that stand side by side."""
        return [_rows(parameter.grad) for parameter in self.parameters if parameter.grad is not None]

    def copies(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """New matrices [N, D] in memory of their own: z at the start, every state, which is zero, and the gradients."""
        dtype, state_dtype = self.case.dtypes
        kinds = [dtype, *[state_dtype] * len(self.rule.states), dtype]
        z, *states, g = (allocate(self.values.numel(), kind, self.device).view(self.num_agents, -1) for kind in kinds)
        return z.copy_(self.start), states, torch.cat(self.gradient_blocks(), 1, out=g)

    @property
    def kind(self) -> tuple[str, torch.dtype, int, int, torch.dtype]:
        """The arguments with which a backend is asked whether it serves these tensors."""
        dtype, state_dtype = self.case.dtypes
        return self.device.type, dtype, len(self.rule.states), self.rule.num_messages, state_dtype

    @property
    def backend(self) -> str:
        """The name of the backend that the optimizer uses."""
        chosen = ops.select_backend(self.case.backend, *self.kind)
        return next(name for name, backend in BACKENDS.items() if backend is chosen)


MakeContender = Callable[[Workload], Contender]
"""A function that makes a contender. It raises `Unavailable` where the contender cannot take part."""


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().view(len(tensor), -1)


def _ceiling(workload: Workload) -> Contender:
    """The streams of a step and nothing else: in place on the same buffers, or on a GPU a copy of half the bytes."""
    if workload.device.type == "cuda":
        half = workload.case.bytes_per_step(workload.num_agents) // 2
        source, target = (torch.ones(half, dtype=torch.uint8, device=workload.device) for _ in range(2))
        return Contender(partial(target.copy_, source))
    if cpu.why_missing is not None:
        raise Unavailable(cpu.why_missing)
    values, gradients = (tensor.view(workload.num_agents, -1) for tensor in (workload.values, workload.gradients))
    step = workload.optimizer._snapshot(0)._replace(parameters=[values], gradients=[gradients])
    return Contender(partial(cpu.stream_step, step))


def _gut_fast(workload: Workload) -> Contender:
    """``optimizer.step()``, as a user calls it."""
    return Contender(workload.optimizer.step, partial(workload.blocks_of, workload.optimizer), cpu.TRIED_STEPS)


def _plain(workload: Workload) -> Contender:
    """``optimizer.step()`` on tensors that lie where PyTorch puts each of them, as those of `torch.randn` do."""
    if workload.device.type != "cpu":
        raise Unavailable("it is for CPUs")
    parameters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in workload.parameters]
    for parameter, like in zip(parameters, workload.parameters, strict=True):
        parameter.grad = None if like.grad is None else like.grad.clone()
    optimizer = workload.make_optimizer(workload.case.backend, parameters)
    return Contender(optimizer.step, partial(workload.blocks_of, optimizer), cpu.TRIED_STEPS)


def _backend(name: str, workload: Workload) -> Contender:
    """``optimizer.step()`` on a GPU with a backend that the case's optimizer does not use."""
    if workload.device.type != "cuda":
        raise Unavailable(FOR_GPUS)
    if name == workload.backend:
        raise Unavailable("it is the backend of gut_fast here")
    if (reason := BACKENDS[name].unavailable(*workload.kind)) is not None:
        raise Unavailable(reason)
    optimizer = workload.make_optimizer(name)
    return Contender(optimizer.step, partial(workload.blocks_of, optimizer))


def _graph(workload: Workload) -> Contender:
    """``optimizer.step()`` in a CUDA graph: a step without its Python."""
    if workload.device.type != "cuda":
        raise Unavailable(FOR_GPUS)
    if not workload.topology.is_static:
        raise Unavailable(f"{workload.topology} changes from step to step")
    optimizer, nothing = workload.make_optimizer(workload.case.backend, capturable=True), workload.values[:0]

    def step() -> Tensor:
        optimizer.step()
        return nothing

    _, replay = capture_cuda_graph(workload.device, step)
    return Contender(replay, partial(workload.blocks_of, optimizer))


def _sgd(workload: Workload) -> Contender:
    """``torch.optim.SGD(momentum=0.9, fused=True)`` on the same tensors: one state and no gossip."""
    try:
        return Contender(torch.optim.SGD(workload.parameters, 1e-3, momentum=0.9, fused=True).step)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


OURS: Mapping[str, MakeContender] = {
    "gut_fast": _gut_fast,
    "ceiling": _ceiling,
    "SGD": _sgd,
    "plain tensors": _plain,
    "graph": _graph,
    **{f"backend, {name}": partial(_backend, name) for name in AUTOMATIC["cuda"]},
}
"""The contenders on the library's own buffers, but "plain tensors", which are PyTorch's."""


@torch.no_grad()
def check(contender: Contender, workload: Workload, max_compared: int = MAX_COMPARED) -> float | None:
    """Makes `NUM_STEPS` steps, compares each with the float64 reference, warms up, and returns the largest error.

    A step of the reference begins with what the contender held before; a state that the contender does not show is the
    reference's own. Errors are relative to the largest entry of each tensor. The drift is divided by the learning rate,
    so a rounding of z is some twenty of a state; what is stored in half precision is rounded to that once a step.

    Returns:
        The error, or None if the contender makes no gossip step.

    Raises:
        WrongResultError: the error is too large, or not a number.
    """
    if contender.blocks is None:
        return None
    number = min(workload.columns, max(max_compared // workload.num_agents, 1))
    columns = torch.linspace(0, workload.columns - 1, number, dtype=torch.float64).round().long()
    eps = [torch.finfo(dtype).eps for dtype in workload.case.dtypes]
    limit = max(eps) if max(eps) > 1e-6 else 256 * eps[0]

    def taken(blocks: list[Tensor]) -> Tensor:
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return whole[:, columns.to(whole.device)].cpu().double()

    g, worst = taken(workload.gradient_blocks()), 0.0
    state = reference.zero_state(workload.rule, g)
    for step in range(NUM_STEPS):
        held = {name: taken(blocks) for name, blocks in contender.blocks().items()}
        z, W = held.pop("z"), workload.topology.matrix(step)
        z, state = reference.step(workload.rule, workload.case.hyperparameters, z, {**state, **held}, g, W)
        contender.step()
        for name, blocks in contender.blocks().items():
            truth = z if name == "z" else state[name]
            scale = truth.abs().max()
            error = float((taken(blocks) - truth).abs().max() / (scale if scale != 0 else 1.0))
            if not error <= limit:
                raise WrongResultError(f"{name} is off by {error:.1e} after step {step + 1}, more than {limit:.1e}")
            worst = max(worst, error)
    for _ in range(contender.warm_up):
        contender.step()
    return worst


def measure(
    case: Case,
    num_threads: int,
    seconds: float = 20.0,
    peers: Mapping[str, MakeContender] = MappingProxyType({}),
    device: torch.device = CPU,
) -> Result:
    """Compares all contenders with the reference and then times them in turns, for about so many seconds.

    A peer that is wrong or fails is not timed and stands among the absent.

    Args:
        case: what is timed.
        num_threads: the threads of PyTorch and of the kernel.
        seconds: on a GPU, half of it is for what callers wait for and half for what the GPU is busy with.
        peers: the contenders beside `OURS`.
        device: where the step is computed.

    Raises:
        WrongResultError: a step of the library is not equal to the reference; nothing has been timed.
        ValueError, RuntimeError: the case cannot be made, or its backend cannot serve it.
    """
    with threads(num_threads):
        if peers:
            torch.compiler.reset()  # its limit of compiled variants is per process
        workload = Workload(case, device)
        contenders, errors, absent = _compared(workload, {**OURS, **peers})
        with watch() as noise:
            measured = _times({name: contender.step for name, contender in contenders.items()}, seconds, device)
        settings = {
            "rule": case.rule,
            **case.hyperparameters,
            "topology": workload.topology.name,
            "agents": workload.num_agents,
            "columns": case.columns,
            "tensors": len(case.shapes),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in case.dtypes],
            "backend": workload.backend,
            **({"plan": cpu.last_plan()} if workload.backend == "cpu" else {}),
            "bytes": case.bytes_per_step(workload.num_agents),
        }
        measurements = {name: replace(each, error=errors[name]) for name, each in measured.items()}
        about = (num_threads, machine_line(device), versions(device))
        return Result("step", case.name, settings, "gut_fast", measurements, absent, noise, device.type, *about)


def _compared(
    workload: Workload, makers: Mapping[str, MakeContender]
) -> tuple[dict[str, Contender], dict[str, float | None], dict[str, str]]:
    """The contenders that are right, their errors, and why others are absent."""
    contenders: dict[str, Contender] = {}
    errors: dict[str, float | None] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contender = make(workload)
            errors[name] = check(contender, workload)
            contenders[name] = contender
        except Unavailable as reason:
            absent[name] = str(reason)
        except WrongResultError as error:
            if name in OURS:
                raise WrongResultError(f"{workload.case.name}: {name} differs from the reference: {error}") from None
            absent[name] = f"WRONG, not equal to the reference: {error}"
        except Exception as error:  # a compiler's or a device's, of any kind
            if name == "gut_fast":
                raise
            absent[name] = f"failed: {str(error).strip().partition(chr(10))[0]}"
    return contenders, errors, absent


def _times(steps: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, Measurement]:
    """The times of every contender: what its caller waits for, and on a GPU also what that is busy with."""
    called = {name: wall_sampler(step, device) for name, step in steps.items()}
    if device.type != "cuda":
        return {name: Measurement(found) for name, found in interleave(called, seconds).items()}
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    queued = {name: gpu_sampler(step, flushed) for name, step in steps.items()}
    waits, busy = interleave(called, seconds / 2), interleave(queued, seconds / 2)
    return {name: Measurement(waits[name], busy[name]) for name in steps}
