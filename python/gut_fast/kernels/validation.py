"""The checks of a step's tensors, before anything is changed; they say what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from gut_fast.kernels.backends import HALVES, GossipStep, Rows, arithmetic, cpu
from gut_fast.kernels.codes import Layout

__all__ = [
    "check",
    "check_decoding",
    "check_dtypes",
    "check_encoding",
    "check_parameters",
    "check_rows",
    "described",
    "is_dispatched",
    "unreadable",
]

Named = Sequence[tuple[str, Tensor]]


def check(step: GossipStep) -> None:
    """Raises TypeError or ValueError unless the step's tensors are as `gossip_step_` describes them."""
    if cpu.read(step) is not None:
        check_dtypes(*step.dtypes)
        return
    check_types(step)
    if not step.parameters:
        raise ValueError("a step needs at least one parameter")
    _check_mixing(step)
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
        _check_memory(f"gradient {index}", gradient, may_be_lazy=True)
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
    _check_apart(step)


def check_types(step: GossipStep) -> None:
    """Raises TypeError unless tensors stand where tensors belong, and a number where that belongs."""
    for name, value in zip(step._fields, step, strict=True):
        if name == "num_messages":
            if not isinstance(value, int):
                raise TypeError(f"num_messages must be an integer, got {value!r}")
        elif name not in ("parameters", "state", "gradients"):
            if not isinstance(value, Tensor) and (name, value) != ("grad_scale", None):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        elif not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
        else:
            for index, each in enumerate(value):
                if not isinstance(each, Tensor) and (name, each) != ("gradients", None):
                    raise TypeError(f"{name}[{index}] must be a tensor, got {type(each).__name__}")


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


def described(value: Any) -> str:
    """Describes what is to be copied into the state: the shape of a dense floating-point tensor, else what it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(tuple(value.shape)) if value.is_floating_point() else f"Tensor {value.dtype} {tuple(value.shape)}"
    problem = unreadable(value)
    return f"{kind} {problem}" if problem else kind


def unreadable(tensor: Tensor) -> str:
    """Says why a tensor has no dense numbers in memory of its own; "" if it has."""
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    if is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "of a transform"
    if tensor.is_meta:
        return "on meta, without numbers"
    return "which has no memory: was its storage freed?" if _missing_bytes(tensor) else ""


def is_dispatched(tensor: Tensor) -> bool:
    """Returns whether a tensor computes in its own way, as fake and distributed ones do; it may have no memory."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _check_memory(what: str, tensor: Tensor, *, is_changed: bool = False, may_be_lazy: bool = False) -> None:
    """Raises TypeError or ValueError unless the numbers lie in the tensor's memory, as they are unless it is lazy."""
    if is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        raise TypeError(f"{what} belongs to a transform (vmap, grad, functionalize); take the step outside of it")
    if not may_be_lazy and (tensor.is_neg() or tensor._is_zerotensor()):
        raise ValueError(f"{what} is a lazily negated or zero view, whose numbers are not in memory; use .clone()")
    if is_changed and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{what} was made in inference mode and cannot be changed outside of it; use .clone()")
    if missing := _missing_bytes(tensor):
        raise ValueError(f"{what} has no memory: its storage {missing}, was it freed?")


def _missing_bytes(tensor: Tensor) -> str:
    """Says how much of a tensor's memory is not there; "" if all of it is, or it has none."""
    if is_dispatched(tensor) or tensor.is_meta or tensor._is_zerotensor() or not tensor.numel():
        return ""
    first, end = _extent(tensor)
    needed, there = end - first + tensor.storage_offset() * tensor.element_size(), tensor.untyped_storage().nbytes()
    return f"has {there} bytes of the {needed} needed" if there < needed else ""


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's numbers, and the end of the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_apart(step: GossipStep, rows: Rows = (), are_changed: bool = False) -> None:
    """Raises ValueError if memory that the step changes is also another tensor's; a gradient may be its parameter."""
    changed = [(f"parameter {index}", parameter) for index, parameter in enumerate(step.parameters)]
    changed += [(f"state {index}", buffer) for index, buffer in enumerate(step.state)]
    pairs = zip(step.parameters, step.gradients, strict=True)
    read = [(f"gradient {i}", g) for i, (p, g) in enumerate(pairs) if g is not None and not _is_same(g, p)]
    (changed if are_changed else read).extend((f"row {i}", row) for i, row in enumerate(rows) if row is not None)
    _check_disjoint(changed, read)


def _check_disjoint(changed: Named, read: Named) -> None:
    """Raises ValueError if memory of a tensor that is changed is also another one's."""
    ranges = [
        (*_extent(tensor), what, is_changed)
        for tensors, is_changed in ((changed, True), (read, False))
        for what, tensor in tensors
        if tensor.numel() and not (tensor.is_meta or is_dispatched(tensor) or tensor._is_zerotensor())
    ]
    any_before, changed_before = (0, ""), (0, "")  # where they end
    for first, end, what, is_changed in sorted(ranges):
        before, other = any_before if is_changed else changed_before
        if first < before:
            raise ValueError(f"{other} and {what} share memory that the step changes; use .clone()")
        any_before = max(any_before, (end, what))
        changed_before = max(changed_before, (end, what)) if is_changed else changed_before


def _is_same(gradient: Tensor, parameter: Tensor) -> bool:
    return _extent(gradient) == _extent(parameter) and gradient.stride() == parameter.stride()


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


def _check_vector(
    what: str, tensor: Tensor, dtype: torch.dtype, length: int, device: torch.device, *, is_changed: bool = False
) -> None:
    if tensor.dtype != dtype or tensor.device != device or tensor.shape != (length,) or not tensor.is_contiguous():
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, "
            f"expected a contiguous {dtype} of shape ({length},) on {device}"
        )
    _check_memory(what, tensor, is_changed=is_changed)


def check_rows(step: GossipStep, rows: Rows, num_rows: int, are_changed: bool) -> None:
    """Raises TypeError or ValueError unless these are rows of messages of a step that has been checked."""
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
        _check_memory(f"row {index}", row, is_changed=are_changed)
    _check_apart(step, rows, are_changed)


def check_encoding(layout: Layout, step: GossipStep, coded: Rows, copies: Rows, widths: Rows) -> None:
    """Raises TypeError or ValueError unless messages of the step, which has been checked, can be coded into these."""
    first = step.parameters[0]
    expected = [
        ("code", coded, torch.uint8, layout.num_bytes),
        ("copy", copies, arithmetic(first.dtype), layout.num_numbers),
    ]
    if layout.kind == "modulo":
        expected.append(("widths", widths, torch.float32, layout.num_blocks))
    elif len(widths):
        raise ValueError(f"{len(widths)} widths; differences have none")
    changed = [(f"parameter {index}", parameter) for index, parameter in enumerate(step.parameters)]
    for name, tensors, dtype, length in expected:
        if len(tensors) != step.num_agents:
            raise ValueError(
                f"{name}: {len(tensors)} rows, expected {step.num_agents}: one for each agent that is here"
            )
        for index, tensor in enumerate(tensors):
            if tensor is not None or name != "code":
                _check_coded(f"{name} {index}", tensor, dtype, length, first.device, is_changed=True)
        changed += [(f"{name} {index}", tensor) for index, tensor in enumerate(tensors) if tensor is not None]
    read = [(f"state {index}", buffer) for index, buffer in enumerate(step.state)]
    read += [(f"gradient {index}", gradient) for index, gradient in enumerate(step.gradients) if gradient is not None]
    _check_disjoint(changed[len(step.parameters) :], changed[: len(step.parameters)] + read)


def check_decoding(layout: Layout, coded: Tensor, copy: Tensor, own: Tensor | None, widths: Tensor | None) -> None:
    """Raises TypeError or ValueError unless the code can be decoded into the copy."""
    is_modulo = layout.kind == "modulo"
    if is_modulo != (own is not None) or is_modulo != (widths is not None):
        needs = "needs the receiver's own copy and widths" if is_modulo else "takes neither own nor widths"
        raise ValueError(f"decoding by {layout.kind} {needs}")
    if not isinstance(copy, Tensor) or copy.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a copy is a row of float32 or float64, got {described(copy)}")
    read = [("code", coded, torch.uint8, layout.num_bytes)]
    if own is not None and widths is not None:
        read += [("own", own, copy.dtype, layout.num_numbers), ("widths", widths, torch.float32, layout.num_blocks)]
    _check_coded("copy", copy, copy.dtype, layout.num_numbers, copy.device, is_changed=True)
    for name, tensor, dtype, length in read:
        _check_coded(name, tensor, dtype, length, copy.device)
    _check_disjoint([("copy", copy)], [(name, tensor) for name, tensor, _, _ in read])


def _check_coded(
    what: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    length: int,
    device: torch.device,
    *,
    is_changed: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(tensor).__name__}")
    if is_dispatched(tensor) or tensor.is_meta:
        raise TypeError(f"{what} is a {type(tensor).__name__} without numbers in memory")
    _check_vector(what, tensor, dtype, length, device, is_changed=is_changed)


def _row_length(step: GossipStep) -> int:
    return step.num_messages * sum(parameter.numel() for parameter in step.parameters) // step.num_agents
