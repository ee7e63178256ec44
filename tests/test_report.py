"""A stored sweep as tables, pictures and a page."""

import itertools
import math
import re
import shutil
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from gut_fast import cli, rules
from gut_fast.kernels import machine
from gut_fast.study import Experiment, Run
from gut_fast.study.report import frontier, pictures, tables, words
from gut_fast.study.report.study import ACCURACIES, BEFORE_DECAY, END, gather, interval, mean
from gut_fast.study.report.tables import main_tables, value_text
from gut_fast.study.report.write import Source, write_report
from gut_fast.study.results import append_run, lines_of, results_of
from gut_fast.study.sweep import Task

SOURCE = Source("A <sweep> & its report", "gut-fast report results/a", "seeds: 3 # <all>\n")

RULES = {
    "DSGD": ("dsgd", {}),
    "GUT": ("gut", {"mu": 0.9}),
    "QG-DSGDm β+μ": ("qg_gutm", {"momentum": 0.96, "mu": 0.0}),
    "QG-GUTm": ("qg_gutm", {"momentum": 0.9, "mu": 0.06}),
    "tracking": ("gradient_tracking", {}),
}

GAINS = {"DSGD": 0.0, "GUT": 0.02, "QG-DSGDm β+μ": 0.03, "QG-GUTm": 0.035, "tracking": 0.01}


def row(step, lr, accuracy, quartiles=True):
    offsets = {"lower_quartile": -0.03, "median": -0.01, "upper_quartile": 0.01, "best": 0.02} if quartiles else {}
    return {
        "step": step,
        "lr": lr,
        "train_loss": 1 - accuracy,
        "diverged_agents": 0,
        "test_accuracy": accuracy,
        "mean_agent_accuracy": accuracy - 0.01,
        "worst_agent_accuracy": accuracy - 0.06,
        **{f"{name}_agent_accuracy": accuracy + offset for name, offset in offsets.items()},
        "consensus_error": 0.4 / step,
        "mean_bytes_sent": 2000.0 * step,
        "max_bytes_sent": 2000 * step,
    }


def finished(method, seed, alpha=0.1, decays=True, label=None, lost=False, quartiles=True, **settings):
    """A made-up task and its run; accuracies depend on method, seed and α. One that is lost ends without a number."""
    rule, hyperparameters = RULES[method]
    experiment = Experiment(
        topology="ring:4",
        rule=rule,
        hyperparameters=hyperparameters,
        partition_options={"alpha": alpha},
        milestones=(0.5,) if decays else (),
        steps=40,
        eval_every=10,
        seed=seed,
    )
    experiment = replace(experiment, **settings)
    base = 0.80 + GAINS[method] * (1 - alpha) + 0.004 * math.sin(7 * seed + len(method)) + 0.02 * alpha
    places = ((step, 0.01 if decays and step > 20 else 0.1) for step in (10, 20, 30, 40))
    history = [row(step, lr, base - 0.2 / step, quartiles) for step, lr in places]
    if lost:
        history[-1] |= dict.fromkeys(("train_loss", *ACCURACIES), math.nan) | {"diverged_agents": 4}
    control_of = "QG-GUTm" if method == "QG-DSGDm β+μ" else None
    return Task(label or method, {"alpha": alpha}, experiment, control_of), Run(experiment, history, "vmap", 1.5)


def sweep(methods=tuple(RULES), seeds=(0, 1, 2), alphas=(0.01, 1.0), **options):
    return [finished(method, seed, alpha, **options) for method in methods for seed in seeds for alpha in alphas]


def study_of(runs, **options):
    return gather([results_of(runs)], **options)


def finals(method, alpha, key="test_accuracy", seeds=(0, 1, 2)):
    """The accuracies after the last step, in %."""
    return [100 * finished(method, seed, alpha)[1].final[key] for seed in seeds]


# Statistics


def test_intervals_are_those_of_scipy():
    sample = pd.Series([1.9, 2.4, 0.3, -0.2, 1.1])
    expected = stats.t.interval(0.95, 4, loc=np.mean(sample), scale=stats.sem(sample))
    assert interval(sample) == pytest.approx(expected)
    assert interval(pd.Series([*sample, math.nan])) == pytest.approx(expected)
    paired = stats.ttest_rel([3.0, 5.0, 4.0, 9.0], [1.0, 4.5, 4.2, 6.0]).confidence_interval(0.95)
    assert interval(pd.Series([2.0, 0.5, -0.2, 3.0])) == pytest.approx((paired.low, paired.high))
    assert np.isnan(interval(pd.Series([1.0]))).all()
    assert interval(pd.Series([2.0, 2.0, 2.0])) == pytest.approx((2.0, 2.0))


def test_a_mean_does_not_depend_on_the_order():
    numbers = pd.Series([0.1, 0.7, math.nan, 1e16, -1e16])
    assert mean(numbers) == mean(numbers[::-1]) == statistics.fmean([0.1, 0.7, 1e16, -1e16])
    assert math.isnan(mean(pd.Series([math.nan])))


def test_a_difference_is_over_the_common_seeds():
    runs = [finished("GUT", seed) for seed in (3, 0, 1, 2)]
    runs += [finished("DSGD", seed, lost=seed == 3) for seed in (4, 3, 2, 1)]
    difference = study_of(runs).differences(("GUT", "DSGD"), "test_accuracy", "α = 0.1", END)
    expected = np.subtract(finals("GUT", 0.1, seeds=(1, 2)), finals("DSGD", 0.1, seeds=(1, 2)))
    assert list(difference.index) == [1, 2, 3]
    assert [*difference] == pytest.approx([*expected, math.nan], nan_ok=True)
    low, high = interval(pd.Series(expected))
    text = f"{expected.mean():+.1f} [{low:+.1f}, {high:+.1f}], {(expected > 0).sum()} of 2, 1 diverged"
    assert tables.difference_text(difference) == text


def test_before_the_first_decay_is_the_last_row_at_the_initial_learning_rate():
    late, run = finished("QG-GUTm", 0)
    runs = [
        finished("DSGD", 0),
        finished("GUT", 0, decays=False),
        (late, replace(run, history=run.history[2:])),
    ]
    steps = study_of(runs).values["step"]
    assert dict(steps["α = 0.1", BEFORE_DECAY]) == {("DSGD", 0): 20}
    assert set(steps["α = 0.1", END]) == {40}


def test_one_seed_has_neither_deviation_nor_interval():
    values, differences = main_tables(study_of(sweep(("DSGD", "GUT"), seeds=(3,), alphas=(0.1,))), END)
    assert "±" not in values.rows[0][2]
    assert re.fullmatch(r"\+\d\.\d, 1 of 1", differences.rows[0][1])


# The grid


def test_points_and_methods_are_in_order():
    runs = sweep(("tracking", "QG-DSGDm β+μ", "GUT", "QG-GUTm", "DSGD"), alphas=(1.0, 0.01, 0.1))
    study = study_of(runs)
    assert study.points == ("α = 0.01", "α = 0.1", "α = 1")
    assert study.methods == ("tracking", "GUT", "QG-GUTm", "QG-DSGDm β+μ", "DSGD")
    ordered = study_of(runs, order=["DSGD", "GUT", "absent"])
    assert ordered.methods == ("DSGD", "GUT", "tracking", "QG-GUTm", "QG-DSGDm β+μ")
    assert (ordered.baseline, ordered.notes) == ("DSGD", ())
    assert [ordered.name(method) for method in ordered.methods if ordered.name(method) != method] == ["tracking †"]


def test_methods_are_compared_with_the_baseline_and_with_their_control():
    study = study_of(sweep(seeds=(0,)), baseline="GUT")
    others = [method for method in study.methods if method != "GUT"]
    assert study.comparisons == [*((method, "GUT") for method in others), ("QG-GUTm", "QG-DSGDm β+μ")]
    with pytest.raises(ValueError, match="there is no method 'D2' to compare with; there are: DSGD, GUT"):
        study_of(sweep(seeds=(0,)), baseline="D2")


def test_missing_seeds_and_methods_are_said():
    runs = [
        (task, run)
        for task, run in sweep()
        if (task.method, task.experiment.seed) != ("GUT", 2) and (task.method, task.point["alpha"]) != ("tracking", 1)
    ]
    study = study_of(runs)
    assert study.notes == (
        "α = 0.01: GUT has no run of seed 2; differences are of the seeds that both methods have.",
        "α = 1: GUT has no run of seed 2; differences are of the seeds that both methods have.",
        "α = 1: tracking has no run; differences are of the seeds that both methods have.",
    )
    rows = {line[0]: line[1:] for line in main_tables(study, END)[0].rows}
    assert rows["tracking †"][1] == "–"
    assert "±" in rows["GUT"][0]
    late = study_of([(task, run) for task, run in sweep() if task.method == "DSGD" or task.experiment.seed == 0])
    assert late.notes[0].startswith("α = 0.01: GUT, QG-GUTm, QG-DSGDm β+μ and tracking have no run of seed 1 and 2;")


def test_a_repeated_run_counts_once_and_two_experiments_are_an_error():
    runs = sweep(("DSGD", "GUT"), seeds=(0, 1))
    study = gather([results_of(runs), results_of(runs[:2]), results_of([finished("DSGD", 0, 0.01, engine="loop")])])
    assert study.notes == ("3 runs found more than once; the first of each counts.",)
    assert (len(study.results.runs), len(study.results.history)) == (len(runs), 4 * len(runs))
    assert study.values.equals(study_of(runs).values)
    with pytest.raises(ValueError, match=r"DSGD at α = 0.01 are of two experiments \(lr: 0.1 and 0.4\)"):
        gather([results_of(runs), results_of([finished("DSGD", 5, 0.01, lr=0.4)])])


def test_an_unfair_comparison_is_said():
    assert study_of([finished("DSGD", 0), finished("GUT", 0, steps=80)]).notes == (
        "α = 0.1: the methods differ in steps: 40 and 80.",
    )


def test_a_rule_of_a_users_own_is_reported(monkeypatch):
    monkeypatch.setitem(rules.RULES, "mine", replace(rules.RULES["dsgd"], name="mine"))
    own = finished("DSGD", 0, label="Mine", rule="mine")
    monkeypatch.delitem(rules.RULES, "mine")
    study = study_of([finished("DSGD", 0), own])
    assert study.notes == ("Rule mine is not known here; how many messages it sends shows in its bytes alone.",)
    assert [line[0] for line in main_tables(study, END)[0].rows] == ["DSGD", "Mine"]


def test_nothing_to_report_is_an_error():
    with pytest.raises(ValueError, match="there are no runs to report"):
        gather([])


# Tables


def test_numbers_in_the_tables_are_those_of_the_runs():
    table, differences = tables.point_tables(study_of(sweep()), "α = 0.01", END)
    cells = dict(zip(table.header, next(line for line in table.rows if line[0] == "GUT"), strict=True))
    for key, measure in ACCURACIES.items():
        values = finals("GUT", 0.01, key)
        assert cells[measure.name] == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells["sent a step"] == "2.00 kB"
    assert (cells["lr"], cells["diverged"], cells["seeds"]) == ("0.1", "0", "3")
    assert cells["consensus error"] == "1.0e-02"
    assert {table.rows[line][0] for line, column in table.best if column == 2} == {"QG-GUTm"}
    points = np.subtract(finals("GUT", 0.01), finals("DSGD", 0.01))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(points), scale=stats.sem(points))
    cell = next(line[1] for line in differences.rows if line[0] == "GUT − DSGD")
    assert cell == f"{np.mean(points):+.1f} [{low:+.1f}, {high:+.1f}], {(points > 0).sum()} of 3"


def test_ties_are_said_and_best_together():
    values, differences = main_tables(study_of([finished("DSGD", 0), finished("DSGD", 0, label="Same")]), END)
    assert differences.rows[0][1] == "+0.0, 0 of 1, 1 equal"
    assert {line for line, column in values.best if column == 2} == {0, 1}


def test_diverged_runs_are_counted_never_dropped():
    runs = sweep(("DSGD",), alphas=(0.1,))
    some = study_of([*runs, *(finished("GUT", seed, lost=seed == 2) for seed in (0, 1, 2))])
    values, differences = main_tables(some, END)
    cells = dict(zip(values.header, values.rows[1], strict=True))
    assert cells["averaged model"].endswith("(2 of 3 runs)")
    assert {line for line, column in values.best if values.header[column] == "averaged model"} == {0}
    assert cells["diverged"] == "4 agents in 1 of 3 runs"
    assert differences.rows[0][1].endswith("of 2, 1 diverged")
    every = study_of([*runs, *(finished("GUT", seed, lost=True) for seed in (0, 1, 2))])
    values, differences = main_tables(every, END)
    assert values.rows[1][2:7] == ("diverged",) * 3 + ("1.0e-02", "diverged")
    assert differences.rows[0][1:] == ("diverged",) * 3
    assert value_text(pd.Series([1.0, math.inf]).replace(math.inf, math.nan)) == "1.0 (1 of 2 runs)"


def with_fewer_messages(wires=("float32", "int4"), **settings):
    """DSGD and GUT with 1 and 16 local steps, and messages of these widths; fewer bytes and less accuracy."""
    runs = []
    for method in ("DSGD", "GUT"):
        for steps in (1, 16):
            for wire in wires:
                label, coded = f"{method}, H = {steps}, {wire}", None if wire == "float32" else wire
                task, run = finished(method, 0, label=label, local_steps=steps, wire_dtype=coded, **settings)
                for each in run.history:
                    each["mean_bytes_sent"] /= steps * (8 if coded else 1)
                runs.append((task, run))
    return study_of(runs)


def test_accuracy_against_bytes_has_a_line_for_each_family():
    study = with_fewer_messages()
    assert frontier.families(study) == {
        method: [f"{method}, H = {steps}, {wire}" for steps in (1, 16) for wire in ("float32", "int4")]
        for method in ("DSGD", "GUT")
    }
    assert frontier.bytes_sent(study, "GUT, H = 16, int4", "α = 0.1") == 80000 / 16 / 8
    assert frontier.has_frontier(study)
    assert not frontier.has_frontier(study_of(sweep()))
    everyone = with_fewer_messages(topology="complete:16")
    assert frontier.bytes_sent(everyone, "GUT, H = 1, float32", "α = 0.1") == 80000 * 2 / 16


def test_accuracy_against_bytes_is_painted(tmp_path):
    picture = frontier.draw_frontier(with_fewer_messages(), tmp_path / "frontier.png")
    with Image.open(picture.path) as image:
        assert len(image.getcolors()) > 8
    study = with_fewer_messages()
    write_report(study, SOURCE, tmp_path)
    assert "![A panel for each of 1 points: test accuracy in %" in (tmp_path / "report.md").read_text()


def test_of_text_the_loss_comes_first_and_less_is_better():
    runs = [finished(method, seed, data="manpages") for method in ("DSGD", "GUT") for seed in (0, 1)]
    for task, run in runs:
        for each in run.history:
            each["test_loss"] = 2.5 - (task.method == "GUT") * 0.25 + 0.002 * run.experiment.seed
    values, differences = main_tables(study_of(runs), END)
    name = "loss of the averaged model"
    assert values.header[2] == differences.header[1] == name
    assert [line[2] for line in values.rows] == ["2.501 ± 0.001", "2.251 ± 0.001"]
    assert {line for line, column in values.best if column == 2} == {1}
    assert differences.rows[0][1] == "-0.250 [-0.250, -0.250], 2 of 2"
    assert name not in main_tables(study_of(sweep(alphas=(0.1,))), END)[0].header


def test_points_without_decay_have_no_moment_before_it():
    runs = sweep(("DSGD", "GUT"), alphas=(0.01,)) + sweep(("DSGD", "GUT"), alphas=(1.0,), decays=False)
    study = study_of(runs)
    assert study.moments() == (END, BEFORE_DECAY)
    assert study.moments("α = 1") == (END,)
    assert main_tables(study, BEFORE_DECAY)[0].header == ("method", "α = 0.01")


def test_settings_are_divided_into_common_and_own():
    common, own = tables.settings(study_of(sweep(("DSGD", "GUT"))))
    assert ("partition options", "alpha 0.01 | alpha 1") in common.rows
    assert ("milestones", "lr decay at 50 %") in common.rows
    assert ("seeds", "0, 1 and 2") in common.rows
    assert own.header == ("method", "rule", "hyperparameters")
    assert own.rows[1] == ("GUT", "gut", "mu 0.9 and kappa 1")


def test_markdown_is_escaped():
    table = tables.Table("", ("a|b", "<b>"), (("*x*", "1"),), frozenset({(0, 1)}))
    assert list(tables.markdown_table(table)) == [r"| a\|b | &lt;b> |", "| --- | ---: |", r"| \*x\* | **1** |"]


def test_folders_of_a_machine_are_left_out():
    for text, expected in (
        ("from-matrix:/data/me/W.npy", "from-matrix:W.npy"),
        ("file: ~/data/a.yaml", "file: a.yaml"),
        (r"C:\Users\me\W.npy", "W.npy"),
        ("see https://example.org/a/b, 1/2 and results/a", "see https://example.org/a/b, 1/2 and results/a"),
    ):
        assert words.without_folders(text) == expected


def test_points_are_named_by_their_values():
    point = {"alpha": 0.10, "topology": "ring:16", "batch_size": 32, "augment": True}
    assert words.point_name(point) == "α = 0.1, topology = ring:16, batch size = 32, augment = yes"
    assert words.point_name({"alpha": 0.1, "milestones": []}) == "α = 0.1, constant lr"
    assert words.point_name({"milestones": [0.5, 0.75, 900]}) == "lr decay at 50 %, 75 % and step 900"


# Files


@contextmanager
def blank_figure(path, size):
    yield Figure()
    path.write_bytes(b"")


@pytest.fixture
def blank_pictures(monkeypatch):
    """Nothing is painted, which is most of the time of a report, for tests of its words."""
    monkeypatch.setattr(pictures, "small_figure", blank_figure)


class Page(HTMLParser):
    """The elements of a page, which must be closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a small sweep with everything in it: two points, a control, a diverged run, a missing one.

    Its pictures are blank.
    """
    runs = [*sweep()[:-2], finished("tracking", 2, 0.01, lost=True)]
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "small_figure", blank_figure)
        study = study_of(runs)
        return folder, study, write_report(study, SOURCE, folder)


def test_the_files_are_there(written):
    folder, _, files = written
    assert {file.name for file in files} == {file.name for file in folder.iterdir()}
    assert {file.stem for file in files if file.suffix == ".png"} == {"accuracy", "differences", "curves", "agents"}


def test_pictures_are_painted_in_few_colors_and_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DPI", 40)
    runs = [*sweep(("DSGD", "GUT"), alphas=(0.1,)), finished("tracking", 2, lost=True)]
    runs += sweep(("DSGD",), seeds=(0,), alphas=(1.0,), quartiles=False, decays=False)
    study = study_of(runs)
    files = [file for file in write_report(study, SOURCE, tmp_path) if file.suffix == ".png"]
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "P"
            assert len(image.getcolors()) > 8
    again = pictures.draw_differences(study, tmp_path / "again.png")
    assert again.path.read_bytes() == (tmp_path / "differences.png").read_bytes()


@pytest.mark.parametrize(
    ("label", "rows"), [("GUT", 1), ("GUT, H = 16, int4, mixed", 1), ("GUT with second moments mixed, int4", 2)]
)
def test_titles_of_panels_do_not_touch_however_long_the_labels(label, rows, tmp_path, monkeypatch):
    panels, boxes = [], []

    @contextmanager
    def looked_at(path, size):
        with small_figure(path, size) as figure:
            yield figure
            figure.draw_without_rendering()
            panels.extend(figure.subfigs[0].axes)
            texts = [text for axes in panels for text in axes.findobj(Text)]
            boxes.extend(text.get_window_extent() for text in texts if " ".join(text.get_text().split()) in titles)

    titles, small_figure = {"averaged model", "mean agent", "worst agent"}, pictures.small_figure
    monkeypatch.setattr(pictures, "small_figure", looked_at)
    runs = [finished(method, 0, 0.1, label=name) for method, name in (("DSGD", "DSGD"), ("GUT", label))]
    pictures.draw_differences(study_of(runs), tmp_path / "differences.png")
    assert len({round(axes.get_position().y0, 3) for axes in panels}) == rows
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_page_holds_everything_and_needs_nothing(written):
    _, study, files = written
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "url(" not in text
    assert len(page.images) == 4
    assert all(len(image["alt"]) > 40 for image in page.images)
    shown = " ".join(" ".join(page.text).split())
    for expected in (
        SOURCE.title,
        SOURCE.command,
        SOURCE.configuration.strip(),
        "QG-DSGDm β+μ is the control of QG-GUTm",
        "† Sends more than one message a step",
        f"torch {machine.versions()['torch']}",
        machine.machine_line(),
        "momentum 0.9 and mu 0.06",
        *study.notes,
    ):
        assert expected in shown


def test_markdown_names_its_pictures_and_has_all_tables(written):
    _, _, files = written
    text = files[1].read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == {file.name for file in files if file.suffix == ".png"}
    assert "### Averaged model at the end" in text
    assert "### Worst agent before the first decay" in text
    assert "| QG-GUTm − QG-DSGDm β+μ |" in text


def test_csv_files_hold_every_run_and_the_statistics(written):
    folder, study, _ = written
    runs, methods, differences = (pd.read_csv(folder / f"{name}.csv") for name in ("runs", "methods", "differences"))
    assert len(runs) == 2 * len(study.results.runs)
    lost = runs[runs["test_accuracy"].isna()]
    assert lost[["method", "diverged_agents"]].to_numpy().tolist() == [["tracking", 4]]
    one = methods[(methods["method"] == "GUT") & (methods["moment"] == END) & (methods["point"] == "α = 0.01")].iloc[0]
    values = finals("GUT", 0.01)
    assert one["test_accuracy_mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert one["test_accuracy_std"] == pytest.approx(statistics.stdev(values), rel=1e-5)
    assert one["runs"] == 3
    assert (differences["other"] == "QG-DSGDm β+μ").sum() == 2 * 2 * len(ACCURACIES)
    gut = differences[(differences["method"] == "GUT") & (differences["metric"] == "test_accuracy")].iloc[0]
    points = pd.Series(np.subtract(values, finals("DSGD", 0.01)))
    assert [gut["low"], gut["high"]] == pytest.approx(interval(points), rel=1e-4)
    assert (gut["better"], gut["pairs"]) == ((points > 0).sum(), 3)


def test_the_same_runs_give_the_same_files_even_where_all_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DPI", 40)
    study = study_of([finished("DSGD", 0, decays=False), finished("GUT", 0, decays=False, lost=True)])
    files = write_report(study, SOURCE, tmp_path / "first")
    monkeypatch.setattr(pictures, "small_figure", lambda path, size: nullcontext(Figure()))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    again = write_report(study, SOURCE, tmp_path / "second")
    assert [file.name for file in files] == [file.name for file in again]
    for file, other in zip(files, again, strict=True):
        assert file.read_bytes() == other.read_bytes(), file.name
    assert "| GUT − DSGD | diverged | diverged | diverged |" in files[1].read_text(encoding="utf-8")


# The command


@pytest.fixture
def command(capsys):
    def run(*arguments):
        code = cli.main(["report", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def store(folder, runs):
    folder.mkdir()
    for task, run in runs:
        append_run(folder, lines_of(task, run))
    return folder


HOSTILE = {
    "mathematics": r"$\foo$ $x_1$ $",
    "a terminal's commands": "a\x1b[2J\x07\u202eb",
    "the page's own language": "<script>alert(1)</script>&lt;",
    "Markdown": "[a](javascript:b) `c` *d* _e_ | ````",
    "ends of lines": "a\u2028b\r\nc",
}


@pytest.mark.parametrize("label", HOSTILE.values(), ids=HOSTILE)
def test_labels_are_shown_and_never_interpreted(command, tmp_path, label):
    runs = [finished("DSGD", 0, label=label, model=label), finished("GUT", 0, model=label)]
    runs = [(replace(task, point={"model": label}), run) for task, run in runs]
    folder = store(tmp_path / "a", runs)
    (folder / "sweep.yaml").write_text("# ````\n# <b>\n")
    code, out, err = command(folder, "--title", label)
    assert (code, err.count("\n")) == (0, 1)
    page, text = ((folder / "report" / name).read_text() for name in ("report.html", "report.md"))
    text = text.split("## How it was run")[0]  # the command is in a block of code
    for written in (out, page, text):
        assert not set("\x1b\x07\u202e\u2028") & set(written)
    assert "<script>" not in page + text
    assert "](javascript" not in text
    if label.startswith("$"):
        assert label in page
        assert label in out


SWEEP_FILE = """\
settings: {topology: ring:4, steps: 40, eval_every: 10, milestones: [0.5]}
methods:
  GUT: {rule: gut, mu: 0.9}
  DSGD: {rule: dsgd}
grid: {alpha: [0.1]}
seeds: 3
"""


def test_the_command_reports_an_unfinished_sweep(command, tmp_path, blank_pictures):
    folder = store(tmp_path / "small", sweep(("DSGD", "GUT"), seeds=(0, 1), alphas=(0.1,), decays=False))
    (folder / "sweep.yaml").write_text(SWEEP_FILE)
    code, out, err = command(folder)
    assert (code, err) == (0, "")
    assert "2 methods and 2 seeds: 4 runs of mlp on digits" in out
    assert "4 of 6 runs are finished so far." in out
    assert "DSGD − GUT" in out
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# small\n")
    assert "gut-fast report small" in text
    for file in (folder / "report").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_command_takes_several_folders_and_options(command, tmp_path, blank_pictures):
    first = store(tmp_path / "a", sweep(("GUT",), alphas=(0.1,), decays=False))
    second = store(tmp_path / "b", sweep(("tracking",), alphas=(0.1,), decays=False))
    code, out, _ = command(first, second, "--out", tmp_path / "c", "--baseline", "tracking", "--title", "Both of them")
    assert code == 0
    assert "GUT − tracking †" in out
    text = (tmp_path / "c" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Both of them\n")
    assert "gut-fast report a b --baseline tracking --title 'Both of them'" in text


def test_what_cannot_be_reported_is_one_line(command, tmp_path):
    code, _, err = command(tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no finished runs" in err
    folder = store(tmp_path / "a", sweep(("DSGD",), alphas=(0.1,)))
    code, _, err = command(folder, "--baseline", "GUT")
    assert (code, err) == (2, "gut-fast: error: there is no method 'GUT' to compare with; there are: DSGD\n")
    (folder / "runs.jsonl").write_text("not JSON\n" * 3)
    code, _, err = command(folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "runs.jsonl, line 1: this is not the head of a run" in err
