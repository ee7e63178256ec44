"""What goes wrong between ranks."""

from __future__ import annotations

__all__ = ["MismatchError", "PeerError"]


class PeerError(RuntimeError):
    """A rank that this one waited for died or did not come in time.

    Attributes:
        rank: the other one, as numbered at the start.
        step: number of the step that could not be finished; None outside of steps.
        edge: (agent it would have come from, agent it was for), or None.
        is_gone: whether the connection broke, as when a process dies; else the limit passed.
    """

    def __init__(
        self,
        message: str,
        rank: int,
        *,
        step: int | None = None,
        edge: tuple[int, int] | None = None,
        is_gone: bool = False,
    ) -> None:
        super().__init__(message)
        self.rank, self.step, self.edge, self.is_gone = rank, step, edge, is_gone

    def __reduce__(self) -> tuple[object, ...]:
        state = {"step": self.step, "edge": self.edge, "is_gone": self.is_gone}
        return type(self), (str(self), self.rank), state


class MismatchError(ValueError):
    """The ranks were started with different settings; the message names the ranks and the difference."""
