"""The links between the stack and the modules of its agents, whose tensors are rows of the stack.

The stack holds the truth. A link is followed where that matters: before a gradient is accumulated, when an agent's
module is asked for, and by the next step of an optimizer. What has been put into an agent's module since then (another
tensor, other memory, a gradient, None) is moved into the agent's row, or refused.

Gradients of the agents' modules add up in spare memory, which becomes the stacked parameter's gradient when it has
none. So links are compared by identity, and nothing is copied, as long as nobody assigns gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gut_fast.agents.hooks import requiring_grad
from gut_fast.agents.layout import Place, own_storage

__all__ = ["Link", "follow", "following"]


class Link:
    """The link between a stacked tensor and its row that one agent's module holds, in one or more places.

    Args:
        label: names the agent's tensor in messages.
        stacked: the stacked tensor, (N, *shape).
        i: the number of the agent.
        lock: held while a stacked parameter is given a gradient.
        spare: of a parameter, memory (N, *shape) for its gradient; None for a buffer.

    Attributes:
        row: the agent's tensor, (*shape), in the stack's memory; of a parameter, a leaf of autograd.
        places: where the agent's module holds it.
        pointer: where its memory begins.
        is_trained: whether the stacked tensor required a gradient at the last look.
        owner: the gradient of the stack that the agent was linked to, or None.
        view: its row, which the agent was given as its gradient.
    """

    def __init__(self, label: str, stacked: Tensor, i: int, lock: threading.Lock, spare: Tensor | None) -> None:
        self.label, self.stacked, self._i, self._lock = label, stacked, i, lock
        self.places: list[Place] = []
        self.is_trained = stacked.requires_grad
        self.owner: Tensor | None = None
        self.view: Tensor | None = None
        row = own_storage(stacked.detach()[i])
        self.pointer = row.data_ptr()
        self.row = row if spare is None else nn.Parameter(row, requires_grad=self.is_trained)
        self.move(spare)
        if spare is not None:
            with requiring_grad(self.row):
                self.row.register_hook(self._before_accumulation)

    def follow(self) -> None:
        """Moves what the module holds now into the agent's row, and freezes it if the stack's is frozen.

        Raises:
            RuntimeError: it is gone, or of another shape, dtype or device than the row.
        """
        if self.row.data_ptr() != self.pointer:
            self.view = None  # the gradient may have been converted with the parameter
            given, self.row.data = self._checked(self.row.data), own_storage(self.stacked.detach()[self._i])
            self.row.data.copy_(given)
            self.pointer = self.row.data_ptr()
        for registry, key in self.places:
            if (other := registry.get(key)) is not self.row:
                other = self._checked(other)
                self.row.data.copy_(other)
                if other.is_leaf and other.grad is not None:
                    self.gradient_of_stack().detach()[self._i].add_(other.grad)
                registry[key] = self.row
        if self.stacked.requires_grad is not self.is_trained:
            self.is_trained = self.stacked.requires_grad
            self.row.requires_grad_(self.is_trained)
        self.follow_gradient()

    def follow_gradient(self) -> None:
        """Makes the agent's gradient the row of the stack's, after a gradient that the agent was given has moved there.

        An agent that has set its gradient to None finds zero in its row.
        """
        owner, gradient = self.stacked.grad, self.row.grad
        if gradient is not None and gradient is not self.view:
            owner = self.gradient_of_stack()
            dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            owner.detach()[self._i].copy_(dense)
        elif gradient is None and self.view is not None and owner is self.owner:
            self.view.zero_()
        self._link_to(owner)

    def cut(self) -> None:
        """Sets the agent's gradient to None, as the stack's is."""
        self.row.grad = self.owner = self.view = None

    def move(self, spare: Tensor | None) -> None:
        """Makes the agent's tensor a row of the stack's, after that has been given other memory.

        Args:
            spare: memory for the gradient of the stacked parameter.
        """
        self.cut()
        self._spare, self._spare_row = spare, None if spare is None else spare[self._i]
        self.row.data = own_storage(self.stacked.detach()[self._i])
        self.pointer = self.row.data_ptr()
        self._link_to(self.stacked.grad)

    def _before_accumulation(self, gradient: Tensor) -> None:
        """Makes the agent's gradient, which autograd is about to add to, a row of the stack's: a hook."""
        owner = self.stacked.grad
        if owner is None or owner is not self.owner or self.row.grad is not self.view:
            self.gradient_of_stack()
            self.follow_gradient()

    _before_accumulation.__torch_unserializable__ = True  # type: ignore[attr-defined]  # it is not saved with the row

    def gradient_of_stack(self) -> Tensor:
        """Returns the gradient of the stacked parameter, zero if it has none."""
        if self.stacked.grad is None:
            with self._lock:
                if self.stacked.grad is None:
                    assert self._spare is not None
                    self.stacked.grad = self._spare.zero_()
        gradient: Tensor = self.stacked.grad
        return gradient

    def _link_to(self, owner: Tensor | None) -> None:
        view = None if owner is None else self._spare_row if owner is self._spare else owner.detach()[self._i]
        try:
            self.row.grad = view
        except RuntimeError:
            self._checked(self.row)
            raise
        self.owner, self.view = owner, view

    def _checked(self, other: Any) -> Tensor:
        """Returns a tensor if it can be the agent's row."""
        row = self.stacked.detach()[self._i]
        if not isinstance(other, Tensor):
            raise RuntimeError(f"{self.label} has been replaced by {other!r}; put back a tensor of its shape")
        if (other.shape, other.dtype, other.device) != (row.shape, row.dtype, row.device):
            raise RuntimeError(
                f"{self.label} has become {tuple(other.shape)}, {other.dtype} on {other.device}, but the agents' are "
                f"{tuple(row.shape)}, {row.dtype} on {row.device}; convert all agents together, with .to() of what "
                "gut_fast.stack returned, or put this one back"
            )
        return other


@torch.no_grad()
def follow(links: Sequence[Link]) -> None:
    """Follows the links that are not as they were; every step asks, so this compares identities and no more."""
    for link in links:
        row, stacked = link.row, link.stacked
        if (
            row.grad is not link.view
            or stacked.grad is not link.owner
            or row.data_ptr() != link.pointer
            or stacked.requires_grad is not link.is_trained
            or any(registry.get(key) is not row for registry, key in link.places)
        ):
            link.follow()


def following(links: Sequence[Link]) -> Callable[[Tensor], None]:
    """A hook for a stacked parameter: before its gradient is accumulated, agents' gradients become rows of it."""

    def hook(gradient: Tensor) -> None:
        links[0].gradient_of_stack()  # the spare one, whose rows the agents know
        for link in links:
            if link.row.grad is not link.view or link.stacked.grad is not link.owner:
                link.follow_gradient()

    hook.__torch_unserializable__ = True  # type: ignore[attr-defined]
    return hook
