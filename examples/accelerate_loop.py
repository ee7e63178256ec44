"""accelerate trains eight agents on a ring: accumulation, clipping, a schedule, curves, states saved and loaded.

python examples/accelerate_loop.py                 goes on from the saved state, if there is one
tensorboard --logdir outputs/accelerate_loop
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gut_fast as gf

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
epochs, folder = parser.parse_args().epochs, Path("outputs/accelerate_loop")

data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, 8, alpha=0.1)
sampler = gf.data.AgentBatchSampler(parts, batch_size=8)
loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_sampler=sampler)
steps_per_epoch = len(loader) // 2  # two batches are accumulated

accelerator = Accelerator(gradient_accumulation_steps=2, log_with="tensorboard", project_dir=folder)
accelerator.init_trackers("digits")
agents = gf.stack(gf.models.mlp(64, [32], 10).to(accelerator.device), 8)  # there before the optimizer is made
optimizer = gf.GUT(agents.parameters(), lr=0.4, mu=0.9, topology=gf.topology.ring(8))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * steps_per_epoch)
agents, optimizer, scheduler, loader = accelerator.prepare(agents, optimizer, scheduler, loader)
test_inputs, test_labels = data.test_inputs.to(accelerator.device), data.test_labels.to(accelerator.device)
if (folder / "state").exists():
    accelerator.load_state(folder / "state")  # agents, tracking variables, schedule and random numbers

for epoch in range(optimizer.optimizer.num_steps // steps_per_epoch, epochs):
    for batch in loader:
        with accelerator.accumulate(agents):
            inputs, targets = (each.unflatten(0, (8, -1)) for each in batch)  # (8, batch, ...): agent i's in row i
            losses = vmap(cross_entropy)(agents(inputs), targets)  # one for each agent
            accelerator.backward(losses.sum())
            if accelerator.sync_gradients:
                gf.clip_grad_norm_per_agent_(agents.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    predicted = agents.average().eval()(test_inputs).argmax(1)
    accuracy = (predicted == test_labels).float().mean().item()
    accelerator.log({"loss": losses.mean().item(), "accuracy": accuracy}, step=epoch)
    accelerator.print(f"epoch {epoch}: accuracy of the averaged model {accuracy:.1%}")
    accelerator.save_state(folder / "state")
accelerator.end_training()
