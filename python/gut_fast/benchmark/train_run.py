"""Times of whole training steps: gradient and optimizer step, each as it is in a training loop, and where they go."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gut_fast.benchmark import timing
from gut_fast.benchmark.device import CPU, Device
from gut_fast.benchmark.run import versions
from gut_fast.benchmark.timing import Disturbance, Quantiles
from gut_fast.benchmark.training import Task, Trainer, compare, enter

__all__ = [
    "GOALS",
    "GPU_GOALS",
    "GPU_GOAL_OF_ONE_MODEL",
    "MeasuredTraining",
    "TrainingResult",
    "as_json",
    "from_json",
    "load",
    "merge",
    "run",
    "save",
]

TURN_SECONDS = 0.1
"""How long a trainer trains before the next one has its turn."""

MAX_STEPS_A_TURN = 20
MIN_ROUNDS, MAX_ROUNDS = 3, 200

GOALS = {("lenet5", 16, 32, 2, "cpu"): 1.1, ("resnet20", 16, 32, 2, "cpu"): 0.45}
"""Time of the workers' gradient over that of one model, by model, agents, batch size, threads and device."""

GPU_GOALS = {"lenet5": 10.0, "mlp": 10.0, "resnet20": 4.0}
"""Samples per second of the best engine over those of the plain loop, by model, for 16 and 64 agents on a GPU."""

GPU_GOAL_OF_ONE_MODEL = 2.0
"""The most that its training step may take, in those of one model on all samples."""


@dataclass(frozen=True)
class MeasuredTraining:
    """One trainer's times.

    Attributes:
        kind: of trainer.
        gradient: seconds of a gradient, after a step of its own.
        step: seconds of the optimizer's step, after a gradient of its own.
        both: of the two together.
        error: of the gradient beside the plain loop's; None of the plain loop itself.
    """

    kind: str
    gradient: Quantiles
    step: Quantiles
    both: Quantiles
    error: float | None


@dataclass(frozen=True)
class TrainingResult:
    """All trainers' times in one task on so many threads, and what they were measured on."""

    model: str
    agents: int
    batch_size: int
    threads: int
    trainers: dict[str, MeasuredTraining]
    disturbance: Disturbance
    machine: str
    versions: dict[str, str]
    date: str
    device: str = "cpu"

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """What tells it from other results."""
        return self.model, self.agents, self.batch_size, self.threads if self.device == "cpu" else 0, self.device

    @property
    def place(self) -> str:
        """The processor's threads, or the GPU."""
        return "GPU" if self.device != "cpu" else f"{self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def best(self) -> str:
        """The simulator's engine that trains most samples a second."""
        simulators = [name for name, entry in self.trainers.items() if entry.kind == "simulator"]
        return max(simulators, key=self.rate)

    def times_rate(self, name: str, other: str) -> float:
        """How many times as many samples a second one trains as the other."""
        return self.rate(name) / self.rate(other)

    def rate(self, name: str) -> float:
        """Samples of all agents per second of training."""
        return self.agents * self.batch_size / self.trainers[name].both.p50

    def to_one_model(self, name: str) -> float:
        """Median time of a gradient over that of one model on the same samples."""
        return self.trainers[name].gradient.p50 / self.trainers["one model"].gradient.p50

    def after_step(self, name: str) -> float | None:
        """Median time of a gradient over that of the same without steps in between, where that was measured."""
        control = self.trainers.get(f"{name.partition(',')[0]}, alone")
        if control is None or control is self.trainers[name]:
            return None
        return self.trainers[name].gradient.p50 / control.gradient.p50


def run(
    task: Task, engines: Sequence[str], threads: int, seconds: float = 20.0, *, controls: bool = True
) -> TrainingResult:
    """Compares all trainers with the plain loop, then times them in turns, for about so many seconds.

    They are compared in full float32, and timed, made anew, with what the device's libraries usually do.

    Raises:
        WrongResultError: two trainers' gradients or steps are not equal; nothing has been timed.
        ValueError: an unknown engine.
    """
    if any("compiled" in engine for engine in engines):
        torch.compiler.reset()  # its limit of compiled variants is per process; beyond, it goes back to eager
    with timing.threads(threads):
        with task.device.exact_float32():
            errors = compare(enter(task, engines, controls=controls))
        trainers = enter(task, engines, controls=controls)
        for trainer in trainers.values():
            trainer.gradient()  # what is to be captured or compiled is so now
        with timing.watch() as disturbance:
            times = _take_turns(trainers, seconds, task.device)
    measured = {}
    for name, each in times.items():
        gradient, step, both = (Quantiles.of(seconds) for seconds in zip(*each, strict=True))
        measured[name] = MeasuredTraining(trainers[name].kind, gradient, step, both, errors.get(name))
    disturbance.spread = min(entry.both.spread for entry in measured.values())
    return TrainingResult(
        task.model,
        task.agents,
        task.batch_size,
        threads,
        measured,
        disturbance,
        task.device.machine_line(),
        versions(task.device),
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        task.device.name,
    )


Times = list[tuple[float, float, float]]
"""Seconds of gradient, step and both together, three for each training step."""


def _take_turns(trainers: Mapping[str, Trainer], seconds: float, device: Device = CPU) -> dict[str, Times]:
    """In every round each trainer has one turn, in an order drawn anew."""
    duration = {name: _train(trainer, 1, device)[0][2] for name, trainer in trainers.items()}
    steps = {name: min(max(1, round(TURN_SECONDS / each)), MAX_STEPS_A_TURN) for name, each in duration.items()}
    rounds = round(seconds / sum(duration[name] * steps[name] for name in trainers))
    order, shuffle = list(trainers), random.Random(0).shuffle
    times: dict[str, Times] = {name: [] for name in trainers}
    for _ in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        shuffle(order)
        for name in order:
            times[name] += _train(trainers[name], steps[name], device)
    return times


def _train(trainer: Trainer, steps: int, device: Device) -> Times:
    """Some training steps, after an optimizer step that is not timed: it precedes the first gradient, too.

    To tell gradient from step on a GPU, it has to be waited for between them. So there each is timed that way once, and
    both together in a loop that waits at its end only.
    """
    trainer.step()
    if not device.is_gpu:
        return [_train_once(trainer, device) for _ in range(steps)]
    gradient, step, _ = _train_once(trainer, device)

    def both() -> None:
        trainer.gradient()
        trainer.step()

    return [(gradient, step, device.wall.time(both, steps))]


def _train_once(trainer: Trainer, device: Device) -> tuple[float, float, float]:
    device.synchronize()
    start = time.perf_counter()
    trainer.gradient()
    device.synchronize()
    middle = time.perf_counter()
    trainer.step()
    device.synchronize()
    end = time.perf_counter()
    return middle - start, end - middle, end - start


def save(results: Sequence[TrainingResult], path: Path) -> None:
    """Writes results as JSON, which `load` reads; rates and ratios stand there too, for whoever reads it."""
    content = {"results": as_json(results)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def as_json(results: Sequence[TrainingResult]) -> list[dict[str, Any]]:
    """The entries of such a file, which `from_json` reads."""
    return [{**dataclasses.asdict(result), "derived": _derived(result)} for result in results]


def _derived(result: TrainingResult) -> dict[str, Any]:
    return {
        name: {
            "samples_per_second": result.rate(name),
            "gradient_to_one_model": result.to_one_model(name),
            "gradient_after_step_to_without": result.after_step(name),
        }
        for name in result.trainers
    }


def load(path: Path) -> list[TrainingResult]:
    """The results of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of gut-fast bench train ({error}); name another folder") from error


def from_json(entries: Iterable[dict[str, Any]]) -> list[TrainingResult]:
    """The results of such entries. Raises KeyError, TypeError or ValueError if they are something else."""
    return [_result(entry) for entry in entries]


def _result(entry: dict[str, Any]) -> TrainingResult:
    fields = {name: value for name, value in entry.items() if name != "derived"}
    fields["trainers"] = {
        name: MeasuredTraining(
            one["kind"],
            Quantiles(**one["gradient"]),
            Quantiles(**one["step"]),
            Quantiles(**one["both"]),
            one["error"],
        )
        for name, one in fields["trainers"].items()
    }
    fields["disturbance"] = Disturbance(**fields["disturbance"])
    return TrainingResult(**fields)


def merge(old: Iterable[TrainingResult], new: Iterable[TrainingResult]) -> list[TrainingResult]:
    """The old results with the new ones of the same task and threads in their places, and others after them."""
    return list({result.key: result for result in (*old, *new)}.values())
