"""The one op PyTorch sees: an opaque, in-place gossip step.

Schema, checks and the fake implementation are here; `gut_fast.kernels.backends` computes. Passing many tensors through
PyTorch's dispatcher and checking them one by one in Python costs several times as much as a small step. So a step of
plain CPU tensors that nothing traces goes straight to the compiled kernel (`backends.cpu.direct_step`); the op is for
everything else: torch.compile, fake tensors, other devices and backends, and tensors that must be copied or refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, HALVES, GossipStep, Rows, are_readable, arithmetic, cpu

__all__ = [
    "check",
    "check_dtypes",
    "check_parameters",
    "combine_",
    "gossip_step_",
    "message",
    "prepare",
    "select_backend",
]

PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
"""The types of tensors that compute as PyTorch does; others stand for something else."""

_library = torch.library.Library("gut_fast", "DEF")
_library.define(
    "gossip_step_(Tensor(a!)[] parameters, Tensor(b!)[] state, Tensor[] gradients, Tensor coefficients, "
    "int num_messages, Tensor row_start, Tensor neighbor, Tensor weight, Tensor? grad_scale, str backend) -> ()"
)


def gossip_step_(
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    coefficients: Tensor,
    num_messages: int,
    row_start: Tensor,
    neighbor: Tensor,
    weight: Tensor,
    grad_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of an update rule for N agents, in place: see `gut_fast.rules` for the equations.

    Args:
        parameters: one contiguous tensor of shape (N, *shape) per segment, or (*shape) of a single agent, all of one
            floating dtype and device.
        state: q flat contiguous buffers of that device, each as long as all the parameters together. They share one
            dtype, that of the parameters, or float32 beside bfloat16 or float16, either way round. Steps with a
            half-width dtype are computed in float32 and rounded once, when stored.
        gradients: as `parameters`, with any strides; None, or a tensor of shape (0,), stands for a gradient of zero.
        coefficients: A, B, C, E of the rule one after the other (`Coefficients.flat`), float64, on the CPU; or on the
            parameters' device, where a captured CUDA graph reads them anew at every replay.
        num_messages: M, the number of rows of A.
        row_start: int64 [N + 1]; with `neighbor` and `weight` the off-diagonal non-zeros of W in CSR form, on the
            parameters' device.
        neighbor: int64 [edges].
        weight: float64 [edges].
        grad_scale: float64 [N], a factor on each agent's gradient; zero drops the gradient, NaN included.
        backend: ``"auto"``, or one of `gut_fast.kernels.backends.BACKENDS`.

    Raises:
        TypeError, ValueError: a tensor is not as described.
        RuntimeError: the backend asked for is not available for these tensors.
    """
    step = GossipStep(
        list(parameters),
        list(state),
        list(gradients),
        coefficients,
        num_messages,
        row_start,
        neighbor,
        weight,
        grad_scale,
    )
    run = None if torch.compiler.is_compiling() else _direct(step, backend)
    if run is None:
        _dispatch(step, backend)
    else:
        run()


def prepare(step: GossipStep, backend: str) -> Callable[[], None]:
    """Checks a step and returns a function that performs it: several can be checked before one changes anything.

    Raises:
        TypeError, ValueError, RuntimeError: as `gossip_step_`.
    """
    run = _direct(step, backend)
    if run is None:
        _checked_backend(step, backend)
        run = partial(_dispatch, step, backend)
    return run


def _direct(step: GossipStep, backend: str) -> Callable[[], None] | None:
    """A function that performs a step of plain tensors without PyTorch's dispatcher; None for others or if traced."""
    if torch._C._len_torch_dispatch_stack():
        return None
    compute = cpu.direct_step(step) if backend in ("auto", "cpu") else None
    if compute is None or not are_readable(step):
        if not step.parameters or step.parameters[0].device.type not in AUTOMATIC or not _are_of_torch(step):
            return None
        compute = torch.no_grad()(partial(_checked_backend(step, backend).gossip_step, step))

    def run() -> None:
        compute()
        torch.autograd.graph.increment_version([*step.parameters, *step.state])

    return run


def _are_of_torch(step: GossipStep) -> bool:
    """True if no tensor is of a subclass, which may compute in its own way."""
    return {*map(type, step.parameters), *map(type, step.state), *map(type, step.gradients)} <= PLAIN


@torch.no_grad()
def _dispatch(step: GossipStep, backend: str) -> None:
    empty = [parameter.new_empty(0) for parameter in step.parameters[:1]]
    gradients: list[Tensor | None] = [empty[0] if gradient is None else gradient for gradient in step.gradients]
    torch.ops.gut_fast.gossip_step_(*step._replace(gradients=gradients), backend)


def _gossip_step_impl(*arguments: Any) -> None:
    step, backend = GossipStep(*arguments[:-1]), arguments[-1]
    if step.parameters:
        _checked_backend(step, backend).gossip_step(step)
        torch.autograd.graph.increment_version([*step.parameters, *step.state])


@torch.no_grad()
def message(step: GossipStep, rows: Rows, backend: str = "auto", *, residuals: Rows = ()) -> None:
    """The first half of a step whose agents are on several ranks: what each agent sends.

    Writes S_1 … S_M of agent i one after the other into ``rows[i]``, each the agent's whole model, segment after
    segment, and changes nothing else. Mixing weights are not read.

    Args:
        step: the step of the N agents that are here.
        rows: N contiguous tensors [M ΣD], of the parameters' dtype or the dtype of arithmetic (float32 for half-width
            parameters), or of bfloat16 beside parameters of float32; None for an agent that sends nothing elsewhere.
        backend: as in `gossip_step_`.
        residuals: the remainders that rounding has left of the messages so far: for each agent that sends, a tensor
            of the row's shape and the dtype of arithmetic, which must be wider than the row's. A residual is added to
            the message and then holds the new remainder, so that the sum of all messages is right to one rounding.

    Raises:
        TypeError, ValueError, RuntimeError: as `gossip_step_`, or a row is not as described.
    """
    is_done = len(rows) == step.num_agents and _is_direct(step, backend) and cpu.direct_message(step, rows, residuals)
    if not is_done:
        module = _checked_backend(step, backend, "message")
        _check_rows(step, rows, step.num_agents)
        _check_residuals(step, rows, residuals)
        if any(row is not None for row in rows):
            module.message(step, list(rows), list(residuals))
    torch.autograd.graph.increment_version([row for row in rows if row is not None])


@torch.no_grad()
def combine_(step: GossipStep, rows: Rows, backend: str = "auto") -> None:
    """The second half of such a step, in place: mixes the messages, and computes parameters and state anew.

    The drift is ``D(i) = Σ_j w_ij (X_j − X_i)`` of the rows X as they were sent, so that their rounding does not move
    the mean over agents; X is S where nothing was sent. S in the outputs is computed anew. After `message` into rows of
    the dtype of arithmetic the result is that of `gossip_step_`, bit for bit, but for a complete graph, which the CPU
    and CUDA kernels sum in another way where all agents are together.

    Args:
        step: the step as given to `message`; `neighbor` indexes into the rows.
        rows: the rows of the N agents that are here, None for an agent that sent nothing; then the received rows.
        backend: as in `gossip_step_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `message`.
    """
    if not (_is_direct(step, backend) and cpu.direct_combine(step, rows)):
        module = _checked_backend(step, backend, "combine")
        _check_rows(step, rows, len(rows))
        module.combine(step, list(rows))
    torch.autograd.graph.increment_version([*step.parameters, *step.state])


def _is_direct(step: GossipStep, backend: str) -> bool:
    """True if the compiled kernel may be chosen and can read the step's tensors, and nothing traces the call."""
    return backend in ("auto", "cpu") and not torch._C._len_torch_dispatch_stack() and are_readable(step)


def _check_rows(step: GossipStep, rows: Rows, num_rows: int) -> None:
    first = step.parameters[0]
    dtypes = {first.dtype, arithmetic(first.dtype), *([torch.bfloat16] if first.dtype == torch.float32 else [])}
    row_dtype = next((row.dtype for row in rows if row is not None), first.dtype)
    length = _row_length(step)
    if len(rows) != num_rows or num_rows < step.num_agents:
        raise ValueError(f"{len(rows)} rows of messages, expected {step.num_agents}: one for each agent that is here")
    for index, row in enumerate(rows):
        if row is None:
            if index >= step.num_agents:
                raise ValueError(f"row {index} is None, but it is of an agent that is not here")
            continue
        if row.shape != (length,) or not row.is_contiguous():
            shape, strides = tuple(row.shape), row.stride()
            raise ValueError(f"row {index} has shape {shape}, strides {strides}; expected {length} contiguous numbers")
        if row.dtype not in dtypes or row.dtype != row_dtype:
            raise TypeError(f"row {index} is {row.dtype}, the first {row_dtype}, the parameters are {first.dtype}")
        if row.device != first.device:
            raise TypeError(f"row {index} is on {row.device}, the parameters are on {first.device}")


def _check_residuals(step: GossipStep, rows: Rows, residuals: Rows) -> None:
    if not residuals:
        return
    first, length = step.parameters[0], _row_length(step)
    exact = arithmetic(first.dtype)
    if len(residuals) != len(rows):
        raise ValueError(f"{len(residuals)} residuals, expected {len(rows)}: one for each row")
    for index, (row, residual) in enumerate(zip(rows, residuals, strict=True)):
        if row is None:
            continue
        if row.dtype.itemsize >= exact.itemsize:
            raise TypeError(f"row {index} is {row.dtype}, which loses nothing of {exact}; give no residuals")
        if residual is None or residual.shape != (length,) or not residual.is_contiguous():
            given = None if residual is None else (tuple(residual.shape), residual.stride())
            raise ValueError(f"residual {index} is {given}, expected {length} contiguous numbers")
        if residual.dtype != exact or residual.device != first.device:
            raise TypeError(
                f"residual {index} is {residual.dtype} on {residual.device}, expected {exact} on {first.device}"
            )


def _row_length(step: GossipStep) -> int:
    return step.num_messages * sum(parameter.numel() for parameter in step.parameters) // step.num_agents


def _checked_backend(step: GossipStep, backend: str, function: str = "gossip_step") -> ModuleType:
    check(step)
    dtype, state_dtype = step.dtypes
    device_type = step.parameters[0].device.type
    return select_backend(backend, device_type, dtype, len(step.state), step.num_messages, state_dtype, function)


for _key in ("CPU", "CUDA"):
    _library.impl("gossip_step_", _gossip_step_impl, _key)


# The op mutates its arguments and returns nothing, so the fake implementation has no shape to infer.
torch.library.register_fake("gut_fast::gossip_step_", lambda *args: None, lib=_library)


@lru_cache(maxsize=256)
def select_backend(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    num_states: int,
    num_messages: int,
    state_dtype: torch.dtype | None = None,
    function: str = "gossip_step",
) -> ModuleType:
    """The backend of that name, or for ``"auto"`` the first of `AUTOMATIC` that has the function and can serve them.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend cannot serve such tensors; the message says why.

    Warns:
        UserWarning: ``"auto"`` has to do without the compiled kernel, which is missing or switched off.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
    reasons: list[str] = []
    for candidate in AUTOMATIC.get(device_type, ("torch",)) if name == "auto" else (name,):
        backend = BACKENDS[candidate]
        reason = backend.unavailable(device_type, dtype, num_states, num_messages, state_dtype)
        if reason is None and not hasattr(backend, function):
            reason = f"it has no {function}"
        if reason is None:
            if name == "auto" and device_type == "cpu" and BACKENDS["cpu"].why_missing is not None:
                warnings.warn(f"steps are slow without the compiled kernel: {'; '.join(reasons)}", stacklevel=2)
            return backend
        reasons.append(f"backend {candidate!r} is not available: {reason}")
    raise RuntimeError("; ".join(reasons))


def check(step: GossipStep) -> None:
    """Raises TypeError or ValueError unless the step's tensors are as `gossip_step_` describes them."""
    _check_mixing(step)
    if cpu.are_plain(step) and step.parameters[0].is_floating_point() and are_readable(step):
        check_dtypes(*step.dtypes)
        return
    check_parameters(step.parameters, step.num_agents)
    first, num_elements = step.parameters[0], sum(parameter.numel() for parameter in step.parameters)
    if len(step.gradients) != len(step.parameters):
        raise ValueError(f"{len(step.parameters)} parameters but {len(step.gradients)} gradients")
    for index, (parameter, gradient) in enumerate(zip(step.parameters, step.gradients, strict=True)):
        if gradient is None:
            continue
        if gradient.shape != parameter.shape and gradient.shape != (0,):
            raise ValueError(
                f"gradient {index} has shape {tuple(gradient.shape)}, expected {tuple(parameter.shape)}, "
                "or None for a gradient of zero"
            )
        if gradient.layout is not torch.strided:
            raise TypeError(f"gradient {index} is {gradient.layout}; use dense gradients (sparse=False)")
        _check_kind("gradient", index, gradient, first)
        _check_memory(f"gradient {index}", gradient)
    dtype, state_dtype = step.dtypes
    check_dtypes(dtype, state_dtype)
    for index, buffer in enumerate(step.state):
        if buffer.shape != (num_elements,) or not buffer.is_contiguous():
            raise ValueError(
                f"state {index} has shape {tuple(buffer.shape)}, strides {buffer.stride()}; "
                f"expected one contiguous row of {num_elements}"
            )
        _check_kind("state", index, buffer, first, state_dtype)
        _check_memory(f"state {index}", buffer, is_changed=True)


def check_dtypes(dtype: torch.dtype, state_dtype: torch.dtype, where: str = "") -> None:
    """Raises TypeError, its message after `where`, unless parameters of `dtype` may have state of `state_dtype`."""
    if dtype == state_dtype or (torch.float32 in (dtype, state_dtype) and {dtype, state_dtype} & set(HALVES)):
        return
    others = HALVES if dtype == torch.float32 else [torch.float32] if dtype in HALVES else []
    choice = " or ".join(map(str, (dtype, *others)))
    raise TypeError(f"{where}the state is {state_dtype}; for parameters of {dtype} it can be {choice}")


def check_parameters(parameters: Sequence[Tensor], num_agents: int, where: str = "") -> None:
    """Raises TypeError or ValueError, its message after `where`, unless these are N agents' stacked parameters.

    Stacked parameters are dense and contiguous, of shape (N, ...) or any shape if N = 1, all of one floating dtype and
    device.
    """
    for index, parameter in enumerate(parameters):
        # Every step asks this of every parameter, so the checks must be cheap; a message is made only after one fails.
        if not parameter.is_floating_point():
            raise TypeError(f"{where}parameter {index} is {parameter.dtype}; only floating-point ones can be mixed")
        if parameter.layout is not torch.strided:
            raise TypeError(f"{where}parameter {index} is {parameter.layout}; only dense parameters can be mixed")
        if num_agents > 1 and (parameter.dim() == 0 or parameter.size(0) != num_agents):
            raise ValueError(
                f"{where}parameter {index} has shape {tuple(parameter.shape)}, expected ({num_agents}, ...): one row "
                f"for each agent; gut_fast.stack(module, {num_agents}) makes such parameters of a module"
            )
        if not parameter.is_contiguous():
            strides = parameter.stride()
            raise ValueError(f"{where}parameter {index} is not contiguous: strides {strides}; use .contiguous()")
        _check_kind(f"{where}parameter", index, parameter, parameters[0])
        _check_memory(f"{where}parameter {index}", parameter, is_changed=True)


def _check_memory(what: str, tensor: Tensor, is_changed: bool = False) -> None:
    """Raises ValueError if the tensor's storage has been freed, or if it is to be changed and is lazily negated."""
    if is_changed and tensor.is_neg():
        raise ValueError(f"{what} is a lazily negated view, which cannot be changed in place; use .resolve_neg()")
    if type(tensor) not in PLAIN or tensor.device.type == "meta" or not tensor.numel():
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed, there = (tensor.storage_offset() + last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if there < needed:
        raise ValueError(f"{what} has no memory: its storage has {there} bytes of the {needed} needed, was it freed?")


def _check_kind(what: str, index: int, tensor: Tensor, first: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = dtype or first.dtype
    if tensor.dtype != dtype or tensor.device != first.device:
        expected = f"parameter 0 is {first.dtype}" if dtype == first.dtype else f"all state must be {dtype}"
        raise TypeError(
            f"{what} {index} is {tensor.dtype} on {tensor.device}, but {expected} on {first.device}; "
            "convert it, or give it a parameter group of its own"
        )


def _check_mixing(step: GossipStep) -> None:
    rows = len(step.state) + 1
    expected = step.num_messages * (rows + 1) + rows * (rows + 1) + 2 * rows * step.num_messages
    if step.num_messages < 1:
        raise ValueError(f"num_messages must be at least 1, got {step.num_messages}")
    device, num_edges = step.parameters[0].device, step.neighbor.numel()
    home = device if step.coefficients.device == device else torch.device("cpu")
    _check_vector("coefficients", step.coefficients, torch.float64, expected, home)
    if step.row_start.numel() < 2:
        raise ValueError(f"row_start must have N + 1 >= 2 entries, got {step.row_start.numel()}")
    _check_vector("row_start", step.row_start, torch.int64, step.num_agents + 1, device)
    _check_vector("neighbor", step.neighbor, torch.int64, num_edges, device)
    _check_vector("weight", step.weight, torch.float64, num_edges, device)
    if device.type == "cpu" and int(step.row_start[-1]) != num_edges:
        raise ValueError(f"row_start ends at {int(step.row_start[-1])}, but there are {num_edges} neighbours")
    if step.grad_scale is not None:
        _check_vector("grad_scale", step.grad_scale, torch.float64, step.num_agents, device)


def _check_vector(what: str, tensor: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device or tensor.shape != (length,) or not tensor.is_contiguous():
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, "
            f"expected a contiguous {dtype} of shape ({length},) on {device}"
        )
    _check_memory(what, tensor, is_changed=True)
