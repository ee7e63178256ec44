"""From a configuration of plain values to a finished run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gut_fast import analysis, data, models
from gut_fast.analysis.choice import AUTO
from gut_fast.data import Dataset
from gut_fast.optim import GossipOptimizer
from gut_fast.rules import get_rule
from gut_fast.simulation import Simulator
from gut_fast.simulation.plan import Plan
from gut_fast.simulation.randomness import derive_seed, own_random_state, seed_generators
from gut_fast.simulation.sharing import agents_here
from gut_fast.topology.names import parse_topology

__all__ = ["Experiment", "Run", "load_data", "make_simulator", "samples_per_class", "train"]


@dataclass(frozen=True)
class Experiment:
    """One run: what is trained, on what, how, and over which topology.

    All values are plain, so that a configuration can be written as JSON and read again. The `seed` decides everything
    random: the initial model, the division of the samples, the batches, and the split of a data set that has none of
    its own. So two experiments that differ in rule or learning rate alone are paired.

    Args:
        data, partition, rule, engine, backend: names, as in the rooms of these.
        model, norm: a network for `gut_fast.models.build`, such as ``"mlp:64"``, and its normalisation (None: its own).
        pool: images are first averaged over squares of so many pixels a side.
        validation: this fraction of the training samples, of every class, is held out, and all evaluations are of these
            instead of the test samples.
        topology: a spec for `parse_topology`; `gamma` below 1 makes it lazy.
        hyperparameters: of the rule; defaults are filled in, and for mu ``"auto"`` what suits the topology.
        partition_options: for example ``{"alpha": 0.1}``.
        lr, weight_decay, milestones, decay, batch_size, steps, eval_every: as in `GossipOptimizer` and `Simulator`.
        state_dtype: of the optimizer's state, for example ``"bfloat16"``; None is the parameters'.
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
    device: str = "cpu"
    autocast: str | None = None
    channels_last: bool = False
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        given = self.hyperparameters
        if given.get("mu") == AUTO:
            given = analysis.with_auto_mu(self.rule, given, parse_topology(self.topology, self.gamma))
        object.__setattr__(self, "hyperparameters", get_rule(self.rule).check(given))
        object.__setattr__(self, "partition_options", dict(self.partition_options))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        Plan(self.steps, self.milestones, self.decay, self.eval_every, checkpoint=None, checkpoint_every=None)

    def _check_types(self) -> None:
        """Of what would otherwise be used before anything looks at it, in a file written by hand for example."""
        expected = {"str": str, "int": int, "bool": bool, "Mapping[str, Any]": Mapping}
        for entry in dataclasses.fields(self):
            kind, value = expected.get(str(entry.type)), getattr(self, entry.name)
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise TypeError(f"{entry.name} must be a {kind.__name__}, got {type(value).__name__} {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON takes it."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: it is not the configuration of an experiment.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not content.keys() <= known:
            raise ValueError(f"{path} is not the configuration of an experiment; its entries are {', '.join(known)}")
        try:
            return cls(**content)
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Run:
    """A finished experiment: the history of `Simulator.run`, the engine that computed it and its time in seconds."""

    experiment: Experiment
    history: list[dict[str, Any]]
    engine: str
    seconds: float

    @property
    def final(self) -> dict[str, Any]:
        """The last row of the history."""
        return self.history[-1]


def make_simulator(experiment: Experiment, process_group: dist.ProcessGroup | None = None) -> Simulator:
    """The simulator that the experiment describes, at step 0; with a process group that of the agents of this rank.

    Raises:
        TypeError, ValueError: a bad value.
        OSError, ImportError, RuntimeError: a file, a package or the backend asked for is missing.
    """
    topology = parse_topology(experiment.topology, experiment.gamma)
    device = _device(experiment.device)
    state_dtype, autocast = (_dtype(name, getattr(experiment, name)) for name in ("state_dtype", "autocast"))
    dataset = load_data(experiment)
    where: dict[str, Any] = {}
    if process_group is not None:
        here = len(agents_here(topology.num_agents, process_group))
        where = {"process_group": process_group, "agents_per_rank": here}

    def optimizer(parameters: list[nn.Parameter]) -> GossipOptimizer:
        return GossipOptimizer(
            parameters,
            experiment.rule,
            topology=topology,
            lr=experiment.lr,
            weight_decay=experiment.weight_decay,
            backend=experiment.backend,
            state_dtype=state_dtype,
            **where,
            **experiment.hyperparameters,
        )

    return Simulator(
        _initial_model(experiment, dataset).to(device),
        topology,
        optimizer=optimizer,
        data=dataset,
        parts=_divide(experiment, dataset, topology.num_agents),
        batch_size=experiment.batch_size,
        engine=experiment.engine,
        seed=experiment.seed,
        augment=dataset.augmentation if experiment.augment else None,
        autocast=autocast,
        channels_last=experiment.channels_last,
        process_group=process_group,
    )


def train(experiment: Experiment, simulator: Simulator, **options: Any) -> Run:
    """Runs the experiment's simulator to the last step; `options` go to `Simulator.run`."""
    start = time.perf_counter()
    simulator.run(
        experiment.steps,
        milestones=experiment.milestones,
        decay=experiment.decay,
        eval_every=experiment.eval_every,
        **options,
    )
    return Run(experiment, simulator.history, simulator.engine, time.perf_counter() - start)


def samples_per_class(experiment: Experiment) -> Tensor:
    """How many training samples of each class every agent holds: int64 [N, classes]. Raises as `make_simulator`."""
    num_agents = parse_topology(experiment.topology).num_agents
    dataset = load_data(experiment)
    parts = _divide(experiment, dataset, num_agents)
    return data.partition.class_histogram(dataset.train_labels, parts, dataset.num_classes)


def load_data(experiment: Experiment) -> Dataset:
    """The samples of the experiment. Raises as `gut_fast.data.load`; ValueError for a bad `pool` or `validation`."""
    dataset = _pooled(experiment.data, _split_seed(experiment.data, experiment.seed), experiment.pool)
    return dataset.with_validation(experiment.validation, experiment.seed) if experiment.validation else dataset


def _split_seed(name: str, seed: int) -> int:
    """The seed where it divides a set into training and test samples, 0 where the set has a division of its own."""
    function = data.DATASETS.get(name)
    return seed if function is not None and "seed" in inspect.signature(function).parameters else 0


@lru_cache(maxsize=8)
def _pooled(name: str, seed: int, pool: int) -> Dataset:
    dataset = data.load(name, seed=seed)
    return dataset if pool == 1 else dataset.pooled(pool)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _dtype(option: str, name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{option} must be a floating dtype of torch, such as bfloat16, got {name!r}")
    return dtype


def _divide(experiment: Experiment, dataset: Dataset, num_agents: int) -> list[Tensor]:
    return data.partition.partition(
        experiment.partition, dataset.train_labels, num_agents, experiment.seed, **experiment.partition_options
    )


def _initial_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    with own_random_state(torch.device("cpu")):
        seed_generators(derive_seed("model", experiment.seed), torch.device("cpu"))
        return models.build(experiment.model, dataset.input_shape, dataset.num_classes, experiment.norm)
