"""The results of a sweep: two tables, and the files that keep them."""

import hashlib
import json
import math

import pandas as pd
import pytest

from gut_fast.study import Experiment, Run
from gut_fast.study.records import FORMAT, FORMAT_WITHOUT_END
from gut_fast.study.results import (
    LINES,
    TABLE,
    ResultsError,
    append_run,
    finished_runs,
    lines_of,
    read_results,
    remove_half_written,
    results_of,
    write_table,
)
from gut_fast.study.sweep import Task

ROWS = [
    {"step": 5, "test_loss": 0.1 + 0.2, "diverged_agents": 0},
    {"step": 10, "test_loss": 1e-300, "diverged_agents": 2},
]


def made_up(seed=3, rows=ROWS, method="QG-DSGDm β+μ", **settings):
    settings = {"rule": "d2", "milestones": (0.5,), "partition_options": {"alpha": 0.1}, **settings}
    experiment = Experiment(seed=seed, **settings)
    task = Task(method, {"alpha": 0.1, "milestones": [0.5], "try": 2}, experiment, "QG-GUTm")
    return task, Run(experiment, list(rows), "vmap", 1.25)


def lines_without_end(run):
    """The lines of a run as earlier versions wrote them."""
    return lines_of(*run).replace(FORMAT, FORMAT_WITHOUT_END).splitlines(keepends=True)[:-1]


def sealed(text):
    """Records with their last lines as they would be if the others had been written so."""
    records = text.split('{"end"')
    heads = [record.partition("}\n")[2] if number else record for number, record in enumerate(records[:-1])]
    return "".join(map(ended, heads))


def ended(lines):
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return f'{lines}{{"end": {lines.count(chr(10))}, "sha256": "{digest}"}}\n'


@pytest.fixture
def folder(tmp_path):
    """A folder with two runs as lines."""
    for seed in (4, 3):
        append_run(tmp_path, lines_of(*made_up(seed)))
    return tmp_path


def assert_same(results, expected):
    pd.testing.assert_frame_equal(results.runs, expected.runs)
    pd.testing.assert_frame_equal(results.history, expected.history, check_exact=True)
    assert results.experiments == expected.experiments


def test_lines_and_the_table_hold_the_same_and_all_of_it(folder):
    expected = results_of([made_up(3), made_up(4)])
    (first, second), runs = expected.runs.index, expected.runs
    assert [first.isascii(), first.split(".")[0], *runs["seed"]] == [True, "qg-dsgdm-beta+mu", 3, 4]
    assert runs[["method", "control_of", "rule", "alpha", "try", "engine", "seconds"]].loc[first].to_list() == [
        *("QG-DSGDm β+μ", "QG-GUTm", "d2", 0.1, 2, "vmap", 1.25)
    ]
    assert expected.history.drop(columns="run").to_dict("records") == ROWS * 2
    assert list(expected.final()["test_loss"]) == [1e-300, 1e-300]
    assert expected.run(second) == made_up(4)[1]
    assert json.loads(runs.loc[first, "point"]) == made_up()[0].point

    assert_same(read_results(folder), expected)
    write_table(folder)
    assert [file.name for file in folder.iterdir()] == [TABLE]
    assert_same(read_results(folder), expected)
    alone = pd.read_csv(folder / TABLE)
    assert list(alone["test_loss"]) == pytest.approx([row["test_loss"] for row in ROWS] * 2)
    assert set(alone["run"]) == finished_runs(folder) == {first, second}


def test_numbers_that_are_not_finite_are_nan(tmp_path):
    rows = [{"step": 5, "test_loss": math.nan}, {"step": 10, "test_loss": math.inf}]
    append_run(tmp_path, lines_of(*made_up(rows=rows)))
    assert (tmp_path / LINES).read_text().count('"test_loss": null') == 2
    for _ in range(2):
        assert read_results(tmp_path).history["test_loss"].isna().all()
        write_table(tmp_path)


def test_the_table_takes_in_lines_and_files_of_earlier_versions_once(folder):
    write_table(folder)
    for seed in (4, 5):
        append_run(folder, lines_of(*made_up(seed)))
    (folder / "runs").mkdir()
    for seed in (5, 6):
        head, *rows = lines_without_end(made_up(seed))
        old = {name: value for name, value in json.loads(head).items() if name != "rows"}
        (folder / "runs" / f"β{seed}.jsonl").write_text("".join([json.dumps(old) + "\n", *rows]))
    assert sorted(read_results(folder).runs["seed"]) == [3, 4, 5, 6]
    write_table(folder)
    assert sorted(read_results(folder).runs["seed"]) == [3, 4, 5, 6]
    assert not (folder / LINES).exists()


def test_a_run_that_a_kill_left_half_written_is_dropped(folder):
    whole = (folder / LINES).read_bytes()
    first = whole.index(b'{"format"', 1)
    for size in (len(whole) - 1, len(whole) - 40, first + 200, first + 1, first):
        (folder / LINES).write_bytes(whole[:size])
        assert list(read_results(folder).runs["seed"]) == [4]
    (folder / LINES).write_bytes(whole[: len(whole) - 40])
    remove_half_written(folder)
    append_run(folder, lines_of(*made_up(7)))
    assert sorted(read_results(folder).runs["seed"]) == [4, 7]
    (folder / LINES).write_bytes(whole[:100])
    assert finished_runs(folder) == set()
    with pytest.raises(FileNotFoundError, match="holds no finished runs"):
        read_results(folder)


def test_a_rule_that_is_not_known_here_is_taken_as_it_was(folder):
    text = (folder / LINES).read_text().replace('"d2"', '"my_own"')
    (folder / LINES).write_text(
        sealed(text.replace('"hyperparameters": {"kappa": 1.0}', '"hyperparameters": {"kappa": 0.5}'))
    )
    for _ in range(2):
        results = read_results(folder)
        experiment = results.experiments[results.runs.index[0]]
        assert (experiment.rule, experiment.hyperparameters, experiment.seed) == ("my_own", {"kappa": 0.5}, 3)
        assert list(results.runs["kappa"]) == [0.5, 0.5]
        write_table(folder)


@pytest.mark.parametrize("content", ["[1]\n", '{"format": "another"}\n', "not JSON\n", "\n" * 5])
def test_a_file_without_any_record_is_named_and_stays(folder, content):
    (folder / LINES).write_text(content)
    for act in (read_results, finished_runs, write_table):
        with pytest.raises(ResultsError, match=r"runs.jsonl, line 1: this is not the head of a run"):
            act(folder)
    assert (folder / LINES).read_text() == content


DAMAGES = {
    "line 1: the record of this run is damaged": lambda text: text.replace('"step": 5', '"step": 6', 1),
    "line 1: not JSON": lambda text: text.replace('"method"', '"method', 1),
    "line 1: KeyError 'method'": lambda text: sealed(text.replace('"method"', '"methods"', 1)),
    "line 1: KeyError 'engine'": lambda text: sealed(text.replace('"engine": "vmap"', '"motor": 1', 1)),
    "line 1: TypeError .*'sed'": lambda text: sealed(text.replace('"seed": 4', '"sed": 4', 1)),
    "line 1: KeyError 'step'": lambda text: sealed(text.replace('"step": 5', '"stop": 5', 1)),
    "line 1: .* has 1 rows, not 2": lambda text: sealed("\n".join(text.split("\n")[:1] + text.split("\n")[2:])),
    "line 2: expected an object, got list": lambda text: sealed(text.replace('{"step": 5', '[1]\n{"step": 5', 1)),
    "line 1: this is not the head of a run": lambda text: "\n".join(text.split("\n")[1:]),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_record_is_reported_not_read_and_run_again(folder, message):
    (folder / LINES).write_text(DAMAGES[message]((folder / LINES).read_text()))
    with pytest.warns(UserWarning, match=rf"runs.jsonl, {message}.*; it is not read, and the sweep runs it again"):
        assert list(read_results(folder).runs["seed"]) == [3]
    remove_half_written(folder)
    append_run(folder, lines_of(*made_up(4)))
    assert_same(read_results(folder), results_of([made_up(3), made_up(4)]))


def test_records_of_earlier_versions_are_read(folder):
    text = "".join(line for seed in (3, 4) for line in lines_without_end(made_up(seed)))
    (folder / LINES).write_text(text)
    assert_same(read_results(folder), results_of([made_up(3), made_up(4)]))
    for size in (len(text) - 1, len(text) - 40):
        (folder / LINES).write_text(text[:size])
        assert list(read_results(folder).runs["seed"]) == [3]
    (folder / LINES).write_text(text.replace('"step": 5', '"step" 5', 1))
    with pytest.warns(UserWarning, match=r"runs.jsonl, line 2: not JSON"):
        assert list(read_results(folder).runs["seed"]) == [4]


LABELS = [
    "\u2028\u2029\x85\x0c",
    "a\rb\n",
    "\x00\x1b[2J",
    "\"a\", 'b'",
    "nan",
    "\ufeffa ",
    "\\u2028",
    "\U0010ffff",
]


@pytest.mark.parametrize("label", LABELS)
def test_any_text_survives(tmp_path, label):
    _, run = made_up(model=label)
    task = Task(label, {"model": label}, run.experiment, label)
    expected = results_of([(task, run)])
    append_run(tmp_path, lines_of(task, run))
    assert len((tmp_path / LINES).read_text().splitlines()) == 4
    assert_same(read_results(tmp_path), expected)
    write_table(tmp_path)
    assert_same(read_results(tmp_path), expected)


def test_a_broken_table_is_named_with_what_to_do(folder):
    write_table(folder)
    advice = r"; put a copy of it back, or remove it and its runs are run again$"
    whole = (folder / TABLE).read_bytes()
    for content in (b"", b"run,step\n", whole[:300], whole[:200] + b"\xff" + whole[201:]):
        (folder / TABLE).write_bytes(content)
        with pytest.raises(ResultsError, match=rf"runs\.csv\.zst cannot be read as a table of runs: .*{advice}"):
            read_results(folder)
    table = pd.DataFrame({"run": ["a"], "step": [1]})
    table.to_csv(folder / TABLE, index=False)
    with pytest.raises(ResultsError, match=rf"runs\.csv\.zst, line 1: .* no column method, control_of, seed.*{advice}"):
        read_results(folder)
    (folder / TABLE).write_bytes(whole)
    pd.read_csv(folder / TABLE).replace('{"alpha": 0.1, ', "{", regex=False).assign(point="{").to_csv(
        folder / TABLE, index=False
    )
    with pytest.raises(ResultsError, match=rf"runs\.csv\.zst, line 2: not JSON.*{advice}"):
        read_results(folder)
