"""The simulator: what a run does, the order of its data, its bytes, checkpoints and display."""

import copy
import csv
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from gut_fast import optim, topology
from gut_fast.data import Dataset, RandomCropFlip, partition
from gut_fast.optim.gossip import Gossip
from gut_fast.simulation import Simulator, consensus_error, files, stack, write_csv, write_json_lines
from gut_fast.simulation.batches import STEPS_PER_BLOCK, Batches
from gut_fast.simulation.callbacks import progress as progress_display
from gut_fast.simulation.metrics import evaluate, read
from gut_fast.simulation.samples import TensorSamples
from products import covering

trains_alone = pytest.mark.filterwarnings("ignore:.*mixes nothing over .* each agent trains alone:UserWarning")

NUM_AGENTS = 4
RING = topology.ring(NUM_AGENTS)
FOREVER = 10**7


def blobs(num_samples=60, seed=0):
    """Three noisy classes in four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * num_samples) % 3
    inputs = torch.randn(2 * num_samples, 4, generator=generator) + 4.0 * torch.eye(3, 4)[labels]
    return Dataset("blobs", 3, inputs[:num_samples], labels[:num_samples], inputs[num_samples:], labels[num_samples:])


DATA = blobs()


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def model_with_state():
    """A model with batch statistics and dropout, which must both survive a checkpoint."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def pictures():
    """The classes of `blobs` in small images."""
    data = blobs()
    as_images = (inputs.view(-1, 1, 2, 2).repeat(1, 2, 2, 2) for inputs in (data.train_inputs, data.test_inputs))
    train_inputs, test_inputs = as_images
    return replace(data, name="pictures", train_inputs=train_inputs, test_inputs=test_inputs)


def convolutional_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))


def gut(mixes=RING, **options):
    return lambda params: optim.GUT(params, **{"lr": 0.1, "mu": 0.5, **options}, topology=mixes)


def simulator(model=model_with_state, mixes=RING, optimizer=None, **options):
    arguments = {
        "optimizer": optimizer or gut(mixes),
        "data": DATA,
        "parts": partition.dirichlet(DATA.train_labels, mixes.num_agents, 0.5),
        "batch_size": 5,
        "engine": "vmap",
        "seed": 7,
    }
    module = model if isinstance(model, nn.Module) else model()
    return Simulator(module, mixes, **{**arguments, **options})


def run(sim, steps, **options):
    return sim.run(steps, **{"progress": False, **options})


def contents(sim, folder):
    """The content of a checkpoint of `sim`, without measured times."""
    path = Path(folder) / f"{id(sim)}.checkpoint"
    sim.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["engine"] = content["engine"] and content["engine"]["chosen"]
    return content


def assert_same(a, b, where="checkpoint"):
    """Asserts that nested values are equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b or (a != a and b != b), where


# What a run does


def test_agents_learn_and_agree():
    sim = simulator(plain_model)
    history = run(sim, 200, eval_every=50)
    assert history is sim.history
    assert [row["step"] for row in history] == [50, 100, 150, 200]
    assert history[-1]["test_accuracy"] > 0.85
    assert history[-1]["worst_agent_accuracy"] > 0.8
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["consensus_error"] < history[0]["consensus_error"]


def test_the_row_of_an_evaluation_is_what_its_names_say():
    seen = []

    def recording(outputs, targets):
        loss = cross_entropy(outputs, targets)
        if loss.requires_grad:
            seen.append(loss.item())
        return loss

    sim = simulator(engine="loop", loss=recording)
    run(sim, 8, eval_every=6)
    row = sim.history[-1]
    assert row["step"] == 8
    assert row["train_loss"] == pytest.approx(sum(seen[6 * 4 :]) / 8)
    assert sim.history[0]["train_loss"] == pytest.approx(sum(seen[: 6 * 4]) / 24)

    def accuracy(module):
        outputs = module.eval()(DATA.test_inputs)
        return (outputs.argmax(1) == DATA.test_labels).double().mean().item(), outputs

    expected, outputs = accuracy(sim.stacked.average())
    agents = [accuracy(sim.stacked.agent(i))[0] for i in range(NUM_AGENTS)]
    assert row["test_accuracy"] == pytest.approx(expected)
    assert row["test_loss"] == pytest.approx(cross_entropy(outputs, DATA.test_labels).item(), rel=1e-5)
    assert row["mean_agent_accuracy"] == pytest.approx(sum(agents) / NUM_AGENTS)
    assert row["worst_agent_accuracy"] == min(agents)
    assert row["consensus_error"] == consensus_error(sim.stacked.parameters())
    assert row["lr"] == 0.1
    assert row["diverged_agents"] == 0


def test_evaluation_changes_nothing_and_is_the_same_one_by_one_and_all_at_once():
    sim = simulator()
    run(sim, 5)
    before, random_state = (
        copy.deepcopy(sim.stacked.state_dict()),
        torch.get_rng_state(),
    )
    results = [read(evaluate(sim.stacked, sim._objective, sim._test, vectorized=each)[0]) for each in (True, False)]
    assert results[0] == pytest.approx(results[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(sim.stacked.state_dict(), before)
    assert sim.stacked.training


def test_the_learning_rate_falls_at_fractions_and_at_step_numbers():
    def rates(**options):
        sim = simulator(plain_model)
        return [row["lr"] for row in run(sim, 8, eval_every=1, **options)]

    assert rates(milestones=(0.5, 0.75)) == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert rates(milestones=(1, 7), decay=0.5) == pytest.approx([0.1] + [0.05] * 6 + [0.025])
    assert rates() == [0.1] * 8


def test_groups_keep_the_ratio_of_their_learning_rates():
    def two_groups(params):
        return optim.DSGD([{"params": params[:1], "lr": 0.4}, {"params": params[1:]}], lr=0.1, topology=RING)

    sim = simulator(plain_model, optimizer=two_groups)
    run(sim, 3, milestones=(2,))
    assert [group["lr"] for group in sim.optimizer.param_groups] == pytest.approx([0.04, 0.01])


@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 10), lambda o: OneCycleLR(o, 0.3, total_steps=20)])
@trains_alone
def test_any_torch_scheduler_instead_of_milestones(schedule):
    expected = []
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = schedule(plain)
    for _ in range(8):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step()
    sim = simulator(plain_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    assert [row["lr"] for row in run(sim, 8, eval_every=1, schedule=schedule)] == pytest.approx(expected)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_engines_train_alike(engine):
    finals = []
    for name in ("vmap", engine):
        sim = simulator(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double(), engine=name)
        with torch.no_grad():
            sim.stacked.values.copy_(torch.linspace(-1, 1, sim.stacked.values.numel(), dtype=torch.float64).sin())
        run(sim, 14)
        assert sim.engine == name or (name == "auto" and sim.engine in ("loop", "vmap"))
        finals.append(sim.stacked.state_dict())
    for name, tensor in finals[0].items():
        torch.testing.assert_close(finals[1][name], tensor, rtol=1e-9, atol=1e-11)


def test_without_mixing_every_agent_trains_alone():
    """A plain torch optimizer mixes nothing and sends nothing: agent i is a model trained on part i by hand."""
    with pytest.warns(UserWarning, match=r"SGD mixes nothing over ring\(4\), each agent trains alone") as caught:
        sim = simulator(plain_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    assert caught[0].filename == __file__
    run(sim, 6, milestones=())
    for agent in range(NUM_AGENTS):
        module = plain_model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for step in range(6):
            batch = sim.batches.indices(step)[agent]
            optimizer.zero_grad()
            cross_entropy(module(DATA.train_inputs[batch]), DATA.train_labels[batch]).backward()
            optimizer.step()
        for parameter, own in zip(sim.stacked.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(parameter[agent], own, rtol=1e-4, atol=1e-6)
    assert sim.bytes_sent.eq(0).all()


def test_the_result_depends_on_the_seed_and_not_on_the_global_random_state():
    finals = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        sim = simulator(seed=seed)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        run(sim, 4)
        assert torch.equal(torch.get_rng_state(), before)
        finals.append(sim.stacked.values.clone())
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def test_random_generators_of_other_devices_are_left_alone(monkeypatch):
    """``torch.manual_seed`` would seed the generators of all GPUs, which nothing puts back."""
    model = plain_model()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("another device's generator is seeded"))
    sim = simulator(lambda: stack(model, NUM_AGENTS, init="different", seed=3))
    run(sim, 2)
    assert sim.step == 2


def test_nothing_is_made_on_a_default_device():
    """Tensors on "meta" have no values, so any tensor on the default device fails where it is used."""
    model, parts = model_with_state(), partition.dirichlet(DATA.train_labels, NUM_AGENTS, 0.5)
    options = {"data": DATA, "parts": parts, "batch_size": 5, "engine": "vmap"}
    expected = Simulator(model, RING, optimizer=gut(), **options)
    run(expected, 3)
    with torch.device("meta"):
        sim = Simulator(model, RING, optimizer=gut(), **options)
        run(sim, 3)
    assert torch.equal(sim.stacked.values, expected.stacked.values)
    assert sim.history == expected.history


def test_run_counts_steps_in_all():
    once, twice = simulator(plain_model), simulator(plain_model)
    run(once, 10, milestones=())
    run(twice, 4, milestones=())
    run(twice, 10, milestones=())
    assert torch.equal(once.stacked.values, twice.stacked.values)
    assert [row["step"] for row in twice.history] == [4, 10]
    run(twice, 10)
    run(twice, 3)
    assert twice.step == 10
    assert len(twice.history) == 2


@trains_alone
def test_a_loss_of_nan_is_carried_and_reported():
    data = blobs()
    data.train_inputs[0] = math.nan
    parts = [torch.arange(i, 60, NUM_AGENTS) for i in range(NUM_AGENTS)]
    sim = simulator(plain_model, data=data, parts=parts, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    row = run(sim, 4)[-1]
    assert row["diverged_agents"] == 1
    assert math.isnan(row["train_loss"])
    assert math.isnan(row["consensus_error"])


# The order of the data


def order(seed, agent, epoch, parts):
    """The samples of an agent's epoch, read from the stream one at a time."""
    size = len(parts[agent])
    single = Batches(TensorSamples((DATA.train_inputs, DATA.train_labels)), parts, 1, seed)
    return [single.indices(step)[agent].item() for step in range(epoch * size, (epoch + 1) * size)]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    batch_size=st.integers(1, 15),
    step=st.integers(0, 3 * STEPS_PER_BLOCK),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_a_batch_is_a_window_of_the_agents_stream_of_epochs(sizes, batch_size, step, seed):
    parts = list(torch.randperm(60, generator=torch.Generator().manual_seed(seed)).split([*sizes, 60 - sum(sizes)]))
    batches = Batches(TensorSamples((DATA.train_inputs, DATA.train_labels)), parts, batch_size, seed)
    indices = batches.indices(step)
    assert indices.shape == (len(parts), batch_size)
    for agent, size in enumerate(sizes):
        first = step * batch_size
        epochs = range(first // size, (first + batch_size - 1) // size + 1)
        stream = [index for epoch in epochs for index in order(seed, agent, epoch, parts)]
        skipped = first - epochs[0] * size
        assert indices[agent].tolist() == stream[skipped : skipped + batch_size]
    inputs, targets = batches(step)
    assert torch.equal(inputs, DATA.train_inputs[indices])
    assert torch.equal(targets, DATA.train_labels[indices])


def test_every_epoch_is_the_whole_part_in_another_order():
    parts = partition.iid(DATA.train_labels, 3)
    orders = [order(1, agent, epoch, parts) for agent in range(3) for epoch in range(3)]
    for index, samples in enumerate(orders):
        assert sorted(samples) == parts[index // 3].tolist()
    same_part = [parts[0]] * 3
    orders += [order(1, agent, 0, same_part) for agent in (1, 2)] + [order(2, 0, 0, parts)]
    assert len({tuple(samples) for samples in orders}) == len(orders)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_gathered_in_the_layout_of_the_data_and_then_augmented(channels_last):
    sim = simulator(convolutional_model, data=pictures(), channels_last=channels_last, augment=RandomCropFlip(1))
    for step in (0, 1, STEPS_PER_BLOCK, 2):
        inputs, targets = sim.batches(step)
        indices = sim.batches.indices(step)
        gathered = pictures().train_inputs[indices]
        assert torch.equal(targets, DATA.train_labels[indices])
        assert torch.equal(inputs, RandomCropFlip(1)(gathered, sim.batches._draws[step % STEPS_PER_BLOCK]))
        assert not torch.equal(inputs, gathered)
        assert inputs[0].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_augmentation_is_a_function_of_seed_agent_and_step():
    """The draws depend neither on the other agents nor on earlier calls, and differ from block to block."""
    images, labels, augment = pictures().train_inputs, DATA.train_labels, RandomCropFlip(1)
    parts = [torch.arange(60)] * 3

    def draws(step, agents=3, seed=0):
        batches = Batches(TensorSamples((images, labels)), parts[:agents], 5, seed, augment)
        batches(step)
        return batches._draws[step % STEPS_PER_BLOCK]

    assert torch.equal(draws(70, agents=2), draws(70)[:2])
    used = Batches(TensorSamples((images, labels)), parts, 5, 0, augment)
    used(3)
    fresh = Batches(TensorSamples((images, labels)), parts, 5, 0, augment)
    assert torch.equal(used(70)[0], fresh(70)[0])
    different = [*draws(70), *draws(71), *draws(70 + STEPS_PER_BLOCK), draws(70, seed=1)[0]]
    assert len({tuple(draw.flatten().tolist()) for draw in different}) == len(different)


def test_mixed_precision_is_that_of_training_and_of_evaluation():
    seen = []

    class Watched(nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            seen.append((torch.is_grad_enabled(), outputs.dtype))
            return outputs

    def loss(outputs, targets):
        assert outputs.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return cross_entropy(outputs, targets)

    torch.manual_seed(0)
    sim = simulator(Watched(4, 3), engine="loop", autocast=torch.bfloat16, loss=loss)
    run(sim, 200)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert sim.stacked.values.dtype == torch.float32
    assert sim.history[-1]["test_accuracy"] > 0.85


# Bytes


def directed():
    with pytest.warns(UserWarning, match=r"symmetric|stochastic"):
        return topology.from_matrix(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.5, 0.0, 0.5]]))


@pytest.mark.parametrize(
    "make_topology",
    [
        lambda: RING,
        lambda: topology.star(5),
        lambda: topology.complete(1),
        directed,
        lambda: topology.one_peer_exponential(4),
        lambda: topology.random_matching(5, seed=0),
        lambda: topology.sequence([topology.ring(4), topology.star(4)]),
    ],
)
@pytest.mark.parametrize(
    ("make_optimizer", "messages"),
    [
        (lambda mixes: lambda p: optim.DSGD(p, lr=0.01, topology=mixes), 1),
        (lambda mixes: lambda p: optim.GradientTracking(p, lr=0.01, topology=mixes), 2),
    ],
)
def test_bytes_are_counted_from_the_columns_of_the_mixing_matrices(make_topology, make_optimizer, messages):
    mixes = make_topology()
    sim = simulator(plain_model, mixes, make_optimizer(mixes))
    row = run(sim, 7)[-1]
    model_bytes = 4 * (4 * 8 + 8 + 8 * 3 + 3)
    receivers = torch.zeros(mixes.num_agents, dtype=torch.int64)
    for step in range(7):
        off_diagonal = mixes.matrix(step).fill_diagonal_(0)
        receivers += (off_diagonal != 0).sum(0)
    assert torch.equal(sim.bytes_sent, receivers * messages * model_bytes)
    assert row["max_bytes_sent"] == int(sim.bytes_sent.max())
    assert row["mean_bytes_sent"] == pytest.approx(sim.bytes_sent.double().mean().item())


def test_bytes_on_a_ring_and_a_star_in_numbers():
    model_bytes = 4 * 67
    ring = simulator(plain_model)
    run(ring, 3)
    assert ring.bytes_sent.tolist() == [3 * 2 * model_bytes] * 4
    star = simulator(plain_model, topology.star(5), gut(topology.star(5), mu=0.1))
    run(star, 3)
    assert sorted(star.bytes_sent.tolist()) == [3 * model_bytes] * 4 + [3 * 4 * model_bytes]


# Checkpoints


RUNS = {
    "gut, vmap": {},
    "gutm, loop": {"optimizer": lambda p: optim.GUTm(p, lr=0.05, topology=RING), "engine": "loop"},
    "auto": {"engine": "auto"},
    "varying topology": {
        "mixes": topology.random_matching(NUM_AGENTS, seed=1),
        "optimizer": lambda p: optim.GUT(p, lr=0.1, mu=0.5, topology=topology.random_matching(NUM_AGENTS, seed=1)),
    },
    "augmented": {"data": pictures(), "model": convolutional_model, "augment": RandomCropFlip(1)},
    "mixed precision, channels last": {
        "data": pictures(),
        "model": convolutional_model,
        "autocast": torch.bfloat16,
        "channels_last": True,
        "engine": "loop",
    },
    "state in bfloat16": {"optimizer": gut(state_dtype=torch.bfloat16)},
    "parameters in bfloat16": {"model": lambda: model_with_state().to(torch.bfloat16)},
    "parameters in bfloat16, state in float32": {
        "model": lambda: model_with_state().to(torch.bfloat16),
        "optimizer": gut(state_dtype=torch.float32),
        "engine": "loop",
    },
    "adamw, no mixing": {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)},
    "adamw, mixed": {"optimizer": lambda p: Gossip(torch.optim.AdamW(p, lr=0.01), "gut", topology=RING, mu=0.5)},
}


@pytest.mark.parametrize(
    ("name", "options"), covering(list(RUNS), [{}, {"schedule": lambda optimizer: CosineAnnealingLR(optimizer, 40)}])
)
@trains_alone
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name, options):
    """The run stops at step 20 of 40, between two evaluations, and a new simulator continues it."""
    path = tmp_path / "run.checkpoint"
    whole, halves = simulator(**RUNS[name]), []
    with pytest.MonkeyPatch.context() as patch:
        save = Simulator.save_checkpoint

        def save_and_keep(self, path):
            save(self, path)
            halves.append(Path(path).read_bytes())

        patch.setattr(Simulator, "save_checkpoint", save_and_keep)
        run(whole, 40, eval_every=7, checkpoint=path, checkpoint_every=20, **options)
    assert len(halves) == 2
    path.write_bytes(halves[0])
    resumed = simulator(**RUNS[name])
    resumed.load_checkpoint(path)
    assert resumed.step == 20
    run(resumed, 40, eval_every=7, checkpoint=path, checkpoint_every=20, **options)
    assert_same(contents(resumed, tmp_path), contents(whole, tmp_path))
    assert resumed.engine == whole.engine
    path.write_bytes(halves[1])
    resumed.load_checkpoint(path)
    assert_same(contents(resumed, tmp_path), contents(whole, tmp_path))


def start_child(code, *arguments):
    """A fresh process with one thread in which this file is imported as `t`."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys, torch, test_simulator as t; torch.set_num_threads(1); {code}", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_resumed_in_a_fresh_process_is_the_same(tmp_path):
    whole = simulator()
    run(whole, 12, milestones=(6,), eval_every=5, checkpoint=tmp_path / "start.checkpoint")
    run(whole, 30, milestones=(6, 20), eval_every=5, checkpoint=tmp_path / "whole.checkpoint")
    child = start_child(
        "s = t.simulator(); s.load_checkpoint(sys.argv[1]); "
        "t.run(s, 30, milestones=(6, 20), eval_every=5, checkpoint=sys.argv[2])",
        str(tmp_path / "start.checkpoint"),
        str(tmp_path / "child.checkpoint"),
    )
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert_same(*(torch.load(tmp_path / f"{name}.checkpoint", weights_only=True) for name in ("child", "whole")))


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_checkpoint_at_the_end_of_a_step(tmp_path):
    path = tmp_path / "run.checkpoint"
    child = start_child(
        "t.run(t.simulator(loss=t.announce_at(50)), t.FOREVER, milestones=(), eval_every=20, checkpoint=sys.argv[1])",
        str(path),
    )
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert [file.name for file in tmp_path.iterdir()] == ["run.checkpoint"]
    interrupted = simulator(loss=announce_at(None))
    interrupted.load_checkpoint(path)
    assert 40 <= interrupted.step < FOREVER
    assert [row["step"] for row in interrupted.history] == list(range(20, interrupted.step + 1, 20))
    steps = interrupted.step + 7
    whole = simulator(loss=announce_at(None))
    for sim in (interrupted, whole):
        run(sim, steps, milestones=(), eval_every=20)
    assert_same(contents(interrupted, tmp_path), contents(whole, tmp_path))


def announce_at(call):
    """Cross entropy that prints a line when it is called for the `call`th time."""
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == call:
            print("here", flush=True)
        return cross_entropy(outputs, targets)

    return loss


def interrupting_loss(call, action):
    """Cross entropy that calls `action` when it is called for the `call`th time."""
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == call:
            action()
        return cross_entropy(outputs, targets)

    return loss


def raise_keyboard_interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def press_ctrl_c_twice():
    press_ctrl_c()
    press_ctrl_c()


@pytest.mark.parametrize(
    ("call", "action"),  # calls in the tenth step, and the first and last one in the evaluation after it
    covering([38, 41, 45], [raise_keyboard_interrupt, press_ctrl_c, press_ctrl_c_twice]),
)
def test_an_interrupt_anywhere_leaves_a_checkpoint_that_goes_on_bit_for_bit(tmp_path, call, action):
    path = tmp_path / "run.checkpoint"
    sim = simulator(engine="loop", loss=interrupting_loss(call, action))
    with pytest.raises(KeyboardInterrupt):
        run(sim, 16, eval_every=10, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(contents(sim, tmp_path), {**torch.load(path, weights_only=True)})
    resumed, whole = simulator(engine="loop"), simulator(engine="loop")
    resumed.load_checkpoint(path)
    run(resumed, 16, eval_every=10)
    run(whole, 16, eval_every=10)
    assert_same(contents(resumed, tmp_path), contents(whole, tmp_path))
    run(sim, 16, eval_every=10)  # and so does the simulator that was interrupted
    assert_same(contents(sim, tmp_path), contents(whole, tmp_path))


def test_an_interrupt_in_the_middle_of_a_step_does_not_overwrite_a_good_checkpoint(tmp_path):
    path = tmp_path / "run.checkpoint"

    class Interrupted(optim.DSGD):
        def step(self, closure=None, **options):
            super().step(closure, **options)
            if self.num_steps == 7:
                raise KeyboardInterrupt

    sim = simulator(optimizer=lambda params: Interrupted(params, lr=0.1, topology=RING))
    with pytest.raises(KeyboardInterrupt):
        run(sim, 10, checkpoint=path, checkpoint_every=3)
    assert torch.load(path, weights_only=True)["step"] == 6


def test_an_interrupt_between_evaluation_and_history_counts_no_loss_twice(tmp_path):
    class Interrupted(list):
        def append(self, row):
            raise KeyboardInterrupt

    path = tmp_path / "run.checkpoint"
    sim, whole = simulator(), simulator()
    run(sim, 3, eval_every=5, milestones=(), checkpoint=path)
    sim.history = Interrupted(sim.history)
    with pytest.raises(KeyboardInterrupt):
        run(sim, 10, eval_every=5, milestones=(), checkpoint=path)
    assert math.isnan(sim.evaluate()["train_loss"])
    resumed = simulator()
    resumed.load_checkpoint(path)
    assert resumed.step == 3
    run(whole, 3, eval_every=5, milestones=())
    for other in (resumed, whole):
        run(other, 10, eval_every=5, milestones=())
    assert_same(contents(resumed, tmp_path), contents(whole, tmp_path))


def test_an_error_in_the_gradient_leaves_the_simulator_between_two_steps(tmp_path):
    def fail():
        raise ZeroDivisionError

    sim, whole = simulator(engine="loop", loss=interrupting_loss(18, fail)), simulator(engine="loop")
    with pytest.raises(ZeroDivisionError):
        run(sim, 8)
    assert sim.step == 4
    for other in (sim, whole):
        run(other, 8)
    assert_same(contents(sim, tmp_path), contents(whole, tmp_path))


def ring_with_other_weights(weights, name="ring(4)"):
    return topology.from_matrix(RING.matrix() * (1 - weights) + weights * torch.eye(4), name=name)


OTHER = {
    r"augmentation is None there, 'RandomCropFlip\(padding=1, flip=True\)' here": {"augment": RandomCropFlip(1)},
    "dtype of the state is None there, 'torch.bfloat16' here": {"optimizer": gut(state_dtype=torch.bfloat16)},
    "autocast is None there, 'torch.bfloat16' here": {"autocast": torch.bfloat16},
    "channels last is None there, True here": {
        "data": pictures(),
        "model": convolutional_model,
        "channels_last": True,
    },
    "digest of the mixing weights is": {"mixes": ring_with_other_weights(0.25)},
    "digest of the training samples is": {"data": blobs(seed=1)},
    "number of agents is 4 there, 5 here": {"mixes": topology.ring(5)},
    r"topology is 'ring\(4\)' there, 'complete\(4\)' here": {"mixes": topology.complete(4)},
    "optimizer is 'GUT' there, 'DSGD' here; rule is 'gut' there, 'dsgd' here": {
        "optimizer": lambda p: optim.DSGD(p, lr=0.1, topology=RING)
    },
    "mu of group 0 is 0.5 there, 0.25 here": {"optimizer": gut(mu=0.25)},
    "seed is 7 there, 8 here": {"seed": 8},
    "batch size is 5 there, 6 here": {"batch_size": 6},
    "division of the samples is": {"parts": partition.iid(DATA.train_labels, 4)},
    r"shape of 0.weight is \(4, 8, 4, 'torch.float32'\) there, None here": {"model": lambda: nn.LSTM(4, 3)},
    r"shape of 0.weight is \(4, 8, 4, 'torch.float32'\) there, \(4, 8, 4, 'torch.float64'\) here": {
        "model": lambda: model_with_state().double()
    },
}


@pytest.mark.parametrize("message", OTHER)
def test_a_checkpoint_of_another_configuration_changes_nothing(tmp_path, message):
    path = tmp_path / "run.checkpoint"
    run(simulator(), 3, checkpoint=path)
    other = simulator(**OTHER[message])
    before = contents(other, tmp_path)
    with pytest.raises(ValueError, match=f"run.checkpoint is of another configuration: .*{message}"):
        other.load_checkpoint(path)
    assert_same(contents(other, tmp_path), before)


def test_a_broken_checkpoint_gives_one_error_that_names_the_file(tmp_path):
    path = tmp_path / "run.checkpoint"
    sim = simulator()
    run(sim, 3, checkpoint=path)
    before, good = contents(sim, tmp_path), path.read_bytes()
    middle = len(good) // 2
    with zipfile.ZipFile(path) as archive:
        records = [archive.read(name) for name in archive.namelist() if name.endswith(("data.pkl", "/data/0"))]
    flipped = [good.replace(record, bytes([record[0] ^ 1]) + record[1:]) for record in records]
    assert len(flipped) == 2
    for bad in (b"", good[:100], good[:middle], good[:-1], *flipped, b"not a checkpoint", b"\x80\x02}q\x00."):
        path.write_bytes(bad)
        with pytest.raises(RuntimeError, match=r"run.checkpoint (cannot be read|is not) .*a? checkpoint"):
            sim.load_checkpoint(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(RuntimeError, match=r"run.checkpoint is not a checkpoint of gut_fast's simulator"):
        sim.load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        sim.load_checkpoint(tmp_path / "nothing")
    assert_same(contents(sim, tmp_path), before)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint"
    sim = simulator()
    run(sim, 3, checkpoint=path)
    old = path.read_bytes()

    def save_half(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files.torch_files, "save", save_half)
    with pytest.raises(OSError, match="no space left"):
        sim.save_checkpoint(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["run.checkpoint"]


def test_random_matchings_are_told_apart_by_their_seed(tmp_path):
    matchings = [replace(topology.random_matching(4, seed), name="matching") for seed in (0, 1)]
    simulator(mixes=matchings[0]).save_checkpoint(tmp_path / "start")
    simulator(mixes=matchings[0]).load_checkpoint(tmp_path / "start")
    with pytest.raises(ValueError, match="digest of the mixing weights is"):
        simulator(mixes=matchings[1]).load_checkpoint(tmp_path / "start")


def test_the_caller_is_told_of_every_checkpoint_once_it_is_written(tmp_path):
    path, written = tmp_path / "run.checkpoint", []
    run(
        simulator(),
        7,
        checkpoint=path,
        checkpoint_every=3,
        on_checkpoint=lambda: written.append(torch.load(path, weights_only=True)["step"]),
    )
    assert written == [3, 6, 7]


# Files, display, arguments


def test_history_as_csv_and_json_lines(tmp_path):
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan, "more": math.inf}]
    write_csv(history, tmp_path / "history.csv")
    write_json_lines(history, str(tmp_path / "history.jsonl"))
    with (tmp_path / "history.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss", "more"], ["1", "0.5", ""], ["2", "nan", "inf"]]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "more": None}]
    assert len(list(tmp_path.iterdir())) == 2
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(TypeError):
        write_json_lines([{"step": 1}, {"step": object()}], tmp_path / "history.jsonl")
    assert (tmp_path / "history.jsonl").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    sim = simulator()
    run(sim, 4, eval_every=2)
    write_json_lines(sim.history, tmp_path / "run.jsonl")
    assert [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()] == sim.history


def test_progress_is_lines_where_there_is_no_terminal_or_no_rich(capsys, monkeypatch):
    simulator().run(6, eval_every=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 6/6")
    assert "accuracy" in line
    assert "consensus" in line
    monkeypatch.setattr(progress_display, "SECONDS_BETWEEN_LINES", 0.0)
    simulator().run(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    assert "loss" in lines[1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress_display.importlib.util, "find_spec", lambda name: None)
    simulator().run(2)
    assert "step 2/2" in capsys.readouterr().err
    simulator().run(2, progress=False)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress_display, "SECONDS_BETWEEN_UPDATES", 0.0)
    monkeypatch.setenv("COLUMNS", "150")
    simulator().run(6, eval_every=3)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "worst agent" in shown


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
        ({"eval_every": 0}, ValueError, "eval_every must be at least 1"),
        ({"checkpoint_every": 2}, ValueError, "checkpoint_every=2 needs checkpoint="),
        ({"checkpoint": "/nowhere/at/all/x"}, FileNotFoundError, "there is no folder /nowhere/at/all"),
        ({"milestones": (0,)}, ValueError, "fractions between 0 and 1 or step numbers, got 0"),
        ({"milestones": (1.5,)}, ValueError, "got 1.5"),
        ({"milestones": (math.nan,)}, ValueError, "got nan"),
        ({"decay": -1.0}, ValueError, "decay must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_arguments_of_run_change_nothing(options, error, message):
    sim = simulator(plain_model)
    before = sim.stacked.values.clone()
    with pytest.raises(error, match=message):
        run(sim, **{"steps": 3, **options})
    assert sim.step == 0
    assert torch.equal(sim.stacked.values, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"parts": partition.iid(DATA.train_labels, 3)},
            ValueError,
            r"has 4 agents, the model 4 and the data 3 parts",
        ),
        ({"model": lambda: stack(plain_model(), 3)}, ValueError, "the model 3 and the data 4 parts"),
        ({"optimizer": lambda p: "sgd"}, TypeError, "must return a torch.optim.Optimizer, got str"),
        ({"optimizer": "sgd"}, TypeError, "must be a function that makes one of the stacked parameters, .* got str"),
        (
            {"optimizer": lambda p: torch.optim.SGD(plain_model().parameters(), lr=0.1)},
            ValueError,
            "the optimizer has other parameters than the stacked ones",
        ),
        (
            {"optimizer": gut(topology.complete(4))},
            ValueError,
            r"mixes over complete\(4\), but .* ring\(4\)",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 10**8}, ValueError, "batch_size=100000000 is more than 100 times the samples of any agent"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"engine": "fast"}, ValueError, "unknown engine 'fast'"),
        ({"channels_last": True}, ValueError, r"is for images \[samples, C, H, W\], the inputs have shape \(60, 4\)"),
        ({"autocast": torch.float16}, ValueError, "must be torch.bfloat16 or None, got torch.float16; float16 needs"),
        ({"autocast": "bfloat16"}, ValueError, "autocast must be torch.bfloat16 or None, got 'bfloat16'"),
        (
            {"autocast": torch.bfloat16, "model": lambda: plain_model().double()},
            ValueError,
            "is for parameters of torch.float32, the model's are torch.float64",
        ),
        ({"parts": [torch.arange(3)] * 3 + [torch.arange(0)]}, ValueError, "agent 3 has no samples"),
        ({"parts": [torch.arange(3)] * 3 + [torch.tensor([60])]}, ValueError, "indices 60 … 60, but there are 60"),
        ({"parts": [torch.arange(3)] * 3 + [torch.tensor([-1])]}, ValueError, "agent 3's part has indices -1"),
        ({"parts": [torch.zeros(3)] * 4}, TypeError, "agent 0's part must be a 1-D tensor of indices"),
    ],
)
def test_bad_arguments_of_the_simulator(options, error, message):
    with pytest.raises(error, match=message):
        simulator(**{"model": plain_model, **options})


FAULTS = """
import resource, torch, gut_fast as gf

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), gf.simulation.keep_freed_memory(), faults() and faults())
"""


def test_memory_that_is_freed_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, helps, after = done.stdout.split()
    assert (helps == "True") == hasattr(ctypes.CDLL(None), "mallopt")
    assert helps == "False" or int(after) < int(before) / 10
