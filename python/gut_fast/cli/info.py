"""``gut-fast info``: what this installation can do on this machine."""

from __future__ import annotations

from typing import Any

import torch

from gut_fast.cli.options import AsJson
from gut_fast.cli.terminal import console_of_text, facts_grid, print_json
from gut_fast.kernels import machine
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, cpu
from gut_fast.requirements import OPTIONAL, distribution, pip_install

__all__ = ["info"]


def info(as_json: AsJson = False) -> None:
    """Show versions, backends and why one is missing, threads and instruction tiers."""
    if as_json:
        print_json(_document())
        return
    tiers = machine.instruction_tiers()
    facts = {
        **machine.versions(),
        "machine": machine.machine_line(),
        "threads": str(torch.get_num_threads()),
        "instruction tier": f"{cpu.tier()} of {', '.join(tiers)} (GUT_FAST_TIER chooses)" if tiers else "none",
        "GPU": machine.gpu_line(),
        **{f"backend {name}": machine.backend_line(name) for name in BACKENDS},
        **{f"auto on {device}": machine.automatic_backend(device) for device in AUTOMATIC},
        **{distribution(module): _status(module) for module in OPTIONAL},
    }
    console_of_text().print(facts_grid(facts))


def _document() -> dict[str, Any]:
    """The same facts for a program; a backend has for each device the reason why it cannot serve it, or null."""
    statuses = {device: machine.backend_status(device) for device in AUTOMATIC}
    return {
        "versions": machine.versions(),
        "machine": machine.machine_line(),
        "threads": torch.get_num_threads(),
        "instruction_tier": cpu.tier(),
        "instruction_tiers": machine.instruction_tiers(),
        "gpu": machine.gpu_line(),
        "backends": {name: {device: status[name] for device, status in statuses.items()} for name in BACKENDS},
        "automatic_backend": {device: machine.automatic_backend(device).partition(";")[0] for device in AUTOMATIC},
        "packages": {name: machine.installed_version(name) for name in map(distribution, OPTIONAL)},
    }


def _status(module: str) -> str:
    """The version of a library, or how to install it."""
    return machine.installed_version(distribution(module)) or f"not installed; {pip_install(module)}"
