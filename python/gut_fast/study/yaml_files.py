"""YAML files as plain names and values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gut_fast.distributed.files import replacing

__all__ = ["about_file", "read_yaml", "write_yaml"]


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

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=deep) for key, _ in node.value]
            for number, name in enumerate(names):
                if name in names[:number]:
                    mark = node.value[number][0].start_mark
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", mark)
            return super().construct_mapping(node, deep)

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
