"""The settings of one run: `Experiment`, and how it is made from flat names and values.

A command line and a sweep's file give settings by name: an entry of `Experiment`, an option of its partition or a
hyper-parameter of its rule.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from gut_fast import analysis
from gut_fast.analysis.choice import AUTO
from gut_fast.arguments import all_known, as_number, nearest, shown
from gut_fast.data.partition import PARTITIONS
from gut_fast.rules import get_rule
from gut_fast.simulation.timetable import Timetable
from gut_fast.study.schedules import MILESTONES, SCHEDULES, warmup_steps
from gut_fast.topology.names import parse_topology

__all__ = [
    "ENTRIES",
    "MAX_SEEDS",
    "Experiment",
    "as_setting",
    "inner_class",
    "make_experiment",
    "number_if_text",
    "options_of",
    "seeds_of",
]

MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Experiment:
    """The settings of one run: what is trained, on what, how, and over which topology.

    All values are plain, so that they can be written as JSON or YAML and read again. The `seed` decides everything
    random: the initial model, the division of the samples, the batches, and the split of a data set that has none of
    its own. So two experiments that differ in rule or learning rate alone are paired.

    Args:
        data, partition, rule, engine, backend: names, as in the rooms of these.
        model, norm: a network for `gut_fast.models.build`, such as ``"mlp:64"``, and its normalisation (None: its own).
        pool: images are first averaged over squares of so many pixels a side.
        validation: this fraction of the training samples, of every class, is held out, and all evaluations are of these
            instead of the test samples.
        topology: a spec for `parse_topology`; `gamma` below 1 makes it lazy.
        hyperparameters: of the rule; defaults are filled in, and for mu and kappa ``"auto"`` what suits the topology
            and local_steps.
        partition_options: for example ``{"alpha": 0.1}``.
        lr, weight_decay, milestones, decay, batch_size, steps, eval_every: as in `GossipOptimizer` and `Simulator`.
        schedule: a name out of `gut_fast.study.schedules.SCHEDULES`; without ``"milestones"`` there are none.
        warmup: the first steps, or a fraction of all steps if below 1, in which the learning rate rises to `lr`.
        max_grad_norm: each agent's gradient is scaled to at most this norm; None leaves it as it is.
        inner: a class of `torch.optim`, whose case does not matter, that makes the local move as in `gut_fast.Gossip`;
            `weight_decay` is then its own. None is plain gradient descent.
        inner_options: further arguments of that class.
        mix_state: names of its state that are mixed with the models, with commas between them: see `gut_fast.Gossip`.
        state_dtype: of the optimizer's state, for example ``"bfloat16"``; None is the parameters'.
        local_steps, wire_seed: as in `GossipOptimizer`.
        wire_dtype: of messages, ``"int8"``, ``"int4"`` or a dtype by name; None is the parameters'.
        device: where parameters and data live, for example ``"cpu"`` or ``"cuda"``.
        autocast, channels_last: as in `Simulator`, autocast by name.
        augment: whether training images are cropped and mirrored at random, as is usual for the data set.

    Raises:
        TypeError, ValueError: an unknown rule, bad hyper-parameters of it, or bad steps, milestones, decay or
            eval_every; the rest is checked by `make_simulator`.
    """

    data: str = "digits"
    pool: int = 1
    validation: float = 0.0
    model: str = "mlp"
    norm: str | None = None
    topology: str = "ring:16"
    gamma: float = 1.0
    rule: str = "gut"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.1
    weight_decay: float = 0.0
    inner: str | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    mix_state: str | None = None
    max_grad_norm: float | None = None
    schedule: str = MILESTONES
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    partition: str = "dirichlet"
    partition_options: Mapping[str, Any] = field(default_factory=lambda: {"alpha": 0.1})
    batch_size: int = 16
    steps: int = 400
    eval_every: int | None = 20
    engine: str = "auto"
    backend: str = "auto"
    state_dtype: str | None = None
    local_steps: int = 1
    wire_dtype: str | None = None
    wire_seed: int | None = None
    device: str = "cpu"
    autocast: str | None = None
    channels_last: bool = False
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "rule", get_rule(self.rule).name)
        given = self.hyperparameters
        if AUTO in (given.get("mu"), given.get("kappa")):
            topology = parse_topology(self.topology, self.gamma)
            given = analysis.with_auto(self.rule, given, topology, self.local_steps)
        object.__setattr__(self, "hyperparameters", get_rule(self.rule).check(given))
        object.__setattr__(self, "partition_options", dict(self.partition_options))
        object.__setattr__(self, "milestones", tuple(self.milestones) if self.schedule == MILESTONES else ())
        self._check_local_move()
        Timetable(self.steps, self.milestones, self.decay, self.eval_every, checkpoint=None, checkpoint_every=None)

    def _check_local_move(self) -> None:
        """Raises TypeError or ValueError for a bad schedule, clipping or inner optimizer."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; {all_known(self.schedule, SCHEDULES)}")
        warmup_steps(as_number(self.warmup, "warmup"), self.steps)
        if self.max_grad_norm is not None and not as_number(self.max_grad_norm, "max_grad_norm") > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.inner is None and self.mix_state is not None:
            raise ValueError(f"mix_state {shown(self.mix_state)} needs inner=, the optimizer whose state it is")
        if self.inner is None and self.inner_options:
            raise ValueError(f"inner_options {dict(self.inner_options)} need inner=, the optimizer that takes them")
        object.__setattr__(self, "inner_options", dict(self.inner_options))
        if self.inner is not None:
            object.__setattr__(self, "inner", inner_class(self.inner).__name__)
            known = [name for name in _arguments_of(inner_class(self.inner)) if name not in OF_EXPERIMENT]
            for name in self.inner_options:
                if name not in known:
                    raise ValueError(f"{self.inner} has no option {name!r}; {nearest(name, known)}")

    def _check_types(self) -> None:
        """Raises TypeError for a value that would be used before anything else looks at it."""
        expected = {"str": str, "int": int, "bool": bool, "Mapping[str, Any]": Mapping}
        for entry in dataclasses.fields(self):
            kind, value = expected.get(str(entry.type)), getattr(self, entry.name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise TypeError(f"{entry.name} must be a {kind.__name__}, got {type(value).__name__} {shown(value)}")
            if isinstance(value, str) and not value.isprintable():
                _check_is_text(value, entry.name)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return dataclasses.asdict(self)


def _check_is_text(value: str, name: str) -> None:
    """Raises ValueError for half a pair of UTF-16, which stands for a byte that is no text and cannot be written."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no text: {value!r}") from error


OF_EXPERIMENT = ("self", "params", "lr", "weight_decay")
"""Arguments of an inner optimizer that the experiment gives it."""


def inner_class(name: str) -> type[Optimizer]:
    """The optimizer of `torch.optim` with this name, whose case does not matter. Raises ValueError if there is none."""
    classes = {
        each.__name__.lower(): each
        for each in vars(torch.optim).values()
        if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
    }
    if name.lower() not in classes:
        raise ValueError(f"unknown inner optimizer {name!r}; {all_known(name, classes)}")
    return classes[name.lower()]


def _arguments_of(optimizer: type[Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(optimizer.__init__).parameters


ENTRIES = {entry.name: entry for entry in dataclasses.fields(Experiment)}


def make_experiment(common: Mapping[str, Any], own: Mapping[str, Any]) -> Experiment:
    """The experiment of these settings; what they leave out is as in `Experiment`, alpha too.

    Args:
        common: settings of many experiments; options that this partition or rule does not have are left out.
        own: settings that come after, and must all be of use.

    Raises:
        TypeError, ValueError: an unknown setting or a bad value, or fewer steps than the first round has.
    """
    given = {**common, **own}
    rule = get_rule(given.get("rule", Experiment.rule))
    partition = given.get("partition", Experiment.partition)
    options = options_of(partition)
    known = [*ENTRIES, *options, *rule.hyperparameters]
    for name in own:
        if name not in known:
            raise ValueError(
                f"there is no {name!r} for rule {rule.name!r} and partition {partition!r}; {nearest(name, known)}"
            )
    entries = {name: as_setting(name, given[name]) for name in ENTRIES if name in given}
    if entries.get("inner") is not None and "lr" not in entries:
        entries["lr"] = float(_arguments_of(inner_class(entries["inner"]))["lr"].default)
    if entries.get("schedule", MILESTONES) != MILESTONES and (useless := own.keys() & {"milestones", "decay"}):
        raise ValueError(f"schedule {entries['schedule']!r} has no use for {', '.join(sorted(useless))}")
    entries["hyperparameters"] = _gathered(given, rule.hyperparameters, "hyperparameters")
    entries["partition_options"] = _gathered({**Experiment().partition_options, **given}, options, "partition_options")
    experiment = Experiment(**entries)
    if experiment.local_steps > experiment.steps:
        raise ValueError(
            f"local_steps={experiment.local_steps} is more than steps={experiment.steps}: the run would end before the "
            f"first step that mixes, and nothing would be sent; take at most {experiment.steps}"
        )
    return experiment


def options_of(partition: Any) -> list[str]:
    """The options of the partition with this name; none for an unknown one, which `make_simulator` refuses."""
    if not isinstance(partition, str) or partition not in PARTITIONS:
        return []
    parameters = inspect.signature(PARTITIONS[partition]).parameters
    return [name for name in parameters if name not in ("labels", "num_agents", "seed")]


def _gathered(given: Mapping[str, Any], names: Iterable[str], entry: str) -> dict[str, Any]:
    """The settings of these names, and after them those of the entry that holds them all, if it is given itself."""
    whole = given.get(entry, {})
    if not isinstance(whole, Mapping):
        raise TypeError(f"{entry} must hold names and values, got {shown(whole)}")
    return {**{name: as_setting(name, given[name]) for name in names if name in given}, **whole}


def as_setting(name: str, value: Any) -> Any:
    """The value with numbers that are text, as YAML's 1e-3 is, as numbers where one is expected.

    Raises:
        TypeError: milestones that are not a list.
    """
    if name == "milestones":
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"milestones must be a list, such as [0.5, 0.75], got {shown(value)}")
        return [number_if_text(entry) for entry in value]
    is_number = name not in ENTRIES or str(ENTRIES[name].type).startswith("float")
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
    """The seeds that a number of seeds (n is 0 … n − 1) or a list of seeds stands for.

    Raises:
        TypeError, ValueError: neither, none at all, one twice, too many, or one that is too large.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if (value if is_count else len(value) if isinstance(value, list) else 1) > MAX_SEEDS:
        raise ValueError(f"expected at most {MAX_SEEDS:,} seeds, got {value if is_count else len(value):,}")
    seeds = list(range(value)) if is_count else value
    if not isinstance(seeds, list) or not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise TypeError(f"seeds must be how many, at least 1, or a list of integers, got {shown(value)}")
    if not 0 <= min(seeds) <= max(seeds) < 2**63 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be from 0 to below 2^63 and none named twice, got {shown(value)}")
    return seeds
