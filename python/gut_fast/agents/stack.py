"""One module for N agents, with all parameters in one flat buffer.

The stack has the submodules, names and hooks of the module that it was made from, with stacked tensors (N, *shape) in
place of the module's own. Where they lie is the matter of `gut_fast.agents.layout`, agents' modules that of
`gut_fast.agents.modules`.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gut_fast.agents.checks import check_can_reset, check_stackable
from gut_fast.agents.forward import Forward
from gut_fast.agents.hooks import GradientHooks
from gut_fast.agents.layout import Layout, own_storage, places
from gut_fast.agents.modules import AgentModules
from gut_fast.arguments import as_integer
from gut_fast.randomness import derive_seed, own_random_state, seed_generators

__all__ = ["StackedModule", "means", "stack", "stacks_of"]

REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
"""The attributes in which a `torch.nn.Module` keeps its tensors and submodules."""

_stacks: Any = WeakIdKeyDictionary()
"""The stack of every stacked parameter, as a weak reference."""

Self = TypeVar("Self", bound="StackedModule")


def stack(module: nn.Module, num_agents: int, *, init: str = "same", seed: int | None = None) -> StackedModule:
    """N copies of `module` as one module with stacked parameters.

    Args:
        module: the model; it is copied and stays as it is. Hooks on its parameters are kept, agent by agent.
        num_agents: number of agents N.
        init: ``"same"`` gives every agent the module's parameters; ``"different"`` calls ``reset_parameters`` of every
            submodule anew for each agent.
        seed: seed for ``"different"``: agent i's parameters depend on (seed, i) alone. None draws a seed from torch's
            default generator.

    Raises:
        TypeError, ValueError: the module has no parameters, or some are lazy, on the meta device, not floating-point,
            of different dtypes or devices, or also held in a list or another attribute; it is a stack, or has one; init
            is ``"different"`` and a submodule has parameters of its own but no ``reset_parameters``; or another
            argument is bad.
    """
    if init not in ("same", "different"):
        raise ValueError(f"init must be 'same' or 'different', got {init!r}")
    stacked = StackedModule(module, num_agents)
    if init == "different":
        check_can_reset(module)
        _reset_each_agent(stacked, int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed)
    return stacked


def stacks_of(parameters: Iterable[Tensor]) -> list[StackedModule]:
    """The stacks that some of these parameters belong to, each once."""
    found = [stack() for parameter in parameters if (stack := _stacks.get(parameter)) is not None]
    return list({id(each): each for each in found if each is not None}.values())


class StackedModule(nn.Module):
    """The models of N agents as one `torch.nn.Module` with stacked parameters; `stack` makes it.

    ``agents(x)`` with x of shape (N, batch, ...) is the forward pass of all agents, agent i's on ``x[i]``; gradients go
    straight into the stacked parameters. ``agents.agent(i)`` is the plain module of one agent.

    Parameters and buffers have the module's names, and shapes (N, *shape). Buffers, such as the running statistics of
    batch normalisation, are never mixed. What the module shares between submodules is shared in every agent. State
    dicts, hooks, ``train``, ``eval``, ``to``, copies and pickles are those of `torch.nn.Module`; ``apply`` reaches the
    modules of the agents, so that initialisers see the shapes that they expect.
    """

    num_agents: int
    """The number of agents N."""

    template: nn.Module
    """A module like the original one that holds the stacked tensors; it is not a submodule."""

    _layout: Layout
    _hooks: GradientHooks
    _forward: Forward
    _agents: AgentModules

    def __init__(self, module: nn.Module, num_agents: int) -> None:
        check_stackable(module, num_agents)
        if stacks := [each for each in module.modules() if isinstance(each, StackedModule)]:
            raise TypeError(
                f"a stack of {stacks[0].num_agents} agents cannot be stacked; stack the plain module, or its agents' "
                "average()"
            )
        super().__init__()
        self.num_agents = int(num_agents)
        hooks, template = GradientHooks.of(module), copy.deepcopy(module)
        stacked: dict[int, Tensor] = {}
        for registry, key in list(places(template)):
            tensor = registry[key]
            if id(tensor) not in stacked:
                stacked[id(tensor)] = _like(tensor, tensor.detach().expand(self.num_agents, *tensor.shape))
            registry[key] = stacked[id(tensor)]
        self.register_state_dict_pre_hook(_follow_before_saving)
        self.register_load_state_dict_post_hook(_settle_after_loading)
        self._take(template, hooks, Forward())

    def _take(self, template: nn.Module, hooks: GradientHooks, forward: Forward) -> None:
        """Takes a module that holds stacked tensors, and moves these into flat buffers."""
        # The dict is written to because a torch.nn.Module registers modules that are assigned to it.
        self.__dict__.update({name: template.__dict__[name] for name in REGISTRIES})
        layout = Layout(template, self.num_agents)
        self.__dict__.update(template=template, _hooks=hooks, _forward=forward)
        self.__dict__.update(_layout=layout, _agents=AgentModules(layout, hooks))
        self.training = template.training
        for name, parameter in template.named_parameters():
            _stacks[parameter] = weakref.ref(self)
            hooks.add_to_stack(name, parameter)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._layout.entries[0].tensor.device

    @property
    def values(self) -> Tensor:
        """The flat buffer of all parameters, [N · Σd_k]."""
        self._agents.settle()
        return own_storage(self._layout.flats[0])

    @values.setter
    def values(self, values: Tensor) -> None:
        self.values.copy_(values.detach())

    @property
    def gradients(self) -> Tensor:
        """The flat buffer in which backward passes of agents' modules add up their gradients, [N · Σd_k]."""
        self._agents.settle()
        return own_storage(self._layout.gradients)

    @gradients.setter
    def gradients(self, gradients: Tensor) -> None:
        self.gradients.copy_(gradients.detach())

    @property
    def flat_buffers(self) -> list[Tensor]:
        """The module's buffers, one flat tensor for each dtype and device, so that copies are quick."""
        self._agents.settle()
        return [own_storage(flat) for flat in self._layout.flats[1:]]

    def parameters(self, recurse: bool = True) -> Parameters:
        """The stacked parameters, each of shape (N, *shape), for an optimizer: a list, and an iterator as in torch.

        What has been put into the stack, as another parameter of the same shape, is copied into them first.

        Raises:
            RuntimeError: what has been put into the stack cannot be moved; the message says what to do.
        """
        return Parameters(super().parameters(recurse))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, likewise; the arguments are those of `torch.nn.Module`."""
        self._take_in()
        return super().named_parameters(*args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """All stacked parameters and buffers by name, shared ones once, those that are not saved among them."""
        return {name: tensor for name, tensor, _ in self._layout.entries}

    def agent(self, i: int) -> nn.Module:
        """Agent i's module, the same one at every call: its parameters, gradients and buffers are rows of the stack.

        It may be kept. Gradients may be zeroed before or after a forward pass, by an optimizer, the stack or the agent,
        to None or to zero. Another parameter, or other memory, that has been put into it is copied into agent i's row.

        Raises:
            TypeError, IndexError: there is no agent i.
            RuntimeError: a tensor of the agent has another shape, dtype or device than the other agents'.
        """
        if not 0 <= (i := as_integer(i, "i", None)) < self.num_agents:
            raise IndexError(f"there is no agent {i}; agents are 0 … {self.num_agents - 1}")
        self._agents.settle()
        return self._agents.module(i)

    def follow_agents(self) -> None:
        """Moves what agents' modules hold, gradients among it, into the stack; the optimizers' steps call it.

        Raises:
            RuntimeError: a tensor of an agent has another shape, dtype or device than the other agents'.
        """
        self._take_in()
        self._agents.follow(settle=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients of the stack, and so of all agents, to None or to zero."""
        if not set_to_none:
            self.follow_agents()
            super().zero_grad(set_to_none)
            return
        self._take_in()
        for _, tensor, _ in self._layout.entries:  # without torch's search for parameters
            tensor.grad = None
        self.cut_gradients()

    def cut_gradients(self) -> None:
        """Sets the agents' gradients to None where the stack's are, as an optimizer's ``zero_grad`` leaves them."""
        self._agents.cut_gradients()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all agents: every tensor of the arguments and of the outputs is (N, ...), one row an agent.

        The agents are computed at once through `torch.func.vmap`, with random numbers that differ between them; a
        module that vmap cannot take, since it looks at values or changes tensors of its own, is computed agent by
        agent, which is said once; the first pass in training, and that in evaluation, shows whether it can. Buffers
        change as in a loop over the agents.

        It computes with the tensors that stand in the module at that time, so `torch.func.functional_call` can lend
        others, each of shape (N, *shape).

        Raises:
            ValueError: a tensor has no leading dimension N.
            RuntimeError: a tensor in the module has another shape, or a parameter has come in a new place.
        """
        entries = self._layout.standing()
        self._agents.follow(settle=entries is self._layout.entries)
        return self._forward(self.template, entries, self.num_agents, args, kwargs)

    def apply(self: Self, fn: Callable[[nn.Module], None]) -> Self:
        """Applies a function to every submodule of every agent's module, children first, and returns the stack."""
        for i in range(self.num_agents):
            self.agent(i).apply(fn)
        self.follow_agents()
        return self

    def train(self: Self, mode: bool = True) -> Self:
        """Sets training mode, or evaluation mode, in the stack and in all agents' modules."""
        self.template.train(mode)
        self._agents.train(mode)
        self.training = mode
        return self

    def average(self) -> nn.Module:
        """A plain module with the agents' mean parameters and floating-point buffers, and agent 0's other buffers.

        It is a copy, and as the agents are: in training or in evaluation mode.
        """
        mean = self.mean_state()
        return self._layout.module_with({name: _like(tensor, mean[name]) for name, tensor in self.tensors().items()})

    def mean_state(self) -> dict[str, Tensor]:
        """The parameters and buffers of `average` by name; means are accumulated in float64."""
        self.follow_agents()
        state = self.tensors()
        return {name: mean.to(state[name].dtype, copy=True) for name, mean in means(state).items()}

    def unlinked_agent(self, i: int) -> tuple[nn.Module, Callable[[], None]]:
        """A module of agent i's rows whose parameters and gradients nothing follows, for engines.

        Returns:
            The module, and a function that moves buffers which the module has replaced into agent i's rows.
        """
        self._agents.settle()
        return self._agents.unlinked(i)

    def spare_gradients(self) -> list[Tensor]:
        """The segments of `gradients`, (N, *shape) for each parameter."""
        self._agents.settle()
        return self._layout.spares()

    def skeleton(self) -> nn.Module:
        """A module that holds the stacked tensors themselves, with modes and hooks of its own, for `call`."""
        self._take_in()
        return self._layout.module_with(self.tensors())

    def part(self, agents: range) -> StackedModule:
        """A stack of these agents alone, with memory of its own; for all agents it is this stack itself."""
        if len(agents) == self.num_agents:
            return self
        self.follow_agents()
        first = {name: _like(tensor, tensor.detach()[0].clone()) for name, tensor in self.tensors().items()}
        for name, tensor in first.items():
            self._hooks.add_to_agent(name, tensor)
        part = StackedModule(self._layout.module_with(first), len(agents))
        with torch.no_grad():
            for name, tensor in part.tensors().items():
                tensor.copy_(self.tensors()[name][agents.start : agents.stop])
        return part

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies the tensors into the stack, as in `torch.nn`; with `assign`, in their dtype and on their device.

        Parameters stay the same objects, so optimizers go on with them.

        Raises:
            RuntimeError: names or shapes differ from the stack's own; nothing has been changed.
        """
        self.follow_agents()
        memory = [tensor.data for tensor in self.tensors().values()]
        before = [tensor.clone() for tensor in memory]
        try:
            incompatible = super().load_state_dict(state_dict, strict, assign)
            self._agents.settle()
        except BaseException:
            self._layout.put_back(memory)
            for tensor, values in zip(memory, before, strict=True):
                tensor.copy_(values)
            self._agents.settle()
            raise
        return incompatible

    def share_memory(self: Self) -> Self:
        """Moves parameters and buffers into memory that other processes can map, as `torch.nn.Module` does."""
        self.follow_agents()
        self._layout.move_to([flat.clone().share_memory_() for flat in self._layout.flats])
        self._agents.move()
        return self

    def extra_repr(self) -> str:
        """How many agents there are, of what, and where."""
        values, own = self.values, self.template.extra_repr()
        size = values.numel() // self.num_agents
        kind = f"{self.num_agents} agents of {type(self.template).__name__}({own if chr(10) not in own else ''})"
        return f"{kind}, {size:,} parameters each, {values.dtype} on {values.device}"

    def _take_in(self) -> None:
        """Moves what stands in the stack in place of its own tensors into these."""
        if not self._layout.is_held():
            self._agents.settle()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.follow_agents()
        super()._apply(fn, recurse)
        self._agents.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.template._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.template._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self.follow_agents()
        return {name: value for name, value in self.__dict__.items() if name not in ("_layout", "_agents")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take(self.template, self._hooks, self._forward)


class Parameters(list[nn.Parameter], Iterator[nn.Parameter]):
    """A list of parameters that is its own iterator too, so that ``next(agents.parameters())`` works as in torch."""

    _rest: Iterator[nn.Parameter] | None = None

    def __next__(self) -> nn.Parameter:
        if self._rest is None:
            self._rest = iter(self)
        return next(self._rest)


def means(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The agents' mean of each stacked tensor, float64; agent 0's value of a tensor that is not floating-point."""
    return {
        name: rows.detach().mean(0, dtype=torch.float64) if rows.is_floating_point() else rows[0]
        for name, rows in stacked.items()
    }


def _like(stacked: Tensor, value: Tensor) -> Tensor:
    """A tensor as a parameter if the stacked one is a parameter."""
    is_parameter = isinstance(stacked, nn.Parameter)
    return nn.Parameter(value, requires_grad=stacked.requires_grad) if is_parameter else value


def _follow_before_saving(stacked: StackedModule, prefix: str, keep_vars: bool) -> None:
    """Moves what agents' modules hold into the stack, whose state is about to be saved."""
    stacked.follow_agents()


def _settle_after_loading(stacked: StackedModule, incompatible_keys: Any) -> None:
    """Moves tensors that ``load_state_dict(assign=True)`` has put into the stack into its memory."""
    with contextlib.suppress(RuntimeError):  # what cannot be stacked is an error of this loading, or of the next use
        stacked._agents.settle()


def _reset_each_agent(stacked: StackedModule, seed: int) -> None:
    with own_random_state(stacked.device):
        for i in range(stacked.num_agents):
            module, keep_buffers = stacked.unlinked_agent(i)
            seed_generators(derive_seed("init", seed, i), stacked.device)
            for submodule in reversed(list(module.modules())):
                if callable(reset := getattr(submodule, "reset_parameters", None)):
                    reset()
            keep_buffers()
