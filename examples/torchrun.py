"""Each process is one agent with a plain module: warm-up and cosine, accumulation, clipping, and a stop in between.

torchrun --nproc-per-node 4 examples/torchrun.py   goes on from the newest epoch that all processes have saved
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

import gut_fast as gf

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
epochs, steps_per_epoch, batch_size = parser.parse_args().epochs, 30, 32
dist.init_process_group("gloo")
rank, num_agents = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)

data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, num_agents, alpha=0.1)
train = Subset(TensorDataset(data.train_inputs, data.train_labels), parts[rank].tolist())
sampler = RandomSampler(train, replacement=True, num_samples=steps_per_epoch * batch_size)  # as many steps on all ranks
loader = DataLoader(train, batch_size, sampler=sampler)

model, averaged = gf.models.mlp(64, [32], 10), gf.models.mlp(64, [32], 10)
ring = gf.topology.ring(num_agents)
optimizer = gf.GUT(model.parameters(), lr=0.4, mu=0.9, topology=ring, process_group=dist.group.WORLD)
warmup = LinearLR(optimizer, 0.1, total_iters=20)
cosine = CosineAnnealingLR(optimizer, 10 * steps_per_epoch - 20)
scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[20])
checkpoints = gf.distributed.Checkpoints("outputs/torchrun", optimizer)
saved = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
start, state = checkpoints.load() or (0, {})
for name in state:
    saved[name].load_state_dict(state[name])

for epoch in range(start, epochs):
    torch.manual_seed(epoch * num_agents + rank)  # each agent draws samples of its own
    for inputs, targets in loader:
        optimizer.zero_grad()
        with optimizer.no_sync():  # the gradients of two halves add up; with overlap=True no message leaves here
            (cross_entropy(model(inputs[::2]), targets[::2]) / 2).backward()
        (cross_entropy(model(inputs[1::2]), targets[1::2]) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
    checkpoints.save(epoch + 1, {name: each.state_dict() for name, each in saved.items()})
    averaged.load_state_dict(gf.consolidate(model, optimizer))  # the mean over the agents of all processes
    accuracy = (averaged(data.test_inputs).argmax(1) == data.test_labels).float().mean()
    if rank == 0:
        print(f"epoch {epoch}: accuracy of the averaged model {accuracy:.1%}")
dist.destroy_process_group()
