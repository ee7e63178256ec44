"""The package: its metadata agree with each other, errors advise what exists, the source archive is small and whole."""

import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import gut_fast
from gut_fast import requirements

ROOT = Path(__file__).parents[1]
BUILDS = ("LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "tests/sanitize/concurrent.cpp")
"""Files that a build needs, beside those in python and csrc."""


@pytest.fixture
def extras():
    """What each extra of the package asks for."""
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def tracked(*patterns):
    """The files of these folders that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("there is no clone here")
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_table_of_libraries_has_the_bounds_of_the_extras(extras):
    assert sorted(requirements.COMMAND_LINE.values()) == sorted(extras["cli"])
    asked = {requirement for extra in extras.values() for requirement in extra}
    assert set(requirements.OPTIONAL.values()) <= asked
    users = [extras[name] for name in extras if name not in ("integrations", "dev", "docs")]
    assert {requirement for extra in users for requirement in extra} == set(requirements.OPTIONAL.values())


def test_what_is_missing_is_one_line_that_can_be_run(monkeypatch):
    assert requirements.what_is_missing(["json"]) is None
    assert requirements.what_is_missing(["no_such_a", "json", "no_such_b", "no_such_c"]) == (
        "no_such_a, no_such_b and no_such_c are not installed; install with: "
        'pip install "no_such_a" "no_such_b" "no_such_c"'
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert requirements.what_is_missing(["sklearn"]) == (
        'scikit-learn is not installed; install with: pip install "scikit-learn>=1.4"'
    )


def test_the_demo_without_the_libraries_it_prints_with_says_what_to_install():
    program = "import sys; sys.modules['rich'] = None; import gut_fast.study.demo"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = 'gut_fast.study: rich is not installed; install with: pip install "rich>=13"\n'
    assert done.stderr.endswith(f"ModuleNotFoundError: {last}")


def test_nothing_advises_an_index_that_does_not_have_the_package():
    pages = [path for path in tracked("*.md", "*.py", "*.ipynb", "*.toml") if path != "tests/test_package.py"]
    advice = re.compile(r"pip3? install (-\S+ )*[\"']?gut[_-]fast")
    assert [path for path in pages if advice.search((ROOT / path).read_text(encoding="utf-8"))] == []


def test_version_and_licence_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.groups() == (gut_fast.__version__, str(citation["date-released"]))
    assert str(citation["version"]) == gut_fast.__version__
    assert citation["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_source_archive_is_small_and_holds_what_a_build_needs(tmp_path):
    for module in ("build", "scikit_build_core", "pybind11"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.name == f"gut_fast-{gut_fast.__version__}.tar.gz"
    assert archive.stat().st_size < 1_000_000
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert not {name for name in names if name.startswith(("results/", ".ci/")) or name.endswith((".png", ".so"))}
    assert names >= {*BUILDS, *tracked("python", "csrc", "examples")}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/versions.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
