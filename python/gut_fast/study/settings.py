"""Experiments from flat names and values, as a command line and a sweep's file give them.

A setting is an entry of `Experiment`, an option of its partition or a hyper-parameter of its rule, by its own name.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from gut_fast.data.partition import PARTITIONS
from gut_fast.rules import get_rule
from gut_fast.study.runner import Experiment

__all__ = ["ENTRIES", "MAX_SEEDS", "as_setting", "make_experiment", "number_if_text", "seeds_of"]

ENTRIES = {entry.name: entry for entry in dataclasses.fields(Experiment)}
MAX_SEEDS = 10_000


def make_experiment(common: Mapping[str, Any], own: Mapping[str, Any]) -> Experiment:
    """The experiment of these settings.

    Args:
        common: settings of many experiments; options that this partition or rule does not have are left out.
        own: settings that come after, and must all be of use.

    Raises:
        TypeError, ValueError: an unknown setting or a bad value.
    """
    given = {**common, **own}
    rule = get_rule(given.get("rule", ENTRIES["rule"].default))
    partition = given.get("partition", ENTRIES["partition"].default)
    options = _options_of(partition)
    for name in own:
        if name not in ENTRIES and name not in options and name not in rule.hyperparameters:
            raise ValueError(
                f"there is no {name!r}: neither an entry of Experiment, nor an option of partition {partition!r} "
                f"({', '.join(options) or 'it has none'}), nor a hyper-parameter of rule {rule.name!r} "
                f"({', '.join(rule.hyperparameters) or 'it has none'})"
            )
    entries = {name: as_setting(name, given[name]) for name in ENTRIES if name in given}
    entries["hyperparameters"] = _gathered(given, rule.hyperparameters, "hyperparameters")
    entries["partition_options"] = _gathered(given, options, "partition_options")
    return Experiment(**entries)


def _options_of(partition: Any) -> list[str]:
    """What can be set of the partition of that name; nothing if there is none, which `Experiment` leaves to others."""
    if not isinstance(partition, str) or partition not in PARTITIONS:
        return []
    parameters = inspect.signature(PARTITIONS[partition]).parameters
    return [name for name in parameters if name not in ("labels", "num_agents", "seed")]


def _gathered(given: Mapping[str, Any], names: Iterable[str], entry: str) -> dict[str, Any]:
    """The settings of these names, and after them those of the entry that holds them all, if it is given itself."""
    whole = given.get(entry, {})
    if not isinstance(whole, Mapping):
        raise TypeError(f"{entry} must hold names and values, got {whole!r}")
    return {**{name: as_setting(name, given[name]) for name in names if name in given}, **whole}


def as_setting(name: str, value: Any) -> Any:
    """The value with numbers that are text, as YAML's 1e-3 is, as numbers where one is expected.

    Raises:
        TypeError: milestones that are not a list.
    """
    if name == "milestones":
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"milestones must be a list, such as [0.5, 0.75], got {value!r}")
        return [number_if_text(entry) for entry in value]
    is_number = name not in ENTRIES or ENTRIES[name].type == "float"
    return number_if_text(value) if is_number else value


def number_if_text(value: Any) -> Any:
    """The number that a text says, or else the value as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def seeds_of(value: Any) -> list[int]:
    """A number of seeds, 0 …, or a list of seeds.

    Raises:
        TypeError, ValueError: neither, none at all, one twice, too many, or one that is too large.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if (value if is_count else len(value) if isinstance(value, list) else 1) > MAX_SEEDS:
        raise ValueError(f"expected at most {MAX_SEEDS:,} seeds, got {value if is_count else len(value):,}")
    seeds = list(range(value)) if is_count else value
    if not isinstance(seeds, list) or not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise TypeError(f"seeds must be how many, at least 1, or a list of integers, got {value!r}")
    if not 0 <= min(seeds) <= max(seeds) < 2**63 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be from 0 to below 2^63 and none named twice, got {value!r}")
    return seeds
