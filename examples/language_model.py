"""A byte language model on eight folders of text, one for each agent, with few and small messages.

python examples/language_model.py                      makes texts of its own
python examples/language_model.py --texts FOLDER       FOLDER has a folder of texts for each agent
"""

import argparse
import random
from pathlib import Path

import torch

import gut_fast as gf

parser = argparse.ArgumentParser()
parser.add_argument("--texts", type=Path)
parser.add_argument("--steps", type=int, default=320)
options = parser.parse_args()


def make_texts(folder: Path, num_agents: int) -> Path:
    """Texts for a trial: sentences that all agents have in common, about words that only one of them has."""
    draw = random.Random(0)
    for agent in range(num_agents):
        words = ["".join(draw.choices("aeiou" if agent % 2 else "bdklmnrst", k=4)) for _ in range(20)]
        lines = (f"the {draw.choice(words)} of {draw.choice(words)} is a {draw.choice(words)}.\n" for _ in range(2_000))
        file = folder / f"agent-{agent}" / "text.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))
    return folder


torch.manual_seed(0)
data = gf.data.text_folders(options.texts or make_texts(Path("outputs/texts"), 8), length=32)
topology = gf.topology.ring(len(data.group_names))
simulator = gf.Simulator(
    gf.models.Transformer(vocabulary=256, length=32, width=32, num_layers=1),
    topology,
    optimizer=lambda params: gf.Gossip(
        torch.optim.AdamW(params, lr=5e-3),  # the local steps
        rule="gut",
        mu=0.9,
        topology=topology,
        local_steps=16,  # a message every 16 steps
        wire_dtype="int4",  # of 4 bits a number, and a scale for 256 of them
        mix_state=("exp_avg_sq",),  # Adam's second moments are mixed with the parameters: agents step alike
    ),
    data=data,  # agent i has the text of folder i
    batch_size=16,
    max_grad_norm=1.0,
    engine="vmap",
)
plain = options.steps * 2 * sum(each.numel() for each in simulator.stacked.average().parameters()) * 4
for row in simulator.run(options.steps, eval_every=options.steps // 4, progress=False):
    bits = row["test_loss"] / torch.tensor(2.0).log().item()
    print(f"step {row['step']}: {bits:.2f} bits a byte")
sent = simulator.bytes_sent[0] / 1e3
print(f"{sent:.0f} kB sent by an agent; float32 messages to two neighbours in every step would be {plain / 1e3:.0f} kB")
