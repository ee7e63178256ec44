"""Measuring on a GPU: with a stand-in whose tensors are on the CPU, and, marked ``gpu``, on a real one."""

import json
import math
import runpy
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gut_fast.benchmark import comparison, device, peers, report, results, run, train_report, train_run, training
from gut_fast.benchmark.cases import CASES, GROUPS, SHAPES, Case
from gut_fast.benchmark.contenders import GutFast, Unavailable, Workload
from gut_fast.benchmark.device import CACHES, CPU, Device, EventClock, Gpu, WallClock, find_device
from gut_fast.benchmark.gpu import parts, plan
from gut_fast.benchmark.gpu import report as gpu_report
from gut_fast.benchmark.gpu import run as gpu_run
from gut_fast.benchmark.gpu.notes import Budget, Notes
from gut_fast.benchmark.gpu_contenders import Captured, InTurns, LargeCopy, SmallCopy, num_sets
from gut_fast.benchmark.timing import Quantiles, interleave
from gut_fast.benchmark.training import Task

ROOT = Path(__file__).parents[1]
SETS = 3


def small(rule="gut", topology="ring:5", shapes=((7,), (3, 2)), **options):
    return Case("small", rule, topology, shapes, {"lr": 0.05}, gpu_goal=0.8, **options)


class Slowly:
    """A clock that says that everything takes so many seconds."""

    min_seconds = 1.0

    def __init__(self, seconds):
        self.seconds = seconds

    def time(self, step, repeats):
        for _ in range(repeats):
            step()
        return self.seconds


class StandIn(Device):
    """A GPU's habits, and the CPU's tensors."""

    name = "cuda"
    is_gpu = True
    copy_bytes = 10_000
    cache_bytes = -(-SETS * 5 * 13 * 3 * 4 // CACHES) - 20

    def __init__(self):
        self.wall, self.busy = Slowly(2.0), Slowly(1.0)
        self.waited = 0

    def synchronize(self):
        self.waited += 1

    def machine_line(self):
        return "Stand-in 3000, 1 GiB; AMD EPYC, 1 thread"

    def captured(self, step):
        step()
        return step


@pytest.fixture
def gpu():
    return StandIn()


# Clocks


def test_callers_wait_once_before_and_once_after_many_steps(monkeypatch):
    log = []
    monkeypatch.setattr(device.time, "perf_counter_ns", lambda: log.append("look") or 10**9 * len(log))
    clock = WallClock(0.1, lambda: log.append("wait"))
    seconds = clock.time(lambda: log.append("step"), 3)
    assert log == ["wait", "look", "step", "step", "step", "wait", "look"]
    assert seconds == pytest.approx((7 - 2) / 3)


class Queue:
    """A GPU that works through its queue while Python, much slower, fills it. Steps take 1 ms here and 5 ms there."""

    step_seconds, launch_seconds = 1e-3, 5e-3
    cycles_a_second = 2e9

    def __init__(self):
        self.host, self.gpu, self.sleeps = 0.0, 0.0, []

    def launch(self, seconds, host_seconds=0.0):
        self.host += host_seconds
        self.gpu = max(self.gpu, self.host) + seconds

    def step(self):
        self.launch(self.step_seconds, self.launch_seconds)

    def sleep(self, cycles):
        self.sleeps.append(cycles)
        self.launch(cycles / self.cycles_a_second)

    def event(self, enable_timing):
        assert enable_timing
        here = SimpleNamespace(at=None)
        here.record = lambda: setattr(here, "at", max(self.gpu, self.host))
        here.query = lambda: self.host >= here.at
        here.synchronize = lambda: setattr(self, "host", max(self.host, here.at))
        here.elapsed_time = lambda other: 1e3 * (other.at - here.at)
        return here


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "_sleep", queue.sleep)
    monkeypatch.setattr(device.time, "perf_counter", lambda: queue.host)
    return queue


def test_what_a_gpu_is_busy_with_is_not_what_python_takes(queue):
    clock = EventClock()
    for _ in range(2):
        assert clock.time(queue.step, 4) == pytest.approx(queue.step_seconds)
    # Too short at first; then longer than launching four steps takes.
    assert queue.sleeps == [EventClock.min_cycles, *[4 * queue.launch_seconds * EventClock.cycles_a_second] * 2]
    queue.launch_seconds = 1e-5
    queue.sleeps.clear()
    for _ in range(2):
        assert clock.time(queue.step, 4) == pytest.approx(queue.step_seconds)
    assert queue.sleeps[1] == EventClock.min_cycles


def test_what_outlasts_the_longest_sleep_is_the_time_of_launching(queue):
    queue.launch_seconds = 1.0
    assert EventClock().time(queue.step, 10) == pytest.approx(1.0, rel=0.15)
    assert queue.sleeps[-1] == EventClock.max_cycles


def test_no_more_steps_are_queued_than_a_queue_holds(queue):
    steps = []
    EventClock().time(lambda: steps.append(1), 10_000)
    assert len(steps) == EventClock.max_repeats


def test_turns_take_the_clock_they_are_given():
    assert interleave({"a": lambda: None}, 0.0, clock=Slowly(0.25))["a"].p50 == 0.25


def test_devices(monkeypatch):
    assert find_device("cpu") is CPU
    assert CPU.busy is None
    assert CPU.captured(lambda: None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no GPU here; use 'cpu'"):
        find_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'tpu'; known are cpu, cuda"):
        find_device("tpu")


# Contenders


def test_the_large_copy_counts_as_many_steps_as_it_moves_bytes_of(gpu):
    workload = Workload(small(), gpu)
    copy = LargeCopy(workload)
    copy.step()
    assert torch.equal(copy.target, copy.source)
    assert len(copy.source.unique()) > 100
    moved = 2 * len(copy.source)
    assert copy.steps_a_call == moved / (5 * 5 * 13 * 4)
    gpu.copy_bytes = 0
    assert LargeCopy(workload).steps_a_call == pytest.approx(1, rel=0.01)


def test_the_small_copy_moves_a_steps_bytes_from_place_to_place(gpu):
    large = LargeCopy(Workload(small(), gpu))
    small_copy = SmallCopy(large)
    for times in (1, 2):
        small_copy.step()
        assert int((large.target != 0).sum()) == pytest.approx(times * large.step_bytes // 2, rel=0.02)


def test_sets_of_buffers_outgrow_the_cache(gpu):
    workload = Workload(small(), gpu)
    assert num_sets(workload) == SETS
    assert num_sets(Workload(small(), CPU)) == 1
    held = 5 * 13 * 3 * 4
    assert (SETS - 1) * held < CACHES * gpu.cache_bytes <= SETS * held


def test_sets_take_turns_and_each_is_compared(gpu):
    field = peers.enter(Workload(small(), gpu), ["kernel"])
    ours = field.contenders["gut_fast"]
    assert isinstance(ours, InTurns)
    first, second, third = (member.workload.values for member in ours.members())
    before = first.clone()
    ours.step()
    assert not torch.equal(first, before)
    assert torch.equal(second, before)
    for _ in range(2):
        ours.step()
    assert torch.equal(first, third)
    ours.members()[2].step = lambda: None
    with pytest.raises(comparison.WrongResultError, match="gut_fast differs"):
        run.compare(Workload(small(), gpu), field, None)


def test_other_backends_stand_beside_the_chosen_one():
    field = peers.enter(Workload(small(backend="torch")), ["backend"])
    assert set(field.contenders) == {"gut_fast", "gut_fast, cpu"}
    beside = field.contenders["gut_fast, cpu"]
    assert beside.family == "backend"
    assert comparison.largest_error(beside, beside.workload, None) < 1e-5
    assert set(peers.enter(Workload(small()), ["backend"]).contenders) == {"gut_fast"}


def test_no_graphs_on_a_cpu():
    with pytest.raises(Unavailable, match="CUDA graphs"):
        Captured(Workload(small()))


def test_formulations_on_a_gpu_are_whole_and_compiled_in_several_modes(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, **_: modes.append(mode) or function)
    field = peers.enter(Workload(small(), gpu), ["compile", "eager", "scipy", "jax"])
    assert not any("tiles" in name for name in field.contenders)
    assert {"compile, rolls", "compile, rolls, reduce-overhead", "eager, matmul, by tensor"} <= set(field.contenders)
    assert set(modes) == {None, *peers.MODES}
    assert field.absent["scipy, sparse"] == "scipy computes on the CPU"
    for name, contender in field.contenders.items():
        if name != "gut_fast":
            assert comparison.largest_error(contender, Workload(small(), gpu), None) < 1e-5


@pytest.mark.parametrize("storage", [{"dtype": "float16"}, {"state_dtype": "float16"}])
def test_half_precision_is_compared_to_its_rounding(storage):
    workload = Workload(small(backend="torch", **storage))
    assert 1e-5 < comparison.largest_error(GutFast(workload), workload, None) < comparison.tolerance(workload) == 2**-10


# Cases


def test_cases_for_a_gpu_are_those_of_the_goals():
    goals = {case.name.removeprefix("gpu-"): case.gpu_goal for case in GROUPS["gpu"]}
    for name in ("ring-16", "ring-16-1m", "ring-16-4m", "ring-64", "torus-64"):
        assert goals[name] == 0.90
    assert goals["ring-256"] == goals["complete-16"] == goals["complete-64"] == 0.85
    assert (goals["ring-1024"], goals["regular-1024"]) == (0.75, 0.60)
    assert {case.dtype for case in GROUPS["gpu"]} == {"float32", "bfloat16", "float16"}
    assert len(CASES["gpu-ring-16"].shapes) == len(CASES["gpu-ring-16-4m"].shapes) == 65
    assert CASES["gpu-ring-16-4m"].columns > 4_000_000
    assert CASES["gpu-ring-1024"].columns == 61_706


def test_bytes_held_are_parameters_gradients_and_states():
    assert small().bytes_held == 13 * 3 * 4
    assert small("gradient_tracking", state_dtype="bfloat16").bytes_held == 13 * (2 * 4 + 2 * 2)


# A case on the stand-in


@pytest.fixture(scope="module")
def result():
    return run.run(small(), 1, 0.0, plan.BESIDE, device=StandIn())


def test_a_case_has_both_times_of_everyone(result, tmp_path):
    assert set(result.contenders) == {
        *("ceiling", "copy", "gut_fast", "kernel", "gut_fast, captured", "momentum SGD, fused")
    }
    ours, ceiling = result.contenders["gut_fast"], result.contenders["ceiling"]
    assert (ours.seconds.p50, ours.busy.p50, ours.of_memory.p50) == (2.0, 1.0, 1.0)
    share = 2 * 10_000 / result.bytes
    assert ceiling.busy.p50 == pytest.approx(1 / share)
    assert result.rate("ceiling") == pytest.approx(20_000)
    assert result.fraction_of_ceiling() == pytest.approx(1 / share)
    assert result.times_our_call("ceiling") == pytest.approx(1 / share)
    assert (result.device, result.backend, result.sets, result.goal) == ("cuda", "cpu", SETS, 0.8)
    assert result.python_part.p50 > 0
    assert all(entry.error < 1e-5 for entry in result.contenders.values() if entry.family in run.OURS)
    results.save([result], tmp_path / "r.json")
    assert results.load(tmp_path / "r.json") == [result]


def test_what_is_said_of_a_case(result):
    assert report.describe(result).endswith("float32, GPU")
    lines = "\n".join(report.case_lines(result))
    assert "backend cpu; ms: what the GPU is busy with; call: what a loop of steps takes" in lines
    assert f"{SETS} sets of our buffers take turns" in lines
    header, *rows = report.case_rows(result)
    assert header[-2:] == ["call ms", "× gut_fast"]
    assert next(row for row in rows if row[0] == "gut_fast")[-2:] == ["2000.000", "1.00"]
    header, row = report.summary_rows([result])
    assert header[:4] == ["case", "backend", "ms", "call ms"]
    assert row[header.index("SGD")] == "1.00 / 1.00"
    assert "what the GPU is busy with" in report.markdown([result])


def test_text_tables_are_aligned():
    assert report.text_table([["a", "ms"], ["long", "1"]]) == "a     ms\nlong   1"
    assert report.markdown_table([["a", "ms"], ["long", "1"]]) == ["| a | ms |", "| --- | ---: |", "| long | 1 |"]


def test_results_of_a_gpu_and_of_a_cpu_stand_side_by_side(result):
    on_cpu = run.run(small(), 1, 0.0, ("ceiling",))
    assert len(results.merge([on_cpu, result], [result])) == 2


def test_a_step_that_is_wrong_is_not_timed_on_a_gpu_either(gpu, monkeypatch):
    monkeypatch.setattr(Captured, "step", lambda self: None)
    with pytest.raises(comparison.WrongResultError, match="captured differs from the reference"):
        run.run(small(), 1, 0.0, plan.BESIDE, device=gpu)


# Training


def test_training_on_a_gpu_waits_between_gradient_and_step_apart_from_the_rate(gpu):
    log = []
    trainer = SimpleNamespace(gradient=lambda: log.append("g"), step=lambda: log.append("s"))
    gpu.synchronize = lambda: log.append("wait")
    ((gradient, step, both),) = train_run._train(trainer, 3, gpu)
    assert "".join(name[0] for name in log) == "s" + "wgwsw" + "gsgsgs"
    assert gradient >= 0 <= step
    assert both == 2.0


@pytest.fixture(scope="module")
def trained():
    gpu = StandIn()
    return train_run.run(Task("mlp", 4, 2, gpu), training.engines_of(gpu), 1, 0.0, controls=False)


def test_training_is_compared_timed_and_kept(trained, tmp_path):
    assert list(trained.trainers) == [*training.engines_of(CPU), "plain loop", "one model"]
    assert trained.rate("one model") == 8 / 2.0
    assert (trained.device, trained.place) == ("cuda", "GPU")
    train_run.save([trained], tmp_path / "t.json")
    assert train_run.load(tmp_path / "t.json") == [trained]


def test_goals_of_training_on_a_gpu(trained):
    times, one = train_report.goal_lines(trained)
    assert times == "loop trains 1.00 times as many samples a second as the plain loop; goal 10, NOT reached"
    assert one == "loop takes 1.00 times as long as one model; goal at most 2, reached"
    _, row = train_report.summary_rows([trained])
    assert row == ["mlp, 4 agents × 2 samples, GPU", "loop", "4", "4", "4", "1.00", "1.00"]


# All in one call


@pytest.fixture
def call(tmp_path, capsys):
    """Runs the command with all parts in this process; exit code, what it found, and what it printed."""

    def in_this_process(arguments, seconds):
        code = gpu_run.main(arguments)
        return "" if code == 0 else f"exit code {code}"

    def run_it(*arguments, launch=in_this_process):
        code = gpu_run.main([str(tmp_path), "--device", "cpu", *arguments], launch)
        found = json.loads((tmp_path / gpu_run.FILE).read_text(encoding="utf-8"))
        return code, found, capsys.readouterr().out

    return run_it


def test_a_dry_run_of_everything(call, tmp_path, monkeypatch):
    code, found, out = call("--seconds", "30")
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        **dict.fromkeys(plan.PARTS, "done"),
        "ncu": "absent",
    }
    assert code == 0
    assert [result.case for result in gpu_report.step_results(found)] == ["dry-gut", "dry-dsgd"]
    assert "eager, rolls" in gpu_report.step_results(found)[0].contenders
    assert all(line["passed"] for line in found["parts"]["verify"]["lines"])
    assert all(entry["same bits"] for entry in found["parts"]["determinism"]["entries"])
    for line in ("steps: dry-gut", "training: mlp, 3 agents", "VERIFY", "DETERMINISM", "dry-dsgd", "ncu: ncu looks"):
        assert line in out
    assert (tmp_path / gpu_run.TABLE).read_text(encoding="utf-8") in out
    monkeypatch.setattr(sys, "argv", ["draw.py", str(tmp_path / gpu_run.FILE), "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/gpu/draw.py"), run_name="__main__")
    (page,) = tmp_path.glob("gpu-*.md")
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == found
    assert "| dry-gut" in page.read_text(encoding="utf-8")
    for name in (f"{page.stem}.png", f"{page.stem}-training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name})" in page.read_text(encoding="utf-8")


def test_a_part_that_fails_is_noted_and_the_others_go_on(call, monkeypatch):
    def fail(part):
        part.put(lines=[])
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(parts.FUNCTIONS, "verify", fail)
    code, found, out = call("--parts", "verify,environment")
    assert code == 1
    assert found["parts"]["verify"]["lines"] == []
    assert found["parts"]["verify"]["problem"] == "RuntimeError: an illegal memory access"
    assert found["parts"]["environment"]["status"] == "done"
    assert "verify: RuntimeError: an illegal memory access" in out


def test_a_case_that_fails_is_noted_and_the_others_go_on(call, monkeypatch):
    right = run.run

    def fails_once(case, *arguments, **options):
        if case.rule == "gut":
            raise RuntimeError("out of memory")
        return right(case, *arguments, **options)

    monkeypatch.setattr(parts, "run", fails_once)
    code, found, _ = call("--parts", "steps")
    assert code == 1
    assert found["parts"]["steps"]["status"] == "failed"
    assert found["parts"]["steps"]["failures"] == {"dry-gut": "RuntimeError: out of memory"}
    assert [result.case for result in gpu_report.step_results(found)] == ["dry-dsgd"]


def test_a_case_that_fails_gives_its_memory_back_before_the_next(call, monkeypatch):
    """Or one that is too large for the device would take those after it along."""
    buffers = []

    def fails(case, *arguments, **options):
        assert all(buffer() is None for buffer in buffers)
        tensor = torch.zeros(3)
        buffers.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(f"{case.name} has {len(tensor)} numbers too many")

    monkeypatch.setattr(parts, "run", fails)
    code, found, _ = call("--parts", "steps")
    assert code == 1
    assert list(found["parts"]["steps"]["failures"].values()) == [
        f"torch.OutOfMemoryError: dry-{rule} has 3 numbers too many" for rule in ("gut", "dsgd")
    ]


def test_a_backend_that_fails_beside_ours_is_absent(gpu, monkeypatch):
    right = GutFast.step

    def step(self):
        if self.family == "backend":
            raise RuntimeError("PassManager::run failed\nand so on")
        right(self)

    monkeypatch.setattr(peers, "_other_backends", lambda workload: ["torch"])
    monkeypatch.setattr(GutFast, "step", step)
    measured = run.run(small(), 1, 0.0, ["backend"], device=gpu)
    assert list(measured.contenders) == ["gut_fast"]
    assert measured.absent == {"gut_fast, torch": "failed: PassManager::run failed"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_said(tmp_path, value):
    notes = Notes(tmp_path / gpu_run.FILE)
    line = {"rule": "gut", "backend": "cuda", "precision": "float32", "error": value, "passed": False}
    entry = {"rule": "gut", "backend": "cuda", "same bits": True, "error": 1.0, "error on the CPU": 1.0}
    notes.put("verify", lines=[{**line, "worst_case": "ring(3)", "num_comparisons": 2, "faults": []}])
    notes.put("determinism", runs=3, entries=[{**entry, "difference": value}])
    found = json.loads(notes.file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["parts"]["verify"]["lines"][0]["error"] is None
    text = gpu_report.text(found)
    assert "WRONG: gut on cuda in float32: ring(3): error not finite" in text
    assert text.partition("DETERMINISM")[2].split()[-2:] == ["not", "finite"]


def test_what_is_wrong_makes_the_exit_code(call, monkeypatch):
    monkeypatch.setattr(GutFast, "step", lambda self: None)
    code, found, out = call("--parts", "steps")
    assert code == 1
    assert found["parts"]["steps"]["status"] == "wrong"
    assert "dry-gut: gut_fast differs from the reference" in out


def test_a_part_that_is_ended_leaves_what_it_had_found(call, tmp_path):
    def is_ended(arguments, seconds):
        Notes(tmp_path / gpu_run.FILE).put("steps", results=[])
        return f"ended after {seconds:.0f} s"

    code, found, out = call("--parts", "steps", "--seconds", "40", launch=is_ended)
    assert code == 1
    del found["parts"]["steps"]["seconds"]
    assert found["parts"]["steps"] == {"results": [], "status": "failed", "problem": "ended after 50 s"}
    assert "steps: ended after 50 s" in out


def test_when_the_time_is_over_the_rest_is_noted_and_not_begun(call):
    _, found, out = call("--parts", "steps", "--seconds", "0")
    assert found["parts"]["steps"]["not_reached"] == ["dry-dsgd"]
    assert "steps: no time for dry-dsgd" in out


def test_parts_share_the_time_and_keep_what_others_have_found(call):
    given = {}

    def launch(arguments, seconds):
        given[arguments[arguments.index("--child") + 1]] = seconds - gpu_run.GRACE
        return "" if gpu_run.main(arguments) == 0 else "wrong"

    call("--parts", "environment", "--seconds", "100", launch=launch)
    _, found, _ = call("--parts", "ncu,steps", "--seconds", "170", launch=launch)
    assert list(found["parts"]) == ["environment", "ncu", "steps"]
    assert given["environment"] == pytest.approx(100, abs=1)
    assert given["ncu"] == pytest.approx(30, abs=1)
    assert given["steps"] == pytest.approx(170, abs=2)


def test_bad_arguments(call, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("--parts", "steps,tea")
    assert "unknown parts tea; known are environment" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no GPU here"):
        call("--device", "cuda")


WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["rich", "typer", "matplotlib", "scipy", "sklearn", "torchvision"]))  # not installed
sys.argv[1:] = ["--device", "cpu", "--child", "training", "--started", "0", "--until", "0", sys.argv[1]]
runpy.run_path("benchmarks/gpu/run.py", run_name="__main__")
"""


def test_the_script_needs_torch_numpy_and_networkx_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Notes(tmp_path / gpu_run.FILE).read()
    assert found["parts"]["training"]["status"] == "done"
    assert gpu_report.training_results(found)[0].model == "mlp"
    assert "training: mlp, 3 agents" in done.stdout


def test_a_process_that_hangs_is_ended():
    assert gpu_run._launch(["--help"], 0.01) == "ended after 0 s"


def test_what_a_part_has_started_ends_with_it(monkeypatch, tmp_path):
    """Such as the program under a profiler that was ended before it."""
    right, place = subprocess.Popen, tmp_path / "pid"
    script = f'sleep 60 & echo $! > "{place}"'
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: right(["bash", "-c", script], **options))
    assert gpu_run._launch([], 10.0) == ""
    status = Path(f"/proc/{int(place.read_text())}/stat")
    until = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < until


def test_whoever_is_ended_ends_the_part_at_work(tmp_path):
    command = [sys.executable, "benchmarks/gpu/run.py", tmp_path, "--device", "cpu", "--parts", "steps"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert "steps: up to" in process.stdout.readline()
        assert "steps: dry-gut" in process.stdout.readline()  # says the part
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        process.terminate()
        assert process.wait(30) != 0
    assert not Path(f"/proc/{int(child)}").exists()


NCU = """==PROF== Connected to process 12
"ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum"
"","","byte","ns"
"0","void step<float>(Args)","208,000,000","121,000"
"1","void step<float>(Args)","208,000,001","122,000"
"""


def test_what_ncu_prints_is_read():
    rows = list(parts._ncu_rows(NCU))
    assert len(rows) == 2
    assert rows[0] == {"kernel": "void step<float>(Args)", "time": "121,000", "bytes read": "208,000,000"}
    assert list(parts._ncu_rows("==ERROR== no permission\n")) == []


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\nSee there\n", "absent", "==ERROR== ERR_NV"),
        ("==ERROR== The application returned an error code (1).\n", "failed", "==ERROR== The application returned"),
        ("", "failed", "ncu says nothing"),
    ],
)
def test_ncu_without_figures_says_why(gpu, tmp_path, monkeypatch, said, status, reason):
    monkeypatch.setattr(parts.shutil, "which", lambda name: name)
    monkeypatch.setattr(parts.subprocess, "run", lambda *_, **options: SimpleNamespace(stdout=said, stderr=""))
    notes = Notes(tmp_path / gpu_run.FILE)
    part = parts.Part("ncu", gpu, plan.plan_for(CPU), Budget(30.0), notes, print)
    assert parts.ncu(part) == status
    assert notes.read()["parts"]["ncu"]["reason"].startswith(reason)


def test_a_driver_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def hangs(command, timeout, **options):
        asked.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    monkeypatch.setattr(device.subprocess, "run", hangs)
    device.nvidia_smi.cache_clear()
    assert [device.nvidia_smi("name") for _ in range(2)] == [None, None]
    assert len(asked) == 1
    device.nvidia_smi.cache_clear()


def test_missed_goals_are_said(result):
    found = {"parts": {"steps": {"results": results.as_json([result]), "status": "done", "seconds": 3.0}}}
    text = gpu_report.text(found)
    assert "0 of 1 goals beside it are reached" in text
    assert f"small: {result.fraction_of_ceiling():.2f} of the ceiling, goal 0.80, NOT reached" in text
    slower = results.Measured("sgd", Quantiles(0.5, 0.5, 0.5, 3), None, Quantiles(0.5, 0.5, 0.5, 3))
    quick = {**result.contenders, "momentum SGD, fused": slower}
    found["parts"]["steps"]["results"] = results.as_json([results.Result(**{**vars(result), "contenders": quick})])
    assert "momentum SGD, fused takes 0.50 times as long, goal 1, NOT reached" in gpu_report.text(found)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        gpu_report.draw({"parts": {}}, tmp_path)


# On a real one


@pytest.mark.gpu
def test_a_case_on_a_gpu():
    result = run.run(small(shapes=SHAPES["lenet5"]), 1, 0.1, device=Gpu())
    assert {"ceiling", "copy", "gut_fast", "gut_fast, captured", "momentum SGD, fused"} <= set(result.contenders)
    assert any(entry.family == "compile" for entry in result.contenders.values())
    assert 0 < result.fraction_of_ceiling() < 1.5
    assert all(0 < entry.busy.p50 <= 1.5 * entry.seconds.p50 for entry in result.contenders.values())
    assert result.sets > 1


@pytest.mark.gpu
def test_the_speed_of_memory_does_not_depend_on_the_clock():
    gpu = Gpu()
    copy = LargeCopy(Workload(small(), gpu))
    rates = [2 * copy.source.numel() / clock.time(copy.step, 10) for clock in (gpu.wall, gpu.busy)]
    assert rates[0] == pytest.approx(rates[1], rel=0.05)
    assert rates[1] > 1e11


@pytest.mark.gpu
def test_training_on_a_gpu():
    gpu = Gpu()
    result = train_run.run(Task("lenet5", 4, 8, gpu), training.engines_of(gpu), 1, 0.1, controls=False)
    assert "graphed-vmap" in result.trainers
    assert max(entry.error for entry in result.trainers.values() if entry.error is not None) < training.MAX_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["environment", "determinism"])
def test_quick_parts_on_a_gpu(part, tmp_path):
    assert gpu_run.main([str(tmp_path), "--parts", part, "--seconds", "100"]) == 0
