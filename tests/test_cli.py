"""The command line: help, errors in one line, training from the shell, topologies."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from rich.cells import cell_len

import gut_fast
from gut_fast import analysis, cli, topology
from gut_fast.cli import topology as topology_command
from gut_fast.kernels.backends import AUTOMATIC, cpu
from gut_fast.requirements import pip_install
from gut_fast.rules import RULES
from gut_fast.simulation import Simulator
from gut_fast.study import Experiment, runner
from gut_fast.study.results import read_results
from gut_fast.study.run import make_simulator, train
from gut_fast.study.sweep import read_sweep

QUICK = ("train", "--topology", "ring:4", "--steps", "12", "--eval-every", "4", "--engine", "vmap", "--threads", "1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gut_fast_command(capsys):
    """A function that runs the command and returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


# Help, version, info


def test_version_through_the_module():
    done = subprocess.run([sys.executable, "-m", "gut_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gut-fast {gut_fast.__version__}\n"
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_the_commands(gut_fast_command, arguments):
    code, out, err = gut_fast_command(*arguments)
    assert code == 0
    assert err == ""
    assert all(name in out for name in ("train", "topology", "info"))


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_a_group_by_itself_is_a_question_for_help(gut_fast_command, arguments):
    code, out, err = gut_fast_command("bench", *arguments)
    assert (code, err) == (0, "")
    assert "gut-fast bench [OPTIONS] COMMAND" in out
    assert "step" in out


@pytest.mark.parametrize("command", ["train", "sweep", "tune", "report", "topology", "verify", "info", "data"])
def test_every_command_has_a_short_option_for_help(gut_fast_command, command):
    code, out, _ = gut_fast_command(command, "-h")
    assert code == 0
    assert f"gut-fast {command}" in out


@pytest.mark.parametrize("command", [(), ("bench",), ("train",), ("topology",), ("bench", "step")])
def test_help_fits_a_narrow_terminal_and_cuts_no_name_off(gut_fast_command, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = gut_fast_command(*command, "-h")
    assert (code, err) == (0, "")
    assert max(map(cell_len, out.splitlines())) <= 40
    assert "…" not in out
    assert "--help" in out
    if command == ("train",):
        assert {"--classes-per-agent", "fashion-mnist-lenet5-ring16,", "--on-peer-failure"} <= set(out.split())


def test_shells_can_complete_the_commands(gut_fast_command):
    assert "--install-completion" in gut_fast_command("--help")[1]
    environment = {"_GUT_FAST_COMPLETE": "complete_bash", "COMP_WORDS": "gut-fast t", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gut_fast"], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.stdout.split() == ["train", "tune", "topology"]


def test_help_of_train_lists_names_from_the_tables(gut_fast_command):
    code, out, _ = gut_fast_command("train", "--help")
    words = out.replace("│", " ").replace(",", " ").replace(".", " ").split()
    assert code == 0
    assert set(RULES) <= set(words)
    assert {"digits", "mlp", "dirichlet-blocks", "vmap"} <= set(words)


def test_info_tells_what_there_is(gut_fast_command):
    code, out, _ = gut_fast_command("info")
    facts = {line[:18].strip(): line[18:].strip() for line in out.splitlines()}
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["backend cpu"] == "for tensors on cpu"
    assert facts["backend torch"] == "for tensors on cpu and cuda"
    assert facts["auto on cpu"] == "cpu"
    assert facts["auto on cuda"].split(";")[0] in AUTOMATIC["cuda"]
    assert facts["instruction tier"].startswith(f"{cpu.tier()} of ")
    assert facts["GPU"]
    assert facts["threads"] == "1"


def test_info_tells_why_the_kernel_is_missing(gut_fast_command, monkeypatch):
    monkeypatch.setattr(cpu, "why_missing", "it was not built")
    _, out, _ = gut_fast_command("info")
    assert "it was not built" in out


@pytest.mark.parametrize("package", ["typer", "rich", "pandas"])
def test_without_its_packages_the_command_says_what_to_install(gut_fast_command, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(("gut_fast.cli.", "gut_fast.study"))]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = gut_fast_command("info")
    assert code == 2
    assert out == ""
    assert err == f"gut-fast: error: {package} is not installed; install with: {pip_install(package)}\n"


# Errors


@pytest.mark.parametrize("stop", [KeyboardInterrupt, typer.Abort])
def test_a_command_that_ctrl_c_ends_has_the_exit_code_of_a_shell(gut_fast_command, monkeypatch, stop):
    def app(*_, **__):
        raise stop

    monkeypatch.setattr("gut_fast.cli.app.app", app)
    assert gut_fast_command("info") == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--speed", "1"], "No such option: --speed"),
        (["train", "--step", "1"], "No such option: --step; did you mean --steps?"),
        (["train", "--batchsize=3"], "No such option: --batchsize; did you mean --batch-size?"),
        (["train", "-lr", "1"], "No such option: -l; did you mean --lr?"),
        (["train", "--rule", "gutt"], "did you mean 'gut'?"),
        (["train", "--model", "lenet"], "did you mean 'lenet5'?"),
        (["train", "--data", "digit"], "did you mean 'digits'?"),
        (["train", "--topology", "rign:4"], "did you mean 'ring'?"),
        (["train", "--schedule", "cosin"], "unknown schedule 'cosin'; known are milestones, cosine"),
        (["train", "--schedule", "cosine", "--decay", "0.5"], "schedule 'cosine' has no use for decay"),
        (["train", "--warmup", "1.5"], "--warmup must be a fraction from 0 to below 1, or a number of steps"),
        (["train", "--max-grad-norm", "0"], "--max-grad-norm must be above 0"),
        (["train", "--on-peer-failure", "restart"], "--on-peer-failure restart needs --launch"),
        (
            ["train", "--launch", "2", "--on-peer-failure", "continue"],
            "--on-peer-failure continue is for",
        ),
        (["train", "--launch", "2", "--on-peer-failure", "restrat"], "did you mean 'restart'?"),
        (["train", "--inner", "adm"], "unknown inner optimizer 'adm'; known are "),
        (["train", "--inner", "lbfgs"], "LBFGS cannot make the local move: its step needs a closure"),
        (["train", "--inner", "adam", "--inner-set", "beta=1"], "Adam has no option 'beta'; did you mean 'betas'?"),
        (["train", "--inner-set", "eps=1"], "--inner-set {'eps': 1.0} need --inner, the optimizer that takes them"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "--lr", "nan"], "--lr nan is outside"),
        (["train", "--topology", "ring"], "expected ring:N, for example ring:16"),
        (["train", "--topology", "from-matrix:none.npy"], "none.npy"),
        (
            ["train", "--topology", "ring:2000"],
            "the number of agents of --topology, 2000, must be from 1 to the number of samples, 1400",
        ),
        (["train", "--gamma", "2"], "--gamma must be in (0, 1]"),
        (["train", "--rule", "sgd"], "unknown rule 'sgd'; known are dsgd, gut"),
        (["train", "--mu", "1.5"], "--mu 1.5 is outside [0, 1]"),
        (["train", "--rule", "dsgd", "--mu", "0.5"], "rule 'dsgd' has no hyper-parameter 'mu'"),
        (["train", "--set", "speed=1"], "no hyper-parameter 'speed'; it has: mu"),
        (["train", "--set", "mu"], "--set mu: expected NAME=VALUE, where VALUE is a number, true, false or auto"),
        (["train", "--set", "mu=much"], "'much' is not a number"),
        (["train", "--kappa", "much"], "'much' is not a number"),
        (["train", "--set", "momentum=auto", "--rule", "gutm"], "momentum must be a number, got str 'auto'"),
        (["train", "--inner", "adamw", "--inner-set", "eps=auto"], "'auto' is not a number"),
        (["train", "--kappa", "0.5", "--set", "kappa=0.5"], "'kappa' is given twice"),
        (["train", "--mu", "0.5", "--set", "mu=0.5"], "'mu' is given twice"),
        (["train", "--weight-decay", "-1"], "--weight-decay -1.0 is outside"),
        (["train", "--data", "letters"], "unknown data set 'letters'"),
        (["train", "--model", "vgg"], "unknown model 'vgg'"),
        (["train", "--model", "lenet5"], "lenet5 takes images (channels, 28, 28)"),
        (["train", "--partition", "fair"], "unknown partition 'fair'"),
        (["train", "--partition", "shards"], "'shards' needs --classes-per-agent"),
        (["train", "--partition", "iid", "--alpha", "1"], "there is no --alpha for rule 'gut' and partition 'iid'"),
        (["train", "--alpha", "0"], "--alpha 0.0 must be positive"),
        (["train", "--steps", "0"], "--steps must be at least 1"),
        (
            ["train", "--steps", "20", "--local-steps", "30"],
            "--local-steps 30 is more than --steps 20: the run would end",
        ),
        (["train", "--launch", "3"], "--launch 3: 16 agents cannot be shared out evenly over 3 processes"),
        (["train", "--launch", "0"], "Invalid value for '--launch'"),
        (["train", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["train", "--eval-every", "0"], "--eval-every must be at least 1"),
        (["train", "--milestones", "half"], "'half' is not a number"),
        (["train", "--seeds", "many"], "--seeds many: expected a count"),
        (["train", "--seeds", "0"], "--seeds 0: seeds must be how many, at least 1"),
        (["train", "--seeds", "1,1"], "--seeds 1,1: seeds must be from 0 to below 2^63 and none named twice"),
        (["train", "--engine", "warp"], "unknown engine 'warp'"),
        (["train", "--backend", "gpu"], "unknown backend 'gpu'"),
        (["train", "--state-dtype", "int8"], "--state-dtype must be a floating dtype of torch, such as bfloat16"),
        (["train", "--state-dtype", "float64"], "the state is torch.float64; for parameters of torch.float32"),
        (["train", "--autocast", "float16"], "autocast must be torch.bfloat16 or None, got torch.float16"),
        (["train", "--device", "tpu"], "device 'tpu' cannot be used: "),
        (["train", "--threads", "0"], "Invalid value for '--threads'"),
        (["train", "--resume"], "outputs/train holds no experiment"),
        (["topology"], "Missing argument 'SPEC'"),
        (["topology", "ring:4", "--bandwidth", "1Gbit"], "--bandwidth has no effect without --network; add that, or"),
        (["topology", "ring:4", "--runs", "/nope"], "--runs has no effect without --network"),
        (["topology", "ring:4", "--network", "--sizes", "16"], "--sizes has no effect without --out"),
        (["topology", "ring:4", "--network", "--accuracy", "0.5"], "--accuracy has no effect without --runs"),
        (
            ["topology", "ring:4", "--network", "--straggler-factor", "2"],
            "--straggler-factor has no effect without --straggler-probability",
        ),
        (
            ["topology", "ring:4", "--network", "--link-straggler-probability", "0.5"],
            "--link-straggler-probability has no effect without --link-straggler-factor",
        ),
        (["topology", "ring:4", "--network", "--lr", "1"], "--lr has no effect with --network; leave one of them out"),
        (["verify", "--backend", "torch", "--tier", "scalar"], "--tier has no effect without the backend cpu"),
        (["topology", "torus:4"], "expected torus:ROWSxCOLS"),
        (["topology", "ring:4", "--out", "ring.jpg"], "expected the name of a PNG file"),
        (["topology", "ring:4", "--out", "none/ring.png"], "there is no folder none"),
        (["topology", "ring:99999999999"], "99,999,999,999 agents are too many, the command takes at most 100,000"),
        (["topology", "hypercube:60"], "2^60 agents are too many"),
        (["topology", "chain:10001"], "chain(10001) has 10,001 agents; the spectrum of such a graph"),
        (["train", "--seeds", "99999999999999999999"], "expected at most 10,000 seeds, got 99,999"),
        (["train", "--seeds", "1000000000"], "expected at most 10,000 seeds"),
        (["train", "--seeds", "1,9223372036854775808"], "seeds must be from 0 to below 2^63"),
        (["train", "--batch-size", "100000000"], "--batch-size 100000000 is more than 100 times the samples of any"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(gut_fast_command, tmp_path, arguments, message):
    code, out, err = gut_fast_command(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("gut-fast: error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("empty.npy", "", "empty.npy cannot be read as a matrix"),
        ("empty.txt", "", "empty.txt cannot be read as a matrix"),
        ("bad.graphml", "<graphml", "bad.graphml cannot be read as a graph"),
    ],
)
def test_bad_files_are_one_line(gut_fast_command, tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    form = "from-networkx" if file.endswith("graphml") else "from-matrix"
    code, _, err = gut_fast_command("topology", f"{form}:{file}")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_place_that_cannot_be_written_is_told_before_the_work(gut_fast_command, tmp_path, monkeypatch):
    (tmp_path / "run" / "summary.csv").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    places = {"run": "run/summary.csv is a folder", "file": "file is not a folder"}
    for place, message in places.items():
        code, out, err = gut_fast_command(*QUICK, "--out", place)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    code, out, err = gut_fast_command("topology", "ring:4", "--out", "folder.png")
    assert (code, out, err) == (
        2,
        "",
        "gut-fast: error: --out folder.png: this is a folder, expected the name of a file\n",
    )
    monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
    (tmp_path / "new").mkdir()
    for arguments in (
        (*QUICK, "--out", "new"),
        (*QUICK, "--out", "new/and/deeper"),
        ("topology", "ring:4", "--out", "ring.png"),
    ):
        code, out, err = gut_fast_command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "no permission to write" in err


def test_a_picture_that_cannot_be_written_after_all_is_one_line(gut_fast_command, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(topology_command.graph_pictures, "draw_topology", full)
    code, _, err = gut_fast_command("topology", "ring:4", "--out", "ring.png")
    assert (code, err) == (1, "gut-fast: error: cannot write: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("entry", ["topology: 5", "steps: x", "hyperparameters: [1]", "channels_last: 1"])
def test_a_folder_whose_file_has_wrong_types_is_one_line(gut_fast_command, tmp_path, entry):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sweep.yaml").write_text(f"settings: {{{entry}}}\nmethods: {{gut: {{rule: gut}}}}\n")
    code, _, err = gut_fast_command("train", "--out", "run", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert f"run/sweep.yaml: method 'gut': {entry.split(':')[0]} must" in err


def test_a_folder_of_an_earlier_version_or_a_sweep_is_not_continued(gut_fast_command, tmp_path):
    (tmp_path / "old" / "seed-0").mkdir(parents=True)
    (tmp_path / "old" / "seed-0" / "config.json").write_text("{}")
    code, _, err = gut_fast_command("train", "--out", "old", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "old is of an earlier version of gut_fast, which kept seed-*/config.json" in err
    code, _, err = gut_fast_command(*QUICK, "--out", "old")
    assert "old holds an experiment already" in err
    (tmp_path / "sweep.yaml").write_text("methods: {gut: {rule: gut}, d2: {rule: d2}}\n")
    code, _, err = gut_fast_command("train", "--out", ".", "--resume")
    assert "sweep.yaml is of several methods or points; go on with: gut-fast sweep sweep.yaml --out ." in err


def test_a_wrong_tier_is_an_error_and_not_a_slow_run(gut_fast_command, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "why_missing", "environment variable GUT_FAST_TIER: there is no 'x'")
    code, out, err = gut_fast_command(*QUICK)
    assert (code, out, err) == (2, "", "gut-fast: error: environment variable GUT_FAST_TIER: there is no 'x'\n")
    assert not list(tmp_path.iterdir())
    _, out, _ = gut_fast_command("info")
    assert "GUT_FAST_TIER is wrong" in " ".join(out.split())
    assert "kernel missing" not in " ".join(out.split())


def test_train_names_the_backend_in_use(gut_fast_command):
    _, out, _ = gut_fast_command(*QUICK, "--backend", "torch")
    assert out.startswith("gut on ring(4), backend torch\n")


def test_the_kernel_asked_for_but_missing_is_an_error(gut_fast_command, monkeypatch):
    from gut_fast.kernels import ops

    ops.select_backend.cache_clear()
    monkeypatch.setattr(cpu, "why_missing", "it was not built")
    code, _, err = gut_fast_command(*QUICK, "--backend", "cpu")
    ops.select_backend.cache_clear()
    assert code == 2
    assert "backend 'cpu' is not available: it was not built" in err


def test_a_bug_in_a_run_is_told_with_its_place(gut_fast_command, monkeypatch):
    def evaluate(simulator):
        raise ValueError("a bug")

    monkeypatch.setattr(Simulator, "evaluate", evaluate)
    code, _, err = gut_fast_command(*QUICK, "--seeds", "2")
    assert code == 1
    assert "1/2  gut, seed 0 FAILED: ValueError: a bug (test_cli.py, line " in err
    assert "2 runs failed; try them again with: gut-fast train --out outputs/train --resume" in err


# Training


def test_train_writes_results_tables_checkpoints_and_a_picture(gut_fast_command, tmp_path):
    code, out, _ = gut_fast_command(
        *QUICK, "--rule", "gutm", "--set", "momentum=0.8", "--mu", "0.4", "--seeds", "5,3", "--out", "runs/a"
    )
    folder = tmp_path / "runs" / "a"
    assert code == 0
    assert out.startswith("gutm on ring(4), backend cpu\n")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results, tasks = read_results(folder), read_sweep(folder / "sweep.yaml").tasks()
    history, summary = (pd.read_csv(folder / name) for name in ("history.csv", "summary.csv"))
    assert [task.experiment.seed for task in tasks] == [5, 3]
    for task in tasks:
        run = results.run(task.name)
        assert (run.experiment.rule, run.experiment.hyperparameters) == ("gutm", {"momentum": 0.8, "mu": 0.4})
        assert [row["step"] for row in run.history] == [4, 8, 12]
        rows = history[history["seed"] == task.experiment.seed].drop(columns="seed").to_dict("records")
        assert rows == [pytest.approx(row) for row in run.history]
        checkpoint = torch.load(runner.checkpoint_of(folder, task))
        assert (checkpoint["step"], checkpoint["history"]) == (12, run.history)
        assert f"{100 * run.final['test_accuracy']:.1f}" in out
    final = [results.run(task.name).final["test_accuracy"] for task in tasks]
    assert f"{50 * sum(final):.1f} ±" in out
    assert list(summary["seed"]) == [5, 3]
    assert list(summary["test_accuracy"]) == pytest.approx(final)


def test_options_of_train_become_the_experiment(gut_fast_command, tmp_path):
    code, _, _ = gut_fast_command(
        *("train", "--topology", "torus:2x3", "--gamma", "0.5", "--rule", "dsgdm", "--nesterov", "--lr", "0.2"),
        *("--weight-decay", "0.01", "--partition", "shards", "--classes-per-agent", "2", "--batch-size", "8"),
        *("--steps", "2", "--milestones", "", "--decay", "0.5", "--engine", "loop", "--backend", "torch"),
        *("--seeds", "7,", "--threads", "1", "--state-dtype", "bfloat16", "--device", "cpu"),
        *("--local-steps", "2", "--wire-dtype", "int4", "--wire-seed", "3"),
        *("--autocast", "bfloat16", "--augment", "--channels-last"),
    )
    assert code == 0
    (task,) = read_sweep(tmp_path / "outputs" / "train" / "sweep.yaml").tasks()
    assert task.experiment == Experiment(
        topology="torus:2x3",
        gamma=0.5,
        rule="dsgdm",
        hyperparameters={"nesterov": True},
        lr=0.2,
        weight_decay=0.01,
        partition="shards",
        partition_options={"classes_per_agent": 2},
        batch_size=8,
        steps=2,
        milestones=(),
        decay=0.5,
        eval_every=1,
        engine="loop",
        backend="torch",
        state_dtype="bfloat16",
        local_steps=2,
        wire_dtype="int4",
        wire_seed=3,
        autocast="bfloat16",
        channels_last=True,
        augment=True,
        seed=7,
    )


def interrupt_at(monkeypatch, step):
    """Ctrl-C during the evaluation after this step."""
    evaluate = Simulator.evaluate

    def interrupting(simulator):
        if simulator.step == step:
            signal.raise_signal(signal.SIGINT)
        return evaluate(simulator)

    monkeypatch.setattr(Simulator, "evaluate", interrupting)


def test_interrupted_training_says_how_to_go_on_and_does(gut_fast_command, tmp_path, monkeypatch):
    whole = (*QUICK, "--seeds", "2", "--rule", "d2")
    gut_fast_command(*whole, "--out", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        code, _, err = gut_fast_command(*whole, "--out", "parts")
    assert code == 130
    assert "0/2  d2, seed 0: stopped after step 8\n" in err
    assert "stopped; go on with: gut-fast train --out parts --resume\n" in err
    code, _, err = gut_fast_command("train", "--out", "parts", "--resume", "--threads", "1")
    assert code == 0
    assert "0/2  d2, seed 0: goes on from step 8" in err
    assert "d2, seed 1: goes on" not in err
    assert_same_folders(tmp_path / "parts", tmp_path / "whole")
    for task in read_sweep("whole/sweep.yaml").tasks():
        first, second = (torch.load(runner.checkpoint_of(tmp_path / name, task)) for name in ("whole", "parts"))
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def assert_same_folders(one, other):
    for name in ("history.csv", "summary.csv", "sweep.yaml"):
        assert (one / name).read_text() == (other / name).read_text()


LAUNCHED = ("train", "--topology", "ring:4", "--eval-every", "20", "--engine", "loop", "--threads", "1")


@pytest.fixture
def launching_command(capfd, own_forkserver):
    """As `gut_fast_command`, with what the processes print that it starts."""

    def run(*arguments):
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def once_there(folder, pattern, act):
    """Does it as soon as there is such a file in the folder, or never."""

    def wait():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(folder.glob(pattern)):
                act()
                break
            time.sleep(0.01)

    threading.Thread(target=wait, daemon=True).start()


def test_launched_processes_end_where_one_does_and_go_on_after_ctrl_c(launching_command, tmp_path):
    launching_command(*LAUNCHED, "--steps", "300", "--out", "whole")
    parts = tmp_path / "parts"
    once_there(parts, "checkpoints/*/*/rank-1.pt", lambda: os.kill(os.getpid(), signal.SIGINT))
    code, _, err = launching_command(*LAUNCHED, "--steps", "300", "--out", "parts", "--launch", "2")
    assert code == 130
    assert "gut, seed 0: stopped after step " in err
    assert "go on with: gut-fast train --out parts --resume --launch 2" in err
    code, _, err = launching_command("train", "--out", "parts", "--resume")
    assert code == 2
    assert "was written with --launch 2; go on with --launch 2" in err
    code, _, err = launching_command("train", "--out", "parts", "--resume", "--threads", "1", "--launch", "2")
    assert code == 0
    assert "gut, seed 0: goes on from step " in err
    assert_same_folders(parts, tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_a_word(launching_command, tmp_path, children):
    started = []

    def kill():
        started.extend(children())
        next(process for process in started if process.name == "rank 1").kill()

    once_there(tmp_path / "run", "checkpoints/*/*/rank-1.pt", kill)
    code, _, err = launching_command(*LAUNCHED, "--steps", "100000", "--out", "run", "--launch", "2")
    assert code == 2
    assert "gut-fast: error: rank 1 was killed by SIGKILL, or ran out of memory; the other ranks have been ended" in err
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)


def test_killed_ranks_start_again_from_the_checkpoint(launching_command, tmp_path, children):
    def kill():
        next(process for process in children() if process.name == "rank 1").kill()

    launching_command(*LAUNCHED, "--steps", "400", "--out", "whole")
    once_there(tmp_path / "run", "checkpoints/*/*/rank-1.pt", kill)
    options = ("--steps", "400", "--launch", "2", "--on-peer-failure", "restart")
    code, _, err = launching_command(*LAUNCHED, "--out", "run", *options)
    assert code == 0
    assert "rank 1 was killed by SIGKILL" in err
    assert "restart 1 of at most 3" in err
    assert_same_folders(tmp_path / "run", tmp_path / "whole")


def test_a_folder_is_not_overwritten_and_resume_takes_no_other_settings(gut_fast_command, tmp_path):
    gut_fast_command(*QUICK, "--out", "run")
    before = (tmp_path / "run" / "runs.csv.zst").read_bytes()
    code, _, err = gut_fast_command(*QUICK, "--out", "run", "--lr", "0.5")
    assert (code, err) == (
        2,
        "gut-fast: error: run holds an experiment already; continue it with --resume, or name another --out\n",
    )
    code, _, err = gut_fast_command("train", "--out", "run", "--resume", "--lr", "0.5", "--seeds", "3")
    assert (code, err) == (
        2,
        "gut-fast: error: --resume goes on with the settings in the folder; leave out --lr, --seeds\n",
    )
    code, out, _ = gut_fast_command("train", "--out", "run", "--resume")
    assert code == 0
    assert "test accuracy" in out
    assert (tmp_path / "run" / "runs.csv.zst").read_bytes() == before


def test_unstable_settings_warn_once_in_a_line_and_train(gut_fast_command):
    code, out, err = gut_fast_command(
        *("train", "--topology", "torus:4x4", "--steps", "2", "--engine", "vmap", "--threads", "1", "--seeds", "2")
    )
    warnings = [line for line in err.splitlines() if line.startswith("gut-fast: warning: ")]
    assert code == 0
    assert len(warnings) == 1
    assert "unstable on torus(4, 4)" in warnings[0]
    assert "mu <= 0.333" in warnings[0]
    assert "curves.png" in out


def test_the_warning_is_about_rounds_of_local_steps(gut_fast_command):
    options = ("--topology", "torus:4x4", "--steps", "4", "--local-steps", "4", "--engine", "vmap", "--threads", "1")
    code, _, err = gut_fast_command("train", *options)
    assert code == 0
    growth = re.search(r"grows .*-fold a step", analysis.advice("gut", {}, topology.torus(4, 4), local_steps=4))
    assert growth[0] in err
    assert growth[0] not in analysis.advice("gut", {}, topology.torus(4, 4))


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (("--kappa", "auto"), {"kappa": "auto"}),
        (("--set", "kappa=auto"), {"kappa": "auto"}),
        (("--kappa", "auto", "--set", "mu=auto"), {"mu": "auto", "kappa": "auto"}),
        (("--mu", "auto", "--kappa", "0.5"), {"mu": "auto", "kappa": 0.5}),
    ],
)
def test_kappa_and_mu_may_be_chosen_for_the_topology(gut_fast_command, options, given):
    """They are the numbers that an optimizer of so many local steps would choose."""
    code, _, _ = gut_fast_command(*QUICK, "--topology", "torus:2x2", "--local-steps", "3", *options, "--out", "run")
    assert code == 0
    (task,) = read_sweep("run/sweep.yaml").tasks()
    chosen = analysis.with_auto("gut", {"mu": 0.9, "kappa": 1.0, **given}, topology.torus(2, 2), 3)
    assert task.experiment.hyperparameters == chosen


def test_divergence_is_told(gut_fast_command):
    code, _, err = gut_fast_command(*QUICK, "--lr", "1e30", "--milestones", "")
    assert code == 0
    assert "4 agents had a loss of NaN or infinity" in err


def test_a_rule_may_be_spelt_in_several_ways(gut_fast_command):
    for number, rule in enumerate(("qg_gutm", "QG-GUTm", "qg-gutm")):
        code, out, _ = gut_fast_command(*QUICK, "--rule", rule, "--out", str(number))
        assert code == 0
        assert out.startswith("qg_gutm on ring(4)")
    assert len({(Path(f"{number}") / "sweep.yaml").read_text() for number in range(3)}) == 1


def test_rounds_codes_and_mixed_state_of_a_run(gut_fast_command):
    options = ("--local-steps", "4", "--wire-dtype", "int4", "--inner", "adamw", "--mix-state", "exp_avg_sq")
    code, _, _ = gut_fast_command(*QUICK, *options, "--output", "run")
    assert code == 0
    (task,) = read_sweep("run/sweep.yaml").tasks()
    optimizer = make_simulator(task.experiment).optimizer
    assert (optimizer.local_steps, optimizer.wire_dtype, optimizer.mix_state) == (4, "int4", ("exp_avg_sq",))
    code, _, err = gut_fast_command(*QUICK, "--mix-state", "exp_avg_sq")
    assert code == 2
    assert "--mix-state 'exp_avg_sq' needs --inner" in err


def test_schedule_clipping_and_inner_optimizer_of_a_run(gut_fast_command):
    options = ("--schedule", "cosine", "--warmup", "4", "--max-grad-norm", "0.5", "--inner", "adamw", "--inner_set")
    code, _, _ = gut_fast_command(*QUICK, *options, "betas=0.8,0.9", "--output", "run")
    assert code == 0
    (task,) = read_sweep("run/sweep.yaml").tasks()
    experiment = task.experiment
    assert (experiment.inner, experiment.inner_options, experiment.lr) == ("AdamW", {"betas": [0.8, 0.9]}, 0.001)
    assert (experiment.schedule, experiment.warmup, experiment.max_grad_norm) == ("cosine", 4.0, 0.5)
    simulator = make_simulator(experiment)
    assert list(simulator.optimizer.inner.defaults["betas"]) == [0.8, 0.9]
    lrs = [row["lr"] for row in train(experiment, simulator, progress=False).history]
    assert lrs == pytest.approx([0.001, *(0.0005 * (1 + math.cos(math.pi * place / 8)) for place in (3, 7))])


def test_gradients_are_clipped_before_the_step(gut_fast_command):
    """With gradients of at most a millionth nothing is learned."""
    simulators = [make_simulator(Experiment(topology="ring:4", steps=2, max_grad_norm=norm)) for norm in (None, 1e-6)]
    before = simulators[0].stacked.values.clone()
    moved = []
    for simulator in simulators:
        simulator.run(2, progress=False)
        moved.append((simulator.stacked.values - before).abs().max().item())
    assert moved[0] > 1e-3
    assert 0 < moved[1] < 1e-6


@pytest.mark.parametrize("command", ["topology torus:2x2", "topology ring:4 --network", "info", "data digits", "train"])
def test_json_is_one_document_alone_on_stdout(gut_fast_command, command):
    arguments = QUICK if command == "train" else command.split()
    code, out, _ = gut_fast_command(*arguments, "--json")
    assert code == 0
    document = json.loads(out, parse_constant=pytest.fail)
    if command == "train":
        assert [row["step"] for row in document["runs"][0]["history"]] == [4, 8, 12]
        code, out, _ = gut_fast_command("report", "outputs/train", "--json")
        assert code == 0
        report = json.loads(out, parse_constant=pytest.fail)
        assert report["methods"][0]["test_accuracy_mean"] == pytest.approx(
            100 * document["runs"][0]["final"]["test_accuracy"]
        )
    elif command.startswith("topology torus"):
        assert document["rules"]["gut"]["mu_limit"] == pytest.approx(
            analysis.stability_limit("gut", topology.torus(2, 2))
        )
    elif command == "data digits":
        assert sum(map(sum, document["samples_per_class"])) == document["training_samples"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_pictures_need_no_backend_for_windows(tmp_path, backend):
    """A notebook exports its backend to the processes that it starts, whether they have it or not."""
    done = subprocess.run(
        [sys.executable, "-m", "gut_fast", "topology", "ring:4", "--out", "ring.png"],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": backend},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "ring.png").exists()


def test_whoever_reads_the_output_may_leave():
    """As head does: one line, no traceback, and no run that is lost."""
    arguments = [sys.executable, "-m", "gut_fast", *QUICK]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err.splitlines()[-1] == "gut-fast: error: cannot write: the output was closed"
    assert "Traceback" not in err


def test_a_closed_stderr_is_no_reason_to_stop_and_a_closed_stdout_is_one_not_to_begin(tmp_path):
    def run(closed):
        command = f"{sys.executable} -m gut_fast {' '.join(QUICK)} {closed}"
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True)

    assert run("1>&-").returncode == 1
    assert not (tmp_path / "outputs").exists()
    done = run("2>&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "outputs" / "train" / "curves.png").exists()


# Topologies


def test_topology_prints_spectrum_and_stability(gut_fast_command, tmp_path):
    code, out, err = gut_fast_command("topology", "torus:4x4", "--out", "torus.png")
    stable, _, _ = out.partition('With mu="auto"')
    rows = {words[0]: words[1:] for line in stable.splitlines() if (words := line.split())}
    torus = topology.torus(4, 4)
    assert (code, err) == (0, "")
    assert (rows["agents"], rows["edges"], rows["degree"]) == (["16"], ["32"], ["4"])
    assert (rows["λ₂"], rows["λ_min"]) == (["0.600000"], ["-0.600000"])
    assert rows["spectral"] == ["gap", "0.400000"]
    assert rows["gut"][-1] == "0.3333"
    assert rows["gutm"][-1] == f"{analysis.stability_limit('gutm', torus):.4f}"
    assert "unstable" in rows["gut"]
    for name, rule in RULES.items():
        assert analysis.stability(rule, rule.hyperparameters, torus).verdict in rows[name]
        assert (rows[name][-1] == "n/a") == ("mu" not in rule.hyperparameters)
    assert (tmp_path / "torus.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["topology torus:4x4", "data digits", "info", "topology ring:4 --network", "train"])
def test_a_narrow_terminal_cuts_and_breaks_no_number(gut_fast_command, monkeypatch, command):
    """Rows that are too wide become lines of a name and a value; their words are those of the wide table."""
    arguments = [*QUICK, "--seeds", "2"] if command == "train" else command.split()
    _, wide, _ = gut_fast_command(*arguments, *(["--out", "wide"] if command == "train" else []))
    monkeypatch.setenv("COLUMNS", "40")
    _, narrow, _ = gut_fast_command(*arguments, *(["--out", "narrow"] if command == "train" else []))
    assert max(map(cell_len, narrow.splitlines())) <= 40
    assert max(map(cell_len, wide.splitlines())) > 40
    numbers = [word for word in wide.split() if re.fullmatch(r"[\d.e+-]*\d", word)]
    assert set(numbers) <= set(narrow.split())


def test_a_row_of_a_narrow_table_is_told_by_names(gut_fast_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    _, out, _ = gut_fast_command("topology", "torus:4x4")
    torus = topology.torus(4, 4)
    rows = dict(re.findall(r"^rule (\w+)\n((?:  .*\n)+)", out.partition('With mu="auto"')[0], re.MULTILINE))
    assert list(rows) == list(RULES)
    for name, lines in rows.items():
        result = analysis.stability(name, RULES[name].hyperparameters, torus)
        facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines.splitlines() if line[2] != " ")
        assert (facts["verdict"], facts["per step"]) == (result.verdict, f"× {result.consensus_rate:.4f}")


def test_output_that_is_not_utf_8_has_question_marks():
    done = subprocess.run(
        [sys.executable, "-m", "gut_fast", "topology", "ring:8"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert b"?_min         -0.333333" in done.stdout


def test_lazy_weights_move_the_limit(gut_fast_command):
    _, out, _ = gut_fast_command("topology", "torus:4x4", "--gamma", "0.5")
    assert "torus(4, 4).lazy(0.5)" in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["gut"])
    assert row.split()[-1] == "1.0000"


def test_a_topology_is_shown_for_rounds_of_local_steps(gut_fast_command):
    code, out, _ = gut_fast_command("topology", "ring:4", "--local-steps", "3", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["local_steps"] == 3
    for name in ("gut", "gutm", "gradient_tracking"):
        own = {**RULES[name].hyperparameters, "lr": 0.1}
        expected = analysis.predict(name, own, topology.ring(4), 1.0, local_steps=3)
        assert found["rules"][name]["consensus_rate"] == expected.stability.consensus_rate
        if expected.auto_mu is not None:
            assert found["rules"][name]["with_auto_mu"]["mu"] == expected.auto_mu
    code, out, _ = gut_fast_command("topology", "ring:4", "--network", "--local-steps", "3")
    assert code == 0
    assert "A step, where one in 3 sends messages" in out
    code, _, err = gut_fast_command("topology", "ring:4", "--local-steps", "0")
    assert code == 2
    assert "--local-steps" in err


def test_topology_that_varies_has_no_spectrum(gut_fast_command):
    code, out, _ = gut_fast_command("topology", "sequence:ring:4+star:4")
    assert code == 0
    assert "sequence([ring(4), star(4)])" in out
    assert "repeats after 2 steps" in out
    assert "λ₂" not in out
    _, out, _ = gut_fast_command("topology", "random-matching:4:0")
    assert "never repeats" in out
    _, out, _ = gut_fast_command("topology", "one-peer-exponential:8")
    assert "24, directed" in out


def test_asymmetric_matrix_warns_in_a_line(gut_fast_command):
    np.savetxt("W.csv", [[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]], delimiter=",")
    code, out, err = gut_fast_command("topology", "from-matrix:W.csv")
    assert code == 0
    assert err.startswith("gut-fast: warning: ")
    assert err.count("\n") == 1
    assert "3, directed" in out
