"""Agents' modules in ordinary training loops: in any order, and whoever zeroes, their gradients are the stack's."""

import copy
import io
import pickle
import threading
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import copies
import gut_fast as gf

NUM_AGENTS = 3
RING = gf.topology.ring(NUM_AGENTS)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def batches(steps=3):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, NUM_AGENTS, 6, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs, torch.randint(0, 4, (steps, NUM_AGENTS, 6), generator=generator), strict=True))


def trained_by_formula(steps=3):
    """The parameters after some steps of GUT, each gradient by plain autograd and each step by the reference."""
    rule, hyper = gf.rules.get_rule("gut"), {"lr": 0.1, "mu": 0.5}
    weights = torch.as_tensor(RING.matrix(), dtype=torch.float64)
    model = make()
    z = torch.stack([parameters_to_vector(model.parameters()).detach()] * NUM_AGENTS)
    state = {"r": torch.zeros_like(z)}
    for inputs, targets in batches(steps):
        gradients = []
        for i in range(NUM_AGENTS):
            vector_to_parameters(z[i].clone(), model.parameters())
            loss = cross_entropy(model(inputs[i]), targets[i])
            gradients.append(parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))))
        z, state = gf.reference.step(rule, hyper, z, state, torch.stack(gradients), weights)
    return z


def vectors(agents):
    return torch.cat([parameter.detach().flatten(1) for parameter in agents.parameters()], 1)


def new(**options):
    agents = gf.stack(make(), NUM_AGENTS)
    return agents, gf.GUT(agents.parameters(), lr=0.1, mu=0.5, topology=RING, **options)


def assert_trained(agents, steps=3):
    torch.testing.assert_close(vectors(agents), trained_by_formula(steps), rtol=1e-9, atol=1e-11)


def zero_by_optimizer(agents, optimizer, none):
    optimizer.zero_grad(set_to_none=none)


def zero_by_stack(agents, optimizer, none):
    agents.zero_grad(set_to_none=none)


def zero_by_agents(agents, optimizer, none):
    for i in range(NUM_AGENTS):
        agents.agent(i).zero_grad(set_to_none=none)


def zero_by_cached_agents(agents, optimizer, none):
    for module in agents.cached:
        module.zero_grad(set_to_none=none)


def zero_by_hand(agents, optimizer, none):
    for parameter in agents.parameters():
        parameter.grad = None if none else torch.zeros_like(parameter)


ZEROING = [zero_by_optimizer, zero_by_stack, zero_by_agents, zero_by_cached_agents, zero_by_hand]
ORDERS = ["zero first", "zero after forward", "zero last"]
ways = pytest.mark.parametrize(("order", "zero", "none"), list(product(ORDERS, ZEROING, [True, False])))


@ways
@pytest.mark.parametrize("cached", [True, False])
def test_any_order_of_zeroing_forward_and_backward_trains(order, zero, none, cached):
    agents, optimizer = new()
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    object.__setattr__(agents, "cached", modules)
    for inputs, targets in batches():
        if order == "zero first":
            zero(agents, optimizer, none)
        loss = 0
        for i in range(NUM_AGENTS):
            module = modules[i] if cached else agents.agent(i)
            loss = loss + cross_entropy(module(inputs[i]), targets[i])
        if order == "zero after forward":
            zero(agents, optimizer, none)
        loss.backward()
        for i, module in enumerate(modules):
            assert torch.equal(module[0].weight.grad, agents.get_submodule("0").weight.grad[i])
        optimizer.step()
        if order == "zero last":
            zero(agents, optimizer, none)
    assert_trained(agents)
    assert all(torch.equal(module[0].weight, agents.get_submodule("0").weight[i]) for i, module in enumerate(modules))


@ways
def test_the_forward_pass_of_all_agents_trains(order, zero, none):
    agents, optimizer = new()
    object.__setattr__(agents, "cached", [agents.agent(i) for i in range(NUM_AGENTS)])
    for inputs, targets in batches():
        if order == "zero first":
            zero(agents, optimizer, none)
        outputs = agents(inputs)
        assert outputs.shape == (NUM_AGENTS, 6, 4)
        loss = cross_entropy(outputs.flatten(0, 1), targets.flatten()) * NUM_AGENTS
        if order == "zero after forward":
            zero(agents, optimizer, none)
        loss.backward()
        optimizer.step()
        if order == "zero last":
            zero(agents, optimizer, none)
    assert_trained(agents)


def test_both_ways_mixed_in_one_step_add_up():
    agents, optimizer = new()
    (inputs, targets), *_ = batches()
    for first in (True, False):
        optimizer.zero_grad()
        ways = [
            lambda: cross_entropy(agents(inputs).flatten(0, 1), targets.flatten()) * NUM_AGENTS,
            lambda: sum(cross_entropy(agents.agent(i)(inputs[i]), targets[i]) for i in range(NUM_AGENTS)),
        ]
        (ways if first else ways[::-1])[0]().backward()
        once = [parameter.grad.clone() for parameter in agents.parameters()]
        (ways if first else ways[::-1])[1]().backward()
        for parameter, single in zip(agents.parameters(), once, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * single, rtol=1e-9, atol=1e-12)
        agents.follow_agents()
        assert torch.equal(agents.agent(2)[0].bias.grad, agents.parameters()[1].grad[2])


def test_accumulation_closures_and_activation_checkpoints():
    agents, optimizer = new()
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    for inputs, targets in batches():

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            for half in (slice(0, 3), slice(3, 6)):
                for module, x, y in zip(modules, inputs, targets, strict=True):
                    outputs = checkpoint(module, x[half], use_reentrant=False)
                    (cross_entropy(outputs, y[half]) / 2).backward()
            return 0.0

        optimizer.step(closure)
    assert_trained(agents)


def test_threads_each_with_agents_of_its_own():
    agents, optimizer = new()
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    for inputs, targets in batches():
        optimizer.zero_grad()
        jobs = [
            threading.Thread(target=lambda m=m, x=x, y=y: cross_entropy(m(x), y).backward())
            for m, x, y in zip(modules, inputs, targets, strict=True)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        optimizer.step()
    assert_trained(agents)


def test_any_optimizer_of_torch_sees_the_gradients_of_agents():
    agents = gf.stack(make(), NUM_AGENTS)
    optimizer = torch.optim.SGD(agents.parameters(), 0.1)
    plain = [make() for _ in range(NUM_AGENTS)]
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    for inputs, targets in batches():
        optimizer.zero_grad()
        for i, module in enumerate(modules):
            cross_entropy(module(inputs[i]), targets[i]).backward()
        optimizer.step()
        for i, module in enumerate(plain):
            module.zero_grad()
            cross_entropy(module(inputs[i]), targets[i]).backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
    expected = torch.stack([parameters_to_vector(module.parameters()) for module in plain])
    torch.testing.assert_close(vectors(agents), expected.detach(), rtol=1e-10, atol=1e-12)


def test_a_gradient_that_an_agent_was_given_counts():
    agents, optimizer = new()
    module = agents.agent(1)
    module[0].bias.grad = torch.full_like(module[0].bias, 3.0)
    optimizer.step()
    assert agents.parameters()[1].grad.tolist() == [[0] * 5, [3] * 5, [0] * 5]
    module[0].bias.grad = module[0].bias.grad * 2  # as a mask is applied
    agents.agent(0)[0].bias.grad = None  # as is a gradient that was zero already
    agents.follow_agents()
    assert agents.parameters()[1].grad.tolist() == [[0] * 5, [6] * 5, [0] * 5]
    module.zero_grad()
    optimizer.step()
    assert agents.parameters()[1].grad.eq(0).all()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_with_a_graph_of_its_own():
    agents, optimizer = new()
    (inputs, targets), *_ = batches()
    for i in range(NUM_AGENTS):
        cross_entropy(agents.agent(i)(inputs[i]), targets[i]).backward(create_graph=True)
        cross_entropy(agents.agent(i)(inputs[i]), targets[i]).backward(create_graph=True)
    agents.follow_agents()
    plain = make()
    cross_entropy(plain(inputs[1]), targets[1]).backward()
    torch.testing.assert_close(agents.parameters()[0].grad[1], 2 * plain[0].weight.grad, rtol=1e-10, atol=1e-12)
    optimizer.step()


def both_ways(module):
    module.bfloat16().to(torch.float64)


def new_parameter(module):
    module[0].weight = nn.Parameter(torch.full_like(module[0].weight, 0.25))


def new_memory(module):
    module[0].weight.data = torch.full_like(module[0].weight, 0.5)


CHANGES = {
    "load_state_dict": lambda module: module.load_state_dict(make().state_dict()),
    "assigned": lambda module: module.load_state_dict(make().state_dict(), assign=True),
    "vector": lambda module: vector_to_parameters(torch.ones(49, dtype=torch.float64), module.parameters()),
    "dtypes": both_ways,
    "parameter": new_parameter,
    "memory": new_memory,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("asked_again", [True, False])
def test_what_is_put_into_an_agent_goes_on_to_train_in_the_stack(change, asked_again):
    agents, optimizer = new()
    with torch.no_grad():
        agents.values += 1
    modules, plain = [agents.agent(i) for i in range(NUM_AGENTS)], agents.average()
    change(modules[1])
    change(plain)
    expected = parameters_to_vector(plain.parameters()).detach()
    (inputs, targets), *_ = batches()
    for i, module in enumerate(modules):
        asked = agents.agent(i) if asked_again else module
        cross_entropy(asked(inputs[i]), targets[i]).backward()
    cross_entropy(plain(inputs[1]), targets[1]).backward()
    agents.follow_agents()
    torch.testing.assert_close(vectors(agents)[1], expected, rtol=0, atol=0)
    torch.testing.assert_close(agents.parameters()[0].grad[1], plain[0].weight.grad, rtol=1e-9, atol=1e-12)
    optimizer.step()
    for name, parameter in modules[1].named_parameters():
        assert torch.equal(parameter, dict(agents.named_parameters())[name][1])


@pytest.mark.parametrize(
    "use",
    [
        lambda agents, optimizer, module: agents.agent(1),
        lambda agents, optimizer, module: optimizer.step(),
        lambda agents, optimizer, module: module(torch.ones(2, 4)).sum().backward(),
    ],
)
def test_an_agent_of_another_dtype_is_refused(use):
    agents, optimizer = new()
    module = agents.agent(1).float()
    with pytest.raises(RuntimeError, match=r"agent 1's .* has become .*float32 on cpu, but the agents' are .*64"):
        use(agents, optimizer, module)
    module.double()
    agents.agent(1)
    optimizer.step()


def test_a_parameter_that_an_agent_has_lost_is_refused():
    agents, optimizer = new()
    agents.agent(1)[0].bias = None
    with pytest.raises(RuntimeError, match=r"agent 1's 0.bias has been replaced by None"):
        optimizer.step()


STACK_CHANGES = {
    "memory": lambda agents: [setattr(each, "data", each.data + 1) for each in agents.parameters()],
    "vector": lambda agents: vector_to_parameters(parameters_to_vector(agents.parameters()) + 1, agents.parameters()),
    "assigned": lambda agents: agents.load_state_dict(
        {name: tensor + 1 for name, tensor in agents.state_dict().items()}, assign=True
    ),
    "parent": lambda agents: nn.ModuleDict({"a": agents}).load_state_dict(
        {f"a.{name}": tensor + 1 for name, tensor in agents.state_dict().items()}, assign=True
    ),
    "values": lambda agents: agents.values.add_(1),
    "shared": lambda agents: agents.share_memory().values.add_(1),
}


@pytest.mark.parametrize("change", STACK_CHANGES.values(), ids=STACK_CHANGES)
def test_what_is_put_into_the_stack_reaches_agents_and_optimizer(change):
    agents, optimizer = new()
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    parameters = agents.parameters()
    with torch.no_grad():
        expected = vectors(agents) + 1
        change(agents)
    agents.follow_agents()
    assert all(a is b for a, b in zip(agents.parameters(), parameters, strict=True))
    assert torch.equal(vectors(agents), expected)
    assert torch.equal(agents.values[:60], agents.parameters()[0].flatten())
    assert torch.equal(parameters_to_vector(modules[2].parameters()), expected[2])
    modules[2](torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert not torch.equal(vectors(agents), expected)
    assert torch.equal(modules[0][0].weight, agents.parameters()[0][0])


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("asked_for", [True, False])
def test_a_parameter_that_is_put_into_the_stack_moves_in_with_its_gradient(optimizer_first, asked_for):
    (agents, first), (expected, second) = new(), new()
    expected.requires_grad_(False).parameters()[0].requires_grad_(True)
    values = torch.randn_like(expected.parameters()[0])
    with torch.no_grad():
        expected.parameters()[0].copy_(values)
    if asked_for:
        agents.agent(1)
    agents.requires_grad_(False)
    agents.get_submodule("0").weight = nn.Parameter(values.clone())
    if not optimizer_first:
        first = gf.GUT(agents.parameters(), lr=0.1, mu=0.5, topology=RING)
    for inputs, targets in batches():
        for each, optimizer in ((agents, first), (expected, second)):
            optimizer.zero_grad()
            cross_entropy(each(inputs).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
    assert not torch.equal(agents.parameters()[0], values)
    assert torch.equal(vectors(agents), vectors(expected))
    assert torch.equal(agents.agent(1)[0].weight, expected.parameters()[0][1])


def tied(agents):
    agents.get_submodule("0").weight = agents.get_submodule("1").weight


def with_another_module(agents):
    agents.register_module("1", nn.Linear(NUM_AGENTS, NUM_AGENTS))


def with_another_parameter(agents):
    agents.register_parameter("scale", nn.Parameter(torch.ones(NUM_AGENTS, 4)))


def with_another_shape(agents):
    agents.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tied, r"0.weight of the stacked module has become its 1.weight; share them in the plain module, then stack"),
        (with_another_module, r"1.weight is new in the stacked module.*change the plain module, then stack it"),
        (with_another_parameter, r"scale is new in the stacked module"),
        (with_another_shape, r"0.weight of the stacked module has become \(4, 4\) on cpu, expected \(3, 4, 4\)"),
    ],
)
def test_what_cannot_be_put_into_the_stack_is_refused(change, message):
    agents = gf.stack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), NUM_AGENTS)
    optimizer = gf.GUT(agents.parameters(), lr=0.1, mu=0.5, topology=RING)
    change(agents)
    for use in (agents.parameters, agents.zero_grad, optimizer.step, lambda: agents.agent(1)):
        with pytest.raises(RuntimeError, match=message):
            use()
    if change is not tied:  # whose forward pass is that of the tied module
        with pytest.raises(RuntimeError, match=message):
            agents(torch.ones(NUM_AGENTS, 2, 4))


@pytest.mark.parametrize("call", [lambda f: f, partial(torch.compile, backend="aot_eager", fullgraph=True)])
@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("kind", [torch.clone, nn.Parameter])
def test_a_functional_call_computes_with_the_given_parameters(call, asked_for, kind):
    if asked_for and isinstance(call, partial):
        call = partial(torch.compile, backend="aot_eager")
    agents, _ = new()
    before, (inputs, _) = vectors(agents), batches()[0]
    agents(inputs)
    if asked_for:
        agents.agent(1)
    given = {name: kind(torch.randn_like(tensor)) for name, tensor in agents.named_parameters()}
    outputs = call(lambda given: functional_call(agents, given, (inputs,)))(given)
    gradients = torch.func.grad(lambda given: functional_call(agents, given, (inputs,)).square().sum())(given)
    plain = make()
    for i in range(NUM_AGENTS):
        rows = {name: tensor[i].detach() for name, tensor in given.items()}
        torch.testing.assert_close(outputs[i], functional_call(plain, rows, (inputs[i],)))
        expected = torch.func.grad(lambda rows, i=i: functional_call(plain, rows, (inputs[i],)).square().sum())(rows)
        torch.testing.assert_close({name: gradient[i] for name, gradient in gradients.items()}, expected)
    assert torch.equal(vectors(agents), before)


def test_a_lent_tensor_is_not_moved_into_the_stack():
    class Regularised(nn.Module):
        def __init__(self):
            super().__init__()
            self.agents = gf.stack(make(), NUM_AGENTS)

        def forward(self, inputs):
            return self.agents.agent(1)(inputs[1])

    module, (inputs, _) = Regularised(), batches()[0]
    before = vectors(module.agents)
    given = {name: torch.zeros_like(tensor) for name, tensor in module.named_parameters()}
    with pytest.raises(RuntimeError, match=r"0.weight of the stacked module is lent.* only agents\(...\) computes"):
        functional_call(module, given, (inputs,))
    assert torch.equal(vectors(module.agents), before)


def test_one_stacked_parameter_of_another_dtype_is_refused():
    agents, optimizer = new()
    agents.agent(0)
    agents.get_submodule("2").float()
    with pytest.raises(RuntimeError, match=r"2.weight of the stacked module is now torch.float32 on cpu, but 0.weight"):
        optimizer.step()


def test_the_stack_converted_takes_agents_along():
    agents = gf.stack(make(), NUM_AGENTS)
    module = agents.agent(1)
    module(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    agents.to(torch.float32)
    assert agents.agent(1) is module
    assert module[0].weight.dtype == module[0].weight.grad.dtype == agents.values.dtype == torch.float32
    assert torch.equal(module[0].weight.grad, agents.parameters()[0].grad[1])
    optimizer = gf.DSGD(agents.parameters(), lr=0.1, topology=RING)
    before = agents.values.clone()
    optimizer.zero_grad()
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(agents.values, before)


def test_the_stack_is_converted_before_any_agent_is_asked_for():
    agents = gf.stack(make(), NUM_AGENTS).to(torch.float32)
    optimizer = gf.DSGD(agents.parameters(), lr=0.1, topology=RING)
    before = agents.values.clone()
    agents(torch.ones(NUM_AGENTS, 2, 4)).sum().backward()
    optimizer.step()
    assert agents.values.dtype == torch.float32
    assert not torch.equal(agents.values, before)


def test_a_state_that_is_assigned_may_have_another_dtype():
    agents, _ = new()
    module = agents.agent(1)
    state = {name: tensor.float() + 1 for name, tensor in agents.state_dict().items()}
    agents.load_state_dict(state, assign=True)
    assert agents.values.dtype == module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, state["0.weight"][1])
    before = agents.values.clone()
    some = {name: tensor.half() for name, tensor in list(state.items())[1:]}
    with pytest.raises(RuntimeError, match=r"0.bias of the stacked module is now torch.float16 on cpu, but 0.weight"):
        agents.load_state_dict(some, strict=False, assign=True)
    assert torch.equal(agents.values, before)
    agents(torch.ones(NUM_AGENTS, 2, 4))


@pytest.mark.parametrize("duplicate", copies.WAYS)
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_copies_of_agents_with_their_optimizer_train(duplicate, optimizer_first):
    agents, optimizer = new()
    run(agents, optimizer, batches()[:1])
    if optimizer_first:
        other_optimizer, other = duplicate((optimizer, agents))
    else:
        other, other_optimizer = duplicate((agents, optimizer))
    before = vectors(agents)
    run(other, other_optimizer, batches()[1:])
    assert_trained(other)
    assert torch.equal(vectors(agents), before)
    run(agents, optimizer, batches()[1:])
    assert_trained(agents)


def run(agents, optimizer, batches):
    for inputs, targets in batches:
        optimizer.zero_grad()
        for i in range(NUM_AGENTS):
            cross_entropy(agents.agent(i)(inputs[i]), targets[i]).backward()
        optimizer.step()


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write(pickle.dumps(value))])
@pytest.mark.parametrize("what", ["agent", "state", "parameter", "stacked parameter"])
def test_a_part_saved_alone_has_its_own_size(save, what):
    agents = gf.stack(nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10)), 50)
    module = agents.agent(3)
    module(torch.ones(2, 100)).sum().backward()
    values, least = {
        "agent": (module, 4 * 11410),
        "state": (module.state_dict(), 4 * 11410),
        "parameter": (module[0].bias, 400),
        "stacked parameter": (agents.parameters()[1], 50 * 400),
    }[what]
    file = io.BytesIO()
    save(values, file)
    assert least < file.tell() < least + 6000


def test_hooks_on_parameters_are_kept_agent_by_agent():
    module = make()
    mask = torch.zeros(5, 4, dtype=torch.float64)
    mask[0] = 1
    shapes = []
    module[0].weight.register_hook(lambda gradient: shapes.append(gradient.shape) or gradient * mask)
    module[2].weight.requires_grad_(False)
    agents = gf.stack(module, NUM_AGENTS)
    (inputs, _), *_ = batches()
    agents.agent(1)
    for duplicate in (agents, copy.deepcopy(agents), agents.part(range(3))):
        for compute in (lambda a: a(inputs).sum(), lambda a: sum(a.agent(i)(inputs[i]).sum() for i in range(3))):
            duplicate.zero_grad()
            compute(duplicate).backward()
            gradient = duplicate.parameters()[0].grad
            assert gradient[:, 1:].eq(0).all()
            assert gradient[:, 0].ne(0).any()
    assert set(shapes) == {(5, 4)}
    with pytest.warns(UserWarning, match="hooks of 0.weight are not saved"):
        pickle.dumps(agents)
    module[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.warns(UserWarning, match="not kept: those of 0.weight"):
        gf.stack(module, 2)


def test_freezing_the_stack_freezes_agents_and_back():
    agents, optimizer = new()
    modules = [agents.agent(i) for i in range(NUM_AGENTS)]
    (inputs, targets), *_ = batches()
    weight = agents.parameters()[0]
    for trained in (False, True):
        weight.requires_grad_(trained)
        optimizer.zero_grad()
        agents.follow_agents()
        for i, module in enumerate(modules):
            cross_entropy(module(inputs[i]), targets[i]).backward()
        mean = weight.detach().mean(0)
        optimizer.step()
        assert (weight.grad is not None) == trained
        assert torch.equal(weight.detach().mean(0), mean) != trained
    modules[1][0].weight.requires_grad_(False)
    agents.agent(1)
    optimizer.zero_grad()
    for i, module in enumerate(modules):
        cross_entropy(module(inputs[i]), targets[i]).backward()
    assert weight.grad[1].eq(0).all()
    assert weight.grad[0].ne(0).any()


class Heads(nn.Module):
    """A model of two inputs, one by name, and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(5, 1)})

    def forward(self, inputs, *, scale, name="out"):
        hidden = torch.tanh(self.body(inputs["x"])) * scale
        return {key: head(hidden) for key, head in self.heads.items()}, name


def test_arguments_and_outputs_of_any_structure():
    agents = gf.stack(Heads().double(), NUM_AGENTS)
    x, scale = torch.randn(NUM_AGENTS, 6, 4, dtype=torch.float64), torch.rand(NUM_AGENTS, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one after the other"):  # a string is nothing that vmap returns
        outputs, name = agents({"x": x}, scale=scale)
    assert name == "out"
    for i in range(NUM_AGENTS):
        expected, _ = agents.agent(i)({"x": x[i]}, scale=scale[i])
        for key in "ab":
            torch.testing.assert_close(outputs[key][i], expected[key])


class DependsOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, inputs):
        outputs = self.norm(self.linear(inputs))
        return nn.functional.dropout(outputs if outputs.sum() > 0 else -outputs, 0.5)


def test_a_module_that_vmap_cannot_take_is_computed_agent_by_agent():
    """The failed attempt leaves no trace in the random state and the buffers."""
    agents, other = (gf.stack(DependsOnValues().double(), NUM_AGENTS) for _ in range(2))
    other.load_state_dict(agents.state_dict())
    (inputs, _), *_ = batches()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="one after the other, since vmap failed with .*data-dependent") as warned:
        outputs = agents(inputs)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    torch.manual_seed(5)
    expected = torch.stack([other.agent(i)(inputs[i]) for i in range(NUM_AGENTS)])
    assert torch.equal(outputs, expected)
    for a, b in zip(agents.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    outputs.sum().backward()
    expected.sum().backward()
    for a, b in zip(agents.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agents(inputs)


@pytest.mark.parametrize("looks_in", [(True,), (False,), (True, False)])
@pytest.mark.parametrize("first", [True, False])
def test_a_module_that_looks_at_values_in_one_mode_only(looks_in, first):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, inputs):
            outputs = self.linear(inputs)
            return -outputs if self.training in looks_in and outputs.sum() > 0 else outputs

    agents, (inputs, _) = gf.stack(Looks().double(), NUM_AGENTS), batches()[0]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for training in (first, not first, first, not first):
            outputs = agents.train(training)(inputs)
            for i in range(NUM_AGENTS):
                torch.testing.assert_close(outputs[i], agents.agent(i)(inputs[i]))
    assert [str(each.message)[:40] for each in warned] == ["the agents are computed one after the ot"]


def test_buffers_and_dropout_of_the_forward_pass():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).double()
    agents, other = gf.stack(module, NUM_AGENTS), gf.stack(module, NUM_AGENTS)
    for inputs, _ in batches():
        outputs = agents(inputs[:1].expand(NUM_AGENTS, 6, 4))
        assert not torch.equal(outputs[0].eq(0), outputs[1].eq(0))
        for i in range(NUM_AGENTS):
            other.agent(i)(inputs[0])
    for (name, a), (_, b) in zip(agents.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    before = [buffer.clone() for buffer in agents.buffers()]
    agents.eval()
    torch.testing.assert_close(agents(inputs)[1], agents.agent(1)(inputs[1]))
    assert all(torch.equal(a, b) for a, b in zip(agents.buffers(), before, strict=True))


@pytest.mark.parametrize("inputs", [torch.zeros(()), torch.zeros(6, 4), torch.zeros(NUM_AGENTS + 1, 6, 4)])
def test_inputs_without_a_batch_for_each_agent(inputs):
    agents, _ = new()
    with pytest.raises(ValueError, match=r"tensors of shape \(3, batch, ...\).*got \(.*x.expand\(3, \*x.shape\)"):
        agents(inputs.double())


def test_an_error_of_the_module_itself_comes_as_it_is():
    agents, _ = new()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        agents(torch.zeros(NUM_AGENTS, 2, 7, dtype=torch.float64))


def test_it_is_a_module_of_torch():
    agents, _ = new()
    assert isinstance(agents, nn.Module)
    assert next(agents.parameters()) is agents.parameters()[0]
    assert [name for name, _ in agents.named_modules()] == ["", "0", "1", "2"]
    assert [name for name, _ in agents.named_parameters()] == [name for name, _ in make().named_parameters()]
    assert "3 agents of Sequential" in repr(agents)
    assert "(2): Linear(in_features=5, out_features=4, bias=True)" in repr(agents)
    parent = nn.ModuleDict({"agents": agents})
    assert set(parent.state_dict()) == {f"agents.{name}" for name in agents.state_dict()}
    agents.agent(1)
    assert not agents.eval().agent(1).training
    assert agents.train().agent(1)[0].training
    parent.eval()
    assert not agents.agent(1)[0].training
    seen = []
    agents.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    agents(batches()[0][0])
    assert seen == [(NUM_AGENTS, 6, 4)]
    parent.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in agents.agent(1).parameters())


def test_apply_sees_the_modules_of_agents():
    def initialise(module):
        if isinstance(module, nn.Linear):
            assert module.weight.ndim == 2
            nn.init.orthogonal_(module.weight)

    agents, _ = new()
    assert agents.apply(initialise) is agents
    weight = agents.parameters()[0].detach()
    assert not torch.equal(weight[0], weight[1])
    for row in weight:
        torch.testing.assert_close(row.T @ row, torch.eye(4, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_state_of_weights_only_and_of_averaged_models():
    agents, optimizer = new()
    file = io.BytesIO()
    torch.save(agents.state_dict(), file)
    file.seek(0)
    averaged = AveragedModel(agents)
    averaged.update_parameters(agents)
    run(agents, optimizer, batches())
    averaged.update_parameters(agents)
    assert not torch.equal(vectors(averaged.module), vectors(agents))
    assert averaged(batches()[0][0]).shape == (NUM_AGENTS, 6, 4)
    assert torch.equal(averaged.module.agent(1)[0].weight, averaged.module.parameters()[0][1])
    agents.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(vectors(agents)[0], parameters_to_vector(make().parameters()))


@pytest.mark.parametrize("none", [True, False])
def test_the_last_reference_to_agents_frees_them(none):
    import gc
    import weakref

    agents, optimizer = new()
    run(agents, optimizer, batches())
    optimizer.zero_grad(none)
    found = [weakref.ref(agents), weakref.ref(agents.agent(0)), weakref.ref(agents.agent(1)[0].weight)]
    del agents, optimizer
    gc.collect()
    assert [each() for each in found] == [None] * 3
