"""Messages that leave while backward is still running.

A bucket's messages leave once all its gradients are there, and the messages of the buckets before it have left, so that
all ranks send in one order. The step must then be taken with what they were computed from. Whether it will be is
learned in the first step, which sends nothing early but watches what happens to gradients whose messages would have
left. If they change after that (clipping, AMP's unscaling, further backward passes), overlap turns itself off and says
why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gut_fast.distributed.traffic import Bucket
from gut_fast.kernels.backends import GossipStep

__all__ = ["SCALED", "Overlap"]

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
    """The inputs from which a bucket's messages were computed; sums of gradients in the step that is watched."""

    gradients: Versions
    sums: list[str]
    model: Versions
    coefficients: Tensor


class Overlap:
    """Watches which gradients are there, and whether messages that left early were the right ones.

    Args:
        buckets: all buckets, in the order in which they leave.
        parameters: the parameters of each group.

    Attributes:
        reason: why there is no overlap any more, or None.
        has_watched: whether a whole step was watched, so that messages may leave early.
    """

    def __init__(self, buckets: Sequence[Bucket], parameters: Sequence[Sequence[Tensor]]) -> None:
        self.reason: str | None = None
        self.has_watched = False
        self._buckets = buckets
        self._of_bucket = [parameters[b.group][b.start : b.stop] for b in buckets]
        self._is_paused = False
        self._begin_step()

    def _begin_step(self) -> None:
        self._sent: list[_Sent] = []
        self._there: set[Tensor] = set()

    def __str__(self) -> str:
        if self.reason is not None:
            return f"off: {self.reason}"
        return "on" if self.has_watched else "on, from the second step"

    @property
    def watched(self) -> list[Tensor]:
        """The parameters whose gradients buckets wait for."""
        return [p for own in self._of_bucket for p in own if p.requires_grad]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Makes a context; gradients that come in it are not the last ones of their step."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def completed_by(self, parameter: Tensor) -> list[Bucket]:
        """Returns the buckets that can leave now that the gradient of this parameter is there."""
        if self._is_paused or self.reason:
            return []
        self._there.add(parameter)
        left = len(self._sent)
        stop = left
        while stop < len(self._buckets) and all(p in self._there or not p.requires_grad for p in self._of_bucket[stop]):
            stop += 1
        return list(self._buckets[left:stop])

    def note(self, bucket: Bucket, step: GossipStep) -> None:
        """Takes down what the messages of the next bucket are computed from."""
        gradients, model = self._gradients_of(bucket), self._model_of(bucket, step)
        self._sent.append(_Sent(gradients, self._sums_of(bucket), model, step.coefficients))

    def close_step(self, steps: Sequence[GossipStep | None], reason: str | None = None) -> str | None:
        """Checks, before a step is finished, that what its messages were computed from is still right.

        Args:
            steps: the step of each group as it is taken.
            reason: why messages that left early are wrong, if that is known.

        Returns:
            A warning if overlap turns itself off now, else None.
        """
        warning = None
        if self.reason is None:
            for bucket, sent in zip(self._buckets, self._sent, strict=False):
                step = steps[bucket.group]
                assert step is not None
                if not _are_same(sent.gradients, self._gradients_of(bucket)) or sent.sums != self._sums_of(bucket):
                    reason = reason or CHANGED
                elif sent.coefficients is not step.coefficients:
                    reason = reason or HYPERPARAMETERS
                elif not _are_same(sent.model, self._model_of(bucket, step)):
                    reason = reason or MODEL_CHANGED
            if reason is not None:
                self.reason = reason
                harm = " This step still mixes messages that were computed before." if self.has_watched else ""
                warning = f"overlap is off from now on, messages leave in step(): {reason}.{harm}"
        self.has_watched = True
        self._begin_step()
        return warning

    def _gradients_of(self, bucket: Bucket) -> Versions:
        return _versions([parameter.grad for parameter in self._of_bucket[bucket.number]])

    def _sums_of(self, bucket: Bucket) -> list[str]:
        """Returns numbers that change with the gradients, also through `data`, which has no version; none but once."""
        gradients = () if self.has_watched else (parameter.grad for parameter in self._of_bucket[bucket.number])
        return [str(float(gradient.sum())) for gradient in gradients if gradient is not None]

    def _model_of(self, bucket: Bucket, step: GossipStep) -> Versions:
        return _versions([*self._of_bucket[bucket.number], *step.state])


def _versions(tensors: Sequence[Tensor | None]) -> Versions:
    return [(tensor, 0 if tensor is None else tensor._version) for tensor in tensors]


def _are_same(sent: Versions, now: Versions) -> bool:
    return all(g is h and version == later for (g, version), (h, later) in zip(sent, now, strict=True))
