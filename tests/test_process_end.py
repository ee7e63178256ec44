"""The end of a process whose gloo threads still have to let go of tensors: it ends with exit code 0, every time."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys
import torch, torch.distributed as dist
import gut_fast as gf

torch.set_num_threads(1)
for _ in range(int(sys.argv[2])):
    if not (child := os.fork()):
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"exit code {code}"
else:
    sys.exit()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = dist.group.WORLD  # keeps the group until the interpreter is finalized
agents = gf.stack(torch.nn.Linear(3, 2), 4)
optimizer = gf.GUT(agents.parameters(), lr=0.1, topology=gf.topology.ring(4), process_group=world, agents_per_rank=4)
agents(torch.ones(5, 3)).sum().backward()
optimizer.step()
gf.consolidate(agents, optimizer)

# The last work is finished while this thread holds the interpreter's lock, and only gloo's thread owns it.
sys.setswitchinterval(100)
if sys.argv[1] == "ours":
    optimizer.group._channel.all_reduce(torch.ones(1000))
else:
    dist.all_reduce(torch.ones(1000), async_op=True)
ctypes.PyDLL(None).usleep(50_000)
"""


@pytest.mark.parametrize("group", ["ours", "the user's"])
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_threads_let_go_of_the_last_work_before_the_interpreter_ends(group, times):
    command = [sys.executable, "-c", SCRIPT, group, str(times)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
