"""A child forked from a process whose OpenMP threads are there: it makes and steps everything, and does not hang."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from gut_fast.kernels import let_threads_go

SCRIPT = """
import faulthandler, multiprocessing, os, sys
import torch
import gut_fast as gf
from gut_fast.kernels import let_threads_go

RING = gf.topology.ring(4)
INPUTS, TARGETS = torch.randn(64, 16), torch.arange(64) % 4
OPTIMIZERS = [
    getattr(gf, name)
    for name in gf.__all__
    if isinstance(getattr(gf, name), type) and issubclass(getattr(gf, name), torch.optim.Optimizer)
    if name not in ("Gossip", "GossipOptimizer")
]

def train(make, size):
    parameter = torch.nn.Parameter(torch.zeros(4, size))
    parameter.grad = torch.ones(4, size)
    optimizer = make([parameter])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    gf.clip_grad_norm_per_agent_([parameter], 1.0)
    assert parameter.any()

def optimizers(size):
    for cls in OPTIMIZERS:
        for backend in ("auto", "torch"):
            train(lambda parameters: cls(parameters, lr=0.01, topology=RING, backend=backend), size)
    train(lambda parameters: gf.GossipOptimizer(parameters, "gut", lr=0.01, topology=RING), size)

def gossip(size):
    for inner in (torch.optim.SGD, torch.optim.Adam):
        for graph in (RING, gf.topology.exponential(4), gf.topology.random_matching(4, 1)):
            train(lambda parameters: gf.Gossip(inner(parameters, lr=0.01), topology=graph), size)

def simulators(engine):
    def optimizer(parameters):
        return gf.GUT(parameters, lr=0.1, mu=0.5, topology=RING)
    parts, samples = [torch.arange(agent, 64, 4) for agent in range(4)], (INPUTS, TARGETS)
    model = gf.models.mlp(16, [8], 4)
    settings = {"data": samples, "test_data": samples, "parts": parts, "batch_size": 4, "engine": engine}
    simulator = gf.Simulator(model, RING, optimizer=optimizer, **settings)
    simulator.run(20, progress=False)
    assert simulator.history[-1]["step"] == 20
    gf.consolidate(simulator.stacked)

def stacks(width):
    agents = gf.stack(gf.models.mlp(64, [width], 10), 4, init="different")
    agents(torch.randn(4, 128, 64)).sum().backward()
    gf.consensus_error(agents.parameters())

def everything(sizes):
    for size in sizes:
        optimizers(size)
        gossip(size)
        stacks(5 * size)
    for engine in ("loop", "vmap", "workers", "auto"):
        simulators(engine)

def use_threads():
    torch.ones(2_000_000).add_(1)
    torch.randn(300, 300) @ torch.randn(300, 300)

def child_of_threads(sizes):
    faulthandler.dump_traceback_later(60, exit=True)  # says where it hangs
    everything(sizes)
    os._exit(0)

torch.set_num_threads(2)
use_threads()
sizes = (3, 10_000) if let_threads_go() else (3,)
everything(sizes)  # what is loaded late is loaded here
use_threads()
child = multiprocessing.get_context("fork").Process(target=child_of_threads, args=(sizes,))
child.start()
child.join()
use_threads()
sys.exit(child.exitcode)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_makes_and_steps_everything():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


PARALLEL = """
import multiprocessing, os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's library ends its threads at a fork too
import torch
from gut_fast.kernels import let_threads_go

def threads():
    return len(os.listdir("/proc/self/task"))

def add(numbers):
    alone = threads()
    numbers.add_(1)
    os._exit(threads() - alone)  # the child has threads of its own

torch.set_num_threads(2)
alone = threads()
numbers = torch.ones(2_000_000)
numbers.add_(1)
assert threads() == alone + 1
child = multiprocessing.get_context("fork").Process(target=add, args=(numbers,))
child.start()
assert threads() == alone
child.join(60)
numbers.add_(1)
assert torch.equal(numbers[:3], torch.full((3,), 3.0))
assert threads() == alone + 1
print(child.exitcode)
child.kill()
"""


@pytest.mark.skipif(not (let_threads_go() and Path("/proc/self/task").exists()), reason="OpenMP keeps its threads")
def test_threads_end_before_a_fork_and_both_processes_make_their_own():
    done = subprocess.run([sys.executable, "-c", PARALLEL], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
