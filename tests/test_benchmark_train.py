import dataclasses
import itertools
import json

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from gut_fast.benchmark import train_report, train_run, training
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.device import CPU
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.benchmark.train_run import MeasuredTraining, TrainingResult
from gut_fast.benchmark.training import OneModel, PlainLoop, Simulated, Task
from gut_fast.cli.bench_train import train

TASK = Task("mlp", agents=5, batch_size=3)
PNG = b"\x89PNG"


def gradients(trainer):
    """Of all agents, [N, D]; of one model [D]."""
    if isinstance(trainer, OneModel):
        return torch.cat([parameter.grad.flatten() for parameter in trainer.module.parameters()])
    if isinstance(trainer, Simulated):
        return torch.cat([parameter.grad.flatten(1) for parameter in trainer.stacked.parameters()], dim=1)
    return torch.stack([torch.cat([p.grad.flatten() for p in module.parameters()]) for module in trainer.modules])


def parameters(trainer):
    """Of all agents, [N, D]."""
    if isinstance(trainer, Simulated):
        return torch.cat([parameter.detach().flatten(1) for parameter in trainer.stacked.parameters()], dim=1)
    return torch.stack([torch.cat([p.detach().flatten() for p in module.parameters()]) for module in trainer.modules])


@pytest.mark.parametrize("engine", training.engines_of(CPU))
def test_the_simulator_and_the_plain_loop_train_alike(engine):
    """Six steps, each on a new batch: past the first ones, a wrong state would show."""
    simulated, plain = Simulated(TASK, engine), PlainLoop(TASK)
    seen = []
    for _ in range(6):
        for trainer in (simulated, plain):
            trainer.gradient()
        torch.testing.assert_close(gradients(simulated), gradients(plain), rtol=1e-4, atol=1e-6)
        seen.append(gradients(plain).clone())
        for trainer in (simulated, plain):
            trainer.step()
        torch.testing.assert_close(parameters(simulated), parameters(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)  # another batch
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-3  # another agent's


def test_one_model_has_the_samples_of_all_agents():
    one, plain = OneModel(TASK), PlainLoop(TASK)
    for trainer in (one, plain):
        trainer.gradient()
    torch.testing.assert_close(gradients(one), gradients(plain).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("between", ["sgd", "nothing"])
def test_controls_compute_the_same_gradient_and_step_as_they_say(between):
    control, gut = Simulated(TASK, "loop", between), Simulated(TASK, "loop")
    for trainer in (control, gut):
        trainer.gradient()
    assert torch.equal(gradients(control), gradients(gut))
    before = parameters(control).clone()
    control.step()
    expected = before - training.LR * gradients(control) if between == "sgd" else before
    torch.testing.assert_close(parameters(control), expected)


def test_who_takes_part():
    names = list(training.enter(TASK, ["workers"]))
    assert names == [*("workers", "plain loop", "one model"), "workers, SGD", "workers, alone", "one model, alone"]
    assert list(training.enter(TASK, ["loop", "vmap"], controls=False)) == ["loop", "vmap", "plain loop", "one model"]


def test_comparison_of_all():
    errors = training.compare(training.enter(TASK, training.engines_of(CPU)))
    assert set(errors) == set(training.enter(TASK, training.engines_of(CPU))) - {"plain loop"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("who", "what"), [("workers", "gradient"), ("one model", "gradient"), ("loop", "step"), ("vmap", "step's r")]
)
def test_who_is_wrong_is_not_timed(who, what, monkeypatch):
    trainers = training.enter(TASK, training.engines_of(CPU))
    wrong = trainers[who]
    right_backward, right_step = wrong._backward, wrong.step

    def backward(inputs, targets):
        right_backward(inputs, targets)
        owner = wrong.module if isinstance(wrong, OneModel) else wrong.stacked
        next(iter(owner.parameters())).grad.flatten()[0] += 0.1

    def step():
        right_step()
        first = wrong.stacked.parameters()[0]
        with torch.no_grad():
            (first if what == "step" else wrong.optimizer.state[first]["r"]).flatten()[0] += 0.1

    monkeypatch.setattr(wrong, *(("_backward", backward) if what == "gradient" else ("step", step)))
    with pytest.raises(WrongResultError, match=f"{who}: its {what} differs from the plain loop's by"):
        training.compare(trainers)


class Clock:
    """A trainer whose gradients and steps take as long as it says, on a clock of its own."""

    kind = "simulator"
    now = 0.0

    def __init__(self, gradient, step, log):
        self.seconds, self.log = {"gradient": gradient, "step": step}, log

    def gradient(self):
        self._take("gradient")

    def step(self):
        self._take("step")

    def _take(self, what):
        Clock.now += self.seconds[what]
        self.log.append((self, what))


def test_turns_time_gradient_and_step_apart_and_each_follows_its_own(monkeypatch):
    monkeypatch.setattr(train_run.time, "perf_counter", lambda: Clock.now)
    log = []
    trainers = {"fast": Clock(0.02, 0.005, log), "slow": Clock(3.0, 1.0, log)}
    times = train_run._take_turns(trainers, seconds=41.0)
    rounds = round(41.0 / (4 * 0.025 + 4.0))
    assert {name: len(each) for name, each in times.items()} == {"fast": 4 * rounds, "slow": rounds}
    assert times["slow"][0] == pytest.approx((3.0, 1.0, 4.0))
    assert times["fast"] == [pytest.approx((0.02, 0.005, 0.025))] * 4 * rounds
    for before, now in itertools.pairwise(log):
        assert now[1] == "step" or before == (now[0], "step")


def quantiles(seconds):
    return Quantiles(0.9 * seconds, seconds, 1.1 * seconds, 7)


def result(model="lenet5", agents=16, threads=2, workers=0.1):
    kinds = {
        "workers": ("simulator", workers, 0.01),
        "plain loop": ("plain loop", 0.16, 0.06),
        "one model": ("one model", 0.1, 0.01),
        "workers, alone": ("control", 0.09, 0.0),
        "one model, alone": ("control", 0.08, 0.0),
    }
    measured = {
        name: MeasuredTraining(kind, quantiles(g), quantiles(s), quantiles(g + s), None if "loop" in name else 1e-6)
        for name, (kind, g, s) in kinds.items()
    }
    quiet = Disturbance(0.1, 0.1, 1.0, 0.0, 0.0, 0, 0.1)
    return TrainingResult(model, agents, 32, threads, measured, quiet, "A processor, Linux", {"torch": "2"}, "today")


def test_rates_and_ratios():
    measured = result(workers=0.12)
    assert measured.rate("workers") == pytest.approx(16 * 32 / 0.13)
    assert measured.to_one_model("workers") == pytest.approx(1.2)
    assert measured.after_step("workers") == pytest.approx(0.12 / 0.09)
    assert measured.after_step("one model") == pytest.approx(0.1 / 0.08)
    assert measured.after_step("plain loop") is None
    assert measured.after_step("workers, alone") is None


def test_results_come_back_from_their_file_and_add_up(tmp_path):
    file = tmp_path / "train.json"
    first, second, newer = result(), result("mlp"), result(workers=0.5)
    train_run.save([first, second], file)
    assert train_run.load(file) == [first, second]
    derived = json.loads(file.read_text())["results"][0]["derived"]["workers"]
    assert derived["gradient_to_one_model"] == pytest.approx(1.0)
    assert train_run.merge([first, second], [newer]) == [newer, second]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"train.json holds no results of gut-fast bench train"):
        train_run.load(file)


def test_the_table_and_the_lines_below_it():
    console = Console(width=80, record=True)
    console.print(train_report.table(result()))
    text = console.export_text()
    assert "lenet5, 16 agents × 32 samples, 2 threads" in text
    rows = [line.split() for line in text.splitlines() if " – " in line and "p10" not in line]
    assert rows[0] == ["workers", "4,655", "100", "90.0", "–", "110", "1.00", "1.111", "10.0"]
    assert [row[0] for row in rows] == ["workers", "one", "plain", "one", "workers,"]
    assert "…" not in text


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (result(), "goal for workers ÷ one: 1.10, reached"),
        (result(workers=0.12), "goal for workers ÷ one: 1.10, NOT reached"),
        (result(agents=64), None),
    ],
)
def test_goals_are_said_to_be_reached_or_not(measured, expected):
    goals = [line for line in train_report.lines(measured) if line.startswith("goal")]
    assert goals == ([] if expected is None else [expected])
    assert f"trains {0.22 / (measured.trainers['workers'].both.p50):.2f} times" in " ".join(
        train_report.lines(measured)
    )


def test_a_noisy_run_says_so():
    noisy = dataclasses.replace(result(), disturbance=Disturbance(2.0, 2.0, 1.0, 1.5, 0.0, 0, 0.5))
    warnings = [line for line in train_report.lines(noisy) if line.startswith("NOISY RUN")]
    assert "other processes kept 1.50 processors busy" in warnings[0]
    assert "the steadiest trainer's own times spread by 50%" in warnings[1]


app = typer.Typer()
app.command()(train)


def call(*arguments):
    return CliRunner().invoke(app, arguments)


def test_the_command_measures_prints_and_writes(tmp_path):
    quick = ("--agents", "3", "--batch-size", "2", "--seconds", "0", "--threads", "1", "--output", str(tmp_path))
    done = call("--model", "mlp", "--engine", "workers", *quick)
    assert done.exit_code == 0, done.output
    assert "Training mlp, 3 agents × 2 samples, 1 thread" in done.output
    assert "equal to the plain loop's" in done.output
    done = call("--model", "mlp", "--engine", "loop", "--no-controls", *quick[2:], "--agents", "4")
    assert "2 results" in done.output
    (file,) = tmp_path.glob("*.json")
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(PNG)
    first, second = train_run.load(file)
    assert first.key == ("mlp", 3, 2, 1, "cpu")
    assert list(second.trainers) == ["loop", "plain loop", "one model"]
    assert all(entry.both.p50 > 0 for entry in first.trainers.values())
    assert first.versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vgg"), "unknown model 'vgg'; known are mlp, lenet5, resnet20"),
        (("--engine", "auto"), f"unknown engine 'auto'; known are {', '.join(training.ENGINE_NAMES)}"),
        (("--engine", "graphed-vmap"), "a graphed engine is for CUDA devices, the model is on cpu; use 'loop'"),
        (("--device", "tpu"), "unknown device 'tpu'; known are cpu, cuda"),
    ],
)
def test_bad_arguments_of_the_command(arguments, message):
    done = call(*arguments)
    assert str(done.exception).startswith(message)


def test_a_wrong_result_ends_the_command(monkeypatch):
    def wrong(*arguments, **options):
        raise WrongResultError("loop: its gradient differs")

    monkeypatch.setattr(train_run, "run", wrong)
    done = call("--model", "mlp")
    assert done.exit_code == 1
    assert "NOT TIMED: loop: its gradient differs" in done.output


@pytest.mark.parametrize(("model", "agents"), [("vgg", 4), ("mlp", 0)])
def test_bad_tasks(model, agents):
    with pytest.raises(ValueError, match=r"unknown model 'vgg'|at least one agent and one sample, got 0 × 32"):
        Task(model, agents)
    with pytest.raises(ValueError, match="unknown engine 'jit'; known are loop, vmap, workers"):
        training.enter(TASK, ["jit"])


def test_every_model_has_images():
    for name in training.IMAGES:
        module = Task(name).make_module()
        assert module(torch.randn(2, *training.IMAGES[name])).shape == (2, training.NUM_CLASSES)


def test_what_others_have_compiled_does_not_count(monkeypatch):
    """Or torch.compile would come to its limit of variants, and go on in eager without a word."""

    def reset():
        raise RuntimeError("forgotten")

    monkeypatch.setattr(torch.compiler, "reset", reset)
    with pytest.raises(RuntimeError, match="forgotten"):
        train_run.run(TASK, ["loop", "compiled-vmap"], 1, 0.0)
    assert train_run.run(TASK, ["loop"], 1, 0.0, controls=False).best == "loop"
