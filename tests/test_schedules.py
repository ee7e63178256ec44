"""Every rule under any schedule of the learning rate, with the drift's own rate that is the default."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gut_fast as gf
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded

STEPS, AGENTS, NUMBERS = 200, 16, 20


def factor(function):
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, function)


SCHEDULES = {
    "cosine with restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "warm-up from zero": factor(lambda step: min(1.0, step / 50)),
    "cuts": factor(lambda step: 1.0 if step < 100 else 0.1 if step < 150 else 0.01),
    "a cut and back": factor(lambda step: 1.0 if step < 100 or step >= 150 else 0.01),
    "almost nothing and back": factor(lambda step: 1.0 if step < 100 or step >= 150 else 1e-6),
    "nothing and back": factor(lambda step: 1.0 if step < 100 or step >= 150 else 0.0),
}


@functools.cache
def end_of(rule, schedule, local_steps, **options):
    """The error of the agents' average at the end, and the largest disagreement on the way, of noisy quadratics."""
    best = seeded(AGENTS, NUMBERS, seed=1, dtype=torch.float32)
    curvature = 0.5 + seeded(AGENTS, NUMBERS, seed=2, dtype=torch.float32).abs()
    z = nn.Parameter(torch.zeros(AGENTS, NUMBERS))
    ring = gf.topology.ring(AGENTS)
    optimizer = gf.GossipOptimizer([z], rule, lr=0.1, topology=ring, local_steps=local_steps, **options)
    scheduler = SCHEDULES[schedule](optimizer) if schedule else None
    largest = 0.0
    for step in range(STEPS):
        noise = 0.3 * seeded(AGENTS, NUMBERS, seed=1000 + step, dtype=torch.float32)
        z.grad = curvature * (z.detach() - best) + noise
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        largest = max(largest, float(gf.consensus_error([z])))
    optimum = (curvature * best).sum(0) / curvature.sum(0)
    return float((z.detach().mean(0) - optimum).norm()), largest


@pytest.mark.slow
@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_no_schedule_makes_agents_fall_apart(rule, schedule, local_steps):
    error, largest = end_of(rule, schedule, local_steps)
    error_of_constant, largest_of_constant = end_of(rule, None, local_steps)
    assert error <= 2.5 * error_of_constant
    assert largest <= 30 * largest_of_constant


DIVIDING = [name for name, rule in RULES.items() if rule.divides_drift]


@pytest.mark.parametrize("rule", [name for name in DIVIDING if name != "k_gt"])
def test_a_rate_that_comes_back_is_what_the_drift_has_a_rate_of_its_own_for(rule):
    """k_gt divides differences of gradients, which are no noise of a tiny rate."""
    _, largest = end_of(rule, "almost nothing and back", 1)
    _, published = end_of(rule, "almost nothing and back", 1, drift_memory=0.0)
    assert published > 1e4 * largest


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("rule", ["gut", "d2", "qg_dsgdm"])
def test_at_a_constant_rate_the_drift_is_divided_by_it_bit_for_bit(rule, local_steps):
    assert end_of(rule, None, local_steps) == end_of(rule, None, local_steps, drift_memory=0.0)
