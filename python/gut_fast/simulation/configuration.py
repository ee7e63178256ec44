"""The configuration of a simulator: its arguments checked, and what a checkpoint must have in common with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from gut_fast import randomness
from gut_fast.agents import StackedModule
from gut_fast.optim import Gossip
from gut_fast.optim.checks import frames_to_the_caller
from gut_fast.simulation.batches import Batches
from gut_fast.simulation.files import digest, mixing_digest
from gut_fast.simulation.metrics import metric_entries
from gut_fast.simulation.objective import Loss, Metric, ModelLoss, Objective, Supervised, accuracy, applied
from gut_fast.simulation.samples import FileSamples, Samples, TensorSamples
from gut_fast.simulation.schedules import options_of
from gut_fast.topology import Topology

__all__ = ["check_labels", "configuration_of", "make_objective", "make_optimizer", "settings_of"]


def make_objective(
    loss: Loss | None,
    model_loss: ModelLoss | None,
    metrics: Mapping[str, Metric] | None,
    autocast: torch.dtype | None,
    samples: Samples,
    *,
    has_classes: bool,
) -> Objective:
    """The objective that the simulator's arguments of these names ask for.

    Args:
        loss: mean loss of (outputs, targets), or None.
        model_loss: mean loss of (model, batch), or None.
        metrics: means over a batch by name, or None for the default.
        autocast: dtype of `torch.autocast`, or None.
        samples: the training samples.
        has_classes: whether integer targets are class numbers whatever the loss is.

    Raises:
        TypeError, ValueError: they contradict each other, or the loss needs pairs (inputs, targets) and the samples are
            others.
    """
    if loss is not None and model_loss is not None:
        raise ValueError("loss=(outputs, targets) and model_loss=(model, batch) are two losses; give one of them")
    for name, function in {"loss": loss, "model_loss": model_loss, **(metrics or {})}.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    if model_loss is not None:
        return _with_entries(Objective(model_loss, metrics, autocast))
    batch = _first_samples(samples)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        kind = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
        raise TypeError(
            f"a loss of (outputs, targets) takes samples (inputs, targets), but a sample is {kind}; give "
            "model_loss=, a function of (model, batch)"
        )
    objective = Supervised(functional.cross_entropy if loss is None else loss, metrics, autocast)
    if objective.is_classification:
        _check_label_dtype(batch[1])
    if metrics is None and (has_classes or objective.is_classification) and _are_classes(batch[1]):
        objective.metrics["accuracy"] = accuracy
    return _with_entries(objective)


def _with_entries(objective: Objective) -> Objective:
    """Returns the objective. Raises ValueError if two of its metrics would have the same entry in the history."""
    entries = metric_entries(objective)
    double = {entry for entry in entries if entries.count(entry) > 1}
    if double:
        raise ValueError(f"metrics={list(objective.metrics)} would give the history two entries {sorted(double)}")
    return objective


def _are_classes(targets: Any) -> bool:
    return isinstance(targets, Tensor) and not targets.is_floating_point()


def _check_label_dtype(targets: Any) -> None:
    """Raises TypeError unless the targets can be class numbers, or probabilities of classes."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"the targets are a {type(targets).__name__}; cross entropy takes a tensor; give loss=")
    if targets.dtype not in (torch.int64, torch.uint8) and not (targets.is_floating_point() and targets.ndim > 1):
        raise TypeError(
            f"the labels are {targets.dtype}; cross entropy takes class numbers 0 … C − 1 of torch.int64, such as "
            "labels.long(), or probabilities [samples, classes]; to predict numbers give "
            "loss=torch.nn.functional.mse_loss"
        )


def _first_samples(samples: Samples, count: int = 2) -> Any:
    """A batch of the first samples; images in files are not read, but zeros are given in their place."""
    if isinstance(samples, FileSamples):
        files, labels = samples.files, samples.labels[:count]
        return torch.zeros(len(labels), *files.shape[1:], device=files.device, dtype=files.dtype), labels
    return next(samples.chunks(min(count, len(samples))))


@torch.no_grad()
def check_labels(stacked: StackedModule, objective: Objective, samples: Samples | None, what: str) -> None:
    """Raises ValueError if samples have labels that the models have no output for.

    The number of classes is that of agent 0's outputs for two samples, in evaluation mode. Nothing is found out about
    labels that are not in memory, and about models that fail; these fail again in the first step.

    Args:
        stacked: the agents' models.
        objective: their loss.
        samples: training or test samples, or None.
        what: names the samples in messages.
    """
    if samples is None or not (isinstance(objective, Supervised) and objective.is_classification):
        return
    labels = samples.labels if isinstance(samples, FileSamples) else None
    if isinstance(samples, TensorSamples):
        labels = samples.tensors[1]
    if labels is None or not _are_classes(labels):
        return
    counted = labels[labels != objective.ignored_label]
    if not counted.numel():
        raise ValueError(f"{what} has no labels but {objective.ignored_label}, which the loss leaves out")
    outputs = _outputs(stacked, objective, _first_samples(samples))
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[2:] != labels.shape[1:]:
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(counted))
    if lowest < 0 or highest >= outputs.shape[1]:
        raise ValueError(
            f"the labels of {what} are {lowest} … {highest}, but the model's outputs {tuple(outputs.shape)} are for "
            f"classes 0 … {outputs.shape[1] - 1}"
        )


def _outputs(stacked: StackedModule, objective: Supervised, batch: Any) -> Any:
    """The outputs of agent 0 for a batch, or None if they cannot be had."""
    with randomness.own_random_state(stacked.device):
        try:
            call = applied(stacked, objective.outputs, training=False)
            return call(batch, *(tensor[0].clone() for tensor in stacked.tensors().values()))[0]
        except Exception:
            return None


def make_optimizer(make: Any, stacked: StackedModule, topology: Topology) -> Optimizer:
    """Returns the optimizer that `make` makes of the stacked parameters.

    Raises:
        TypeError, ValueError: it is not one that trains these models over this topology.

    Warns:
        UserWarning: it mixes nothing.
    """
    if not callable(make):
        raise TypeError(
            "optimizer must be a function that makes one of the stacked parameters, such as "
            f"lambda parameters: gut_fast.GUT(parameters, lr=0.1, topology=topology), got {type(make).__name__}"
        )
    optimizer = make(stacked.parameters())
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in stacked.parameters()}
    if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer has other parameters than the stacked ones that it was given")
    mixes_with = getattr(optimizer, "topology", None)
    if mixes_with not in (None, topology):
        raise ValueError(f"the optimizer mixes over {mixes_with}, but the simulator's topology is {topology}")
    if mixes_with is None and topology.num_agents > 1:
        warnings.warn(
            f"{type(optimizer).__name__} mixes nothing over {topology}, each agent trains alone; use an optimizer of "
            "gut_fast, or put yours into gut_fast.Gossip",
            UserWarning,
            stacklevel=frames_to_the_caller(),
        )
    return optimizer


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """The settings of an optimizer, and of the one in it, that change a run's numbers, by name and as they are now.

    Names that other versions did not write are in `gut_fast.simulation.files.LATER`.
    """
    rule, state_dtype, wire_dtype = (getattr(optimizer, name, None) for name in ("rule", "state_dtype", "wire_dtype"))
    dtypes = [parameter.dtype for group in optimizer.param_groups for parameter in group["params"]]
    inner = optimizer.inner if isinstance(optimizer, Gossip) else None
    return {
        "optimizer": type(optimizer).__name__,
        "rule": None if rule is None else rule.name,
        "dtype of messages": None if wire_dtype is None else str(wire_dtype),
        "dtype of the state": None if state_dtype in (None, *dtypes[:1]) else str(state_dtype),
        **{name: getattr(optimizer, name, None) for name in ("local_steps", "wire_seed", "mix_state")},
        **_of_groups(optimizer, "group"),
        "inner optimizer": None if inner is None else type(inner).__name__,
        **({} if inner is None else _of_groups(inner, "inner group", without="lr")),
    }


def _of_groups(optimizer: Optimizer, what: str, without: str = "") -> dict[str, Any]:
    """The options of each group, copied, for schedules may change them in place."""
    return {
        f"{name} of {what} {index}": copy.deepcopy(value)
        for index, group in enumerate(options_of(optimizer))
        for name, value in group.items()
        if name != without
    }


def configuration_of(
    topology: Topology,
    settings: Mapping[str, Any],
    stacked: StackedModule,
    batches: Batches,
    **more: Any,
) -> dict[str, Any]:
    """The plain values that a checkpoint must have in common with a simulator.

    Args:
        topology: the simulator's topology.
        settings: `settings_of` its optimizer at step 0.
        stacked: its models.
        batches: its batches.
        **more: other values, by names in which an underscore stands for a blank; None stands for what an older
            checkpoint has no entry of.
    """
    return {
        "number of agents": topology.num_agents,
        "topology": topology.name,
        "digest of the mixing weights": mixing_digest(topology),
        **settings,
        "digest of the training samples": digest(batches.samples.fingerprint()),
        "division of the samples": digest(batches.parts),
        "batch size": batches.batch_size,
        "seed": batches.seed,
        "augmentation": None if batches.augment is None else repr(batches.augment),
        **{name.replace("_", " "): value for name, value in more.items()},
        **{f"shape of {name}": (*tensor.shape, str(tensor.dtype)) for name, tensor in stacked.state_dict().items()},
    }
