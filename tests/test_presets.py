"""The experiments of the paper by name."""

import math
import os

import pytest
import torch

import gut_fast
from gut_fast import analysis, cli
from gut_fast.data import Dataset
from gut_fast.study import Experiment, make_simulator, parse_topology, run, train
from gut_fast.study.presets import PRESETS, preset_settings
from gut_fast.study.sweep import make_sweep, read_sweep

PAPER = {
    "cifar10-resnet20-ring16": ("cifar10", 16, 0.1, "resnet20", 0.06, 0.1, 200),
    "cifar10-vgg11-ring32": ("cifar10", 32, 0.01, "vgg11", 0.08, 0.1, 200),
    "cifar10-resnet20-torus32": ("cifar10", 32, 0.1, "resnet20", 0.05, 0.1, 200),
    "cifar10-resnet20-dyck32": ("cifar10", 32, 0.1, "resnet20", 0.05, 0.1, 200),
    "cifar100-resnet20-ring16": ("cifar100", 16, 0.1, "resnet20", 0.005, 0.1, 200),
    "fashion-mnist-lenet5-ring16": ("fashion-mnist", 16, 0.1, "lenet5", 0.01, 0.1, 100),
    "imagenette-mobilenetv2-ring16": ("imagenette", 16, 0.1, "mobilenet-v2", 0.03, 0.01, 100),
}
"""Data, agents, α, network, μ of QG-GUTm, learning rate, epochs."""

SHAPES = {
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "fashion-mnist": ((1, 28, 28), 10),
    "imagenette": ((3, 224, 224), 10),
}


@pytest.fixture
def small_data(monkeypatch):
    """Random images of the true shape and number of classes instead of the data sets."""

    def load(name, **_):
        shape, classes = SHAPES[name]
        draw = torch.Generator().manual_seed(1)
        labels = torch.arange(2 * classes) % classes
        test = 2
        images = torch.randn(len(labels) + test, *shape, generator=draw)
        return Dataset(name, classes, images[test:], labels, images[:test], labels[:test])

    monkeypatch.setattr(gut_fast.data, "load", load)
    run._pooled.cache_clear()
    yield
    run._pooled.cache_clear()


def test_presets_are_the_rows_of_the_paper():
    assert PRESETS.keys() == PAPER.keys() | {"manpages-lm-ring8"}
    for name, (data, agents, alpha, model, mu, lr, epochs) in PAPER.items():
        tasks = {task.method: task.experiment for task in make_sweep({"preset": name}).tasks()}
        assert list(tasks) == ["DSGD", "GUT", "QG-DSGDm", "QG-GUTm", "QG-DSGDm β+μ"]
        assert tasks["QG-GUTm"].hyperparameters == {"momentum": 0.9, "mu": mu}
        assert tasks["QG-DSGDm β+μ"].hyperparameters == {"momentum": pytest.approx(0.9 + mu), "mu": 0.0}
        assert tasks["QG-DSGDm"].hyperparameters["momentum"] == 0.9
        for experiment in tasks.values():
            assert (experiment.data, experiment.model, experiment.lr) == (data, model, lr)
            assert (experiment.partition, experiment.partition_options) == ("dirichlet-blocks", {"alpha": alpha})
            assert (experiment.batch_size, experiment.milestones, experiment.decay) == (32, (0.5, 0.75), 0.1)
            assert experiment.norm == ("none" if model == "lenet5" else "evonorm")
            assert experiment.steps % experiment.eval_every == 0
            samples = {"fashion-mnist": 60_000, "imagenette": 9_469}.get(data, 50_000)
            assert 0 <= epochs * samples / (agents * 32) - experiment.steps < 21
            assert parse_topology(experiment.topology).num_agents == agents


@pytest.mark.parametrize("name", PRESETS)
def test_the_methods_of_a_preset_are_stable_on_its_topology(name):
    for task in make_sweep({"preset": name}).tasks():
        topology = parse_topology(task.experiment.topology)
        assert analysis.advice(task.experiment.rule, task.experiment.hyperparameters, topology) is None


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_runs_three_steps(small_data, name):
    smaller = {"topology": "ring:2", "batch_size": 1, "steps": 3, "eval_every": 3, "engine": "loop"}
    content = {"preset": name, "settings": smaller, "methods": {"GUT": {"rule": "gut", "mu": 0.5}}}
    (task,) = make_sweep(content).tasks()
    run = train(task.experiment, make_simulator(task.experiment), progress=False)
    assert [row["step"] for row in run.history] == [3]
    assert run.final["diverged_agents"] == 0
    assert math.isfinite(run.final["test_loss"])


@pytest.mark.parametrize("rule", ["gut", "qg_gutm"])
def test_train_takes_a_preset_and_options_that_come_after(small_data, tmp_path, monkeypatch, capsys, rule):
    monkeypatch.chdir(tmp_path)
    code = cli.main(
        (
            *("train", "--preset", "fashion-mnist-lenet5-ring16", "--rule", rule, "--steps", "3", "--batch-size", "2"),
            *("--engine", "loop", "--threads", "1", "--out", "run", "--topology", "ring:4"),
        )
    )
    assert code == 0
    mu = {"gut": {"mu": 0.9}, "qg_gutm": {"momentum": 0.9, "mu": 0.01}}[rule]
    expected = Experiment(
        data="fashion-mnist",
        model="lenet5",
        norm="none",
        topology="ring:4",
        rule=rule,
        hyperparameters=mu,
        partition="dirichlet-blocks",
        batch_size=2,
        steps=3,
        eval_every=1,
        engine="loop",
    )
    assert [task.experiment for task in read_sweep("run/sweep.yaml").tasks()] == [expected]
    assert "test accuracy" in capsys.readouterr().out


def test_pooling_norm_validation_and_data_folder_are_taken(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUT_FAST_DATA", "")
    code = cli.main(
        (
            *("train", "--data", "fashion-mnist", "--pool", "2", "--validation", "0.5", "--model", "mlp:8"),
            *("--norm", "none", "--topology", "ring:2", "--steps", "1", "--batch-size", "2", "--engine", "loop"),
            *("--threads", "1", "--alpha", "5", "--out", "run", "--data-folder", "elsewhere"),
        )
    )
    assert code == 0
    assert os.environ["GUT_FAST_DATA"] == str(tmp_path / "elsewhere")
    (experiment,) = (task.experiment for task in read_sweep("run/sweep.yaml").tasks())
    assert (experiment.pool, experiment.validation, experiment.norm) == (2, 0.5, "none")
    simulator = make_simulator(experiment)
    assert simulator.data.input_shape == (1, 14, 14)
    assert len(simulator.data.train_labels) == len(simulator.data.test_labels) == 10


def test_an_unknown_preset_names_those_there_are(capsys):
    with pytest.raises(ValueError, match="unknown preset 'cifar'; known are cifar10-resnet20-ring16, "):
        preset_settings("cifar")
    assert cli.main(["train", "--preset", "cifar"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gut-fast: error: unknown preset 'cifar'; known are ")
    assert error.count("\n") == 1
