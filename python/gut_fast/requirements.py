"""Libraries that gut_fast does without until someone asks for what they do, and the command that installs them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable

__all__ = ["COMMAND_LINE", "OPTIONAL", "distribution", "pip_install", "what_is_missing"]

COMMAND_LINE = {
    "typer": "typer>=0.20",
    "rich": "rich>=13",
    "matplotlib": "matplotlib>=3.8",
    "yaml": "pyyaml>=6",
    "jinja2": "jinja2>=3.1",
    "pandas": "pandas>=2.2",
    "zstandard": "zstandard>=0.22",
    "scipy": "scipy>=1.11",
}
"""The libraries that ``gut-fast`` needs, which the extra ``cli`` brings: by what is imported, what pip installs."""

OPTIONAL = COMMAND_LINE | {
    "sklearn": "scikit-learn>=1.4",
    "pooch": "pooch>=1.8",
    "torchvision": "torchvision>=0.21",
    "mlxtend": "mlxtend>=0.23",
    "tensorboard": "tensorboard>=2.16",
    "wandb": "wandb>=0.18",
    "mlflow": "mlflow-skinny>=2.14",
    "triton": "triton>=3.6",
}
"""All such libraries, with the same bounds as the extras of the package."""


def distribution(module: str) -> str:
    """The name under which pip knows a library, ``"scikit-learn"`` for ``"sklearn"``."""
    return re.split("[<>=!~]", OPTIONAL.get(module, module))[0]


def pip_install(*modules: str) -> str:
    """The command that installs these libraries: ``pip install "rich>=13" "scikit-learn>=1.4"``."""
    return " ".join(["pip install", *(f'"{OPTIONAL.get(module, module)}"' for module in modules)])


def what_is_missing(modules: Iterable[str]) -> str | None:
    """One line that says which of these modules are not installed and what to do, or None if all are."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    *others, last = map(distribution, missing)
    names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    return f"{names} not installed; install with: {pip_install(*missing)}"
