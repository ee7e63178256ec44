"""Threads that share out jobs with the thread that has them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

__all__ = ["Job", "Workers"]

Result = TypeVar("Result")

Job = Callable[[], Result]
"""Something to be done in any thread."""


class Workers:
    """Does jobs on `torch.get_num_threads()` threads, one of which is the caller's.

    Whoever is free takes the next job, and every operator of a job has one thread. The caller works too and waits only
    for jobs that have begun, so on a busy machine it does all of them alone. Gradient mode and autocasting are the
    caller's in every thread. Threads sleep between the calls, and end when this object is gone. A forked process starts
    threads of its own.

    Args:
        max_threads: more are never used.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._executor = ThreadPoolExecutor(1)
        self._made_for = (0, 0)
        self._helpers: list[Future[None]] = []

    def run(self, jobs: Iterable[Job[Result]]) -> list[Result]:
        """What the jobs return, in their order.

        One thread at a time advances the iterator of jobs: what it does to make a job is done in order.

        Raises:
            BaseException: what a job has raised, in whichever thread. No job is running then, and the rest is left out.
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
        """The helpers' threads, idle; a forked process has inherited none and makes its own."""
        made_for = (os.getpid(), num_helpers)
        if self._made_for[0] == made_for[0]:
            self._finish()  # what Ctrl-C has left of the last call
        self._helpers.clear()
        if self._made_for != made_for:
            self._made_for = made_for
            self._executor = ThreadPoolExecutor(max(num_helpers, 1), "gut_fast")
        return self._executor

    def _finish(self) -> None:
        """Waits for the helpers that have begun; the others never will."""
        wait([helper for helper in self._helpers if not helper.cancel()])


class _SharedJobs(Generic[Result]):
    """Jobs that several threads take from one iterator."""

    def __init__(self, jobs: Iterable[Job[Result]]) -> None:
        self._jobs = enumerate(jobs)
        self._lock = threading.Lock()
        self._stopped = False
        self._grad_enabled = torch.is_grad_enabled()
        self._autocast_dtype = torch.get_autocast_dtype("cpu")
        self._autocast_enabled = torch.is_autocast_enabled("cpu")
        self.results: dict[int, Result] = {}

    def work(self) -> None:
        """Does jobs until there are none; after an error nobody takes another."""
        # Of this thread: torch keeps the number per thread, and gives the number set last to threads yet to come.
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
