"""Agents on the cores of a CPU: an engine that computes one agent per thread, and the threads that share its jobs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gut_fast.agents import StackedModule
from gut_fast.simulation.gradients import LoopEngine, remember
from gut_fast.simulation.objective import Objective

__all__ = ["Job", "Workers", "WorkersEngine"]

Result = TypeVar("Result")

Job = Callable[[], Result]
"""A function that may be called in any thread."""


class Workers:
    """A crew of `torch.get_num_threads()` threads for jobs, one of which is the caller's.

    A free thread takes the next job, and every operator of a job has one thread. The caller works too and waits only
    for jobs that have begun, so on a busy machine it does all of them alone. Gradient mode and autocasting are the
    caller's in every thread. Threads sleep between the calls, and end when this object is gone. A forked process starts
    threads of its own.

    Args:
        max_threads: largest number of threads.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._executor = ThreadPoolExecutor(1)
        self._made_for = (0, 0)
        self._helpers: list[Future[None]] = []

    def run(self, jobs: Iterable[Job[Result]]) -> list[Result]:
        """Calls the jobs and returns their results in order.

        One thread at a time advances the iterator of jobs, so the code that makes jobs runs in order.

        Raises:
            BaseException: the error of a job in any thread. No job is running then, and the others are left out.
        """
        num_threads = torch.get_num_threads()
        shared = _SharedJobs(jobs)
        num_helpers = min(num_threads, self._max_threads) - 1
        executor = self._prepare(num_helpers)
        try:
            for _ in range(num_helpers):
                self._helpers.append(executor.submit(shared.work))
            shared.work()
        finally:
            try:
                self._finish()
            finally:
                torch.set_num_threads(num_threads)
        helpers, self._helpers = self._helpers, []
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return [shared.results[index] for index in range(len(shared.results))]

    def _prepare(self, num_helpers: int) -> ThreadPoolExecutor:
        """The executor of the helpers, idle; a forked process has inherited no threads and makes its own."""
        made_for = (os.getpid(), num_helpers)
        if self._made_for[0] == made_for[0]:
            self._finish()  # Ctrl-C may have left helpers of the last call
        self._helpers.clear()
        if self._made_for != made_for:
            self._made_for = made_for
            self._executor = ThreadPoolExecutor(max(num_helpers, 1), "gut_fast")
        return self._executor

    def _finish(self) -> None:
        """Waits for the helpers that have begun, and cancels the others."""
        wait([helper for helper in self._helpers if not helper.cancel()])


class _SharedJobs(Generic[Result]):
    """An iterator of jobs that several threads share, and the jobs' results."""

    def __init__(self, jobs: Iterable[Job[Result]]) -> None:
        self._jobs = enumerate(jobs)
        self._lock = threading.Lock()
        self._stopped = False
        self._grad_enabled = torch.is_grad_enabled()
        self._autocast_dtype = torch.get_autocast_dtype("cpu")
        self._autocast_enabled = torch.is_autocast_enabled("cpu")
        self.results: dict[int, Result] = {}

    def work(self) -> None:
        """Calls jobs until there are none; after an error no thread takes another."""
        # torch keeps this number per thread, and new threads get the number that was set last.
        torch.set_num_threads(1)
        try:
            with (
                torch.set_grad_enabled(self._grad_enabled),
                torch.autocast("cpu", self._autocast_dtype, self._autocast_enabled),
            ):
                while (taken := self._take()) is not None:
                    index, job = taken
                    self.results[index] = job()
        except BaseException:
            self._stopped = True
            raise

    def _take(self) -> tuple[int, Job[Result]] | None:
        with self._lock:
            return None if self._stopped else next(self._jobs, None)


class WorkersEngine(LoopEngine):
    """The loop with its agents shared out among `torch.get_num_threads()` threads, one agent at a time in each.

    Small operators leave most of a machine's cores idle; whole agents do not. PyTorch releases Python's lock inside its
    operators and runs a backward pass in the thread that starts it, and agents write to different rows, so threads are
    enough. Within an agent every operator has one thread: the results are those of `LoopEngine` with
    ``torch.set_num_threads(1)``, bit for bit, for any number of threads. (With several threads `LoopEngine` itself may
    add up in another order.)

    This includes dropout and other operators that draw from torch's default generator in the forward pass: a gradient
    that has moved the generator is computed again, and from then on forward passes run in the order of the agents, and
    backward passes beside them. Random numbers from elsewhere, or drawn in the backward pass, come in any order. The
    module and the loss are called in several threads, with the caller's gradient mode and autocasting; other contexts
    of the calling thread do not reach them.

    Raises:
        ValueError: the model is not on the CPU.
    """

    name = "workers"

    def __init__(self, stacked: StackedModule, objective: Objective) -> None:
        if stacked.device.type != "cpu":
            raise ValueError(f"engine 'workers' is for the CPU, the model is on {stacked.device}; use 'vmap' or 'loop'")
        super().__init__(stacked, objective)
        self._workers = Workers(max_threads=stacked.num_agents)
        self._draws_random_numbers = False

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients as an `Engine` does; an agent's error is raised when no thread computes any more."""
        if not self._draws_random_numbers:
            undo, random_state = remember(self._stacked), torch.get_rng_state()
            losses = self._run(self._in_any_order(batch))
            if torch.equal(torch.get_rng_state(), random_state):
                return losses
            undo()
            self._draws_random_numbers = True
        return self._run(self._in_order(batch))

    def _run(self, jobs: Iterator[Job[Tensor]]) -> Tensor:
        self._prepare()
        return torch.stack(self._workers.run(jobs))

    def _in_any_order(self, batch: Any) -> Iterator[Job[Tensor]]:
        return (partial(self._gradient, i, batch) for i in range(self._stacked.num_agents))

    def _in_order(self, batch: Any) -> Iterator[Job[Tensor]]:
        """Jobs of the backward passes; the forward passes run while the jobs are made, one after the other."""
        for i in range(self._stacked.num_agents):
            yield partial(self._backward, i, self._forward(i, batch))
