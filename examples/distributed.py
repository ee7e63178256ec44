"""Eight agents on a ring learn to read digits, each from samples of its own.

python examples/distributed.py                          all agents in this process
torchrun --nproc-per-node 4 examples/distributed.py     two agents in each of four processes, the same numbers

Stopped, or killed, the same command goes on from the newest step that all processes have saved.
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import gut_fast as gf

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--folder", default="outputs/distributed", help="for checkpoints; it may be one for each host")
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)

num_agents, rank, ranks, where = 8, 0, 1, {}
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    where = {"process_group": dist.group.WORLD, "agents_per_rank": num_agents // ranks}

data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, num_agents, alpha=0.1, seed=0)
model = gf.models.mlp(64, [32], 10)
agents = gf.stack(model, num_agents // ranks)  # the agents of this process: every parameter has shape (k, ...)
optimizer = gf.GUT(agents.parameters(), lr=0.4, mu=0.9, topology=gf.topology.ring(num_agents), **where)
checkpoints = gf.distributed.Checkpoints(f"{options.folder}/{ranks}", optimizer)
start, state = checkpoints.load() or (0, None)
if state:
    agents.load_state_dict(state["agents"])
    optimizer.load_state_dict(state["optimizer"])

began, mixing = time.perf_counter(), 0.0
for step in range(start + 1, options.steps + 1):
    optimizer.zero_grad()
    for i in range(agents.num_agents):
        number = rank * agents.num_agents + i
        generator = torch.Generator().manual_seed((step - 1) * num_agents + number)
        batch = parts[number][torch.randint(len(parts[number]), (16,), generator=generator)]
        cross_entropy(agents.agent(i)(data.train_inputs[batch]), data.train_labels[batch]).backward()
    mixing -= time.perf_counter()
    optimizer.step()  # sends to the neighbours, receives, and mixes
    mixing += time.perf_counter()
    if step % 50 == 0 or step == options.steps:
        checkpoints.save(step, {"agents": agents.state_dict(), "optimizer": optimizer.state_dict()})
        model.load_state_dict(gf.consolidate(agents, optimizer))  # the mean over the agents of all processes
        with torch.no_grad():
            output = model(data.test_inputs)
        accuracy = (output.argmax(1) == data.test_labels).double().mean()
        if rank == 0:
            print(f"step {step}: test loss {cross_entropy(output, data.test_labels):.6f}, accuracy {accuracy:.2%}")

if rank == 0:
    times = f"{time.perf_counter() - began:.2f} s, of which mixing {mixing:.2f} s"
    print(f"process 0 of {ranks}: {times}; {sum(optimizer.bytes_sent.values()) / 1e6:.2f} MB to other processes")
if ranks > 1:
    dist.destroy_process_group()
