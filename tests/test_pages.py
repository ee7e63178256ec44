"""The READMEs show what works: their code runs, their commands are there and run, their links lead somewhere."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import gut_fast as gf
from gut_fast import cli
from gut_fast.cli.app import app
from gut_fast.rules import RULES
from gut_fast.study.yaml_files import read_yaml, write_yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/integrations.md", "benchmarks/README.md", "results/README.md")
STUDIES = ("tune", "sweep", "report")
SETTINGS = {"data": "digits", "pool": 1, "model": "mlp:8", "steps": 4, "eval_every": 2}
SHORT = {
    "data": [],
    "info": [],
    "report": [],
    "sweep": ["--jobs", "1"],
    "topology": [],
    "train": ["--data", "digits", "--model", "mlp", "--steps", "2", "--eval-every", "2", "--threads", "1"],
    "tune": ["--jobs", "1"],
}
"""What makes a command short; the commands that are not here have long tests of their own, and are only parsed."""


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language=""):
    """The contents of the fenced blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [body for kind, body in found if kind == language]


def commands(page):
    """The words of every command in the blocks and in the code within the sentences of a page."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(gut-fast|make|python|pytest) ", line)]


def test_the_way_of_a_step_leads_through_five_files():
    way = blocks("docs/step.md")[0]
    files = re.findall(r"^(\S+/\S+) +(?:\w+\.)?(\w+)", way, re.MULTILINE)
    assert len(files) == 5
    assert all(re.search(rf"\b{name}\b", text_of(path)) for path, name in files)


def test_the_code_runs(capsys):
    torch.manual_seed(0)
    known = dict(RULES)
    names = {"__name__": "readme", "gf": gf}
    try:
        for block in blocks("README.md", "python"):
            exec(compile(block, "README.md", "exec"), names)  # the README is ours
        names["optimizer"].step()
    finally:
        RULES.clear()
        RULES.update(known)
    data, agents = names["data"], names["agents"]
    right = (agents.average()(data.test_inputs).argmax(1) == data.test_labels).float().mean().item()
    assert right > 0.9
    assert f"{right:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    makefile = (ROOT / "Makefile").read_text()
    found = commands(page)
    assert found
    for program, *arguments in found:
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), arguments
        elif program == "gut-fast":
            check_arguments(arguments)
        else:
            assert (ROOT / arguments[0]).exists(), arguments


def check_arguments(arguments):
    """Parses them as the command line does, without running the command; raises at an unknown option."""
    command, rest = typer.main.get_command(app), list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not hasattr(command, "commands") or not rest, arguments
    if not hasattr(command, "commands"):
        command.make_context("gut-fast", rest)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_short(arguments):
    """Runs a command of the README on the digits and for a few steps; it must succeed."""
    arguments = ["digits" if word == "fashion-mnist" else word for word in arguments]
    assert cli.main([*arguments, *SHORT[arguments[0]]]) == 0, arguments


def test_commands_of_the_readme_run(folder):
    found = [words[1:] for words in commands("README.md") if words[0] == "gut-fast" and "cuda" not in words]
    short = [words for words in found if words[0] in SHORT.keys() - set(STUDIES) and "--launch" not in words]
    assert {"train", "data", "topology", "info"} <= {words[0] for words in short}
    for number, words in enumerate(dict.fromkeys(map(tuple, short))):
        run_short([*words, *(["--out", f"train-{number}"] if words[0] == "train" else [])])
    assert (folder / "samples.png").exists()


@pytest.mark.slow
def test_studies_of_the_readme_run(folder):
    """Each file of a study is cut to two methods, one point and few steps of a small network on the digits."""
    for place, file in itertools.product(("results/fashion-mnist-14-ring16", "."), ("tune.yaml", "sweep.yaml")):
        content = read_yaml(ROOT / "results/fashion-mnist-14-ring16" / file)
        methods = {label: content["methods"][label] for label in ("GUT", "GUTm")}
        short = {**content, "methods": methods, "settings": {**content["settings"], **SETTINGS}, "grid": {"alpha": [1]}}
        short |= {"tune": {**content["tune"], "tries": 2, "seeds": [0]}} if "tune" in content else {"seeds": 1}
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_yaml(short, folder / place / file)
    studies = [words[1:] for words in commands("README.md") if words[:1] == ["gut-fast"] and words[1] in STUDIES]
    for words in studies:
        if words[0] == "tune" and (folder / "tuned").exists():
            (folder / "tuned").rename(folder / "tuned-before")
        run_short(words)
    assert (folder / "sweep/report/report.md").exists()
