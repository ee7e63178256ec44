"""A fork: torch's OpenMP threads end before it, so that the child starts its own.

GNU's OpenMP keeps its threads between parallel regions, and a child inherits what it knows of them, but not the
threads: the child would wait for them for ever in its first parallel region, which any operator of torch may open, in
a model's forward pass as in an optimizer's construction. Without threads at the fork the child is like a new process.
In an OpenMP that cannot let them go (before version 5.0, as GNU's before GCC 9) all stays as it is.
"""

import ctypes
import os

__all__ = ["let_threads_go"]

SOFT = 1
"""OpenMP's `omp_pause_soft`: what has been set, such as the number of threads, stays."""


def let_threads_go() -> bool:
    """Ends the idle OpenMP threads of the calling thread, which makes them anew in its next parallel region.

    Returns:
        False if OpenMP cannot do so, or not here, as in a parallel region.
    """
    try:
        return bool(ctypes.CDLL(None).omp_pause_resource_all(SOFT) == 0)
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system whose libraries cannot be looked through
        return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=let_threads_go)
