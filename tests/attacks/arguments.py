"""Hostile arguments of a step: each is refused before anything has changed, or the step equals the reference.

A step is made at random, one or two of its arguments are replaced by others that are wrong, odd, or merely rare, and it
is taken in one of the ways that lead to the kernels.
"""

import math
import random

import numpy as np
import torch

import gut_fast as gf
from gut_fast.kernels import ops
from gut_fast.kernels.backends import cpu
from gut_fast.rules import RULES
from steps import a_step, combined_in_float64, own_rule, rows_of

GRAPHS = [
    gf.topology.ring(3),
    gf.topology.ring(8),
    gf.topology.complete(5),
    gf.topology.star(6),
    gf.topology.torus(3, 4),
    gf.topology.from_matrix([[1.0]]),
]
COLUMNS = [(1,), (5, 1, 130), (64,), (3, 0, 7), (65, 65), (300,), (17,) * 9]
DTYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
]
REFUSALS = TypeError, ValueError, RuntimeError, NotImplementedError
MAX_ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of the largest entry."""


class Wrapped(torch.Tensor):
    """A subclass that computes as PyTorch does."""


def _freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def _misaligned(tensor):
    """The same numbers, one byte off where numbers of this type usually lie."""
    raw = torch.zeros(tensor.numel() * tensor.element_size() + 1, dtype=torch.uint8)
    raw[1:] = tensor.contiguous().reshape(-1).view(torch.uint8)
    array = np.frombuffer(memoryview(raw.numpy())[1:], dtype=np.uint8)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=tensor.dtype).view(tensor.shape)


TENSORS = {
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "float": lambda t: t.float(),
    "whole": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "truths": lambda t: t > 0,
    "transposed": lambda t: t.t(),
    "strided": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "backwards": lambda t: t.flip(0)[:-1],
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "a part": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    "a leaf": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "of a graph": lambda t: t.clone().requires_grad_() * 1 if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "freed": _freed,
    "shrunk": _shrunk,
    "misaligned": _misaligned,
    "negative": lambda t: torch._neg_view(-t),
    "conjugate": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1],
    "flat": lambda t: t.reshape(-1),
    "one number": lambda t: t.reshape(-1)[0] if t.numel() else t,
    "empty": lambda t: t.new_empty(0),
    "deep": lambda t: t.reshape(t.shape + (1,) * 60),
    "wrapped": lambda t: t.as_subclass(Wrapped),
    "infinite": lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t,
    "undefined": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    "a module's": lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
    "for inference": lambda t: _for_inference(t),
    "an array": lambda t: t.detach().float().numpy(),
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
    "text": lambda t: "tensor",
    "a number": lambda t: 1.5,
    "another object": lambda t: object(),
}
NUMBERS = [0, -1, 2, 3, 7, 2**31, -(2**31), 2**63, 1.0, 1.5, math.nan, "1", None, True, [1], torch.tensor(1)]
"""In the place of the number of messages."""


def _for_inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def _on_one(field):
    """Replaces one tensor of a list."""

    def changed(rng, step):
        tensors, how = list(getattr(step, field)), rng.choice(list(TENSORS))
        if not tensors:
            return step, f"{field} untouched"
        index = rng.randrange(len(tensors))
        tensors[index] = TENSORS[how](tensors[index])
        return step._replace(**{field: tensors}), f"{field}[{index}] {how}"

    return changed


def _on_whole(field):
    """Replaces a tensor that stands alone."""

    def changed(rng, step):
        tensor, how = getattr(step, field), rng.choice(list(TENSORS))
        if tensor is None:
            return step, f"{field} untouched"
        return step._replace(**{field: TENSORS[how](tensor)}), f"{field} {how}"

    return changed


def _entry(field, values):
    """Overwrites one entry of a vector."""

    def changed(rng, step):
        tensor = getattr(step, field)
        if tensor is None or not tensor.numel():
            return step, f"{field} untouched"
        tensor, index, value = tensor.clone(), rng.randrange(tensor.numel()), rng.choice(values)
        tensor[index] = value
        return step._replace(**{field: tensor}), f"{field}[{index}] = {value}"

    return changed


def _list(rng, step):
    """Makes one list another list, or no list."""
    field = rng.choice(["parameters", "state", "gradients"])
    values = getattr(step, field)
    how, value = rng.choice(
        [
            ("one more", [*values, *values[:1]]),
            ("one less", values[:-1]),
            ("none", []),
            ("a tuple", tuple(values)),
            ("nothing", None),
            ("text", "tensors"),
            ("a dictionary", dict(enumerate(values))),
            ("the first one always", values[:1] * len(values)),
        ]
    )
    return step._replace(**{field: value}), f"{field}: {how}"


def _shared(rng, step):
    """Lets two arguments share memory, wholly or in part."""
    parameters, (first, *_) = list(step.parameters), step.parameters
    size = first.numel()
    if size < 2:
        return step, "nothing to share"
    memory = torch.zeros(2 * size, dtype=first.dtype)
    at = rng.choice([0, 1, size - 1, size])
    memory[:size] = first.reshape(-1)
    parameters[0] = memory[:size].view(first.shape)
    other, how = memory[at : at + size], f"memory shared from {at} of {size}"
    if rng.random() < 0.5:
        return step._replace(parameters=parameters, gradients=[other.view(first.shape), *step.gradients[1:]]), how
    return step._replace(parameters=parameters, state=[other, *step.state[1:]]), f"{how}, with the state"


def _messages(rng, step):
    number = rng.choice(NUMBERS)
    return step._replace(num_messages=number), f"num_messages = {number!r}"


CHANGES = [
    *[_on_one(field) for field in ("parameters", "state", "gradients") for _ in range(3)],
    *[_on_whole(field) for field in ("coefficients", "row_start", "neighbor", "weight", "grad_scale")],
    _entry("row_start", [-1, 1, 10**6, 2**62, -(2**62)]),
    _entry("neighbor", [-1, 0, 1, 100, 2**40, -(2**63), 2**63 - 1]),
    _entry("weight", [math.nan, math.inf, -1.0, 0.0, 1e30]),
    _entry("coefficients", [math.nan, math.inf, 0.0, 1.0, 1e30]),
    _entry("grad_scale", [math.nan, math.inf, 0.0, -1.0]),
    _list,
    _shared,
    _messages,
]


def _in_one(step, backend, _):
    ops.gossip_step_(*step, backend)


def _prepared(step, backend, _):
    ops.prepare(step, backend)()


def _in_halves(step, backend, like):
    rows = like.new_rows(torch.float64 if like.parameters[0].dtype == torch.float64 else torch.float32)
    ops.message(step, rows, backend)
    ops.combine_(step, rows, backend)


WAYS = [_in_one, _prepared, _in_halves]
BACKENDS = ["auto", "cpu", "torch"]


def attack(seed: int, count: int) -> int:
    """Takes so many steps with hostile arguments; raises AssertionError, which says which, when one does harm."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        said: list[str] = []
        try:
            _attack_once(rng, said)
        except Exception as error:
            raise AssertionError(f"attack {number} of seed {seed}: {', '.join(said)}: {error!r}") from error
    return count


def _attack_once(rng, said):
    torch.set_num_threads(rng.choice([1, 2, 3]))
    rule = rng.choice([*RULES, own_rule(2, 1), own_rule(3, 2)])
    (dtype, state_dtype), columns, graph = rng.choice(DTYPES), rng.choice(COLUMNS), rng.choice(GRAPHS)
    step = a_step(rule, graph, columns, dtype, state_dtype)
    if rng.random() < 0.5:
        step = step._replace(grad_scale=None)
    like = step
    said.append(f"{rule} on {graph}, {columns} of {dtype}")
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        if not all(_has_memory(tensor) for _, tensor in _tensors(step)):
            break  # PyTorch itself would end the process if these were changed further
        try:
            step, how = rng.choice(CHANGES)(rng, step)
        except Exception:  # PyTorch, or Python, does not make such a thing
            continue
        said.append(how)
    way, backend = rng.choice(WAYS), rng.choice(BACKENDS)
    said.append(f"{way.__name__}, {backend}")
    before, expected = _readable(step), _expected(step)
    try:
        way(step, backend, like)
    except REFUSALS as error:
        refusal = str(error)
    else:
        if expected is not None:
            _compare(step, expected)
        return
    check_message(refusal)
    after = _readable(step)
    assert before.keys() == after.keys(), "what can be read has changed"
    for name, bits in before.items():
        assert torch.equal(bits, after[name]), f"refused ({refusal}), but {name} has changed"


def check_message(message):
    """A message is there, and is for the user."""
    assert message.strip(), "an error without a message"
    assert "INTERNAL ASSERT" not in message, f"a message for nobody: {message}"


def _readable(step):
    """The bytes of all tensors of a step that can be read, by their places."""
    found = {}
    for place, tensor in _tensors(step):
        if _has_memory(tensor):
            numbers = tensor.detach().as_subclass(torch.Tensor).resolve_neg().resolve_conj()
            found[place] = torch.cat([numbers.reshape(-1)]).view(torch.uint8)
    return found


def _tensors(step):
    """The tensors among the arguments, with their places."""
    for field, value in zip(step._fields, step, strict=True):
        for index, each in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(each, torch.Tensor):
                yield (field, index), each


def _has_memory(tensor):
    """Whether the tensor is one of numbers in memory; PyTorch itself reads beyond a storage that has shrunk."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return needed <= tensor.untyped_storage().nbytes()


def _expected(step):
    """What the step shall come to in float64; None where it is not a step, or not of finite numbers."""
    if not all(_has_memory(tensor) or tensor._is_zerotensor() for _, tensor in _tensors(step)):
        return None
    try:
        plain = step._replace(
            parameters=[p.detach().clone() for p in step.parameters],
            state=[s.detach().clone() for s in step.state],
            gradients=[
                torch.zeros_like(p) if g is None or g.shape == (0,) != p.shape else g.detach().clone()
                for p, g in zip(step.parameters, step.gradients, strict=True)
            ],
        )
        if not all(0 <= each < step.num_agents for each in step.neighbor.tolist()):
            return None
        results = combined_in_float64(plain, [None] * step.num_agents)
    except Exception:
        return None
    return results if all((each.abs() < 1e30).all() for each in results) else None


def _compare(step, expected):
    limit = max(MAX_ERROR[step.parameters[0].dtype], MAX_ERROR[step.state[0].dtype] if step.state else 0.0)
    for place, (rows, truth) in enumerate(zip(rows_of(step), expected, strict=True)):
        if truth.numel():
            error = float((rows.detach().double() - truth).abs().max() / truth.abs().max().clamp(min=1.0))
            assert error <= limit, f"output {place} is off by {error:.1e}"


if cpu.why_missing is not None:
    BACKENDS.remove("cpu")
