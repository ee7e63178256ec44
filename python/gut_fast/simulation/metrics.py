"""The metrics of a run: consensus error, accuracy of the averaged model and of each agent, bytes sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import Optimizer

from gut_fast.agents import StackedModule
from gut_fast.data import Dataset
from gut_fast.simulation.engines import Loss
from gut_fast.simulation.sharing import Everyone

__all__ = ["BytesSent", "consensus_error", "evaluate", "read"]

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


@torch.no_grad()
def evaluate(
    stacked: StackedModule,
    data: Dataset,
    loss: Loss,
    autocast: torch.dtype | None = None,
    *,
    vectorized: bool,
    everyone: Everyone | None = None,
) -> dict[str, Tensor]:
    """Test loss and accuracy of the averaged model, mean and quartiles of the agents' accuracies, consensus error.

    Models are in evaluation mode. Accuracies are fractions: the largest output is the predicted class. All metrics are
    float64 scalars on the device of the model; `read` makes numbers of them. Test samples are read once.

    Args:
        stacked: the agents in this process.
        data: data set with its test samples on the device of the model.
        loss: mean loss of a batch.
        autocast: dtype of `torch.autocast` around the forward passes, or None.
        vectorized: evaluate all agents at once through `torch.func.vmap`.
        everyone: computes over all agents; None if all are in this process.
    """
    if everyone is None:
        everyone = Everyone(range(stacked.num_agents), stacked.num_agents, stacked.device)
    module = stacked.skeleton().eval()

    def predict(state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        outputs, _ = stacked.call(module, state, inputs, autocast)
        return outputs  # type: ignore[no-any-return]

    state, agent_hits = stacked.tensors(), _agent_hits(stacked, predict, vectorized)
    means = everyone.means(state)
    mean_state = {name: mean.to(state[name].dtype) for name, mean in means.items()}
    sums = []
    for inputs, labels in zip(
        data.test_inputs.split(EVALUATION_BATCH), data.test_labels.split(EVALUATION_BATCH), strict=True
    ):
        outputs = predict(mean_state, inputs)
        loss_sum = loss(outputs, labels).to(torch.float64) * len(labels)
        sums.append((loss_sum, _hits(outputs, labels), agent_hits(inputs, labels)))
    test_loss, test_accuracy, agent_accuracy = (
        torch.stack(column).sum(0) / len(data.test_labels) for column in zip(*sums, strict=True)
    )
    names = [name for name, _ in stacked.named_parameters()]
    distances = _distances([state[name] for name in names], [means[name] for name in names])
    agent_accuracy, distances = everyone.rows(torch.stack([agent_accuracy, distances], 1)).unbind(1)
    return {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "mean_agent_accuracy": agent_accuracy.mean(),
        **_spread(agent_accuracy),
        "consensus_error": distances.mean(),
    }


def _spread(accuracy: Tensor) -> dict[str, Tensor]:
    """The quartiles of the agents' accuracies, from the worst agent to the best."""
    names = ("worst", "lower_quartile", "median", "upper_quartile", "best")
    quartiles = torch.quantile(accuracy, torch.linspace(0, 1, 5, dtype=accuracy.dtype, device=accuracy.device))
    return {f"{name}_agent_accuracy": quartile for name, quartile in zip(names, quartiles, strict=True)}


def _agent_hits(
    stacked: StackedModule, predict: Callable[[Mapping[str, Tensor], Tensor], Tensor], vectorized: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of inputs and labels that counts the hits [N] of each agent."""
    states = stacked.tensors()

    def hits(state: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return _hits(predict(state, inputs), labels)

    if vectorized:
        return partial(vmap(hits, in_dims=(0, None, None), randomness="different"), states)
    rows = [{name: tensor[i] for name, tensor in states.items()} for i in range(stacked.num_agents)]
    return lambda inputs, labels: torch.stack([hits(row, inputs, labels) for row in rows])


def _hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose class is predicted, a float64 scalar."""
    return (outputs.argmax(1) == labels).sum(dtype=torch.float64)


class BytesSent:
    """The bytes that each agent has sent to others, counted from the mixing matrices of the optimizer's topology.

    Agent j sends its messages to every i ≠ j with ``W[i, j] ≠ 0``: in a step, (messages of the rule) × (bytes of one
    agent's parameters, in the dtype of messages) to each. An optimizer without topology sends nothing. The count is the
    same on several ranks: all that the algorithm sends, by whichever way; ``optimizer.bytes_sent`` counts the bytes
    that have left this process.

    Attributes:
        total: the bytes of each agent, int64 [N].
    """

    def __init__(self, optimizer: Optimizer, num_agents: int, agents_here: int) -> None:
        self.total = torch.zeros(num_agents, dtype=torch.int64, device="cpu")
        self._topology: Any = getattr(optimizer, "topology", None)
        self._static_receivers: Tensor | None = None
        if self._topology is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            wire = getattr(optimizer, "wire_dtype", None)
            sizes = [parameter.numel() * (wire or parameter.dtype).itemsize for parameter in parameters]
            model_bytes = sum(sizes) // agents_here
            self._bytes_per_receiver = model_bytes * optimizer.rule.num_messages  # type: ignore[attr-defined]
            if self._topology.is_static:
                self._static_receivers = self._receivers(0)

    def add_step(self, step: int) -> None:
        """Adds the messages of a step."""
        if self._topology is not None:
            receivers = self._receivers(step) if self._static_receivers is None else self._static_receivers
            self.total += receivers * self._bytes_per_receiver

    def _receivers(self, step: int) -> Tensor:
        """The number of agents that each agent sends to, [N]."""
        return torch.bincount(self._topology.csr(step).neighbor, minlength=len(self.total))
