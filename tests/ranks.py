"""Processes that train together, for tests: started once and used again, bounded in time, none left behind.

`run` takes processes that live as long as the tests and have a new process group and a new store for each function.
Tests in which processes are killed, stopped or must end have a `Crew` of their own.
"""

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import forkserver

import torch
import torch.distributed as dist

LIMIT = 120.0  # seconds; a busy machine takes a while to load the libraries
store = None  # in a rank: the store that the ranks of this function share
_context = multiprocessing.get_context("forkserver")
_numbers = itertools.count()


def load_libraries():
    """Starts the process that all ranks are forked from. What it has not loaded, each of them would load anew."""
    libraries = ["pytest", "torch._dynamo", "torch.distributed", "gut_fast", "gut_fast.study.processes"]
    forkserver.set_forkserver_preload(libraries)
    forkserver.ensure_running()


@contextlib.contextmanager
def as_torchrun(rank, size):
    """A context in which a rank has the environment that torchrun makes, with a store of its own and no group yet."""
    dist.destroy_process_group()
    if rank == 0:
        own = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        store.set("port", str(own.port))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.get("port").decode(), "RANK": str(rank)}
    where |= {"WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    before = dict(os.environ)
    os.environ.update(where)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(size)])  # rank 0 keeps its store for the others


class Crew:
    """`size` processes that run ``function(rank, size, *arguments)`` in a gloo group; the store lives here.

    A context manager; at its end no process is left. A process ends with its function.
    """

    def __init__(self, size, function, *arguments, limit=LIMIT):
        self._begin([_Rank() for _ in range(size)], dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False))
        self._tell(True, function, arguments, limit)

    def _begin(self, ranks, host):
        self._ranks, self._host = ranks, host

    def _tell(self, is_last, function, arguments, limit):
        """Has the ranks run a function, in a part of the store that nobody has used."""
        self.deadline, number = time.monotonic() + limit, next(_numbers)
        self.store = dist.PrefixStore(f"function {number}", self._host)
        for place, rank in enumerate(self._ranks):
            rank.tell((is_last, number, self._host.port, place, len(self._ranks), function, arguments))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()

    def send(self, rank, number):
        """Sends a signal to a rank."""
        os.kill(self._ranks[rank].process.pid, number)

    def kill(self, rank):
        self.send(rank, signal.SIGKILL)

    def wait_for(self, key):
        """Waits until a rank has set this key in the store."""
        while not self.store.check([key]):
            for rank, own in enumerate(self._ranks):
                if own.pipe.poll():
                    raise AssertionError(f"rank {rank} has ended: {self._outcome(rank)!r}")
            assert time.monotonic() < self.deadline, f"nobody has said {key!r}"
            time.sleep(0.01)

    def outcomes(self, ranks=None):
        """Returns what the function returned on each rank (all unless told), the error it raised, or None if killed."""
        ranks = list(range(len(self._ranks)) if ranks is None else ranks)
        finished = {rank: self._ranks[rank].pipe.poll(max(self.deadline - time.monotonic(), 0.1)) for rank in ranks}
        if all(finished.values()):
            return [self._outcome(rank) for rank in ranks]
        says = {rank: repr(self._outcome(rank)) if finished[rank] else self._ranks[rank].stacks() for rank in ranks}
        late = [rank for rank in ranks if not finished[rank]]
        raise AssertionError(f"ranks {late} have not finished; " + "; ".join(f"rank {r}: {s}" for r, s in says.items()))

    def _outcome(self, rank):
        try:
            outcome, text = pickle.loads(self._ranks[rank].pipe.recv_bytes())
        except EOFError:
            return None
        if isinstance(outcome, Exception):
            outcome.add_note(text) if hasattr(outcome, "add_note") else None
        return outcome


class _LastingCrew(Crew):
    """Processes that run one function after another; a function of few ranks leaves the others idle."""

    def __init__(self):
        self._all = []
        self._begin([], dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False))

    def run(self, size, function, arguments, limit):
        self._all += [_Rank() for _ in range(size - len(self._all))]
        self._ranks = self._all[:size]
        self._tell(False, function, arguments, limit)
        return self.outcomes()


_lasting = []


def run(size, function, *arguments, limit=LIMIT):
    """Returns what ``function(rank, size, *arguments)`` returns on each of `size` ranks; raises what one raises.

    After an error the processes are replaced: nobody knows in which state they are.
    """
    if not _lasting:
        _lasting.append(_LastingCrew())
    try:
        outcomes = _lasting[0].run(size, function, arguments, limit)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
    except BaseException:
        crew = _lasting.pop()
        crew._ranks = crew._all
        crew.__exit__()
        raise
    return outcomes


class _Rank:
    """A process, and the pipe by which it gets functions and returns outcomes."""

    def __init__(self):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, order):
        self.pipe.send_bytes(pickle.dumps(order))

    def stacks(self):
        """Returns where the threads of this process are; after this it cannot be told anything."""
        os.kill(self.process.pid, signal.SIGUSR1)
        said = b""
        while self.pipe.poll(2) and (more := os.read(self.pipe.fileno(), 1 << 16)):
            said += more
        return said.decode(errors="replace") or "says nothing"


def _serve(pipe):
    """Runs functions until one is the last, or the process that asks has ended."""
    faulthandler.register(signal.SIGUSR1, pipe.fileno())
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gc.freeze()
    is_last = False
    with contextlib.suppress(EOFError, BrokenPipeError):
        while not is_last:
            is_last, *order = pickle.loads(pipe.recv_bytes())
            outcome = pickle.dumps(_outcome_of(*order))  # by value: tensors must not travel in shared memory
            pipe.send_bytes(outcome)
            if not is_last:
                _clear()
    os._exit(0)


def _outcome_of(number, port, rank, size, function, arguments):
    """Runs a function in a process group of its own."""
    global store
    limit = timedelta(seconds=LIMIT)
    store = dist.PrefixStore(f"function {number}", dist.TCPStore("127.0.0.1", port, None, False, timeout=limit))
    dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=rank, world_size=size, timeout=limit)
    dist.barrier()  # a group that one rank leaves while another still connects keeps that one waiting
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody reads what ranks print
            return function(rank, size, *arguments), ""
    except Exception as error:
        return error, traceback.format_exc()
    except BaseException as error:  # such as pytest.raises has where nothing is raised
        return AssertionError(f"{type(error).__name__}: {error}"), traceback.format_exc()


def _clear():
    """Closes the connections that the function has left."""
    gc.enable()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
