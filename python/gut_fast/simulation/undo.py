"""Taking back what a gradient changes besides the gradient: buffers and random state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gut_fast.simulation import randomness
from gut_fast.simulation.stacked import StackedModule

__all__ = ["remember", "undo_on_error"]


@contextlib.contextmanager
def undo_on_error(stacked: StackedModule) -> Iterator[None]:
    """If the block raises, puts buffers and random state back."""
    undo = remember(stacked)
    try:
        yield
    except BaseException:
        undo()
        raise


def remember(stacked: StackedModule) -> Callable[[], None]:
    """A function that puts buffers and random state back to what they are now."""
    before = [flat.clone() for flat in stacked.flat_buffers]
    random_state = randomness.get_state(stacked.device)

    def undo() -> None:
        for flat, values in zip(stacked.flat_buffers, before, strict=True):
            flat.copy_(values)
        randomness.set_state(random_state, stacked.device)

    return undo
