"""What a checkpoint of the simulator must have in common with the simulator that loads it: the optimizer's settings."""

import inspect

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import gut_fast as gf
from gut_fast import topology
from gut_fast.simulation.files import LATER, read_checkpoint, write_checkpoint

RING = topology.ring(4)
INPUTS, TARGETS = torch.linspace(-1.0, 1.0, 32 * 3).view(32, 3), torch.arange(32) % 2


def simulator(mixes=RING, inner=torch.optim.AdamW, inner_options=(), **options):
    """A simulator of small models with `Gossip` around an optimizer, with these options of both."""
    torch.manual_seed(0)
    of_inner = {"lr": 0.05, **dict(inner_options)}
    options = {"rule": "gut", "wire_dtype": "int8", "wire_seed": 1, **options}
    return gf.Simulator(
        nn.Linear(3, 2),
        mixes,
        optimizer=lambda params: gf.Gossip(inner(params, **of_inner), topology=mixes, **options),
        data=(INPUTS, TARGETS),
        parts=list(torch.arange(32).view(4, 8)),
        batch_size=4,
        engine="loop",
    )


OTHER = {
    "optimizer": ({"inner": torch.optim.NAdam}, "inner optimizer is 'AdamW' there, 'NAdam' here"),
    "rule": ({"rule": "dsgd"}, "rule is 'gut' there, 'dsgd' here"),
    "topology": ({"mixes": topology.complete(4)}, r"topology is 'ring\(4\)' there, 'complete\(4\)' here"),
    "hyperparameters": ({"mu": 0.25}, "mu of group 0 is 0.9 there, 0.25 here"),
    "drift_memory": ({"drift_memory": 0.0}, "drift_memory of group 0 is 0.95 there, 0.0 here"),
    "local_steps": ({"local_steps": 4}, "local_steps is 1 there, 4 here"),
    "state_dtype": (
        {"state_dtype": torch.bfloat16, "mu": 0.5},
        "dtype of the state is None there, 'torch.bfloat16' here",
    ),
    "wire_dtype": ({"wire_dtype": "int4", "mu": 0.5}, "dtype of messages is 'int8' there, 'int4' here"),
    "wire_seed": ({"wire_seed": 2}, "wire_seed is 1 there, 2 here"),
    "mix_state": ({"mix_state": ["exp_avg_sq"]}, r"mix_state is \(\) there, \('exp_avg_sq',\) here"),
    "lr": ({"inner_options": {"lr": 0.01}}, "lr of group 0 is 0.05 there, 0.01 here"),
    "weight_decay": (
        {"inner_options": {"weight_decay": 0.5}},
        r" is of another configuration: weight_decay of inner group 0 is 0.01 there, 0.5 here$",
    ),
    "maximize": ({"inner_options": {"maximize": True}}, "maximize of inner group 0 is False there, True here"),
}
"""For each option of an optimizer that changes the numbers of a run: another value, and what the error says."""

SAME_NUMBERS = {
    *("params", "backend", "foreach", "fused", "differentiable", "capturable", "process_group", "agents_per_rank"),
    *("overlap", "bucket_bytes", "timeout", "on_peer_failure", "shared_memory", "sync_initial"),
}
"""The options of an optimizer that a run may be continued without, or with other values of."""


def test_every_option_of_the_optimizers_is_compared_or_changes_no_numbers():
    options = [*inspect.signature(gf.GossipOptimizer).parameters, *inspect.signature(gf.Gossip).parameters]
    assert set(options) == OTHER.keys() | SAME_NUMBERS


@pytest.mark.parametrize("option", [*OTHER, "betas"])
def test_other_settings_of_the_optimizer_are_refused_and_change_nothing(tmp_path, option):
    betas = {"inner_options": {"betas": (0.5, 0.9)}}, r"betas of inner group 0 is \(0.9, 0.999\) there, \(0.5, 0.9\)"
    options, message = {**OTHER, "betas": betas}[option]
    simulator().run(2, checkpoint=tmp_path / "c", progress=False)
    other = simulator(**options)
    with pytest.raises(ValueError, match=message):
        other.load_checkpoint(tmp_path / "c")
    assert (other.step, other.optimizer.num_steps) == (0, 0)


def test_settings_are_compared_as_they_were_at_the_start(tmp_path):
    """Schedules change them, and some in place."""

    def tensor_rate():
        return simulator(inner_options={"lr": torch.tensor(0.05), "momentum": 0.5}, inner=torch.optim.SGD)

    first = tensor_rate()
    first.run(4, schedule=lambda optimizer: StepLR(optimizer, 2), progress=False)
    first.optimizer.local_steps = 2
    first.optimizer.inner.param_groups[0]["momentum"] = 0.9
    first.save_checkpoint(tmp_path / "c")
    resumed = tensor_rate()
    resumed.load_checkpoint(tmp_path / "c")
    assert float(resumed.optimizer.param_groups[0]["lr"]) == pytest.approx(0.0005)
    assert resumed.optimizer.inner.param_groups[0]["momentum"] == 0.9


def test_what_an_older_checkpoint_has_no_word_of_is_not_compared(tmp_path):
    simulator(local_steps=2).run(2, checkpoint=tmp_path / "new", progress=False)
    content = read_checkpoint(tmp_path / "new")
    content["configuration"] = {
        name: value for name, value in content["configuration"].items() if not LATER.fullmatch(name)
    }
    assert "mu of group 0" in content["configuration"]
    write_checkpoint(content, tmp_path / "old")
    resumed = simulator(local_steps=2)
    resumed.load_checkpoint(tmp_path / "old")
    assert resumed.step == 2
