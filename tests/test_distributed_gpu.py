"""Agents on several ranks whose parameters are on a GPU: gloo through pinned buffers, NCCL with one rank."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.verify.lockstep import seeded

pytestmark = pytest.mark.gpu


def train(rank, size, backend, rule, k, overlap):
    """Parameters of the agents here after some steps, all ranks on one GPU."""
    group = dist.new_group(backend=backend)
    shape = (k, 300) if k > 1 else (300,)
    parameter = nn.Parameter(
        seeded(k * size, 300, seed=1, dtype=torch.float32)[rank * k : rank * k + k].view(shape).cuda()
    )
    goal = seeded(k * size, 300, seed=2, dtype=torch.float32)[rank * k : rank * k + k].view(shape).cuda()
    optimizer = gf.GossipOptimizer(
        [parameter],
        rule,
        lr=0.05,
        topology=gf.topology.ring(k * size),
        process_group=group,
        agents_per_rank=k if k > 1 else None,
        overlap=overlap,
        timeout=20.0,
    )
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * (parameter - goal).square()).sum().backward()
        optimizer.step()
    return parameter.detach().view(k, 300).cpu(), copy.deepcopy(optimizer.overlap)


def stacked(rule, n):
    parameter = nn.Parameter(seeded(n, 300, seed=1, dtype=torch.float32).cuda())
    goal = seeded(n, 300, seed=2, dtype=torch.float32).cuda()
    optimizer = gf.GossipOptimizer([parameter], rule, lr=0.05, topology=gf.topology.ring(n))
    for _ in range(30):
        parameter.grad = parameter.detach() - goal
        optimizer.step()
    return parameter.detach().cpu()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("size", "k"), [(1, 4), (2, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("rule", ["gut", "gradient_tracking"])
def test_gloo_gives_the_stacked_numbers(rule, size, k, overlap):
    rows = [outcome for outcome, _ in ranks.run(size, train, "gloo", rule, k, overlap, limit=120)]
    assert torch.equal(torch.cat(rows), stacked(rule, size * k))


@pytest.mark.parametrize("rule", ["gut", "gradient_tracking"])
def test_nccl_serves_one_rank(rule):
    [(rows, _)] = ranks.run(1, train, "nccl", rule, 4, False, limit=120)
    assert torch.equal(rows, stacked(rule, 4))


@pytest.mark.parametrize("rule", ["gut"])
def test_nccl_serves_a_gpu_for_each_rank(rule):
    size = torch.cuda.device_count()
    if size < 2:
        pytest.skip("NCCL needs a GPU for each rank")
    rows = [outcome for outcome, _ in ranks.run(size, train_on_own, rule, limit=120)]
    assert torch.equal(torch.cat(rows), stacked(rule, size))


def train_on_own(rank, size, rule):
    torch.cuda.set_device(rank)
    return train(rank, size, "nccl", rule, 1, True)
