"""The command ``gut-fast report``: the finished runs of sweeps as tables, pictures and a page."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gut_fast.arguments import printable
from gut_fast.cli.options import AsJson
from gut_fast.cli.sweep import FILE
from gut_fast.cli.terminal import as_bad_argument, console_of_text, print_json
from gut_fast.study import plots
from gut_fast.study.report.study import Study, gather
from gut_fast.study.report.tables import Table, main_tables
from gut_fast.study.report.words import listed, without_folders
from gut_fast.study.report.write import FILES, Source, lead, means, paired, write_report
from gut_fast.study.results import read_results
from gut_fast.study.runner import check_writable
from gut_fast.study.summary import plain_table
from gut_fast.study.sweep import Task, make_sweep
from gut_fast.study.yaml_files import read_yaml

__all__ = ["report"]


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folder of a sweep; several are taken together.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the report is written. Default: folder report in the first FOLDER.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="METHOD", help="What the others are compared with. Default: the first.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title of the report. Default: the name of the first FOLDER.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what a sweep has come to so far: tables, pictures, and one page that needs no other file."""
    place = folders[0] / "report" if out is None else out
    with as_bad_argument():
        plots.check_matplotlib()
        check_writable(place, FILES)
        results = [read_results(each) for each in folders]
        planned = [task for each in folders for task in _planned(each)]
        study = gather(results, baseline, order=[task.method for task in planned])
    finished = sum(len(each.runs) for each in results)
    if len(planned) > finished:
        study = replace(study, notes=(f"{finished} of {len(planned)} runs are finished so far.", *study.notes))
    source = Source(
        title or folders[0].resolve().name, _command(folders, baseline, title), "\n".join(map(_configuration, folders))
    )
    with as_bad_argument():
        files = write_report(study, source, place)
    if as_json:
        print_json(_document(study, files))
        return
    console = console_of_text()
    _show(study, console)
    texts = [file.name for file in files if file.suffix != ".png"]
    console.print(f"{listed([*texts, listed(len(files) - len(texts), 'picture')])} are in {place}")


def _document(study: Study, files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of the report for a program: means over seeds, paired differences, notes and files."""
    methods, differences = (table.reset_index().to_dict("records") for table in (means(study), paired(study)))
    return {
        "title": lead(study),
        "methods": methods,
        "differences": differences,
        "notes": list(study.notes),
        "files": [str(file) for file in files],
    }


def _planned(folder: Path) -> list[Task]:
    """All runs of the folder's sweep; none where its file is missing or cannot be understood."""
    try:
        return make_sweep(read_yaml(folder / FILE), also=["tune"]).tasks() if (folder / FILE).exists() else []
    except (TypeError, ValueError, ImportError) as error:
        warnings.warn(f"{folder / FILE}: {error}; methods are in the order of their names", stacklevel=2)
        return []


def _command(folders: Sequence[Path], baseline: str | None, title: str | None) -> str:
    """The command that makes the report again, wherever the folders lie."""
    names = [each.name if each.is_absolute() or ".." in each.parts else each.as_posix() for each in folders]
    options = [
        word
        for name, value in (("--baseline", baseline), ("--title", title))
        if value is not None
        for word in (name, value)
    ]
    return shlex.join(["gut-fast", "report", *names, *options])


def _configuration(folder: Path) -> str:
    """The file of the folder's sweep, with no folder of this machine in it."""
    file = folder / FILE
    return without_folders(file.read_text(encoding="utf-8")) if file.exists() else ""


def _show(study: Study, console: Console) -> None:
    """Prints the tables that a reader wants to see first."""
    console.print(lead(study), style="bold")
    for moment in study.moments():
        for table in main_tables(study, moment):
            if table.rows:
                console.print(_terminal_table(table))
    for note in study.notes:
        console.print(note, style="yellow")


def _terminal_table(table: Table) -> RichTable:
    """The table for a terminal, its best numbers bold."""
    result = plain_table(table.title, *table.header)
    for row, cells in enumerate(table.rows):
        styles = ["bold" if (row, column) in table.best else "" for column in range(len(cells))]
        result.add_row(*(Text(printable(cell), style) for cell, style in zip(cells, styles, strict=True)))
    return result
