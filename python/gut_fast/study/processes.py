"""Processes on this machine: children of this one, and ranks that train together.

A child is forked from a server that has loaded the libraries. Ctrl-C in a terminal does not reach it: its parent passes
it on, so that each child gets it once. A child ends when its parent has been killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from gut_fast.distributed import PeerError

__all__ = ["INTERRUPTED", "Child", "RankError", "ToldError", "end_with_parent", "launch"]

HOST = "127.0.0.1"
INTERRUPTED = 130
"""The exit code of a process that Ctrl-C has ended."""

LIBRARIES = ["gut_fast.study.runner", "torch._dynamo", "sklearn.datasets"]
"""Modules that the server loads once for all children, where they are installed: each would take them seconds."""

SECONDS_FOR_THE_CAUSE = 0.5
"""When a rank fails the others do so too; so long is waited for the one that failed of itself."""

SECONDS_TO_STOP = 10.0
"""After Ctrl-C, between one rank's end and the next one's: others may wait for a rank that had not yet begun."""


class ToldError(RuntimeError):
    """An error of which the message says all that its reader needs: a process that ends with it prints no traceback."""


class RankError(RuntimeError):
    """A rank has failed, or its process was killed; the others have been ended."""


class Child:
    """A process that calls ``function(connection, *arguments)`` with `threads` threads.

    Its exit code is 130 if it was interrupted, 1 if the function failed; a text about the error is then the last that
    it has sent through `connection`, which ends with the process. If nobody listens there, it ends without a word.
    """

    def __init__(self, name: str, threads: int, function: Callable[..., object], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        _start_server()
        self.connection, connection = context.Pipe()
        self.process = context.Process(
            target=_main, args=(connection, threads, function, arguments), name=name, daemon=True
        )
        self.process.start()
        connection.close()

    def interrupt(self) -> None:
        """Presses Ctrl-C in the process, if it is still there."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)


def _start_server() -> None:
    """Starts the server, unless it is there, so that Ctrl-C does not end it, with a traceback, while it loads."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None  # which the server inherits
    try:
        forkserver.ensure_running()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _main(connection: Connection, threads: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()
    warnings.simplefilter("ignore")  # the parent has made the same simulator, and said it
    warnings.filterwarnings("default", ".* counts as missing$")  # of damaged checkpoints, which it has not read
    torch.set_num_threads(threads)
    try:
        function(connection, *arguments)
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    except Exception as error:
        kind = "" if isinstance(error, ToldError) else f"{type(error).__name__}: "
        try:
            connection.send(f"{kind}{error}")
        except OSError:  # nobody listens any more: the parent has gone, or a second Ctrl-C has ended its wait
            os._exit(1)
        if not isinstance(error, (ToldError, PeerError)):
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def end_with_parent() -> None:
    """Makes this process of `multiprocessing` end when the process that started it has been killed, say."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def launch(size: int, threads: int, function: Callable[..., object], *arguments: Any) -> None:
    """Calls ``function(*arguments, process_group)`` in `size` processes with `threads` threads each, and waits.

    The store over which the ranks meet lives in this process, so no rank takes it along when it dies; it can be reached
    from this machine only. The ranks agree among themselves after which step they stop.

    Raises:
        RankError: one of them failed.
        KeyboardInterrupt: Ctrl-C was pressed, and all have stopped; pressed twice, all have been killed.
    """
    store = host_store()
    ranks: list[Child] = []
    try:
        ranks.extend(
            Child(f"rank {rank}", threads, _be_rank, store.port, rank, size, function, arguments)
            for rank in range(size)
        )
        _watch(ranks)
    finally:
        for child in ranks:
            child.process.kill()
            child.process.join()


def host_store() -> TCPStore:
    """Starts a store in this process, which listens on this machine's loopback interface only: it trusts all callers.

    A store that opens its port itself listens on every interface.
    """
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        owned_by_the_store = server.detach()
        return TCPStore(HOST, port, None, True, wait_for_workers=False, master_listen_fd=owned_by_the_store)


def _be_rank(
    connection: Connection,
    port: int,
    rank: int,
    size: int,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore(HOST, port, None, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    function(*arguments, dist.group.WORLD)
    dist.destroy_process_group()


def _watch(ranks: Sequence[Child]) -> None:
    """Waits until all ranks have ended well."""
    is_stopping = False
    while running := [rank for rank in ranks if rank.process.exitcode is None]:
        limit = SECONDS_TO_STOP if is_stopping and len(running) < len(ranks) else None
        try:
            if not wait([rank.process.sentinel for rank in running], limit):
                break
            if not is_stopping and any(rank.process.exitcode not in (None, 0, INTERRUPTED) for rank in ranks):
                raise RankError(_cause(ranks))
        except KeyboardInterrupt:
            if is_stopping:
                raise
            is_stopping = True
            for rank in running:
                rank.interrupt()
    if is_stopping or any(rank.process.exitcode == INTERRUPTED for rank in ranks):
        raise KeyboardInterrupt


def _cause(ranks: Sequence[Child]) -> str:
    """Says why the rank failed that was not merely waiting for another one."""
    deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    while (left := deadline - time.monotonic()) > 0 and (
        running := [rank.process.sentinel for rank in ranks if rank.process.exitcode is None]
    ):
        wait(running, left)
    reasons = []
    for rank in ranks:
        code = rank.process.exitcode
        if code is not None and code < 0:
            reasons.append(f"{rank.process.name} was killed by {signal.Signals(-code).name}, or ran out of memory")
        elif code:
            reasons.append(
                f"{rank.process.name} failed: {rank.connection.recv()}"
                if rank.connection.poll()
                else f"{rank.process.name} ended"
            )
    own = [reason for reason in reasons if PeerError.__name__ not in reason]
    return f"{(own or reasons)[0]}; the other ranks have been ended"
