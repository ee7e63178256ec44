"""YAML files as plain names and values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gut_fast.files import replacing

__all__ = ["about_file", "read_yaml", "write_yaml"]

MERGE = "tag:yaml.org,2002:merge"
"""The tag of the key ``<<``, which brings in all names of another mapping."""


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The content of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ImportError: PyYAML is not installed.
        TypeError, ValueError: it is not YAML, a name stands twice, or it holds no names; the message names the file.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('sweeps need PyYAML; install it with: pip install "gut_fast[cli]"') from error

    class Loader(yaml.SafeLoader):
        """Names that stand twice are errors: YAML's own loader keeps the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            # Merge keys bring in names that those of the mapping itself come before; they are not merged yet.
            keys = [key for key, _ in node.value if key.tag != MERGE]
            names = [self.construct_object(key, deep=True) for key in keys]
            for number, name in enumerate(names):
                if name in names[:number]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} stands twice", keys[number].start_mark
                    )
            return node

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise TypeError(f"{path} must hold names and values, got {content!r}")
    return content


def write_yaml(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes the names and values in their order; the file is written whole or not at all."""
    import yaml

    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


@contextlib.contextmanager
def about_file(path: str | Path) -> Iterator[None]:
    """Errors in values, raised while the content of a file is looked at, name the file."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
