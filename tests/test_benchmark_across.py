import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from gut_fast.benchmark import across_link, across_report, across_run, across_truth
from gut_fast.benchmark.across import CONTENDERS, Task, absent, one_peer_ring
from gut_fast.benchmark.across_ranks import CrewError, crew
from gut_fast.benchmark.across_run import AcrossResult, MeasuredAcross
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.cli.bench_across import across

app = typer.Typer()
app.command()(across)


def call(*arguments):
    return CliRunner().invoke(app, arguments)


def test_the_command_compares_measures_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(across_run, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(across_run, "MIN_ROUNDS", 1)
    done = call("--model", "lenet5", "--ranks", "2", "--batch-size", "2", "--seconds", "0", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "Across ranks: lenet5, 2 ranks × 2 samples, loopback" in done.output
    (file,) = tmp_path.glob("*.json")
    (result,) = across_run.load(file)
    task = Task("lenet5", 2, 2)
    assert list(result.contenders) == [name for name in CONTENDERS if name not in absent(task)]
    assert all(entry.seconds.p50 > 0 and entry.cpu_seconds > 0 for entry in result.contenders.values())
    assert max(entry.error for name, entry in result.contenders.items() if "bfloat16" not in name) < 1e-5
    assert result.numbers == 61_706
    document = file.with_suffix(".md").read_text()
    assert "| GUT, overlap |" in document
    assert f"torch {torch.__version__}" in document


class Wrong:
    """Ranks that have taken no step, or have sent a byte too much."""

    def __init__(self, task, extra=0):
        self.task, self.extra = task, extra

    def ask(self, method, name, steps):
        sent = across_truth.expected_bytes(self.task, name, 61_706)
        agents = across_truth._Agents(self.task)
        return [(row.float().numpy(), n + self.extra) for row, n in zip(agents.start, sent, strict=True)]


def test_what_is_wrong_is_not_timed():
    task = Task("lenet5", 4, 2)
    with pytest.raises(WrongResultError, match=r"GUT: its parameters are off by \d"):
        across_truth.compare(Wrong(task), task, ["GUT"], 61_706)
    with pytest.raises(WrongResultError, match=r"DSGD: it sent \[1974593, .* expected \[1974592, "):
        across_truth.compare(Wrong(task, extra=1), task, ["DSGD"], 61_706)


def test_degree_times_model_size_whatever_the_rule():
    of = {name: across_truth.expected_bytes(Task("lenet5", 4), name, 1000) for name in CONTENDERS}
    assert of["GUT"] == of["DSGD"] == of["communication"] == [4 * 2 * 4000] * 4
    assert of["GUT, overlap, bfloat16"] == of["DSGD, one peer, overlap"] == [4 * 4000] * 4
    assert of["DDP"] is None


def test_one_peer_ring():
    ring = one_peer_ring(6)
    assert [ring.neighbors(0, step) for step in range(3)] == [[1], [5], [1]]
    with pytest.raises(ValueError, match="an even number of ranks, got 5"):
        one_peer_ring(5)
    assert list(absent(Task("lenet5", 3))) == ["DSGD, one peer, overlap", "decent-dp"]


class Failing:
    def __init__(self, rank, size, place):
        self.rank = rank

    def fail(self, how):
        if self.rank == 1 and how == "raise":
            raise ValueError("no such thing")
        if self.rank == 1:
            os._exit(3)
        return self.rank

    def pid(self):
        return os.getpid()


@pytest.mark.parametrize(("how", "why"), [("raise", "ValueError: no such thing"), ("exit", "its process has ended")])
def test_a_rank_that_fails_is_an_error_and_no_process_is_left(how, why):
    with crew(Failing, 2, None) as ranks:
        pids = ranks.ask("pid")
        with pytest.raises(CrewError, match=f"fail: rank 1: {why}"):
            ranks.ask("fail", how)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def quantiles(seconds):
    return Quantiles(0.9 * seconds, seconds, 1.1 * seconds, 7)


def result(**seconds):
    times = {"computation": 0.05, "communication": 0.1, "DSGD, overlap": 0.11, "GUT, overlap": 0.12, "DDP": 0.115}
    measured = {name: MeasuredAcross(quantiles(each), 0.1, 2e6, 1e-7) for name, each in (times | seconds).items()}
    quiet = Disturbance(0.1, 0.1, 1.0, 0.0, 0.0, 0, 0.1)
    about = (measured, {"decent-dp": "not installed"}, quiet, "A processor, Linux", {"torch": "2"}, "today")
    return AcrossResult("lenet5", 4, 32, 61_706, 1 << 20, "200mbit", 2, *about)


def test_ratios_and_goals():
    assert result().bound == 0.1
    assert result().to_bound("GUT, overlap") == pytest.approx(1.2)
    assert result().to_ddp("DSGD, overlap") == pytest.approx(0.11 / 0.115)
    assert result().of_processors("DDP") == pytest.approx(0.1 / 0.23)
    said = list(across_report.lines(result()))
    assert "DSGD, overlap: 1.10 of the bound, goal 1.15 reached; 0.96 of DDP, goal 1.00 reached" in said
    assert "GUT, overlap: 1.20 of the bound, goal 1.15 NOT reached; 1.04 of DDP, goal 1.00 NOT reached" in said
    assert any(line.startswith("4 ranks share 2 processors") for line in said)
    assert "absent: decent-dp: not installed" in said


def test_results_come_back_from_their_file_and_add_up(tmp_path):
    file = tmp_path / "across.json"
    first, other = result(), dataclasses.replace(result(), link="loopback")
    across_run.save([first, other], file)
    assert across_run.load(file) == [first, other]
    assert json.loads(file.read_text())["results"][0]["derived"]["GUT, overlap"]["to_bound"] == pytest.approx(1.2)
    newer = dataclasses.replace(first, date="tomorrow")
    assert across_run.merge([first, other], [newer]) == [newer, other]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"across.json holds no results of gut-fast bench across"):
        across_run.load(file)


def test_the_table_fits():
    console = Console(width=100, record=True)
    console.print(across_report.table(result()))
    text = console.export_text()
    assert "…" not in text
    (row,) = (line.split() for line in text.splitlines() if line.strip().startswith("DDP"))
    assert row == ["DDP", "115", "104", "–", "127", "1.15", "1.00", "2", "100", "43%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vgg"), "unknown model 'vgg'; known are lenet5, resnet20, mlp"),
        (("--rate", "fast"), "--rate must be a number with kbit, mbit or gbit, for example 200mbit, got 'fast'"),
    ],
)
def test_bad_arguments_of_the_command(arguments, message):
    assert str(call(*arguments).exception).startswith(message)


def test_what_passes_at_once_is_a_few_milliseconds_worth():
    assert across_link.burst("1gbit") == across_link.burst("1000mbit") == 500_000
    assert across_link.burst("200mbit") == 100_000
    assert across_link.burst("100kbit") == across_link.MIN_BURST


def test_links_need_root(monkeypatch):
    monkeypatch.setattr(across_link.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(across_link.os, "geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="--rate needs root"):
        across_link.check_rate("1gbit")
    monkeypatch.setattr(across_link.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="--rate needs ip and tc"):
        across_link.check_rate("1gbit")


def test_namespaces_are_removed_whatever_fails(monkeypatch):
    called = []

    def call(*command):
        called.append(command)
        if command[0] == "tc":
            raise RuntimeError("tc: unknown qdisc")

    monkeypatch.setattr(across_link, "_call", call)
    with pytest.raises(RuntimeError, match="unknown qdisc"), across_link.places(2, "1gbit"):
        pass
    assert len(names_of("add", called)) == 3
    assert names_of("del", called) == names_of("add", called)


def names_of(what, called):
    return [command[3] for command in called if command[:3] == ("ip", "netns", what)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["while they are made", "in use"])
def test_namespaces_are_removed_whichever_signal_ends_the_process(monkeypatch, number, when):
    called = []

    def call(*command):
        called.append(command)
        if command[:3] == ("ip", "netns", "del") or (when != "in use" and len(called) == 2):
            signal.raise_signal(number)  # again and again, as long as namespaces are being removed

    monkeypatch.setattr(across_link, "_call", call)
    with pytest.raises(SystemExit) as ended, across_link.places(2, "1gbit"):
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert len(names_of("del", called)) == 3
    assert set(names_of("add", called)) <= set(names_of("del", called))
    assert signal.getsignal(number) is signal.SIG_DFL


def test_namespaces_that_a_killed_process_left_are_removed_and_no_others(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(across_link, "NAMESPACES", tmp_path)
    monkeypatch.setattr(across_link, "_call", lambda *command: called.append(command))
    for name in ("gut-fast-99999999-0", f"gut-fast-{os.getpid()}-1", "gut-fast-mine", "other"):
        (tmp_path / name).touch()
    with across_link.places(2, "1gbit"):
        assert names_of("del", called) == ["gut-fast-99999999-0"]


def test_a_rank_that_waits_for_another_ends_with_the_process_that_asks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while Path("/proc", str(pid)).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/proc", str(pid)).exists()


SCRIPT = """
import os, time
from gut_fast.benchmark.across_ranks import crew

class Stuck:
    def __init__(self, rank, size, place):
        self.rank = rank

    def wait(self, begins):
        if begins:
            time.sleep(100)
        return os.getpid()

if __name__ == "__main__":
    with crew(Stuck, 1, None) as ranks:
        print(*ranks.ask("wait", False), flush=True)
        ranks.ask("wait", True)
"""
