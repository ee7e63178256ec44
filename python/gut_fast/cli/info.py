"""``gut-fast info``: what this installation can do on this machine."""

from __future__ import annotations

import torch

from gut_fast.cli.terminal import console_of_text, facts_grid
from gut_fast.kernels import machine
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, cpu

__all__ = ["info"]


def info() -> None:
    """Show versions, backends and why one is missing, threads and instruction tiers."""
    tiers = machine.instruction_tiers()
    console = console_of_text()
    facts = {
        **machine.versions(),
        "machine": machine.machine_line(),
        "threads": str(torch.get_num_threads()),
        "instruction tier": f"{cpu.tier()} of {', '.join(tiers)} (GUT_FAST_TIER chooses)" if tiers else "none",
        "GPU": machine.gpu_line(),
        **{f"backend {name}": machine.backend_line(name) for name in BACKENDS},
        **{f"auto on {device}": machine.automatic_backend(device) for device in AUTOMATIC},
        **{name: _package_status(name) for name in machine.OPTIONAL_PACKAGES},
    }
    console.print(facts_grid(facts))


def _package_status(package: str) -> str:
    """The version of a package, or how to install it."""
    version = machine.installed_version(package)
    extra = machine.OPTIONAL_PACKAGES[package]
    return version or f'not installed; pip install "gut_fast[{extra}]"'
