"""What a sweep's file says, and the runs that it becomes."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from gut_fast.files import FileError
from gut_fast.study import Experiment
from gut_fast.study.experiment import ENTRIES, MAX_SEEDS, make_experiment, seeds_of
from gut_fast.study.sweep import Sweep, make_sweep, read_sweep
from gut_fast.study.yaml_files import read_yaml, write_yaml

GUT = {"GUT": {"rule": "gut"}}


def tasks_of(**content):
    return make_sweep({"methods": GUT, **content}).tasks()


def test_every_combination_is_a_run_seed_after_seed():
    methods = {"DSGD": {"rule": "dsgd", "lr": 0.3}, "GUT": {"rule": "gut", "mu": 0.5}}
    grid = {"alpha": [0.01, 1], "topology": ["ring:4", "ring:8"]}
    tasks = make_sweep({"settings": {"lr": 0.2, "steps": 5}, "methods": methods, "grid": grid, "seeds": [7, 2]}).tasks()
    assert [(task.experiment.seed, *task.point.values(), task.method) for task in tasks] == [
        (seed, alpha, topology, method)
        for seed in (7, 2)
        for alpha in (0.01, 1)
        for topology in ("ring:4", "ring:8")
        for method in ("DSGD", "GUT")
    ]
    assert tasks[3].point == {"alpha": 0.01, "topology": "ring:8"}
    assert tasks[3].experiment == Experiment(
        steps=5,
        lr=0.2,
        rule="gut",
        hyperparameters={"mu": 0.5, "kappa": 1.0},
        topology="ring:8",
        partition_options={"alpha": 0.01},
        seed=7,
    )
    assert tasks[2].experiment.lr == 0.3


def test_settings_of_all_runs_go_to_what_has_them():
    methods = {"DSGD": {"rule": "dsgd"}, "GUTm": {"rule": "gutm"}, "own": {"rule": "gutm", "momentum": 0.5}}
    tasks = make_sweep(
        {
            "settings": {"momentum": 0.8, "alpha": 0.1, "hyperparameters": {}},
            "methods": methods,
            "grid": {"partition": ["dirichlet", "iid"]},
        }
    ).tasks()
    assert [task.experiment.hyperparameters.get("momentum") for task in tasks] == [None, 0.8, 0.5] * 2
    assert [task.experiment.partition_options for task in tasks] == [{"alpha": 0.1}] * 3 + [{}] * 3


def test_a_preset_is_overridden_by_settings_and_methods():
    preset = "fashion-mnist-lenet5-ring16"
    tasks = make_sweep({"preset": preset, "settings": {"steps": 7, "lr": 0.01}, "seeds": 2}).tasks()
    assert [task.method for task in tasks] == ["DSGD", "GUT", "QG-DSGDm", "QG-GUTm", "QG-DSGDm β+μ"] * 2
    assert {(t.experiment.model, t.experiment.steps, t.experiment.lr) for t in tasks} == {("lenet5", 7, 0.01)}
    (task,) = tasks_of(preset=preset, grid={"alpha": [5]})
    assert (task.experiment.data, task.experiment.partition_options) == ("fashion-mnist", {"alpha": 5})


# Controls


def test_a_control_has_the_momentum_of_the_average_at_every_point():
    methods = {"DSGD": {"rule": "dsgd"}, "QG-GUTm": {"rule": "qg_gutm"}, "other": {"rule": "qg_gutm", "momentum": 0.5}}
    tasks = make_sweep({"methods": methods, "settings": {"mu": 0.05}}).tasks()
    assert [(task.method, task.control_of) for task in tasks] == [
        ("DSGD", None),
        ("QG-GUTm", None),
        ("QG-DSGDm β+μ", "QG-GUTm"),
        ("other", None),
        ("other control β+μ", "other"),
    ]
    assert tasks[2].experiment.hyperparameters == {"momentum": 0.95, "mu": 0.0}
    assert tasks[4].experiment.hyperparameters == {"momentum": 0.55, "mu": 0.0}
    assert tasks[2].experiment.lr == tasks[1].experiment.lr

    method = {"QG-GUTm": {"rule": "qg_gutm", "momentum": 0.8}}
    tasks = make_sweep({"methods": method, "grid": {"mu": [0, 0.1, 0.01]}}).tasks()
    assert [task.control_of for task in tasks] == [None, None, "QG-GUTm", None, "QG-GUTm"]
    assert [task.experiment.hyperparameters["momentum"] for task in tasks] == [0.8, 0.8, 0.9, 0.8, 0.81]
    assert [task.point["mu"] for task in tasks] == [0, 0.1, 0.1, 0.01, 0.01]


def test_controls_can_be_left_out_or_named_in_the_file():
    method = {"QG-GUTm": {"rule": "qg_gutm", "mu": 0.05}}
    assert len(make_sweep({"methods": method, "controls": False}).tasks()) == 1
    own = {**method, "QG-DSGDm β+μ": {"rule": "qg_dsgdm", "momentum": 0.95}}
    assert [task.experiment.rule for task in make_sweep({"methods": own}).tasks()] == ["qg_gutm", "qg_dsgdm"]


# Names of files


def test_names_say_what_a_reader_looks_for():
    task, constant = make_sweep(
        {
            "methods": {"GUT": {"rule": "gut", "lr": 0.3}},
            "grid": {"alpha": [0.01], "topology": ["sequence:ring:4+star:4"], "milestones": [[0.5, 0.75], []]},
            "seeds": [12],
        }
    ).tasks()
    assert re.fullmatch(
        r"gut\.alpha-0\.01\.topology-sequence-ring-4\+star-4\.milestones-0\.5\+0\.75\.seed-12\.[0-9a-f]{8}", task.name
    )
    assert ".milestones-none.seed-12." in constant.name
    assert task.point["milestones"] == [0.5, 0.75]
    json.dumps(task.point)


def test_names_depend_on_every_setting_and_on_nothing_else():
    settings = [{}, {"lr": 0.2}, {"mu": 0.3}, {"alpha": 1}, {"weight_decay": 1e-4}, {"milestones": []}, {"pool": 2}]
    names = [tasks_of(settings=each)[0].name for each in settings]
    assert len(set(names)) == len(names)
    assert tasks_of(settings={"lr": 0.1, "steps": 400})[0].name == tasks_of(settings={})[0].name
    assert tasks_of(seeds=3)[1].name == tasks_of(seeds=[1])[0].name
    assert tasks_of(settings={"alpha": 0.1})[0].name == names[0]
    # Folders of earlier versions go on: the name of a run does not change.
    assert names[0] == "gut.seed-0.bf465ec1"


@pytest.mark.parametrize("label", ["x" * 300, "μ" * 300, "../../etc", "***", ".hidden", "a/b\\c:d", " ", "1"])
def test_names_are_short_and_portable_whatever_the_label(tmp_path, label):
    (task,) = make_sweep({"methods": {label: {"rule": "gut"}}, "grid": {"alpha": [0.1]}}).tasks()
    assert task.method == label
    assert len(f".{task.name}.jsonl.1234567.tmp".encode()) < 255
    assert Path(task.name).name == task.name
    assert not task.name.startswith((".", "-"))
    (tmp_path / f"{task.name}.jsonl").touch()


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "section 'methods' must hold names and values, got None"),
        ({"methods": None}, "section 'methods' must hold names and values, got None"),
        ({"methods": {}}, "at least one method and one seed"),
        ({"methods": {"GUT": "gut"}}, "method 'GUT' must have settings with a rule, such as"),
        ({"methods": {"GUT": {"mu": 0.9}}}, "method 'GUT' must have settings with a rule"),
        ({"methods": {"mine": {"rule": "my_rule"}}}, "method 'mine': unknown rule 'my_rule'; known are dsgd"),
        ({"methods": {"GUT": {"rule": ["gut"]}}}, "method 'GUT': a rule is a name or an UpdateRule, got list"),
        ({"methods": {"": {"rule": "gut"}}}, "a method has no name; write one before its colon"),
        ({"methods": {1: {"rule": "gut"}, "1": {"rule": "d2"}}}, "two methods are called '1'"),
        (
            {"methods": {"DSGD": {"rule": "dsgd", "mu": 0.5}}},
            "'DSGD': there is no 'mu' for rule 'dsgd' and .*; there are data",
        ),
        (
            {"methods": {"GUT": {"rule": "gut", "alhpa": 1}}},
            "there is no 'alhpa' .*; did you mean 'alpha'?",
        ),
        ({"methods": {"GUT": {"rule": "gut", "mu": "high"}}}, "method 'GUT': rule 'gut': mu must be a number"),
        ({"methods": {"GUT": {"rule": "gut", "mu": 2}}}, "method 'GUT': rule 'gut': mu=2 is outside"),
        ({"methods": {"Q": {"rule": "qg_gutm", "mu": 0.1}}}, "'Q': momentum 0.9 and mu 0.1: their sum, .* controls"),
        ({"method": GUT}, "there is no section 'method'; did you mean 'methods'?"),
        ({"tune": {}}, "there is no section 'tune'; there are controls, grid, methods"),
        ({"preset": "mnist"}, "unknown preset 'mnist'"),
        ({"preset": ["mnist"]}, r"unknown preset \['mnist'\]"),
        ({"settings": None}, "section 'settings' must hold names and values, got None"),
        ({"settings": {"stpes": 5}}, "settings: no run has 'stpes'; did you mean 'steps'?"),
        ({"settings": {"alhpa": 0.1}}, "settings: no run has 'alhpa'; did you mean 'alpha'?"),
        ({"settings": {"momentum": 0.9}}, "settings: no run has 'momentum'"),
        ({"settings": {"alpha": 1, "partition": "iid"}}, "settings: no run has 'alpha'"),
        ({"settings": {"steps": "many"}}, "method 'GUT': steps must be a int, got str 'many'"),
        ({"settings": {"milestones": 0.5}}, "milestones must be a list, such as"),
        ({"settings": {"hyperparameters": 5}}, "hyperparameters must hold names and values, got 5"),
        ({"settings": {"seed": 3}}, "no 'seed' among what can be set; section 'seeds'"),
        ({"grid": {"seed": [3]}}, "no 'seed' among what can be set"),
        ({"methods": {"GUT": {"rule": "gut", "seed": 1}}}, "no 'seed' among what can be set"),
        ({"grid": {"alpha": 0.1}}, "grid: alpha must be a list of at least one value, got 0.1"),
        ({"grid": {"alpha": []}}, "grid: alpha must be a list of at least one value"),
        ({"grid": {"alpha": [0.1, 0.1]}}, "two runs are the same, gut.alpha-0.1.seed-0.* the grid names twice"),
        ({"grid": {"colour": ["red"]}}, r"method 'GUT' at \{'colour': 'red'\}: there is no 'colour' for rule 'gut'"),
        ({"grid": {"rule": ["gut", "d2"]}}, "method 'GUT' sets rule, and so does the grid"),
        ({"settings": {"steps": 20, "local_steps": 21}}, "'GUT': local_steps=21 is more than steps=20: .* at most 20"),
        (
            {"settings": {"steps": 20}, "grid": {"local_steps": [20, 21]}},
            "'GUT' at {'local_steps': 21}: local_steps=21 is more than steps=20: .* nothing would be sent",
        ),
        ({"controls": "no"}, "controls must be true or false, got 'no'"),
        ({"seeds": 0}, "seeds must be how many, at least 1, or a list of integers, got 0"),
        ({"seeds": []}, "seeds must be how many"),
        ({"seeds": [0, 0]}, "seeds must be from 0 to below 2.63 and none named twice"),
    ],
)
def test_what_describes_no_sweep_is_told(content, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_sweep({"methods": GUT, **content} if content.keys() - {"method"} else content)


def test_a_sweep_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="at least one method and one seed"):
        Sweep({}, GUT, {}, [])
    with pytest.raises(ValueError, match="method 'GUT' sets mu, and so does the grid"):
        Sweep({}, {"GUT": {"rule": "gut", "mu": 0.5}}, {"mu": [0.1]}, [0])


@pytest.mark.parametrize("value", [True, "3", 1.5, [True], ["1"], [-1], [2**63], -3, MAX_SEEDS + 1, 10**12, None])
def test_seeds_that_are_none(value):
    with pytest.raises((TypeError, ValueError), match="seeds"):
        seeds_of(value)


def test_options_that_are_of_use_to_none_may_be_common_but_not_own():
    assert make_experiment({"mu": 0.5}, {"rule": "dsgd"}).hyperparameters == {}
    with pytest.raises(ValueError, match="there is no 'mu' for rule 'dsgd'"):
        make_experiment({"rule": "dsgd"}, {"mu": 0.5})
    with pytest.raises(ValueError, match="there is no 'alpha' for rule 'gut' and partition 'iid'"):
        make_experiment({"partition": "iid"}, {"alpha": 0.5})


def test_a_partition_has_alpha_from_the_experiments_default_where_it_takes_one():
    grid = {"partition": ["dirichlet", "dirichlet-blocks", "iid"]}
    alpha = Experiment().partition_options["alpha"]
    assert [task.experiment.partition_options for task in tasks_of(grid=grid)] == [{"alpha": alpha}] * 2 + [{}]
    (task,) = tasks_of(settings={"partition_options": {"alpha": 2}})
    assert task.experiment.partition_options == {"alpha": 2}


# Files


def test_a_file_is_read_with_its_numbers(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "settings: {steps: 8, decay: 1e-1, milestones: [1e-1]}\n"
        "methods:\n  GUT μ: {rule: gut, mu: 5e-1}\n  3: {rule: dsgd}\n"
        "grid: {lr: [1e-3, 1e-2], milestones: [[], [5e-1]]}\n"
        "tune: {of: another module}\n"
    )
    tasks = read_sweep(file).tasks()
    assert {task.method for task in tasks} == {"GUT μ", "3"}
    assert tasks[0].experiment.hyperparameters == {"mu": 0.5, "kappa": 1.0}
    assert [task.point for task in tasks[::2]] == [
        {"lr": lr, "milestones": milestones} for lr in (0.001, 0.01) for milestones in ([], [0.5])
    ]
    assert [(task.experiment.lr, task.experiment.decay) for task in tasks[::4]] == [(0.001, 0.1), (0.01, 0.1)]


@pytest.mark.parametrize("name", ["no", "Yes", "1", "1.10", "0x10", "null", "~", "2026-11-30", "1e-3", "=", "'no'"])
def test_names_are_text_as_it_is_written(tmp_path, name):
    """YAML's own loader makes False of no, and 1.1 of 1.10."""
    file = tmp_path / "sweep.yaml"
    file.write_text(f"methods:\n  {name}: {{rule: gut, nesterov: no}}\n")
    assert read_yaml(file) == {"methods": {name.strip("'"): {"rule": "gut", "nesterov": False}}}
    write_yaml(read_yaml(file), tmp_path / "copy.yaml")
    assert read_yaml(tmp_path / "copy.yaml") == read_yaml(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"methods:\n\tGUT: 1\n", r"sweep\.yaml is not YAML: .*'\\t'"),
        (b"methods: {GUT: {rule: gut}, GUT: {rule: d2}}\n", r"sweep\.yaml is not YAML: 'GUT' stands twice.* line 1"),
        (b"seeds: 1\nmethods: {GUT: {rule: gut}}\nseeds: 2\n", r"'seeds' stands twice\s+in .*line 3"),
        (b"methods: {GUT: {<<: {rule: gut}, lr: 1, lr: 2}}\n", r"sweep\.yaml is not YAML: 'lr' stands twice.* line 1"),
        (b"methods: {1: {rule: gut}, '1': {rule: d2}}\n", r"sweep\.yaml is not YAML: '1' stands twice"),
        (b"methods: {'': {rule: gut}}\n", r"sweep\.yaml: a method has no name"),
        (b"methods: [GUT\n", r"sweep\.yaml is not YAML"),
        (b"\xff\xfe", r"sweep\.yaml is not YAML"),
        (b"", r"sweep\.yaml must hold names and values, got None"),
        (b"- GUT\n", r"sweep\.yaml must hold names and values, got \['GUT'\]"),
        (b"methods: {GUT: {rule: gut, lr: fast}}\nseeds: x\n", r"sweep\.yaml: seeds must be"),
        (b"a: !!python/object/apply:os.getcwd []\nmethods: {}\n", r"sweep\.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        read_sweep(file)


LIMITS = {
    "it stands for more than 250,000 names and values": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "it stands for more than 250,000 names and values, or for itself": "a: &a [*a]\n",
    "it is nested more than 20 levels deep": f"a: {'[' * 30_000}{']' * 30_000}\n",
    "is longer than 10,000 characters": f"a: 1{':1' * 100_000}\n",
    "is larger than 4,194,304 bytes": "#" * (5 << 20),
    "these are 10000000000 runs; a sweep may have at most 50,000": "methods: {g: {rule: gut}}\ngrid:\n"
    + "".join(f"  {name}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for name in list(ENTRIES)[:10]),
    "seeds must be how many": f"methods: {{g: {{rule: gut}}}}\nseeds: [{'[' * 15}{']' * 15}]\n",
}


@pytest.mark.parametrize("message", LIMITS)
def test_a_file_that_stands_for_too_much_is_refused_at_once(tmp_path, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(LIMITS[message])
    start = time.monotonic()
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        read_sweep(file)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 1000 + len(str(file))


def test_as_many_names_take_as_many_times_as_long(tmp_path):
    def seconds(count):
        (tmp_path / "names.yaml").write_text("".join(f"n{number}: 1\n" for number in range(count)))
        start = time.perf_counter()
        assert len(read_yaml(tmp_path / "names.yaml")) == count
        return time.perf_counter() - start

    seconds(100)
    assert seconds(8000) < 60 * seconds(400)  # 20 times as long; with a look at all names for each 400 times


def test_methods_may_differ_in_schedule_clipping_and_inner_optimizer():
    methods = {"QG": {"rule": "QG-GUTm", "schedule": "cosine"}, "AdamW": {"rule": "gut", "inner": "adamw"}}
    qg, control, adamw = tasks_of(methods=methods, settings={"warmup": "1e-1", "max_grad_norm": 1})
    assert (qg.experiment.rule, qg.experiment.milestones, control.control_of) == ("qg_gutm", (), "QG")
    assert (adamw.experiment.inner, adamw.experiment.lr, adamw.experiment.milestones) == ("AdamW", 1e-3, (0.5, 0.75))
    assert {(task.experiment.warmup, task.experiment.max_grad_norm) for task in (qg, control, adamw)} == {(0.1, 1)}


def test_merge_keys_bring_in_names_that_come_after_the_methods_own(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "settings: {momentum: 0.5}\n"
        "methods:\n"
        "  GUT: &gut {rule: gut, lr: 0.1, mu: 0.5}\n"
        "  less: &less {<<: *gut, mu: 0.2}\n"
        "  DSGD: {<<: [{rule: dsgd}, {lr: 0.3}]}\n"
        "  slow: {<<: *less, lr: 0.05}\n"
        "grid: {steps: [1]}\n"
    )
    assert read_yaml(file) == yaml.safe_load(file.read_text())
    methods = read_yaml(file)["methods"]
    assert methods["slow"] == {"rule": "gut", "lr": 0.05, "mu": 0.2}
    assert methods["DSGD"] == {"rule": "dsgd", "lr": 0.3}


def test_what_is_written_is_read_again(tmp_path):
    content = {"methods": {"β+μ": {"rule": "gut", "lr": 1e-5, "milestones": [0.5]}}, "seeds": [1, 2], "controls": False}
    write_yaml(content, tmp_path / "sweep.yaml")
    assert read_yaml(tmp_path / "sweep.yaml") == content
    assert "β+μ" in (tmp_path / "sweep.yaml").read_text(encoding="utf-8")
    assert list(content) == list(read_yaml(tmp_path / "sweep.yaml"))
