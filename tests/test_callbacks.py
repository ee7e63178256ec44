"""Callbacks: the events of a run, early stopping, trackers and what shows the progress."""

import csv
import io
import json
import math
import sys

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import gut_fast as gf
from gut_fast.simulation.callbacks import progress as progress_display
from test_simulator import assert_same, contents, run, simulator


class Log(gf.callbacks.Callback):
    """Writes down the events, and raises an error at one of them."""

    def __init__(self, fails_at=None, error=ZeroDivisionError):
        self.events, self.fails_at, self.error = [], fails_at, error

    def __call__(self, *event):
        self.events.append(event)
        if event == self.fails_at:
            raise self.error

    def on_start(self, simulator, timetable):
        self("start", simulator.step, timetable.steps)

    def on_step(self, simulator):
        self("step", simulator.step)

    def on_evaluation(self, simulator, row):
        assert row is simulator.history[-1]
        self("evaluation", row["step"])

    def on_checkpoint(self, simulator, path):
        self("checkpoint", torch.load(path, weights_only=True)["step"])

    def on_end(self, simulator, error):
        self("end", type(error))


def test_events_come_in_their_order(tmp_path):
    sim, log = simulator(), Log()
    run(sim, 3, eval_every=2, checkpoint=tmp_path / "c.pt", checkpoint_every=2, callbacks=log)
    nothing = type(None)
    assert log.events == [
        *[("start", 0, 3), ("step", 1), ("step", 2), ("evaluation", 2), ("checkpoint", 2)],
        *[("step", 3), ("evaluation", 3), ("checkpoint", 3), ("end", nothing)],
    ]
    run(sim, 4, callbacks=[log])
    assert log.events[-4:] == [("start", 3, 4), ("step", 4), ("evaluation", 4), ("end", nothing)]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("event", [("start", 0, 6), ("step", 3), ("evaluation", 4), ("checkpoint", 2)])
def test_an_error_of_a_callback_ends_the_run_which_then_goes_on_bit_for_bit(tmp_path, event, error):
    others, failing = [Log(), Log()], Log(event, error)
    sim, whole = simulator(), simulator()
    options = {"eval_every": 2, "checkpoint": tmp_path / "c.pt", "checkpoint_every": 2}
    with pytest.raises(error):
        run(sim, 6, callbacks=[others[0], failing, others[1]], **options)
    assert sim.step == sim.optimizer.num_steps == event[1]
    assert others[0].events[-1] == ("end", error)
    assert bool(others[1].events) is (event[0] != "start")
    assert (failing.events[-1] == ("end", error)) is (event[0] != "start")
    for each in (sim, whole):
        run(each, 6, **options)
    assert_same(contents(sim, tmp_path), contents(whole, tmp_path))


def test_all_callbacks_are_told_of_the_end_even_if_one_of_them_fails_there():
    first, failing, last = Log(), Log(("end", type(None))), Log()
    with pytest.raises(ZeroDivisionError):
        run(simulator(), 1, callbacks=[first, failing, last])
    assert first.events[-1] == ("end", ZeroDivisionError)
    assert last.events[-1] == ("end", type(None))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([print], "objects of gut_fast.callbacks.Callback, got builtin_function_or_method"),
        ([Log], r"has the class Log; give an object, Log\(...\)"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, message):
    sim = simulator()
    with pytest.raises(TypeError, match=message):
        run(sim, 3, callbacks=callbacks)
    assert sim.step == 0


# Early stopping


class Scripted(gf.callbacks.Callback):
    """Replaces the test loss of each row."""

    def __init__(self, losses):
        self.losses = losses

    def on_evaluation(self, simulator, row):
        row["test_loss"] = self.losses[len(simulator.history) - 1]


@pytest.mark.parametrize(
    ("losses", "options", "stops_at"),
    [
        ([3.0, 2.0, 2.0, 2.1, 1.0, 1.0], {}, 4),
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5], {"min_delta": 0.5}, 3),
        ([1.0, 2.0, 3.0, 3.0, 3.0, 3.0], {"larger_is_better": True}, 5),
        ([3.0, math.nan, 2.0, math.nan, math.nan, 1.0], {}, 5),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {}, 6),
    ],
)
def test_early_stopping_ends_the_run_with_a_checkpoint(tmp_path, losses, options, stops_at):
    sim, path = simulator(), tmp_path / "c.pt"
    stopping = gf.callbacks.EarlyStopping("test_loss", patience=2, **options)
    run(sim, 6, eval_every=1, checkpoint=path, callbacks=[Scripted(losses), stopping])
    assert sim.step == stops_at
    assert torch.load(path, weights_only=True)["step"] == stops_at


def test_a_run_can_be_stopped_at_any_step_and_then_evaluates():
    class StopsAt3(gf.callbacks.Callback):
        def on_step(self, simulator):
            if simulator.step == 3:
                simulator.stop()

    sim = simulator()
    run(sim, 10, eval_every=5, callbacks=StopsAt3())
    assert [row["step"] for row in sim.history] == [3]
    sim.stop()  # between two runs this does nothing
    run(sim, 5)
    assert sim.step == 5


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("loss", {"eval_every": 1}, "no entry 'loss' in the history; its entries are step, lr, train_loss"),
        ("test_loss", {}, "EarlyStopping looks at evaluations; give"),
    ],
)
def test_early_stopping_that_could_not_work_is_refused_before_the_first_step(metric, options, message):
    sim = simulator()
    with pytest.raises(ValueError, match=message):
        run(sim, 3, callbacks=gf.callbacks.EarlyStopping(metric), **options)
    assert sim.step == 0


# Trackers


def test_csv_has_the_whole_history_after_each_evaluation(tmp_path):
    sim, path = simulator(), tmp_path / "run.csv"
    run(sim, 2, eval_every=2)
    run(sim, 6, eval_every=2, callbacks=gf.callbacks.CSV(path))
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == sim.history
    assert len(rows) == 3


def scalars(folder):
    """The scalars in the event files of a folder: by name, (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_scalars(seen, history):
    names = history[0].keys() - {"step"}
    assert seen.keys() == names
    for name in names:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in history]
        assert seen[name] == expected, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_every_number_of_every_evaluation(tmp_path):
    pytest.importorskip("tensorboard")
    sim, whole, folder, checkpoint = simulator(), simulator(), tmp_path / "runs/a", tmp_path / "c.pt"
    board = gf.callbacks.TensorBoard(folder)
    run(sim, 4, eval_every=2, checkpoint=checkpoint, callbacks=board)
    run(sim, 8, eval_every=2, callbacks=board)
    assert_scalars(scalars(folder), sim.history)
    resumed = simulator()
    resumed.load_checkpoint(checkpoint)
    run(resumed, 6, eval_every=2, callbacks=gf.callbacks.TensorBoard(folder))
    run(whole, 6, eval_every=2)
    assert_scalars(scalars(folder), whole.history)  # what was written after the checkpoint is hidden


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker, sim = gf.callbacks.WandB(project="gossip", mode="offline", dir=tmp_path), simulator()
    run(sim, 4, eval_every=2, callbacks=tracker)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb.run is None
    wandb.teardown()  # now the file is whole
    written = file.read_bytes()
    for row in sim.history:
        for name, value in row.items():
            assert name == "step" or (
                name.encode() in written and json.dumps(value).removesuffix(".0").encode() in written
            ), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    mlflow.set_experiment("gossip")
    sim, tracker = simulator(), gf.callbacks.MLflow(run_name="gut")
    run(sim, 4, eval_every=2, callbacks=tracker)
    client = mlflow.MlflowClient()
    for name in sim.history[0].keys() - {"step"}:
        seen = [(each.step, each.value) for each in client.get_metric_history(tracker._run_id, name)]
        assert seen == [(row["step"], row[name]) for row in sim.history]
    assert client.get_run(tracker._run_id).info.status == "FINISHED"
    failing = gf.callbacks.MLflow()
    with pytest.raises(ZeroDivisionError):
        run(sim, 8, callbacks=[failing, Log(("step", 6))])
    assert client.get_run(failing._run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("tensorboard", lambda: gf.callbacks.TensorBoard("runs")),
        ("wandb", gf.callbacks.WandB),
        ("mlflow", gf.callbacks.MLflow),
    ],
)
def test_a_tracker_whose_library_is_missing_says_so_when_it_is_made(module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}, which is not here .*pip install "{module}'):
        make()


def test_where_trackers_cannot_write_is_found_out_when_they_are_made(tmp_path):
    (tmp_path / "file").write_text("")
    for make, path in (
        (gf.callbacks.CSV, tmp_path),
        (gf.callbacks.CSV, tmp_path / "file/run.csv"),
        (gf.callbacks.CSV, tmp_path / "no/such/folder/run.csv"),
    ):
        with pytest.raises(OSError, match=r"folder"):
            make(path)
    pytest.importorskip("tensorboard")
    for path in (tmp_path / "file", tmp_path / "file/runs"):
        with pytest.raises(NotADirectoryError, match="file"):
            gf.callbacks.TensorBoard(path)
    gf.callbacks.TensorBoard(tmp_path / "yet/to/be/made")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# Progress


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stderr", [None, io.StringIO(), Broken()])
def test_training_goes_on_where_nothing_can_be_shown(stderr, monkeypatch):
    if isinstance(stderr, io.StringIO) and not isinstance(stderr, Broken):
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress_display, "SECONDS_BETWEEN_LINES", 0.0)
    sim = simulator()
    sim.run(3)
    assert sim.step == 3


def test_progress_in_a_notebook_is_a_bar_of_html(monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content)

    class Module:
        class display:  # noqa: N801
            @staticmethod
            def display(content, display_id):
                shown.append(content)
                return Handle()

            HTML = str

        @staticmethod
        def get_ipython():
            return type("Shell", (), {"kernel": None})()

    monkeypatch.setitem(sys.modules, "IPython", Module)
    monkeypatch.setitem(sys.modules, "IPython.display", Module.display)
    simulator().run(3)
    assert '<progress value="3" max="3">' in shown[-1]
    assert "accuracy" in shown[-1]
    assert capsys.readouterr().err == ""


# Schedules


def schedule_of(make, steps, eval_every, **options):
    """The learning rates of the steps, with each evaluation's row."""
    sim, rates = simulator(**options), []

    class Rates(gf.callbacks.Callback):
        def on_step(self, simulator):
            rates.append(simulator.lr)

    run(sim, steps, eval_every=eval_every, schedule=make, callbacks=Rates())
    return rates, sim


def test_plateau_is_stepped_with_the_metric_at_evaluations():
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3)

    rates, sim = schedule_of(plateau, 13, 3)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    expected, by_hand = [], plateau(plain)
    for step in range(13):
        expected.append(plain.param_groups[0]["lr"])
        if step % 3 == 2:
            by_hand.step(sim.history[step // 3]["test_loss"])
    assert rates == expected
    assert len(set(rates)) > 1


def test_a_plateau_goes_on_in_pieces_as_without(tmp_path):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)

    options = {"eval_every": 3, "schedule": plateau, "schedule_metric": "test_loss"}
    whole, pieces = simulator(), simulator()
    run(whole, 18, **options)
    run(pieces, 7, checkpoint=tmp_path / "c.pt", **options)  # evaluates at its end, which the scheduler does not see
    pieces = simulator()
    pieces.load_checkpoint(tmp_path / "c.pt")
    run(pieces, 18, **options)
    assert whole.lr < 0.1
    assert torch.equal(pieces.stacked.values, whole.stacked.values)


@pytest.mark.parametrize("make", [None, lambda optimizer: CosineAnnealingLR(optimizer, 40)])
def test_a_run_in_pieces_is_the_run_in_one(make):
    whole, pieces = simulator(), simulator()
    run(whole, 12, schedule=make)
    for steps in (4, 9, 12):
        run(pieces, steps, schedule=make)
    assert torch.equal(pieces.stacked.values, whole.stacked.values)


def test_a_learning_rate_set_between_runs_stays():
    sim = simulator()
    run(sim, 2)
    sim.optimizer.param_groups[0]["lr"] = 0.025
    assert run(sim, 4)[-1]["lr"] == 0.025


def test_a_scheduler_of_another_class_starts_anew():
    sim = simulator()
    run(sim, 4, schedule=lambda optimizer: CosineAnnealingLR(optimizer, 8))
    lr = sim.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.05)
    run(sim, 6, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    assert sim.lr == 0.5 * lr


def test_a_scheduler_that_fails_later_leaves_simulator_and_optimizer_at_the_same_step():
    class Fails(torch.optim.lr_scheduler.StepLR):
        def get_lr(self):
            if self.last_epoch == 3:
                raise ZeroDivisionError
            return super().get_lr()

    sim = simulator()
    with pytest.raises(ZeroDivisionError):
        run(sim, 9, schedule=lambda optimizer: Fails(optimizer, 2))
    assert sim.step == sim.optimizer.num_steps == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
            ValueError,
            "ReduceLROnPlateau is stepped at evaluations, .* give eval_every=",
        ),
        ({"schedule": lambda optimizer: None}, TypeError, "must return a torch.optim.lr_scheduler.LRScheduler, got No"),
        ({"schedule": "cosine"}, TypeError, "schedule must be a function of the optimizer, got str"),
        (
            {"schedule": lambda optimizer: CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 4)},
            ValueError,
            "a scheduler of another optimizer",
        ),
        (
            {"schedule": lambda o: OneCycleLR(o, 0.3, total_steps=2, cycle_momentum=False)},
            ValueError,
            "OneCycleLR ends after 2 steps, the run after 3",
        ),
        (
            {"schedule": lambda optimizer: CosineAnnealingLR(optimizer, 4), "milestones": (2,)},
            ValueError,
            "milestones= and schedule= both",
        ),
        ({"schedule_metric": "loss"}, ValueError, "schedule_metric='loss' is no entry of the history"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_before_the_first_step(options, error, message, tmp_path):
    sim = simulator()
    before = contents(sim, tmp_path)
    with pytest.raises(error, match=message):
        run(sim, 3, **options)
    assert_same(contents(sim, tmp_path), before)


# Targets


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for target, error in (
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / "file/c.pt", NotADirectoryError),
        (tmp_path / "no/such/folder/c.pt", FileNotFoundError),
        ("/dev/null", OSError),
        ("/proc/c.pt", OSError),
    ):
        sim = simulator()
        with pytest.raises(error, match=r"file|folder|written"):
            run(sim, 3, checkpoint=target)
        assert sim.step == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_a_checkpoint_follows_symbolic_links(tmp_path):
    (tmp_path / "big").mkdir()
    link = tmp_path / "c.pt"
    link.symlink_to("big/real.pt")
    run(simulator(), 3, checkpoint=link)
    assert link.is_symlink()
    assert torch.load(tmp_path / "big/real.pt", weights_only=True)["step"] == 3
    assert [each.name for each in (tmp_path / "big").iterdir()] == ["real.pt"]
