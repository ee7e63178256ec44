"""The metrics of a run: consensus error, accuracy of the averaged model and of each agent, bytes sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from gut_fast.agents import StackedModule
from gut_fast.simulation.objective import Objective, applied
from gut_fast.simulation.samples import Samples
from gut_fast.simulation.sharing import Everyone

__all__ = ["Tally", "consensus_error", "evaluate", "metric_entries", "read"]

EVALUATION_BATCH = 256


@torch.no_grad()
def consensus_error(params: Iterable[Tensor]) -> float:
    """The mean squared distance of the agents from their average: ``(1/N) Σ_i ||z_i − mean||²``.

    Args:
        params: stacked parameters, each (N, *shape). Sums are in float64, one parameter after the other.

    Raises:
        ValueError: there is no parameter, or the parameters differ in their number of agents.
    """
    stacked = [parameter.detach() for parameter in params]
    sizes = {parameter.shape[0] if parameter.ndim else None for parameter in stacked}
    if len(sizes) != 1 or sizes & {None, 0}:
        shapes = [tuple(parameter.shape) for parameter in stacked]
        raise ValueError(f"consensus_error takes stacked parameters, all of shape (N, ...); got shapes {shapes}")
    return float(_distances(stacked, [parameter.mean(0, dtype=torch.float64) for parameter in stacked]).mean())


def _distances(stacked: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """The squared distance ``||z_i − mean||²`` of each agent, float64 [N]."""
    total = torch.zeros(len(stacked[0]), dtype=torch.float64, device=stacked[0].device)
    for rows, mean in zip(stacked, means, strict=True):
        total += (rows.to(torch.float64) - mean).square().view(len(rows), mean.numel()).sum(1)
    return total


def read(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The float64 scalars of one device as numbers, with one transfer and one wait for the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def metric_entries(objective: Objective) -> list[str]:
    """The entries of the history that `evaluate` computes from test samples, in their order."""
    entries = ["test_loss"]
    for name in objective.metrics:
        entries += [f"test_{name}", f"mean_agent_{name}", *(f"{place}_agent_{name}" for place in _places(name))]
    return entries


@torch.no_grad()
def evaluate(
    stacked: StackedModule,
    objective: Objective,
    samples: Samples | None,
    *,
    vectorized: bool,
    everyone: Everyone | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Test loss and metrics of the averaged model, mean and quartiles of the agents' metrics, consensus error.

    Models are in evaluation mode. Test samples are read once; a loss or metric is the mean over batches, weighted by
    their numbers of samples.

    Args:
        stacked: the agents in this process.
        objective: the loss and the metrics.
        samples: the test samples, or None, which leaves the consensus error.
        vectorized: evaluate all agents at once through `torch.func.vmap`, where the metrics allow that.
        everyone: computes over all agents; None if all are in this process.

    Returns:
        The numbers by name, float64 scalars on the device of the model (`read` makes numbers of them), and the metrics
        of each agent by name, float64 [N].
    """
    if everyone is None:
        everyone = Everyone(range(stacked.num_agents), stacked.num_agents, stacked.device)
    stacked.follow_agents()
    state = stacked.tensors()
    means = everyone.means(state)
    distances = _distances(*zip(*[(state[name], means[name]) for name, _ in stacked.named_parameters()], strict=True))
    if samples is None:
        return {"consensus_error": everyone.rows(distances).mean()}, {}
    mean_state = [mean.to(state[name].dtype) for name, mean in means.items()]
    of_mean, of_agents = _measured(stacked, objective, mean_state, samples, vectorized)
    rows = everyone.rows(torch.cat([of_agents, distances[:, None]], 1))
    numbers = {"test_loss": of_mean[0]}
    of_each_agent = dict(zip(objective.metrics, rows.unbind(1), strict=False))
    for (name, values), of_average in zip(of_each_agent.items(), of_mean[1:], strict=True):
        numbers |= {f"test_{name}": of_average, f"mean_agent_{name}": values.mean(), **_spread(name, values)}
    return {**numbers, "consensus_error": rows[:, -1].mean()}, of_each_agent


def _measured(
    stacked: StackedModule, objective: Objective, mean_state: Sequence[Tensor], samples: Samples, vectorized: bool
) -> tuple[Tensor, Tensor]:
    """Loss and metrics of the averaged model, [1 + metrics], and the metrics of the agents here, [N, metrics]."""
    of_mean = applied(stacked, partial(objective.measure, with_loss=True), training=False)
    of_agents = _agents_measure(stacked, objective, vectorized)
    sums: list[Tensor] = []
    for batch in samples.chunks(EVALUATION_BATCH):
        share = len(tree_leaves(batch)[0]) / len(samples)
        both = torch.cat([of_mean(batch, *mean_state)[0], of_agents(batch).flatten()]) * share
        sums = [sums[0] + both] if sums else [both]
    split = 1 + len(objective.metrics)
    return sums[0][:split], sums[0][split:].view(stacked.num_agents, len(objective.metrics))


def _agents_measure(stacked: StackedModule, objective: Objective, vectorized: bool) -> Callable[[Any], Tensor]:
    """A function of a batch that gives the metrics of each agent for it, [N, metrics]."""
    one = applied(stacked, partial(objective.measure, with_loss=False), training=False)
    tensors = list(stacked.tensors().values())
    rows = list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))
    if not objective.metrics:
        return lambda batch: torch.zeros(len(rows), 0, dtype=torch.float64, device=stacked.device)
    in_dims = (None, *[0] * len(tensors))
    at_once = vmap(lambda batch, *tensors: one(batch, *tensors)[0], in_dims=in_dims, randomness="different")
    can_vectorize = [vectorized]

    def measure(batch: Any) -> Tensor:
        if can_vectorize[0]:
            try:
                metrics: Tensor = at_once(batch, *tensors)
                return metrics
            except Exception:  # the loop repeats an error of the metric itself
                can_vectorize[0] = False
        return torch.stack([one(batch, *row)[0] for row in rows])

    return measure


def _places(name: str) -> tuple[str, ...]:
    """The names of the quartiles of a metric over agents; of accuracy it is known that more is better."""
    lowest, highest = ("worst", "best") if name == "accuracy" else ("smallest", "largest")
    return lowest, "lower_quartile", "median", "upper_quartile", highest


def _spread(name: str, values: Tensor) -> dict[str, Tensor]:
    """The quartiles of the agents' metrics, from the smallest to the largest."""
    quartiles = torch.quantile(values, torch.linspace(0, 1, 5, dtype=values.dtype, device=values.device))
    return {f"{place}_agent_{name}": quartile for place, quartile in zip(_places(name), quartiles, strict=True)}


class Tally:
    """The numbers that steps leave behind: losses since the last row of the history, bytes sent since the start.

    Attributes:
        lr: the learning rate of the last step, of the first group.
        loss_sum: the sum of each agent's losses since the last row, float64 [agents here].
        loss_steps: how many losses these are.
        bytes_sent: the bytes that each agent has sent.
    """

    def __init__(self, optimizer: Optimizer, num_agents: int, agents_here: int, device: torch.device) -> None:
        self.lr = float(optimizer.param_groups[0]["lr"])
        self.loss_sum = torch.zeros(agents_here, dtype=torch.float64, device=device)
        self.loss_steps = 0
        self.bytes_sent = BytesSent(optimizer, num_agents)

    def add_step(self, losses: Tensor) -> None:
        """Adds the losses and messages of the step that the optimizer has just taken."""
        self.bytes_sent.add_step()
        self.loss_sum += losses
        self.loss_steps += 1

    def start_row(self) -> None:
        """Starts the sum of losses anew."""
        self.loss_sum.zero_()
        self.loss_steps = 0

    def mean_loss(self, loss_sum: float) -> float:
        """A sum of losses as their mean over the steps; NaN before a step."""
        return loss_sum / self.loss_steps if self.loss_steps else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The entries of a checkpoint."""
        total = self.bytes_sent.total
        return {"bytes_sent": total, "last_lr": self.lr, "loss_sum": self.loss_sum, "loss_steps": self.loss_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the entries of a checkpoint."""
        self.bytes_sent.go_on_from(state["bytes_sent"])
        self.lr, self.loss_steps = state["last_lr"], state["loss_steps"]
        self.loss_sum.copy_(state["loss_sum"])


class BytesSent:
    """The bytes that each agent has sent to others, counted from the mixing matrices of the optimizer's topology.

    Agent j sends its messages to every i ≠ j with ``W[i, j] ≠ 0``: in a round, ``optimizer.message_bytes()`` to each.
    An optimizer without topology sends nothing. The count is the same on several ranks: all that the algorithm sends,
    by whichever way; ``optimizer.bytes_sent`` counts the bytes that have left this process.

    Attributes:
        total: the bytes of each agent, int64 [N].
    """

    def __init__(self, optimizer: Any, num_agents: int) -> None:
        self.total = torch.zeros(num_agents, dtype=torch.int64, device="cpu")
        self._optimizer = optimizer
        self._topology: Any = getattr(optimizer, "topology", None)
        self._static_receivers: Tensor | None = None
        self._rounds = 0
        if self._topology is not None:
            self._rounds = self._optimizer.num_rounds
            if self._topology.is_static:
                self._static_receivers = self._receivers(0)

    def go_on_from(self, total: Tensor) -> None:
        """Takes over the bytes of a checkpoint, whose optimizer has been restored."""
        self.total.copy_(total)
        if self._topology is not None:
            self._rounds = self._optimizer.num_rounds

    def add_step(self) -> None:
        """Adds the messages of the step that the optimizer has just taken; a local one has none."""
        if self._topology is not None and self._optimizer.num_rounds != self._rounds:
            self._rounds = self._optimizer.num_rounds
            receivers = self._receivers(self._rounds - 1) if self._static_receivers is None else self._static_receivers
            each = self._optimizer.message_bytes()
            if len(each) == len(self.total):  # after ranks have left, a run ends where all agents' numbers are due
                self.total += receivers * each

    def _receivers(self, step: int) -> Tensor:
        """The number of agents that each agent sends to, [N]."""
        return torch.bincount(self._topology.csr(step).neighbor, minlength=len(self.total))
