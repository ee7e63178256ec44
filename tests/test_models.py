import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import conv2d, relu

import gut_fast as gf
from gut_fast import models


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_lenet5_has_the_known_number_of_parameters():
    network = models.lenet5()
    assert num_parameters(network) == 61_706
    assert network(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    assert models.lenet5(in_channels=3, num_classes=7)(torch.randn(2, 3, 28, 28)).shape == (2, 7)


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


def test_resnet20_has_the_known_parameters_in_the_known_tensors():
    network = models.resnet20()
    assert num_parameters(network) == 272_474
    assert len(list(network.parameters())) == 65
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert models.resnet20(in_channels=1, num_classes=7)(torch.randn(1, 1, 9, 5)).shape == (1, 7)
    stacked = gf.stack(network, 2)
    assert sum(parameter.numel() for parameter in stacked.parameters()) == 2 * 272_474


def by_hand(w, x, norm):
    """ResNet-20 in functions; `w` yields its parameters in their order."""
    x = relu(norm(conv2d(x, next(w), padding=1), next(w), next(w)))
    for channels in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        halves = channels != x.shape[1]
        y = relu(norm(conv2d(x, next(w), stride=1 + halves, padding=1), next(w), next(w)))
        y = norm(conv2d(y, next(w), padding=1), next(w), next(w))
        x = relu(y + (norm(conv2d(x, next(w), stride=2), next(w), next(w)) if halves else x))
    return functional.linear(x.mean((2, 3)), next(w), next(w))


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (models.resnet20, lambda x, weight, bias: functional.group_norm(x, 8, weight, bias)),
        (
            lambda: models.resnet20(norm=nn.BatchNorm2d),
            lambda x, weight, bias: functional.batch_norm(x, None, None, weight, bias, training=True),
        ),
    ],
    ids=["group norm", "batch norm"],
)
def test_resnet20_is_the_published_network(make, norm):
    network, images = make().double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in network.parameters():  # norms start at one and zero, where an exchange would not show
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.testing.assert_close(network(images), by_hand(network.parameters(), images, norm), rtol=1e-9, atol=1e-9)


def test_build_by_name():
    assert num_parameters(models.build("mlp", (1, 8, 8), 10)) == 64 * 32 + 32 + 32 * 10 + 10
    assert num_parameters(models.build("lenet5", (1, 28, 28), 10)) == 61_706
    assert models.build("lenet5", (3, 28, 28), 5)(torch.randn(1, 3, 28, 28)).shape == (1, 5)
    assert num_parameters(models.build("resnet20", (3, 32, 32), 10)) == 272_474


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("resnet", (1, 8, 8), 10), r"unknown model 'resnet'; known are mlp, lenet5, resnet20"),
        (lambda: models.build("lenet5", (1, 8, 8), 10), r"lenet5 takes images \(channels, 28, 28\), got \(1, 8, 8\)"),
        (
            lambda: models.build("resnet20", (64,), 10),
            r"resnet20 takes images \(channels, .*, got \(64,\)",
        ),
        (lambda: models.mlp(4, [0], 3), r"widths must be at least 1, got \[4, 0, 3\]"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
