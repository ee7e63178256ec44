"""Quadratics on which the tests train optimizers, and what a run leaves behind."""

import contextlib

import pytest
import torch

import gut_fast as gf
from gut_fast.verify.lockstep import seeded

RING = gf.topology.ring(6)
MATCHING = gf.topology.random_matching(6, seed=3)
SHAPES = ((3, 5), (5,), ())


def parameters(dtype=torch.float64, num_agents=6, shapes=SHAPES):
    return [torch.nn.Parameter(seeded(num_agents, *shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]


def make(cls=gf.GUT, topology=RING, dtype=torch.float64, split=None, **options):
    """Returns parameters and an optimizer with lr = 0.1; `split` makes two groups of them."""
    params = parameters(dtype)
    groups = params if split is None else [{"params": params[:split]}, {"params": params[split:]}]
    return params, cls(groups, **{"lr": 0.1, "topology": topology, **options})


def set_gradients(params, step):
    """Sets the gradients of quadratics of each agent's own, with noise of this step."""
    for k, p in enumerate(params):
        p.grad = (p.detach() - seeded(*p.shape, seed=50 + k).to(p)) + 0.1 * seeded(*p.shape, seed=1000 * step + k).to(p)


def train(params, optimizer, steps, scheduler=None):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values_of(params):
    return [p.detach() for p in params]


def snapshot(params, optimizer):
    """Copies everything that a failed call must leave as it was."""
    state = {k: {n: t.clone() for n, t in optimizer.state[p].items()} for k, p in enumerate(params)}
    groups = [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]
    return [p.detach().clone() for p in params], state, groups, optimizer.num_steps


def same(a, b):
    """Returns whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@contextlib.contextmanager
def refused(params, optimizer, error, message):
    """The block must raise this error, and leave parameters, state, settings and step count as they were."""
    before = snapshot(params, optimizer)
    with pytest.raises(error, match=message):
        yield
    assert same(snapshot(params, optimizer), before)
