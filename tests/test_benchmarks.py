"""The scripts in benchmarks/: their peers are right, wrong ones are not timed, and nothing is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gut_fast.bench import results
from gut_fast.bench.cases import Case
from gut_fast.bench.step import Unavailable, Workload, WrongResultError, check

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import across  # noqa: E402
import crews  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402

NUMBERS = 61_706
"""The parameters of LeNet-5."""


def run_script(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Peers of a step


@pytest.mark.parametrize("topology", ["ring:5", "star:5"])
@pytest.mark.parametrize("rule", ["gut", "qg_gutm"])
def test_the_published_sequence_and_the_op_equal_the_reference(rule, topology):
    workload = Workload(Case("small", rule, topology, "mlp"))
    assert check(peers.authors(workload), workload) < 3e-5
    assert check(peers.kernel(workload), workload) < 3e-5


def test_the_published_sequence_is_of_two_rules_and_whole_precision():
    with pytest.raises(Unavailable, match="is GUT and QG-GUTm"):
        peers.authors(Workload(Case("small", "dsgd", "ring:5", 3)))
    with pytest.raises(Unavailable, match="half precision"):
        peers.authors(Workload(Case("small", "gut", "ring:5", 3, "bfloat16")))


def test_jax_equals_the_reference():
    pytest.importorskip("jax")
    workload = Workload(Case("small", "gradient_tracking", "ring:5", 13))
    assert check(peers.jax(workload), workload) < 3e-5


# Across ranks


class Wrong:
    """Ranks that have made no step, or have sent a byte too much."""

    def __init__(self, case, extra=0):
        self.case, self.extra = case, extra

    def ask(self, method, name, steps):
        sent = across.CONTENDERS[name].expected_bytes(self.case, NUMBERS)
        start = across.Agents(self.case).start
        return [(row.float().numpy(), number + self.extra) for row, number in zip(start, sent, strict=True)]


def test_who_is_wrong_across_ranks_is_not_timed():
    case = across.Case("lenet5", 4, 2)
    with pytest.raises(WrongResultError, match=r"GUT: its parameters are off by \d"):
        across.compare(Wrong(case), case, ["GUT"], NUMBERS)
    with pytest.raises(WrongResultError, match=r"DSGD: it sent \[1974593, .* expected \[1974592, "):
        across.compare(Wrong(case, extra=1), case, ["DSGD"], NUMBERS)


def test_ranks_send_degree_times_model_size_whatever_the_rule():
    case = across.Case("lenet5", 4)
    sent = {
        name: contender.expected_bytes(case, 1000)
        for name, contender in across.CONTENDERS.items()
        if issubclass(contender, across.Gossip)
    }
    assert sent["GUT"] == sent["DSGD"] == sent["communication"] == [4 * 2 * 4000] * 4
    assert sent["DSGD one peer overlap"] == [4 * 4000] * 4
    assert sent["GUT overlap bfloat16"] == [2 * 4000 + 3 * 4000] * 4  # the first message is exact


def test_one_peer_ring():
    graph = across.one_peer_ring(6)
    assert [graph.neighbors(0, step) for step in range(3)] == [[1], [5], [1]]
    with pytest.raises(ValueError, match="an even number of ranks, got 5"):
        across.one_peer_ring(5)
    assert list(across.absent(across.Case("lenet5", 3))) == ["DSGD one peer overlap", "decent-dp"]
    assert "GUT sockets" in across.absent(across.Case("lenet5", shares_memory=False))


def test_a_rate_needs_a_number_tools_and_root(monkeypatch):
    assert crews.burst("1gbit") == crews.burst("1000mbit") == 500_000
    assert crews.burst("100kbit") == crews.MIN_BURST
    with pytest.raises(ValueError, match="--rate must be a number with kbit, mbit or gbit"):
        crews.check_rate("fast")
    monkeypatch.setattr(crews.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(crews.shutil, "which", lambda tool: tool)
    with pytest.raises(RuntimeError, match="--rate needs root"):
        crews.check_rate("1gbit")
    monkeypatch.setattr(crews.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="--rate needs ip and tc"):
        crews.check_rate("1gbit")


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The commands that would have been run."""
    commands = []
    monkeypatch.setattr(crews, "run", lambda *command: commands.append(command))
    monkeypatch.setattr(crews, "NAMESPACES", tmp_path)
    return commands


def names_of(what, called):
    return [command[3] for command in called if command[:3] == ("ip", "netns", what)]


def test_each_rank_has_a_namespace_and_a_shaped_link(called):
    with crews.places(2, "1gbit") as places:
        assert [place.namespace for place in places] == names_of("add", called)[:2]
        shaped = [command[2] for command in called if command[0] == "tc" and "1gbit" in command]
        first, second, switch = names_of("add", called)
        assert shaped == [first, switch, second, switch]
    assert names_of("del", called) == [first, second, switch]


def test_namespaces_that_a_killed_process_left_are_removed_and_no_others(called, tmp_path):
    for name in ("gut-fast-99999999-0", f"gut-fast-{os.getpid()}-1", "gut-fast-mine", "other"):
        (tmp_path / name).touch()
    with crews.places(2, "1gbit"):
        assert names_of("del", called) == ["gut-fast-99999999-0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["while they are made", "in use"])
def test_namespaces_are_removed_whichever_signal_ends_the_process(monkeypatch, called, number, when):
    def run(*command):
        called.append(command)
        if command[:3] == ("ip", "netns", "del") or (when != "in use" and len(called) == 2):
            signal.raise_signal(number)  # again and again, as long as namespaces are being removed

    monkeypatch.setattr(crews, "run", run)
    with pytest.raises(SystemExit) as ended, crews.places(2, "1gbit"):
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert set(names_of("add", called)) <= set(names_of("del", called))
    assert len(names_of("del", called)) == 3
    assert signal.getsignal(number) is signal.SIG_DFL


class Failing:
    """A server whose rank 1 fails."""

    def __init__(self, rank, place):
        self.rank = rank

    def fail(self, how):
        if self.rank == 1 and how == "raise":
            raise ValueError("no such thing")
        if self.rank == 1:
            os._exit(3)
        return self.rank

    def pid(self):
        return os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "why"), [("raise", "ValueError: no such thing"), ("exit", "BrokenProcessPool")])
def test_a_rank_that_fails_is_an_error_and_no_process_is_left(how, why):
    with crews.crew(Failing, 2, None) as crew:
        pids = crew.ask("pid")
        with pytest.raises(crews.CrewError, match=f"fail: rank 1: {why}"):
            crew.ask("fail", how)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# The scripts as they are called


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda file: file.stem)
def test_the_committed_results_are_those_of_their_table(tmp_path, file):
    found = results.load(file)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == results.markdown(found)
    for benchmark in sorted({result.benchmark for result in found}):
        path = tmp_path / f"{benchmark}.png"
        picture.draw([result for result in found if result.benchmark == benchmark], path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_of_steps(tmp_path, monkeypatch):
    out = run_script(BENCHMARKS / "step.py", "ring-16-lenet5", "--threads", "1", "--seconds", "0", "--output", tmp_path)
    (file,) = tmp_path.glob("*.json")
    (found,) = results.load(file)
    assert {"gut_fast", "ceiling", "SGD", "compile", "eager", "authors", "kernel"} <= set(found.measurements)
    assert results.summary([found]) in out


@pytest.mark.slow
def test_the_script_across_ranks(tmp_path):
    size = ("--model", "lenet5", "--ranks", "2", "--batch-size", "2")
    run_script(BENCHMARKS / "across.py", *size, "--seconds", "0", "--output", tmp_path)
    (file,) = tmp_path.glob("*.json")
    (found,) = results.load(file)
    assert list(found.measurements) == [name for name in across.CONTENDERS if name not in found.absent]
    assert set(found.absent) <= {"decent-dp"}
    assert max(each.error for name, each in found.measurements.items() if "bfloat16" not in name) < 1e-5
    assert all(each.counts["CPU ms"] > 0 for each in found.measurements.values())


@pytest.mark.slow
def test_the_script_for_gpus_in_a_dry_run(tmp_path):
    out = run_script(BENCHMARKS / "gpu/run.py", tmp_path, "--device", "cpu", "--seconds", "6")
    assert [result.benchmark for result in results.load(tmp_path / "results.json")].count("train") == 1
    for part in ("environment", "verify", "steps", "training", "profile"):
        assert f"== {part}: done" in out
        assert (tmp_path / f"{part}.txt").stat().st_size > 0
    assert "WRONG" not in out
    assert "dsgd on cpu in float32" in out
    assert torch.__version__ in out
