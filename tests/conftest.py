"""The fixtures and settings of all tests: one thread, unless a test asks for more, so that they are quick."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver

import pytest
import torch

import ranks
from emulation.build import load
from gut_fast.kernels import ops
from gut_fast.kernels.backends import cpu, cuda

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in its interpreter, on CPU tensors
# A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal, and so do the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Skips tests marked ``gpu`` without a CUDA device; starts the process that the tests' ranks are forked from."""
    if any(getattr(item.module, "ranks", None) for item in items):
        ranks.load_libraries()
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def children():
    """Returns a function that lists the living processes that were started since the test began."""
    before = set(multiprocessing.active_children())
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def tier():
    """Sets the instruction tier of the compiled kernel, and puts it back."""
    before = cpu.tier()
    yield cpu.set_tier
    cpu.set_tier(before)


@pytest.fixture(scope="session")
def emulated_cuda():
    """The CUDA kernels compiled for the CPU: the module and the library that holds the emulated device."""
    return load()


@pytest.fixture
def emulation(emulated_cuda, monkeypatch):
    """Makes the backend "cuda" compute CPU tensors on an emulated device.

    The fixture is a function that sets the device's multiprocessors, the shared memory that a block can have, and the
    seed of the order in which its threads run.
    """
    module, library = emulated_cuda

    def set_device(multiprocessors=2, shared_bytes=232448, seed=0):  # the shared memory of an H100
        library.set_emulation(multiprocessors, shared_bytes, seed)

    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "why_missing", None)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    ops.select_backend.cache_clear()
    set_device()
    yield set_device
    ops.select_backend.cache_clear()


@pytest.fixture
def own_forkserver(monkeypatch):
    """Gives the test its own fork server, whose processes print into this test's output; `ranks` keeps the other."""
    server = forkserver.ForkServer()
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(server, name))
    yield
    server._stop()
