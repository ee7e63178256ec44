"""How the time of a step grows: time per number against agents, columns and degree, ours and the ceiling's."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gut_fast.benchmark.cases import Case
from gut_fast.benchmark.results import Result
from gut_fast.benchmark.run import run

__all__ = ["AXES", "Curve", "Point", "curves", "load", "measure", "memory_needed", "replace", "room", "save"]

MEMORY_SHARE = 0.25
"""Points whose buffers need more of this machine's memory are left out."""

AGENTS = tuple(2**k for k in range(13))
COLUMNS_OF_AGENTS = 30_000
COLUMNS = tuple(round(10 ** (k / 2)) for k in range(6, 17))
AGENTS_OF_COLUMNS = (4, 16, 64)
RANDOM_DEGREES, CIRCULANT_DEGREES = (3, 4, 5, 6, 8, 12, 16), (24, 32, 48, 62)
AGENTS_OF_DEGREES, COLUMNS_OF_DEGREES = 64, 61_706
MAX_COMPARED = 2**18
"""Numbers that are compared with the reference at each point, the ends of rows among them."""

MOST_COMPLETE = 256
"""Agents of the largest complete graph: its N² edges grow faster than the memory that is moved."""


@dataclass(frozen=True)
class Point:
    """One measurement: place on the axis, medians in seconds, and how many numbers [N, D] there are.

    Attributes:
        x: agents, columns or degree.
        seconds, ceiling: medians of the step and of the loop with the same streams.
        numbers: N · D.
        noisy: why the run was not quiet.
    """

    x: int
    seconds: float
    ceiling: float
    numbers: int
    noisy: list[str]

    @property
    def fraction(self) -> float:
        """Of the ceiling."""
        return self.ceiling / self.seconds


@dataclass
class Curve:
    """Points along one axis.

    Attributes:
        axis: out of `AXES`.
        label: what is the same at all points.
        cases: what is to be measured, by the place on the axis.
        points: what has been.
    """

    axis: str
    label: str
    cases: dict[int, Case]
    points: list[Point] = dataclasses.field(default_factory=list)


def _case(topology: str, columns: int) -> Case:
    return Case(f"{topology}, {columns:,} columns", "gut", topology, ((columns,),))


def _along_agents() -> Iterator[Curve]:
    def curve(label: str, spec: Callable[[int], str], sizes: Sequence[int]) -> Curve:
        return Curve("agents", label, {n: _case(spec(n), COLUMNS_OF_AGENTS) for n in sizes})

    yield curve("ring", lambda n: f"ring:{n}", AGENTS)
    yield curve("random 4-regular", lambda n: f"random-regular:{n}:4:0", [n for n in AGENTS if n > 4])
    yield curve("complete", lambda n: f"complete:{n}", [n for n in AGENTS if n <= MOST_COMPLETE])


def _along_columns() -> Iterator[Curve]:
    for n in AGENTS_OF_COLUMNS:
        yield Curve("columns", f"ring of {n}", {columns: _case(f"ring:{n}", columns) for columns in COLUMNS})


def _along_degree() -> Iterator[Curve]:
    n = AGENTS_OF_DEGREES
    specs = {1: f"one-peer-exponential:{n}", 2: f"ring:{n}"}
    specs |= {degree: f"random-regular:{n}:{degree}:0" for degree in RANDOM_DEGREES}
    # Drawing random graphs as dense as these takes minutes.
    specs |= {d: f"circulant:{n}:{','.join(str(k) for k in range(1, d // 2 + 1))}" for d in CIRCULANT_DEGREES}
    specs[n - 1] = f"complete:{n}"
    yield Curve("degree", f"{n} agents", {d: _case(spec, COLUMNS_OF_DEGREES) for d, spec in specs.items()})


AXES: dict[str, Callable[[], Iterator[Curve]]] = {
    "agents": _along_agents,
    "columns": _along_columns,
    "degree": _along_degree,
}
"""What is varied, and the curves along it."""


def curves(axes: Sequence[str]) -> list[Curve]:
    """The curves along these axes, not yet measured. Raises ValueError for an unknown axis."""
    if unknown := sorted(set(axes) - AXES.keys()):
        raise ValueError(f"unknown axis {', '.join(unknown)}; known are {', '.join(AXES)}")
    return [curve for axis in axes for curve in AXES[axis]()]


def memory_needed(case: Case) -> int:
    """Bytes of parameters, gradients and state of a case in float32."""
    return (2 + len(case.make_rule().states)) * 4 * case.columns * case.make_topology().num_agents


def room() -> float:
    """Bytes that a point may need."""
    return MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(x: int, case: Case, threads: int, seconds: float) -> Point:
    """Measures one point. Raises as `gut_fast.benchmark.run.run`."""
    result: Result = run(case, threads, seconds, ("ceiling",), MAX_COMPARED)
    assert result.ceiling is not None
    return Point(x, result.ours, result.ceiling, result.agents * result.columns, result.disturbance.reasons())


def replace(curves: Sequence[Curve], new: Curve) -> list[Curve]:
    """The curves with a new one in the place of that of its axis and label, in the order of the axes."""
    others = [curve for curve in curves if (curve.axis, curve.label) != (new.axis, new.label)]
    return sorted([*others, new], key=lambda curve: list(AXES).index(curve.axis))


def save(measured: Sequence[Curve], about: dict[str, Any], path: Path) -> None:
    """Writes curves, and what they were measured on, as JSON."""
    entries = [
        {
            "axis": curve.axis,
            "label": curve.label,
            "points": [dataclasses.asdict(point) | {"fraction_of_ceiling": point.fraction} for point in curve.points],
        }
        for curve in measured
    ]
    content = {**about, "curves": entries}
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Curve]:
    """The curves of a file, without their cases. Raises OSError or ValueError if there are none."""
    try:
        return [
            Curve(
                entry["axis"],
                entry["label"],
                {},
                [Point(**{f.name: one[f.name] for f in dataclasses.fields(Point)}) for one in entry["points"]],
            )
            for entry in json.loads(path.read_text(encoding="utf-8"))["curves"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no curves of gut-fast bench scaling ({error}); name another file") from error
