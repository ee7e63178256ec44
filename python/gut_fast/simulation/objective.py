"""The loss of one agent, and the metrics of an evaluation, as functions of a model and a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from gut_fast.agents import StackedModule
from gut_fast.agents.precision import at_least_float32, forward_precision

__all__ = ["Loss", "Metric", "ModelLoss", "Objective", "Supervised", "accuracy", "applied"]

IGNORED_LABEL = -100
"""The label of targets that `torch.nn.functional.cross_entropy` leaves out of its mean."""

Loss = Callable[[Any, Any], Tensor]
"""The mean loss of one agent's batch: (outputs [B, ...], targets [B, ...]) -> scalar."""

ModelLoss = Callable[[Any, Any], Tensor]
"""The mean loss of one agent's batch: (model, batch) -> scalar."""

Metric = Callable[[Any, Any], Any]
"""A mean over one batch, of the same arguments as the loss: (outputs, targets) or (model, batch) -> scalar."""


class Objective:
    """The loss of one agent, ``objective(model, batch)``, by a function of the model and the batch.

    Args:
        loss: mean loss of a batch, (model, batch) -> scalar.
        metrics: means over a batch by name, (model, batch) -> scalar.
        autocast: dtype of `torch.autocast` around these functions, or None.
    """

    def __init__(
        self, loss: ModelLoss, metrics: Mapping[str, Metric] | None = None, autocast: torch.dtype | None = None
    ) -> None:
        self.metrics = dict(metrics or {})
        self.autocast = autocast
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one agent's batch."""
        with self._precision(batch):
            loss = self._loss(model, batch)
        return at_least_float32(loss)  # type: ignore[no-any-return]

    def measure(self, model: nn.Module, batch: Any, *, with_loss: bool) -> Tensor:
        """The loss, if asked for, and the metrics of a batch, float64 [1 + metrics]."""
        with self._precision(batch):
            losses = [self._loss(model, batch)] if with_loss else []
            return _as_numbers([*losses, *(metric(model, batch) for metric in self.metrics.values())], batch)

    def halves(self) -> tuple[Callable[[nn.Module, Any], Any], Callable[[Any, Any], Tensor]]:
        """A function of one agent's model and batch, and one of all its results and batches that gives losses [N]."""
        return self, lambda losses, batch: losses

    def _precision(self, batch: Any) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return forward_precision(self.autocast, tree_leaves(batch)[0].device)


class Supervised(Objective):
    """The loss of a model's outputs for the inputs and targets of a batch, which is a pair (inputs, targets).

    Args:
        loss: mean loss of a batch, (outputs, targets) -> scalar; outputs of half precision reach it in float32.
        metrics: means over a batch by name, (outputs, targets) -> scalar.
        autocast: dtype of `torch.autocast` around the model's forward pass, or None.
    """

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The outputs of the model for the batch."""
        with self._precision(batch):
            outputs = model(batch[0])
        return at_least_float32(outputs)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one agent's batch."""
        return self._loss(self.outputs(model, batch), batch[1])

    def measure(self, model: nn.Module, batch: Any, *, with_loss: bool) -> Tensor:
        """The loss, if asked for, and the metrics of a batch, float64 [1 + metrics]."""
        outputs, targets = self.outputs(model, batch), batch[1]
        losses = [self._loss(outputs, targets)] if with_loss else []
        return _as_numbers([*losses, *(metric(outputs, targets) for metric in self.metrics.values())], batch)

    def halves(self) -> tuple[Callable[[nn.Module, Any], Any], Callable[[Any, Any], Tensor]]:
        """A function of one agent's model and batch, and one of all its results and batches that gives losses [N]."""
        return (self.outputs, _cross_entropies) if self._loss is functional.cross_entropy else super().halves()

    @property
    def is_classification(self) -> bool:
        """True if the loss takes class numbers as targets."""
        known = (functional.cross_entropy, functional.nll_loss)
        return self._loss in known or isinstance(self._loss, (nn.CrossEntropyLoss, nn.NLLLoss))

    @property
    def ignored_label(self) -> int:
        """The label of targets that the loss leaves out."""
        return int(getattr(self._loss, "ignore_index", IGNORED_LABEL))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the targets that are the class with the largest output, [B, C, ...]; negative ones are left out."""
    hits = outputs.argmax(1) == targets
    return hits.sum(dtype=torch.float64) / (targets >= 0).sum(dtype=torch.float64)


def applied(
    stacked: StackedModule, function: Callable[[nn.Module, Any], Any], *, training: bool
) -> Callable[..., tuple[Any, ...]]:
    """A function of the model and a batch as one of the batch and the model's tensors.

    It takes a batch and then one agent's parameters and buffers, in the order of `StackedModule.tensors`, and returns
    what `function` returns, and then the new buffers. The argument list is flat, as vmap walks nested ones in Python.
    """
    module = _Applied(stacked.skeleton(), function)
    if not training:
        module.eval()
    elif not module.model.training:
        module.train()
    names = {id(tensor): name for name, tensor in stacked.tensors().items()}
    # Tensors by slot need no search for ties in functional_call, which costs as much as a small forward pass.
    slots = {slot: names[id(tensor)] for slot, tensor in _slots(module)}
    order = list(stacked.tensors())
    buffers = [name for name, tensor in stacked.tensors().items() if not isinstance(tensor, nn.Parameter)]
    first_slots = [next(slot for slot, other in slots.items() if other == name) for name in buffers]

    def call(batch: Any, *tensors: Tensor) -> tuple[Any, ...]:
        by_name = dict(zip(order, tensors, strict=True))
        by_slot = {slot: by_name[name] for slot, name in slots.items()}
        result = functional_call(module, by_slot, (batch,), tie_weights=False)
        return result, *(by_slot[slot] for slot in first_slots)

    return call


class _Applied(nn.Module):
    """A function of a model and a batch as a module, into whose model `functional_call` can put tensors."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self._function = model, function
        self.training = model.training

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)


def _slots(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module with the names of all their places."""
    parameters, buffers = (each(remove_duplicate=False) for each in (module.named_parameters, module.named_buffers))
    return [*parameters, *buffers]


def _as_numbers(values: list[Any], batch: Any) -> Tensor:
    device = tree_leaves(batch)[0].device
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(value, device=device).to(torch.float64) for value in values])


def _cross_entropies(outputs: Any, batch: Any) -> Tensor:
    """The mean cross entropies [N] of outputs [N, B, C, ...] and targets [N, B, ...], classes or probabilities."""
    targets = batch[1]
    if not isinstance(outputs, Tensor) or targets.ndim != outputs.ndim - 1:
        losses: Tensor = vmap(functional.cross_entropy, randomness="different")(outputs, targets)
        return losses
    # One call takes all samples: vmap decomposes this loss in Python, which costs more than a small model.
    losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    counted: Tensor = (targets != IGNORED_LABEL).flatten(1).sum(1)
    return losses.view(len(targets), -1).sum(1) / counted
