"""The benchmarks of the package: nobody who is wrong is timed, all take turns, and results come back from a file."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from gut_fast.bench import peers, results, step, timing, train
from gut_fast.bench.cases import CASES, GROUPS, LENET5, RESNET20, Case
from gut_fast.bench.device import find_device
from gut_fast.bench.peers import PEERS
from gut_fast.bench.results import Measurement, Result
from gut_fast.bench.step import OURS, Contender, Unavailable, Workload, WrongResultError, check
from gut_fast.bench.timing import Quantiles, interleave
from gut_fast.bench.train import Training
from gut_fast.cli.bench import app
from gut_fast.rules import RULES

TOPOLOGIES = ["ring:5", "torus:3x4", "complete:18", "petersen", "star:5"]


def small(rule="gut", topology="ring:5", parameters=13, **options):
    return Case("small", rule, topology, parameters, **options)


@pytest.fixture
def not_compiled(monkeypatch):
    """Makes torch.compile return the function it is given."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# Cases


def test_cases_are_what_their_names_say():
    assert len(CASES["ring-16-segments"].shapes) == 65
    for model, number in (("resnet20", RESNET20), ("lenet5", LENET5)):
        assert sum(map(math.prod, Case(model, parameters=model).shapes)) == number
    assert len(CASES) == sum(len(cases) for cases in GROUPS.values())
    assert not CASES.keys() & GROUPS.keys()
    assert all(case.make_topology().num_agents >= 10 for case in CASES.values())


def test_bytes_are_those_of_the_streams():
    assert small().bytes_per_step(5) == 5 * 5 * 13 * 4
    assert small("gradient_tracking").bytes_per_step(5) == 7 * 5 * 13 * 4
    assert small(state_dtype="bfloat16").bytes_per_step(5) == 5 * 13 * (3 * 4 + 2 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"parameters": 0}, "at least one parameter"),
        ({"parameters": "vgg"}, "unknown model 'vgg'"),
        ({"rule": "sgd"}, "unknown rule"),
    ],
)
def test_a_bad_case_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Workload and contenders


def test_agents_start_from_one_model_with_gradients_of_their_own():
    workload = Workload(small(parameters="mlp"))
    z, states, g = workload.copies()
    assert torch.equal(z, z[:1].expand(5, -1))
    assert len(g.unique(dim=0)) == 5
    assert torch.equal(z, torch.cat([p.detach().view(5, -1) for p in workload.parameters], 1))
    assert torch.equal(g, torch.cat([p.grad.view(5, -1) for p in workload.parameters], 1))
    assert [state.count_nonzero() for state in states] == [0]
    workload.values.fill_(2)
    workload.gradients.fill_(3)
    assert all(bool((p == 2).all()) and bool((p.grad == 3).all()) for p in workload.parameters)


@pytest.mark.parametrize(("rule", "topology"), list(zip(RULES, itertools.cycle(TOPOLOGIES), strict=False)))
def test_contenders_equal_the_reference(rule, topology, not_compiled, monkeypatch):
    monkeypatch.setattr(peers, "TILE", 5 * 4)
    workload = Workload(small(rule, topology))
    for make in (OURS["gut_fast"], *PEERS.values()):
        contender = make(workload)
        assert 0 < check(contender, workload) < 3e-5
        assert 0 < check(contender, workload) < 3e-5  # which begins with a state that is not zero


def test_half_precision_is_computed_in_float32_or_not_at_all(not_compiled):
    workload = Workload(small(dtype="bfloat16", parameters=300))
    assert 1e-5 < check(PEERS["compile"](workload), workload) <= 2**-7
    with pytest.raises(Unavailable, match="half precision"):
        PEERS["eager"](workload)


def test_ceiling_and_sgd_work_on_our_tensors_and_make_no_gossip_step():
    for name in ("ceiling", "SGD"):
        workload = Workload(small("qg_gutm", parameters="mlp"))
        contender, before = OURS[name](workload), workload.values.clone()
        assert check(contender, workload) is None
        contender.step()
        assert not bool((workload.values == before).any())
        assert name == "SGD" or all(bool((state != 0).all()) for state in workload.flat_state())


@pytest.mark.parametrize(
    ("make", "topology", "why"),
    [
        (PEERS["eager"], "one-peer-exponential:8", "changes from step to step"),
        (PEERS["compile"], "ring:513", "a dense matrix of 513 agents"),
        (OURS["graph"], "ring:5", "it is for GPUs"),
        (OURS["backend, triton"], "ring:5", "it is for GPUs"),
    ],
)
def test_who_cannot_take_part_says_why(make, topology, why):
    with pytest.raises(Unavailable, match=why):
        make(Workload(small(topology=topology)))


# Comparison


def spoiled(contender, name, amount, column):
    """The contender, one number of which is wrong after every step."""

    def wrong():
        contender.step()
        contender.blocks()[name][0][3, column] += amount

    return Contender(wrong, contender.blocks)


@pytest.mark.parametrize(("name", "amount"), [("z", 1e-3), ("r", 1e-3), ("z", math.nan), ("r", math.inf)])
def test_one_wrong_number_is_found(name, amount):
    workload = Workload(small())
    with pytest.raises(WrongResultError, match=f"{name} is off by"):
        check(spoiled(OURS["gut_fast"](workload), name, amount, 11), workload)


def test_a_step_that_does_nothing_or_stops_is_found():
    workload = Workload(small())
    ours = OURS["gut_fast"](workload)
    with pytest.raises(WrongResultError, match="after step 1"):
        check(ours._replace(step=lambda: None), workload)
    first = iter([ours.step])
    with pytest.raises(WrongResultError, match="after step 2"):
        check(ours._replace(step=lambda: next(first, lambda: None)()), workload)


def test_of_large_models_the_ends_are_compared():
    workload = Workload(small(parameters=1000))
    for column in (0, -1):
        with pytest.raises(WrongResultError):
            check(spoiled(OURS["gut_fast"](workload), "z", 0.1, column), workload, max_compared=5 * 20)


def test_a_wrong_peer_is_named_and_a_wrong_step_ends_it(monkeypatch):
    def broken(_):
        raise RuntimeError("no such instruction\nand a long story")

    contenders = {
        "wrong": lambda workload: spoiled(OURS["gut_fast"](workload), "z", 1.0, 0),
        "broken": broken,
    }
    found = step.measure(small(), 1, 0.0, contenders)
    assert set(found.measurements) == {"gut_fast", "ceiling", "SGD", "plain tensors"}
    assert found.absent["wrong"].startswith("WRONG, not equal to the reference: z is off by")
    assert found.absent["broken"] == "failed: no such instruction"
    assert found.measurements["gut_fast"].error < 1e-5
    monkeypatch.setattr(step, "interleave", None)  # nothing is timed
    monkeypatch.setattr(step, "OURS", {"gut_fast": contenders["wrong"]})
    with pytest.raises(WrongResultError, match="small: gut_fast differs from the reference: z is off"):
        step.measure(small(), 1, 0.0)


# Timing


def test_everyone_has_turns_and_the_first_step_of_a_turn_is_not_timed():
    log = []

    def sampler(name, seconds):
        return lambda steps: log.append((name, steps)) or [seconds] * steps

    found = interleave({"a": sampler("a", 0.01), "b": sampler("b", 1.0), "c": sampler("c", 1e-6)}, 0.0)
    turns = {"a": 5, "b": 1, "c": timing.MAX_STEPS_A_TURN}
    assert {name: each.samples for name, each in found.items()} == {n: timing.MIN_ROUNDS * k for n, k in turns.items()}
    assert found["b"] == Quantiles(1.0, 1.0, 1.0, 3)
    rounds = log[6:]  # each has taken a step to warm up, and two to see how long they last
    assert rounds[::2] == [(name, 1) for name, _ in rounds[1::2]]
    orders = [tuple(name for name, _ in rounds[first + 1 : first + 6 : 2]) for first in (0, 6, 12)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    assert all(steps == turns[name] for name, steps in rounds[1::2])


def test_quantiles_and_samples_of_a_clock(monkeypatch):
    assert Quantiles.of([float(n) for n in range(101)]) == Quantiles(10.0, 50.0, 90.0, 101)
    assert Quantiles(10.0, 50.0, 90.0, 101).spread == 1.6
    now = itertools.count(0, 10**9)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(now))
    assert timing.wall_sampler(lambda: None, torch.device("cpu"))(3) == [1.0] * 3
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    assert timing.wall_sampler(lambda: None, torch.device("cuda"))(4) == [0.25]
    assert len(waits) == 2


def test_a_gpu_is_busy_with_the_step_between_two_events(monkeypatch):
    now, log = itertools.count(), []

    def event(enable_timing):
        assert enable_timing
        here = SimpleNamespace(synchronize=lambda: log.append("wait"))
        here.record = lambda: log.append("event") or setattr(here, "at", next(now))
        here.elapsed_time = lambda other: 1e3 * (other.at - here.at)
        return here

    monkeypatch.setattr(torch.cuda, "Event", event)
    flushed = SimpleNamespace(zero_=lambda: log.append("flush"))
    assert timing.gpu_sampler(lambda: log.append("step") or next(now), flushed)(2) == [2.0, 2.0]
    assert log == ["flush", "event", "step", "event"] * 2 + ["wait"]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError, match="3"), timing.threads(3):
        raise KeyError(torch.get_num_threads())
    assert torch.get_num_threads() == before


def test_a_busy_machine_is_noticed(monkeypatch):
    seconds = iter([(100.0, 5.0), (104.0, 7.0)])
    monkeypatch.setattr(timing, "_processor_seconds", lambda: next(seconds))
    monkeypatch.setattr(timing.time, "perf_counter", iter([0.0, 4.0]).__next__)
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    with timing.watch(iter([1.0, 3.0]).__next__) as noise:
        pass
    assert noise == ["other processes kept 0.50 processors busy", "the host took 25% of the processors' time away"]


# Results


def result(case="ring", threads=1, ours=0.004, noise=()):
    def measured(median, error=1e-7, busy=None):
        return Measurement(Quantiles(0.9 * median, median, 1.1 * median, 50), busy, error)

    measurements = {
        "gut_fast": measured(ours),
        "ceiling": measured(0.003, None),
        "eager, a": measured(0.02),
        "eager, b": measured(0.016),
    }
    settings = {"bytes": 12_000_000, "agents": 16}
    absent = {"x": "not here", "y": "not here"}
    return Result("step", case, settings, "gut_fast", measurements, absent, list(noise), "cpu", threads, "A CPU, Linux")


def test_rates_and_ratios():
    found = result()
    assert found.fraction_of_ceiling("gut_fast") == pytest.approx(0.75)
    assert (found.fastest("eager"), found.fastest("compile")) == ("eager, b", None)
    assert found.ratio("eager, b") == pytest.approx(4.0)
    assert found.rate("gut_fast") == ("GB/s", "3.0")
    on_gpu = Measurement(Quantiles(1, 1, 1, 3), Quantiles(0.5, 0.5, 0.5, 3))
    assert dataclasses.replace(found, measurements={"gut_fast": on_gpu}).time("gut_fast") == 0.5


def test_a_noisy_run_says_why():
    assert result().doubts == []
    noisy = result(noise=["too loud"])
    noisy.measurements["ceiling"] = Measurement(Quantiles(0.001, 0.003, 0.004, 9))
    assert noisy.doubts == ["too loud", "the times of ceiling spread by 100% of their median"]


def test_results_come_back_from_their_file_and_add_up(tmp_path):
    first, second = result(), dataclasses.replace(result(), device="cuda")
    second.measurements["gut_fast"] = Measurement(Quantiles(1, 2, 3, 4), Quantiles(5, 6, 7, 8), 0.1, {"MB out": 3.0})
    file = results.add([first, second], tmp_path)
    assert (file.name, results.load(file)) == ("a-cpu.json", [first, second])
    newer, *others = result(ours=0.002), result(threads=2), dataclasses.replace(result(), benchmark="train")
    results.add([newer, *others], tmp_path)
    assert results.load(file) == [newer, second, *others]
    file.write_text('{"results": [{"case": 1}]}')
    with pytest.raises(ValueError, match=r"a-cpu.json holds no results of gut-fast bench"):
        results.load(file)


def test_the_tables_show_all_and_say_what_is_noisy():
    found = [result(), result("other", threads=2, noise=["too loud"])]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in results.summary(found).splitlines())
    assert head == ["case", "on", "gut_fast ms", "GB/s", "of ceiling", "eager"]
    numbers = ["4.00", "3.0", "0.75", "4.00"]
    assert rows == [["ring", "1 thread", *numbers], ["other*", "2 threads", *numbers]]
    table = results.case_table(found[0]).splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == ["ceiling", "gut_fast", "eager, b", "eager, a"]
    assert len({len(row) for row in table}) == 1
    described = results.describe(found[1])
    assert "NOISY: too loud" in described
    assert "absent: x; y: not here" in described
    assert "so not compared: ceiling" in described
    assert "A CPU" in results.markdown(found)


# Training


@pytest.fixture(scope="module")
def training():
    return Training("mlp", agents=5, batch_size=3)


def test_all_trainers_train_alike_and_on_new_batches(training):
    trainers = train.enter(training, ["loop", "vmap", "workers"])
    errors = train.compare(trainers, training)
    assert (
        set(errors)
        == set(trainers)
        == {f"gut_fast, {e}" for e in ("loop", "vmap", "workers")} | {*("plain loop", "plain vmap", "one model")}
    )
    assert max(errors.values()) < 1e-4
    plain = trainers["plain loop"]
    first, second = (plain.gradient() for _ in range(2))
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    assert not torch.allclose(first[0][0], first[0][1], atol=1e-3)


@pytest.mark.parametrize(
    ("who", "what"),
    [
        *(("gut_fast, loop", "gradient"), ("one model", "gradient"), ("plain vmap", "step"), ("gut_fast, loop", "r")),
        ("plain vmap", "second step"),
    ],
)
def test_who_trains_wrongly_is_not_timed(who, what, training):
    trainers = train.enter(training, ["loop"])
    right = trainers[who]

    def gradient():
        found = right.gradient()
        found[0].view(-1)[0] += 0.1
        return found

    def tensors():
        z, r = ([tensor.detach().clone() for tensor in each] for each in right.tensors())
        (z if what == "step" else r)[0].view(-1)[0] += 0.1
        return z, r

    updates = iter([right.update])
    wrong = {"gradient": {"gradient": gradient}, "second step": {"update": lambda g: next(updates, len)(g)}}
    trainers[who] = right._replace(**wrong.get(what, {"tensors": tensors}))
    with pytest.raises(WrongResultError, match=f"{who}: its {what.replace('second step', 'r')} is off by"):
        train.compare(trainers, training)


def test_the_compiler_forgets_what_others_have_compiled(monkeypatch):
    """The compiler stops at a number of variants, and would then go on in eager without a word."""

    def reset():
        raise RuntimeError("forgotten")

    monkeypatch.setattr(torch.compiler, "reset", reset)
    with pytest.raises(RuntimeError, match="forgotten"):
        train.measure(Training("mlp", 2, 2), ["compiled-vmap"], 1, 0.0)
    with pytest.raises(RuntimeError, match="forgotten"):
        step.measure(small(), 1, 0.0, PEERS)


def test_bad_trainings():
    with pytest.raises(ValueError, match="unknown model 'vgg'"):
        Training("vgg")
    with pytest.raises(ValueError, match="at least one agent and one sample, got 0 × 32"):
        Training("mlp", 0)
    with pytest.raises(ValueError, match="unknown engine 'jit'; known are loop, vmap, workers"):
        train.enter(Training("mlp", 2, 2), ["jit"])
    with pytest.raises(ValueError, match="graphed engine is for CUDA devices"):
        train.enter(Training("mlp", 2, 2), ["graphed-vmap"])


# Commands


def call(*arguments):
    return CliRunner().invoke(app, [*arguments, *(() if "--seconds" in arguments else ("--seconds", "0"))])


def test_the_commands_measure_print_and_write(tmp_path):
    quick = ("--threads", "1", "--output", str(tmp_path))
    own = (
        "--topology",
        "ring",
        "--agents",
        "3",
        "--agents",
        "4",
        "--columns",
        "7",
        "--rule",
        "dsgd",
        "--peers",
        "eager",
    )
    done = call("step", *own, *quick, "--json", str(tmp_path / "own.json"))
    assert done.exit_code == 0, done.output
    assert "compared before it was timed: error" in done.output
    done = call("train", "--model", "mlp", "--agents", "3", "--batch-size", "2", "--engine", "loop", *quick)
    assert done.exit_code == 0, done.output
    (file,) = (path for path in tmp_path.glob("*.json") if path.name != "own.json")
    *steps, training = results.load(file)
    assert results.load(tmp_path / "own.json") == steps
    assert [each.case for each in steps] == ["dsgd ring:3 7", "dsgd ring:4 7"]
    assert all(set(each.measurements) == {"gut_fast", "ceiling", "SGD", "plain tensors", "eager"} for each in steps)
    assert training.case == "mlp, 3 × 2"
    assert all(each.seconds.p50 > 0 for each in training.measurements.values())
    assert file.with_suffix(".md").read_text(encoding="utf-8") == results.markdown([*steps, training])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("step --case nobody", "unknown case 'nobody'; known are table, large, storage, ring-16"),
        ("step --case dsgd --rule gut", "--case is a whole case"),
        ("step --topology ring:4 --agents 3", "--topology ring:4 has a size already"),
        ("step --columns 3 --model mlp", "leave one out"),
        ("step --backend fpga", "unknown backend 'fpga'"),
        ("step --peers numpy", "--peers: unknown 'numpy'"),
        ("step --device tpu", "unknown device 'tpu'; known are cpu, cuda"),
        ("step --json /no/where.json", "there is no folder /no"),
        ("train --model vgg", "unknown model 'vgg'"),
        ("train --engine jit", "unknown engine 'jit'"),
        ("across --rate 200mbit", "gut-fast bench across has moved; use python benchmarks/across.py"),
        ("scaling --axis agents", "gut-fast bench scaling has moved; use gut-fast bench step --agents 4"),
    ],
)
def test_bad_arguments(arguments, message):
    command, *options = arguments.split()
    assert message in str(call(command, *options).exception)


def test_a_wrong_step_ends_the_command(monkeypatch):
    still = Contender(lambda: None, lambda: {"z": [torch.ones(16, 9)]})
    monkeypatch.setattr(step, "OURS", {"gut_fast": lambda _: still})
    done = call("step", "--columns", "9", "--threads", "1", "--peers", "none")
    assert done.exit_code == 1
    assert "NOT TIMED: gut ring:16 9: gut_fast differs from the reference" in done.output


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no GPU here; use 'cpu'"):
        find_device("cuda")
