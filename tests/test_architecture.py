"""The house: imports run downwards only, data and models stand on the ground floor."""

import ast
import importlib
from pathlib import Path

import pytest

import gut_fast

PACKAGE = Path(gut_fast.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    {"arguments"},
    {"rules", "topology", "data", "models", "_core", "_cuda"},
    {"reference", "analysis", "kernels"},
    {"distributed"},
    {"optim"},
    {"simulation"},
    {"verify"},
    {"study"},
    {"benchmark"},
    {"cli"},
    {"__init__", "__main__"},
]
"""Rooms of a floor may import those of the floors before it, and nothing else of gut_fast."""


def floor(room):
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms of gut_fast that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "gut_fast":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gut_fast."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gut_fast."))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in SOURCES} <= set().union(*FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    rooms = {name for name in imported_rooms(path) if any(name in rooms for rooms in FLOORS)}
    assert not any(node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    assert all(other == room or floor(other) < floor(room) for other in rooms), (room, rooms)


def test_public_names_are_there_and_documented():
    for name in gut_fast.__all__:
        assert getattr(getattr(gut_fast, name), "__doc__", None), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path):
    name = ".".join(("gut_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    if not name.endswith("__main__"):
        assert importlib.import_module(name).__doc__
