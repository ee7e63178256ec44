"""Networks and norms against their published forms, and the same step by every engine."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.functional import conv2d, cross_entropy, relu

import gut_fast as gf
from gut_fast import models
from gut_fast.models import NORMS, EvoNormS0
from gut_fast.models.deep import InvertedResidual
from gut_fast.simulation.engines import make_engine
from gut_fast.simulation.objective import Supervised


def mobilenet_blocks(norm):
    """A network of MobileNet-V2's three kinds of blocks: the first, one with a stride, one with an addition."""
    blocks = [
        InvertedResidual(inputs, outputs, expansion, stride, NORMS[norm])
        for inputs, outputs, expansion, stride in [(2, 8, 1, 1), (8, 16, 6, 2), (16, 16, 6, 1)]
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


OBJECTIVE = Supervised(cross_entropy)
SMALL = {
    "mlp:16-8": (1, 3, 3),
    "lenet5": (1, 28, 28),
    "resnet20": (2, 6, 6),
    "vgg11:0.25": (1, 32, 32),
    "mobilenet-v2": (2, 9, 9),
}
"""Every kind of network, with images as small as show anything; of the last, which has 158 tensors, some blocks."""

SMALLEST = ("mlp:16-8", "lenet5", "mobilenet-v2")
PAIRS = [(spec, norm) for spec in SMALL for norm in (["none"] if spec.startswith("mlp") else NORMS)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def images(spec, *batch, dtype=torch.float64):
    return torch.randn(*batch, *SMALL[spec], dtype=dtype)


def build_small(spec, norm):
    """The small network of this name, with three classes."""
    return mobilenet_blocks(norm) if spec == "mobilenet-v2" else models.build(spec, SMALL[spec], 3, norm)


def move(network):
    """Moves parameters away from their start, at which branches without a norm are zero and scales do not show."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


# Parameters


@pytest.mark.parametrize(
    ("spec", "input_shape", "num_classes", "norm", "expected"),
    [
        ("mlp", (1, 8, 8), 10, None, (64 * 32 + 32) + (32 * 10 + 10)),
        ("mlp:32", (1, 8, 8), 10, "none", (64 * 32 + 32) + (32 * 10 + 10)),
        ("mlp:128-64", (3, 4, 4), 10, None, (48 * 128 + 128) + (128 * 64 + 64) + (64 * 10 + 10)),
        ("lenet5", (1, 28, 28), 10, None, 61_706),
        ("lenet5", (1, 32, 32), 10, None, 61_706),
        ("lenet5", (3, 32, 32), 10, None, 61_706 + 2 * 6 * 25),
        ("lenet5", (1, 28, 28), 10, "evonorm", 61_706 + 3 * (6 + 16)),
        ("resnet20", (3, 32, 32), 10, None, 272_474),
        ("resnet20", (3, 32, 32), 10, "batchnorm", 272_474),
        ("resnet20", (3, 32, 32), 10, "evonorm", 272_474 + 16 + 7 * (16 + 32 + 64) - 16),
        ("resnet32", (3, 32, 32), 10, None, 466_906),
        ("resnet56", (3, 32, 32), 10, None, 855_770),
        ("resnet56", (3, 32, 32), 100, None, 855_770 + 90 * 65),
        ("vgg11", (3, 32, 32), 10, "batchnorm", 9_231_114),
        ("vgg11", (3, 32, 32), 10, "none", 9_220_480 + 5_130),  # the source's eight convolutions, and the linear layer
        ("vgg11:0.25", (3, 32, 32), 10, "none", 578_410),
        ("mobilenet-v2", (3, 32, 32), 10, "batchnorm", 2_236_682),
        ("mobilenet-v2", (3, 224, 224), 1000, "batchnorm", 3_504_872),
    ],
)
def test_networks_have_the_known_number_of_parameters(spec, input_shape, num_classes, norm, expected):
    assert num_parameters(models.build(spec, input_shape, num_classes, norm)) == expected


def test_resnets_without_projections_have_the_parameters_of_the_source():
    """He et al. give 0.27, 0.46 and 0.85 million, with shortcuts without parameters."""
    for make_resnet, expected in [
        (models.resnet20, 269_722),
        (models.resnet32, 464_154),
        (models.resnet56, 853_018),
    ]:
        network = make_resnet()
        projections = sum(num_parameters(block.shortcut) for block in network if hasattr(block, "shortcut"))
        assert num_parameters(network) - projections == expected


def test_constructors_build_the_networks_of_the_table():
    assert len(list(models.resnet20().parameters())) == 65
    for network, spec, shape in [
        (models.lenet5(), "lenet5", (1, 28, 28)),
        (models.resnet20(1, 7, "evonorm"), "resnet20", (1, 9, 5)),
        (models.resnet32(), "resnet32", (3, 8, 8)),
        (models.resnet56(), "resnet56", (3, 8, 8)),
        (models.vgg11(), "vgg11", (3, 32, 32)),
        (models.mobilenet_v2(), "mobilenet-v2", (3, 32, 32)),
    ]:
        norm = "evonorm" if any(isinstance(module, EvoNormS0) for module in network.modules()) else None
        built = models.build(spec, shape, 7 if norm else 10, norm)
        assert str(built) == str(network)


def test_a_stack_of_agents_has_their_parameters():
    assert sum(parameter.numel() for parameter in gf.stack(models.resnet20(), 2).parameters()) == 2 * 272_474


# The networks are those published


def test_mlp_is_linear_and_relu_layers_of_the_given_widths():
    network = models.mlp(6, [5, 4], 3)
    assert num_parameters(network) == (6 * 5 + 5) + (5 * 4 + 4) + (4 * 3 + 3)
    inputs = torch.randn(7, 1, 2, 3)
    hidden = inputs.flatten(1)
    weights = list(network.parameters())
    for weight, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
        hidden = torch.relu(hidden @ weight.T + bias)
    assert torch.allclose(network(inputs), hidden @ weights[4].T + weights[5], atol=1e-6)
    assert num_parameters(models.mlp(6, [], 3)) == 21


@pytest.mark.parametrize("size", [28, 32])
def test_lenet5_is_the_published_network(size):
    network, x = models.lenet5(image_size=size), torch.randn(2, 1, size, size)
    w = network.parameters()
    y = functional.pad(x, [(32 - size) // 2] * 4)
    for _ in range(2):
        y = functional.max_pool2d(relu(conv2d(y, next(w), next(w))), 2)
    y = y.flatten(1)
    for _ in range(2):
        y = relu(functional.linear(y, next(w), next(w)))
    torch.testing.assert_close(network(x), functional.linear(y, next(w), next(w)))


def resnet_by_hand(w, x, blocks_per_stage, norm, activation):
    """A ResNet in plain functions; `w` yields the parameters in order, and `norm` takes its own from it."""
    x = activation(norm(conv2d(x, next(w), padding=1), w))
    for channels in [16] * blocks_per_stage + [32] * blocks_per_stage + [64] * blocks_per_stage:
        halves = channels != x.shape[1]
        y = activation(norm(conv2d(x, next(w), stride=1 + halves, padding=1), w))
        y = norm(conv2d(y, next(w), padding=1), w)
        x = activation(y + (norm(conv2d(x, next(w), stride=2), w) if halves else x))
    return functional.linear(x.mean((2, 3)), next(w), next(w))


def evonorm_by_hand(x, v, weight, bias, num_groups=8, eps=1e-5):
    """The published formula of EvoNorm-S0, group by group and sample by sample."""
    out = torch.empty_like(x)
    size = x.shape[1] // num_groups
    for sample in range(len(x)):
        for group in range(num_groups):
            own = slice(group * size, (group + 1) * size)
            values = x[sample, own]
            variance = ((values - values.mean()) ** 2).mean()
            for channel in range(own.start, own.stop):
                pixels = x[sample, channel]
                gate = 1 / (1 + torch.exp(-v[channel] * pixels))
                out[sample, channel] = pixels * gate / (variance + eps) ** 0.5 * weight[channel] + bias[channel]
    return out


NORMS_BY_HAND = {
    "evonorm": (lambda x, w: evonorm_by_hand(x, next(w), next(w), next(w)), lambda x: x),
    "groupnorm": (lambda x, w: functional.group_norm(x, 8, next(w), next(w)), relu),
    "batchnorm": (lambda x, w: functional.batch_norm(x, None, None, next(w), next(w), training=True), relu),
}


@pytest.mark.parametrize(("depth", "norm"), [(20, "evonorm"), (20, "groupnorm"), (20, "batchnorm"), (32, "batchnorm")])
def test_resnet_is_the_published_network(depth, norm):
    network = move({20: models.resnet20, 32: models.resnet32}[depth](norm=norm).double())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = resnet_by_hand(network.parameters(), x, (depth - 2) // 6, *NORMS_BY_HAND[norm])
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def mobilenet_by_hand(w, x, strides, norm):
    """MobileNet-V2 in plain functions; `strides` are those of the first convolution and the seven stages."""
    first, *strides = strides
    x = relu(norm(conv2d(x, next(w), stride=first, padding=1), w))
    for expansion, repeats, stage_stride in zip([1, 6, 6, 6, 6, 6, 6], [1, 2, 3, 4, 3, 3, 1], strides, strict=True):
        for stride in [stage_stride] + [1] * (repeats - 1):
            y = relu(norm(conv2d(x, next(w)), w)) if expansion > 1 else x
            y = relu(norm(conv2d(y, next(w), stride=stride, padding=1, groups=y.shape[1]), w))
            y = norm(conv2d(y, next(w)), w)
            x = x + y if x.shape == y.shape else y
    x = relu(norm(conv2d(x, next(w)), w))
    return functional.linear(x.mean((2, 3)), next(w), next(w))


@pytest.mark.parametrize(("size", "strides"), [(16, (1, 1, 1, 2, 2, 1, 2, 1)), (65, (2, 1, 2, 2, 2, 1, 2, 1))])
def test_mobilenet_v2_is_the_published_network(size, strides):
    network = move(models.mobilenet_v2(norm="batchnorm", image_size=size).double())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = mobilenet_by_hand(network.parameters(), x, strides, NORMS_BY_HAND["batchnorm"][0])
    torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("norm", "height", "width"), [("batchnorm", 32, 65), ("none", 64, 32)])
def test_vgg11_is_the_published_network(norm, height, width):
    network = move(models.vgg11(norm=norm, width=0.25).double())
    y = x = torch.randn(2, 3, height, width, dtype=torch.float64)
    w = network.parameters()
    for repeats in (1, 1, 2, 2, 2):
        for _ in range(repeats):
            y = conv2d(y, next(w), next(w), padding=1)
            y = relu(y if norm == "none" else NORMS_BY_HAND[norm][0](y, w))
        y = functional.max_pool2d(y, 2)
    expected = functional.linear(y.mean((2, 3)), next(w), next(w))
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "left"), [(32, 4), (64, 8), (224, 7)])
def test_the_strides_of_mobilenet_v2_follow_the_size_of_the_images(size, left):
    network = models.build("mobilenet-v2", (1, size, size), 10)
    assert network[:-3](torch.randn(1, 1, size, size)).shape == (1, 1280, left, left)
    assert network(torch.randn(1, 1, size, size)).shape == (1, 10)


# What every network does with every norm


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("mlp", (7,)),
        ("mlp:3", (1, 2, 3, 4)),
        ("lenet5", (3, 28, 28)),
        ("lenet5", (2, 32, 32)),
        ("resnet20", (1, 9, 5)),
        ("resnet20", (3, 1, 1)),
        ("resnet56", (1, 4, 4)),
        ("vgg11:0.125", (1, 33, 70)),
        ("vgg11:0.02", (1, 32, 32)),
        ("mobilenet-v2", (1, 14, 14)),
    ],
)
def test_a_sample_gets_the_same_outputs_in_every_batch_and_memory_format(spec, shape):
    network = models.build(spec, shape, 4, None).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    outputs = network(x)
    assert outputs.shape == (3, 4)
    for i in range(3):
        torch.testing.assert_close(network(x[i : i + 1]), outputs[i : i + 1])
    if len(shape) == 3:
        last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, outputs)


@pytest.mark.parametrize(
    ("spec", "norm"), [pair for pair in PAIRS if pair[0] in SMALLEST or pair[1] in ("evonorm", "batchnorm")]
)
def test_a_training_step_is_the_same_with_every_engine(spec, norm):
    """The comparison is of losses, gradients and buffers of a second step, in which the agents' parameters differ."""
    network, agents = move(build_small(spec, norm).double()), 2
    x, y = images(spec, agents, 3), torch.tensor([[0, 1, 2], [2, 2, 0]])
    results = {}
    for engine in ("loop", "vmap", "workers"):
        stacked = gf.stack(network, agents)
        gradients_of = make_engine(engine, stacked, OBJECTIVE)
        for _ in range(2):
            losses = gradients_of((x, y))
            with torch.no_grad():
                for parameter in stacked.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
        named = {name: parameter.grad.clone() for name, parameter in stacked.named_parameters()}
        results[engine] = {"losses": losses, **named, **dict(stacked.named_buffers())}
    for name, expected in results["loop"].items():
        for engine in ("vmap", "workers"):
            torch.testing.assert_close(results[engine][name], expected, rtol=1e-6, atol=1e-9, msg=f"{engine}: {name}")
        assert torch.isfinite(expected).all()


@pytest.mark.parametrize(("spec", "norm"), PAIRS)
def test_every_parameter_gets_a_gradient(spec, norm):
    network = move(build_small(spec, norm).double())
    cross_entropy(network(images(spec, 3)), torch.tensor([0, 1, 2])).backward()
    for name, parameter in network.named_parameters():
        # Batch normalisation subtracts what a bias before it has added, be it of a convolution or of another norm.
        if not (norm == "batchnorm" and name.endswith("bias")):
            assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize(("spec", "norm"), PAIRS)
def test_a_state_dict_goes_into_another_network_and_a_copy_is_equal(spec, norm):
    first, second = move(build_small(spec, norm).double()), move(build_small(spec, norm).double())
    first(images(spec, 3))  # moves running statistics
    second.load_state_dict(first.state_dict())
    x = images(spec, 2)
    for network in (second, copy.deepcopy(first)):
        assert torch.equal(network.eval()(x), first.eval()(x))


@pytest.mark.parametrize(("spec", "norm"), PAIRS)
def test_agents_can_start_from_different_parameters(spec, norm):
    network = build_small(spec, norm)
    stacked = gf.stack(network, 2, init="different", seed=0)
    for (name, mine), start in zip(stacked.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(mine[0], mine[1]) == bool((start == start.flatten()[0]).all()), name


@pytest.mark.parametrize(
    ("spec", "norm", "lr"),
    [
        *(("resnet20", norm, 0.05) for norm in NORMS),
        ("resnet56", "none", 0.05),
        ("vgg11:0.25", "none", 0.01),
        ("vgg11:0.25", "evonorm", 0.01),
        ("mobilenet-v2", "none", 0.02),
    ],
)
def test_a_few_images_are_learnt(spec, norm, lr):
    shape = {"vgg11:0.25": (1, 32, 32), "mobilenet-v2": (2, 9, 9)}.get(spec, (2, 6, 6))
    network = models.build(spec, shape, 3, norm)
    x, y = torch.randn(6, *shape), torch.arange(6) % 3
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(cross_entropy(network(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# Norms


@pytest.fixture
def evonorm():
    module = EvoNormS0(6, num_groups=3).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def test_evonorm_is_the_published_formula(evonorm):
    x = 3 * torch.randn(2, 6, 4, 5, dtype=torch.float64) + 1
    expected = evonorm_by_hand(x, evonorm.v, evonorm.weight, evonorm.bias, num_groups=3)
    torch.testing.assert_close(evonorm(x), expected, rtol=1e-12, atol=1e-12)
    assert EvoNormS0(64).num_groups == 8
    assert EvoNormS0(6).num_groups == 2
    assert EvoNormS0(5).num_groups == 1


def test_gradients_of_evonorm_are_those_of_differences(evonorm):
    names = [name for name, _ in evonorm.named_parameters()]

    def call(x, *parameters):
        return functional_call(evonorm, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *evonorm.parameters()))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_evonorm_in_float32_is_as_exact_as_its_inputs(evonorm, offset):
    x = torch.randn(2, 6, 8, 8) + offset
    exact, single = evonorm(x.double()), evonorm.float()(x)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-5 * (1 + offset)


def test_evonorm_of_equal_pixels_and_of_large_values_is_finite(evonorm):
    for value in (0.0, 1.0, 1e4, -1e4):
        x = torch.full((1, 6, 3, 3), value, requires_grad=True)
        evonorm.float()(x).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in evonorm.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_evonorm_of_half_precision_is_computed_in_float32(evonorm, autocast):
    x = (200 + torch.randn(2, 6, 8, 8)).bfloat16()  # a variance in bfloat16 would have no correct digit
    module = copy.deepcopy(evonorm).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = module(x)
    assert outputs.dtype == torch.bfloat16
    exact = copy.deepcopy(module).double()(x.double())
    assert (outputs - exact).abs().max() < 0.01 * exact.abs().max()


def test_evonorm_keeps_the_memory_format(evonorm):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    last = evonorm(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, evonorm(x))


def test_evonorm_compiles_into_one_graph(evonorm):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(evonorm, backend="eager", fullgraph=True)(x), evonorm(x))


@pytest.mark.parametrize(
    ("spec", "hidden", "linear", "branch", "activation"),
    [("lenet5", 2, 0, 0, 0), ("resnet20", 10, 2, 9, 9), ("vgg11:0.25", 8, 0, 0, 0), ("mobilenet-v2", 35, 7, 10, 0)],
)
def test_a_new_norm_is_a_row_of_the_table(monkeypatch, spec, hidden, linear, branch, activation):
    places = []

    def place(name):
        def module(*channels):
            places.append(name)
            return nn.Identity()

        return module

    row = models.Norm(*(place(name) for name in ("hidden", "linear", "branch", "activation")))
    monkeypatch.setitem(NORMS, "mine", row)
    network = models.build(spec, SMALL[spec], 4, "mine")
    assert network(images(spec, 1, dtype=torch.float32)).shape == (1, 4)
    counts = [places.count(name) for name in ("hidden", "linear", "branch", "activation")]
    assert counts == [hidden, linear, branch, activation]


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: models.build("resnet", (1, 8, 8), 10),
            "unknown model 'resnet'; known are mlp, lenet5, resnet20, resnet32, resnet56, vgg11, mobilenet-v2",
        ),
        (
            lambda: models.build("lenet5", (1, 8, 8), 10),
            r"lenet5 takes images \(channels, 28, 28\) or \(channels, 32, 32\), got \(1, 8, 8\)",
        ),
        (lambda: models.build("lenet5", (1, 28, 32), 10), r"lenet5 takes images .*, got \(1, 28, 32\)"),
        (lambda: models.build("lenet5", (784,), 10), r"lenet5 takes images .*, got \(784,\)"),
        (lambda: models.lenet5(image_size=14), "lenet5: image_size must be 28 or 32, got 14"),
        (
            lambda: models.build("resnet20", (64,), 10),
            r"resnet20 takes images \(channels, height, width\), got \(64,\)",
        ),
        (lambda: models.build("resnet56", (8, 8), 10), r"resnet56 takes images .*, got \(8, 8\)"),
        (
            lambda: models.build("vgg11", (1, 28, 28), 10),
            r"vgg11 takes images \(channels, height, width\) of at least 32×32, got \(1, 28, 28\)",
        ),
        (lambda: models.build("mobilenet-v2", (28, 28), 10), r"mobilenet-v2 takes images .*, got \(28, 28\)"),
        (lambda: models.build("resnet20:3", (3, 8, 8), 10), "resnet20 takes nothing behind a colon, got 'resnet20:3'"),
        (lambda: models.build("lenet5:", (1, 28, 28), 10), "lenet5 takes nothing behind a colon, got 'lenet5:'"),
        (lambda: models.build("mlp:", (4,), 10), "widths of its hidden layers, for example mlp:128-64, got 'mlp:'"),
        (lambda: models.build("mlp:8-", (4,), 10), "widths of its hidden layers, .*, got 'mlp:8-'"),
        (lambda: models.build("mlp:-8", (4,), 10), "widths of its hidden layers, .*, got 'mlp:-8'"),
        (lambda: models.build("mlp:0", (4,), 3), r"widths must be at least 1, got \[4, 0, 3\]"),
        (lambda: models.mlp(4, [0], 3), r"widths must be at least 1, got \[4, 0, 3\]"),
        (
            lambda: models.build("mlp", (4,), 3, "evonorm"),
            "mlp has no norm; leave it out or give 'none', got 'evonorm'",
        ),
        (lambda: models.build("vgg11:half", (3, 32, 32), 3), "factor on its channels, .*, got 'vgg11:half'"),
        (lambda: models.vgg11(width=0.001), "vgg11: width must be a factor of at least 1/64, got 0.001"),
        (lambda: models.vgg11(width=float("nan")), "vgg11: width must be a factor of at least 1/64, got nan"),
        (
            lambda: models.build("lenet5", (1, 28, 28), 10, "layernorm"),
            "unknown norm 'layernorm'; known are evonorm, groupnorm, batchnorm, none",
        ),
        (lambda: models.resnet20(norm="layernorm"), "unknown norm 'layernorm'"),
        (lambda: models.build("resnet20", (3, 8, 8), 0), r"resnet20: .* must be at least 1, got \(3, 8, 8\) and 0"),
        (lambda: models.build("resnet20", (3, 0, 8), 10), r"resnet20: .* must be at least 1, got \(3, 0, 8\) and 10"),
        (lambda: models.build("mlp", (), 10), r"mlp: .* must be at least 1, got \(\) and 10"),
        (lambda: EvoNormS0(6, num_groups=4), "EvoNormS0: 6 channels cannot be divided into 4 equal groups"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
