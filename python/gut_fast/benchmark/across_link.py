"""Where ranks are and what joins them: this machine's loopback, or a network namespace each behind a shaped link."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

__all__ = ["LOOPBACK", "Place", "check_rate", "places"]

LOOPBACK, INTERFACE = "lo", "wire"
CLONE_NEWNET = 0x40000000
RATE = re.compile(r"([1-9]\d*(?:\.\d+)?)(kbit|mbit|gbit)")
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST_SECONDS, MIN_BURST = 4e-3, 16_384
"""What may pass at once is what the link carries in a tick of a slow kernel's clock, and some packets at least."""

LONGEST_QUEUE = "100ms"
TIMEOUT = 20
NAMESPACES = Path("/var/run/netns")
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Place(NamedTuple):
    """Where a rank is: a network namespace (None is the one that everybody is in), and what it sends through."""

    namespace: str | None
    interface: str

    def enter(self) -> None:
        """Moves this thread, and those it starts, into the namespace. Raises OSError where that is not allowed."""
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        if self.namespace is None:
            return
        with (NAMESPACES / self.namespace).open("rb") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot enter network namespace {self.namespace}: {os.strerror(code)}")

    def bytes_out(self) -> int:
        """That have left through the interface since it was made, headers included; 0 where the system does not tell.

        Of the namespace that this process is in.
        """
        try:
            table = Path("/proc/thread-self/net/dev").read_text(encoding="ascii")
        except OSError:
            return 0
        for line in table.splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == self.interface:
                return int(counters.split()[8])
        return 0


def check_rate(rate: str) -> None:
    """Whether links of this rate can be made here.

    Raises:
        ValueError: not a rate.
        RuntimeError: not root, or a tool is missing.
    """
    burst(rate)
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(f"--rate needs {' and '.join(missing)} of Linux's iproute2; install it, or leave out --rate")
    if os.geteuid() != 0:
        raise RuntimeError("--rate needs root, to make network namespaces; run as root, or leave out --rate")


@contextlib.contextmanager
def places(size: int, rate: str | None) -> Iterator[list[Place]]:
    """A place for each rank; with a rate everyone is joined to one switch by a link that carries so much each way.

    The switch has a namespace of its own, so that nothing outside sees any of it. All is gone when the block ends.

    Raises:
        RuntimeError: the kernel does not do it; the message is that of the command that failed.
    """
    if rate is None:
        yield [Place(None, LOOPBACK)] * size
        return
    names = [f"gut-fast-{os.getpid()}-{number}" for number in (*range(size), "switch")]
    with _termination_raises(), contextlib.ExitStack() as at_the_end:
        _remove_those_of_the_killed()
        at_the_end.callback(_remove, names)
        for name in names:
            _call("ip", "netns", "add", name)
        *ranks, switch = names
        _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "dev", "bridge", "up")
        for number, name in enumerate(ranks):
            _join(name, switch, number, rate)
        yield [Place(name, INTERFACE) for name in ranks]


def _remove(names: Iterable[str]) -> None:
    """With a namespace goes all that is in it. Some may not be there; a second Ctrl-C waits until all are gone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, *ENDING])
    try:
        for name in names:
            with contextlib.suppress(RuntimeError):
                _call("ip", "netns", "del", name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove_those_of_the_killed() -> None:
    """SIGKILL leaves namespaces behind; they bear the number of the process that made them."""
    found = [path.name for path in NAMESPACES.glob("gut-fast-[0-9]*-*")]
    _remove(name for name in found if not Path("/proc", name.split("-")[2]).exists())


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM, as of ``timeout``, and SIGHUP of a closed terminal end the block as Ctrl-C does; else namespaces would
    stay. Handlers that somebody has set are left alone.
    """
    in_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING if in_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise_exit)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _join(name: str, switch: str, number: int, rate: str) -> None:
    port = f"port{number}"
    _call("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _call("ip", "-n", switch, "link", "set", "dev", port, "master", "bridge", "up")
    _call(
        "ip", "-n", name, "link", "set", "dev", INTERFACE, "addrgenmode", "none"
    )  # or gloo might take the IPv6 address
    _call("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", INTERFACE)
    for interface in (LOOPBACK, INTERFACE):
        _call("ip", "-n", name, "link", "set", "dev", interface, "up")
    for namespace, interface in ((name, INTERFACE), (switch, port)):
        shape = ("tbf", "rate", rate, "burst", str(burst(rate)), "latency", LONGEST_QUEUE)
        _call("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *shape)


def burst(rate: str) -> int:
    """Bytes that may pass at once. Raises ValueError if it is not a rate."""
    matched = RATE.fullmatch(rate)
    if matched is None:
        raise ValueError(f"--rate must be a number with kbit, mbit or gbit, for example 200mbit, got {rate!r}")
    number, unit = matched.groups()
    return max(MIN_BURST, round(float(number) * BITS[unit] * BURST_SECONDS / 8))


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
