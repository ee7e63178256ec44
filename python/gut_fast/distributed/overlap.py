"""Messages that leave while backward is still running.

A bucket's message leaves once all its gradients are there, and those of the buckets before it have left, so that all
ranks send in one order. What is sent then must be what the step is taken with. Whether it will be is learned in the
first step, which sends nothing early but watches what happens to gradients whose messages would have left. If they
change after that (clipping, AMP's unscaling, further backward passes), overlap turns itself off and says why.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gut_fast.distributed.buckets import Bucket
from gut_fast.distributed.exchange import Exchange
from gut_fast.kernels.backends import GossipStep

__all__ = ["CHANGED", "SCALED", "Overlap"]

CHANGED = (
    "gradients change between backward() and step(), as by clipping, AMP's unscaling or further backward passes "
    "(put all but the last of these into no_sync())"
)
MODEL_CHANGED = "parameters or their state change between backward() and step(); change them after step()"
SCALED = "step() scales the gradients itself (grad_scale or AMP's GradScaler)"
HYPERPARAMETERS = "learning rate or hyper-parameters change between backward() and step(); change them after step()"


Versions = list[tuple["Tensor | None", int]]
"""Tensors, each with its version, which counts what is done to it in place."""


class _Sent(NamedTuple):
    """What a bucket's message was computed from."""

    gradients: Versions
    model: Versions
    coefficients: Tensor


class Overlap:
    """Watches the gradients of an optimizer's parameters and lets buckets leave.

    Args:
        exchange: its buckets are planned.
        parameters: of each group.
        make_step: the step of a group with the gradients that are there, None if the next step is not mixed.
        number: of the next step.

    Attributes:
        reason: why there is no overlap any more, or None.
    """

    def __init__(
        self,
        exchange: Exchange,
        parameters: Sequence[Sequence[Tensor]],
        make_step: Callable[[int], GossipStep],
        number: Callable[[], int],
    ) -> None:
        self.reason: str | None = None
        self._exchange, self._parameters = exchange, parameters
        self._make_step, self._number = make_step, number
        self._is_paused, self._has_watched = False, False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._of_bucket = [parameters[b.group][b.start : b.stop] for b in exchange.buckets]
        for own in self._of_bucket:
            for parameter in own:
                if parameter.requires_grad:
                    self._watch(parameter)
        self._begin_step()

    def _watch(self, parameter: Tensor) -> None:
        """Calls `_gradient_is_there`; the parameter, which may outlive the optimizer, does not keep it alive."""
        method = weakref.WeakMethod(self._gradient_is_there)

        def hook(parameter: Tensor) -> None:
            if (is_there := method()) is not None:
                is_there(parameter)

        self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def __str__(self) -> str:
        if self.reason is not None:
            return f"off: {self.reason}"
        return "on" if self._has_watched else "on, from the second step"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients that come in this block are not the last ones of their step."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def close_step(self, steps: Sequence[GossipStep | None], reason: str | None = None) -> None:
        """Before a step is finished: looks whether what has left is still right; `reason` says if it is not."""
        if self.reason is None:
            for bucket, sent in zip(self._exchange.buckets, self._sent, strict=False):
                step = steps[bucket.group]
                assert step is not None
                if not _are_same(sent.gradients, self._gradients_of(bucket)):
                    reason = reason or CHANGED
                elif sent.coefficients is not step.coefficients:
                    reason = reason or HYPERPARAMETERS
                elif not _are_same(sent.model, self._model_of(bucket, step)):
                    reason = reason or MODEL_CHANGED
            if reason is not None:
                self._turn_off(reason)
        self._has_watched = True
        self._begin_step()

    def turn_off(self) -> None:
        """Without a word."""
        for handle in self._handles:
            handle.remove()

    def _begin_step(self) -> None:
        self._sent: list[_Sent] = []
        self._there: set[Tensor] = set()

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if self._is_paused:
            return
        self._there.add(parameter)
        while len(self._sent) < len(self._of_bucket) and self._is_complete(len(self._sent)):
            self._leave(self._exchange.buckets[len(self._sent)])

    def _is_complete(self, number: int) -> bool:
        return all(p in self._there or not p.requires_grad for p in self._of_bucket[number])

    def _leave(self, bucket: Bucket) -> None:
        step = self._make_step(bucket.group)
        self._sent.append(_Sent(self._gradients_of(bucket), self._model_of(bucket, step), step.coefficients))
        if self._has_watched and self._exchange.mixes(self._number()):
            self._exchange.begin(bucket, step, self._number())

    def _gradients_of(self, bucket: Bucket) -> Versions:
        return _versions([parameter.grad for parameter in self._of_bucket[bucket.number]])

    def _model_of(self, bucket: Bucket, step: GossipStep) -> Versions:
        return _versions([*self._of_bucket[bucket.number], *step.state])

    def _turn_off(self, reason: str) -> None:
        self.reason = reason
        self.turn_off()
        harm = " This step still mixes messages that were computed before." if self._has_watched else ""
        if torch.distributed.is_initialized() and self._exchange.group.rank:
            return
        warnings.warn(
            f"overlap is off from now on, messages leave in step(): {reason}.{harm}", UserWarning, stacklevel=2
        )


def _versions(tensors: Sequence[Tensor | None]) -> Versions:
    return [(tensor, 0 if tensor is None else tensor._version) for tensor in tensors]


def _are_same(sent: Versions, now: Versions) -> bool:
    return all(g is h and version == later for (g, version), (h, later) in zip(sent, now, strict=True))
