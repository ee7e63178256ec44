"""YAML files as plain names and values."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gut_fast.arguments import shortened, shown
from gut_fast.files import FileError, FileTypeError, read_within, write_text
from gut_fast.requirements import pip_install

__all__ = ["about_file", "read_yaml", "write_yaml"]

PLAIN = "tag:yaml.org,2002:"
"""How the tags of YAML's own types begin."""

MERGE, TEXT = f"{PLAIN}merge", f"{PLAIN}str"
"""The tag of the key ``<<``, which brings in all names of another mapping, and that of text."""

MAX_BYTES = 4 << 20
"""The most bytes of a YAML file."""

MAX_LENGTH = 10_000
"""The most characters of a name or a value."""

MAX_DEPTH = 20
"""The most levels of lists and mappings in each other."""

MAX_VALUES = 250_000
"""The most names and values, an alias counted as all that it stands for: aliases of aliases may stand for billions."""


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The content of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ImportError: PyYAML is not installed.
        FileError: it is not YAML, a name stands twice, it is larger or nested deeper than the limits above, or it holds
            no names, which is a TypeError too; the message names the file.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"sweeps need PyYAML; install it with: {pip_install('yaml')}") from error

    class Loader(yaml.SafeLoader):
        """Names are text as it is written, also no, 1.10 and ~; those that stand twice are errors.

        YAML's own loader makes values of them, and keeps the last.
        """

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = set()
            # Merge keys bring in names that those of the mapping itself come before; they are not merged yet.
            for key in (key for key, _ in node.value if key.tag != MERGE):
                if isinstance(key, yaml.ScalarNode) and key.tag.startswith(PLAIN):
                    key.tag = TEXT
                name = self.construct_object(key, deep=True)
                if isinstance(name, Hashable):
                    if name in names:
                        message = f"{shown(name)} stands twice"
                        raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                    names.add(name)
            return node

    content = read_within(path, MAX_BYTES)
    try:
        text = content.decode()
        try:
            _check_size(yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        except yaml.YAMLError:  # the slower parser's messages show the place
            _check_size(yaml.parse(text, yaml.SafeLoader))
        found = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{path} is not YAML: {shortened(str(error), 1000)}") from error
    if not isinstance(found, Mapping):
        raise FileTypeError(f"{path} must hold names and values, got {shown(found)}")
    return found


def _check_size(events: Iterable[Any]) -> None:
    """Raises ValueError for values that are too many, too long or too deep, before any of them is made.

    The parser tells of the values one after another. An alias has as many of them, and is as deep, as what it names.
    """
    opened: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    named: dict[str, tuple[int, int]] = {}
    for event in events:
        kind = type(event).__name__
        if kind.endswith("StartEvent") and kind[0] in "SM" and not kind.startswith("Stream"):
            opened.append((event.anchor, 0, 0))
            anchor, values, levels = None, 0, 0
        elif kind == "AliasEvent":
            anchor, (values, levels) = None, named.get(event.anchor, (MAX_VALUES + 1, 0))
        elif kind == "ScalarEvent":
            anchor, values, levels = event.anchor, 1, 0
            if len(event.value) > MAX_LENGTH:
                raise ValueError(f"{shortened(event.value, 50)!r} is longer than {MAX_LENGTH:,} characters")
        elif kind in ("SequenceEndEvent", "MappingEndEvent"):
            anchor, values, levels = opened.pop()
            values, levels = values + 1, levels + 1
        else:
            continue
        if anchor is not None:
            named[anchor] = values, levels
        around, total, deepest = opened[-1]
        opened[-1] = around, total + values, max(deepest, levels)
        if total + values > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} names and values, or for itself")
        if len(opened) - 1 + max(deepest, levels) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def write_yaml(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes the names and values in their order; the file is written whole or not at all."""
    import yaml

    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def about_file(path: str | Path) -> Iterator[None]:
    """Errors in values, raised while the content of a file is looked at, name the file."""
    try:
        yield
    except TypeError as error:
        raise FileTypeError(f"{path}: {shortened(str(error), 1000)}") from error
    except ValueError as error:
        raise FileError(f"{path}: {shortened(str(error), 1000)}") from error
