"""From the settings of an experiment to a finished run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gut_fast import data, models
from gut_fast.data import Dataset
from gut_fast.optim import Gossip, GossipOptimizer
from gut_fast.randomness import derive_seed, own_random_state, seed_generators
from gut_fast.simulation import Simulator
from gut_fast.simulation.sharing import agents_here
from gut_fast.study.experiment import Experiment, inner_class
from gut_fast.study.schedules import make_schedule
from gut_fast.topology import Topology
from gut_fast.topology.names import parse_topology

__all__ = ["Run", "load_data", "make_simulator", "samples_per_class", "train"]


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
    """The simulator that the experiment describes, at step 0; with a process group it has the agents of this rank.

    Raises:
        TypeError, ValueError: a bad value.
        OSError, ImportError, RuntimeError: a file, a package or the backend asked for is missing.
    """
    topology = parse_topology(experiment.topology, experiment.gamma)
    device = _device(experiment.device)
    state_dtype, autocast = (_dtype(name, getattr(experiment, name)) for name in ("state_dtype", "autocast"))
    wire_dtype = (
        experiment.wire_dtype if experiment.wire_dtype in CODED else _dtype("wire_dtype", experiment.wire_dtype)
    )
    wire = {"wire_dtype": wire_dtype, "wire_seed": experiment.wire_seed}
    dataset = load_data(experiment)
    where: dict[str, Any] = {}
    if process_group is not None:
        here = len(agents_here(topology.num_agents, process_group))
        where = {"process_group": process_group, "agents_per_rank": here}

    return Simulator(
        _initial_model(experiment, dataset).to(device),
        topology,
        optimizer=partial(_make_optimizer, experiment, topology, {"state_dtype": state_dtype, **wire, **where}),
        data=dataset,
        parts=_divide(experiment, dataset, topology.num_agents),
        batch_size=experiment.batch_size,
        max_grad_norm=experiment.max_grad_norm,
        engine=experiment.engine,
        seed=experiment.seed,
        augment=_augmentation(dataset) if experiment.augment else None,
        autocast=autocast,
        channels_last=experiment.channels_last,
        process_group=process_group,
    )


def _make_optimizer(
    experiment: Experiment,
    topology: Topology,
    more: Mapping[str, Any],
    parameters: list[nn.Parameter],
) -> GossipOptimizer:
    """The optimizer of the experiment; `more` are the dtypes and its ranks."""
    options: dict[str, Any] = {"topology": topology, "backend": experiment.backend, **more}
    options |= {"local_steps": experiment.local_steps, **experiment.hyperparameters}
    lr, decay = experiment.lr, experiment.weight_decay
    if experiment.inner is None:
        optimizer = GossipOptimizer(parameters, experiment.rule, lr=lr, weight_decay=decay, **options)
    else:
        make_inner: Any = inner_class(experiment.inner)
        has_decay = "weight_decay" in inspect.signature(make_inner).parameters
        own = {**experiment.inner_options, **({"weight_decay": decay} if has_decay or decay else {})}
        if experiment.mix_state is not None:
            options["mix_state"] = tuple(name.strip() for name in experiment.mix_state.split(","))
        optimizer = Gossip(make_inner(parameters, lr=lr, **own), experiment.rule, **options)
    return optimizer


def train(experiment: Experiment, simulator: Simulator, **options: Any) -> Run:
    """Runs the experiment's simulator to the last step; `options` go to `Simulator.run`."""
    start = time.perf_counter()
    timetable = (experiment.steps, experiment.warmup, experiment.milestones, experiment.decay)
    simulator.run(
        experiment.steps,
        schedule=make_schedule(experiment.schedule, *timetable),
        eval_every=experiment.eval_every,
        **options,
    )
    return Run(experiment, simulator.history, simulator.engine, time.perf_counter() - start)


def samples_per_class(experiment: Experiment) -> Tensor:
    """How many training samples of each class or group agents hold, int64 [N, groups]. Raises as `make_simulator`."""
    num_agents = parse_topology(experiment.topology).num_agents
    dataset = load_data(experiment)
    parts = _divide(experiment, dataset, num_agents)
    return data.partition.class_histogram(dataset.groups, parts, dataset.num_groups)


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


def _augmentation(dataset: Dataset) -> data.Augmentation:
    if dataset.augmentation is None:
        raise ValueError(f"augment: there are no usual random changes to samples of {dataset.name}; leave it out")
    return dataset.augmentation


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


CODED = ("int8", "int4")
"""Names of dtypes of messages that torch does not have."""


def _dtype(option: str, name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{option} must be a floating dtype of torch, such as bfloat16, got {name!r}")
    return dtype


def _divide(experiment: Experiment, dataset: Dataset, num_agents: int) -> list[Tensor]:
    return data.partition.partition(
        experiment.partition, dataset.groups, num_agents, experiment.seed, **experiment.partition_options
    )


def _initial_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    with own_random_state(torch.device("cpu")):
        seed_generators(derive_seed("model", experiment.seed), torch.device("cpu"))
        shape = dataset.input_shape
        return models.build(experiment.model, shape, dataset.num_classes, experiment.norm, tokens=dataset.has_tokens)
