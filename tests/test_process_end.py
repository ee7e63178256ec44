"""The end of a process whose gloo threads still have to let go of tensors."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

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


RUNS = """
import os, runpy, sys
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import json, sklearn.datasets, torch, torch._dynamo, torch.distributed
import gut_fast

ports, *sys.argv = sys.argv[1:]
torch.set_num_threads(1)
codes = []
for run, port in enumerate(ports.split()):
    ranks = []
    for rank in range(2):
        if not (child := os.fork()):
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
            where |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({name: str(value) for name, value in where.items()})
            sys.argv = [each.replace("RUN", str(run)) for each in sys.argv]
            sys.stdout = open(os.devnull, "w")
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit()  # the interpreter ends as after any script
        ranks.append(child)
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
print(json.dumps(codes))
"""

PLAIN = """
import torch, torch.distributed as dist
import gut_fast as gf

dist.init_process_group("gloo")
parameter = torch.nn.Parameter(torch.zeros(1000))
ring = gf.topology.ring(dist.get_world_size())
optimizer = gf.GUT([parameter], 0.1, 0.5, topology=ring, process_group=dist.group.WORLD)
for _ in range(20):
    parameter.grad = parameter.detach() - dist.get_rank()
    optimizer.step()
dist.all_reduce(torch.ones(1000))
dist.destroy_process_group()
"""

ENDINGS = int(os.environ.get("ENDINGS", "3"))
"""How often two ranks run a script to its end; ``make soak`` has them do so 20 times."""

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "distributed.py")


@contextlib.contextmanager
def load():
    """Two busy loops beside what is tested."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def exit_codes(runs, script, *arguments):
    """Returns the exit codes, and what was said, of two ranks that run a script so many times, under load."""
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in range(runs)]
    ports = " ".join(str(store.port) for store in stores)
    command = [sys.executable, "-c", RUNS, ports, script, *arguments]
    with load():
        done = subprocess.run(command, capture_output=True, text=True, timeout=180 + 30 * runs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_example_ends_cleanly_each_time_on_a_busy_machine(tmp_path):
    codes, said = exit_codes(ENDINGS, EXAMPLE, "--steps", "60", "--folder", str(tmp_path / "RUN"))
    assert codes == [0, 0] * ENDINGS, said


@pytest.mark.slow
def test_a_plain_script_ends_cleanly_each_time_on_a_busy_machine(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    codes, said = exit_codes(ENDINGS, str(script))
    assert codes == [0, 0] * ENDINGS, said
