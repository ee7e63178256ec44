"""What all tests share: one thread, unless a test asks for more, so that they are quick on a busy machine."""

import os
import signal

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in its interpreter, on CPU tensors
# A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal, and so do the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
