"""A module for each of N agents, with all parameters in one flat buffer.

The parameters lie as in `gut_fast.kernels.buffers`: segment k is parameter k of all agents, a block [N, d_k]. A stacked
parameter is a view (N, *shape_k) of its segment, which the optimizer gets; agent i's module holds row i of each stacked
parameter. Gradients have a buffer of the same layout: agent i's backward pass accumulates straight into row i of the
stacked gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from gut_fast.arguments import as_integer
from gut_fast.kernels.buffers import allocate, segment_views
from gut_fast.simulation.randomness import derive_seed, own_random_state, seed_generators

__all__ = ["StackedModule", "at_least_float32", "check_autocast", "forward_precision", "means", "stack"]

HALVES = (torch.bfloat16, torch.float16)


def stack(module: nn.Module, num_agents: int, *, init: str = "same", seed: int | None = None) -> StackedModule:
    """N copies of `module` with stacked parameters.

    Args:
        module: the model; it is copied and stays as it is. Move it to its device first.
        num_agents: number of agents N.
        init: ``"same"`` gives every agent the module's parameters; ``"different"`` calls ``reset_parameters`` of every
            submodule anew for each agent.
        seed: seed for ``"different"``: agent i's parameters depend on (seed, i) alone. None draws a seed from torch's
            default generator.

    Raises:
        TypeError, ValueError: the module has no parameters, or some are lazy, on the meta device, not floating-point,
            or of different dtypes or devices; init is ``"different"`` and a submodule has parameters of its own but no
            ``reset_parameters``; or another argument is bad.
    """
    if init not in ("same", "different"):
        raise ValueError(f"init must be 'same' or 'different', got {init!r}")
    stacked = StackedModule(module, num_agents)
    if init == "different":
        _check_can_reset(module)
        _reset_each_agent(stacked, int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed)
    return stacked


class StackedModule:
    """The modules of N agents with stacked parameters; `stack` makes them.

    Attributes:
        num_agents: number of agents N.
        module: the template, a module with the original parameters; it is never trained.
        values, gradients: the flat buffers, [N · Σd_k].
        flat_buffers: the module's buffers, in one flat tensor for each dtype and device, so that copies are quick.

    Buffers, such as the running statistics of batch normalisation, are stacked (N, *shape) too and never mixed.
    Parameters that the module shares between submodules are shared in every agent. A copied or unpickled stack has flat
    buffers of its own, linked in the same way, and no gradients.
    """

    def __init__(self, module: nn.Module, num_agents: int) -> None:
        _check_stackable(module, num_agents)
        self.num_agents = int(num_agents)
        self.module = copy.deepcopy(module)
        templates = dict(self.module.named_parameters())
        first = next(iter(templates.values()))
        num_elements = num_agents * sum(parameter.numel() for parameter in templates.values())
        shapes = [parameter.shape for parameter in templates.values()]
        self.values = allocate(num_elements, first.dtype, first.device)
        self.gradients = allocate(num_elements, first.dtype, first.device)
        self._parameters: dict[str, nn.Parameter] = {}
        for (name, template), view in zip(
            templates.items(), segment_views(self.values, num_agents, shapes), strict=True
        ):
            view.copy_(template.detach())
            self._parameters[name] = nn.Parameter(view, requires_grad=template.requires_grad)
        self._gradients = dict(zip(templates, segment_views(self.gradients, num_agents, shapes), strict=True))
        self.flat_buffers, self._buffers = _stacked_buffers(self.module, num_agents)
        self._slots = _slots(self.module)
        self._agents: dict[int, nn.Module] = {}
        self._link_gradients()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.values.device

    def parameters(self) -> list[nn.Parameter]:
        """The stacked parameters, each of shape (N, *shape), for an optimizer."""
        return list(self._parameters.values())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The stacked parameters with their names in the module."""
        return list(self._parameters.items())

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """The stacked buffers, each (N, *shape), with their names in the module."""
        return list(self._buffers.items())

    def agent(self, i: int) -> nn.Module:
        """Agent i's module, the same one at every call: its parameters, gradients and buffers are rows of the stack.

        Zero gradients with `zero_grad` of the stack. After an optimizer or a module has set gradients to None, call
        `agent` again, which links them anew.

        Raises:
            IndexError: there is no agent i.
        """
        if not 0 <= i < self.num_agents:
            raise IndexError(f"there is no agent {i}; agents are 0 … {self.num_agents - 1}")
        if i not in self._agents:
            self._agents[i] = self._new_agent(i)
        self._link_gradients()
        for name, parameter in self._agents[i].named_parameters():
            _link_gradient(parameter, self._gradients[name][i])
        return self._agents[i]

    def average(self) -> nn.Module:
        """A plain module with the agents' mean parameters and floating-point buffers, and agent 0's other buffers."""
        module = copy.deepcopy(self.module)
        mean = self.mean_state()
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                tensor.copy_(mean[name])
        return module

    def mean_state(self) -> dict[str, Tensor]:
        """The parameters and buffers of `average` by name; means are accumulated in float64."""
        state = self.state_dict()
        return {name: mean.to(state[name].dtype) for name, mean in means(state).items()}

    def part(self, agents: range) -> StackedModule:
        """A stack of these agents alone, with memory of its own; for all agents it is this stack itself."""
        if len(agents) == self.num_agents:
            return self
        part = StackedModule(self.module, len(agents))
        part.load_state_dict({name: rows[agents.start : agents.stop] for name, rows in self.state_dict().items()})
        return part

    def zero_grad(self) -> None:
        """Zeroes all gradients in place, and makes each stacked parameter's ``.grad`` its view of the flat buffer."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                parameter.grad = self._gradients[name]
        self.gradients.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """All stacked parameters and buffers by name; the tensors share memory with the stack, as in `torch.nn`."""
        return {**{name: parameter.detach() for name, parameter in self._parameters.items()}, **self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the tensors into the stack.

        Raises:
            ValueError: names or shapes differ from the stack's own; nothing has been changed.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
            raise ValueError(f"the state is of another module: missing {missing}, unknown {unknown}")
        for name, tensor in own.items():
            if tensor.shape != state_dict[name].shape:
                raise ValueError(f"{name} has shape {tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def call(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        inputs: Tensor,
        autocast: torch.dtype | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output of `module`, a copy of the template, for these parameters and buffers, and its buffers afterwards.

        The call runs under `torch.autocast` if `autocast` is a dtype; an output of half precision comes in float32.
        """
        # Tensors by slot need no search for ties in functional_call, which costs as much as a small forward pass.
        by_slot = {slot: tensors[name] for slot, name in self._slots.items()}
        with forward_precision(autocast, inputs.device):
            output = functional_call(module, by_slot, (inputs,), tie_weights=False)
        return at_least_float32(output), {name: by_slot[name] for name in self._buffers}

    def keep_buffers(self, i: int) -> None:
        """Copies buffers that agent i's module has replaced, not changed in place, into agent i's rows of the stack."""
        for slot, name in self._slots.items():
            if name in self._buffers:
                owner, _, local = slot.rpartition(".")
                submodule = self._agents[i].get_submodule(owner)
                row, current = self._buffers[name][i], getattr(submodule, local)
                if current.data_ptr() != row.data_ptr():
                    row.copy_(current)
                    setattr(submodule, local, row)

    def _new_agent(self, i: int) -> nn.Module:
        agent = copy.deepcopy(self.module)
        for name, parameter in agent.named_parameters():
            parameter.data = self._parameters[name].data[i]
            parameter.grad = self._gradients[name][i] if parameter.requires_grad else None
        for slot, name in self._slots.items():
            if name in self._buffers:
                owner, _, local = slot.rpartition(".")
                setattr(agent.get_submodule(owner), local, self._buffers[name][i])
        return agent

    def _link_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            _link_gradient(parameter, self._gradients[name])

    def __reduce__(self) -> tuple[Callable[..., StackedModule], tuple[Any, ...]]:
        return _restore, (self.module, self.num_agents, self.values.clone(), self._buffers)


def means(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The agents' mean of each stacked tensor, float64; agent 0's value of a tensor that is not floating-point."""
    return {
        name: rows.mean(0, dtype=torch.float64) if rows.is_floating_point() else rows[0]
        for name, rows in stacked.items()
    }


def _stacked_buffers(module: nn.Module, num_agents: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """N copies of the module's buffers: a flat tensor for each dtype and device, and the views (N, *shape) by name."""
    named = dict(module.named_buffers())
    flat, views = [], {}
    for kind in dict.fromkeys((buffer.dtype, buffer.device) for buffer in named.values()):
        names = [name for name, buffer in named.items() if (buffer.dtype, buffer.device) == kind]
        flat.append(allocate(num_agents * sum(named[name].numel() for name in names), *kind))
        shapes = [named[name].shape for name in names]
        for name, view in zip(names, segment_views(flat[-1], num_agents, shapes), strict=True):
            views[name] = view.copy_(named[name].detach())
    return flat, {name: views[name] for name in named}


def _restore(module: nn.Module, num_agents: int, values: Tensor, buffers: dict[str, Tensor]) -> StackedModule:
    stacked = StackedModule(module, num_agents)
    stacked.values.copy_(values)
    for name, buffer in stacked.named_buffers():
        buffer.copy_(buffers[name])
    return stacked


@torch.no_grad()
def _link_gradient(parameter: nn.Parameter, view: Tensor) -> None:
    """Makes ``parameter.grad`` this view of the flat buffer and keeps its value; None becomes zero."""
    gradient = parameter.grad
    if parameter.requires_grad and (gradient is None or gradient.data_ptr() != view.data_ptr()):
        view.zero_() if gradient is None else view.copy_(gradient)
        parameter.grad = view


def _slots(module: nn.Module) -> dict[str, str]:
    """The name of the tensor in every place (slot) of the module that holds a parameter or buffer."""
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return {
        f"{prefix}.{local}" if prefix else local: names[id(tensor)]
        for prefix, submodule in module.named_modules()
        for local, tensor in (*submodule._parameters.items(), *submodule._buffers.items())
        if tensor is not None
    }


def _check_stackable(module: nn.Module, num_agents: int) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
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


def _check_can_reset(module: nn.Module) -> None:
    for name, submodule in module.named_modules():
        has_own = any(parameter is not None for parameter in submodule._parameters.values())
        if has_own and not callable(getattr(submodule, "reset_parameters", None)):
            raise ValueError(
                f"init='different': submodule {name!r} ({type(submodule).__name__}) has parameters but no "
                "reset_parameters(); give it one, or use init='same'"
            )


def _reset_each_agent(stacked: StackedModule, seed: int) -> None:
    with own_random_state(stacked.device):
        for i in range(stacked.num_agents):
            seed_generators(derive_seed("init", seed, i), stacked.device)
            for submodule in reversed(list(stacked.agent(i).modules())):
                if callable(reset := getattr(submodule, "reset_parameters", None)):
                    reset()
            stacked.keep_buffers(i)


def forward_precision(autocast: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which forward passes compute in `autocast`, as in `torch.autocast`; None changes nothing."""
    if autocast is None:
        return contextlib.nullcontext()
    # With the cache a CUDA graph would keep reading weights that were cast before its capture.
    return torch.autocast(device.type, autocast, cache_enabled=False)


def at_least_float32(outputs: Any) -> Any:
    """Outputs for a loss: a tensor of half precision is converted to float32, anything else is returned as it is."""
    return outputs.float() if isinstance(outputs, Tensor) and outputs.dtype in HALVES else outputs


def check_autocast(autocast: torch.dtype | None, parameters: torch.dtype) -> None:
    """Raises ValueError unless a model with parameters of this dtype can compute in `autocast`."""
    if autocast is None:
        return
    if autocast != torch.bfloat16:
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast!r}; float16 needs its losses scaled")
    if parameters != torch.float32:
        raise ValueError(
            f"autocast={autocast} is for parameters of torch.float32, the model's are {parameters}; without autocast a "
            "model computes in the dtype of its parameters"
        )
