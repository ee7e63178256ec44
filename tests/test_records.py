"""Finished runs as files."""

import json
import math

import pytest

from gut_fast.study import Experiment, Run
from gut_fast.study.records import Record, read_record, read_records, record_file, write_record

ROWS = [{"step": 5, "test_loss": 0.1 + 0.2, "diverged_agents": 0}, {"step": 10, "test_loss": 1e-300}]


def made_up_record(rows=ROWS, **options):
    run = Run(Experiment(rule="d2", seed=3, milestones=(0.5,)), list(rows), "vmap", 1.25)
    return Record("D²", {"alpha": 0.1, "milestones": [0.5], "try": 2}, run, **options)


def test_a_record_comes_back_as_it_was(tmp_path):
    record = made_up_record(control_of="QG-GUTm", versions={"torch": "2"}, machine="a machine")
    write_record(record, tmp_path / "run.jsonl")
    assert read_record(tmp_path / "run.jsonl") == record
    head, *rows = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert head["format"] == "gut_fast run 1"
    assert head["method"] == "D²"
    assert head["experiment"]["seed"] == 3
    assert rows == ROWS


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    rows = [{"step": 5, "test_loss": math.nan}, {"step": 10, "test_loss": math.inf}]
    write_record(made_up_record(rows), tmp_path / "run.jsonl")
    assert [json.loads(line)["test_loss"] for line in (tmp_path / "run.jsonl").read_text().splitlines()[1:]] == [
        None
    ] * 2
    assert all(math.isnan(row["test_loss"]) for row in read_record(tmp_path / "run.jsonl").run.history)


def test_a_rule_that_is_not_known_here_is_taken_as_it_was(tmp_path):
    write_record(made_up_record(), tmp_path / "run.jsonl")
    text = (tmp_path / "run.jsonl").read_text().replace('"d2"', '"my_own"')
    (tmp_path / "run.jsonl").write_text(text.replace('"hyperparameters": {}', '"hyperparameters": {"kappa": 0.5}'))
    experiment = read_record(tmp_path / "run.jsonl").run.experiment
    assert (experiment.rule, experiment.hyperparameters, experiment.seed) == ("my_own", {"kappa": 0.5}, 3)


def test_the_records_of_a_folder_are_in_the_order_of_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished runs"):
        read_records(tmp_path)
    (tmp_path / "runs").mkdir()
    for machine in "ba":
        write_record(made_up_record(machine=machine), record_file(tmp_path, machine))
    (tmp_path / "runs" / ".a.jsonl.7.tmp").write_text("half a li")
    assert [record.machine for record in read_records(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "line 1: not JSON"),
        (lambda text: "[1]\n", "line 1: expected an object, got list"),
        (lambda text: '{"format": "another"}\n', "line 1: this is not the record of a run"),
        (lambda text: text.splitlines()[0], "holds no history, only its first line; delete it"),
        (lambda text: text[:-20], "line 3: not JSON"),
        (lambda text: text.replace('"engine"', '"motor"'), "line 1: "),
        (lambda text: text.replace('"seed": 3', '"sed": 3'), "line 1: TypeError .*'sed'"),
    ],
)
def test_what_is_no_record_is_named_with_its_line(tmp_path, change, message):
    file = tmp_path / "run.jsonl"
    write_record(made_up_record(), file)
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=f"run.jsonl,? {message}"):
        read_record(file)


def test_bytes_that_are_no_text_are_no_record(tmp_path):
    (tmp_path / "run.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.jsonl: this is not the record of a run"):
        read_record(tmp_path / "run.jsonl")
