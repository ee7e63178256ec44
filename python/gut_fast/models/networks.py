"""The table of the networks by name, and `build`, which makes one for the inputs and classes of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from gut_fast.arguments import all_known
from gut_fast.models.deep import VGG11_MIN_SIZE, mobilenet_v2, resnet20, resnet32, resnet56, vgg11
from gut_fast.models.layers import get_norm
from gut_fast.models.small import LENET5_PADDING, lenet5, mlp
from gut_fast.models.transformer import Transformer

__all__ = ["MODELS", "Network", "build"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A row of `MODELS`.

    Attributes:
        make: builds the network from (input_shape, num_classes, norm, argument); raises ValueError if the network
            cannot take the shape, the norm or the argument.
        norm: name of the default norm.
        argument: default of the text behind the colon; empty if the network takes none.
        takes_tokens: True if inputs are numbers of tokens, one of which it predicts; False if they are quantities.
    """

    make: Callable[[Shape, int, str, str], nn.Module]
    norm: str = "groupnorm"
    argument: str = ""
    takes_tokens: bool = False


def _mlp(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
    if norm != "none":
        raise ValueError(f"mlp has no norm; leave it out or give 'none', got {norm!r}")
    widths = argument.split("-")
    if not all(width.isdecimal() for width in widths):
        raise ValueError(f"mlp takes the widths of its hidden layers, for example mlp:128-64, got 'mlp:{argument}'")
    return mlp(math.prod(input_shape), [int(width) for width in widths], num_classes)


def _lenet5(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
    sizes = [(size, size) for size in LENET5_PADDING]
    if len(input_shape) != 3 or input_shape[1:] not in sizes:
        raise ValueError(f"lenet5 takes images (channels, 28, 28) or (channels, 32, 32), got {input_shape}")
    return lenet5(input_shape[0], num_classes, norm, image_size=input_shape[1])


def _resnet(name: str, make: Callable[[int, int, str], nn.Module]) -> Network:
    def of_images(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
        _check_images(name, input_shape)
        return make(input_shape[0], num_classes, norm)

    return Network(of_images)


def _vgg11(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
    _check_images("vgg11", input_shape, VGG11_MIN_SIZE)
    try:
        width = float(argument)
    except ValueError:
        given = f"vgg11:{argument}"
        raise ValueError(f"vgg11 takes a factor on its channels, for example vgg11:0.25, got {given!r}") from None
    return vgg11(input_shape[0], num_classes, norm, width)


def _mobilenet_v2(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
    _check_images("mobilenet-v2", input_shape)
    return mobilenet_v2(input_shape[0], num_classes, norm, image_size=min(input_shape[1:]))


def _transformer(input_shape: Shape, num_classes: int, norm: str, argument: str) -> nn.Module:
    sizes = argument.split(":")
    if norm != "none" or len(input_shape) != 1:
        raise ValueError(
            "transformer takes sequences of tokens, of shape (length,), and norm 'none', having its own layer norm, "
            f"got shape {input_shape} and norm {norm!r}"
        )
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        given = f"transformer:{argument}"
        raise ValueError(
            f"transformer takes its width and number of layers, for example transformer:64:2, got {given!r}"
        )
    return Transformer(num_classes, input_shape[0], width=int(sizes[0]), num_layers=int(sizes[1]))


def _check_images(name: str, input_shape: Shape, min_size: int = 1) -> None:
    if len(input_shape) != 3 or min(input_shape[1:]) < min_size:
        at_least = f" of at least {min_size}×{min_size}" if min_size > 1 else ""
        raise ValueError(f"{name} takes images (channels, height, width){at_least}, got {input_shape}")


MODELS: dict[str, Network] = {
    "mlp": Network(_mlp, norm="none", argument="32"),
    "lenet5": Network(_lenet5, norm="none"),
    "resnet20": _resnet("resnet20", resnet20),
    "resnet32": _resnet("resnet32", resnet32),
    "resnet56": _resnet("resnet56", resnet56),
    "vgg11": Network(_vgg11, argument="1"),
    "mobilenet-v2": Network(_mobilenet_v2),
    "transformer": Network(_transformer, norm="none", argument="64:2", takes_tokens=True),
}
"""All networks by name.

The deep networks have group normalisation by default, which is the same in training and evaluation and, unlike batch
normalisation, does not carry an agent's own mix of classes. GUT's publication has ``"evonorm"``.
"""


def build(
    spec: str, input_shape: Sequence[int], num_classes: int, norm: str | None = None, *, tokens: bool = False
) -> nn.Module:
    """The network that `spec` names, for inputs [B, *input_shape].

    Args:
        spec: a name from `MODELS`. Behind a colon "mlp" takes the widths of its hidden layers (``"mlp:128-64"``; "mlp"
            is ``"mlp:32"``), "vgg11" a factor on its channels (``"vgg11:0.25"``; "vgg11" is ``"vgg11:1"``), and
            "transformer" its width and number of layers (``"transformer:32:1"``; "transformer" is
            ``"transformer:64:2"``).
        input_shape: shape of one sample: (channels, height, width); any shape for "mlp", (length,) for "transformer".
        num_classes: number of outputs.
        norm: a name from `NORMS`; None is the network's default, see `MODELS`.
        tokens: whether inputs are numbers of tokens, as those of text.

    Raises:
        ValueError: the name or norm is unknown, or the network cannot take the argument, the norm or the shape.
    """
    name, colon, argument = spec.partition(":")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {all_known(name, MODELS)}")
    network = MODELS[name]
    if colon and not network.argument:
        raise ValueError(f"{name} takes nothing behind a colon, got {spec!r}")
    if network.takes_tokens != tokens:
        fitting = [each for each, row in MODELS.items() if row.takes_tokens == tokens]
        kind = "numbers of tokens" if tokens else "quantities, such as pixels"
        raise ValueError(f"{name} is not for these inputs, which are {kind}; take one of {', '.join(fitting)}")
    norm = network.norm if norm is None else norm
    get_norm(norm)
    if num_classes < 1 or min(input_shape, default=0) < 1:
        raise ValueError(
            f"{name}: input_shape and num_classes must be at least 1, got {tuple(input_shape)} and {num_classes}"
        )
    return network.make(tuple(input_shape), num_classes, norm, argument if colon else network.argument)
