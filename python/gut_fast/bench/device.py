"""The device on which a benchmark runs, and what a result says of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from gut_fast.kernels import machine

__all__ = ["CPU", "DEVICES", "exact_float32", "find_device", "machine_line", "versions"]

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda")


def find_device(name: str) -> torch.device:
    """Returns the device of that name, a GPU with its index.

    Raises:
        ValueError: an unknown name.
        RuntimeError: PyTorch sees no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise RuntimeError(f"device 'cuda': PyTorch {torch.__version__} sees no GPU here; use 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


def machine_line(device: torch.device) -> str:
    """The machine in a line that begins with the processor that computes."""
    if device.type != "cuda":
        return machine.machine_line()
    found = torch.cuda.get_device_properties(device)
    size = f"{found.total_memory / 2**30:.0f} GiB, L2 {found.L2_cache_size / 2**20:.0f} MiB"
    return f"{found.name}, {size}, {found.multi_processor_count} multiprocessors; {machine.machine_line()}"


def versions(device: torch.device) -> dict[str, str]:
    """The versions of the packages, and for a GPU those of CUDA and Triton."""
    more = {"cuda": torch.version.cuda, "triton": machine.installed_version("triton")} if device.type == "cuda" else {}
    return {**machine.versions(), **{name: version for name, version in more.items() if version is not None}}


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Makes convolutions on a GPU compute in full float32 meanwhile, without the TF32 that PyTorch allows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of PyTorch want a newer name
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before
