"""README and docs show what works: code runs and prints what is shown, commands run, links lead somewhere."""

import itertools
import re
import shlex
import shutil
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
GUIDES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, "benchmarks/README.md", "results/README.md", "results/one-message-rules.md"]
EXCERPTS = "docs/integrations.md"
"""The page whose blocks are parts of examples; test_examples.py looks for them there."""

SLOW = {"docs/how-to/language-model.md"}
VARYING = ("index", "loop", "simulator", "language-model", "README")
"""The pages whose numbers are of training, which may differ a little from machine to machine."""

STUDIES = ("tune", "sweep", "report")
SETTINGS = {"data": "digits", "pool": 1, "model": "mlp:8", "steps": 4, "eval_every": 2}
SHORT = {
    "data": [],
    "info": [],
    "report": [],
    "sweep": ["--jobs", "1"],
    "topology": [],
    "train": ["--data", "digits", "--model", "mlp", "--steps", "16", "--eval-every", "16", "--threads", "1"],
    "tune": ["--jobs", "1"],
}
"""What makes a command short; the commands that are not here have long tests of their own, and are only parsed."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language=""):
    """The contents of the fenced blocks of a page in one language."""
    return [body for kind, body in BLOCK.findall(text_of(page)) if kind == language]


def code_and_output(page):
    """The Python blocks of a page, each with the block of text that follows it at once, or None."""
    found = list(BLOCK.finditer(text_of(page)))
    for block, after in itertools.zip_longest(found, found[1:]):
        if block[1] == "python":
            is_output = after and after[1] == "text" and not text_of(page)[block.end() : after.start()].strip()
            yield block[2], after[2] if is_output else None


def commands(page):
    """The words of every command in the blocks and in the code within the sentences of a page."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(gut-fast|make|python|pytest) ", line)]


def sessions(page):
    """The commands of a page whose output is shown, each with the lines shown."""
    for block in blocks(page, "console"):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = session.splitlines()
            yield shlex.split(command), lines


def check_output(shown, printed, tolerance):
    """Each line shown was printed, in this order, numbers within a tolerance, if any; ``…`` stands for other lines."""
    rest = iter(printed)
    for line in shown:
        if line.strip() not in ("", "…"):
            assert any(are_alike(line, other, tolerance) for other in rest), f"not printed: {line}"


def are_alike(line, other, tolerance):
    texts, numbers = zip(*(split_numbers(each) for each in (line, other)), strict=True)
    return texts[0] == texts[1] and (tolerance is None or numbers[0] == pytest.approx(numbers[1], rel=tolerance))


def split_numbers(line):
    """The words of a line with 0 for each number, whatever their distance, and the numbers."""
    words = re.sub(r"─+", "─", " ".join(NUMBER.sub("0", line).split()))
    return words, [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def as_cases(pages):
    return [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [], id=page) for page in pages]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, and a terminal of a hundred columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_way_of_a_step_leads_through_five_files():
    way = blocks("docs/step.md")[0]
    files = re.findall(r"^(\S+/\S+) +(?:\w+\.)?(\w+)", way, re.MULTILINE)
    assert len(files) == 5
    assert all(re.search(rf"\b{name}\b", text_of(path)) for path, name in files)


@pytest.mark.parametrize("page", as_cases(page for page in GUIDES if blocks(page, "python") and page != EXCERPTS))
def test_code_runs_and_prints_what_is_shown(page, folder, capsys):
    tolerance = 0.1 if page.removesuffix(".md").endswith(VARYING) else 1e-9
    torch.manual_seed(0)
    known = dict(RULES)
    names = {"__name__": "page", "gf": gf}
    try:
        for code, output in code_and_output(page):
            exec(compile(code, page, "exec"), names)  # the pages are ours
            printed = capsys.readouterr().out
            if output is not None:
                check_output(output.splitlines(), printed.splitlines(), tolerance)
    finally:
        RULES.clear()
        RULES.update(known)


def test_output_that_was_not_printed_is_found():
    check_output(["a 1.0", "…", "c"], ["a  1.0", "b", "c"], 1e-9)
    for shown in (["a 1.1"], ["c", "a 1.0"], ["a"], ["d"]):
        with pytest.raises(AssertionError, match="not printed"):
            check_output(shown, ["a 1.0", "b", "c"], 1e-9)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in target]
    files = [target.partition("#")[0] for target in targets if not target.startswith("#")]
    assert [target for target in files if not (ROOT / page).parent.joinpath(target).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    makefile = (ROOT / "Makefile").read_text()
    for program, *arguments in commands(page):
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


def run_short(arguments):
    """Runs a command of a page on the digits and for a few steps; it must succeed."""
    arguments = ["digits" if word == "fashion-mnist" else word for word in arguments]
    for_digits = ["--classes-per-agent", "2"] if "manpages-lm-ring8" in arguments else []  # eight agents, ten classes
    assert cli.main([*arguments, *SHORT[arguments[0]], *for_digits]) == 0, arguments


def test_commands_of_the_pages_run(folder):
    found = [words[1:] for page in GUIDES for words in commands(page) if words[0] == "gut-fast" and "cuda" not in words]
    short = [words for words in found if words[0] in SHORT.keys() - set(STUDIES) and "--launch" not in words]
    assert {"train", "data", "topology", "info"} <= {words[0] for words in short}
    for number, words in enumerate(dict.fromkeys(map(tuple, short))):
        run_short([*words, *(["--out", f"train-{number}"] if words[0] == "train" else [])])
    assert (folder / "samples.png").exists()


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "console")])
def test_commands_print_what_is_shown(page, folder, capsys):
    """Training is cut to few steps: its tables must have the columns that are shown, with other numbers."""
    for (program, *words), shown in sessions(page):
        is_training = words[0] == "train"
        assert program == "gut-fast"
        assert cli.main([*words, *(SHORT["train"] if is_training else [])]) == 0
        check_output(shown, capsys.readouterr().out.splitlines(), None if is_training else 1e-9)


@pytest.mark.slow
def test_studies_of_the_pages_run(folder):
    """Each file of a study is cut to two methods, one point and few steps of a small network on the digits."""
    studies = {place: place for place in ("results/fashion-mnist-14-ring16", "results/frontier/ring")}
    studies["."] = "results/fashion-mnist-14-ring16"
    for (place, source), file in itertools.product(studies.items(), ("tune.yaml", "sweep.yaml")):
        content = read_yaml(ROOT / source / file)
        wanted = [label for label in content["methods"] if label.partition(",")[0] in ("GUT", "GUTm")][:2]
        methods = {label: content["methods"][label] for label in wanted}
        short = {**content, "methods": methods, "settings": {**content["settings"], **SETTINGS}, "grid": {"alpha": [1]}}
        short |= {"tune": {**content["tune"], "tries": 2, "seeds": [0]}} if "tune" in content else {"seeds": 1}
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_yaml(short, folder / place / file)
    found = [words[1:] for page in GUIDES for words in commands(page) if words[:1] == ["gut-fast"]]
    for words in dict.fromkeys(tuple(words) for words in found if words[0] in STUDIES and len(words) > 1):
        if words[0] == "tune" and (folder / "tuned").exists():
            shutil.rmtree(folder / "tuned")
        run_short(words)
    assert (folder / "sweep/report/report.md").exists()


@pytest.mark.slow
def test_the_small_sweep_that_is_shown_runs(folder):
    (shown,) = blocks("docs/how-to/commands.md", "yaml")
    (folder / "small.yaml").write_text(shown)
    content = read_yaml(folder / "small.yaml")
    write_yaml({**content, "settings": {**content["settings"], **SETTINGS}, "seeds": 1}, folder / "short.yaml")
    assert cli.main(["sweep", "short.yaml", "--out", "small", "--jobs", "1"]) == 0
    assert cli.main(["report", "small"]) == 0
