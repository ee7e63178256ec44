"""Lets pages of docs/ link to any file of the repository: the site gets a copy of each file that is linked to.

A link such as ``../results/README.md`` leads to the file itself where the repository is read, and in the site to its
copy under ``repository/``: a page if the file is Markdown or source code. `make docs` calls this as a hook of MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIES = "repository"
SOURCES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".yaml": "yaml"}
"""The files that become pages of code, and their languages."""

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to, and those that the added pages link to in turn."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = source_of(waiting.pop())
        for path in linked_files(page):
            copy = copy_of(path)
            if path.parts[0] == "docs" or files.get_file_from_path(copy) is not None:
                continue
            if language := SOURCES.get(path.suffix):
                code = (ROOT / path).read_text(encoding="utf-8")
                files.append(File.generated(config, copy, content=f"# {path}\n\n~~~~{language}\n{code}~~~~\n"))
            else:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
                waiting += [copy] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its links into the repository turned to the copies."""
    here = page.file.src_uri
    if here.startswith(COPIES) and Path(here.removesuffix(".md")).suffix in SOURCES:
        return markdown

    def turned(match: re.Match[str]) -> str:
        path = target_of(source_of(here), match[2])
        if path is None:
            return match[0]
        page_or_copy = path.relative_to("docs").as_posix() if path.parts[0] == "docs" else copy_of(path)
        return f"{match[1]}{posixpath.relpath(page_or_copy, posixpath.dirname(here))}{match[3] or ''})"

    return LINK.sub(turned, markdown)


def copy_of(path: Path) -> str:
    """The place in the site of a file outside docs/."""
    return f"{COPIES}/{path.as_posix()}{'.md' if path.suffix in SOURCES else ''}"


def source_of(uri: str) -> Path:
    """The file of the repository that a page of the site is made of, relative to the top level."""
    return Path(uri.removeprefix(f"{COPIES}/")) if uri.startswith(f"{COPIES}/") else Path("docs", uri)


def linked_files(page: Path) -> list[Path]:
    """The files of the repository that a Markdown file links to."""
    found = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [path for _, target, _ in found if (path := target_of(page, target)) is not None]


def target_of(page: Path, target: str) -> Path | None:
    """The file of the repository that a link of a page leads to; None for other links."""
    path = Path(posixpath.normpath(page.parent / target))
    return path if ":" not in target and path.parts[0] != ".." and (ROOT / path).is_file() else None
