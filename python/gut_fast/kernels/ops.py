"""The one op PyTorch sees: an opaque, in-place gossip step.

Schema and fake implementation are here; `gut_fast.kernels.backends` computes. Passing many tensors through
PyTorch's dispatcher and checking them one by one in Python costs several times as much as a small step. So a step of
plain CPU tensors that nothing traces goes straight to the compiled kernel (`backends.cpu.direct_step`); the op is for
what is traced, and for subclasses of tensors. `gut_fast.kernels.validation` says what is wrong with a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, GossipStep, Rows, cpu
from gut_fast.kernels.codes import (
    Code,
    Layout,
    Place,
    decode_difference,
    decode_modulo,
    encode_rows,
)
from gut_fast.kernels.step import PLAIN, arithmetic, resolved
from gut_fast.kernels.validation import (
    check,
    check_decoding,
    check_encoding,
    check_rows,
    check_types,
    is_dispatched,
)

__all__ = [
    "combine_",
    "decode",
    "encode",
    "gossip_step_",
    "message",
    "prepare",
    "select_backend",
]

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
    if torch.compiler.is_compiling():
        _dispatch(step, backend)
    else:
        prepare(step, backend)()


@torch.no_grad()
def prepare(step: GossipStep, backend: str) -> Callable[[], None]:
    """Checks a step and returns a function that performs it: several can be checked before one changes anything.

    Raises:
        TypeError, ValueError, RuntimeError: as `gossip_step_`.
    """
    is_watched = bool(torch._C._len_torch_dispatch_stack())
    run = cpu.direct_step(step) if backend in ("auto", "cpu") and not is_watched else None
    if run is None:
        if not step.parameters:
            return lambda: None
        check_types(step)
        tensors = [tensor for tensor in (*step.parameters, *step.state, *step.gradients) if tensor is not None]
        if any(map(is_dispatched, tensors)):
            return partial(_dispatch, step, backend)
        module = _checked_backend(step, backend)
        if is_watched or step.parameters[0].device.type not in AUTOMATIC or not _are_of_torch(tensors):
            return partial(_dispatch, step, backend)
        run = torch.no_grad()(partial(module.gossip_step, resolved(step)))

    def changing() -> None:
        run()
        torch.autograd.graph.increment_version([*step.parameters, *step.state])

    return changing


def _are_of_torch(tensors: Iterable[Tensor]) -> bool:
    """True if no tensor is of a subclass."""
    return set(map(type, tensors)) <= PLAIN


@torch.no_grad()
def _dispatch(step: GossipStep, backend: str) -> None:
    empty = [parameter.new_empty(0) for parameter in step.parameters[:1]]
    gradients: list[Tensor | None] = [empty[0] if gradient is None else gradient for gradient in step.gradients]
    torch.ops.gut_fast.gossip_step_(*step._replace(gradients=gradients), backend)


def _gossip_step_impl(*arguments: Any) -> None:
    step, backend = GossipStep(*arguments[:-1]), arguments[-1]
    if step.parameters:
        module = _checked_backend(step, backend)
        module.gossip_step(resolved(step))
        torch.autograd.graph.increment_version([*step.parameters, *step.state])


@torch.no_grad()
def message(step: GossipStep, rows: Rows, backend: str = "auto") -> None:
    """The first half of a step whose agents are on several ranks: what each agent sends.

    Writes S_1 … S_M of agent i one after the other into ``rows[i]``, each the agent's whole model, segment after
    segment, and changes nothing else. Mixing weights are not read.

    Args:
        step: the step of the N agents that are here.
        rows: N contiguous tensors [M ΣD], of the parameters' dtype or the dtype of arithmetic (float32 for half-width
            parameters), or of bfloat16 beside parameters of float32; None for an agent that sends nothing elsewhere.
        backend: as in `gossip_step_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `gossip_step_`, or a row is not as described.
    """
    if not (_may_be_direct(backend) and cpu.direct_message(step, rows)):
        module = _checked_half(step, backend, "message", rows)
        check_rows(step, rows, step.num_agents, are_changed=True)
        if any(row is not None for row in rows):
            module.message(resolved(step), list(rows))
    torch.autograd.graph.increment_version([row for row in rows if row is not None])


@torch.no_grad()
def combine_(step: GossipStep, rows: Rows, backend: str = "auto") -> None:
    """The second half of such a step, in place: mixes the messages, and computes parameters and state anew.

    The drift is ``D(i) = Σ_j w_ij (X_j − X_i)`` of the rows X as they were sent, so that their rounding does not move
    the mean over agents; X is S where nothing was sent. S in the outputs is computed anew. After `message` into rows of
    the dtype of arithmetic the result is that of `gossip_step_`, bit for bit, but for a complete graph, which the CPU
    kernel sums in another way where all agents are together.

    Args:
        step: the step as given to `message`; `neighbor` indexes into the rows.
        rows: the rows of the N agents that are here, None for an agent that sent nothing; then the received rows.
        backend: as in `gossip_step_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `message`.
    """
    if not (_may_be_direct(backend) and cpu.direct_combine(step, rows)):
        module = _checked_half(step, backend, "combine", rows)
        check_rows(step, rows, len(rows), are_changed=False)
        module.combine(resolved(step), list(rows))
    torch.autograd.graph.increment_version([*step.parameters, *step.state])


@torch.no_grad()
def encode(
    step: GossipStep,
    code: Code,
    coded: Rows,
    copies: Sequence[Tensor],
    widths: Sequence[Tensor] = (),
    place: Place | None = None,
    backend: str = "auto",
) -> None:
    """The first half of a step as `message` does it, its messages turned into codes: see `gut_fast.kernels.codes`.

    After it `combine_` mixes the copies, of the agents here and of their neighbours (`decode`), as rows.

    Args:
        step: the step of the N agents that are here.
        code: how messages are coded; ``code.layout(step)`` tells the lengths.
        coded: N rows of uint8 [num_bytes], overwritten; None for an agent that nobody elsewhere hears.
        copies: N rows [M ΣD] of the dtype of arithmetic, what the neighbours know of each agent, in place. Differences
            add to them: at first they hold what `message` has written, sent as it is. Modulo overwrites them.
        widths: of a modulo code, N rows of float32 [num_blocks], in place; none of differences.
        place: where the numbers belong, if they are rounded at random (``code.seed``).
        backend: as in `gossip_step_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `message`, or a row is not as described. Nothing has been changed.
    """
    layout, place = code.layout(step), place or Place()
    if not (_may_be_direct(backend) and cpu.direct_encode(step, code, coded, copies, widths, place)):
        module = _checked_half(step, backend, "message", [*coded, *copies, *widths])
        check_encoding(layout, step, coded, copies, widths)
        rows = step.new_rows(arithmetic(step.parameters[0].dtype))
        module.message(resolved(step), list(rows))
        encode_rows(code, layout, rows, coded, copies, widths, place)
    torch.autograd.graph.increment_version([*copies, *widths, *(row for row in coded if row is not None)])


@torch.no_grad()
def decode(
    layout: Layout,
    coded: Tensor,
    copy: Tensor,
    own: Tensor | None = None,
    widths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """Turns a row of codes into the sender's copy, in place: by differences from the old copy, by modulo from `own`.

    Any bytes decode to something; nothing is wrong with a code but its length.

    Args:
        layout: ``code.layout(step)`` of the sender and the receiver.
        coded: uint8 [num_bytes].
        copy: [M ΣD], float32 or float64: the sender's.
        own: of modulo: the receiver's own copy of the same round.
        widths: of modulo: the receiver's own widths, as `encode` has left them.
        backend: ``"torch"`` for plain PyTorch operations, which give the same bits as the compiled ones.

    Returns:
        Of modulo, float32 [num_blocks]: how far the two copies are apart, negative where the block has to be dropped
        (the copy is `own` there), NaN where a message was not finite. See `codes.decode_modulo`, `codes.next_widths_`.

    Raises:
        TypeError, ValueError: a tensor is not as described. Nothing has been changed.
    """
    distance = torch.empty_like(widths) if isinstance(widths, Tensor) else None
    if not (_may_be_direct(backend) and cpu.direct_decode(layout, coded, copy, own, widths, distance)):
        check_decoding(layout, coded, copy, own, widths)
        if own is None or widths is None:
            decode_difference(layout, coded, copy)
        else:
            distance = decode_modulo(layout, coded, copy, own, widths)
    torch.autograd.graph.increment_version([copy])
    return distance


def _may_be_direct(backend: str) -> bool:
    return backend in ("auto", "cpu") and not torch._C._len_torch_dispatch_stack()


def _checked_half(step: GossipStep, backend: str, function: str, rows: Rows) -> ModuleType:
    """The backend for half a step, which has no op: tensors that stand for others are refused."""
    check_types(step)
    for tensor in [*step.parameters, *step.state, *step.gradients, *rows]:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"rows must be tensors, got {type(tensor).__name__}")
        if tensor is not None and is_dispatched(tensor):
            raise TypeError(f"half a step needs tensors with numbers in memory, got a {type(tensor).__name__}")
    return _checked_backend(step, backend, function)


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
