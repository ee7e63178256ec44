"""What a report says, as sections of text, pictures and tables; how these are written is another matter."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gut_fast.study.report import pictures, tables
from gut_fast.study.report.pictures import Picture
from gut_fast.study.report.statistics import END
from gut_fast.study.report.study import SYMBOLS, Study
from gut_fast.study.report.tables import Table
from gut_fast.study.report.words import listed

__all__ = ["Section", "glance", "lead", "point_sections", "reading"]


Part = Picture | Table | str
"""A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading, and pictures, tables and paragraphs in order; `more` are tables that a reader may pass over."""

    title: str
    parts: tuple[Part, ...]
    more: tuple[Table, ...] = ()

    @property
    def pictures(self) -> list[Picture]:
        """Those among the parts."""
        return [part for part in self.parts if isinstance(part, Picture)]


def lead(study: Study) -> str:
    """The study in a line."""
    records = study.all_records
    num_seeds = len({record.run.experiment.seed for record in records})
    counts = [
        listed(len(study.methods), "method"),
        *([listed(len(study.points), "point")] if len(study.points) > 1 else []),
        listed(num_seeds, "seed"),
    ]
    subjects = [
        listed(dict.fromkeys(getattr(record.run.experiment, name) for record in records)) for name in ("model", "data")
    ]
    return f"{listed(counts)}: {listed(len(records), 'run')} of {' on '.join(subjects)}"


def glance(study: Study, folder: Path) -> Section:
    """All methods at all points, and how they differ; the pictures are drawn into `folder`."""
    parts: list[Part] = []
    more: list[Table] = []
    for moment in tables.moments(study):
        values, differences = tables.main_tables(study, moment)
        suffix = "" if moment == END else "-before-decay"
        parts += [pictures.draw_accuracies(study, moment, folder / f"accuracy{suffix}.png"), values]
        if study.comparisons:
            parts += [pictures.draw_differences(study, moment, folder / f"differences{suffix}.png"), differences]
        more += tables.further_tables(study, moment)
    return Section("At a glance", tuple(parts), tuple(table for table in more if table.rows))


def point_sections(study: Study, folder: Path) -> Iterator[Section]:
    """A section for each point; the pictures are drawn into `folder`."""
    taken: set[str] = set()
    shown: dict[tuple[str, ...], str] = {}
    for point in study.points:
        suffix = _file_suffix(point, taken)
        parts: list[Part] = []
        if len(study.points) > 1:
            for moment in tables.moments(study, point):
                numbers = (tables.point_table(study, point, moment), tables.point_differences(study, point, moment))
                parts += [table for table in numbers if table.rows]
        parts.append(pictures.draw_curves(study, point, folder / f"curves{suffix}.png"))
        parts.append(pictures.draw_agents(study, point, folder / f"agents{suffix}.png"))
        first = shown.setdefault(pictures.division(study, point), point)
        if first == point:
            parts.append(_samples(study, point, folder / f"samples{suffix}.png"))
        else:
            parts.append(f"Who holds what is the same as at {first}.")
        yield Section(point or "Over the steps", tuple(parts))


def _samples(study: Study, point: str, path: Path) -> Part:
    """Who holds what; where the data cannot be loaded, a sentence instead and a warning with the reason."""
    try:
        samples = pictures.load_samples(study, point)
    except (OSError, ImportError, TypeError, ValueError, RuntimeError) as error:
        warnings.warn(f"no picture of who holds what: {error}", UserWarning, stacklevel=2)
        return "There is no picture of who holds what: the data could not be loaded when this report was made."
    return pictures.draw_samples(study, point, samples, path)


def reading(study: Study) -> tuple[str, ...]:
    """How numbers and marks are to be read, a paragraph each."""
    marked = [study.name(method) for method in study.methods if study.name(method) != method]
    return (
        f"Numbers are {study.accuracy} in %: of the averaged model, of the mean and of the worst agent. They are means "
        "over seeds ± the sample standard deviation; the largest mean of a column is bold.",
        *(
            ["Before the first decay: at the last evaluation before the learning rate falls."]
            if len(tables.moments(study)) > 1
            else []
        ),
        "Differences are paired: both methods from the same initial model, on the same division of the samples. They "
        "are in percentage points: mean, 95 % confidence interval of the mean (Student's t, each comparison by itself, "
        "not corrected for how many there are), and on how many seeds the first method is better (ties count for "
        "neither and are said). A single seed has neither standard deviation nor interval.",
        *(
            f"{control} is the control of {method}: what {method} adds is the difference of these two."
            for method, control in study.controls.items()
        ),
        *([f"† Sends more than one message a step, so more bytes: {listed(marked)}."] if marked else []),
        "Sent a step: bytes that an agent sends in a step, to all its neighbours. Consensus error: "
        "(1/N) Σ ‖zᵢ − mean z‖². Diverged: agents with a loss of NaN or infinity. A run that diverged counts with the "
        "accuracy it has left; one that has none is counted as diverged in its place.",
    )


def _file_suffix(point: str, taken: set[str]) -> str:
    """``-alpha-0.1``, with a number behind it where another point has taken that; adds it to `taken`."""
    for name, symbol in SYMBOLS.items():
        point = point.replace(symbol, name)
    name = "".join(f"-{part}" for part in re.findall(r"[a-z0-9.]+", point.lower()))[:80].rstrip(".")
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    suffix = next(each for each in itertools.chain([name], numbered) if each not in taken)
    taken.add(suffix)
    return suffix
