"""A report as files: Markdown, CSV, pictures, and a page of HTML that holds everything."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gut_fast.arguments import printable
from gut_fast.files import write_text
from gut_fast.study.report import tables
from gut_fast.study.report.frontier import draw_frontier, has_frontier
from gut_fast.study.report.pictures import Picture, draw_accuracies, draw_agents, draw_curves, draw_differences
from gut_fast.study.report.study import METRICS, Study, interval, mean
from gut_fast.study.report.tables import Table, markdown_table
from gut_fast.study.report.words import in_markdown, listed, without_folders

__all__ = ["FILES", "Source", "lead", "means", "paired", "write_report"]

TEMPLATE = "page.html"

MAX_CURVES = 16
"""The largest number of methods that are drawn over the steps; more hide each other."""

FILES = ("report.html", "report.md", "runs.csv", "methods.csv", "differences.csv")
"""The files of a report beside its pictures."""

Part = Picture | Table


@dataclass(frozen=True)
class Source:
    """Where a report comes from: its title, the command that makes it, and the sweep's configuration as text."""

    title: str
    command: str
    configuration: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, pictures and tables in order, and more tables that a reader may pass over."""

    title: str
    parts: tuple[Part, ...]
    more: tuple[Table, ...] = ()


def write_report(study: Study, source: Source, folder: Path) -> list[Path]:
    """Writes the report into `folder` and returns its files, the page first.

    The same runs give the same files: nothing in them tells the time, the place or the machine of the report itself.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(study, folder))
    texts = {
        "report.html": _template().render(
            source=source,
            lead=lead(study),
            study=study,
            sections=sections,
            reading=_reading(study),
            settings=_settings(study),
            computed=_computed_with(study),
            inlined=_inlined,
        ),
        "report.md": "\n".join(_markdown(study, source, sections)) + "\n",
    }
    numbers = {"runs.csv": study.values, "methods.csv": means(study), "differences.csv": paired(study)}
    texts |= {name: table.to_csv(float_format="%.6g", lineterminator="\n") for name, table in numbers.items()}
    for name, text in texts.items():
        write_text(folder / name, text)
    pictures = [part.path for section in sections for part in section.parts if isinstance(part, Picture)]
    return [*(folder / name for name in texts), *pictures]


def lead(study: Study) -> str:
    """The study in a line."""
    runs = study.results.runs.loc[study.in_order]
    points = [listed(len(study.points), "point")] if len(study.points) > 1 else []
    counts = [listed(len(study.methods), "method"), *points, listed(runs["seed"].nunique(), "seed")]
    subjects = " on ".join(listed(runs[name].unique()) for name in ("model", "data"))
    return f"{listed(counts)}: {listed(len(runs), 'run')} of {subjects}"


def _sections(study: Study, folder: Path) -> Iterator[Section]:
    """The sections of the report: all at a glance, each of several points, and the runs over the steps."""
    parts: list[Part] = [draw_accuracies(study, folder / "accuracy.png")]
    more: list[Table] = []
    if study.comparisons:
        parts.append(draw_differences(study, folder / "differences.png"))
    if has_frontier(study):
        parts.insert(0, draw_frontier(study, folder / "frontier.png"))
    for moment in study.moments():
        parts += [table for table in tables.main_tables(study, moment) if table.rows]
        more += [table for table in tables.further_tables(study, moment) if table.rows]
    yield Section("At a glance", tuple(parts), tuple(more))
    for point in study.points if len(study.points) > 1 else ():
        both = (tables.point_tables(study, point, moment) for moment in study.moments(point))
        yield Section(point, tuple(table for pair in both for table in pair if table.rows))
    if len(study.methods) <= MAX_CURVES:
        curves = (draw_curves(study, folder / "curves.png"), draw_agents(study, folder / "agents.png"))
        yield Section("Over the steps", curves)


def _reading(study: Study) -> list[str]:
    """How numbers and marks are to be read, a paragraph each."""
    marked = [study.name(method) for method in study.methods if study.name(method) != method]
    return [
        f"Numbers are {study.accuracy} in %: of the averaged model, of the mean and of the worst agent. They are means "
        "over seeds ± the sample standard deviation; the best mean of a column is bold.",
        *(
            ["The loss is the cross entropy of the averaged model on the test samples, in nats a byte: less is better."]
            if "test_loss" in study.measures
            else []
        ),
        *(
            ["Before the first decay: at the last evaluation before the learning rate falls."]
            if len(study.moments()) > 1
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
    ]


def _template() -> Any:
    """The template of the page, which lies beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.get_template(TEMPLATE)


def _inlined(path: Path) -> str:
    """The picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _settings(study: Study) -> list[Table]:
    """The tables of settings but those that hold names alone."""
    return [table for table in tables.settings(study) if len(table.header) > 1]


def _computed_with(study: Study) -> list[str]:
    """Engines, versions and machines of the runs, each once."""
    runs = study.results.runs.loc[study.in_order]
    versions = (
        ", ".join(f"{name} {version}" for name, version in (json.loads(text) or {}).items())
        for text in runs["versions"].unique()
    )
    lines = [*versions, *map(without_folders, runs["machine"].unique())]
    return [f"engines: {listed(sorted(runs['engine'].unique()))}", *(line for line in dict.fromkeys(lines) if line)]


def _markdown(study: Study, source: Source, sections: Sequence[Section]) -> Iterator[str]:
    """The lines of the report in Markdown."""
    yield from (f"# {in_markdown(source.title)}", "", in_markdown(lead(study)))
    for section in sections:
        yield from ("", f"## {in_markdown(section.title)}")
        for part in (*section.parts, *section.more):
            yield from _markdown_part(part)
    yield from ("", "## How to read this", "")
    yield from (f"- {in_markdown(line)}" for line in (*_reading(study), *study.notes))
    yield from ("", "## How it was run")
    for table in _settings(study):
        yield from _markdown_part(table)
    yield ""
    yield from (f"- {in_markdown(line)}" for line in _computed_with(study))
    for language, text in (("console", source.command), ("yaml", source.configuration)):
        if text:
            fence = "`" * max([4, *(len(run) + 1 for run in re.findall("`+", text))])
            yield from ("", f"{fence}{language}", printable(text.rstrip()), fence)


def _markdown_part(part: Part) -> Iterator[str]:
    """A table or a picture in Markdown."""
    if isinstance(part, Table):
        yield from ("", f"### {in_markdown(part.title)}", "", *markdown_table(part))
    else:
        yield from ("", f"![{in_markdown(part.alt)}]({part.path.name})", "", in_markdown(part.caption))


def means(study: Study) -> pd.DataFrame:
    """Mean and standard deviation of every metric, a row for each point, moment and method."""
    groups = study.values.groupby(["point", "moment", "method"], sort=False)
    statistics = groups[[*METRICS]].agg(["mean", "std"])
    statistics.columns = ["_".join(names) for names in statistics.columns]
    diverged = groups["diverged_agents"].agg(runs="size", diverged_runs=lambda agents: (agents > 0).sum())
    return diverged.join(statistics)


def paired(study: Study) -> pd.DataFrame:
    """Every paired difference with its statistics, a row for each point, moment, comparison and accuracy."""
    statistics: dict[str, Callable[[pd.Series], float]] = {
        "mean": mean,
        "std": lambda numbers: numbers.std(),
        "low": lambda numbers: interval(numbers)[0],
        "high": lambda numbers: interval(numbers)[1],
        "equal": lambda numbers: (numbers == 0).sum(),
        "pairs": lambda numbers: numbers.count(),
        "pairs_without_number": lambda numbers: numbers.isna().sum(),
    }
    places = ((point, moment) for point in study.points for moment in study.moments(point))
    keys = [(*place, *pair, metric) for place in places for pair in study.comparisons for metric in study.measures]
    found = [study.differences((one, other), metric, point, moment) for point, moment, one, other, metric in keys]
    index = pd.MultiIndex.from_tuples(keys, names=["point", "moment", "method", "other", "metric"]) if keys else None
    better = [study.measures[key[-1]].is_better(numbers).sum() for key, numbers in zip(keys, found, strict=True)]
    columns = {name: list(map(of, found)) for name, of in statistics.items()} | {"better": better}
    order = ["mean", "std", "low", "high", "better", "equal", "pairs", "pairs_without_number"]
    return pd.DataFrame(columns, index=index)[order]
