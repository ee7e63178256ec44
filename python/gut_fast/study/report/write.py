"""A report as files: Markdown, CSV, pictures, and a page of HTML that holds everything."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gut_fast.distributed.files import replacing
from gut_fast.study.report import statistics, tables
from gut_fast.study.report.pictures import Picture
from gut_fast.study.report.sections import Part, Section, glance, lead, point_sections, reading
from gut_fast.study.report.statistics import METRICS
from gut_fast.study.report.study import Study, num_messages
from gut_fast.study.report.tables import Table, markdown_table
from gut_fast.study.report.words import in_markdown, listed, without_folders

__all__ = ["Source", "write_report"]

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Source:
    """Where a report comes from: its title, the command that makes it, and the sweep's configuration as text."""

    title: str
    command: str
    configuration: str = ""


def write_report(study: Study, source: Source, folder: Path) -> list[Path]:
    """Writes the report into `folder` and returns its files, the page first.

    The same runs give the same files: nothing in them tells the time, the place or the machine of the report itself.

    Raises:
        ImportError: matplotlib or Jinja2 is missing.
        OSError: a file cannot be written.
    """
    template = _template()
    folder.mkdir(parents=True, exist_ok=True)
    sections = [glance(study, folder), *point_sections(study, folder)]
    texts = {
        "report.html": template.render(
            source=source,
            lead=lead(study),
            study=study,
            sections=sections,
            reading=reading(study),
            settings=_with_columns(tables.settings(study)),
            computed=_computed_with(study),
            inlined=_inlined,
        ),
        "report.md": "\n".join(_markdown(study, source, sections)) + "\n",
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    rows = {"runs.csv": _runs(study), "methods.csv": _methods(study), "differences.csv": _differences(study)}
    for name, lines in rows.items():
        _write_csv(folder / name, list(lines))
    pictures = [picture.path for section in sections for picture in section.pictures]
    return [*(folder / name for name in (*texts, *rows)), *pictures]


def _template() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ImportError(
            "reports need Jinja2, which comes with PyTorch; install it with: pip install jinja2"
        ) from None
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(TEMPLATE)


def _inlined(path: Path) -> str:
    """The picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _computed_with(study: Study) -> list[str]:
    """Engines, versions and machines of the runs, each once."""
    records = study.all_records
    engines = sorted({record.run.engine for record in records})
    versions = (
        ", ".join(f"{name} {version}" for name, version in (record.versions or {}).items()) for record in records
    )
    machines = (without_folders(record.machine) for record in records)
    return [f"engines: {listed(engines)}", *(line for line in dict.fromkeys([*versions, *machines]) if line)]


def _markdown(study: Study, source: Source, sections: Sequence[Section]) -> Iterator[str]:
    yield from (f"# {in_markdown(source.title)}", "", in_markdown(lead(study)))
    for section in sections:
        yield from ("", f"## {in_markdown(section.title)}")
        for part in (*section.parts, *section.more):
            yield from _markdown_part(part)
    yield from ("", "## How to read this", "")
    yield from (f"- {in_markdown(line)}" for line in (*reading(study), *study.notes))
    yield from ("", "## How it was run")
    for table in _with_columns(tables.settings(study)):
        yield from _markdown_part(table)
    yield ""
    yield from (f"- {in_markdown(line)}" for line in _computed_with(study))
    for language, text in (("console", source.command), ("yaml", source.configuration)):
        if text:
            yield from ("", f"````{language}", text.rstrip(), "````")


def _markdown_part(part: Part) -> Iterator[str]:
    if isinstance(part, Table):
        yield from ("", f"### {in_markdown(part.title)}", "", *markdown_table(part))
    elif isinstance(part, Picture):
        yield from ("", f"![{in_markdown(part.alt)}]({part.path.name})", "", in_markdown(part.caption))
    else:
        yield from ("", in_markdown(part))


def _with_columns(group: Iterable[Table]) -> tuple[Table, ...]:
    """Without those that have names alone."""
    return tuple(table for table in group if len(table.header) > 1)


def _places(study: Study) -> Iterator[tuple[str, str]]:
    """Every point with each of its moments."""
    return ((point, moment) for point in study.points for moment in tables.moments(study, point))


def _runs(study: Study) -> Iterator[dict[str, Any]]:
    for point, moment in _places(study):
        for method in study.methods:
            for seed, record in study.records(method, point).items():
                row = statistics.row_at(record.run, moment)
                numbers = {metric.column: math.nan if row is None else metric.of(row) for metric in METRICS}
                yield {
                    "point": point,
                    "method": method,
                    "seed": seed,
                    "moment": moment,
                    "step": None if row is None else row["step"],
                    "lr": record.run.experiment.lr,
                    "messages": num_messages(record),
                    "diverged_agents": statistics.diverged_agents(record.run),
                    **numbers,
                }


def _methods(study: Study) -> Iterator[dict[str, Any]]:
    for point, moment in _places(study):
        for method in study.methods:
            records = study.records(method, point)
            row: dict[str, Any] = {"point": point, "method": method, "moment": moment, "runs": len(records)}
            row["diverged_runs"] = sum(bool(statistics.diverged_agents(each.run)) for each in records.values())
            for metric in METRICS:
                number = statistics.estimate(records, metric, moment)
                row |= {f"{metric.column}_mean": number.mean, f"{metric.column}_std": number.std}
            yield row


def _differences(study: Study) -> Iterator[dict[str, Any]]:
    for point, moment in _places(study):
        for pair in study.comparisons:
            for metric in statistics.ACCURACIES:
                first, second = (study.records(method, point) for method in pair)
                number = statistics.paired(first, second, metric, moment)
                low, high = number.interval or (math.nan, math.nan)
                yield {
                    "point": point,
                    "method": pair[0],
                    "other": pair[1],
                    "is_control": study.controls.get(pair[0]) == pair[1],
                    "moment": moment,
                    "metric": metric.key,
                    "mean": number.mean,
                    "std": number.std,
                    "low": low,
                    "high": high,
                    "better": number.num_positive,
                    "equal": number.num_zero,
                    "pairs": len(number.numbers),
                    "pairs_without_number": number.num_without,
                }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Numbers with six digits, NaN and None as nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.6g}"
        return "" if value is None else value

    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: plain(value) for name, value in row.items()} for row in rows)
