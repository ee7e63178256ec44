"""What all tests share: one thread, unless a test asks for more, so that they are quick on a busy machine."""

import os
import signal
from multiprocessing import forkserver

import pytest
import torch

import ranks

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in its interpreter, on CPU tensors
# A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal, and so do the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` need a CUDA device; those across ranks a process that these are forked from."""
    if any(getattr(item.module, "ranks", None) for item in items):
        ranks.load_libraries()
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def own_forkserver(monkeypatch):
    """Processes are forked from one that prints where this test's output goes; that of `ranks` lives on."""
    server = forkserver.ForkServer()
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(server, name))
    yield
    server._stop()
