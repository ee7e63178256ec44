"""The settings of experiments by name: those in the GUT paper, and a language model.

The paper is Aketi, Hashemi, Roy, "Global Update Tracking", NeurIPS 2023 (arXiv 2305.04792): 32 samples a batch and
agent, learning rate × 0.1 after half and three quarters of the epochs, Dirichlet samples as
`gut_fast.data.partition.dirichlet_blocks` divides them, β = 0.9 for the methods with momentum. Two differences are
meant: the torus and Dyck's graph here are the graphs of these names, and GUT's μ on them is one that is stable there
(0.9, the published one, is on rings only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gut_fast.arguments import all_known
from gut_fast.rules import get_rule
from gut_fast.topology.names import parse_topology

__all__ = ["PRESETS", "PaperPreset", "Preset", "TextPreset", "preset", "preset_methods", "preset_settings"]

TRAINING_SAMPLES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "fashion-mnist": 60_000,
    "imagenette": 9_469,
}

BATCH_SIZE = 32
MOMENTUM = 0.9
EVALUATIONS = 20


class Preset(Protocol):
    """An experiment's settings, and the methods that it compares."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all methods share: entries of `Experiment` and options of its partition."""

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods by label, each with its own settings."""


@dataclass(frozen=True)
class PaperPreset:
    """One row of the paper's experiments.

    Args:
        data: what is learned, a name for `gut_fast.data.load`.
        model, norm: the network and its normalisation, names for `gut_fast.models.build`.
        topology: a spec for `parse_topology`.
        alpha: how alike the agents' samples are; small is different classes everywhere.
        gut_mu, qg_gutm_mu: μ of the two methods.
        lr: initial learning rate; × 0.1 after half and three quarters of the steps.
        epochs: passes of each agent through its samples.
        augment: whether training images are cropped and mirrored at random.
    """

    data: str
    model: str
    norm: str
    topology: str
    alpha: float
    gut_mu: float
    qg_gutm_mu: float
    lr: float = 0.1
    epochs: int = 200
    augment: bool = True

    @property
    def steps(self) -> int:
        """Steps in all: epochs × samples of an agent / batch, rounded down to a multiple of the evaluations."""
        num_agents = parse_topology(self.topology).num_agents
        steps = self.epochs * TRAINING_SAMPLES[self.data] // (num_agents * BATCH_SIZE)
        return steps - steps % EVALUATIONS

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all methods share: entries of `Experiment` and options of its partition."""
        return {
            "data": self.data,
            "model": self.model,
            "norm": self.norm,
            "topology": self.topology,
            "partition": "dirichlet-blocks",
            "alpha": self.alpha,
            "batch_size": BATCH_SIZE,
            "lr": self.lr,
            "steps": self.steps,
            "milestones": (0.5, 0.75),
            "decay": 0.1,
            "eval_every": self.steps // EVALUATIONS,
            "augment": self.augment,
        }

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods by label, each with its own settings."""
        return {
            "DSGD": {"rule": "dsgd"},
            "GUT": {"rule": "gut", "mu": self.gut_mu},
            "QG-DSGDm": {"rule": "qg_dsgdm", "momentum": MOMENTUM},
            "QG-GUTm": {"rule": "qg_gutm", "momentum": MOMENTUM, "mu": self.qg_gutm_mu},
        }


@dataclass(frozen=True)
class TextPreset:
    """A byte language model of Debian's manual pages: each agent has one language, and AdamW makes its local moves.

    The loss is the cross entropy of all bytes, and the test loss in nats a byte that of all languages. The settings are
    those of a first study, not tuned.

    Args:
        topology: a spec for `parse_topology`, of eight agents or a multiple.
        lr: learning rate of AdamW.
        steps: number of steps; the learning rate falls along a cosine.
    """

    topology: str
    lr: float = 0.01
    steps: int = 800

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all methods share: entries of `Experiment` and options of its partition."""
        return {
            "data": "manpages",
            "model": "transformer:64:2",
            "topology": self.topology,
            "partition": "shards",
            "classes_per_agent": 1,
            "batch_size": 16,
            "inner": "AdamW",
            "lr": self.lr,
            "max_grad_norm": 1.0,
            "steps": self.steps,
            "schedule": "cosine",
            "warmup": 0.05,
            "eval_every": self.steps // 8,
        }

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The methods by label, each with its own settings."""
        return {"DSGD": {"rule": "dsgd"}, "GUT": {"rule": "gut", "mu": 0.9}}


PRESETS: dict[str, Preset] = {
    "cifar10-resnet20-ring16": PaperPreset("cifar10", "resnet20", "evonorm", "ring:16", 0.1, 0.9, 0.06),
    "cifar10-vgg11-ring32": PaperPreset("cifar10", "vgg11", "evonorm", "ring:32", 0.01, 0.9, 0.08),
    "cifar10-resnet20-torus32": PaperPreset("cifar10", "resnet20", "evonorm", "torus:4x8", 0.1, 0.3, 0.05),
    "cifar10-resnet20-dyck32": PaperPreset("cifar10", "resnet20", "evonorm", "dyck", 0.1, 0.45, 0.05),
    "cifar100-resnet20-ring16": PaperPreset("cifar100", "resnet20", "evonorm", "ring:16", 0.1, 0.9, 0.005),
    "fashion-mnist-lenet5-ring16": PaperPreset(
        "fashion-mnist", "lenet5", "none", "ring:16", 0.1, 0.9, 0.01, epochs=100, augment=False
    ),
    "imagenette-mobilenetv2-ring16": PaperPreset(
        "imagenette", "mobilenet-v2", "evonorm", "ring:16", 0.1, 0.9, 0.03, lr=0.01, epochs=100
    ),
    "manpages-lm-ring8": TextPreset("ring:8"),
}
"""All presets by name: the rows of the paper, and the language model."""


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError for an unknown one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {all_known(name, PRESETS)}")
    return PRESETS[name]


def preset_settings(name: str, rule: str | None = None) -> dict[str, Any]:
    """The settings that the preset's methods share, and those of its method with this rule if there is one.

    Raises:
        ValueError: an unknown preset.
    """
    chosen, rule = preset(name), None if rule is None else get_rule(rule).name
    return {**chosen.settings, **next((own for own in chosen.methods.values() if own["rule"] == rule), {})}


def preset_methods(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The methods of the preset by label. Raises ValueError for an unknown preset."""
    return preset(name).methods
