"""Processes that train together, one agent each, and do what this one asks; none outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gut_fast.benchmark.across_link import Place, places
from gut_fast.study.processes import end_with_parent

__all__ = ["Crew", "CrewError", "crew"]

TIMEOUT = 120.0
"""Seconds that ranks may take to answer."""


class CrewError(RuntimeError):
    """A rank has failed, ended or not answered in time; the message says which and why."""


class Crew:
    """Processes of a gloo group, each with one thread of PyTorch's and an object that does what is asked.

    Args:
        make: called as ``make(rank, size, place)`` in each process, when the group is there.
    """

    def __init__(self, make: Any, where: Sequence[Place], store: Path) -> None:
        # Forked from a process that has imported torch and nothing else, so that four ranks do not take four imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", make.__module__])
        self.processes: list[Any] = []
        self._pipes: list[Any] = []
        for rank, place in enumerate(where):
            mine, theirs = context.Pipe()
            arguments = (theirs, make, rank, len(where), place, store)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self._pipes.append(mine)

    def wait_for_start(self) -> None:
        """Until all are in their group. Raises CrewError as `ask` does."""
        self._answers("start")

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of their objects returns on all ranks.

        Raises:
            CrewError: a rank failed, ended or did not answer in time.
        """
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # its end is seen below
                pipe.send((method, arguments))
        return self._answers(method)

    def _answers(self, method: str) -> list[Any]:
        """As soon as one fails that is said: the others may wait for it."""
        deadline = time.monotonic() + TIMEOUT
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and not failures:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CrewError(f"{method}: no answer from ranks {sorted(waiting.values())} within {TIMEOUT:g} s")
            pipe: Any
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failure, answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    failure = "its process has ended"
                if failure is not None:
                    failures[rank] = failure
        if failures:
            raise CrewError(f"{method}: {'; '.join(f'rank {rank}: {why}' for rank, why in failures.items())}")
        return [answers[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """Ends all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextlib.contextmanager
def crew(make: Any, size: int, rate: str | None) -> Iterator[Crew]:
    """So many ranks, joined by loopback or by links of a rate. Raises CrewError, or RuntimeError as `places` does."""
    with tempfile.TemporaryDirectory() as folder, places(size, rate) as where:
        found = Crew(make, where, Path(folder, "store"))
        try:
            found.wait_for_start()
            yield found
        finally:
            found.close()


def _serve(pipe: Any, make: Any, rank: int, size: int, place: Place, store: Path) -> None:
    """A rank's process: does what comes through the pipe until it is closed or something fails."""
    end_with_parent()
    try:
        place.enter()
        torch.set_num_threads(1)
        address, limit = f"file://{store}", timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=limit)
        server, answer = make(rank, size, place), None
        while True:
            pipe.send((None, answer))
            method, arguments = pipe.recv()
            answer = getattr(server, method)(*arguments)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send((f"{type(error).__name__}: {error}", None))
