"""The simulator with samples, model, loss and metric of one's own: eight stations learn a curve, each sees one stretch.

python examples/own_data.py
"""

import torch
from torch import Tensor, nn

import gut_fast as gf

Batch = dict[str, Tensor]


class Curve(nn.Module):
    """A network that gives the mean of what is measured at a place, and the logarithm of its spread."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, place: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_spread = self.layers(place).chunk(2, -1)
        return mean, log_spread


def likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """The negative log-likelihood of a normal distribution, for one agent's model and batch."""
    mean, log_spread = model(batch["place"])
    return (((batch["measured"] - mean) / log_spread.exp()).square() / 2 + log_spread).mean()


def error(model: nn.Module, batch: Batch) -> Tensor:
    """The mean distance from what was measured."""
    return nn.functional.l1_loss(model(batch["place"])[0], batch["measured"])


def measurements(start: float, end: float, number: int) -> Batch:
    """Samples of a stretch, a dict of tensors; a tuple or a torch data set would do as well."""
    place = start + (end - start) * torch.rand(number, 1)
    return {"place": place, "measured": torch.sin(5 * place) + 0.1 * torch.randn(number, 1)}


torch.manual_seed(0)
ring = gf.topology.ring(8)
simulator = gf.Simulator(
    Curve(),
    ring,
    optimizer=lambda params: gf.GUTm(params, lr=0.05, momentum=0.9, mu="auto", topology=ring),
    data=[measurements(-1 + i / 4, -0.75 + i / 4, 500) for i in range(8)],  # one for each agent
    test_data=measurements(-1, 1, 1_000),
    batch_size=32,
    model_loss=likelihood,
    metrics={"error": error},
    max_grad_norm=1.0,
    engine="vmap",
)
for row in simulator.run(600, milestones=[0.7], eval_every=200):
    print(f"step {row['step']}: error {row['test_error']:.3f}, of the agents {row['mean_agent_error']:.3f}")
