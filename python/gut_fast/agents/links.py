"""The links between the stack and the modules of its agents, whose tensors are rows of the stack.

The stack holds the truth. A link is followed where that matters: before a gradient is accumulated, when an agent's
module is asked for, and by the next step of an optimizer. What has been put into an agent's module since then (another
tensor, other memory, a gradient, None) is moved into the agent's row, or refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gut_fast.agents.hooks import requiring_grad
from gut_fast.agents.layout import Place, own_storage

__all__ = ["Link", "ParameterLink"]


class Link:
    """The link between a stacked tensor and its row that one agent's module holds, in one or more places.

    Args:
        label: names the agent's tensor in messages.
        stacked: the stacked tensor, (N, *shape).
        i: the number of the agent.

    Attributes:
        row: the agent's tensor, (*shape), in the stack's memory.
        places: where the agent's module holds it.
    """

    def __init__(self, label: str, stacked: Tensor, i: int) -> None:
        self._label, self._stacked, self._i = label, stacked, i
        self.places: list[Place] = []
        self.row = own_storage(stacked.detach()[i])
        self._pointer = self.row.data_ptr()

    def follow(self) -> None:
        """Moves what the module holds now into the agent's row.

        Raises:
            RuntimeError: it is gone, or of another shape, dtype or device than the row.
        """
        for registry, key in self.places:
            if registry.get(key) is not self.row:
                self._adopt(registry.get(key))
                registry[key] = self.row
        if self.row.data_ptr() != self._pointer:
            given, self.row.data = self._checked(self.row.data), own_storage(self._stacked.detach()[self._i])
            self.row.data.copy_(given)
            self._pointer = self.row.data_ptr()

    def move(self, spare: Tensor | None) -> None:
        """Makes the agent's tensor a row of the stack's, after that has been given other memory.

        Args:
            spare: memory for the gradient of the stacked parameter.
        """
        self.row.data = own_storage(self._stacked.detach()[self._i])
        self._pointer = self.row.data_ptr()

    def cut(self) -> None:
        """Does nothing: a buffer has no gradient."""

    def _adopt(self, other: Any) -> None:
        """Takes over another tensor that has been put into the module."""
        self.row.data.copy_(self._checked(other))

    def _checked(self, other: Any) -> Tensor:
        """Returns a tensor if it can be the agent's row."""
        row = self._stacked.detach()[self._i]
        if not isinstance(other, Tensor):
            raise RuntimeError(f"{self._label} has been replaced by {other!r}; put back a tensor of its shape")
        if (other.shape, other.dtype, other.device) != (row.shape, row.dtype, row.device):
            raise RuntimeError(
                f"{self._label} has become {tuple(other.shape)}, {other.dtype} on {other.device}, but the agents' are "
                f"{tuple(row.shape)}, {row.dtype} on {row.device}; convert all agents together, with .to() of what "
                "gut_fast.stack returned, or put this one back"
            )
        return other.detach()


class ParameterLink(Link):
    """The link between a stacked parameter and one agent's parameter; its gradient is a row of the stack's too.

    Args:
        label, stacked, i: as for `Link`.
        spare: memory (N, *shape) for the gradient of the stacked parameter, taken if it has none.
        lock: held while the stacked parameter is given a gradient.
    """

    row: nn.Parameter

    def __init__(self, label: str, stacked: nn.Parameter, i: int, spare: Tensor, lock: threading.Lock) -> None:
        super().__init__(label, stacked, i)
        self._spare: Tensor | None = spare
        self._lock, self._is_trained = lock, stacked.requires_grad
        self.row = nn.Parameter(self.row, requires_grad=stacked.requires_grad)
        self._owner: Tensor | None = None  # the gradient of the stack that the agent was linked to,
        self._view: Tensor | None = None  # and its row
        for parameter, prepare in ((self.row, self.before_accumulation), (stacked, self.before_accumulation_in_stack)):
            with requiring_grad(parameter):
                parameter.register_hook(_BeforeAccumulation(prepare))

    def follow(self) -> None:
        """Moves parameter and gradient of the module into the agent's row, and freezes it if the stack's is frozen."""
        if self.row.data_ptr() != self._pointer:
            self._view = None  # the gradient may have been converted with the parameter
        super().follow()
        if self._stacked.requires_grad is not self._is_trained:
            self._is_trained = self._stacked.requires_grad
            self.row.requires_grad_(self._is_trained)
        self._follow_gradient()

    def before_accumulation(self) -> None:
        """Makes the agent's gradient a row of the stack's, which autograd is about to add to."""
        owner = self._stacked.grad
        if owner is None or owner is not self._owner or self.row.grad is not self._view:
            with torch.no_grad():
                self._checked(self.row)
                self._gradient_of_stack()
                self._follow_gradient()

    def move(self, spare: Tensor | None) -> None:
        """Makes the agent's parameter and gradient rows of the stack's, after that has been given other memory."""
        self._link_to(None)
        super().move(spare)
        self._spare = spare
        self._follow_gradient()

    def before_accumulation_in_stack(self) -> None:
        """Zeroes the agent's row of the stack's gradient if the agent has set its gradient to None, and the like."""
        with torch.no_grad():
            self._follow_gradient()

    def cut(self) -> None:
        """Sets the agent's gradient to None, and forgets which it was."""
        self._link_to(None)

    def _follow_gradient(self) -> None:
        owner, gradient = self._stacked.grad, self.row.grad
        if gradient is self._view and owner is self._owner:
            return
        if gradient is not None and gradient is not self._view:  # a gradient of its own
            owner = self._gradient_of_stack()
            owner.detach()[self._i].copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        elif gradient is None and self._view is not None and owner is self._owner and owner is not None:
            owner.detach()[self._i].zero_()  # the agent has set it to None
        self._link_to(owner)

    def _adopt(self, other: Any) -> None:
        super()._adopt(other)
        if other.grad is not None:
            self._gradient_of_stack().detach()[self._i].add_(other.grad)

    def _gradient_of_stack(self) -> Tensor:
        with self._lock:
            if self._stacked.grad is None:
                assert self._spare is not None
                self._stacked.grad = self._spare.zero_()
            gradient: Tensor = self._stacked.grad
        return gradient

    def _link_to(self, owner: Tensor | None) -> None:
        self._owner = owner
        self._view = None if owner is None else owner.detach()[self._i]
        self.row.grad = self._view


class _BeforeAccumulation:
    """A hook on a parameter, which is not saved with it."""

    __torch_unserializable__ = True

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def __call__(self, gradient: Tensor) -> None:
        self._prepare()
