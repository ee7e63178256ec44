"""Processes that train together, for tests: started from one that has imported torch, bounded in time, none left."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver

import torch
import torch.distributed as dist

LIMIT = 60.0
store = None  # in a rank: that of the crew
_context = multiprocessing.get_context("forkserver")


def load_libraries():
    """Starts the process that all ranks are forked from. What it has not loaded, each of them would load anew."""
    libraries = ["pytest", "torch._dynamo", "torch.distributed", "gut_fast", "gut_fast.study.processes"]
    forkserver.set_forkserver_preload(libraries)
    forkserver.ensure_running()


class Crew:
    """`size` processes that run ``function(rank, size, *arguments)`` in a gloo group; the store lives here.

    A context manager; at its end no process is left. `kill`, `stop` and `go_on` send signals. `results` waits.
    """

    def __init__(self, size, function, *arguments, limit=LIMIT):
        self.deadline = time.monotonic() + limit
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = _context.Pipe()
            process = _context.Process(
                target=_main, args=(theirs, self.store.port, rank, size, function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send(self, rank, number):
        """Sends a signal."""
        os.kill(self.processes[rank].pid, number)

    def kill(self, rank):
        self.send(rank, signal.SIGKILL)

    def wait_for(self, key):
        """Until a rank has set this key in the store."""
        while not self.store.check([key]):
            for rank, pipe in enumerate(self._pipes):
                if pipe.poll():
                    raise AssertionError(f"rank {rank} has ended: {self._outcome(rank)!r}")
            assert time.monotonic() < self.deadline, f"nobody has said {key!r}"
            time.sleep(0.01)

    def outcomes(self, ranks=None):
        """Of each rank (all unless told): what its function returned, or the exception it raised."""
        return [self._outcome(rank) for rank in (range(len(self.processes)) if ranks is None else ranks)]

    def _outcome(self, rank):
        pipe = self._pipes[rank]
        if not pipe.poll(max(self.deadline - time.monotonic(), 0.1)):
            raise AssertionError(f"rank {rank} has not finished")
        try:
            outcome, text = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return None
        if isinstance(outcome, Exception):
            outcome.add_note(text) if hasattr(outcome, "add_note") else None
        return outcome


def run(size, function, *arguments, limit=LIMIT):
    """What ``function(rank, size, *arguments)`` returns on each of `size` ranks; raises what one of them raises."""
    with Crew(size, function, *arguments, limit=limit) as crew:
        outcomes = crew.outcomes()
        for rank, process in enumerate(crew.processes):
            process.join(max(crew.deadline - time.monotonic(), 0.1))
            assert process.exitcode == 0, f"rank {rank} has ended with exit code {process.exitcode}"
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _main(pipe, port, rank, size, function, arguments):
    global store
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=LIMIT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    try:
        outcome, text = function(rank, size, *arguments), ""
    except Exception as error:
        outcome, text = error, traceback.format_exc()
    except BaseException as error:  # such as pytest.raises has where nothing is raised
        outcome, text = AssertionError(f"{type(error).__name__}: {error}"), traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps((outcome, text)))  # not send, which would share tensors' memory
    pipe.close()
    os._exit(0)
