"""Tasks that become finished runs, stopped and killed and continued; the commands sweep and tune."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from rich.console import Console

from gut_fast import cli
from gut_fast.cli import sweep_progress
from gut_fast.simulation import Simulator
from gut_fast.study import Run, make_simulator, train
from gut_fast.study.results import LINES, append_run, finished_runs, lines_of, read_results
from gut_fast.study.runner import (
    Failure,
    check_no_others,
    checkpoint_of,
    run_here,
    run_in_processes,
    run_missing,
    sole_user,
    unfinished,
)
from gut_fast.study.sweep import make_sweep, read_sweep
from gut_fast.study.yaml_files import read_yaml, write_yaml

SETTINGS = {"topology": "ring:4", "model": "mlp:8", "engine": "loop", "steps": 10, "eval_every": 5, "alpha": 0.1}
LONG = {**SETTINGS, "steps": 600, "eval_every": 20}
METHODS = {"GUT": {"rule": "gut", "mu": 0.5}, "D2": {"rule": "d2"}}
SECONDS = 120


@pytest.fixture
def gut_fast(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return code, out, err

    return run


class Watching:
    """A watcher that takes down what it is told, and does something while a run is at work."""

    def __init__(self, act=lambda task: None):
        self._act = act
        self.ended, self.failures, self.steps = [], [], {}

    def working(self, task, step, row=None):
        self.steps[task.name] = step
        self._act(task)

    def finished(self, task, run):
        self.ended.append((task.name, run.seconds))

    def failed(self, failure):
        self.failures.append(failure)


def tasks_of(settings=SETTINGS, methods=METHODS, **sections):
    return make_sweep({"settings": settings, "methods": methods, **sections}).tasks()


def run_all_here(tasks, folder, watcher=None, **options):
    return run_missing(tasks, folder, partial(run_here, folder=folder, watcher=watcher or Watching()), **options)


def run_all_in_processes(tasks, folder, watcher, jobs):
    run = partial(run_in_processes, folder=folder, watcher=watcher, jobs=jobs, threads=1)
    return run_missing(tasks, folder, run)


def rows_of(task):
    """The history of an uninterrupted run."""
    return train(task.experiment, make_simulator(task.experiment), progress=False).history


def stored_rows(folder, task):
    """The history of the finished run in the folder."""
    return read_results(folder).run(task.name).history


def interrupt_at(monkeypatch, step, signals=1):
    """Presses Ctrl-C during the evaluation after this step."""
    evaluate = Simulator.evaluate

    def interrupting(simulator):
        if simulator.step == step:
            signal.raise_signal(signal.SIGINT)
        return evaluate(simulator)

    monkeypatch.setattr(Simulator, "evaluate", interrupting)


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_to_the_same_history(tmp_path, monkeypatch):
    tasks = tasks_of()
    first, second = tasks
    watcher = Watching()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_all_here(tasks, tmp_path, watcher)
    assert watcher.steps == {first.name: 5}
    assert unfinished(tasks, tmp_path) == tasks
    seconds = tmp_path / "checkpoints" / f"{first.name}.seconds"
    assert float(seconds.read_text()) > 0
    seconds.write_text("1000")
    assert run_all_here(tasks, tmp_path, watcher) == []
    assert [name for name, _ in watcher.ended] == [first.name, second.name]
    assert 1000 < watcher.ended[0][1] < 1000 + SECONDS
    assert [file.name for file in tmp_path.iterdir()] == ["runs.csv.zst"]
    assert [stored_rows(tmp_path, task) for task in tasks] == [rows_of(task) for task in tasks]
    before = (tmp_path / "runs.csv.zst").read_bytes()
    assert run_all_here(tasks, tmp_path, watcher) == []
    assert (tmp_path / "runs.csv.zst").read_bytes() == before
    assert len(watcher.ended) == 2


def test_after_a_killed_worker_and_ctrl_c_the_sweep_goes_on_to_the_same_histories(tmp_path, children):
    first, second, broken = tasks = tasks_of(LONG, {**METHODS, "broken": {"rule": "dsgd"}})
    killed, interrupted = [], []

    def kill_the_first_and_interrupt_the_second(task):
        if task == first and checkpoint_of(tmp_path, first).exists() and not killed:
            (worker,) = children()
            killed.append(worker)
            os.kill(worker.pid, signal.SIGKILL)
        if task == second and checkpoint_of(tmp_path, second).exists() and not interrupted:
            interrupted.append(task)
            signal.raise_signal(signal.SIGINT)

    watcher = Watching(kill_the_first_and_interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_all_in_processes(tasks, tmp_path, watcher, jobs=1)
    assert watcher.failures == [Failure(first, "its process was killed, or ran out of memory")]
    assert unfinished(tasks, tmp_path) == tasks
    assert children() == []

    checkpoint_of(tmp_path, broken).write_bytes(b"not a checkpoint")
    watcher = Watching()
    (failure,) = run_all_in_processes(tasks, tmp_path, watcher, jobs=2)
    assert failure.task == broken
    assert "cannot be read as a checkpoint" in failure.reason
    assert (tmp_path / LINES).exists()
    assert unfinished(tasks, tmp_path) == [broken]
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == [checkpoint_of(tmp_path, broken).name]
    assert [stored_rows(tmp_path, task) for task in tasks[:2]] == [rows_of(task) for task in tasks[:2]]


def test_a_process_takes_one_task_after_another_and_runs_do_not_depend_on_that(tmp_path, children):
    tasks = tasks_of(seeds=2)
    seen = set()
    watcher = Watching(lambda task: seen.update(child.pid for child in children()))
    assert run_all_in_processes(tasks, tmp_path, watcher, jobs=1) == []
    assert len(seen) == 1
    assert children() == []
    assert [name for name, _ in watcher.ended] == [task.name for task in tasks]
    assert [stored_rows(tmp_path, task) for task in tasks] == [rows_of(task) for task in tasks]


def test_a_process_that_dies_between_two_tasks_is_replaced(tmp_path, children):
    tasks = tasks_of(seeds=2)
    killed = []

    class Killing(Watching):
        def finished(self, task, run):
            super().finished(task, run)
            if not killed:
                (worker,) = children()
                killed.append(worker)
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()

    watcher = Killing()
    assert run_all_in_processes(tasks, tmp_path, watcher, jobs=1) == []
    assert [name for name, _ in watcher.ended] == [task.name for task in tasks]


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_sweep_leaves_no_process_and_goes_on_to_the_same_histories(tmp_path, jobs):
    write_yaml({"methods": METHODS, "settings": LONG}, tmp_path / "sweep.yaml")
    first, *_ = tasks = read_sweep(tmp_path / "sweep.yaml").tasks()
    arguments = [sys.executable, "-m", "gut_fast", "sweep", "sweep.yaml", "--out", ".", "--jobs", str(jobs)]
    sweep = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(checkpoint_of(tmp_path, first).exists)
    sweep.kill()
    # Its processes have its stderr too: the end of that is the end of them all.
    sweep.communicate(timeout=SECONDS)
    assert sweep.returncode == -signal.SIGKILL
    assert first in unfinished(tasks, tmp_path)
    assert run_all_here(tasks, tmp_path) == []
    assert [stored_rows(tmp_path, task) for task in tasks] == [rows_of(task) for task in tasks]


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_finished_runs_go_unless_they_are_to_be_kept(tmp_path, keep):
    (task,) = tasks_of(methods={"GUT": {"rule": "gut"}})
    run = Run(task.experiment, [{"step": 10}], "loop", 1.0)
    append_run(tmp_path, lines_of(task, run) + lines_of(task, run)[:-9])
    checkpoint = checkpoint_of(tmp_path, task)
    checkpoint.parent.mkdir()
    for name in (checkpoint.name, f".{checkpoint.name}.123.tmp", f"{task.name}.seconds"):
        (checkpoint.parent / name).touch()
    assert run_all_here([task], tmp_path, keep_checkpoints=keep) == []
    assert [file.name for file in tmp_path.glob("checkpoints/*")] == [checkpoint.name] * keep
    assert {file.name for file in tmp_path.iterdir()} == {"runs.csv.zst"} | ({"checkpoints"} if keep else set())
    assert finished_runs(tmp_path) == {task.name}


def test_only_one_sweep_at_a_time_is_in_a_folder(tmp_path, gut_fast):
    write_yaml({"methods": METHODS, "settings": SETTINGS}, tmp_path / "sweep.yaml")
    with sole_user(tmp_path):
        with pytest.raises(BlockingIOError, match="another process is at work in"), sole_user(tmp_path):
            pass
        code, out, err = gut_fast("sweep", "sweep.yaml", "--out", ".")
    assert (code, out) == (2, "")
    assert err == "gut-fast: error: another process is at work in .; wait for it, or name another folder\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "sweep.yaml"]
    with sole_user(tmp_path):
        pass


def test_runs_of_another_file_are_not_mixed_in(tmp_path):
    tasks = tasks_of()
    for task in tasks:
        append_run(tmp_path, lines_of(task, Run(task.experiment, [{"step": 10}], "loop", 1.0)))
    check_no_others(tasks, tmp_path)
    check_no_others(tasks_of(seeds=3), tmp_path)
    check_no_others(tasks, tmp_path / "new")
    with pytest.raises(FileExistsError, match=f"holds 1 finished runs of another sweep, such as {tasks[1].name}"):
        check_no_others(tasks[:1], tmp_path)


# The commands


def test_a_sweep_runs_and_keeps_its_file(gut_fast, tmp_path):
    text = (
        "# a comment\n"
        "settings: {topology: 'ring:4', model: 'mlp:8', engine: vmap, steps: 10, eval_every: 5, alpha: 0.1}\n"
        "methods:\n  GUT: {rule: gut, mu: 0.5}\n  huge: {rule: dsgd, lr: 1e30}\n"
    )
    (tmp_path / "file.yaml").write_text(text)
    code, out, err = gut_fast("sweep", "file.yaml", "--out", "a/b", "--jobs", "1")
    assert code == 0
    assert out == "all 2 runs are finished; see them with: gut-fast report a/b\n"
    assert err.splitlines()[-1].startswith("2/2  huge, seed 0: ")
    assert err.splitlines()[-1].endswith(" s; 4 agents had a loss of NaN or infinity")
    assert (tmp_path / "a/b/sweep.yaml").read_text() == text
    tasks = read_sweep(tmp_path / "file.yaml").tasks()
    assert stored_rows(tmp_path / "a/b", tasks[0]) == rows_of(tasks[0])
    results = read_results(tmp_path / "a/b")
    assert results.experiments == {task.name: task.experiment for task in tasks}
    assert results.final().loc[tasks[1].name].isna()["test_loss"]
    first = results.runs.loc[tasks[0].name]
    assert first["method"] == "GUT"
    assert "gut_fast" in first["versions"]
    assert "1 thread" in first["machine"]


def test_a_bad_checkpoint_fails_its_run_alone(gut_fast, tmp_path):
    write_yaml({"methods": METHODS, "settings": SETTINGS}, tmp_path / "sweep.yaml")
    tasks = read_sweep(tmp_path / "sweep.yaml").tasks()
    bad = checkpoint_of(tmp_path, tasks[0])
    bad.parent.mkdir()
    bad.write_bytes(b"not a checkpoint")
    code, out, err = gut_fast("sweep", "sweep.yaml", "--out", ".", "--jobs", "1")
    assert (code, out) == (1, "")
    assert f"1/2  GUT, seed 0 FAILED: {bad.relative_to(tmp_path)} cannot be read as a checkpoint" in err
    assert "remove it, and the run starts anew" in err
    assert "2/2  D2, seed 0: " in err
    assert "1 runs failed; try them again with: the same command" in err
    bad.unlink()
    code, out, err = gut_fast("sweep", "sweep.yaml", "--out", ".", "--jobs", "1")
    assert code == 0
    assert "2/2  GUT, seed 0: " in err
    assert "D2" not in err


def test_tune_writes_a_sweep_with_the_best_tries(gut_fast, tmp_path):
    content = {
        "settings": SETTINGS,
        "methods": {"QG-GUTm": {"rule": "qg_gutm", "space": {"mu": [0.01, 0.05]}}},
        "tune": {"tries": 2, "space": {"lr": [0.3]}, "seeds": [5], "validation": 0.2},
    }
    write_yaml(content, tmp_path / "tune.yaml")
    code, out, err = gut_fast("tune", "tune.yaml", "--out", "tuned", "--jobs", "1")
    assert code == 0
    assert "2/2  QG-GUTm, try 1, seed 5: " in err
    assert "The best of 2 tries each, test accuracy on held-out samples" in " ".join(out.split())
    chosen = read_yaml(tmp_path / "tuned" / "tuned.yaml")
    accuracies = list(read_results(tmp_path / "tuned").final()["test_accuracy"])
    tries = (tmp_path / "tuned" / "tries.csv").read_text().splitlines()
    assert tries[0] == "method,try,score,lr,mu"
    assert [line.rsplit(",", 2)[1:] for line in tries[1:]] == [["0.3", "0.01"], ["0.3", "0.05"]]
    best = [0.01, 0.05][accuracies.index(max(accuracies))]
    assert chosen == {"settings": SETTINGS, "methods": {"QG-GUTm": {"rule": "qg_gutm", "lr": 0.3, "mu": best}}}
    code, _, err = gut_fast("sweep", "tuned/tuned.yaml", "--out", "tuned")
    assert code == 2
    assert "tuned holds 2 finished runs of another sweep" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "file.yaml: section 'methods' must hold"),
        ({"settings": {"lr": "fast"}}, "GUT, seed 0: rule 'gut': lr must be a number, got str 'fast'"),
        ({"settings": {"lr": -1}}, "GUT, seed 0: rule 'gut': lr=-1 is outside"),
        ({"settings": {"model": "perceptron"}}, "GUT, seed 0: unknown model 'perceptron'"),
        ({"settings": {"data": "imagenet"}}, "GUT, seed 0: unknown data set 'imagenet'"),
        ({"settings": {"batch_size": 10**8}}, "GUT, seed 0: batch_size=100000000 is more than"),
        ({"grid": {"topology": ["ring:4", "ring:x"]}}, "GUT, topology ring:x, seed 0: topology 'ring:x'"),
        ({"grid": {"alpha": [1, 0]}}, "GUT, alpha 0, seed 0: alpha=0 must be positive"),
        ({"settings": {}, "grid": {"partition": ["iid", "shards"]}}, "partition 'shards' needs classes_per_agent="),
    ],
)
def test_what_is_wrong_with_any_run_is_told_before_the_first(gut_fast, tmp_path, content, message):
    settings = {"topology": "ring:4", **content.get("settings", {})}
    if "partition" not in content.get("grid", {}):
        settings.setdefault("alpha", 1)
    whole = {"methods": {"GUT": {"rule": "gut"}}, **content, "settings": settings}
    write_yaml(whole if content else {}, tmp_path / "file.yaml")
    code, out, err = gut_fast("sweep", "file.yaml", "--out", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gut-fast: error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(gut_fast, tmp_path, monkeypatch):
    write_yaml({"methods": METHODS, "settings": SETTINGS}, tmp_path / "sweep.yaml")
    (tmp_path / "file").touch()
    for place, message in {"file": "file is not a folder", "file/x": "file is not a folder"}.items():
        code, out, err = gut_fast("sweep", "sweep.yaml", "--out", place)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    code, out, err = gut_fast("sweep", "sweep.yaml", "--out", "out")
    message = f"cannot write: [Errno 28] No space left on device: '{tmp_path / 'out' / 'sweep.yaml'}'"
    assert (code, out, err) == (1, "", f"gut-fast: error: {message}\n")


def test_instability_is_told_once_for_each_method(gut_fast, tmp_path, monkeypatch):
    settings = {**SETTINGS, "topology": "torus:4x4"}
    write_yaml({"methods": {"GUT": {"rule": "gut"}}, "settings": settings, "seeds": 5}, tmp_path / "sweep.yaml")
    monkeypatch.setattr("gut_fast.cli.sweep.run_here", lambda *_: [])
    code, _, err = gut_fast("sweep", "sweep.yaml", "--out", "out", "--jobs", "1")
    assert code == 0
    assert err.count("gut-fast: warning: GUT: mu=0.9, kappa=1 is unstable on torus(4, 4)") == 1


# What is shown


def shown(is_terminal, act, width=100):
    task = tasks_of()[0]
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=width, markup=False, highlight=False, emoji=False)
    with contextlib.suppress(KeyboardInterrupt), sweep_progress.Display(console, 63, 11) as watcher:
        act(watcher, task)
    return text.getvalue()


ROW = {
    "lr": 0.1,
    "train_loss": 0.5,
    "test_accuracy": 0.8125,
    "worst_agent_accuracy": 0.75,
    "consensus_error": 0.001,
    "diverged_agents": 0,
}


def test_lines_count_the_runs_and_tell_of_long_ones(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def act(watcher, task):
        for now[0] in (1, 29, 31, 32, 60):
            watcher.working(task, int(now[0]))
        now[0] = 62
        watcher.working(task, 62, ROW)
        watcher.finished(task, Run(task.experiment, [ROW], "vmap", 12.3))
        watcher.failed(Failure(task, "its process was killed"))
        watcher.working(task, 5, ROW)
        watcher.working(task, 6, ROW)
        raise KeyboardInterrupt

    assert shown(False, act).splitlines() == [
        "11/63  at work: GUT, seed 0: step 31/10",
        "11/63  at work: GUT, seed 0: step 62/10 lr 0.1  loss 0.5000  accuracy 81.2% (worst agent 75.0%)  "
        "consensus 1.00e-03",
        "12/63  GUT, seed 0: 81.2 %, 12 s",
        "13/63  GUT, seed 0 FAILED: its process was killed",
        "13/63  GUT, seed 0: goes on from step 5",
        "13/63  GUT, seed 0: stopped after step 6",
    ]


def test_a_terminal_has_a_bar_for_all_and_one_for_each_at_work():
    def act(watcher, task):
        watcher.working(task, 4)
        watcher.working(task, 5, ROW)
        watcher._progress.refresh()
        watcher.finished(task, Run(task.experiment, [{**ROW, "diverged_agents": 3}], "vmap", 1.0))

    text = shown(True, act, width=160)
    assert "5/10" in text
    assert "accuracy 81.2%" in text
    assert "12/63  GUT, seed 0: 81.2 %, 1 s; 3 agents had a loss of NaN or infinity" in text
    assert "5/10" in shown(True, act, width=60)
