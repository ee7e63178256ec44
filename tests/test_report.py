"""A stored sweep as tables, pictures and a page."""

import csv
import json
import math
import re
import shutil
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from gut_fast import rules
from gut_fast.study import Experiment, Run
from gut_fast.study.records import Record, read_records, write_record
from gut_fast.study.report import pictures, tables, words
from gut_fast.study.report import statistics as numbers
from gut_fast.study.report.statistics import ACCURACIES, BEFORE_DECAY, END
from gut_fast.study.report.study import gather, point_name
from gut_fast.study.report.write import Source, write_report

SOURCE = Source("A <sweep> & its report", "gut-fast report results/a", "seeds: 3 # <all>\n")

RULES = {
    "DSGD": ("dsgd", {}),
    "GUT": ("gut", {"mu": 0.9}),
    "QG-DSGDm β+μ": ("qg_gutm", {"momentum": 0.96, "mu": 0.0}),
    "QG-GUTm": ("qg_gutm", {"momentum": 0.9, "mu": 0.06}),
    "tracking": ("gradient_tracking", {}),
}

GAINS = {"DSGD": 0.0, "GUT": 0.02, "QG-DSGDm β+μ": 0.03, "QG-GUTm": 0.035, "tracking": 0.01}


def row(step, lr, accuracy, **changes):
    quartiles = {"lower_quartile": -0.03, "median": -0.01, "upper_quartile": 0.01, "best": 0.02}
    return {
        "step": step,
        "lr": lr,
        "train_loss": 1 - accuracy,
        "diverged_agents": 0,
        "test_loss": 1.1 - accuracy,
        "test_accuracy": accuracy,
        "mean_agent_accuracy": accuracy - 0.01,
        "worst_agent_accuracy": accuracy - 0.06,
        **{f"{name}_agent_accuracy": accuracy + offset for name, offset in quartiles.items()},
        "consensus_error": 0.4 / step,
        "mean_bytes_sent": 2000.0 * step,
        "max_bytes_sent": 2000 * step,
        **changes,
    }


def record(method, seed, alpha=0.1, decays=True, **changes):
    """A made-up run; accuracies depend on method, seed and α."""
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
    base = 0.80 + GAINS[method] * (1 - alpha) + 0.004 * math.sin(7 * seed + len(method)) + 0.02 * alpha
    history = [
        row(step, 0.01 if decays and step > 20 else 0.1, base - 0.2 / step, **changes) for step in (10, 20, 30, 40)
    ]
    control_of = "QG-GUTm" if method == "QG-DSGDm β+μ" else None
    versions = {"gut_fast": "0.1.0", "torch": "2.13.0"}
    return Record(method, {"alpha": alpha}, Run(experiment, history, "vmap", 1.5), control_of, versions, "a processor")


def sweep(methods=tuple(RULES), seeds=(0, 1, 2), alphas=(0.01, 1.0), **options):
    return [record(method, seed, alpha, **options) for method in methods for seed in seeds for alpha in alphas]


def diverged(record):
    """The record, with a run that ends without a number."""
    lost = dict.fromkeys(("train_loss", "test_accuracy", "mean_agent_accuracy", "worst_agent_accuracy"), math.nan)
    history = [*record.run.history[:-1], {**record.run.final, **lost, "diverged_agents": 4}]
    return replace(record, run=replace(record.run, history=history))


# Statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 29, 100])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.9995])
def test_student_quantiles_are_those_of_scipy(degrees, probability):
    expected = stats.t.ppf(probability, degrees)
    assert numbers.student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_intervals_are_those_of_scipy():
    sample = [1.9, 2.4, 0.3, -0.2, 1.1]
    for confidence in (0.95, 0.5):
        expected = stats.t.interval(confidence, 4, loc=np.mean(sample), scale=stats.sem(sample))
        assert numbers.confidence_interval(sample, confidence) == pytest.approx(expected)
    paired = stats.ttest_rel([3.0, 5.0, 4.0, 9.0], [1.0, 4.5, 4.2, 6.0]).confidence_interval(0.95)
    assert numbers.confidence_interval([2.0, 0.5, -0.2, 3.0]) == pytest.approx((paired.low, paired.high))
    assert numbers.confidence_interval([1.0]) is None
    assert numbers.confidence_interval([2.0, 2.0, 2.0]) == pytest.approx((2.0, 2.0))


def test_a_difference_is_over_the_common_seeds():
    first = {seed: record("GUT", seed) for seed in (0, 1, 2, 3)}
    second = {seed: record("DSGD", seed) for seed in (1, 2, 3, 4)}
    second[3] = diverged(second[3])
    difference = numbers.paired(first, second, ACCURACIES[0], END)
    expected = [100 * (first[s].run.final["test_accuracy"] - second[s].run.final["test_accuracy"]) for s in (1, 2)]
    assert difference.numbers == pytest.approx(expected)
    assert (difference.num_without, difference.num_positive) == (1, sum(number > 0 for number in expected))
    assert difference.mean == pytest.approx(statistics.fmean(expected))
    assert difference.std == pytest.approx(statistics.stdev(expected))


def test_before_the_first_decay_is_the_last_row_at_the_initial_learning_rate():
    run = record("GUT", 0).run
    assert numbers.row_at(run, BEFORE_DECAY)["step"] == 20
    assert numbers.row_at(run, END)["step"] == 40
    assert numbers.row_at(record("GUT", 0, decays=False).run, BEFORE_DECAY) is None
    too_late = replace(run, history=run.history[2:])
    assert numbers.row_at(too_late, BEFORE_DECAY) is None


def test_one_seed_has_neither_deviation_nor_interval():
    study = gather(sweep(("DSGD", "GUT"), seeds=(3,), alphas=(0.1,)))
    values, differences = tables.main_tables(study, END)
    assert "±" not in values.rows[0][2]
    assert re.fullmatch(r"\+\d\.\d, 1 of 1", differences.rows[0][1])


# The grid


def test_points_and_methods_are_in_order():
    records = sweep(("tracking", "QG-DSGDm β+μ", "GUT", "QG-GUTm", "DSGD"), alphas=(1.0, 0.01, 0.1))
    study = gather(records)
    assert study.points == ("α = 0.01", "α = 0.1", "α = 1")
    assert study.methods == ("tracking", "GUT", "QG-GUTm", "QG-DSGDm β+μ", "DSGD")
    ordered = gather(records, order=["DSGD", "GUT", "absent"])
    assert ordered.methods == ("DSGD", "GUT", "tracking", "QG-GUTm", "QG-DSGDm β+μ")
    assert ordered.baseline == "DSGD"
    assert ordered.notes == ()


def test_methods_are_compared_with_the_baseline_and_with_their_control():
    study = gather(sweep(), baseline="GUT")
    assert ("QG-GUTm", "QG-DSGDm β+μ") in study.comparisons
    others = [method for method in study.methods if method != "GUT"]
    assert study.comparisons == [*((method, "GUT") for method in others), ("QG-GUTm", "QG-DSGDm β+μ")]
    with pytest.raises(ValueError, match="there is no method 'D2' to compare with; there are: DSGD, GUT"):
        gather(sweep(), baseline="D2")


def test_methods_that_send_two_messages_are_marked():
    study = gather(sweep())
    assert [study.name(method) for method in study.methods if study.name(method) != method] == ["tracking †"]


def test_missing_seeds_and_methods_are_said():
    records = [each for each in sweep() if not (each.method == "GUT" and each.run.experiment.seed == 2)]
    records = [each for each in records if not (each.method == "tracking" and each.point["alpha"] == 1)]
    notes = gather(records).notes
    assert "α = 0.01: GUT has no run of seed 2; differences are of the seeds that both methods have." in notes
    assert "α = 1: tracking has no run; differences are of the seeds that both methods have." in notes
    assert "α = 1: GUT has no run of seed 2; differences are of the seeds that both methods have." in notes
    assert len(notes) == 3
    late = gather([each for each in sweep() if each.method == "DSGD" or each.run.experiment.seed == 0])
    assert late.notes[0].startswith("α = 0.01: GUT, QG-GUTm, QG-DSGDm β+μ and tracking have no run of seed 1 and 2;")
    assert len(late.notes) == 2
    rows = {line[0]: line[1:] for line in tables.overview(gather(records), ACCURACIES[0], END).rows}
    assert rows["tracking †"][1] == "–"
    assert "±" in rows["GUT"][0]


def test_a_repeated_run_counts_once_and_two_experiments_are_an_error():
    records = sweep(("DSGD", "GUT"))
    study = gather([*records, *records[:2]])
    assert study.notes == ("2 runs found more than once; the first of each counts.",)
    assert len(study.all_records) == len(records)
    other = replace(records[0], run=replace(records[0].run, experiment=replace(records[0].run.experiment, lr=0.4)))
    with pytest.raises(ValueError, match=r"DSGD at α = 0.01 are of two experiments \(lr: 0.1 and 0.4\)"):
        gather([*records, other])


def test_an_unfair_comparison_is_said():
    records = sweep(("DSGD", "GUT"), seeds=(0,), alphas=(0.1,))
    unlike = replace(records[1], run=replace(records[1].run, experiment=replace(records[1].run.experiment, steps=80)))
    assert gather([records[0], unlike]).notes == ("α = 0.1: the methods differ in steps: 40 and 80.",)


def test_a_rule_of_a_users_own_is_reported(monkeypatch):
    monkeypatch.setitem(rules.RULES, "mine", replace(rules.RULES["dsgd"], name="mine"))
    own = record("DSGD", 0)
    own = replace(own, method="Mine", run=replace(own.run, experiment=replace(own.run.experiment, rule="mine")))
    monkeypatch.delitem(rules.RULES, "mine")
    study = gather([record("DSGD", 0), own])
    assert study.notes == ("Rule mine is not known here; how many messages it sends shows in its bytes alone.",)
    assert tables.main_tables(study, END)[0].rows[1][0] == "Mine"


def test_nothing_to_report_is_an_error():
    with pytest.raises(ValueError, match="there are no runs to report"):
        gather([])


# Tables


def test_numbers_in_the_tables_are_those_of_the_runs():
    study = gather(sweep())
    table = tables.point_table(study, "α = 0.01", END)
    cells = dict(zip(table.header, next(line for line in table.rows if line[0] == "GUT"), strict=True))
    finals = [record("GUT", seed, 0.01).run.final for seed in (0, 1, 2)]
    for name, key in (("averaged model", "test"), ("mean agent", "mean_agent"), ("worst agent", "worst_agent")):
        values = [100 * final[f"{key}_accuracy"] for final in finals]
        assert cells[name] == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells["sent a step"] == "2.00 kB"
    assert (cells["lr"], cells["diverged"], cells["seeds"]) == ("0.1", "0", "3")
    assert cells["consensus error"] == "1.0e-02"
    best = {table.rows[line][0] for line, column in table.best if column == 2}
    assert best == {"QG-GUTm"}


def test_differences_in_the_tables_have_sign_counts_and_intervals():
    study = gather(sweep())
    rows = {line[0]: line[1:] for line in tables.difference_overview(study, ACCURACIES[0], END).rows}
    cell = rows["GUT − DSGD"][0]
    points = [
        100 * (record("GUT", s, 0.01).run.final["test_accuracy"] - record("DSGD", s, 0.01).run.final["test_accuracy"])
        for s in (0, 1, 2)
    ]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(points), scale=stats.sem(points))
    assert cell == f"{np.mean(points):+.1f} [{low:+.1f}, {high:+.1f}], {sum(p > 0 for p in points)} of 3"


def test_ties_are_said():
    study = gather([record("DSGD", 0), replace(record("DSGD", 0), method="GUT")])
    cell = tables.point_differences(study, "α = 0.1", END).rows[0][1]
    assert cell == "+0.0, 0 of 1, 1 equal"


def test_diverged_runs_are_counted_never_dropped():
    records = sweep(("DSGD", "GUT"), alphas=(0.1,))
    some = gather([*records[:-1], diverged(records[-1])])
    values, differences = tables.main_tables(some, END)
    cells = dict(zip(values.header, values.rows[1], strict=True))
    assert cells["averaged model"].endswith("(2 of 3 runs)")
    assert {line for line, column in values.best if values.header[column] == "averaged model"} == {0}
    assert cells["diverged"] == "4 agents in 1 of 3 runs"
    assert differences.rows[0][1].endswith("of 2, 1 diverged")
    every = gather([*records[:3], *map(diverged, records[3:])])
    values, differences = tables.main_tables(every, END)
    assert values.rows[1][2:7] == ("diverged",) * 3 + ("1.0e-02", "diverged")
    assert differences.rows[0][1:] == ("diverged",) * 3


def test_points_without_decay_have_no_moment_before_it():
    records = sweep(("DSGD", "GUT"), alphas=(0.01,)) + sweep(("DSGD", "GUT"), alphas=(1.0,), decays=False)
    study = gather(records)
    assert tables.moments(study) == (END, BEFORE_DECAY)
    assert tables.moments(study, "α = 1") == (END,)
    assert tables.overview(study, ACCURACIES[0], BEFORE_DECAY).header == ("method", "α = 0.01")


def test_settings_are_divided_into_common_and_own():
    common, own = tables.settings(gather(sweep(("DSGD", "GUT"))))
    assert ("partition options", "alpha 0.01 | alpha 1") in common.rows
    assert ("milestones", "lr decay at 50 %") in common.rows
    assert ("seeds", "0, 1 and 2") in common.rows
    assert own.header == ("method", "rule", "hyperparameters")
    assert own.rows[1] == ("GUT", "gut", "mu 0.9")


def test_markdown_is_escaped():
    table = tables.Table("", ("a|b", "<b>"), (("*x*", "1"),), frozenset({(0, 1)}))
    assert list(tables.markdown_table(table)) == [r"| a\|b | &lt;b> |", "| --- | ---: |", r"| \*x\* | **1** |"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from-matrix:/home/me/W.npy", "from-matrix:W.npy"),
        ("file: ~/data/a.yaml", "file: a.yaml"),
        (r"C:\Users\me\W.npy", "W.npy"),
        ("see https://example.org/a/b, 1/2 and results/a", "see https://example.org/a/b, 1/2 and results/a"),
    ],
)
def test_folders_of_a_machine_are_left_out(text, expected):
    assert words.without_folders(text) == expected


def test_points_are_named_by_their_values():
    point = {"alpha": 0.10, "topology": "ring:16", "batch_size": 32, "augment": True}
    assert point_name(point) == "α = 0.1, topology = ring:16, batch size = 32, augment = yes"
    assert point_name({"alpha": 0.1, "milestones": []}) == "α = 0.1, constant lr"
    assert point_name({"milestones": [0.5, 0.75, 900]}) == "lr decay at 50 %, 75 % and step 900"


# Files


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 40)
        yield


@contextmanager
def blank_figure(path, size):
    yield Figure()
    path.write_bytes(b"")


@pytest.fixture
def blank_pictures(monkeypatch):
    """Nothing is painted, which is most of the time of a report, for tests of its words."""
    monkeypatch.setattr(pictures, "_small_figure", blank_figure)


class Page(HTMLParser):
    """What a page is made of; elements must be closed in order."""

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
    records = sweep()
    records = [*records[:-2], diverged(records[-2])]
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_small_figure", blank_figure)
        return folder, gather(records), write_report(gather(records), SOURCE, folder)


def test_the_files_are_there(written):
    folder, _, files = written
    assert {file.name for file in files} == {file.name for file in folder.iterdir()}
    names = {file.stem for file in files if file.suffix == ".png"}
    over_all = {"accuracy", "accuracy-before-decay", "differences", "differences-before-decay"}
    each = {f"{kind}-alpha-{alpha}" for kind in ("curves", "agents", "samples") for alpha in ("0.01", "1")}
    assert names == over_all | each


def test_pictures_are_painted_in_few_colors(tmp_path):
    records = sweep(("DSGD", "GUT", "tracking"), alphas=(0.1,))
    study = gather([*records[:-1], diverged(records[-1])])
    files = [file for file in write_report(study, SOURCE, tmp_path) if file.suffix == ".png"]
    assert len(files) == 7
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "P"
            assert len(image.getcolors()) > 8
    again = pictures.draw_differences(study, END, tmp_path / "again.png")
    assert again.path.read_bytes() == (tmp_path / "differences.png").read_bytes()


def test_the_page_holds_everything_and_needs_nothing(written):
    _, study, files = written
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "url(" not in text
    assert len(page.images) == sum(file.suffix == ".png" for file in files)
    assert all(len(image["alt"]) > 40 for image in page.images)
    shown = " ".join(" ".join(page.text).split())
    for expected in (
        SOURCE.title,
        SOURCE.command,
        SOURCE.configuration.strip(),
        "QG-DSGDm β+μ is the control of QG-GUTm",
        "† Sends more than one message a step",
        "torch 2.13.0",
        "a processor",
        "momentum 0.9 and mu 0.06",
        *study.notes,
    ):
        assert expected in shown


def test_markdown_names_its_pictures_and_has_all_tables(written):
    _, _, files = written
    text = files[1].read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert set(linked) == {file.name for file in files if file.suffix == ".png"}
    assert "### Averaged model at the end" in text
    assert "### Worst agent before the first decay" in text
    assert "| QG-GUTm − QG-DSGDm β+μ |" in text


def test_csv_files_hold_every_run_and_the_statistics(written):
    folder, study, _ = written

    def read(name):
        with (folder / name).open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    runs = read("runs.csv")
    assert len(runs) == 2 * len(study.all_records)
    lost = [line for line in runs if line["test_accuracy"] == ""]
    assert [(line["method"], line["diverged_agents"]) for line in lost] == [("tracking", "4")]
    one = next(line for line in read("methods.csv") if line["method"] == "GUT" and line["moment"] == END)
    values = [100 * record("GUT", seed, 0.01).run.final["test_accuracy"] for seed in (0, 1, 2)]
    assert float(one["test_accuracy_mean"]) == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert float(one["test_accuracy_std"]) == pytest.approx(statistics.stdev(values), rel=1e-5)
    control = [line for line in read("differences.csv") if line["is_control"] == "True"]
    assert {(line["method"], line["other"]) for line in control} == {("QG-GUTm", "QG-DSGDm β+μ")}
    assert len(control) == 2 * 2 * len(ACCURACIES)


def test_data_that_cannot_be_loaded_leave_a_picture_out(tmp_path, monkeypatch, blank_pictures):
    def absent(experiment):
        raise FileNotFoundError("nothing in /home/me/data")

    monkeypatch.setattr(pictures, "samples_per_class", absent)
    with pytest.warns(UserWarning, match="no picture of who holds what: nothing in /home/me/data"):
        files = write_report(gather(sweep(("DSGD", "GUT"), alphas=(0.1,), decays=False)), SOURCE, tmp_path)
    assert not [file for file in files if file.name.startswith("samples")]
    for file in files[:2]:
        text = file.read_text(encoding="utf-8")
        assert "There is no picture of who holds what" in text
        assert "/home/me" not in text


def test_the_same_runs_give_the_same_files_even_where_all_diverged_and_histories_are_old(tmp_path, monkeypatch):
    records = [record("DSGD", 0, decays=False), diverged(record("GUT", 0, decays=False))]
    for line in (line for each in records for line in each.run.history):
        for name in ("lower_quartile", "median", "upper_quartile", "best"):
            del line[f"{name}_agent_accuracy"]
    files = write_report(gather(records), SOURCE, tmp_path / "first")
    monkeypatch.setattr(pictures, "_small_figure", lambda path, size: nullcontext(Figure()))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    again = write_report(gather(records), SOURCE, tmp_path / "second")
    assert [file.name for file in files] == [file.name for file in again]
    for file, other in zip(files, again, strict=True):
        assert file.read_bytes() == other.read_bytes(), file.name
    assert "| GUT − DSGD | diverged | diverged | diverged |" in files[1].read_text(encoding="utf-8")


def test_who_holds_what_is_drawn_once(tmp_path, monkeypatch, blank_pictures):
    monkeypatch.setattr(pictures, "draw_agents", pictures.draw_curves)
    records = sweep(("DSGD",), seeds=(0,), alphas=(0.1, 1.0))
    constant = sweep(("DSGD",), seeds=(0,), alphas=(0.1, 1.0), decays=False)
    points = [
        replace(each, point={**each.point, "milestones": list(each.run.experiment.milestones)})
        for each in (*records, *constant)
    ]
    files = write_report(gather(points), SOURCE, tmp_path)
    samples = [file.name for file in files if file.name.startswith("samples")]
    assert samples == ["samples-alpha-0.1-lr-decay-at-50.png", "samples-alpha-1-lr-decay-at-50.png"]
    text = files[1].read_text(encoding="utf-8")
    assert text.count("Who holds what is the same as at α = 0.1, lr decay at 50 %.") == 1


# The command


@pytest.fixture
def command(capsys, monkeypatch):
    from gut_fast import cli
    from gut_fast.cli.report import report

    app = typer.Typer()
    app.command()(report)
    app.callback()(lambda: None)
    monkeypatch.setattr("gut_fast.cli.app.app", app)

    def run(*arguments):
        code = cli.main(["report", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def store(folder, records):
    (folder / "runs").mkdir(parents=True)
    for number, each in enumerate(records):
        write_record(each, folder / "runs" / f"{number:03}.jsonl")
    return folder


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
    file = folder / "runs" / "001.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:20]]), encoding="utf-8")
    code, _, err = command(folder)
    assert code == 2
    assert f"{file} does not hold a whole run" in err
    file.unlink()
    code, _, err = command(folder, "--baseline", "GUT")
    assert (code, err) == (2, "gut-fast: error: there is no method 'GUT' to compare with; there are: DSGD\n")


def test_stored_records_are_read_as_they_were(tmp_path):
    records = [record("GUT", 0), diverged(record("QG-DSGDm β+μ", 1))]
    for read, expected in zip(read_records(store(tmp_path, records)), records, strict=True):
        assert json.dumps(read.run.history) == json.dumps(expected.run.history)
        assert (read.method, read.point, read.control_of) == (expected.method, expected.point, expected.control_of)
