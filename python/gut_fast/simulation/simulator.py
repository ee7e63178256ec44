"""The simulator: it trains all agents, in one process or shared out over several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gut_fast import randomness
from gut_fast.agents import StackedModule, stack
from gut_fast.agents.precision import check_autocast
from gut_fast.data import Augmentation, Dataset, ImageFiles
from gut_fast.distributed import Group
from gut_fast.simulation.batches import Batches, like_model
from gut_fast.simulation.callbacks import Callback, Progress, ShowProgress, around, checked
from gut_fast.simulation.engines import AutoEngine, Loss, make_engine, undo_on_error
from gut_fast.simulation.files import (
    check_configuration,
    check_target,
    digest,
    mixing_digest,
    read_checkpoint,
    write_checkpoint,
)
from gut_fast.simulation.interrupt import Interrupt, deferred_interrupt
from gut_fast.simulation.metrics import BytesSent, evaluate, read
from gut_fast.simulation.schedules import MakeScheduler, Schedule, make_schedule, options_of
from gut_fast.simulation.sharing import Everyone, agents_here, check_ranks
from gut_fast.simulation.timetable import Timetable
from gut_fast.topology import Topology

__all__ = ["Simulator"]

ENTRIES = (
    *("step", "lr", "train_loss", "diverged_agents", "test_loss", "test_accuracy", "mean_agent_accuracy"),
    *(f"{which}_agent_accuracy" for which in ("worst", "lower_quartile", "median", "upper_quartile", "best")),
    *("consensus_error", "mean_bytes_sent", "max_bytes_sent"),
)
"""The names of the entries of the history."""


class Simulator:
    """A run of N agents, each with its own samples, that are trained together.

    Args:
        module: the model, from which all agents start, or a `StackedModule` of all N agents.
        topology: which agents mix with which, N agents.
        optimizer: makes the optimizer of the stacked parameters, for example
            ``lambda params: gf.GUT(params, lr=0.1, mu=0.9, topology=topology)``.
        data: training samples, divided by `parts`, and test samples; moved to the model's device and dtype.
        parts: one index tensor per agent into the training samples, as `gut_fast.data.partition` makes them.
        batch_size: samples per agent and step.
        loss: mean loss of a batch, (outputs [B, ...], labels [B]) -> scalar.
        engine: how gradients are computed. ``"loop"`` is agent by agent, ``"vmap"`` all agents at once; ``"workers"``
            is the loop in as many threads as torch has, for a CPU. On a GPU ``"graphed-loop"`` and ``"graphed-vmap"``
            launch all kernels at once, by a CUDA graph, for networks that keep Python busier than the GPU. The prefix
            ``compiled-`` of ``loop`` and ``vmap`` is `torch.compile`, which takes a minute or more at the first step.
            Both prefixes go together (``"graphed-compiled-vmap"``). ``"auto"`` takes all engines that need no compiler
            in turns during the first steps, then keeps the fastest. Its choice depends on the time measured, and the
            engines round differently, so a repeated run is the same bit for bit only with a named engine; a checkpoint
            keeps the choice.
        seed: seed of the order of the samples, their augmentation and random operations such as dropout. `run` uses
            torch's default generators, whose state before has no influence, and puts them back afterwards.
        augment: random changes to each training batch, such as `gut_fast.data.RandomCropFlip`.
        autocast: ``torch.bfloat16`` computes forward passes under `torch.autocast`, in training and evaluation; the
            parameters and the loss stay in float32. None computes in the parameters' dtype. (On a CPU, torch leaves
            convolutions in float32 where ``vmap`` has turned them into grouped ones.)
        channels_last: images, and so the activations of convolutional networks, lie in channels-last memory, which is
            faster on GPUs with autocast, agent by agent; with ``vmap`` convolutions return to the usual layout.
            Parameters keep their layout, and convolutions convert them. Images of one channel have both layouts at
            once, so nothing changes.
        process_group: the ranks that share the agents: this process holds k = N / size of them, numbers rank · k and
            up, and `optimizer` must give the same ``process_group=`` and ``agents_per_rank=k`` to its optimizer. Make
            the simulator with the same arguments on all ranks. They get the history of a single process, bit for bit on
            a CPU with engine ``"loop"`` and one thread, except that dropout and the like draw other numbers.

    Attributes:
        stacked: the models of the agents in this process.
        optimizer: the optimizer that `optimizer` has made.
        step: number of steps done.
        history: one dict per evaluation; `evaluate` names its entries.

    Raises:
        TypeError, ValueError: an argument is bad, or topology, parts and optimizer are not for the same agents or
            ranks.
        MismatchError, PeerError: the optimizer raises them.
    """

    def __init__(
        self,
        module: nn.Module | StackedModule,
        topology: Topology,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        data: Dataset,
        parts: Sequence[Tensor],
        batch_size: int,
        loss: Loss = cross_entropy,
        engine: str = "auto",
        seed: int = 0,
        augment: Augmentation | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        process_group: dist.ProcessGroup | Group | None = None,
    ) -> None:
        num_agents = topology.num_agents
        num_models = module.num_agents if isinstance(module, StackedModule) else num_agents
        if num_models != num_agents or len(parts) != num_agents:
            raise ValueError(
                f"{topology} has {num_agents} agents, the model {num_models} and the data {len(parts)} parts; "
                "they must be equal"
            )
        agents = agents_here(num_agents, process_group)
        stacked = module.part(agents) if isinstance(module, StackedModule) else stack(module, len(agents))
        check_autocast(autocast, stacked.values.dtype)
        self.stacked = stacked
        self.topology = topology
        self.data = like_model(data, stacked, channels_last)
        self.batches = Batches(self.data.train_inputs, self.data.train_labels, parts, batch_size, seed, augment, agents)
        self.optimizer = _checked_optimizer(optimizer(stacked.parameters()), stacked, topology)
        self._everyone = Everyone(agents, num_agents, stacked.device, self.optimizer)
        check_ranks(self._everyone.group, process_group)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._loss = loss
        self._autocast, self._channels_last = autocast, channels_last
        self._engine = make_engine(engine, stacked, loss, autocast)
        self._bytes_sent = BytesSent(self.optimizer, num_agents, len(agents))
        self._initial_options = options_of(self.optimizer)
        self._last_lr = float(self._initial_options[0]["lr"])
        self._loss_sum = torch.zeros(len(agents), dtype=torch.float64, device=stacked.device)
        self._loss_steps = 0
        own_seed = randomness.derive_seed("random", seed, *([agents.start] if agents.start else []))
        self._random_state = randomness.initial_state(own_seed, stacked.device)
        self._schedule = Schedule()
        self._scheduler_state: dict[str, Any] | None = None
        self._is_between_steps, self._is_stopping = True, False

    @property
    def engine(self) -> str:
        """The name of the engine in use; ``"auto"`` until it has chosen."""
        return self._engine.name

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of the first group."""
        return self._last_lr

    @property
    def train_loss(self) -> float:
        """The mean loss of the agents in this process in the steps since the last evaluation; NaN before a step."""
        return self._mean_loss(float(self._loss_sum.mean())) if self._loss_steps else math.nan

    @property
    def entries(self) -> list[str]:
        """The names of the entries of the history, which `evaluate` explains."""
        return list(ENTRIES)

    @property
    def is_first(self) -> bool:
        """True in the process that reports for all: the only one, or with a process_group the one with agent 0."""
        return self._everyone.is_first

    @property
    def bytes_sent(self) -> Tensor:
        """The bytes that each agent has sent so far, int64 [N]."""
        return self._bytes_sent.total.clone()

    def run(
        self,
        steps: int,
        *,
        milestones: Sequence[float] = (),
        decay: float = 0.1,
        schedule: MakeScheduler | None = None,
        schedule_metric: str = "test_loss",
        eval_every: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        on_checkpoint: Callable[[], object] | None = None,
        callbacks: Callback | Sequence[Callback] = (),
        progress: Progress = True,
    ) -> list[dict[str, Any]]:
        """Trains until `steps` steps are done in all, and returns the history.

        The same call continues an interrupted run, in a new process after `load_checkpoint`, and equals the
        uninterrupted run bit for bit; so do ``run(100)`` and then ``run(200)``, if milestones are numbers of steps. On
        Ctrl-C the step is finished, the checkpoint written and KeyboardInterrupt raised; a second Ctrl-C raises it at
        once. A loss of NaN does not stop the run; the history shows it.

        With a process_group all ranks call `run` with the same arguments. Rank 0 shows the progress; Ctrl-C in any rank
        stops all ranks at the next tenth step.

        Args:
            steps: total number of steps, with the steps of earlier calls.
            milestones: steps after which the learning rate is multiplied by `decay`; fractions of `steps` if below 1.
                Without milestones and schedule the learning rate stays as it is.
            decay: factor on the learning rate at each milestone.
            schedule: makes a torch scheduler of the optimizer, for example
                ``lambda optimizer: CosineAnnealingLR(optimizer, 100)``. It is stepped after every step; one whose
                `step` takes a metric, such as `ReduceLROnPlateau`, at every `eval_every`-th step. A later call with a
                scheduler of the same class goes on where it was.
            schedule_metric: the entry of the history that such a scheduler is given.
            eval_every: steps between evaluations; the run always evaluates after the last step.
            checkpoint: file to write at the end, on Ctrl-C and every `checkpoint_every` steps; with a process_group a
                folder, for `gut_fast.distributed.Checkpoints`.
            checkpoint_every: steps between checkpoints.
            on_checkpoint: called after each checkpoint that Ctrl-C has not caused.
            callbacks: objects of `gut_fast.callbacks`, which are told of the events of the run.
            progress: whether to show the numbers of the run, in a bar on a terminal or in a notebook and in lines on
                stderr elsewhere, or a function to call with the step now and then.

        Raises:
            TypeError, ValueError: an argument is bad; nothing has been done.
            OSError: `checkpoint` cannot be written; nothing has been done.
        """
        file = None if checkpoint is None else Path(checkpoint)
        timetable = Timetable(steps, tuple(milestones), decay, eval_every, file, checkpoint_every)
        shown = ShowProgress(progress if self.is_first else False)
        told = [*checked(callbacks), *([] if on_checkpoint is None else [_Calls(on_checkpoint)]), shown]
        if file is not None:
            check_target(file, is_folder=self._everyone.group is not None)
        self._start_schedule(timetable, schedule, schedule_metric)
        with (
            randomness.own_random_state(self.stacked.device),
            deferred_interrupt() as interrupt,
            around(told, self, timetable),
        ):
            randomness.set_state(self._random_state, self.stacked.device)
            try:
                self._run(timetable, interrupt, told)
            except KeyboardInterrupt:
                if file is not None and self._is_between_steps:
                    self._save(file)
                raise
            finally:
                self._suspend()
        return self.history

    def stop(self) -> None:
        """Ends the run as if the last step had been done: with an evaluation and a checkpoint.

        It is for callbacks and may be called at any event; in between it does nothing. With a process_group all ranks
        must call it after the same step.
        """
        self._is_stopping = True

    def evaluate(self) -> dict[str, Any]:
        """A row of the history for the current state of the agents.

        Its entries are step; lr (of the last step, first group); train_loss (mean over agents and the steps since the
        last row); diverged_agents (number of agents with a loss of NaN or infinity in these steps); test_loss and
        test_accuracy (of the averaged model); mean_agent_accuracy, and the agents' quartiles from worst_agent_accuracy
        over lower_quartile_, median_ and upper_quartile_ to best_agent_accuracy; consensus_error; mean_bytes_sent and
        max_bytes_sent (per agent, since the start). Accuracies are fractions. With a process_group all ranks call
        `evaluate`, and all get the numbers of all agents.
        """
        vectorized = self.engine.endswith("vmap")
        loss_sums = self._everyone.rows(self._loss_sum)
        metrics = {
            "loss_sum": loss_sums.mean(),
            "diverged_agents": (~loss_sums.isfinite()).sum(dtype=torch.float64),
            **evaluate(
                self.stacked, self.data, self._loss, self._autocast, vectorized=vectorized, everyone=self._everyone
            ),
        }
        numbers, bytes_sent = read(metrics), self._bytes_sent.total.tolist()
        loss_sum, diverged_agents = numbers.pop("loss_sum"), numbers.pop("diverged_agents")
        return {
            "step": self.step,
            "lr": self._last_lr,
            "train_loss": self._mean_loss(loss_sum),
            "diverged_agents": int(diverged_agents),
            **numbers,
            "mean_bytes_sent": sum(bytes_sent) / len(bytes_sent),
            "max_bytes_sent": max(bytes_sent),
        }

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that `load_checkpoint` needs to continue the run; an existing file is replaced atomically.

        With a process_group all ranks call `save_checkpoint`, and `path` is a folder.
        """
        content = {
            "configuration": self._configuration,
            "step": self.step,
            "history": self.history,
            "model": self.stacked.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler_state,
            "engine": self._engine.state_dict() if isinstance(self._engine, AutoEngine) else None,
            "random_state": self._random_state,
            "bytes_sent": self._bytes_sent.total,
            "last_lr": self._last_lr,
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
        }
        write_checkpoint(content, path, self._everyone.group)

    def load_checkpoint(self, path: str | Path) -> None:
        """Continues from the step at which `path` was written; this simulator must have been made with equal arguments.

        With a process_group all ranks call `load_checkpoint`, `path` is a folder, and they continue from the newest
        step that all ranks have.

        Raises:
            OSError: the file cannot be read.
            RuntimeError: the file is truncated, corrupt or not a checkpoint.
            ValueError: the checkpoint has another configuration; the message says what differs. Nothing has changed.
        """
        content = read_checkpoint(path, self._everyone.group)
        check_configuration(content["configuration"], self._configuration, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.stacked.load_state_dict(content["model"])
        if isinstance(self._engine, AutoEngine) and content["engine"] is not None:
            self._engine.load_state_dict(content["engine"])
        self.step, self.history = content["step"], content["history"]
        self._schedule, self._scheduler_state = Schedule(), content["scheduler"]
        self._random_state = content["random_state"]
        self._bytes_sent.total.copy_(content["bytes_sent"])
        self._last_lr, self._loss_steps = content["last_lr"], content["loss_steps"]
        self._loss_sum.copy_(content["loss_sum"])

    def _run(self, timetable: Timetable, interrupt: Interrupt, callbacks: Sequence[Callback]) -> None:
        self._is_stopping = False
        while True:
            already_evaluated = bool(self.history) and self.history[-1]["step"] == self.step
            if (timetable.evaluates_after(self.step) or self._is_stopping) and not already_evaluated:
                self._add_to_history(self.evaluate(), timetable)
                for callback in callbacks:
                    callback.on_evaluation(self, self.history[-1])
            ends = self.step >= timetable.steps or self._is_stopping
            if self._everyone.wants_to_stop(interrupt.requested, self.step, ends):
                raise KeyboardInterrupt
            if timetable.checkpoint is not None and (ends or timetable.saves_after(self.step)):
                self._save(timetable.checkpoint)
                for callback in callbacks:
                    callback.on_checkpoint(self, timetable.checkpoint)
            if ends:
                return
            self._train_step()
            for callback in callbacks:
                callback.on_step(self)

    def _add_to_history(self, row: dict[str, Any], timetable: Timetable) -> None:
        """Adds the row and starts new sums; an interrupt in between counts no loss twice and saves no checkpoint."""
        self._is_between_steps = False
        self._loss_sum.zero_()
        self._loss_steps = 0
        self.history.append(row)
        if timetable.evaluates_regularly_after(self.step):
            self._schedule.after_evaluation(row)
        self._is_between_steps = True

    def _train_step(self) -> None:
        """Does one step of all agents; if the gradient fails or is interrupted, nothing has changed."""
        inputs, targets = self.batches(self.step)
        with undo_on_error(self.stacked):
            losses = self._engine(inputs, targets)
        self._is_between_steps = False
        self._schedule.before_step(self.step)
        self._last_lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self._bytes_sent.add_step(self.step)
        self._loss_sum += losses
        self._loss_steps += 1
        self.step += 1
        self._schedule.after_step()
        self._is_between_steps = True

    def _start_schedule(self, timetable: Timetable, schedule: MakeScheduler | None, metric: str) -> None:
        """Makes the schedule of the run, in its state at the end of the last run."""
        rates = [options["lr"] for options in self._initial_options]
        if metric not in self.entries:
            raise ValueError(f"schedule_metric={metric!r} is no entry of the history: {', '.join(self.entries)}")
        self._schedule = make_schedule(timetable, schedule, metric, self.optimizer, rates, self._scheduler_state)

    def _suspend(self) -> None:
        """Takes in the states of the generators and the scheduler, which live outside the simulator during a run."""
        self._random_state = randomness.get_state(self.stacked.device)
        self._scheduler_state = self._schedule.state_dict()

    def _save(self, path: Path) -> None:
        self._suspend()
        self.save_checkpoint(path)

    def _mean_loss(self, loss_sum: float) -> float:
        return loss_sum / self._loss_steps if self._loss_steps else math.nan

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        """The plain values that a checkpoint must have in common with this simulator."""
        rule, state_dtype = (getattr(self.optimizer, name, None) for name in ("rule", "state_dtype"))
        inputs = self.data.train_inputs
        samples = inputs.fingerprint() if isinstance(inputs, ImageFiles) else inputs
        return {
            "number of agents": self.topology.num_agents,
            "agents here": None if self._everyone.group is None else str(self.batches.agents),
            "topology": self.topology.name,
            "digest of the mixing weights": mixing_digest(self.topology),
            "optimizer": type(self.optimizer).__name__,
            "rule": None if rule is None else rule.name,
            "dtype of the state": None if state_dtype in (None, self.stacked.values.dtype) else str(state_dtype),
            **{
                f"{name} of group {index}": value
                for index, group in enumerate(self._initial_options)
                for name, value in group.items()
            },
            "data set": self.data.name,
            "digest of the training samples": digest((samples, self.data.train_labels)),
            "division of the samples": digest(self.batches.parts),
            "batch size": self.batches.batch_size,
            "seed": self.batches.seed,
            "augmentation": None if self.batches.augment is None else repr(self.batches.augment),
            "autocast": None if self._autocast is None else str(self._autocast),
            "channels last": self._channels_last or None,  # None, as in older checkpoints, which had no choice
            **{
                f"shape of {name}": (*tensor.shape, str(tensor.dtype))
                for name, tensor in self.stacked.state_dict().items()
            },
        }


class _Calls(Callback):
    """A callback that calls a function after each checkpoint."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def on_checkpoint(self, simulator: Simulator, path: Path) -> None:
        """Calls the function."""
        self._function()


def _checked_optimizer(optimizer: Any, stacked: StackedModule, topology: Topology) -> Optimizer:
    """Returns `optimizer`; raises TypeError or ValueError unless it trains these models over this topology."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in stacked.parameters()}
    if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer has other parameters than the stacked ones that it was given")
    mixes_with = getattr(optimizer, "topology", topology)
    if mixes_with != topology:
        raise ValueError(f"the optimizer mixes over {mixes_with}, but the simulator's topology is {topology}")
    return optimizer
