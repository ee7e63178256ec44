"""Processes that train together, one agent each, joined by this machine's loopback or by links of a given rate.

With a rate each process has a network namespace of its own, joined to a bridge in one more by a veth pair with a token
bucket filter at both ends. Nothing outside the namespaces is touched, and they are removed at the end.
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from gut_fast.study.processes import end_with_parent

TIMEOUT = 120.0
"""The seconds within which all ranks must answer."""

LOOPBACK, INTERFACE = "lo", "wire"
CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/var/run/netns")
RATE = re.compile(r"([1-9]\d*(?:\.\d+)?)(kbit|mbit|gbit)")
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST_SECONDS, MIN_BURST = 4e-3, 16_384
"""The bytes that may pass at once: those of a tick of a slow kernel's clock, and some packets at least."""


class CrewError(RuntimeError):
    """A rank has failed, ended or not answered in time; the message says which and why."""


class Crew:
    """Processes of a gloo group, each with one thread of PyTorch's and an object that does what is asked."""

    def __init__(self, size):
        # Forked from a process that has imported the libraries, so that four ranks do not take four imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "gut_fast.optim"])
        self._pools = [ProcessPoolExecutor(1, context) for _ in range(size)]
        self._pids = self._answers("start", [pool.submit(os.getpid) for pool in self._pools])

    def enter(self, make, places, store):
        """Makes ``make(rank, place)`` in each process, when all are in their group."""
        futures = [
            pool.submit(_enter, make, rank, len(self._pools), place, store)
            for rank, (pool, place) in enumerate(zip(self._pools, places, strict=True))
        ]
        self._answers("start", futures)

    def ask(self, method, *arguments):
        """Returns what a method of the objects returns on all ranks.

        Raises:
            CrewError: a rank failed, ended or did not answer in time.
        """
        return self._answers(method, [pool.submit(_call, method, arguments) for pool in self._pools])

    def _answers(self, method, futures):
        """The first failure is reported at once, because other ranks may wait for the one that failed."""
        done, waiting = wait(futures, TIMEOUT, FIRST_EXCEPTION)
        for rank, future in enumerate(futures):
            if future in done and (error := future.exception()) is not None:
                raise CrewError(f"{method}: rank {rank}: {type(error).__name__}: {error}") from error
        if waiting:
            raise CrewError(f"{method}: {len(waiting)} of {len(futures)} ranks have not answered in {TIMEOUT:g} s")
        return [future.result() for future in futures]

    def close(self):
        """Ends all processes."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown()


@contextlib.contextmanager
def crew(make, size, rate):
    """Yields so many ranks, each with ``make(rank, place)``; none outlives the block.

    Raises:
        CrewError: a rank cannot start.
        RuntimeError: links of that rate cannot be made here.
    """
    with tempfile.TemporaryDirectory() as folder, places(size, rate) as where:
        found = Crew(size)
        try:
            found.enter(make, where, Path(folder, "store"))
            yield found
        finally:
            found.close()


def _enter(make, rank, size, place, store):
    """Runs in a rank's process."""
    global _server
    end_with_parent()
    place.enter()
    torch.set_num_threads(1)
    address, limit = f"file://{store}", timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=limit)
    _server = make(rank, place)


def _call(method, arguments):
    return getattr(_server, method)(*arguments)


class Place(NamedTuple):
    """Where a rank is: a network namespace (None is the one that everybody is in), and its network interface."""

    namespace: str | None
    interface: str

    def enter(self):
        """Moves this thread, and those it starts, into the namespace. Raises OSError where that is not allowed."""
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        if self.namespace is None:
            return
        with (NAMESPACES / self.namespace).open("rb") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot enter network namespace {self.namespace}: {os.strerror(code)}")

    def bytes_out(self):
        """The bytes that have left through the interface, headers included; 0 where the system does not tell."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines():
                name, _, counters = line.partition(":")
                if name.strip() == self.interface:
                    return int(counters.split()[8])
        return 0


def burst(rate):
    """The bytes that may pass a link of this rate at once. Raises ValueError if it is not a rate."""
    matched = RATE.fullmatch(rate)
    if matched is None:
        raise ValueError(f"--rate must be a number with kbit, mbit or gbit, for example 200mbit, got {rate!r}")
    number, unit = matched.groups()
    return max(MIN_BURST, round(float(number) * BITS[unit] * BURST_SECONDS / 8))


def check_rate(rate):
    """Raises ValueError if this is not a rate, and RuntimeError if links of it cannot be made here."""
    burst(rate)
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(f"--rate needs {' and '.join(missing)}, of the package iproute2")
    if os.geteuid() != 0:
        raise RuntimeError("--rate needs root, to make network namespaces; run as root, or leave out --rate")


@contextlib.contextmanager
def places(size, rate):
    """Yields a place for each rank; with a rate, all are joined to one switch by links that carry so much each way.

    Raises:
        RuntimeError: the kernel refuses; the message is that of the command that failed.
    """
    if rate is None:
        yield [Place(None, LOOPBACK)] * size
        return
    *ranks, switch = names = [f"gut-fast-{os.getpid()}-{number}" for number in (*range(size), "switch")]
    with _termination_raises(), contextlib.ExitStack() as at_the_end:
        found = [path.name for path in NAMESPACES.glob("gut-fast-[0-9]*-*")]
        _remove(name for name in found if not Path("/proc", name.split("-")[2]).exists())  # left by a SIGKILL
        at_the_end.callback(_remove, names)
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "dev", "bridge", "up")
        for number, name in enumerate(ranks):
            _join(name, switch, number, rate)
        yield [Place(name, INTERFACE) for name in ranks]


def _join(name, switch, number, rate):
    port = f"port{number}"
    run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    run("ip", "-n", switch, "link", "set", "dev", port, "master", "bridge", "up")
    run("ip", "-n", name, "link", "set", "dev", INTERFACE, "addrgenmode", "none")  # or gloo might take the IPv6 address
    run("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", INTERFACE)
    for interface in (LOOPBACK, INTERFACE):
        run("ip", "-n", name, "link", "set", "dev", interface, "up")
    for namespace, interface in ((name, INTERFACE), (switch, port)):
        shape = ("tbf", "rate", rate, "burst", str(burst(rate)), "latency", "100ms")
        run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *shape)


def _remove(names):
    """Removes namespaces and all that is in them. Some may not be there; a second Ctrl-C waits until all are gone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        for name in names:
            with contextlib.suppress(RuntimeError):
                run("ip", "netns", "del", name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _termination_raises():
    """Makes SIGTERM and SIGHUP end the block as Ctrl-C does; else namespaces would stay."""

    def end(number, _):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(*command):
    """Runs a program. Raises RuntimeError with its message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
