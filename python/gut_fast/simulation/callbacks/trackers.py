"""Trackers: callbacks that write the numbers of each evaluation somewhere, under the names of `Simulator.history`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gut_fast.requirements import pip_install
from gut_fast.simulation.callbacks.events import Callback
from gut_fast.simulation.files import check_folder, check_target, write_csv
from gut_fast.simulation.timetable import Timetable

if TYPE_CHECKING:
    from gut_fast.simulation.simulator import Simulator

__all__ = ["CSV", "MLflow", "TensorBoard", "Tracker", "WandB"]


class Tracker(Callback):
    """The base of trackers: with a process_group only the first process writes.

    A tracker of one's own has the methods `start`, `log` and `end`.
    """

    def start(self, simulator: Simulator) -> None:
        """Opens what is written to."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Writes the numbers of an evaluation after so many steps."""

    def end(self, error: BaseException | None) -> None:
        """Closes what is written to; `error` is what ended the run, None if all is well."""

    def on_start(self, simulator: Simulator, timetable: Timetable) -> None:
        """Calls `start` in the first process."""
        if simulator.is_first:
            self.start(simulator)

    def on_evaluation(self, simulator: Simulator, row: dict[str, Any]) -> None:
        """Calls `log` in the first process."""
        if simulator.is_first:
            self.log({name: float(value) for name, value in row.items() if name != "step"}, row["step"])

    def on_end(self, simulator: Simulator, error: BaseException | None) -> None:
        """Calls `end` in the first process."""
        if simulator.is_first:
            self.end(error)


class CSV(Tracker):
    """A tracker that keeps the whole history in a CSV file, which is written anew at each evaluation.

    Args:
        path: the file; its folder must be there.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_target(self.path)

    def start(self, simulator: Simulator) -> None:
        """Keeps the simulator, whose history is the file's content."""
        self._simulator = simulator

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Writes the history."""
        write_csv(self._simulator.history, self.path)


class TensorBoard(Tracker):
    """A tracker that writes scalars for TensorBoard: ``tensorboard --logdir FOLDER`` shows them.

    A run that goes on from a checkpoint writes to the same folder; what was written after the checkpoint is hidden.

    Args:
        folder: where the event files are; it is made if it is not there.
        **options: arguments of `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        _required("tensorboard", type(self).__name__)
        self.folder, self._options = Path(folder), options
        check_folder(self.folder)

    def start(self, simulator: Simulator) -> None:
        """Opens an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), **{"purge_step": simulator.step + 1, **self._options})

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Writes a scalar for each number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def end(self, error: BaseException | None) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB(Tracker):
    """A tracker for Weights & Biases.

    Args:
        **options: arguments of `wandb.init`, for example ``project="gossip"``, ``mode="offline"``,
            ``config={"lr": 0.1}``.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._wandb, self._options = _required("wandb", type(self).__name__), options

    def start(self, simulator: Simulator) -> None:
        """Opens a run."""
        self._run = self._wandb.init(**self._options)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Writes the numbers at the step."""
        self._run.log(numbers, step=step)

    def end(self, error: BaseException | None) -> None:
        """Closes the run, as failed after an error."""
        self._run.finish(exit_code=0 if error is None else 1)


class MLflow(Tracker):
    """A tracker for MLflow: a run of its own, in the experiment and store that `mlflow` has been told to use.

    Args:
        **options: arguments of `mlflow.start_run`, for example ``run_name="gut"``.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._mlflow, self._options = _required("mlflow", type(self).__name__), options

    def start(self, simulator: Simulator) -> None:
        """Opens a run."""
        self._run_id = self._mlflow.start_run(**self._options).info.run_id

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Writes the numbers at the step."""
        self._mlflow.log_metrics(numbers, step=step, run_id=self._run_id)

    def end(self, error: BaseException | None) -> None:
        """Closes the run, as failed after an error and as killed after Ctrl-C."""
        failed = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._mlflow.end_run("FINISHED" if error is None else failed)


def _required(module: str, callback: str) -> Any:
    """The module. Raises ImportError, which tells how to install it, if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"gut_fast.callbacks.{callback} needs {module}, which is not here ({error}); {pip_install(module)}"
        ) from error
