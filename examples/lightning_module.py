"""Lightning trains eight agents on a ring, with its own loop, schedule, accumulation, curves and checkpoints.

python examples/lightning_module.py                goes on from the last checkpoint, if there is one
tensorboard --logdir outputs/lightning_module
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gut_fast as gf


class Agents(lightning.LightningModule):
    """The models of all agents."""

    def __init__(self, module: nn.Module, num_agents: int) -> None:
        super().__init__()
        self.agents = gf.stack(module, num_agents)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, targets = (each.unflatten(0, (self.agents.num_agents, -1)) for each in batch)  # agent i's in row i
        losses = vmap(cross_entropy)(self.agents(inputs), targets)  # one for each agent
        self.log("loss", losses.mean())
        return losses.sum()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        predicted = self.agents.average().eval()(batch[0]).argmax(1)
        self.log("accuracy", (predicted == batch[1]).float().mean(), prog_bar=True)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        gf.clip_grad_norm_per_agent_(self.agents.parameters(), gradient_clip_val)  # not all agents by one norm

    def configure_optimizers(self) -> Any:
        topology = gf.topology.ring(self.agents.num_agents)
        optimizer = gf.GUT(self.agents.parameters(), lr=0.4, mu=0.9, topology=topology)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
epochs, folder = parser.parse_args().epochs, Path("outputs/lightning_module")
data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, 8, alpha=0.1)
sampler = gf.data.AgentBatchSampler(parts, batch_size=8)
train = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_sampler=sampler)
test = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=len(data.test_labels))
keep, last = ModelCheckpoint(folder, save_last=True), folder / "last.ckpt"
options: dict[str, Any] = {"gradient_clip_val": 5.0, "accumulate_grad_batches": 2, "log_every_n_steps": 10}
trainer = lightning.Trainer(max_epochs=epochs, devices=1, callbacks=keep, default_root_dir=folder, **options)
trainer.fit(Agents(gf.models.mlp(64, [32], 10), 8), train, test, ckpt_path=last if last.exists() else None)
