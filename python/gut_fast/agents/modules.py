"""The modules of single agents, made when they are asked for, and their links to the stack."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import zip_longest

from torch import Tensor, nn

from gut_fast.agents.hooks import GradientHooks, requiring_grad
from gut_fast.agents.layout import Layout, own_storage, places
from gut_fast.agents.links import Link, follow, following

__all__ = ["AgentModules"]


class AgentModules:
    """The modules of the agents of a stack.

    Args:
        layout: the stacked tensors.
        hooks: the hooks that every agent's parameters get.
    """

    def __init__(self, layout: Layout, hooks: GradientHooks) -> None:
        self._layout, self._hooks, self._lock = layout, hooks, threading.Lock()
        self._modules: dict[int, tuple[nn.Module, list[Link]]] = {}
        self._columns: list[list[Link]] = []  # the links to each stacked tensor

    def settle(self) -> None:
        """Moves stacked tensors that do not lie in the flat buffers into them, and agents' tensors along with them."""
        if self._layout.settle():
            self.move()

    def module(self, i: int) -> nn.Module:
        """Agent i's module, whose links have been followed."""
        if i not in self._modules:
            self._modules[i] = self._linked_module(i)
        module, links = self._modules[i]
        follow(links)
        return module

    def follow(self, *, settle: bool) -> None:
        """Moves what the modules hold into the stack, whose tensors are settled before, or not."""
        if self._columns and settle:
            self.settle()
        for links in self._columns:
            follow(links)

    def cut_gradients(self) -> None:
        """Sets the modules' gradients to None."""
        for links in self._columns:
            for link in links:
                link.cut()

    def move(self) -> None:
        """Lets the modules follow the stacked tensors into new memory."""
        for links, spare in zip_longest(self._columns, self._layout.spares()):
            for link in links or ():
                link.move(spare)

    def train(self, mode: bool) -> None:
        """Puts all modules into training or evaluation mode."""
        for module, _ in self._modules.values():
            module.train(mode)

    def unlinked(self, i: int) -> tuple[nn.Module, Callable[[], None]]:
        """A module of agent i's rows whose parameters and gradients nothing follows.

        Returns:
            The module, and a function that moves buffers which the module has replaced into agent i's rows.
        """
        rows, links = {}, {}
        for name, tensor, _ in self._layout.entries:
            if isinstance(tensor, nn.Parameter):
                rows[name] = nn.Parameter(own_storage(tensor.detach()[i]), requires_grad=tensor.requires_grad)
                self._hooks.add_to_agent(name, rows[name])
            else:
                links[name] = Link(f"agent {i}'s {name}", tensor, i, self._lock, None)
        return self._copy_with(rows, links), partial(follow, list(links.values()))

    def _linked_module(self, i: int) -> tuple[nn.Module, list[Link]]:
        links: dict[str, Link] = {}
        for (name, tensor, _), spare in zip_longest(self._layout.entries, self._layout.spares()):
            links[name] = Link(f"agent {i}'s {name}", tensor, i, self._lock, spare)
            self._hooks.add_to_agent(name, links[name].row)
        module = self._copy_with({}, links)
        if not self._columns:
            self._columns = [[] for _ in links]
            for entry, column in zip(self._layout.entries, self._columns, strict=True):
                if isinstance(entry.tensor, nn.Parameter):
                    with requiring_grad(entry.tensor):
                        entry.tensor.register_hook(following(column))
        for column, link in zip(self._columns, links.values(), strict=True):
            column.append(link)
        return module, list(links.values())

    def _copy_with(self, rows: Mapping[str, Tensor], links: Mapping[str, Link]) -> nn.Module:
        """A copy of the stack's module with these rows, and with linked ones; the links learn where theirs are."""
        module = self._layout.module_with({**rows, **{name: link.row for name, link in links.items()}})
        by_row = {id(link.row): link for link in links.values()}
        for registry, key in places(module):
            if (link := by_row.get(id(registry[key]))) is not None:
                link.places.append((registry, key))
        return module
