"""Tasks of any kind in the simulator: data, losses and metrics of one's own, in every engine."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

import gut_fast as gf
from gut_fast.simulation import Simulator
from gut_fast.simulation.engines import GraphedEngine, LoopEngine, VmapEngine
from gut_fast.simulation.objective import Objective
from test_engines import FakeGraph
from test_simulator import DATA, NUM_AGENTS, RING, assert_same, blobs, contents, gut, plain_model

trains_alone = pytest.mark.filterwarnings("ignore:.*mixes nothing over .* each agent trains alone:UserWarning")

ENGINES = ["loop", "vmap", "workers"]
PARTS = [torch.arange(i, 60, NUM_AGENTS) for i in range(NUM_AGENTS)]


def simulator(model, data, parts=PARTS, **options):
    torch.manual_seed(0)
    arguments = {"optimizer": gut(), "batch_size": 5, "engine": "loop", "seed": 3}
    return Simulator(model(), RING, data=data, parts=parts, **{**arguments, **options})


def trained(model, data, steps=6, **options):
    sim = simulator(model, data, **options)
    sim.run(steps, eval_every=steps // 2, progress=False)
    return sim


class Rows(TorchDataset):
    """A map-style data set of given rows."""

    def __init__(self, *tensors, as_sample=tuple):
        self.tensors, self.as_sample = tensors, as_sample

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return self.as_sample([tensor[i] for tensor in self.tensors])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.dropout = nn.Linear(4, 8), nn.Dropout(0.1)
        self.kind, self.size = nn.Linear(8, 3), nn.Linear(8, 1)

    def features(self, inputs):
        return self.dropout(self.body(inputs).relu())


def two_losses(model, batch):
    features = model.features(batch["x"])
    kinds, (sizes, weights) = model.kind(features), batch["targets"]
    return functional.cross_entropy(kinds, batch["y"]) + (weights * (model.size(features)[:, 0] - sizes) ** 2).mean()


def size_error(model, batch):
    return (model.size(model.features(batch["x"]))[:, 0] - batch["targets"][0]).abs().mean()


def nested():
    inputs, labels = DATA.train_inputs, DATA.train_labels
    return {"x": inputs, "y": labels, "targets": (inputs.norm(dim=1), torch.ones(60))}


class Language(nn.Module):
    """A model that says which token follows."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, tokens):
        return self.out(self.rnn(self.embed(tokens)).tanh())


def next_token_loss(outputs, targets):
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def segmenter():
    return nn.Conv2d(1, 3, 3, padding=1)


TASKS = {
    "regression": (
        lambda: nn.Linear(4, 1),
        (DATA.train_inputs, DATA.train_inputs.sum(1, keepdim=True)),
        {"loss": functional.mse_loss, "metrics": {"mae": functional.l1_loss}},
    ),
    "several heads": (TwoHeads, nested(), {"model_loss": two_losses, "metrics": {"size_error": size_error}}),
    "language": (
        Language,
        (torch.arange(60 * 5).view(60, 5) % 7, (torch.arange(60 * 5).view(60, 5) + 1) % 7),
        {"loss": next_token_loss},
    ),
    "segmentation": (segmenter, (torch.randn(60, 1, 4, 4), torch.arange(60 * 16).view(60, 4, 4) % 3), {}),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_engine_trains_any_task_alike(name):
    model, data, options = TASKS[name]
    if name == "several heads":
        options = {**options, "metrics": {"size_error": size_error}}
    sims = [trained(lambda: model().double().eval().train(), data, engine=engine, **options) for engine in ENGINES]
    for sim in sims[1:] if name != "several heads" else sims[2:]:  # vmap draws other numbers for dropout
        torch.testing.assert_close(sim.stacked.values, sims[0].stacked.values, rtol=1e-9, atol=1e-11)
        assert sim.history[-1] == pytest.approx(sims[0].history[-1])
    losses = [row["train_loss"] for row in sims[1].history]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["several heads", "regression"])
def test_a_loss_of_ones_own_is_that_of_plain_autograd_in_every_engine(name):
    model, data, options = TASKS[name]
    torch.manual_seed(0)
    module = model().double()
    if name == "several heads":
        module.dropout.p = 0.0
    loss = options.get("model_loss") or (lambda model, batch: options["loss"](model(batch[0]), batch[1]))
    batch = torch.utils._pytree.tree_map(
        lambda t: (t.double() if t.is_floating_point() else t)[:40].unflatten(0, (4, 10)), data
    )
    rows = [torch.utils._pytree.tree_map(lambda tensor, i=i: tensor[i], batch) for i in range(4)]
    expected = []
    for row in rows:
        module.zero_grad()
        loss(module, row).backward()
        expected.append([parameter.grad for parameter in module.parameters()])
    for make in (LoopEngine, VmapEngine, gf.simulation.engines.WorkersEngine, graphed):
        stacked = gf.stack(module, 4)
        losses = make(stacked, Objective(loss))(batch)
        torch.testing.assert_close(losses, torch.stack([loss(module, row).detach() for row in rows]))
        for k, parameter in enumerate(stacked.parameters()):
            torch.testing.assert_close(parameter.grad, torch.stack([gradients[k] for gradients in expected]))


def graphed(stacked, objective):
    return GraphedEngine(VmapEngine(stacked, objective), stacked, FakeGraph(stacked))


# Data


KINDS = {
    "a tuple": (DATA.train_inputs, DATA.train_labels),
    "arrays": (DATA.train_inputs.double().numpy(), DATA.train_labels.tolist()),
    "a TensorDataset": TensorDataset(DATA.train_inputs, DATA.train_labels),
    "a data set": Rows(DATA.train_inputs, DATA.train_labels),
    "a data set of numbers": Rows(DATA.train_inputs.numpy(), DATA.train_labels.tolist()),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_the_data_changes_nothing(name):
    expected = trained(plain_model, DATA)
    test = (DATA.test_inputs, DATA.test_labels)
    sim = trained(plain_model, KINDS[name], test_data=test)
    assert sim.history == expected.history
    assert torch.equal(sim.stacked.values, expected.stacked.values)
    each = KINDS[name] if name != "arrays" else KINDS["a tuple"]
    if isinstance(each, tuple):
        own = [tuple(tensor[part] for tensor in each) for part in PARTS]
    else:
        own = [torch.utils.data.Subset(each, part.tolist()) for part in PARTS]
    of_agents = trained(plain_model, own, parts=None, test_data=Rows(*test))
    assert of_agents.history == expected.history


def test_samples_may_be_dicts_and_are_read_ahead_by_workers():
    def as_dict(row):
        return {"x": row[0], "y": row[1]}

    def loss(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    data = Rows(DATA.train_inputs, DATA.train_labels, as_sample=as_dict)
    here = trained(plain_model, data, model_loss=loss)
    assert "test_loss" not in here.history[-1]
    assert list(here.history[-1]) == here.entries
    expected = trained(plain_model, DATA)
    assert torch.equal(here.stacked.values, expected.stacked.values)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_worker_processes_read_the_same_batches():
    data = Rows(DATA.train_inputs, DATA.train_labels)
    here, ahead = (trained(plain_model, data, num_workers=workers) for workers in (0, 1))
    assert torch.equal(here.stacked.values, ahead.stacked.values)


def test_a_data_set_that_draws_random_numbers_is_repeated_by_a_resumed_run(tmp_path):
    class Noisy(Rows):
        def __getitem__(self, i):
            inputs, label = super().__getitem__(i)
            return inputs + torch.rand(4), label

    data = Noisy(DATA.train_inputs, DATA.train_labels)
    whole, first, second = (simulator(plain_model, data, test_data=data) for _ in range(3))
    whole.run(6, eval_every=2, progress=False)
    first.run(4, eval_every=2, progress=False, checkpoint=tmp_path / "c.pt")
    second.load_checkpoint(tmp_path / "c.pt")
    second.run(6, eval_every=2, progress=False)
    assert torch.equal(second.stacked.values, whole.stacked.values)


def test_evaluate_takes_other_data():
    sim = trained(plain_model, (DATA.train_inputs, DATA.train_labels))
    other = blobs(seed=5)
    row = sim.evaluate((other.test_inputs, other.test_labels))
    outputs = sim.stacked.average().eval()(other.test_inputs)
    assert row["test_loss"] == pytest.approx(functional.cross_entropy(outputs, other.test_labels).item(), rel=1e-5)
    assert row["test_accuracy"] == pytest.approx((outputs.argmax(1) == other.test_labels).double().mean().item())
    assert row == sim.evaluate(other) == sim.evaluate(Rows(other.test_inputs, other.test_labels))


# Metrics


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_metrics_are_means_over_the_test_samples_of_the_average_and_of_each_agent(engine):
    def largest(outputs, targets):  # reads a value, which vmap cannot
        return float(outputs.max())

    metrics = {"mae": lambda outputs, targets: (outputs - targets).abs().mean(), "largest": largest}
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    targets = inputs[:, :1] ** 2
    sim = simulator(
        lambda: nn.Linear(4, 1),
        (inputs, targets),
        engine=engine,
        loss=functional.mse_loss,
        metrics=metrics,
        test_data=(inputs, targets),
    )
    row = sim.run(4, progress=False)[-1]
    maes = [(sim.stacked.agent(i)(inputs) - targets).abs().mean().item() for i in range(NUM_AGENTS)]
    assert row["test_mae"] == pytest.approx((sim.stacked.average()(inputs) - targets).abs().mean().item(), rel=1e-5)
    assert sim.agent_metrics["mae"].tolist() == pytest.approx(maes, rel=1e-5)
    assert row["mean_agent_mae"] == pytest.approx(sum(maes) / NUM_AGENTS, rel=1e-5)
    assert row["smallest_agent_mae"] == pytest.approx(min(maes), rel=1e-5)
    assert row["largest_agent_mae"] == pytest.approx(max(maes), rel=1e-5)
    assert list(row) == sim.entries
    assert "test_accuracy" not in row
    assert np.isfinite(row["test_largest"])


def test_accuracy_is_left_out_where_it_makes_no_sense():
    for name, expected in (("regression", False), ("language", False), ("segmentation", True)):
        model, data, options = TASKS[name]
        sim = simulator(model, data, test_data=data, **{**options, "metrics": None})
        assert ("test_accuracy" in sim.entries) is expected, name
    model, data, _ = TASKS["segmentation"]
    sim = trained(model, data, test_data=data)
    hits = sim.stacked.average()(data[0]).argmax(1) == data[1]
    assert sim.history[-1]["test_accuracy"] == pytest.approx(hits.double().mean().item())


# Clipping, freezing, copies


@pytest.mark.parametrize("engine", ENGINES)
@trains_alone
def test_each_agents_gradient_is_clipped(engine):
    def sgd(params):
        return torch.optim.SGD(params, lr=1.0)

    sim = simulator(plain_model, DATA, optimizer=sgd, engine=engine, max_grad_norm=0.01)
    before = sim.stacked.values.clone()
    sim.run(1, progress=False)
    moves = [torch.cat([p.detach()[i].flatten() for p in sim.stacked.parameters()]) for i in range(NUM_AGENTS)]
    start = torch.cat([p.detach().flatten() for p in plain_model().parameters()])
    assert not torch.equal(before, sim.stacked.values)
    for move in moves:
        assert (move - start).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("engine", [*ENGINES, "graphed"])
def test_frozen_parameters_only_mix_and_unfrozen_ones_train(engine):
    sim = simulator(plain_model, DATA, engine="vmap" if engine == "graphed" else engine)
    expected = simulator(plain_model, DATA)
    if engine == "graphed":
        sim._engine = graphed(sim.stacked, sim._objective)
    for each in (sim, expected):
        first, *others = list(each.stacked.parameters())
        means = []
        for steps, is_trained in ((3, True), (6, False), (9, True)):
            first.requires_grad_(is_trained)
            each.run(steps, progress=False)
            means.append(first.detach().double().mean(0))
        assert (means[1] - means[0]).abs().max() < 1e-6
        assert (means[2] - means[1]).abs().max() > 1e-4
        for parameter in (first, *others):
            parameter.requires_grad_(False)
        each.run(12, progress=False)
    torch.testing.assert_close(sim.stacked.values, expected.stacked.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sim: pickle.loads(pickle.dumps(sim))], ids=["copy", "pickle"])
def test_a_copy_goes_on_like_the_original_and_apart_from_it(tmp_path, engine, copied):
    sim = Simulator(
        plain_model(), RING, optimizer=make_gut, data=DATA, parts=PARTS, batch_size=5, engine=engine, seed=3
    )
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)  # noqa: E731
    sim.run(30, schedule=schedule, progress=False)
    other = copied(sim)
    before = sim.stacked.values.clone()
    other.run(36, schedule=schedule, progress=False)
    assert torch.equal(sim.stacked.values, before)
    sim.run(36, schedule=schedule, progress=False)
    assert not torch.equal(sim.stacked.values, before)
    assert_same(contents(other, tmp_path), contents(sim, tmp_path))


def make_gut(params):
    return gf.GUT(params, lr=0.1, mu=0.5, topology=RING)


def test_agents_left_in_evaluation_mode_are_trained_in_training_mode():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    for engine in ENGINES:
        sim, expected = (simulator(model, DATA, engine=engine) for _ in range(2))
        for each in (sim, expected):
            each.run(2, progress=False)
        sim.stacked.eval()
        sim.stacked.agent(1).eval()
        for each in (sim, expected):
            each.run(4, progress=False)
        assert torch.equal(sim.stacked.values, expected.stacked.values)


# What is refused


CHARACTERS = np.array(["cat", "dog"] * 30)


class Endless(IterableDataset):
    def __iter__(self):
        yield from range(10)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (
            (DATA.train_inputs, CHARACTERS),
            {},
            TypeError,
            r"data\[1\] holds 'cat', which is no number; labels",
        ),
        ((DATA.train_inputs, CHARACTERS.tolist()), {}, TypeError, r"data\[1\] holds 'cat'"),
        (Rows(DATA.train_inputs, CHARACTERS), {}, TypeError, r"a sample\[1\] holds 'cat'"),
        (
            (DATA.train_inputs, DATA.train_labels.float()),
            {},
            TypeError,
            r"labels are torch.float32; cross",
        ),
        ((DATA.train_inputs, DATA.train_labels.int()), {}, TypeError, r"labels are torch.int32"),
        (Rows(DATA.train_inputs, DATA.train_labels.float()), {}, TypeError, r"labels are torch.float"),
        ((DATA.train_inputs, DATA.train_labels + 1), {}, ValueError, r"labels of data are 1 … 3, but .* classes 0 … 2"),
        ((DATA.train_inputs, DATA.train_labels - 1), {}, ValueError, r"labels of data are -1 … 1"),
        (DATA, {"test_data": (DATA.test_inputs, DATA.test_labels + 1)}, ValueError, r"labels of test_data are 1 … 3"),
        ((DATA.train_inputs, DATA.train_labels[:50]), {}, ValueError, r"data\[0\] has 60, data\[1\] has 50"),
        ((DATA.train_inputs[:0], DATA.train_labels[:0]), {}, ValueError, "data has no samples"),
        ((), {}, ValueError, "data has no samples"),
        (
            DATA.train_inputs,
            {},
            TypeError,
            r"takes samples \(inputs, targets\), but a sample is a Tensor",
        ),
        (nested(), {}, TypeError, "a sample is a dict of 3"),
        (Endless(), {}, TypeError, "data is an IterableDataset"),
        (3, {}, TypeError, "data must be tensors .* got int"),
        (DATA, {"parts": None}, ValueError, "data is one data set for all agents; divide it by parts="),
        ([DATA] * 4, {}, ValueError, "parts= would divide it again"),
        ([DATA] * 3, {"parts": None}, ValueError, "the data 3 parts"),
        (DATA, {"loss": functional.cross_entropy, "model_loss": two_losses}, ValueError, "are two losses"),
        (DATA, {"metrics": {"loss": functional.mse_loss}}, ValueError, r"two entries \['test_loss'\]"),
        (DATA, {"metrics": {"mae": "mae"}}, TypeError, "mae must be a function, got str"),
        (DATA, {"max_grad_norm": 0}, ValueError, "max_grad_norm must be above 0"),
        (DATA, {"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        (
            nested(),
            {"model_loss": two_losses, "augment": gf.data.RandomCropFlip()},
            ValueError,
            "augment= is for",
        ),
    ],
)
def test_bad_data_and_losses_are_refused_when_the_simulator_is_made(data, options, error, message):
    with pytest.raises(error, match=message):
        simulator(plain_model, data, **options)


def test_padded_targets_are_no_class():
    tokens = torch.arange(60 * 5).view(60, 5) % 7
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100

    class ByClass(Language):
        def forward(self, tokens):
            return super().forward(tokens).transpose(1, 2)

    sim = trained(ByClass, (tokens, targets), test_data=(tokens, targets))
    hits = sim.stacked.average()(tokens).argmax(1)[:, :-1] == targets[:, :-1]
    assert sim.history[-1]["test_accuracy"] == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize("of_sequences", [False, True])
def test_padded_targets_count_in_no_engine(of_sequences):
    inputs, targets = torch.randn(60, 4), torch.randint(3, (60, 2) if of_sequences else (60,))
    targets[::3] = -100

    def classifier():
        return nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))) if of_sequences else nn.Linear(4, 3)

    histories = {engine: trained(classifier, (inputs, targets), engine=engine).history for engine in ENGINES}
    for engine in ENGINES[1:]:
        for row, expected in zip(histories[engine], histories["loop"], strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5), engine
            assert row["consensus_error"] == pytest.approx(expected["consensus_error"], rel=1e-4), engine


def test_data_sets_joined_by_torch_are_one():
    halves = [Rows(DATA.train_inputs[k : k + 30], DATA.train_labels[k : k + 30]) for k in (0, 30)]
    assert torch.equal(
        trained(plain_model, ConcatDataset(halves)).stacked.values, trained(plain_model, DATA).stacked.values
    )
