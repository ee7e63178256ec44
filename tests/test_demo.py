"""The demo, reduced to two methods and two seeds, and its messages where it cannot run."""

import importlib.util
import json
import math
import statistics
from dataclasses import replace

import pytest

from gut_fast.kernels.backends import cpu
from gut_fast.kernels.backends import torch as plain_torch
from gut_fast.study import demo
from gut_fast.verify import lockstep

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """The demo of DSGD and GUT on two seeds: its folder, its runs, its output, and the calls of the kernel."""
    folder = tmp_path_factory.mktemp("demo") / "outputs"
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        kernel = cpu.gossip_step
        patch.setattr(cpu, "gossip_step", lambda step: calls.append(1) or kernel(step))
        patch.setattr(plain_torch, "gossip_step", lambda step: pytest.fail("a step outside the compiled kernel"))
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *texts, **_: printed.extend(map(str, texts)))
        methods = {label: demo.METHODS[label] for label in ("DSGD", "GUT")}
        groups = demo.demo(folder, methods, SEEDS)
    return folder, groups, "\n".join(printed), len(calls)


def test_every_step_went_through_the_compiled_kernel(reduced):
    _, groups, printed, calls = reduced
    steps = sum(run.experiment.steps for runs in groups.values() for run in runs)
    assert calls >= steps == 2 * len(SEEDS) * 400
    assert "compiled kernel = reference, 2 methods" in printed


def test_methods_differ_in_rule_and_learning_rate_alone():
    for method in demo.METHODS.values():
        same = {"rule": "dsgd", "hyperparameters": {}, "lr": 0.1}
        assert replace(method, **same) == replace(demo.METHODS["DSGD"], **same)
        assert method.backend == "cpu"
    control, published = demo.METHODS["QG-DSGDm β+μ (control)"], demo.METHODS["QG-GUTm"]
    total = published.hyperparameters["momentum"] + published.hyperparameters["mu"]
    assert control.rule == published.rule
    assert control.hyperparameters == {"momentum": pytest.approx(total), "mu": 0.0}
    assert control.lr == published.lr


def test_results_are_finite_and_of_the_seeds_asked_for(reduced):
    _, groups, _, _ = reduced
    for runs in groups.values():
        assert [run.experiment.seed for run in runs] == list(SEEDS)
        assert len({run.engine for run in runs}) == 1
        for run in runs:
            assert run.final["step"] == 400
            assert all(math.isfinite(value) for row in run.history for value in row.values())


def test_gut_is_more_than_a_point_above_dsgd(reduced):
    _, groups, printed, _ = reduced
    final = {label: [100 * run.final["test_accuracy"] for run in runs] for label, runs in groups.items()}
    differences = [gut - dsgd for gut, dsgd in zip(final["GUT"], final["DSGD"], strict=True)]
    assert statistics.mean(differences) >= 1.0
    better = sum(difference > 0 for difference in differences)
    expected = f"{statistics.mean(differences):+.1f} ± {statistics.stdev(differences):.1f} points"
    assert f"GUT − DSGD: {expected}, better on {better} of {len(SEEDS)} seeds" in printed


def test_picture_and_numbers_are_written(reduced):
    folder, groups, _, _ = reduced
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "demo.json").read_text())
    for label, runs in groups.items():
        written = content["methods"][label]
        assert [entry["history"] for entry in written] == [run.history for run in runs]
        assert [entry["experiment"]["seed"] for entry in written] == list(SEEDS)
    accuracies = {
        label: [entry["history"][-1]["test_accuracy"] for entry in entries]
        for label, entries in content["methods"].items()
    }
    assert content["paired differences in points"]["GUT − DSGD"] == pytest.approx(
        [100 * (gut - dsgd) for gut, dsgd in zip(accuracies["GUT"], accuracies["DSGD"], strict=True)]
    )
    assert content["versions"]["torch"]
    assert cpu.tier() in content["machine"]


def test_a_wrong_kernel_stops_the_demo(tmp_path, monkeypatch):
    for error in (2.1, math.nan):
        monkeypatch.setattr(lockstep, "compare", lambda *arguments, error=error, **options: error)
        with pytest.raises(RuntimeError, match="the compiled kernel disagrees with the reference: dsgd"):
            demo.demo(tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


def test_a_missing_kernel_is_said_loudly(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "why_missing", "it was not built")
    assert demo.main() == 1
    assert "THE COMPILED KERNEL IS MISSING" in (err := capsys.readouterr().err)
    assert "it was not built" in err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else name)
    assert demo.main() == 2
    assert capsys.readouterr().err == (
        'The demo cannot run: scikit-learn is not installed; install with: pip install "scikit-learn>=1.4"\n'
    )


def test_ctrl_c_ends_the_demo_without_a_traceback(monkeypatch, capsys):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    assert demo.main() == 130
    assert capsys.readouterr().err == "stopped\n"
