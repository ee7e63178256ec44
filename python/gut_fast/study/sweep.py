"""A sweep, methods × grid × seeds, as one YAML file; each combination is a `Task`.

::

    preset: fashion-mnist-lenet5-ring16     # optional: where all runs start from, and which methods there are
    settings: {steps: 1000, momentum: 0.9}  # of all runs; hyper-parameters go to the rules that have them
    methods:
      DSGD: {rule: dsgd, lr: 0.1}
      GUT: {rule: gut, lr: 0.4, mu: 0.9}
    grid:                                   # every combination is a point of the sweep
      alpha: [0.01, 0.1, 1]
      topology: ["ring:16", "ring:32"]
    seeds: 5                                # 0 … 4; or a list

What can be set are the entries of `Experiment`, the options of its partition and the hyper-parameters of its rule, all
by their own names. Every QG-GUTm brings its control along, QG-DSGDm in the same heavy-ball form with momentum β + μ,
unless ``controls: false``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gut_fast.arguments import nearest, shown
from gut_fast.study.experiment import ENTRIES, Experiment, as_setting, make_experiment, options_of, seeds_of
from gut_fast.study.presets import preset_methods, preset_settings
from gut_fast.study.yaml_files import about_file, read_yaml

__all__ = ["Sweep", "Task", "control_label", "make_sweep", "named_methods", "read_sweep", "section_of"]

CONTROLLED = "qg_gutm"
MAX_LENGTH_OF_WORDS = 120
MAX_RUNS = 50_000
"""The most runs of a sweep, controls not counted."""

GREEK = str.maketrans({"α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "μ": "mu"})


@dataclass(frozen=True)
class Task:
    """One run of a sweep that is to be done: a method at a point of the grid, with a seed.

    Attributes:
        method: the label of the method.
        point: what the sweep varies beside methods and seeds, such as ``{"alpha": 0.1}``.
        experiment: all settings of the run.
        control_of: the method for which this one is the control.
    """

    method: str
    point: Mapping[str, Any]
    experiment: Experiment
    control_of: str | None = None

    @property
    def name(self) -> str:
        """The run's name in ASCII: method, point and seed, and eight digits that depend on every setting."""
        defaults = Experiment()
        settings = {
            name: value for name, value in self.experiment.as_dict().items() if value != getattr(defaults, name)
        }
        content = json.dumps([self.method, settings], sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
        words = [self.method, *(f"{name}-{_in_a_name(value)}" for name, value in self.point.items())]
        plain = (re.sub(r"[^a-z0-9_.+=-]+", "-", word.lower().translate(GREEK)).strip("-.") for word in words)
        start = ".".join(filter(None, plain))[:MAX_LENGTH_OF_WORDS].strip("-.")
        return ".".join(filter(None, (start, f"seed-{self.experiment.seed}", digest)))


def _in_a_name(value: Any) -> str:
    return ("+".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file: methods × points of a grid × seeds.

    Args:
        settings: what all runs share; a hyper-parameter goes to those rules that have it.
        methods: the settings of each method by its label, which come after.
        grid: the values of further settings; every combination is a point.
        seeds: the seeds of each method at each point.
        controls: whether each QG-GUTm with μ > 0 brings its control along.

    Raises:
        TypeError, ValueError: an unknown or bad setting, one given twice, or nothing to run.
    """

    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    controls: bool = True

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds:
            raise ValueError("a sweep needs at least one method and one seed")
        check_count(math.prod(map(len, (self.methods, *self.grid.values(), self.seeds))), "runs")
        for names in (self.settings, self.grid, *self.methods.values()):
            if "seed" in names:
                raise ValueError("there is no 'seed' among what can be set; section 'seeds' names them all")
        for label, own in self.methods.items():
            if both := own.keys() & self.grid.keys():
                raise ValueError(f"method {label!r} sets {', '.join(sorted(both))}, and so does the grid")
        if twice := _first_twice(task.name for task in self.tasks()):
            raise ValueError(f"two runs are the same, {twice}; look for a value that the grid names twice")

    @property
    def points(self) -> list[dict[str, Any]]:
        """All combinations of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def tasks(self) -> list[Task]:
        """All runs: seed after seed, so that a sweep that is stopped has whole comparisons."""
        return [
            task
            for seed in self.seeds
            for point in self.points
            for label in self.methods
            for task in self._method_and_control(label, point, seed)
        ]

    def _method_and_control(self, label: str, point: Mapping[str, Any], seed: int) -> list[Task]:
        try:
            experiment = make_experiment(self.settings, {**self.methods[label], **point, "seed": seed})
            task = Task(label, point, experiment)
            control = _control(task) if self.controls else None
        except (TypeError, ValueError) as error:
            place = f" at {shown(point)}" if point else ""
            raise type(error)(f"method {label!r}{place}: {error}") from error
        return [task] if control is None or control.method in self.methods else [task, control]


def check_count(count: int, what: str) -> None:
    """Raises ValueError for more runs than a sweep may have; they are counted before any of them is made."""
    if count > MAX_RUNS:
        raise ValueError(f"these are {shown(count)} {what}; a sweep may have at most {MAX_RUNS:,}")


def _first_twice(names: Any) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _control(task: Task) -> Task | None:
    """The control of a task of QG-GUTm with μ > 0: the same with momentum β + μ and μ = 0. None for any other task."""
    values = task.experiment.hyperparameters
    if task.experiment.rule != CONTROLLED or values["mu"] == 0:
        return None
    total = round(values["momentum"] + values["mu"], 12)
    if total >= 1:
        raise ValueError(
            f"momentum {values['momentum']} and mu {values['mu']}: their sum, the momentum of the control and of the "
            "agents' average, must be below 1; or say controls: false"
        )
    experiment = replace(task.experiment, hyperparameters={**values, "momentum": total, "mu": 0.0})
    return Task(control_label(task.method), task.point, experiment, task.method)


def control_label(label: str) -> str:
    """The name of a method's control."""
    return f"{label} control β+μ" if label != "QG-GUTm" else "QG-DSGDm β+μ"


def read_sweep(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; a section ``tune`` is left to `gut_fast.study.tune`.

    Raises:
        OSError, ImportError: as `read_yaml`.
        TypeError, ValueError: it is not YAML, or describes no sweep; the message names the file.
    """
    content = read_yaml(path)
    with about_file(path):
        return make_sweep(content, also=["tune"])


SECTIONS = {"preset", "settings", "methods", "grid", "seeds", "controls"}


def make_sweep(content: Mapping[str, Any], also: Sequence[str] = ()) -> Sweep:
    """The sweep of a file's content. Sections named in `also` are left to others. Raises as `Sweep`."""
    known = sorted(SECTIONS.union(also))
    for name in content:
        if name not in known:
            raise ValueError(f"there is no section {shown(name)}; {nearest(name, known)}")
    of_preset = preset_settings(content["preset"]) if "preset" in content else {}
    settings = section_of(content, "settings", {})
    methods = named_methods(content)
    grid = {name: _values(name, values) for name, values in section_of(content, "grid", {}).items()}
    controls = content.get("controls", True)
    if not isinstance(controls, bool):
        raise TypeError(f"controls must be true or false, got {shown(controls)}")
    sweep = Sweep({**of_preset, **settings}, methods, grid, seeds_of(content.get("seeds", 1)), controls)
    _check_used(settings, sweep)
    return sweep


def section_of(content: Mapping[str, Any], name: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A section of names and values. Raises TypeError if it is something else, or missing without a default."""
    section = content.get(name, default)
    if not isinstance(section, Mapping):
        raise TypeError(f"section {name!r} must hold names and values, got {shown(section)}")
    return section


def named_methods(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The settings of the methods by label: the preset's where the file names none.

    Raises:
        TypeError, ValueError: it names neither, or a method without a rule.
    """
    methods = section_of(content, "methods", preset_methods(content["preset"]) if "preset" in content else None)
    for label, own in methods.items():
        if not isinstance(own, Mapping) or "rule" not in own:
            raise TypeError(
                f"method {label!r} must have settings with a rule, such as {{rule: gut, lr: 0.1}}, got {shown(own)}"
            )
    if "" in methods:
        raise ValueError("a method has no name; write one before its colon")
    if twice := _first_twice(map(str, methods)):
        raise ValueError(f"two methods are called {twice!r}")
    return {str(label): own for label, own in methods.items()}


def _values(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise TypeError(f"grid: {name} must be a list of at least one value, got {shown(values)}")
    return [as_setting(name, value) for value in values]


def _check_used(settings: Mapping[str, Any], sweep: Sweep) -> None:
    """Raises ValueError for a setting of all runs that not one run has: a misspelt name, for example."""
    experiments = [task.experiment for task in sweep.tasks()]
    options = {name for one in experiments for name in (*one.hyperparameters, *options_of(one.partition))}
    known = [*ENTRIES, *sorted(options)]
    for name in settings:
        if name not in known:
            raise ValueError(f"settings: no run has {name!r}; {nearest(name, known)}")
