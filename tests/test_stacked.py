"""Stacked modules, and the engines that compute their gradients, against plain autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import copies
from gut_fast.simulation import StackedModule, consensus_error, stack
from gut_fast.simulation.engines import AutoEngine, LoopEngine, VmapEngine, make_engine
from gut_fast.simulation.objective import Supervised

OBJECTIVE = Supervised(cross_entropy)
NUM_AGENTS = 3


class Tied(nn.Module):
    """A module with one layer under two names, and a weight shared between two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs):
        return self.last(torch.tanh(self.again(torch.tanh(self.first(inputs)))))


class CountsCalls(nn.Module):
    """A module that replaces its buffers instead of changing them in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(4), persistent=False)

    def forward(self, inputs):
        self.calls = self.calls + 1
        self.largest = torch.maximum(self.largest, inputs.amax(0).detach())
        return self.linear(inputs)


class DependsOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        outputs = self.linear(nn.functional.dropout(self.norm(inputs), 0.5))
        return outputs if outputs.sum() > 0 else -outputs


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4)
    ),
    "tied": Tied,
    "layer_norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
    "replaced_buffers": CountsCalls,
}


def make(name="mlp", dtype=torch.float64):
    torch.manual_seed(0)
    return MODULES[name]().to(dtype)


def spread(stacked, seed=1):
    """Gives every agent parameters of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stacked.values += 0.3 * torch.randn(stacked.values.shape, generator=generator, dtype=stacked.values.dtype)
    return stacked


def batch(dtype=torch.float64, size=6):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(NUM_AGENTS, size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 4, (NUM_AGENTS, size), generator=generator)


def rows(stacked, i):
    return {name: tensor[i].clone() for name, tensor in stacked.state_dict().items()}


@pytest.mark.parametrize("num_agents", [1, 2, 5])
def test_parameters_are_segment_major_views_of_one_buffer(num_agents):
    module = make("batch_norm")
    stacked = stack(module, num_agents)
    offset = 0
    for (name, parameter), (own_name, own) in zip(stacked.named_parameters(), module.named_parameters(), strict=True):
        assert name == own_name
        assert isinstance(parameter, nn.Parameter)
        assert parameter.shape == (num_agents, *own.shape)
        assert parameter.is_contiguous()
        assert parameter.data_ptr() == stacked.values[offset:].data_ptr()
        assert parameter.grad is None
        assert all(torch.equal(row, own) for row in parameter)
        offset += parameter.numel()
    assert offset == stacked.values.numel() == stacked.gradients.numel()
    assert [name for name, _ in stacked.named_buffers()] == [name for name, _ in module.named_buffers()]


def test_the_original_module_is_untouched():
    module = make()
    before = copy.deepcopy(module.state_dict())
    stacked = spread(stack(module, NUM_AGENTS))
    stacked.agent(0)(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_agents_are_views_both_ways(name):
    stacked = spread(stack(make(name), NUM_AGENTS))
    for i in range(NUM_AGENTS):
        agent = stacked.agent(i)
        assert agent is stacked.agent(i)
        for parameter_name, parameter in agent.named_parameters():
            assert torch.equal(parameter, dict(stacked.named_parameters())[parameter_name][i])
        with torch.no_grad():
            next(agent.parameters()).fill_(i)
        stacked.values[-1] = 7.0
    assert all((row == i).all() for i, row in enumerate(stacked.parameters()[0]))
    assert list(stacked.agent(NUM_AGENTS - 1).parameters())[-1].flatten()[-1] == 7.0


def test_agent_out_of_range():
    stacked = stack(make(), NUM_AGENTS)
    for i in (-1, NUM_AGENTS):
        with pytest.raises(IndexError, match=rf"no agent {i}; agents are 0 … 2"):
            stacked.agent(i)


def test_backward_of_an_agent_accumulates_into_its_row():
    stacked = spread(stack(make(), NUM_AGENTS))
    inputs, targets = batch()
    stacked.gradients.fill_(float("nan"))
    twice = [1, 1, 2]
    for i in twice:
        cross_entropy(stacked.agent(i)(inputs[i]), targets[i]).backward()
    plain = stacked.average()
    for i, times in ((0, 0), (1, 2), (2, 1)):
        plain.load_state_dict(rows(stacked, i))
        plain.zero_grad()
        cross_entropy(plain(inputs[i]), targets[i]).backward()
        for parameter, own in zip(stacked.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad[i], times * own.grad, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_stay_frozen():
    module = make()
    module[0].weight.requires_grad_(False)
    stacked = stack(module, NUM_AGENTS)
    inputs, targets = batch()
    for engine in (LoopEngine(stacked, OBJECTIVE), VmapEngine(stacked, OBJECTIVE)):
        engine((inputs, targets))
        assert not stacked.parameters()[0].requires_grad
        assert stacked.parameters()[0].grad is None
        assert stacked.parameters()[1].grad.ne(0).any()


def test_average_is_a_plain_copy_with_mean_parameters_and_buffers():
    stacked = spread(stack(make("batch_norm"), NUM_AGENTS))
    buffers = dict(stacked.named_buffers())
    buffers["1.running_mean"].copy_(torch.arange(15.0).view(3, 5))
    buffers["1.num_batches_tracked"].copy_(torch.tensor([4, 5, 9]))
    average = stacked.average()
    assert type(average) is nn.Sequential
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter, dict(stacked.named_parameters())[name].mean(0), rtol=1e-14, atol=1e-15)
    assert average[1].running_mean.tolist() == [5, 6, 7, 8, 9]
    assert average[1].num_batches_tracked == 4
    before = stacked.values.clone()
    average(torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        average[0].weight.zero_()
    assert torch.equal(stacked.values, before)
    assert stacked.gradients.eq(0).all()


def test_average_of_equal_agents_is_exact_in_float32():
    module = make(dtype=torch.float32)
    average = stack(module, 7).average()
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name):
    stacked, other = spread(stack(make(name), NUM_AGENTS)), stack(make(name), NUM_AGENTS)
    other.load_state_dict(copy.deepcopy(stacked.state_dict()))
    assert torch.equal(other.values, stacked.values)
    assert other.parameters()[0].data_ptr() == other.values.data_ptr()
    for (_, a), (_, b) in zip(stacked.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.weight"), "Missing key.*0.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda state: state.update({"2.bias": torch.zeros(2, 4)}), "size mismatch for 2.bias"),
    ],
)
def test_loading_another_state_changes_nothing(change, message):
    stacked = stack(make(), NUM_AGENTS)
    before = stacked.values.clone()
    module = stacked.agent(2)
    state = {name: torch.full_like(tensor, 5.0) for name, tensor in stacked.state_dict().items()}
    change(state)
    narrow = {name: tensor.float() for name, tensor in state.items()}
    for other, assign in ((state, False), (state, True), (narrow, False), (narrow, True)):
        with pytest.raises(RuntimeError, match=message):
            stacked.load_state_dict(other, assign=assign)
        module(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        assert torch.equal(stacked.values, before)
        assert all(torch.equal(row, stacked.agent(1).state_dict()[name]) for name, row in rows(stacked, 1).items())


@pytest.mark.parametrize("name", ["batch_norm", "tied"])
@pytest.mark.parametrize("duplicate", copies.WAYS)
def test_copies_have_buffers_and_views_of_their_own(duplicate, name):
    stacked = spread(stack(make(name), NUM_AGENTS))
    VmapEngine(stacked, OBJECTIVE)(batch())
    other = duplicate(stacked)
    assert isinstance(other, StackedModule)
    for tensor_name, tensor in stacked.state_dict().items():
        assert torch.equal(other.state_dict()[tensor_name], tensor)
    other.values.zero_()
    assert all(parameter.eq(0).all() for parameter in other.agent(1).parameters())
    assert stacked.values.ne(0).any()
    LoopEngine(other, OBJECTIVE)(batch())
    assert other.gradients.ne(0).any()


def test_same_and_different_initialisation():
    module = make()
    different = [stack(module, 4, init="different", seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(different[0].values, different[1].values)
    assert not torch.equal(different[0].values, different[2].values)
    weight = different[0].parameters()[0]
    assert all(not torch.equal(weight[i], weight[j]) for i in range(4) for j in range(i))
    assert weight.abs().max() <= 0.5  # the bound of nn.Linear(4, ·)
    fewer = stack(module, 2, init="different", seed=5).parameters()[0]
    assert torch.equal(fewer, weight[:2])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stack(module, 2, init="different", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [stack(module, 2, init="different").values for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(stack(module, 2, init="different").values, drawn[0])
    assert not torch.equal(*drawn)


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class InList(nn.Linear):
    """A module that computes with a parameter by way of a list."""

    def __init__(self):
        super().__init__(2, 2)
        self.layers = {"all": [self.bias, self.weight]}

    def forward(self, inputs):
        return inputs @ self.layers["all"][1].T


class OwnLSTM(nn.LSTM):
    """A subclass of a module that keeps its list of parameters up to date itself."""

    def forward(self, inputs):
        return super().forward(inputs)[0]


def with_parameter(parameter):
    module = nn.Module()
    module.linear = nn.Linear(2, 2)
    module.extra = parameter
    return module


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stack(nn.ReLU(), 2), ValueError, "ReLU has no parameters"),
        (lambda: stack(torch.zeros(3), 2), TypeError, "expected a torch.nn.Module, got Tensor"),
        (lambda: stack(nn.Linear(2, 2), 2).agent(1.0), TypeError, "i must be an integer, got 1.0"),
        (lambda: stack(nn.Linear(2, 2), 0), ValueError, "num_agents must be at least 1, got 0"),
        (lambda: stack(nn.Linear(2, 2), 2.0), TypeError, "num_agents must be an integer, got 2.0"),
        (lambda: stack(nn.Linear(2, 2), 2, init="random"), ValueError, "'same' or 'different', got 'random'"),
        (
            lambda: stack(stack(nn.Linear(2, 2), 3), 2),
            TypeError,
            "a stack of 3 agents cannot be stacked; stack the plain",
        ),
        (lambda: stack(nn.Sequential(stack(nn.Linear(2, 2), 3)), 2), TypeError, "a stack of 3 agents cannot"),
        (
            lambda: stack(nn.Sequential(InList()), 2),
            ValueError,
            "parameter 0.bias is also held in the attribute 'layers' of InList, .* use the parameter itself",
        ),
        (lambda: stack(nn.LazyLinear(2), 2), ValueError, "weight has no values yet; run a lazy module once"),
        (lambda: stack(nn.LazyBatchNorm1d(), 2), ValueError, "weight has no values yet"),
        (lambda: stack(nn.Linear(2, 2, device="meta"), 2), ValueError, "weight has no values yet"),
        (
            lambda: stack(with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.complex64))), 2),
            TypeError,
            "parameter extra is torch.complex64; only floating-point",
        ),
        (
            lambda: stack(with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)), 2),
            TypeError,
            "parameter extra is torch.int64",
        ),
        (
            lambda: stack(with_parameter(nn.Parameter(torch.zeros(2, dtype=torch.float64))), 2),
            TypeError,
            "extra is torch.float64 on cpu|linear.weight is torch.float32 on cpu",
        ),
        (
            lambda: stack(nn.Sequential(nn.Linear(3, 3), NoReset()), 2, init="different", seed=0),
            ValueError,
            r"submodule '1' \(NoReset\) has parameters but no reset_parameters\(\)",
        ),
    ],
)
def test_bad_modules_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings("ignore:the agents are computed one after the other")
def test_a_module_that_keeps_its_list_of_parameters_up_to_date():
    stacked = spread(stack(OwnLSTM(4, 3).double(), NUM_AGENTS))
    inputs, _ = batch()
    outputs = stacked(inputs)
    for i in range(NUM_AGENTS):
        torch.testing.assert_close(outputs[i], stacked.agent(i)(inputs[i]))
    outputs.sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in stacked.parameters())


@pytest.mark.filterwarnings("ignore:.*jit.script.*deprecated:DeprecationWarning")
def test_a_scripted_module_is_refused():
    with pytest.raises(TypeError, match="a scripted or traced module cannot be stacked"):
        stack(torch.jit.script(nn.Linear(2, 2)), 2)


def one_by_one(stacked, inputs, targets, loss=cross_entropy):
    """The losses, gradients and buffers of each agent, by plain autograd on a plain copy of its module."""
    results = []
    for i in range(NUM_AGENTS):
        module = stacked.average().train()
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                tensor.copy_(stacked.tensors()[name][i])
        value = loss(module(inputs[i]), targets[i])
        value.backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        results.append((value.detach(), gradients, buffers))
    return results


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("engine", [LoopEngine, VmapEngine])
@pytest.mark.parametrize("loss", [cross_entropy, lambda o, t: (o.gather(1, t[:, None]) ** 2).mean()])
def test_engines_equal_plain_autograd_in_float64(engine, name, loss):
    """There are three steps: the buffers of one step enter the next, and gradients must not add up."""
    stacked = spread(stack(make(name), NUM_AGENTS))
    run = engine(stacked, Supervised(loss))
    for step in range(3):
        inputs, targets = batch()
        inputs = inputs + step
        expected = one_by_one(stacked, inputs, targets, loss)
        losses = run((inputs, targets))
        assert losses.shape == (NUM_AGENTS,)
        assert not losses.requires_grad
        for i, (value, gradients, buffers) in enumerate(expected):
            torch.testing.assert_close(losses[i], value, rtol=1e-12, atol=1e-12)
            for parameter_name, parameter in stacked.named_parameters():
                torch.testing.assert_close(parameter.grad[i], gradients[parameter_name], rtol=1e-10, atol=1e-12)
            for buffer_name, buffer in stacked.named_buffers():
                torch.testing.assert_close(buffer[i], buffers[buffer_name], rtol=1e-12, atol=1e-12)
            for buffer_name, buffer in stacked.agent(i).named_buffers():
                torch.testing.assert_close(buffer, buffers[buffer_name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", [LoopEngine, VmapEngine])
def test_dropout_is_on_differs_between_agents_and_repeats_from_the_seed(engine):
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).double().eval()
    stacked = stack(module, NUM_AGENTS)
    run = engine(stacked, OBJECTIVE)
    inputs, targets = batch()
    inputs, targets = inputs[:1].expand(3, 6, 4), targets[:1].expand(3, 6)
    torch.manual_seed(0)
    losses = [run((inputs, targets)) for _ in range(2)]
    assert len(set(torch.cat(losses).tolist())) == 6
    torch.manual_seed(0)
    assert torch.equal(run((inputs, targets)), losses[0])


def test_engines_switch_without_stale_gradients():
    stacked = spread(stack(make("batch_norm"), NUM_AGENTS))
    loop, vmapped = LoopEngine(stacked, OBJECTIVE), VmapEngine(stacked, OBJECTIVE)
    inputs, targets = batch()
    gradients = []
    for engine in (loop, vmapped, loop, loop):
        for parameter in stacked.parameters()[:2]:
            parameter.grad = None
        engine((inputs, targets))
        gradients.append([parameter.grad.clone() for parameter in stacked.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_auto_takes_turns_then_keeps_the_engine_with_the_smaller_median(monkeypatch):
    stacked = stack(make(), NUM_AGENTS)
    auto = AutoEngine(stacked, OBJECTIVE)
    inputs, targets = batch()
    called, clock = [], [0.0]
    seconds = {"loop": [0.1, 2, 2, 2, 9, 2], "vmap": [50, 1, 1, 60, 1, 1]}  # the first of each does not count

    def timed(name):
        def engine(batch):
            clock[0] += seconds[name][called.count(name)] if called.count(name) < 6 else 0
            called.append(name)
            return torch.zeros(NUM_AGENTS)

        return engine

    monkeypatch.setattr(auto, "_engines", {"loop": timed("loop"), "vmap": timed("vmap")})
    monkeypatch.setattr(auto, "_now", lambda: clock[0])
    for _ in range(12):
        assert auto.chosen is None
        auto((inputs, targets))
    assert called == ["loop", "vmap"] * 6
    assert auto.chosen == "vmap"
    auto((inputs, targets))
    assert called[12:] == ["vmap"]


def test_auto_goes_on_where_its_state_was_saved():
    first, second = (AutoEngine(stack(make(), NUM_AGENTS), OBJECTIVE) for _ in range(2))
    for _ in range(5):
        first(batch())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [len(seconds) for seconds in second.state_dict()["seconds"].values()] == [3, 2]
    while second.chosen is None:
        second(batch())
    first.load_state_dict(second.state_dict())
    assert first.chosen == second.chosen


def test_auto_falls_back_to_the_loop_with_one_warning():
    """The failed attempt leaves no trace in the random state and the buffers."""
    torch.manual_seed(3)
    stacked, expected = (stack(DependsOnValues().double(), NUM_AGENTS) for _ in range(2))
    expected.load_state_dict(stacked.state_dict())
    auto, loop = AutoEngine(stacked, OBJECTIVE), LoopEngine(expected, OBJECTIVE)
    torch.manual_seed(4)
    auto(batch())
    with pytest.warns(UserWarning, match="engine 'vmap' is left out: it failed with .*data-dependent") as warned:
        losses = auto(batch())
    assert len(warned) == 1
    assert auto.chosen == "loop"
    torch.manual_seed(4)
    loop(batch())
    assert torch.equal(losses, loop(batch()))
    assert torch.equal(stacked.gradients, expected.gradients)
    for (_, a), (_, b) in zip(stacked.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(a, b)


def test_an_error_of_the_model_itself_is_raised_by_every_engine():
    for name in ("loop", "vmap", "auto"):
        engine = make_engine(name, stack(make(), NUM_AGENTS), OBJECTIVE)
        with pytest.raises(RuntimeError, match=r"shape|size"):
            engine((torch.zeros(NUM_AGENTS, 2, 7, dtype=torch.float64), torch.zeros(NUM_AGENTS, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="unknown engine 'jit'; known are auto, loop, vmap"):
        make_engine("jit", stack(make(), NUM_AGENTS), OBJECTIVE)


def test_consensus_error_is_the_mean_squared_distance_from_the_average():
    parameters = [torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([10.0, 20.0], requires_grad=True)]
    assert consensus_error(parameters) == (1 + 4 + 25) * 2 / 2
    assert consensus_error(iter(parameters)) == 30.0
    assert consensus_error(stack(make(), 5).parameters()) == 0.0


def test_consensus_error_keeps_small_differences_of_large_float32_parameters():
    values = torch.full((4, 1000), 1000.0)
    values[0] += 2.0**-13
    exact = (values.double() - values.double().mean(0)).square().sum() / 4
    assert consensus_error([values]) == pytest.approx(float(exact), rel=1e-12)
    assert exact > 0


@pytest.mark.parametrize("params", [[], [torch.zeros(3, 2), torch.zeros(2, 2)], [torch.zeros(())]])
def test_consensus_error_of_something_else(params):
    with pytest.raises(ValueError, match=r"all of shape \(N, ...\); got shapes"):
        consensus_error(params)
