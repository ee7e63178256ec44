"""Tensors whose numbers are not what lies in their memory: resolved or refused on every way in, and nothing changed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gut_fast as gf
from gut_fast.kernels import ops
from gut_fast.kernels.backends import cpu
from gut_fast.kernels.step import GossipStep
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded

N, COLUMNS = 4, (6, 3)
RING = gf.topology.ring(N).csr(0)
FAKE = FakeTensorMode()


def a_step(rule="gutm"):
    """A step whose parameters are views of one buffer, and whose gradients are not."""
    table = RULES[rule]
    coefficients = torch.tensor(table.coefficients(0.1).flat(), dtype=torch.float64)
    flat = seeded(N * sum(COLUMNS) + 2, seed=1, dtype=torch.float32)[2:]
    parameters = [part.view(N, -1) for part in flat.split([N * columns for columns in COLUMNS])]
    state = [seeded(N * sum(COLUMNS), seed=2 + k, dtype=torch.float32) for k in range(len(table.states))]
    gradients = [seeded(N, columns, seed=9, dtype=torch.float32) for columns in COLUMNS]
    return GossipStep(parameters, state, gradients, coefficients, table.num_messages, *RING, None)


def in_one(step, backend):
    ops.gossip_step_(*step, backend)


def prepared(step, backend):
    ops.prepare(step, backend)()


def as_op(step, backend):
    gradients = [torch.zeros(0) if gradient is None else gradient for gradient in step.gradients]
    torch.ops.gut_fast.gossip_step_(*step._replace(gradients=gradients), backend)


def in_halves(step, backend, first=ops.message, second=ops.combine_):
    rows = [torch.zeros(sum(COLUMNS) * step.num_messages) for _ in range(N)]
    first(step, rows, backend)
    second(step, rows, backend)
    return rows


def message_alone(step, backend):
    return in_halves(step, backend, second=lambda *_: None)


def combine_alone(step, backend):
    return in_halves(step, backend, first=lambda *_: None)


WAYS = {"step": in_one, "prepared": prepared, "op": as_op, "message": message_alone, "combine": combine_alone}
BACKENDS = ["auto", "torch"]
each_way = pytest.mark.parametrize("way", WAYS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Named(torch.Tensor):
    """A subclass that computes as PyTorch does."""


def negated(gradient):
    return torch._neg_view(-gradient)


def conjugated(gradient):
    """The imaginary part of a conjugate, as autograd makes it: negated lazily, with strides of two."""
    return torch.complex(torch.zeros_like(gradient), -gradient).conj().imag


RESOLVED = {
    "negated": negated,
    "conjugate": conjugated,
    "strided": lambda gradient: gradient.t().contiguous().t(),
    "inference": lambda gradient: gradient + 0,
    "a subclass": lambda gradient: gradient.clone().as_subclass(Named),
}


@each_backend
@each_way
@pytest.mark.parametrize("kind", RESOLVED)
def test_gradients_are_resolved(kind, way, backend):
    plain, other = a_step(), a_step()
    with torch.inference_mode(kind == "inference"):
        gradients = [RESOLVED[kind](gradient) for gradient in other.gradients]
    rows = [WAYS[way](step, backend) for step in (plain, other._replace(gradients=gradients))]
    for mine, theirs in zip([*plain.parameters, *plain.state], [*other.parameters, *other.state], strict=True):
        assert torch.equal(mine, theirs)
    assert rows[0] is None or all(map(torch.equal, *rows))


def of_one_memory(step):
    shared = step.gradients[0].clone()
    return [shared, shared[:, :3]]


WITHOUT_THEIR_OWN_MEMORY = {
    "zero": lambda step: [torch._efficientzerotensor(parameter.shape) for parameter in step.parameters],
    "their parameters": lambda step: [parameter.detach() for parameter in step.parameters],
    "each other's": of_one_memory,
}


@each_backend
@each_way
@pytest.mark.parametrize("kind", WITHOUT_THEIR_OWN_MEMORY)
def test_gradients_without_memory_of_their_own_are_resolved(kind, way, backend):
    plain, other = (step._replace(gradients=WITHOUT_THEIR_OWN_MEMORY[kind](step)) for step in (a_step(), a_step()))
    plain = plain._replace(gradients=[torch.zeros_like(gradient).add(gradient) for gradient in plain.gradients])
    rows = [WAYS[way](step, backend) for step in (plain, other)]
    assert all(map(torch.equal, [*plain.parameters, *plain.state], [*other.parameters, *other.state]))
    assert rows[0] is None or all(map(torch.equal, *rows))


def freed(tensor):
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def freed_view(tensor):
    """A view that does not begin where its storage did: its address is not null."""
    copy = torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].view(tensor.shape)
    copy.untyped_storage().resize_(0)
    return copy


def shrunk(tensor):
    copy = tensor.clone()
    copy.untyped_storage().resize_(8)
    return copy


def shrunk_view(tensor):
    """A view at the end of a storage that has shrunk, but has more bytes than the view still."""
    copy = torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].view(tensor.shape)
    copy.untyped_storage().resize_(copy.nbytes + 4)
    return copy


def made_in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


REFUSED = {
    "freed": (freed, "has no memory"),
    "a freed view": (freed_view, "has no memory"),
    "shrunk": (shrunk, "has no memory"),
    "a shrunk view": (shrunk_view, "has no memory"),
    "negated": (torch._neg_view, "lazily negated"),
    "zero": (lambda tensor: torch._efficientzerotensor(tensor.shape), "lazily negated or zero"),
    "inference": (made_in_inference_mode, "inference mode"),
}
ALLOWED = {("gradients", "negated"), ("gradients", "zero"), ("gradients", "inference")}


@each_backend
@each_way
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("field", ["parameters", "state", "gradients"])
def test_refused_before_anything_changes(field, kind, way, backend):
    if (field, kind) in ALLOWED:
        return
    make, message = REFUSED[kind]
    step = a_step()
    tensors = [*step.parameters, *step.state]
    before = [tensor.clone() for tensor in tensors]
    replaced = [*getattr(step, field)[:-1], make(getattr(step, field)[-1])]
    with pytest.raises((ValueError, RuntimeError), match=None if way == "op" else message):  # or PyTorch refuses
        WAYS[way](step._replace(**{field: replaced}), backend)
    assert all(map(torch.equal, tensors, before))


OVERLAPS = {
    "one state twice": lambda step: step._replace(state=[step.state[0], step.state[0]]),
    "a parameter twice": lambda step: step._replace(
        parameters=[step.parameters[0]] * 2, gradients=[step.gradients[0]] * 2, state=[torch.zeros(2 * N * 6)]
    ),
    "parameters that overlap": lambda step: step._replace(
        parameters=[step.parameters[0], step.parameters[0].view(-1)[12:].view(N, 3)]
    ),
    "a gradient over its parameter": lambda step: step._replace(
        gradients=[step.parameters[0].as_strided((N, 6), (6, 1), step.parameters[0].storage_offset() - 1), None]
    ),
    "a gradient that is another parameter": lambda step: step._replace(gradients=[None, step.parameters[0][:, :3]]),
    "a gradient in the state": lambda step: step._replace(gradients=[step.state[0][: N * 6].view(N, 6), None]),
}


@each_backend
@each_way
@pytest.mark.parametrize("kind", OVERLAPS)
def test_memory_that_a_step_changes_is_nobody_elses(kind, way, backend):
    step = OVERLAPS[kind](a_step("gut" if kind == "a parameter twice" else "gutm"))
    before = [tensor.clone() for tensor in (*step.parameters, *step.state)]
    with pytest.raises(ValueError, match="share memory"):
        WAYS[way](step, backend)
    assert all(map(torch.equal, [*step.parameters, *step.state], before))


@each_backend
@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("field", ["parameters", "state", "gradients"])
def test_memory_that_goes_between_steps_is_missed(field, size, backend):
    step = a_step()._replace(parameters=[seeded(N, columns, seed=1, dtype=torch.float32) for columns in COLUMNS])
    in_one(step, backend)
    getattr(step, field)[-1].untyped_storage().resize_(size)
    before = step.parameters[0].clone()
    with pytest.raises(ValueError, match="has no memory"):
        in_one(step, backend)
    assert torch.equal(step.parameters[0], before)


@each_backend
def test_memory_of_a_tensor_in_another_ones_place_is_missed(backend):
    """What a step has seen says nothing about the tensor that Python and malloc put there next."""
    for columns in (6, 64, 1000):
        step = a_step("gut")._replace(parameters=[torch.zeros(N, columns)], state=[torch.zeros(N * columns)])
        for _ in range(50):
            in_one(step._replace(gradients=[torch.zeros(N, columns)]), backend)
            shrinking = torch.zeros(N, columns)
            for size in (3 * N * columns, 2 * N * columns, 3 * N * columns):
                shrinking.untyped_storage().resize_(size)
                with pytest.raises(ValueError, match="has no memory"):
                    in_one(step._replace(gradients=[shrinking]), backend)
            del shrinking


BAD_ROWS = {
    "freed": (freed, "has no memory"),
    "shrunk": (shrunk, "has no memory"),
    "a shrunk view": (shrunk_view, "has no memory"),
    "negated": (torch._neg_view, "lazily negated"),
    "fake": (FAKE.from_tensor, "FakeTensor"),
}


@each_backend
@pytest.mark.parametrize("half", [ops.message, ops.combine_])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rows_are_refused(kind, half, backend):
    make, message = BAD_ROWS[kind]
    step = a_step()
    rows = [torch.zeros(9) for _ in range(N)]
    before = [tensor.clone() for tensor in (*step.parameters, *step.state)]
    with pytest.raises((TypeError, ValueError), match=message):
        half(step, [*rows[:-1], make(rows[-1])], backend)
    with pytest.raises(ValueError, match="share memory"):
        half(step, [*rows[:-1], step.state[0][:9]], backend)
    assert all(map(torch.equal, [*step.parameters, *step.state], before))
    assert not torch.cat(rows).any()


@each_backend
@pytest.mark.parametrize("field", ["parameters", "gradients", "state"])
def test_fake_tensors_have_no_halves(field, backend):
    step = a_step()
    fakes = step._replace(**{field: [FAKE.from_tensor(tensor) for tensor in getattr(step, field)]})
    for way in (message_alone, combine_alone):
        with pytest.raises(TypeError, match="FakeTensor"):
            way(fakes, backend)


@each_backend
def test_a_step_of_fake_tensors_does_nothing(backend):
    step = a_step()
    fakes = [[FAKE.from_tensor(tensor) for tensor in tensors] for tensors in step[:3]]
    others = {
        name: FAKE.from_tensor(getattr(step, name)) for name in ("coefficients", "row_start", "neighbor", "weight")
    }
    with FAKE:
        in_one(GossipStep(*fakes, *step[3:])._replace(**others), backend)


TRANSFORMS = {
    "vmap": lambda function, tensor: torch.vmap(function)(tensor[None]),
    "grad": lambda function, tensor: torch.func.grad(lambda x: function(x).sum())(tensor),
    "functionalize": lambda function, tensor: torch.func.functionalize(function)(tensor),
}


@each_backend
@pytest.mark.parametrize("way", [way for way in WAYS if way != "op"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("field", ["parameters", "gradients"])
def test_tensors_of_a_transform_are_refused(field, transform, way, backend):
    step = a_step()
    before = [tensor.clone() for tensor in (*step.parameters, *step.state)]

    def take(tensor):
        WAYS[way](step._replace(**{field: [tensor, *getattr(step, field)[1:]]}), backend)
        return tensor

    with pytest.raises(TypeError, match="belongs to a transform"):
        TRANSFORMS[transform](take, getattr(step, field)[0].clone())
    assert all(map(torch.equal, [*step.parameters, *step.state], before))


def test_what_is_read_directly():
    readers = [cpu._reader, cpu._core.TensorReader(torch, through_dlpack=False)]
    assert [reader.reads_dlpack for reader in readers] == [True, False]
    step = a_step()
    for reader in readers:
        assert reader.read(step) is not None
        for kind, make in RESOLVED.items():
            gradients = [make(gradient) for gradient in step.gradients]
            assert (reader.read(step._replace(gradients=gradients)) is None) == (kind != "inference")
        for make, _ in REFUSED.values():
            assert reader.read(step._replace(state=[step.state[0], make(step.state[1])])) is None
        for overlap in OVERLAPS.values():
            assert reader.read(overlap(step)) is None


@each_backend
def test_an_optimizer_refuses_parameters_whose_data_was_made_in_inference_mode(backend):
    parameter = torch.nn.Parameter(torch.zeros(N, 2))
    optimizer = gf.GUT([parameter], lr=0.1, topology=gf.topology.ring(N), backend=backend)
    parameter.grad = torch.ones(N, 2)
    optimizer.step()
    with torch.inference_mode():
        parameter.data = torch.ones(N, 2)
    before = optimizer.state[parameter]["r"].clone()
    with pytest.raises(ValueError, match="inference mode"):
        optimizer.step()
    assert bool((parameter == 1).all())
    assert torch.equal(optimizer.state[parameter]["r"], before)
    assert optimizer.num_steps == 1
