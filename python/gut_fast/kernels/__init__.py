"""The kernels: the step that every rule is, the op that PyTorch sees, and one backend for each kind of processor."""
