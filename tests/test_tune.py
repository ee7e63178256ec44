"""Hyper-parameters chosen by as many tries for every method, on held-out samples."""

import math

import pytest

from gut_fast.study import Run, make_simulator
from gut_fast.study.results import results_of
from gut_fast.study.run import load_data
from gut_fast.study.sweep import make_sweep, read_sweep
from gut_fast.study.tune import Range, choose, make_tuning, tuned_content
from gut_fast.study.yaml_files import write_yaml

METHODS = {"DSGD": {"rule": "dsgd"}, "GUT": {"rule": "gut"}}
LR = {"lr": {"low": "1e-2", "high": 1}}
FIXED = {"DSGD": {"rule": "dsgd", "lr": 1}, "GUT": {"rule": "gut", "lr": 1}}


def content_of(methods=METHODS, sections=None, **tune):
    return {"methods": methods, **(sections or {}), "tune": {"tries": 4, "space": LR, **tune}}


def results_from(tuning, value, tasks=None):
    """Made-up runs of all tasks; `value` gives the last row of each."""
    return results_of(
        (task, Run(task.experiment, [{"step": 1, "test_loss": 1.0, **value(task)}], "vmap", 0.0))
        for task in (tuning.tasks() if tasks is None else tasks)
    )


# What is tried


def test_every_method_gets_the_same_number_of_different_tries():
    methods = {**METHODS, "QG-GUTm": {"rule": "qg_gutm", "space": {"mu": [0.01, 0.02], "momentum": [0.8]}}}
    space = {**LR, "mu": {"low": 0.5, "high": 0.9, "log": False}, "momentum": [0.9]}
    tuning = make_tuning(content_of(methods, {"grid": {"alpha": [0.1, 1]}}, tries=7, space=space, seeds=[5, 6]))
    tries = {label: tuning.settings(label) for label in methods}
    assert {label: list(settings[0]) for label, settings in tries.items()} == {
        "DSGD": ["lr"],
        "GUT": ["lr", "mu"],
        "QG-GUTm": ["lr", "mu", "momentum"],
    }
    for label, settings in tries.items():
        assert len(settings) == 7
        assert len({tuple(one.items()) for one in settings}) == 7
        assert all(0.01 <= one["lr"] <= 1 for one in settings)
        assert len([task for task in tuning.tasks() if task.method == label]) == 7 * 2 * 2
    assert all(0.5 <= one["mu"] <= 0.9 for one in tries["GUT"])
    assert {one["mu"] for one in tries["QG-GUTm"]} == {0.01, 0.02}
    assert {task.experiment.seed for task in tuning.tasks()} == {5, 6}
    assert len({task.name for task in tuning.tasks()}) == len(tuning.tasks())


def test_the_tries_are_the_same_every_time_and_fill_the_range():
    first, second = (make_tuning(content_of(tries=16)).settings("GUT") for _ in range(2))
    assert first == second
    logarithms = sorted(math.log10(one["lr"]) for one in first)
    assert all(-2 + i / 8 <= value <= -2 + (i + 1) / 8 for i, value in enumerate(logarithms))


def test_tries_reach_the_experiments_and_controls_stay_away():
    methods = {"QG-GUTm": {"rule": "qg_gutm", "space": {"mu": [0.05, 0.06]}}}
    tuning = make_tuning(content_of(methods, tries=2, space={"lr": [0.3]}))
    assert [(task.experiment.lr, task.experiment.hyperparameters["mu"]) for task in tuning.tasks()[::3]] == [
        (0.3, 0.05),
        (0.3, 0.06),
    ]
    assert {task.control_of for task in tuning.tasks()} == {None}
    assert [task.point["try"] for task in tuning.tasks()] == [0, 0, 0, 1, 1, 1]


def test_the_test_samples_are_never_looked_at():
    settings = {"topology": "ring:4", "alpha": 1, "validation": 0.0, "steps": 1, "engine": "vmap"}
    tuning = make_tuning(content_of(sections={"settings": settings}, validation=0.25, tries=2, seeds=[4]))
    for task in tuning.tasks():
        assert task.experiment.validation == 0.25
        simulator = make_simulator(task.experiment)
        everything = load_data(type(task.experiment)(seed=4))
        trained_on, judged_on = (images_of(simulator.data, split) for split in ("train", "test"))
        assert len(judged_on) > 0.24 * len(everything.train_labels)
        assert sorted(trained_on + judged_on) == sorted(images_of(everything, "train"))


def images_of(dataset, split):
    return [tuple(image.flatten().tolist()) for image in getattr(dataset, f"{split}_inputs")]


def test_a_preset_can_be_tuned():
    content = {"preset": "fashion-mnist-lenet5-ring16", "tune": {"tries": 3, "space": LR}}
    tuning = make_tuning(content)
    assert {label: set(tuning.settings(label)[0]) for label in tuning.spaces} == {
        label: {"lr"} for label in ("DSGD", "GUT", "QG-DSGDm", "QG-GUTm")
    }
    choices = choose(tuning, results_from(tuning, lambda task: {"test_accuracy": task.experiment.lr}))
    tuned = make_sweep(tuned_content(content, choices)).tasks()
    assert [task.method for task in tuned] == ["DSGD", "GUT", "QG-DSGDm", "QG-GUTm", "QG-DSGDm β+μ"]
    assert {task.experiment.lr for task in tuned} == {max(one["lr"] for one in tuning.settings("DSGD"))}


# What is chosen


def test_the_best_mean_over_points_and_seeds_is_chosen():
    tuning = make_tuning(content_of(sections={"grid": {"alpha": [0.1, 1]}}, tries=3, metric="mean_agent_accuracy"))
    score = {("GUT", 0): 0.1, ("GUT", 1): 0.7, ("GUT", 2): 0.6, ("DSGD", 0): 0.5, ("DSGD", 1): 0.2, ("DSGD", 2): 0.5}
    offset = {0.1: -0.05, 1: 0.05}

    def row(task):
        value = score[task.method, task.point["try"]] + offset[task.point["alpha"]]
        return {"test_accuracy": 1 - value, "mean_agent_accuracy": value}

    choices = choose(tuning, results_from(tuning, row, reversed(tuning.tasks())))
    assert [(choice.label, choice.settings) for choice in choices] == [
        ("DSGD", tuning.settings("DSGD")[0]),
        ("GUT", tuning.settings("GUT")[1]),
    ]
    assert [choice.score for choice in choices] == pytest.approx([0.5, 0.7])


@pytest.mark.parametrize("broken", [{"test_loss": math.nan}, {"test_loss": math.inf}, {"test_accuracy": math.nan}])
def test_a_run_that_ended_in_nan_counts_as_nothing_right(broken):
    tuning = make_tuning(content_of(tries=2, seeds=[0, 1]))

    def row(task):
        is_broken = task.point["try"] == 0 and task.experiment.seed == 1
        return {"test_accuracy": 0.5 - 0.2 * task.point["try"], **(broken if is_broken else {})}

    (dsgd, gut) = choose(tuning, results_from(tuning, row))
    assert dsgd.settings == tuning.settings("DSGD")[1]
    assert (dsgd.score, gut.score) == pytest.approx((0.3, 0.3))


def test_the_lowest_loss_is_chosen_and_a_broken_run_has_none():
    tuning = make_tuning(content_of(tries=3, metric="test_loss"))
    losses = {0: 2.0, 1: math.nan, 2: 1.5}
    (choice, _) = choose(
        tuning, results_from(tuning, lambda task: {"test_accuracy": 0.5, "test_loss": losses[task.point["try"]]})
    )
    assert (choice.settings, choice.score) == (tuning.settings("DSGD")[2], 1.5)


def test_missing_runs_are_told():
    tuning = make_tuning(content_of(seeds=[0, 1]))
    results = results_from(tuning, lambda task: {"test_accuracy": 0.5}, tuning.tasks()[1:])
    with pytest.raises(ValueError, match="try 0 of 'DSGD' has 1 finished runs of 2"):
        choose(tuning, results)


def test_a_choice_at_the_edge_is_told():
    space = {"lr": [0.1, 0.2, 0.3], "momentum": [0.8, 0.9]}
    tuning = make_tuning(content_of({"DSGDm": {"rule": "dsgdm"}}, tries=6, space=space))
    for best, edges in ((0.3, ("lr",)), (0.2, ()), (0.1, ("lr",))):
        results = results_from(tuning, lambda task, best=best: {"test_accuracy": float(task.experiment.lr == best)})
        assert choose(tuning, results)[0].at_edge == edges


def test_the_tuned_file_is_a_sweep(tmp_path):
    methods = {
        "QG-GUTm": {"rule": "qg_gutm", "space": {"mu": [0.05, 0.06], "milestones": [[], [0.5, 0.75]]}},
        7: {"rule": "gut"},
    }
    sections = {"settings": {"steps": 9}, "grid": {"alpha": [0.1]}, "seeds": 2}
    content = content_of(methods, sections, space={"lr": {"low": 0.1, "high": 1}})
    tuning = make_tuning(content)
    choices = choose(tuning, results_from(tuning, lambda task: {"test_accuracy": task.point["try"] / 10}))
    write_yaml(tuned_content(content, choices), tmp_path / "tuned.yaml")
    tasks = read_sweep(tmp_path / "tuned.yaml").tasks()
    assert [task.method for task in tasks] == ["QG-GUTm", "QG-DSGDm β+μ", "7"] * 2
    best = tuning.settings("QG-GUTm")[3]
    assert tasks[0].experiment.lr == tasks[1].experiment.lr == best["lr"]
    assert tasks[0].experiment.milestones == tuple(best["milestones"])
    assert tasks[1].experiment.hyperparameters == {"momentum": pytest.approx(0.9 + best["mu"]), "mu": 0.0}
    assert tasks[0].experiment.validation == 0
    assert tasks[0].experiment.steps == 9
    assert (choices[0].label, choices[0].settings, choices[0].score) == ("QG-GUTm", best, 0.3)


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": METHODS}, "section 'tune' must have tries and a space, got None"),
        ({"methods": METHODS, "tune": {"tries": 3}}, "section 'tune' must have tries and a space"),
        (content_of(trials=3), "tune: there is no 'trials'; did you mean 'tries'?"),
        (content_of(tries=0), "tries must be an integer from 1 to 10,000, got 0"),
        (content_of(tries=True), "tries must be an integer"),
        (content_of(tries=10**9), "tries must be an integer from 1"),
        (content_of(metric="train_loss"), "metric must be one of test_accuracy"),
        (content_of(metric=["test_loss"]), "metric must be one of test_accuracy"),
        (content_of(validation=0), "validation must be a fraction between 0 and 1, got 0"),
        (content_of(validation=1.5), "validation must be a fraction"),
        (content_of(validation="most"), "validation must be a fraction between 0 and 1, got 'most'"),
        (content_of(seeds=[]), "seeds must be how many"),
        (content_of(space=5), "tune: space must hold names with ranges or lists, got 5"),
        (content_of(space={"lr": 5}), "tune: space: lr must be a list or {low"),
        (content_of(space={"lr": []}), "tune: space: lr must be a list"),
        (content_of(space={"lr": {"low": 1}}), "tune: space: lr must have low, high and perhaps log"),
        (content_of(space={"lr": {"low": 2, "high": 1}}), "tune: space: lr: a range goes from a low to a higher"),
        (content_of(space={"lr": {"low": 0, "high": 1}}), "tune: space: lr: a range that is even in the logarithm"),
        (content_of(space={"lr": {"low": "a", "high": 1}}), "tune: space: lr: low must be a number, got 'a'"),
        (content_of(space={"lr": {"low": 1, "high": 2, "log": "no"}}), "log must be true or false, got 'no'"),
        (content_of(space={**LR, "momentum": [0.9]}), "no method would try 'momentum'"),
        (content_of(space={**LR, "steps": [5, 6]}), "no method would try 'steps'"),
        (content_of(FIXED), "no method would try 'lr'"),
        (content_of(sections={"settings": {"lr": 1}}), "tune: space has lr, and so has section 'settings'"),
        (content_of({"GUT": {"rule": "gut", "mu": 0.5, "space": {"mu": [0.5]}}}), "method 'GUT' sets mu, and so does"),
        (content_of({"GUT": {"rule": "gut", "space": {"nu": [0.5]}}}), "method 'GUT': there is no 'nu'"),
        (content_of({"GUT": {"rule": "gut", "space": {"seed": [5]}}}), "no 'seed' among what can be set"),
        (content_of({"GUT": {"rule": "gut", "space": 5}}), "method 'GUT': space must hold names"),
        (content_of({"GUT": "gut"}), "method 'GUT' must have settings with a rule"),
        (content_of(sections={"grid": {"lr": [1, 2]}}), "sets lr, and so does the grid"),
        (content_of({**METHODS, "fixed": {"rule": "dsgd", "lr": 1}}), "'fixed' has 1 combinations .* gets 4 tries"),
        (content_of(space={"lr": [0.1, 0.2, 0.3]}), "'DSGD' has 3 combinations to try, but every method gets 4"),
        (content_of(space={"lr": [0.1, 0.2, 0.1, 0.3]}), "'DSGD': tries 0 and 2 are the same, .*lr.*; widen"),
        (content_of(space={"lr": {"low": 0.1, "high": 0.1001}}), "'DSGD': tries 0 and 1 are the same"),
        (content_of(space={"lr": {"low": 0.1, "high": 1}, "mu": [0.5, 3]}), "method 'GUT': .*mu=3 is outside"),
    ],
)
def test_what_describes_no_tuning_is_told(content, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_tuning(content)


def test_a_range_is_even_in_its_values_or_their_logarithm():
    assert [Range(1, 100).at(fraction) for fraction in (0, 0.5, 1)] == [1, 10, 100]
    assert [Range(0, 0.3, log=False).at(fraction) for fraction in (0, 1 / 3, 1)] == [0, 0.1, 0.3]
    assert Range("1e-3", 1).low == 0.001
