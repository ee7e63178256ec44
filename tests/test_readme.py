"""The READMEs show what works: code and commands run, the tables are the tables, the numbers are those measured."""

import csv
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import gut_fast as gf
from gut_fast.bench import results
from gut_fast.bench.cases import CASES, GROUPS
from gut_fast.cli.app import app
from gut_fast.kernels import machine
from gut_fast.rules import RULES
from gut_fast.simulation.engines import ENGINES
from gut_fast.study.demo import METHODS, SEEDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "benchmarks/README.md", "results/README.md")
}
RESULTS = ROOT / "benchmarks/results/amd-epyc.json"


def blocks(text, language=""):
    """The contents of fenced blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for kind, body in found if kind == language]


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands(text):
    """Whatever is typed in a shell: lines of blocks, and code within a sentence."""
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines = [line for block in blocks(text) for line in block.splitlines()] + indented
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(gut-fast|make|python|pytest) ", line)]


def how_fast_row(case, measured):
    """The numbers of a case in the README's table, as the results have them."""
    measured = sorted((result for result in measured if result.case == case), key=lambda result: result.threads)
    assert [result.threads for result in measured] == [1, 2], f"{case} was not measured on one and two threads"
    cells = [
        [f"{1e3 * result.time('gut_fast'):.2f}{'*' * bool(result.doubts)}" for result in measured],
        [f"{result.fraction_of_ceiling('gut_fast'):.2f}" for result in measured],
    ]
    for kind in ("SGD", "compile", "eager", "authors"):
        best = [(result, result.fastest(kind)) for result in measured]
        cells.append(["–" if name is None else times(result.ratio(name)) for result, name in best])
    return " | ".join("–" if set(pair) == {"–"} else " / ".join(pair) for pair in cells)


def times(ratio):
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def test_the_code_runs(capsys):
    torch.manual_seed(0)
    known = dict(RULES)
    names = {"__name__": "readme", "gf": gf}
    try:
        for block in blocks(README, "python"):
            exec(compile(block, "README.md", "exec"), names)  # the README is ours
        names["optimizer"].step()
    finally:
        RULES.clear()
        RULES.update(known)
    accuracy = float(re.search(r"averaged model: ([\d.]+)% of the test digits", capsys.readouterr().out).group(1))
    assert accuracy > 90


def test_the_table_is_the_table():
    rows = [line for line in README.splitlines() if line.startswith("| ") and "`gf." in line]
    assert len(rows) == len(RULES)
    for row, rule in zip(rows, RULES.values(), strict=True):
        assert rule.equation in row
        assert row.endswith(f"| {len(rule.states)} | {rule.num_messages} |")


def test_topologies_and_names_are_there():
    names = set(re.findall(r"`([a-z_]+)`", README.split("Any topology:")[1].split("time-varying")[0]))
    assert len(names) >= 12
    assert all(callable(getattr(gf.topology, name)) for name in names)
    for name in set(re.findall(r"gf\.([A-Z]\w+)", README)):
        assert name in gf.__all__
    in_quotes = set(re.findall(r"`(?:engine=)?\"([\w-]+)\"`", README))
    assert set(ENGINES) <= in_quotes
    assert set(machine.instruction_tiers()) <= set(re.findall(r"`([\w-]+)`", README.split("`GUT_FAST_TIER` (")[1]))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    found = commands(PAGES[page])
    assert {"README.md": 12, "benchmarks/README.md": 6, "results/README.md": 3}[page] <= len(found)
    makefile = (ROOT / "Makefile").read_text()
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
    cases = [value for option, value in itertools.pairwise(arguments) if option == "--case"]
    assert set(cases) <= GROUPS.keys() | CASES.keys()


def test_what_the_demo_prints():
    printed = blocks(section("What `make demo` prints"))[0]
    compared = f"compiled kernel = reference, {len(METHODS)} methods: error"
    assert re.search(rf"^{compared} \S+ \(float64\), \S+ \(float32\) of plain PyTorch's$", printed, re.MULTILINE)
    assert f"{len(METHODS)} methods, {len(SEEDS)} seeds each" in printed
    for label, method in METHODS.items():
        assert re.search(rf"^ *{re.escape(label)} +{method.lr:g} ", printed, re.MULTILINE)


def test_results_are_as_measured():
    with (ROOT / "results/fashion-mnist-14-ring16/report/methods.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["moment"] == "at the end"]
    points = dict.fromkeys(row["point"] for row in rows)
    by_name = {(row["point"], row["method"]): row for row in rows}
    methods = ["DSGD", "GUT", "D2", "QG-DSGDm", "QG-GUTm", "QG-DSGDm β+μ", "GUTm", "QGT"]
    methods += ["gradient tracking", "momentum tracking"]
    printed = [line for line in section("Results").splitlines() if line.count(" ± ") == 4]
    constant = next(point for point in points if point == "α = 0.01, constant lr")
    for method, line in zip(methods, printed, strict=True):
        cells = [(point, "test_accuracy") for point in points if "decay" in point] + [(constant, "mean_agent_accuracy")]
        found = [(by_name[point, method], metric) for point, metric in cells]
        numbers = [f"{float(row[f'{metric}_mean']):.1f} ± {float(row[f'{metric}_std']):.1f}" for row, metric in found]
        sent = f"{float(by_name[constant, method]['mean_bytes_sent_per_step_mean']) / 1000:.0f}"
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [*numbers, sent]


def test_how_fast_is_as_measured():
    measured = results.load(RESULTS)
    rows = [line for line in section("How fast").splitlines() if re.match(r"\| .*\(`", line)]
    assert len(rows) >= 5
    for row in rows:
        case = re.search(r"\(`(.+?)`\)", row).group(1)
        assert row.split(" | ", 1)[1] == f"{how_fast_row(case, measured)} |"
