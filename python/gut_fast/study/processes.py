"""Processes on this machine: ranks that train together, and the end of those whose parent has been killed.

The store over which they meet lives in the launching process, so no rank takes it along when it dies. Ctrl-C is the
launcher's, which passes it on; the ranks agree among themselves after which step they stop.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gut_fast.distributed import PeerError

__all__ = ["RankError", "ToldError", "end_with_parent", "launch"]

HOST = "127.0.0.1"
INTERRUPTED = 130
SECONDS_FOR_THE_CAUSE = 0.5
"""When a rank fails the others do so too; so long is waited for the one that failed of itself."""

SECONDS_TO_STOP = 10.0
"""After Ctrl-C, between one rank's end and the next one's: others may wait for a rank that had not yet begun."""


class ToldError(RuntimeError):
    """An error of which the message says all that its reader needs: a rank that ends with it prints no traceback."""


class RankError(RuntimeError):
    """A rank has failed, or its process was killed; the others have been ended."""


def launch(size: int, threads: int, function: Callable[..., object], *arguments: Any) -> None:
    """Calls ``function(*arguments, process_group)`` in `size` processes with `threads` threads each, and waits.

    Raises:
        RankError: one of them failed.
        KeyboardInterrupt: Ctrl-C was pressed, and all have stopped; pressed twice, all have been killed.
    """
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # libraries are loaded once
    processes = [
        context.Process(
            target=_main, args=(store.port, rank, size, threads, function, arguments), name=f"rank {rank}", daemon=True
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        _watch(processes, store)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _watch(processes: Sequence[BaseProcess], store: TCPStore) -> None:
    """Until all have ended well."""
    is_stopping = False
    while running := [process for process in processes if process.exitcode is None]:
        limit = SECONDS_TO_STOP if is_stopping and len(running) < len(processes) else None
        try:
            if not wait([process.sentinel for process in running], limit):
                break
            if not is_stopping and any(process.exitcode not in (None, 0, INTERRUPTED) for process in processes):
                raise RankError(_cause(processes, store))
        except KeyboardInterrupt:
            if is_stopping:
                raise
            is_stopping = True
            for process in running:
                assert process.pid is not None
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGINT)
    if is_stopping or any(process.exitcode == INTERRUPTED for process in processes):
        raise KeyboardInterrupt


def _cause(processes: Sequence[BaseProcess], store: TCPStore) -> str:
    """Why the rank failed that was not merely waiting for another one."""
    deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    while time.monotonic() < deadline and any(process.exitcode is None for process in processes):
        time.sleep(SECONDS_FOR_THE_CAUSE / 50)
    reasons = []
    for rank, process in enumerate(processes):
        if process.exitcode is not None and process.exitcode < 0:
            reasons.append(f"rank {rank} was killed by {signal.Signals(-process.exitcode).name}, or ran out of memory")
        elif process.exitcode:
            reasons.append(
                store.get(f"failure {rank}").decode() if store.check([f"failure {rank}"]) else f"rank {rank} ended"
            )
    own = [reason for reason in reasons if PeerError.__name__ not in reason]
    return f"{(own or reasons)[0]}; the other ranks have been ended"


def _main(
    port: int, rank: int, size: int, threads: int, function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    """One rank."""
    os.setpgid(0, 0)  # the terminal's Ctrl-C is the launcher's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()
    warnings.simplefilter("ignore")  # the launcher has made the same simulator, and said it
    warnings.filterwarnings("default", ".* counts as missing$")  # of damaged checkpoints, which it has not read
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore(HOST, port, None, False)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        function(*arguments, dist.group.WORLD)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    except Exception as error:
        if not isinstance(error, (ToldError, PeerError)):
            traceback.print_exc()
        sys.stdout.flush()
        kind = "" if isinstance(error, ToldError) else f"{type(error).__name__}: "
        store.set(f"failure {rank}", f"rank {rank} failed: {kind}{error}")
        os._exit(1)


def end_with_parent() -> None:
    """Makes this process of `multiprocessing` end when the process that started it has been killed, say."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
