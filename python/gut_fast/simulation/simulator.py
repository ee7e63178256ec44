"""The simulator: it trains all agents, in one process or shared out over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gut_fast import randomness
from gut_fast.agents import StackedModule, stack
from gut_fast.agents.precision import check_autocast
from gut_fast.arguments import as_integer, as_number
from gut_fast.data import Augmentation, Dataset
from gut_fast.distributed import Group, telling_the_others
from gut_fast.optim.gossip import clip_grad_norm_per_agent_
from gut_fast.simulation.batches import Batches
from gut_fast.simulation.callbacks import AfterCheckpoint, Callback, Progress, ShowProgress, around, checked
from gut_fast.simulation.configuration import (
    check_labels,
    configuration_of,
    make_objective,
    make_optimizer,
    settings_of,
)
from gut_fast.simulation.engines import AutoEngine, make_engine, undo_on_error
from gut_fast.simulation.files import check_configuration, check_target, read_checkpoint, write_checkpoint
from gut_fast.simulation.interrupt import Interrupt, deferred_interrupt
from gut_fast.simulation.metrics import Tally, evaluate, metric_entries, read
from gut_fast.simulation.objective import Loss, Metric, ModelLoss
from gut_fast.simulation.samples import given_parts, joined, training_and_test
from gut_fast.simulation.schedules import MakeScheduler, Schedule, make_schedule
from gut_fast.simulation.sharing import Everyone, agents_here, check_ranks
from gut_fast.simulation.structure import as_file_error, check_structure
from gut_fast.simulation.timetable import Timetable
from gut_fast.topology import Topology

__all__ = ["Simulator"]

ENTRIES_BEFORE = ("step", "lr", "train_loss", "diverged_agents")
ENTRIES_AFTER = ("consensus_error", "mean_bytes_sent", "max_bytes_sent")
"""The names of the entries of the history before and after those of the test samples."""


class Simulator:
    """A run of N agents, each with its own samples, that are trained together.

    Args:
        module: the model, from which all agents start, or a `StackedModule` of all N agents.
        topology: which agents mix with which, N agents.
        optimizer: makes the optimizer of the stacked parameters, for example
            ``lambda params: gf.GUT(params, lr=0.1, mu=0.9, topology=topology)``.
        data: training samples: a tensor, a tuple such as (inputs, targets), or a dict of tensors; a map-style
            `torch.utils.data.Dataset`, whose samples may be tuples and dicts too; a `gut_fast.data.Dataset`, which has
            test samples as well; or a list with one of these for each agent. Batches are moved to the model's device,
            floating-point numbers to its dtype.
        parts: one index tensor per agent into the training samples, as `gut_fast.data.partition` makes them of labels;
            None if `data` is a list, or a `gut_fast.data.Dataset` with groups, such as `gut_fast.data.text_folders`
            makes, which are then the parts.
        test_data: test samples of any of these kinds; None takes those of a `gut_fast.data.Dataset`, and for other data
            leaves test loss and metrics out of the history.
        batch_size: samples per agent and step.
        loss: mean loss of a batch of pairs (inputs, targets): (outputs [B, ...], targets [B, ...]) -> scalar, where
            outputs are ``model(inputs)``; `torch.nn.functional.cross_entropy` if nothing is given.
        model_loss: in its place, the mean loss of any batch, (model, batch) -> scalar: `model` is one agent's module,
            and may be called in any way; `batch` has the structure of a sample.
        metrics: means over a batch by name, functions of the same arguments as the loss. Each is averaged over the test
            samples, for the averaged model and for every agent. None is ``accuracy`` where targets are class numbers:
            those of `cross_entropy`, of `nll_loss` or of a `gut_fast.data.Dataset`; elsewhere it is nothing.
        max_grad_norm: each agent's gradient is scaled in each step so that its norm is at most this; None does not.
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
        num_workers: number of processes that read samples of a torch data set ahead; 0 reads them in this one.
        process_group: the ranks that share the agents: this process holds k = N / size of them, numbers rank · k and
            up, and `optimizer` must give the same ``process_group=`` and ``agents_per_rank=k`` to its optimizer. Make
            the simulator with the same arguments on all ranks. They get the history of a single process, bit for bit on
            a CPU with engine ``"loop"`` and one thread, except that dropout and the like draw other numbers.

    Attributes:
        stacked: the models of the agents in this process.
        optimizer: the optimizer that `optimizer` has made.
        step: number of steps done.
        history: one dict per evaluation; `evaluate` names its entries.
        agent_metrics: the metrics of each agent by name, float64 [N], in the last evaluation.

    A copy or pickle is a simulator of its own: models and optimizer are linked in it, engines are made anew.

    Raises:
        TypeError, ValueError: an argument is bad, labels are no classes of the model, or topology, parts and optimizer
            are not for the same agents or ranks.
        MismatchError, PeerError: the optimizer raises them.
    """

    def __init__(
        self,
        module: nn.Module | StackedModule,
        topology: Topology,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        data: Any,
        parts: Sequence[Tensor] | None = None,
        test_data: Any = None,
        batch_size: int,
        loss: Loss | None = None,
        model_loss: ModelLoss | None = None,
        metrics: Mapping[str, Metric] | None = None,
        max_grad_norm: float | None = None,
        engine: str = "auto",
        seed: int = 0,
        augment: Augmentation | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        num_workers: int = 0,
        process_group: dist.ProcessGroup | Group | None = None,
    ) -> None:
        with telling_the_others(lambda: process_group):
            num_agents = topology.num_agents
            num_models = module.num_agents if isinstance(module, StackedModule) else num_agents
            parts = given_parts(data, parts)
            num_parts = len(data if parts is None else parts)
            if num_models != num_agents or num_parts != num_agents:
                raise ValueError(
                    f"{topology} has {num_agents} agents, the model {num_models} and the data {num_parts} parts; "
                    "they must be equal"
                )
            if max_grad_norm is not None and not as_number(max_grad_norm, "max_grad_norm") > 0:
                raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
            agents = agents_here(num_agents, process_group)
            stacked = module.part(agents) if isinstance(module, StackedModule) else stack(module, len(agents))
            check_autocast(autocast, stacked.values.dtype)
            self.stacked, self.topology, self.data = stacked, topology, data
            workers = as_integer(num_workers, "num_workers", minimum=0)
            self._samples_of = partial(joined, like=stacked.values[:0], channels_last=channels_last, workers=workers)
            training, test = training_and_test(data, test_data)
            samples, own_parts = self._samples_of(training, "data")
            self._test = None if test is None else self._samples_of(test, "test_data")[0]
            self.batches = Batches(samples, own_parts if parts is None else parts, batch_size, seed, augment, agents)
            self._objective = make_objective(
                loss, model_loss, metrics, autocast, samples, has_classes=isinstance(data, Dataset)
            )
            check_labels(stacked, self._objective, samples, "data")
            check_labels(stacked, self._objective, self._test, "test_data")
        self.optimizer = make_optimizer(optimizer, stacked, topology)
        self._everyone = Everyone(agents, num_agents, stacked.device, self.optimizer)
        check_ranks(self._everyone.group, process_group)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.agent_metrics: dict[str, Tensor] = {}
        self._max_grad_norm = max_grad_norm
        self._autocast, self._channels_last = autocast, channels_last
        self._engine_name = engine
        self._engine = make_engine(engine, stacked, self._objective)
        self._tally = Tally(self.optimizer, num_agents, len(agents), stacked.device)
        self._initial_settings = settings_of(self.optimizer)
        self._initial_rates = [deepcopy(group["lr"]) for group in self.optimizer.param_groups]
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
        return self._tally.lr

    @property
    def train_loss(self) -> float:
        """The mean loss of the agents in this process in the steps since the last evaluation; NaN before a step."""
        return self._tally.mean_loss(float(self._tally.loss_sum.mean()))

    @property
    def entries(self) -> list[str]:
        """The names of the entries of the history, which `evaluate` explains."""
        of_test = [] if self._test is None else metric_entries(self._objective)
        return [*ENTRIES_BEFORE, *of_test, *ENTRIES_AFTER]

    @property
    def is_first(self) -> bool:
        """True in the process that reports for all: the only one, or with a process_group the one with agent 0."""
        return self._everyone.is_first

    @property
    def bytes_sent(self) -> Tensor:
        """The bytes that each agent has sent so far, int64 [N]."""
        return self._tally.bytes_sent.total.clone()

    def run(
        self,
        steps: int,
        *,
        milestones: Sequence[float] = (),
        decay: float = 0.1,
        schedule: MakeScheduler | None = None,
        schedule_metric: str | None = None,
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
            schedule_metric: the entry of the history that such a scheduler is given; None is the test loss, or the
                loss in training if there are no test samples.
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
        told = [*checked(callbacks), *([] if on_checkpoint is None else [AfterCheckpoint(on_checkpoint)]), shown]
        if file is not None:
            check_target(file, is_folder=self._everyone.group is not None)
        self._start_schedule(timetable, schedule, schedule_metric)
        if not self.stacked.training:
            self.stacked.train()
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

    def evaluate(self, data: Any = None) -> dict[str, Any]:
        """A row of the history for the current state of the agents.

        Its entries are step; lr (of the last step, first group); train_loss (mean over agents and the steps since the
        last row); diverged_agents (number of agents with a loss of NaN or infinity in these steps); test_loss and, for
        each metric, for example accuracy, test_accuracy (of the averaged model), mean_agent_accuracy, and the agents'
        quartiles from worst_agent_accuracy over lower_quartile_, median_ and upper_quartile_ to best_agent_accuracy (of
        other metrics smallest_ and largest_); consensus_error; mean_bytes_sent and max_bytes_sent (per agent, since the
        start). Accuracies are fractions. With a process_group all ranks call `evaluate`, and all get the numbers of all
        agents.

        Args:
            data: test samples in place of the simulator's own, of the same kinds as `test_data`.
        """
        test = self._test if data is None else self._samples_of(training_and_test(None, data)[1], "data")[0]
        vectorized = self.engine.endswith("vmap")
        loss_sums = self._everyone.rows(self._tally.loss_sum)
        with randomness.own_random_state(self.stacked.device):
            of_test, agent_metrics = evaluate(
                self.stacked, self._objective, test, vectorized=vectorized, everyone=self._everyone
            )
        self.agent_metrics = {name: values.cpu() for name, values in agent_metrics.items()}
        diverged = (~loss_sums.isfinite()).sum(dtype=torch.float64)
        numbers = read({"loss_sum": loss_sums.mean(), "diverged_agents": diverged, **of_test})
        loss_sum, diverged_agents = numbers.pop("loss_sum"), int(numbers.pop("diverged_agents"))
        bytes_sent = self._tally.bytes_sent.total.tolist()
        return {
            "step": self.step,
            "lr": self._tally.lr,
            "train_loss": self._tally.mean_loss(loss_sum),
            "diverged_agents": diverged_agents,
            **numbers,
            "mean_bytes_sent": sum(bytes_sent) / len(bytes_sent),
            "max_bytes_sent": max(bytes_sent),
        }

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that `load_checkpoint` needs to continue the run; an existing file is replaced atomically.

        With a process_group all ranks call `save_checkpoint`, and `path` is a folder.
        """
        write_checkpoint(self._content(), path, self._everyone.group)

    def _content(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "configuration": self._configuration,
            "step": self.step,
            "history": self.history,
            "model": self.stacked.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler_state,
            "engine": self._engine.state_dict() if isinstance(self._engine, AutoEngine) else None,
            "random_state": self._random_state,
            **self._tally.state_dict(),
        }

    def load_checkpoint(self, path: str | Path) -> None:
        """Continues from the step at which `path` was written; this simulator must have been made with equal arguments.

        With a process_group all ranks call `load_checkpoint`, `path` is a folder, and they continue from the newest
        step that all ranks have.

        Raises:
            OSError: the file cannot be read.
            FileError: the file is truncated, corrupt or not a checkpoint of such a simulator; it is a RuntimeError too.
            ValueError: the checkpoint has another configuration; the message says what differs. Nothing has changed.
        """
        content = read_checkpoint(path, self._everyone.group)
        check_configuration(content.get("configuration"), self._configuration, path)
        check_structure(content, self._content(), self.optimizer, path)
        with as_file_error(path):
            self.optimizer.load_state_dict(content["optimizer"])
        self.stacked.load_state_dict(content["model"])
        if isinstance(self._engine, AutoEngine) and content["engine"] is not None:
            self._engine.load_state_dict(content["engine"])
        self.step, self.history = content["step"], content["history"]
        self._schedule, self._scheduler_state = Schedule(), content["scheduler"]
        self._random_state = content["random_state"]
        self._tally.load_state_dict(content)

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
        self._tally.start_row()
        self.history.append(row)
        if timetable.evaluates_regularly_after(self.step):
            self._schedule.after_evaluation(row)
        self._is_between_steps = True

    def _train_step(self) -> None:
        """Does one step of all agents; if the gradient fails or is interrupted, nothing has changed."""
        with undo_on_error(self.stacked):
            losses = self._engine(self.batches(self.step))
        self._is_between_steps = False
        if self._max_grad_norm is not None:
            clip_grad_norm_per_agent_(self.stacked.parameters(), self._max_grad_norm)
        self._schedule.before_step(self.step)
        self._tally.lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self._tally.add_step(losses)
        self.step += 1
        self._schedule.after_step()
        self._is_between_steps = True

    def _start_schedule(self, timetable: Timetable, schedule: MakeScheduler | None, metric: str | None) -> None:
        """Makes the schedule of the run, in its state at the end of the last run."""
        if metric is None:
            metric = "train_loss" if self._test is None else "test_loss"
        if metric not in self.entries:
            raise ValueError(f"schedule_metric={metric!r} is no entry of the history: {', '.join(self.entries)}")
        about = self.optimizer, self._initial_rates, self._scheduler_state
        self._schedule = make_schedule(timetable, schedule, metric, *about)

    def _suspend(self) -> None:
        """Takes in the states of the generators and the scheduler, which live outside the simulator during a run."""
        self._random_state = randomness.get_state(self.stacked.device)
        self._scheduler_state = self._schedule.state_dict()

    def _save(self, path: Path) -> None:
        self._suspend()
        self.save_checkpoint(path)

    @cached_property
    def _configuration(self) -> dict[str, Any]:
        """The plain values that a checkpoint must have in common with this simulator."""
        return configuration_of(
            self.topology,
            self._initial_settings,
            self.stacked,
            self.batches,
            agents_here=None if self._everyone.group is None else str(self.batches.agents),
            data_set=getattr(self.data, "name", type(self.data).__name__),
            autocast=None if self._autocast is None else str(self._autocast),
            channels_last=self._channels_last or None,
            max_grad_norm=self._max_grad_norm,
        )

    def __getstate__(self) -> dict[str, Any]:
        chosen = self._engine.state_dict() if isinstance(self._engine, AutoEngine) else None
        return {**self.__dict__, "_engine": chosen, "_schedule": Schedule()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        chosen: Any = state["_engine"]
        self._engine = make_engine(self._engine_name, self.stacked, self._objective)
        if isinstance(self._engine, AutoEngine) and chosen is not None:
            self._engine.load_state_dict(chosen)
