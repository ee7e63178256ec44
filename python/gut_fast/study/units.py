"""Quantities as people write them, ``1Gbit``, ``100 MB/s``, ``1ms``, ``1.1MB``, read and shown.

The library itself counts in bytes and seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["format_bytes", "format_seconds", "parse_bandwidth", "parse_bytes", "parse_seconds"]

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}

SIZES = {f"{prefix}B": factor for prefix, factor in PREFIXES.items()}
RATES = {
    f"{prefix}{unit}": factor * size
    for prefix, factor in PREFIXES.items()
    for unit, size in {"B/s": 1.0, "bit": 1 / 8, "bit/s": 1 / 8, "bps": 1 / 8}.items()
}
TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}

QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")


def parse_bytes(text: str) -> float:
    """The number of bytes: ``1.1MB`` is 1,100,000, ``1MiB`` 2^20. Raises ValueError."""
    return _parse(text, SIZES, "a size in bytes, such as 1.1MB or 4GiB")


def parse_bandwidth(text: str) -> float:
    """Bytes per second: ``1Gbit`` (a second) is 125,000,000, as is ``125MB/s``. Raises ValueError."""
    return _parse(text, RATES, "a bandwidth in bits or bytes per second, such as 1Gbit or 100MB/s")


def parse_seconds(text: str) -> float:
    """The number of seconds: ``1ms`` is 0.001. Raises ValueError."""
    return _parse(text, TIMES, "a time with its unit, such as 1ms, 50us or 2s")


def _parse(text: str, units: Mapping[str, float], expected: str) -> float:
    """The number in front of a unit, times the unit; `expected` completes the error message."""
    match = QUANTITY.fullmatch(text)
    number, unit = match.groups() if match else ("", "")
    if not match or (unit not in units and not (unit == "" and float(number) == 0)):
        raise ValueError(f"{text!r} is not {expected}")
    value = float(number) * units.get(unit, 0.0)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is too large; expected {expected}")
    return value


def format_seconds(seconds: float) -> str:
    """A time with three digits, in the unit that leaves one to three before the point; a dash for infinity and NaN."""
    if not math.isfinite(seconds):
        return "–"
    steps = (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, math.inf))
    unit, size = next((unit, size) for unit, size, end in steps if seconds < 0.9995 * end)
    return f"{_three_digits(seconds / size)} {unit}"


def format_bytes(number: float) -> str:
    """A size with three digits, in bytes, kB, MB, GB or TB; a dash for infinity and NaN."""
    if not math.isfinite(number):
        return "–"
    steps = (("B", 1.0, 1e3), ("kB", 1e3, 1e6), ("MB", 1e6, 1e9), ("GB", 1e9, 1e12), ("TB", 1e12, math.inf))
    unit, size = next((unit, size) for unit, size, end in steps if number < 0.9995 * end)
    return f"{_three_digits(number / size)} {unit}"


def _three_digits(value: float) -> str:
    """The number with three digits, or more where it is 1,000 and above."""
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{decimals}f}"
