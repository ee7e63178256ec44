"""The hooks on a module's parameters, which every agent's parameters have as well."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradientHooks", "requiring_grad"]

Hook = Callable[[Tensor], Any]


class GradientHooks:
    """The hooks that a module's parameters were given with ``register_hook``, by the parameter's name.

    A hook gets the gradient of one agent, (*shape), whichever way the gradient is computed. Deep copies have the same
    hooks; pickles have none, as in torch.
    """

    def __init__(self, hooks: dict[str, list[Hook]]) -> None:
        self._hooks = hooks

    @classmethod
    def of(cls, module: nn.Module) -> GradientHooks:
        """Takes the hooks of a module, with a warning if it has some that agents cannot have."""
        named = dict(module.named_parameters())
        lost = [name for name, parameter in named.items() if getattr(parameter, "_post_accumulate_grad_hooks", None)]
        if lost:
            warnings.warn(
                f"hooks after accumulation are not kept: those of {', '.join(lost)}; register them on the parameters "
                "of what gut_fast.stack returns",
                stacklevel=5,
            )
        return cls(
            {name: [*hooks.values()] for name, parameter in named.items() if (hooks := parameter._backward_hooks)}
        )

    def add_to_agent(self, name: str, parameter: Tensor) -> None:
        """Gives an agent's parameter its hooks."""
        with requiring_grad(parameter):
            for hook in self._hooks.get(name, []):
                parameter.register_hook(hook)

    def add_to_stack(self, name: str, parameter: Tensor) -> None:
        """Gives a stacked parameter its hooks, which see one agent's gradient after the other."""
        with requiring_grad(parameter):
            for hook in self._hooks.get(name, []):
                parameter.register_hook(_each_agent(hook))

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientHooks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._hooks:
            warnings.warn(f"the hooks of {', '.join(self._hooks)} are not saved", stacklevel=2)
        return GradientHooks, ({},)


def _each_agent(hook: Hook) -> Hook:
    def all_agents(gradient: Tensor) -> Tensor:
        rows = [(row, hook(row)) for row in gradient.unbind(0)]
        return torch.stack([row if changed is None else changed for row, changed in rows])

    all_agents.__torch_unserializable__ = True  # type: ignore[attr-defined]
    return all_agents


@contextlib.contextmanager
def requiring_grad(tensor: Tensor) -> Iterator[None]:
    """A context in which hooks can be registered on a frozen parameter too; on a buffer it does nothing."""
    before = tensor.requires_grad
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(True)
    yield
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(before)
