"""The Trainer of Hugging Face trains eight vision transformers on a ring, each on samples of its own.

python examples/hf_trainer.py                      goes on from the last checkpoint, if there is one
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import gut_fast as gf


class Agents(nn.Module):
    """The models of all agents as the Trainer wants them; their average is evaluated."""

    def __init__(self, module: nn.Module, num_agents: int) -> None:
        super().__init__()
        self.agents = gf.stack(module, num_agents)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            pixel_values, labels = (each.unflatten(0, (self.agents.num_agents, -1)) for each in (pixel_values, labels))
        outputs = (self.agents if self.training else self.agents.average())(pixel_values, labels=labels)
        return {"loss": outputs.loss.sum(), "logits": outputs.logits}  # the sum over agents


class AgentsTrainer(Trainer):
    """A Trainer that gives each agent samples of its own."""

    def get_train_dataloader(self) -> Any:
        sampler = gf.data.AgentBatchSampler(parts, self.args.per_device_train_batch_size)
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler))


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps, folder = parser.parse_args().steps, Path("outputs/hf_trainer")
data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, 8, alpha=0.1)
size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, attn_implementation="eager", **size)
often: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 100, "save_steps": 100, "logging_steps": 100}
options = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=16, max_grad_norm=0, **often)
agents = Agents(ViTForImageClassification(config).to(options.device), 8)  # before the optimizer is made
local = torch.optim.AdamW(agents.parameters(), lr=0.01)
trainer = AgentsTrainer(
    agents,
    options,
    train_dataset=StackDataset(pixel_values=data.train_inputs, labels=data.train_labels),
    eval_dataset=StackDataset(pixel_values=data.test_inputs, labels=data.test_labels),
    compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(1) == seen.label_ids).mean())},
    optimizers=(gf.Gossip(local, rule="gut", mu=0.5, topology=gf.topology.ring(8)), None),
)
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
