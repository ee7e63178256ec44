"""The checks of modules that are to be stacked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gut_fast.arguments import as_integer

__all__ = ["check_can_reset", "check_stackable"]

HOLDERS = ("_parameters", "_flat_weights")
"""The attributes that may hold parameters: the registry, and the list that torch's recurrent layers keep up to date."""


def check_stackable(module: nn.Module, num_agents: int) -> None:
    """Raises TypeError or ValueError unless N copies of the module can be stacked."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("a scripted or traced module cannot be stacked; stack the module that it was made from")
    as_integer(num_agents, "num_agents", minimum=1)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"{name} has no values yet; run a lazy module once, or materialise a meta module, before stacking it"
            )
    parameters = list(module.named_parameters())
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to train or to mix")
    first_name, first = parameters[0]
    for name, parameter in parameters:
        if not parameter.is_floating_point():
            raise TypeError(f"parameter {name} is {parameter.dtype}; only floating-point parameters can be stacked")
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise TypeError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}, but {first_name} is {first.dtype} on "
                f"{first.device}; convert the module to one dtype and device with module.to(...)"
            )
    _check_held_once(module)


def _check_held_once(module: nn.Module) -> None:
    """Raises ValueError if an attribute holds a parameter that its module would go on to compute with, unstacked."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for submodule in module.modules():
        for key, value in vars(submodule).items():
            if key in HOLDERS:
                continue
            if found := [names[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in names]:
                raise ValueError(
                    f"parameter {found[0]} is also held in the attribute {key!r} of {type(submodule).__name__}, which "
                    "would keep it as it is before stacking; use the parameter itself, or a torch.nn.ParameterList"
                )


def check_can_reset(module: nn.Module) -> None:
    """Raises ValueError unless every submodule with parameters has ``reset_parameters``."""
    for name, submodule in module.named_modules():
        has_own = any(parameter is not None for parameter in submodule._parameters.values())
        if has_own and not callable(getattr(submodule, "reset_parameters", None)):
            raise ValueError(
                f"init='different': submodule {name!r} ({type(submodule).__name__}) has parameters but no "
                "reset_parameters(); give it one, or use init='same'"
            )
