"""The examples run, learn and go on where they were; each is short enough to be copied."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import gut_fast as gf
import ranks
from torchvision_shim import mend_torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"
ON_THE_PAGE = ("plain_loop.py", "lightning_module.py", "accelerate_loop.py", "hf_trainer.py", "torchrun.py")
SHORT = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "distributed.py")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that they show


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def run_example(name, *arguments):
    """Runs an example in this process; returns what its module holds at the end, and what it has printed."""
    printed, given = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = given
    return names, printed.getvalue()


def accuracies(printed):
    return [float(number) for number in re.findall(r"accuracy.* ([\d.]+)%", printed)]


def right(agents, data):
    predicted = agents.average().eval()(data.test_inputs).argmax(1)
    return (predicted == data.test_labels).float().mean().item()


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_a_plain_loop(folder):
    pytest.importorskip("tensorboard")
    _, printed = run_example("plain_loop.py")
    assert accuracies(printed)[-1] > 95
    (events,) = (folder / "outputs/plain_loop").iterdir()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = EventAccumulator(str(events)).Reload().Scalars("accuracy")
    assert [100 * point.value for point in curve] == pytest.approx(accuracies(printed), abs=0.06)


def test_lightning(folder):
    mend_torchvision()
    pytest.importorskip("lightning")
    first, _ = run_example("lightning_module.py", "--epochs", "2")
    saved = torch.load(folder / "outputs/lightning_module/last.ckpt", weights_only=False)
    agents = first["trainer"].lightning_module.agents
    assert saved["state_dict"].keys() == {f"agents.{name}" for name in agents.state_dict()}
    assert all(torch.equal(saved["state_dict"][f"agents.{name}"], own) for name, own in agents.state_dict().items())
    second, _ = run_example("lightning_module.py", "--epochs", "8")
    assert second["trainer"].global_step == 8 * 11
    assert second["trainer"].optimizers[0].num_steps == 8 * 11
    assert right(second["trainer"].lightning_module.agents, second["data"]) > 0.9


def test_accelerate(folder):
    pytest.importorskip("tensorboard")
    pytest.importorskip("accelerate")
    _, before = run_example("accelerate_loop.py", "--epochs", "2")
    names, after = run_example("accelerate_loop.py", "--epochs", "8")
    assert [len(accuracies(before)), len(accuracies(after))] == [2, 6]
    assert names["optimizer"].optimizer.num_steps == 8 * 11
    assert right(names["agents"], names["data"]) > 0.9


def test_the_trainer_of_hugging_face(folder):
    mend_torchvision()
    pytest.importorskip("transformers")
    run_example("hf_trainer.py", "--steps", "100")
    names, _ = run_example("hf_trainer.py", "--steps", "200")
    evaluations = [row["eval_accuracy"] for row in names["trainer"].state.log_history if "eval_accuracy" in row]
    assert len(evaluations) == 2  # the first is the checkpoint's
    assert evaluations[-1] > 0.8


def test_a_forward_pass_of_all_agents(folder):
    names, printed = run_example("forward_pass.py")
    assert "'1.weight': (8, 32, 64)" in printed
    assert len(re.search("accuracy of each agent: (.*)", printed)[1].split()) == 8
    assert right(names["agents"], names["data"]) > 0.9


def test_the_simulator_with_data_of_ones_own(folder):
    names, printed = run_example("own_data.py")
    errors = [float(number) for number in re.findall(r"step \d+: error ([\d.]+)", printed)]
    assert len(errors) == 3
    assert errors[-1] < 0.15  # the noise alone makes 0.08
    assert names["simulator"].history[-1]["mean_agent_error"] < 0.15


@pytest.mark.slow
def test_a_rule_of_ones_own(folder, monkeypatch):
    monkeypatch.setattr("gut_fast.rule.RULES", dict(gf.rules.RULES))  # the rule goes with the test
    names, printed = run_example("own_rule.py")
    assert [float(number) > 90 for number in re.findall(r"accuracy.* ([\d.]+)%", printed)] == [True] * 3
    assert names["damped_gut"].states == ("r",)


@pytest.mark.slow
def test_topologies_that_vary(folder):
    _, printed = run_example("time_varying_topology.py")
    rows = re.findall(r"^ +(\d+) +(\d+|random)  (.*): ([\d.]+)%, mu", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("2", "1"), ("1", "4"), ("1", "4"), ("1", "random"), ("3", "2")]
    assert min(float(row[3]) for row in rows) > 85


def test_a_language_model_with_few_small_messages(folder):
    _, printed = run_example("language_model.py", "--steps", "96")
    bits = [float(number) for number in re.findall(r"([\d.]+) bits a byte", printed)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 4  # eight for a model that knows nothing
    sent, plain = re.search(r"(\d+) kB sent by an agent.* (\d+) kB\n$", printed).groups()
    # Six rounds: a first model in 32 bits, five in 4 and their scales, and second moments in 16 each time.
    bits_sent = 32 + 5 * (4 + 32 / 256) + 6 * 16
    assert int(plain) / int(sent) == pytest.approx(96 * 32 / bits_sent, rel=0.02)


def run_rank(rank, size, folder, epochs):
    """Runs the example of torchrun as a rank."""
    with ranks.as_torchrun(rank, size), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _, printed = run_example("torchrun.py", "--epochs", str(epochs))
    return printed


def test_torchrun_started_again_goes_on_to_the_same_end(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected, nothing = ranks.run(2, run_rank, whole, 4)
    assert nothing == ""
    assert accuracies(expected)[-1] > 90
    parts = [ranks.run(2, run_rank, stopped, epochs)[0] for epochs in (2, 4)]
    assert "".join(parts) == expected


def test_the_notebook(folder):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", 4)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    fresh = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in fresh] == [output.output_type for output in shown]
    bars = [output.data["text/html"] for output in fresh if output.output_type == "display_data"]
    assert len(bars) == 2
    assert all("<progress" in bar and "400/400" in bar for bar in bars)
    assert float(re.findall(r" 400 +([\d.]+)%", fresh[-2].text)[0]) > 90


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("start_here", r"GUT +averaged ([\d.]+)%"),
        pytest.param("which_method", r"GUT +[\d.]+ +([\d.]+)%", marks=pytest.mark.slow),
    ],
)
def test_notebooks_without_outputs_run(folder, name, pattern):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    assert not [output for cell in notebook.cells for output in cell.get("outputs", [])]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    printed = "".join(output.text for output in last.outputs)
    assert float(re.search(pattern, printed)[1]) > 90


def test_the_page_shows_lines_of_the_examples():
    page = (EXAMPLES.parent / "docs/integrations.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    shown = [(section, re.findall(r"```python\n(.*?)```", section, re.DOTALL)) for section in sections]
    shown = [(section, blocks) for section, blocks in shown if blocks]
    assert len(shown) == len(ON_THE_PAGE)
    for section, blocks in shown:
        example = EXAMPLES.parent / "docs" / re.search(r"\]\((\S+\.py)\)", section)[1]
        assert all(block in example.read_text() for block in blocks), example.name
