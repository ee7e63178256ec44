import json
import math
from types import SimpleNamespace

import pytest
import torch

from gut_fast.benchmark import comparison, formulations, overhead, pictures, report, results, run, scaling, timing
from gut_fast.benchmark.cases import CASES, GROUPS, SHAPES, Case, resnet20_shapes
from gut_fast.benchmark.contenders import Ceiling, Contender, GutFast, Kernel, MomentumSGD, Unavailable, Workload
from gut_fast.benchmark.device import CPU
from gut_fast.benchmark.formulations import Compiled, Eager
from gut_fast.benchmark.mixings import MIXINGS
from gut_fast.benchmark.others import AuthorsSequence
from gut_fast.benchmark.peers import enter
from gut_fast.benchmark.results import Measured, Result
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.cli import bench as commands
from gut_fast.cli.terminal import BadArgumentError
from gut_fast.kernels import ops
from gut_fast.rules import RULES

LR = {"lr": 0.05}


def small(rule="gut", topology="ring:5", shapes=((7,), (3, 2)), hyperparameters=LR, **options):
    return Case("small", rule, topology, shapes, hyperparameters, **options)


def error_of(contender, workload):
    return comparison.largest_error(contender, workload, None)


# Cases


def test_resnet20_has_the_65_tensors_of_the_network():
    shapes = resnet20_shapes()
    assert len(shapes) == 65
    assert sum(map(math.prod, shapes)) == 272_474
    assert sum(map(math.prod, SHAPES["lenet5"])) == 61_706
    assert [sum(map(math.prod, resnet20_shapes(width=width))) for width in (32, 64)] == [1_084_586, 4_327_754]


def test_names_of_cases_and_groups_do_not_collide():
    assert not CASES.keys() & GROUPS.keys()
    assert len(CASES) == len(GROUPS["all"]) + len(GROUPS["gpu"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_case_can_be_made(case):
    assert case.make_topology().num_agents >= 10
    assert all(0 < goal <= 1 for goal in case.goals.values())


def test_bytes_are_those_of_the_streams():
    assert small().bytes_per_step(5) == 5 * 5 * 13 * 4
    assert small("gradient_tracking").bytes_per_step(5) == 7 * 5 * 13 * 4
    assert small(dtype="float32", state_dtype="bfloat16").bytes_per_step(5) == 5 * 13 * (3 * 4 + 2 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"shapes": ()}, "at least one number"),
        ({"shapes": ((3, 0),)}, "at least one number"),
        ({"rule": "sgd"}, "unknown rule"),
        ({"hyperparameters": {"lr": 0.1, "mu": 2}}, "mu=2"),
    ],
)
def test_a_bad_case_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# Workload


def test_agents_start_from_one_model_with_gradients_of_their_own():
    workload = Workload(small())
    first = workload.first_rows()[0]
    assert torch.equal(first, first[:1].expand(5, -1))
    gradient = workload.gradient_rows()[0]
    assert gradient.shape == (5, 13)
    assert len(gradient.unique(dim=0)) == 5


def test_parameters_and_gradients_are_views_of_flat_buffers():
    workload = Workload(small())
    assert [tuple(p.shape) for p in workload.parameters] == [(5, 7), (5, 3, 2)]
    workload.values.fill_(2)
    workload.gradients.fill_(3)
    assert all(bool((p == 2).all()) and bool((p.grad == 3).all()) for p in workload.parameters)


def test_rows_of_a_peer_are_those_of_the_parameters():
    workload = Workload(small())
    side_by_side = torch.cat([p.detach().view(5, -1) for p in workload.parameters], dim=1)
    assert torch.equal(workload.first_rows()[0], side_by_side)
    assert torch.equal(torch.cat(workload.first_rows(by_tensor=True), dim=1), side_by_side)
    assert torch.equal(torch.cat(workload.gradient_rows(by_tensor=True), dim=1), workload.gradient_rows()[0])


# Contenders equal the reference


@pytest.mark.parametrize("rule", RULES)
def test_ours_and_the_kernel_equal_the_reference(rule):
    workload = Workload(small(rule))
    ours = GutFast(workload)
    assert error_of(ours, workload) < 1e-5
    assert error_of(Kernel(ours), workload) < 1e-5


@pytest.mark.parametrize("options", [{}, {"by_tensor": True}, {"tiled": True}])
@pytest.mark.parametrize("rule", RULES)
def test_eager_equals_the_reference_for_every_rule(rule, options, monkeypatch):
    monkeypatch.setattr(formulations, "TILE", 5 * 4)
    workload = Workload(small(rule))
    assert error_of(Eager(workload, "index", **options), workload) < 1e-5


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"tiled": True}])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_compiled_equals_the_reference_for_every_rule(rule, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(formulations, "TILE", 5 * 4)
    workload = Workload(small(rule))
    assert error_of(Compiled(workload, "rolls", **options), workload) < 1e-5


def test_in_place_the_parameters_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    contender = Compiled(Workload(small()), "rolls", in_place=True)
    (before,) = contender.blocks()["z"]
    for _ in range(2):
        contender.step()
        assert contender.blocks()["z"][0] is before


TOPOLOGIES = ["ring:6", "torus:3x4", "torus:2x2", "circulant:9:1,4", "hypercube:3", "complete:6", "petersen", "star:5"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("mixing", [name for name in MIXINGS if name != "scipy"])
def test_every_way_to_mix_equals_the_reference_or_says_why_not(mixing, topology, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    workload = Workload(small(topology=topology, hyperparameters={"lr": 0.05, "mu": 0.1}))
    field = enter(workload, ["eager", "compile", "scipy"])
    mine = [contender for name, contender in field.contenders.items() if f", {mixing}" in name]
    assert mine or mixing in ("rolls", "mean")
    for contender in mine:
        assert error_of(contender, workload) < 1e-5


def test_ways_to_mix_apply_where_they_should():
    field = enter(Workload(small(topology="complete:6")), ["eager"])
    assert {"eager, mean", "eager, rolls", "eager, matmul"} <= field.contenders.keys()
    field = enter(Workload(small(topology="petersen")), ["eager"])
    assert {"eager, mean", "eager, rolls"} <= field.absent.keys()
    assert "eager, index" in field.contenders


@pytest.mark.parametrize("topology", ["ring:5", "petersen"])
@pytest.mark.parametrize("rule", ["gut", "qg_gutm"])
def test_the_published_sequence_equals_the_reference(rule, topology):
    workload = Workload(small(rule, topology))
    assert error_of(AuthorsSequence(workload), workload) < 1e-5


def test_in_bfloat16_a_step_of_float32_arithmetic_is_equal_and_one_of_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    workload = Workload(small(dtype="bfloat16", shapes=((300,),)))
    assert error_of(Compiled(workload, "index"), workload) <= 2**-7
    with pytest.raises(Unavailable, match="half precision"):
        Eager(workload, "index")


# What is not equal is not timed


class Wrong(Contender):
    """Right but for one number."""

    family = "eager"

    def __init__(self, workload, change):
        self.right, self.change = Eager(workload, "index"), change

    def step(self):
        self.right.step()
        self.change(self.right.blocks())

    def blocks(self):
        return self.right.blocks()


def shift_one(name, amount):
    def change(blocks):
        blocks[name][0][3, 11] += amount

    return change


@pytest.mark.parametrize("name", ["z", "r"])
@pytest.mark.parametrize("amount", [1e-3, math.nan, math.inf])
def test_one_wrong_number_is_found(name, amount):
    workload = Workload(small())
    with pytest.raises(comparison.WrongResultError, match=f"{name} is off"):
        error_of(Wrong(workload, shift_one(name, amount)), workload)


def test_a_step_that_does_nothing_is_found(monkeypatch):
    workload = Workload(small())
    ours = GutFast(workload)
    monkeypatch.setattr(ours, "step", lambda: None)
    with pytest.raises(comparison.WrongResultError, match="after step 1"):
        error_of(ours, workload)


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(Eager, "step", lambda self: self.parts[0].places[0].add_(1))
    result = run.run(small(), 1, 0.0, ("ceiling", "eager"))
    assert set(result.contenders) == {"ceiling", "gut_fast"}
    assert result.absent["eager, index"].startswith("not equal to the reference: z is off by")


def test_a_peer_that_fails_is_named_and_not_timed(monkeypatch):
    def fail(self):
        raise RuntimeError("no such instruction\nand a long story")

    monkeypatch.setattr(Eager, "step", fail)
    result = run.run(small(), 1, 0.0, ("ceiling", "eager"))
    assert set(result.contenders) == {"ceiling", "gut_fast"}
    assert result.absent["eager, index"] == "failed: no such instruction"


def test_if_ours_is_wrong_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(GutFast, "step", lambda self: None)
    monkeypatch.setattr(timing, "interleave", None)
    with pytest.raises(comparison.WrongResultError, match="small: gut_fast differs from the reference"):
        run.run(small(), 1, 0.0, ("ceiling",))


def test_of_large_models_the_ends_of_every_tensor_are_among_the_compared_columns():
    workload = Workload(small(shapes=((400,), (100,), (500,))))
    columns = comparison.checked_columns(workload, max_elements=5 * 200)
    assert {0, 399, 400, 499, 500, 999} <= set(columns.tolist())
    assert len(columns) <= 200
    assert torch.equal(columns, columns.unique())
    assert comparison.checked_columns(workload, max_elements=5 * 1000) is None


def test_a_wrong_last_column_is_found_in_a_sample():
    workload = Workload(small(shapes=((1000,),)))
    columns = comparison.checked_columns(workload, max_elements=5 * 200)
    wrong = Wrong(workload, lambda blocks: blocks["z"][0][:, -1].add_(0.1))
    with pytest.raises(comparison.WrongResultError):
        comparison.largest_error(wrong, workload, columns)


# The field


def test_sgd_and_ceiling_work_on_our_tensors_and_make_no_gossip_step():
    field = enter(Workload(small()), ["ceiling", "sgd"])
    ours, ceiling, sgd = (field.contenders[name] for name in ("gut_fast", "ceiling", "momentum SGD, fused"))
    assert isinstance(ceiling, Ceiling)
    assert isinstance(sgd, MomentumSGD)
    for contender in (ceiling, sgd):
        before = ours.workload.values.clone()
        contender.step()
        assert contender.blocks() is None
        assert not (ours.workload.values == before).any()


def test_the_ceiling_runs_over_state_and_all_tensors():
    ours = GutFast(Workload(small("qg_gutm")))
    Ceiling(ours).step()
    assert all(bool((state != 0).all()) for state in ours.flat_state())


def test_who_does_not_fit_in_memory_stays_away(monkeypatch):
    workload = Workload(small())
    room = 4 * workload.values.numel() * 4
    monkeypatch.setattr(workload.device, "room", lambda: room, raising=False)
    field = enter(workload, ["ceiling", "sgd", "eager"])
    assert set(field.contenders) == {"ceiling", "gut_fast", "momentum SGD, fused"}
    assert "of memory" in field.absent["eager, index"]


def test_time_varying_topologies_are_timed_without_peers():
    result = run.run(small(topology="one-peer-exponential:8"), 1, 0.0)
    assert set(result.contenders) == {"ceiling", "gut_fast", "momentum SGD, fused"}
    assert "changes from step to step" in result.absent["kernel"]


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="unknown peers numpy; known are ceiling"):
        enter(Workload(small()), ["numpy"])


# Timing


def test_quantiles():
    quantiles = Quantiles.of([float(n) for n in range(101)])
    assert quantiles == Quantiles(10.0, 50.0, 90.0, 101)
    assert quantiles.spread == 1.6


def test_everyone_has_turns_and_the_first_step_of_a_turn_is_not_timed():
    calls = dict.fromkeys("abc", 0)

    def counting(name):
        def step():
            calls[name] += 1

        return step

    quantiles = timing.interleave({name: counting(name) for name in calls}, seconds=0.0)
    assert list(quantiles) == ["a", "b", "c"]
    for name, each in quantiles.items():
        assert each.samples == timing.MIN_ROUNDS * timing.MAX_STEPS_A_TURN
        assert calls[name] > each.samples
        assert 0 < each.p10 <= each.p50 <= each.p90


def test_threads_are_put_back(threads):
    threads(2)

    def fail_on_one_thread():
        with timing.threads(1):
            raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match="1"):
        fail_on_one_thread()
    assert torch.get_num_threads() == 2


QUIET = Disturbance(0.1, 0.5, 10.0, others=0.05, stolen=0.0, switches=20, spread=0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"others": None, "stolen": None}, None),
        ({"others": 0.8}, "other processes kept 0.80 processors busy"),
        ({"stolen": 0.1}, "the host took 10% of the processors' time away"),
        ({"switches": 4000}, "400 involuntary context switches a second"),
        ({"spread": 0.5}, "the ceiling's own times spread by 50% of their median"),
    ],
)
def test_a_noisy_run_says_why(change, reason):
    disturbance = Disturbance(**{**vars(QUIET), **change})
    assert disturbance.reasons() == ([] if reason is None else [reason])


def test_watching_sees_what_happens():
    with timing.watch() as seen:
        sum(range(10_000))
    assert seen.seconds > 0
    assert seen.switches >= 0
    assert seen.others is None or seen.others >= 0


def test_the_python_part_is_measured_and_the_kernel_put_back():
    from gut_fast import _core

    before = vars(_core).copy()
    ours = GutFast(Workload(small()))
    part = overhead.python_part(ours, 0.0)
    assert part.samples == overhead.MIN_STEPS
    assert part.p50 > 0
    assert vars(_core) == before
    assert error_of(ours, ours.workload) < 1e-5


def test_no_python_part_without_the_kernel():
    with pytest.raises(Unavailable, match="compiled kernel"):
        overhead.python_part(GutFast(Workload(small(backend="torch"))), 0.0)


# Results


def measured(median, family="eager"):
    return Measured(family, Quantiles(0.9 * median, median, 1.2 * median, 50), None if family == "sgd" else 1e-7)


def result_of(case="ring-16", threads=1, ours=0.004, goal=0.8, disturbance=QUIET, **changes):
    contenders = {
        "ceiling": Measured("ceiling", Quantiles(0.002, 0.003, 0.004, 60), None),
        "gut_fast": measured(ours, "gut_fast"),
        "momentum SGD, fused": measured(0.005, "sgd"),
        "eager, rolls": measured(0.02),
        "eager, index": measured(0.016),
    }
    fields = {
        "case": case,
        "rule": "gut",
        "topology": "ring(16)",
        "agents": 16,
        "columns": 1000,
        "tensors": 65,
        "storage": "float32",
        "hyperparameters": LR,
        "threads": threads,
        "bytes": 12_000_000,
        "streams": 5,
        "compared_columns": 1000,
        "contenders": contenders,
        "absent": {"jax, rolls": "jax is not installed"},
        "goal": goal,
        "python_part": Quantiles(4e-5, 5e-5, 6e-5, 10),
        "disturbance": disturbance,
        "machine": "AMD EPYC, Linux x86_64, 1 thread, instruction tier x86-64-v3",
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-01 00:00 UTC",
    }
    return Result(**{**fields, **changes})


def test_fractions_rates_and_ratios():
    result = result_of()
    assert result.fraction_of_ceiling() == 0.75
    assert result.rate() == 3e9
    assert result.best("eager") == "eager, index"
    assert result.best("jax") is None
    assert result.times_ours("eager, index") == 4.0


def test_without_a_ceiling_there_is_no_fraction():
    contenders = {"gut_fast": measured(0.004, "gut_fast")}
    result = result_of(contenders=contenders)
    assert result.fraction_of_ceiling() is None
    assert not report.is_reached(result)


def test_results_survive_their_file(tmp_path):
    given = [result_of(), result_of(threads=2, python_part=None)]
    results.save(given, tmp_path / "r.json")
    assert results.load(tmp_path / "r.json") == given
    entry = json.loads((tmp_path / "r.json").read_text())["results"][0]
    assert entry["derived"]["gut_fast"]["fraction_of_ceiling"] == 0.75
    assert entry["machine"].startswith("AMD EPYC")
    assert entry["disturbance"]["load_before"] == 0.1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{}]}', '{"results": 3}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json holds no results"):
        results.load(tmp_path / "r.json")


def test_new_results_replace_old_ones_of_the_same_case_and_threads():
    old = [result_of(), result_of(threads=2)]
    new = [result_of(threads=2, ours=0.001), result_of("torus-32")]
    assert results.merge(old, new) == [old[0], new[0], new[1]]


@pytest.mark.parametrize(
    ("machine", "slug"),
    [("AMD EPYC, Linux x86_64", "amd-epyc"), ("Intel(R) Xeon(R) @ 2.0GHz", "intel-r-xeon-r-2-0ghz"), ("", "machine")],
)
def test_files_are_named_after_the_processor(machine, slug):
    assert results.machine_slug(machine) == slug


# Report and pictures


def test_lines_below_a_table_say_what_was_checked_and_reached():
    lines = "\n".join(report.case_lines(result_of()))
    assert "12.0 MB in 5 streams" in lines
    assert "equal to the float64 reference over 3 steps, all columns: error 1e-07" in lines
    assert "not compared: ceiling, momentum SGD, fused" in lines
    assert "goal 0.80 of the ceiling: NOT reached" in lines
    assert "Python part of a step: 50 µs (40 – 60), goal 60 µs" in lines
    assert "absent: jax, rolls: jax is not installed" in lines
    assert "NOISY" not in lines


def test_a_goal_is_reached_to_two_digits():
    assert report.is_reached(result_of(goal=0.75))
    assert report.is_reached(result_of(goal=0.754))
    assert not report.is_reached(result_of(goal=0.76))
    assert not report.is_reached(result_of(goal=None))


def test_noise_is_said_below_the_table_and_starred_in_markdown():
    noisy = result_of(disturbance=Disturbance(**{**vars(QUIET), "others": 1.0}))
    assert "NOISY RUN: other processes kept 1.00 processors busy" in list(report.case_lines(noisy))
    text = report.markdown([noisy, result_of(threads=2)])
    assert "| ring-16* | 1 | 4.00 | 3.0 | 0.75 | 0.80 | 1.25 | 4.00 | 50 |" in text
    assert "| ring-16 | 2 |" in text
    assert "1 of 2 runs were disturbed." in text
    assert "Measured on AMD EPYC, Linux x86_64, instruction tier x86-64-v3; torch 2.13.0." in text


def test_a_picture_is_written(tmp_path):
    pictures.draw_results([result_of(), result_of(threads=2, goal=None)], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_a_ceiling(tmp_path):
    without = result_of(contenders={"gut_fast": measured(0.004, "gut_fast")})
    with pytest.raises(ValueError, match="ceiling"):
        pictures.draw_results([without], tmp_path / "p.png")


# Commands


def bench(*arguments):
    return commands.app(list(arguments), standalone_mode=False)


QUICK = ("--columns", "200", "--threads", "1", "--seconds", "0", "--peers", "none")


def test_a_case_of_ones_own(capsys, tmp_path):
    bench("step", "--topology", "ring", "--agents", "6", "--rule", "dsgd", *QUICK, "--json", str(tmp_path / "r.json"))
    out = capsys.readouterr().out
    assert "dsgd ring:6 200 float32: dsgd on ring(6), 200 columns, float32, 1 thread" in out
    (result,) = results.load(tmp_path / "r.json")
    assert (result.agents, result.columns, result.rule, result.threads) == (6, 200, "dsgd", 1)
    assert set(result.contenders) == {"ceiling", "gut_fast"}
    assert result.versions["torch"] == torch.__version__
    assert result.disturbance.seconds > 0


def test_a_model_brings_its_tensors_and_its_python_part(capsys, tmp_path):
    arguments = ("--model", "lenet5", "--agents", "3", *QUICK[2:])
    bench("step", *arguments, "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "p.png"))
    (result,) = results.load(tmp_path / "r.json")
    assert (result.tensors, result.columns) == (10, 61_706)
    assert result.python_part.p50 > 0
    assert "Python part of a step" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 0


def test_results_in_a_folder_add_up(capsys, tmp_path):
    for agents in ("4", "6", "4"):
        bench("step", "--agents", agents, *QUICK, "--output", str(tmp_path / "new"))
    (file,) = (tmp_path / "new").glob("*.json")
    assert [result.agents for result in results.load(file)] == [4, 6]
    assert file.with_suffix(".md").read_text().count("| gut ring:") == 2
    assert file.with_suffix(".png").exists()


def test_if_ours_is_wrong_the_exit_code_is_1(capsys, monkeypatch):
    monkeypatch.setattr(ops, "gossip_step_", lambda *arguments: None)
    monkeypatch.setattr(GutFast, "step", lambda self: None)
    assert bench("step", *QUICK) == 1
    assert "NOT TIMED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "ring"), "unknown case 'ring'; known are table, large"),
        (("--case", "table", "--columns", "5"), "--case is a whole case; leave out --columns"),
        (("--columns", "5", "--model", "lenet5"), "leave one out"),
        (("--model", "resnet50"), "unknown model 'resnet50'; known are resnet20, lenet5"),
        (("--topology", "ring:8", "--agents", "4"), "has a size already"),
        (("--topology", "circle:8"), "unknown topology 'circle'"),
        (("--rule", "adam"), "unknown rule 'adam'"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--backend", "gpu"), "unknown backend 'gpu'"),
        (("--device", "tpu"), "unknown device 'tpu'; known are cpu, cuda"),
        (("--peers", "numpy"), "unknown numpy; known are all, none, ceiling"),
        (("--json", "nowhere/r.json"), "there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_timed(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "run", None)
    with pytest.raises(BadArgumentError) as error:
        bench("step", *arguments)
    assert message in str(error.value)


def test_threads_default_to_one_and_all(threads):
    threads(2)
    assert commands._thread_counts(None, CPU) == [1, 2]
    assert commands._thread_counts([4, 1, 4], CPU) == [1, 4]


def test_threads_of_a_gpu(monkeypatch):
    monkeypatch.setattr(commands, "find_device", lambda name: SimpleNamespace(is_gpu=name == "cuda"))
    with pytest.raises(BadArgumentError, match="--threads 1, 2: on a GPU a case is timed once"):
        bench("step", "--device", "cuda", "--threads", "1", "--threads", "2")


# Scaling


def test_curves_reach_as_far_as_promised():
    agents, columns, degree = (scaling.curves([axis]) for axis in ("agents", "columns", "degree"))
    assert max(agents[0].cases) == 4096
    assert min(agents[0].cases) == 1
    assert (min(columns[0].cases), max(columns[0].cases)) == (1000, 100_000_000)
    assert (min(degree[0].cases), max(degree[0].cases)) == (1, 63)


def test_places_along_the_degree_are_degrees():
    (curve,) = scaling.curves(["degree"])
    for degree, case in curve.cases.items():
        topology = case.make_topology()
        assert {len(topology.neighbors(i)) for i in range(topology.num_agents)} == {degree}


def test_the_largest_points_of_a_curve_need_what_their_buffers_do():
    case = scaling.curves(["columns"])[0].cases[100_000_000]
    assert scaling.memory_needed(case) == 3 * 4 * 4 * 100_000_000


def tiny_curve(label="ring of 4"):
    cases = {d: Case(f"{d}", "gut", "ring:4", ((d,),), LR) for d in (100, 1000)}
    return scaling.Curve("columns", label, cases)


def test_scaling_measures_writes_and_keeps_other_axes(capsys, monkeypatch, tmp_path):
    columns = tiny_curve()
    agents = scaling.Curve("agents", "ring", {4: columns.cases[100]})
    monkeypatch.setattr(scaling, "AXES", {"agents": lambda: iter([agents]), "columns": lambda: iter([columns])})
    for axis in ("columns", "agents", "columns"):
        columns.points.clear()
        bench("scaling", "--axis", axis, "--seconds", "0", "--output", str(tmp_path))
    (file,) = tmp_path.glob("scaling-*-1-thread.json")
    kept = scaling.load(file)
    assert [(curve.axis, [point.x for point in curve.points]) for curve in kept] == [
        ("agents", [4]),
        ("columns", [100, 1000]),
    ]
    assert all(point.seconds > 0 and point.fraction == point.ceiling / point.seconds for point in kept[1].points)
    assert file.with_suffix(".png").stat().st_size > 0
    assert "ns a number" in capsys.readouterr().out


def test_points_too_large_for_the_memory_are_left_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "AXES", {"columns": lambda: iter([tiny_curve()])})
    monkeypatch.setattr(scaling, "room", lambda: 3 * 4 * 4 * 500)
    bench("scaling", "--seconds", "0", "--output", str(tmp_path))
    assert "1,000  left out: 0.0 GB, more than a quarter of the memory" in capsys.readouterr().out


def test_unknown_axes_are_refused():
    with pytest.raises(BadArgumentError, match="unknown axis width; known are agents, columns, degree"):
        bench("scaling", "--axis", "width")
