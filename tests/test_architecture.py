"""The house: imports run downwards only, through at most ten floors, and every docstring is a sentence of its own."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import gut_fast

PACKAGE = Path(gut_fast.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))

FLOORS = [
    {"arguments", "coefficients", "files", "randomness", "requirements", "_core", "_cuda"},
    {"rule", "published", "topology", "data", "models"},
    {"rules"},
    {"reference", "analysis", "kernels"},
    {"agents", "distributed", "verify"},
    {"optim"},
    {"simulation"},
    {"study", "bench"},
    {"cli"},
    {"__init__", "__main__"},
]
"""Rooms of a floor may import those of the floors before it, and nothing else of gut_fast."""

FRAGMENT = re.compile(
    r"(Of|Those|That|What|The same of|As|To|In|Beside|Whether|It|Its|They|Their|These|So many|So much) [a-z]"
)
"""How a docstring opens that is no sentence, or that speaks of something named elsewhere."""

IDIOMS = ("In place", "gut_fast")


def floor(room):
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree):
    """The rooms of gut_fast that a source file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "gut_fast":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gut_fast."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gut_fast."))


def docstrings(tree):
    """The docstrings of a module, its classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
            for before, after in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if is_text and isinstance(before, ast.Assign | ast.AnnAssign):
                    yield after.value.value


def is_sentence(text):
    """True unless the first paragraph opens with a fragment or a small letter, or has no end. Equations may."""
    first = text.strip().split("\n\n")[0]
    if "=" in first:
        return not FRAGMENT.match(first)
    return first[-1] in ".:" and (first.startswith(IDIOMS) or not (first[0].islower() or FRAGMENT.match(first)))


def test_every_room_has_one_of_ten_floors():
    assert {room_of(path) for path in SOURCES} <= set().union(*FLOORS)
    assert len(FLOORS) <= 10


@each_source
def test_imports_run_downwards(path):
    room, tree = room_of(path), ast.parse(path.read_text())
    rooms = {name for name in imported_rooms(tree) if any(name in rooms for rooms in FLOORS)}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    assert all(other == room or floor(other) < floor(room) for other in rooms), (room, rooms)


@each_source
def test_docstrings_are_sentences(path):
    assert [text for text in docstrings(ast.parse(path.read_text())) if text and not is_sentence(text)] == []


def test_public_names_are_there_and_documented():
    for name in gut_fast.__all__:
        assert getattr(getattr(gut_fast, name), "__doc__", None), name


@each_source
def test_every_module_says_what_it_is(path):
    name = ".".join(("gut_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    if not name.endswith("__main__"):
        assert importlib.import_module(name).__doc__
