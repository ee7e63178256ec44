"""A stack of agents is a module: `agents(x)` is the forward pass of all of them, and parameters keep their names.

python examples/forward_pass.py
"""

import torch
from torch import nn, vmap
from torch.nn.functional import cross_entropy

import gut_fast as gf

torch.manual_seed(0)
data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, 8, alpha=0.1)  # most agents hold a few classes of digits
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))

agents = gf.stack(network, 8)  # eight agents that start from this network
print("parameters:", {name: tuple(parameter.shape) for name, parameter in agents.named_parameters()})

# Two groups, as for any module: the last layer's bias has no weight decay.
groups = [
    {"params": [each for name, each in agents.named_parameters() if name != "4.bias"], "weight_decay": 1e-4},
    {"params": [each for name, each in agents.named_parameters() if name == "4.bias"], "weight_decay": 0.0},
]
optimizer = gf.GUT(groups, lr=0.4, mu=0.9, topology=gf.topology.ring(8))

for _ in range(300):
    rows = torch.stack([part[torch.randint(len(part), (16,))] for part in parts])  # agent i's samples in row i
    outputs = agents(data.train_inputs[rows])  # (8, 16, 1, 8, 8) -> (8, 16, 10)
    losses = vmap(cross_entropy)(outputs, data.train_labels[rows])  # one for each agent
    optimizer.zero_grad()
    losses.sum().backward()  # the sum: each agent's gradient is then that of its own loss
    optimizer.step()

agents.eval()
with torch.no_grad():
    answers = agents(data.test_inputs.expand(8, -1, -1, -1, -1)).argmax(-1)  # every agent sees all test samples
    accuracies = (answers == data.test_labels).float().mean(1)
    third = agents.agent(3)  # agent 3's network, a plain module on the same memory
    assert torch.equal(third(data.test_inputs).argmax(-1), answers[3])
print("accuracy of each agent:", " ".join(f"{accuracy:.1%}" for accuracy in accuracies))
averaged = agents.average()  # a network like the one above, to be saved, exported, trained on
accuracy = (averaged(data.test_inputs).argmax(1) == data.test_labels).float().mean()
print(f"accuracy of the averaged model {accuracy:.1%}")
