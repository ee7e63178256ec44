"""A child forked from a process that has threads: no small work starts torch's threads, which the child lacks."""

import multiprocessing
import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, sys
import torch
import gut_fast as gf

def train():
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    for optimizer in (
        gf.GUT([p], lr=0.1, mu=0.5, topology=gf.topology.ring(4), backend=sys.argv[1]),
        gf.Gossip(torch.optim.Adam([p], lr=0.1), topology=gf.topology.exponential(4), backend=sys.argv[1]),
    ):
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()

torch.set_num_threads(2)
torch.ones(2_000_000).add_(1)  # torch's threads are there
train()
child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join(30)
code = child.exitcode
child.kill()
sys.exit("the child hangs" if code is None else code)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_optimizer_is_made_and_stepped_in_a_forked_child(backend):
    done = subprocess.run([sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
