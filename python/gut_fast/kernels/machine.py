"""The packages, the processor and the backends that a result was computed with."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import gut_fast
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS, cpu

__all__ = [
    "automatic_backend",
    "backend_line",
    "backend_status",
    "gpu_line",
    "instruction_tiers",
    "machine_line",
    "versions",
    "wrong_tier",
]


def versions() -> dict[str, str]:
    """Versions of gut_fast, Python and the packages that gut_fast needs."""
    return {
        "gut_fast": gut_fast.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "networkx")},
    }


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def instruction_tiers() -> list[str]:
    """The instruction tiers that the compiled kernel can use on this machine, the fastest first."""
    return cpu.tiers()


def backend_status(device_type: str = "cpu") -> dict[str, str | None]:
    """The reason why each backend, by its name, cannot serve float32 parameters on such a device; None where it can."""
    return {name: backend.unavailable(device_type, torch.float32, 1, 1) for name, backend in BACKENDS.items()}


def backend_line(name: str) -> str:
    """The devices whose tensors a backend can serve, or why it can serve none."""
    reasons = {device: backend_status(device)[name] for device in AUTOMATIC}
    served = [device for device, reason in reasons.items() if reason is None]
    return f"for tensors on {' and '.join(served)}" if served else "; ".join(dict.fromkeys(map(str, reasons.values())))


def automatic_backend(device_type: str) -> str:
    """The backend that ``"auto"`` takes for float32 parameters on such a device, and why not those before it."""
    status = backend_status(device_type)
    passed: list[str] = []
    for name in AUTOMATIC[device_type]:
        if status[name] is None:
            return "; ".join([name, *passed])
        passed.append(f"not {name}: {status[name]}")
    raise AssertionError("the torch backend serves every device")


def gpu_line() -> str:
    """The CUDA devices of this machine, or why there is none."""
    if not torch.backends.cuda.is_built():
        return "none: this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def wrong_tier() -> str | None:
    """The error in an environment variable, because of which the kernel is there but not in use; or None."""
    reason = backend_status()["cpu"] or ""
    return reason if reason.startswith("environment variable ") else None


def machine_line() -> str:
    """Processor, system, threads and instruction tier in one line."""
    tier = cpu.tier() or ("none, GUT_FAST_TIER is wrong" if wrong_tier() else "none, compiled kernel missing")
    system = f"{platform.system()} {platform.machine()}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {system}, {threads} thread{'s' * (threads != 1)}, instruction tier {tier}"


GENERATIONS: dict[str, dict[int, tuple[tuple[int, int, str], ...]]] = {
    "AuthenticAMD": {
        23: (
            (0x01, 0x07, "Zen"),
            (0x08, 0x10, "Zen+"),
            (0x11, 0x17, "Zen"),
            (0x18, 0x1F, "Zen+"),
            (0x30, 0xFF, "Zen 2"),
        ),
        25: ((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3"), (0x60, 0xAF, "Zen 4")),
        26: ((0x00, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")),
    },
    "GenuineIntel": {
        6: (
            (0x4F, 0x4F, "Broadwell"),
            (0x55, 0x55, "Skylake or Cascade Lake"),
            (0x6A, 0x6C, "Ice Lake"),
            (0x8F, 0x8F, "Sapphire Rapids"),
            (0xAD, 0xAE, "Granite Rapids"),
            (0xCF, 0xCF, "Emerald Rapids"),
        )
    },
}
"""The generation of a server's processor by vendor, family and models, which a rented machine's name leaves out.

Source: the vendors' lists of families and models, as Linux has them in arch/x86/include/asm/intel-family.h and
arch/x86/kernel/cpu/amd.c.
"""


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor, and its generation where that is known."""
    if not cpuinfo.exists():
        return platform.processor() or "unknown processor"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    # The first processor is that of the first lines.
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = about.get("model name") or platform.processor() or "unknown processor"
    family, model = about.get("cpu family", ""), about.get("model", "")
    if not (family.isdigit() and model.isdigit()):
        return name
    ranges = GENERATIONS.get(about.get("vendor_id", ""), {}).get(int(family), ())
    return next((f"{name} ({each})" for first, last, each in ranges if first <= int(model) <= last), name)
