"""A network and data of one's own, trained by GUT: eight agents on a ring learn to tell three spirals apart.

python examples/plain_loop.py
tensorboard --logdir outputs/plain_loop
"""

import torch
from torch import Tensor, nn, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import gut_fast as gf


class Network(nn.Module):
    """Any module will do; this one takes points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, points: Tensor) -> Tensor:
        return self.layers(points)


def spirals(size: int) -> tuple[Tensor, Tensor]:
    """Points on three arms of a spiral, and the arm of each."""
    arms, radii = torch.randint(3, (size,)), torch.rand(size)
    angles = 2 * torch.pi / 3 * arms + 5 * radii + 0.2 * torch.randn(size)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1), arms


torch.manual_seed(0)
points, arms = spirals(4_000)
test_points, test_arms = spirals(1_000)
parts = gf.data.partition.dirichlet(arms, 8, alpha=0.1)  # most agents see one arm or two
sampler = gf.data.AgentBatchSampler(parts, batch_size=16)
loader = DataLoader(TensorDataset(points, arms), batch_sampler=sampler)

agents = gf.stack(Network(), 8)  # every parameter now has shape (8, ...)
optimizer = gf.GUT(agents.parameters(), lr=0.8, mu=0.9, topology=gf.topology.ring(8))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

with SummaryWriter("outputs/plain_loop") as writer:
    for epoch in range(20):
        for batch in loader:
            inputs, targets = (each.unflatten(0, (8, -1)) for each in batch)  # (8, 16, ...): agent i's in row i
            losses = vmap(cross_entropy)(agents(inputs), targets)  # one for each agent
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()  # the local step and the gossip of all agents
        scheduler.step()
        predicted = agents.average()(test_points).argmax(1)
        accuracy = (predicted == test_arms).float().mean()
        writer.add_scalar("loss", losses.mean(), epoch)
        writer.add_scalar("accuracy", accuracy, epoch)
        print(f"epoch {epoch}: loss {losses.mean():.3f}, accuracy of the averaged model {accuracy:.1%}")
