"""The kernels: the step that every rule is, the op that PyTorch sees, and one backend for each kind of processor."""

from gut_fast.kernels.forks import let_threads_go

__all__ = ["let_threads_go"]
