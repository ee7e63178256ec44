"""The end of a process whose gloo threads still have to let go of tensors."""

import subprocess
import sys

SCRIPT = """
import os
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import time, torch, torch.distributed as dist
import gut_fast
from gut_fast.distributed import gloo_threads

assert gloo_threads.settle()  # there is nothing to wait for
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(20)]
del works
for _ in range(1000):  # a thread takes its name when it first runs
    if gloo_threads._runs():
        break
    time.sleep(0.01)
assert gloo_threads._runs(), "no thread of gloo was found"
assert gloo_threads.settle()
print("settled")
world = dist.group.WORLD  # keeps the threads until the interpreter is finalized
"""


def test_gloo_threads_are_waited_for():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "settled\n"), done.stderr


LAST_WORK = """
import ctypes, os, sys
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import torch, torch.distributed as dist
import gut_fast

torch.set_num_threads(1)
for _ in range(int(sys.argv[1])):
    if not (child := os.fork()):
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"exit code {code}"
else:
    sys.exit()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = dist.group.WORLD  # keeps the group until the interpreter is finalized

# The last work is done while this thread holds the interpreter's lock, and only gloo's thread owns it.
sys.setswitchinterval(100)
dist.all_reduce(torch.ones(1000), async_op=True)
ctypes.PyDLL(None).usleep(50_000)
"""


def test_a_process_whose_thread_still_owns_the_last_work_ends_cleanly_20_times():
    command = [sys.executable, "-c", LAST_WORK, "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
