"""Rounding over long runs: which sums a rule keeps, that they stay right, and what is said about them beforehand."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast import analysis, reference
from gut_fast.analysis import RECENTRING
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded
from quadratics import MATCHING, RING, make, same, set_gradients, snapshot, train, values_of
from soak import rules as soak

KEPT = {
    ("d2", ()): [1.0],
    ("gut", (("mu", 1.0),)): [1.0],
    ("gut", (("mu", 1.0), ("kappa", 0.1))): [1.0],
    ("edm", ()): [0.0, 1.0],
    ("extra", ()): [1.0],
    ("k_gt", ()): [1.0, 0.0],
    ("gutm", (("mu", 1.0),)): [0.0, 1.0],
    ("gradient_tracking", ()): [1.0, -1.0],
    ("momentum_tracking", ()): [1.0, -1.0],
    ("momentum_tracking", (("momentum", 0.0),)): [1.0, -1.0],
}
"""The sums over agents that rules keep, as weights of their states."""


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_forget_keep_no_sum(rule):
    expected = 1 if (rule, ()) in KEPT else 0
    assert len(analysis.conserved(rule, {})[0]) == expected


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_sums_that_rules_keep(case):
    rule, hyperparameters = case
    (sums,), stays = analysis.conserved(rule, dict(hyperparameters))
    expected = np.array(KEPT[case]) / np.linalg.norm(KEPT[case])
    assert np.allclose(sums * np.sign(sums @ expected), expected)
    assert np.allclose(sums @ stays, 1.0)


def test_a_state_that_nothing_changes_is_no_sum_to_be_kept_right():
    def formula(lr):
        return gf.Coefficients(A=[[1, 0, -lr]], B=[[0, 0, 0], [0, 1, 0]], C=[[1], [0]], E=[[1], [0]])

    anchored = gf.UpdateRule("anchored", ("anchor",), formula)
    assert len(analysis.conserved(anchored, {})[0]) == 0


KEEPERS = reference.KEPT


def sums_of(params, optimizer):
    """The sums over agents that the rule keeps, one for each parameter, and the size of what is summed up."""
    first, second = KEEPERS[optimizer.rule.name]
    for parameter in params:
        state = optimizer.state[parameter]
        kept = state[first].double() - (0 if second is None else state[second].double())
        yield kept.sum(0), state[first].double().abs().sum()


def disturb(params, optimizer):
    """Adds to one agent's state what rounding might have added in a long time."""
    first, _ = KEEPERS[optimizer.rule.name]
    for parameter in params:
        optimizer.state[parameter][first][0] += 0.01


@pytest.mark.parametrize("rule", KEEPERS)
@pytest.mark.parametrize("topology", [RING, MATCHING], ids=str)
def test_steps_make_kept_sums_zero_again(rule, topology):
    params, optimizer = make(gf.GossipOptimizer, rule=rule, topology=topology, dtype=torch.float32, split=1)
    train(params, optimizer, range(RECENTRING - 1))
    disturb(params, optimizer)
    train(params, optimizer, range(RECENTRING - 1, RECENTRING))
    assert all((total.abs() > 0.009).all() for total, _ in sums_of(params, optimizer))
    train(params, optimizer, range(RECENTRING, RECENTRING + 1))
    assert all((total.abs() < 1e-6 * size).all() for total, size in sums_of(params, optimizer))


@pytest.mark.parametrize("rule", KEEPERS)
def test_recentring_takes_the_same_from_every_agent_and_nothing_from_the_rest(rule):
    params, optimizer = make(gf.GossipOptimizer, rule=rule)
    train(params, optimizer, range(5))
    before = [optimizer.state[p].copy() for p in params]
    before = copy.deepcopy(before)
    disturb(params, optimizer)
    optimizer.recentre()
    first, second = KEEPERS[rule]
    for parameter, earlier in zip(params, before, strict=True):
        state = optimizer.state[parameter]
        moved = state[first] - earlier[first]
        moved[0] -= 0.01
        assert torch.allclose(moved, torch.full_like(moved, -0.01 / 6), atol=1e-12)
        assert second is None or torch.equal(state[second], earlier[second])


@pytest.mark.parametrize("rule", sorted(RULES.keys() - KEEPERS))
def test_recentring_leaves_rules_that_forget_alone(rule):
    params, optimizer = make(gf.GossipOptimizer, rule=rule)
    train(params, optimizer, range(3))
    before = snapshot(params, optimizer)
    optimizer.recentre()
    assert same(snapshot(params, optimizer), before)


def test_where_mixing_changes_the_mean_there_is_nothing_to_keep():
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        directed = gf.topology.from_matrix([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.9, 0.0, 0.1]]).lazy(0.5)
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    optimizer = gf.D2(params, lr=0.1, topology=directed)
    optimizer.state[params[0]]["r"][0] = 1.0
    optimizer.recentre()
    assert optimizer.state[params[0]]["r"].sum() == 2.0


@pytest.mark.parametrize("steps", [RECENTRING - 1, RECENTRING, RECENTRING + 1])
def test_a_checkpoint_beside_a_recentring_continues_bit_for_bit(steps):
    params, optimizer = make(gf.D2, dtype=torch.float32)
    train(params, optimizer, range(steps))
    twins, twin = make(gf.D2, dtype=torch.float32)
    for own, value in zip(twins, params, strict=True):
        own.data.copy_(value.data)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((params, optimizer), (twins, twin)):
        train(*each, range(steps, steps + 5))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def test_compiled_steps_recentre_where_plain_ones_do():
    results = []
    for is_compiled in (False, True):
        params, optimizer = make(gf.D2, dtype=torch.float32)
        train(params, optimizer, range(RECENTRING))
        disturb(params, optimizer)
        step = torch.compile(lambda one=optimizer: one.step(), backend="eager") if is_compiled else optimizer.step
        for number in range(RECENTRING, RECENTRING + 3):
            set_gradients(params, number)
            step()
        results.append((values_of(params), [optimizer.state[p]["r"] for p in params], optimizer.num_steps))
    assert same(*results)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_backends_agree_over_recentrings(backend):
    exact, close = make(gf.D2), make(gf.D2, backend=backend, dtype=torch.float64)
    for each in (exact, close):
        train(*each, range(2 * RECENTRING + 3))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(exact[0], close[0], strict=True))


@pytest.mark.parametrize("rule", KEEPERS)
def test_steps_and_recentrings_are_those_of_the_reference(rule):
    params, optimizer = make(gf.GossipOptimizer, rule=rule)
    z, state = params[0].detach().clone(), reference.zero_state(rule, params[0].detach())
    for number in range(RECENTRING + 20):
        set_gradients(params, number)
        if number == 50:
            disturb(params[:1], optimizer)
            state[KEEPERS[rule][0]][0] += 0.01
        if number == RECENTRING:
            state = reference.recentred(rule, state)
        z, state = reference.step(rule, {"lr": 0.1}, z, state, params[0].grad, RING.matrix())
        optimizer.step()
    assert torch.allclose(params[0], z, rtol=0, atol=1e-11)
    assert all(torch.allclose(optimizer.state[params[0]][name], state[name], rtol=0, atol=1e-10) for name in state)


def recentred_on_ranks(rank, size, rule, has_dimension):
    """Disturbs the state of agent 0, makes the sums zero again on all ranks, and returns what is summed up of each."""
    parameters = [seeded(2 * size, *shape, seed=k, dtype=torch.float32) for k, shape in enumerate(((3, 5), (4,), ()))]
    agents = slice(2 * rank, 2 * rank + 2) if has_dimension else slice(rank, rank + 1)
    own = [nn.Parameter(p[agents].clone() if has_dimension else p[rank].clone()) for p in parameters]
    topology = gf.topology.ring(2 * size if has_dimension else size)
    options = {"agents_per_rank": 2 if has_dimension else None, "process_group": dist.group.WORLD}
    optimizer = gf.GossipOptimizer(own, rule, lr=0.1, topology=topology, shared_memory=False, **options)
    for _ in range(3):
        for parameter in own:
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    first, second = KEEPERS[rule]
    if rank == 0:
        for parameter in own:
            optimizer.state[parameter][first].view(agents.stop - agents.start, -1)[0] += 0.5
    optimizer.recentre()
    rows = []
    for parameter in own:
        state = optimizer.state[parameter]
        kept = state[first] - (0 if second is None else state[second])
        rows.append(kept.view(agents.stop - agents.start, -1).double())
    return rows


@pytest.mark.parametrize("rule", KEEPERS)
@pytest.mark.parametrize("has_dimension", [False, True])
def test_ranks_make_kept_sums_zero_together(rule, has_dimension):
    outcomes = ranks.run(3, recentred_on_ranks, rule, has_dimension)
    for parts in zip(*outcomes, strict=True):
        rows = torch.cat(parts)
        assert (rows.sum(0).abs() < 1e-5).all()
        assert (rows.abs().sum(0) > 0.01).all()  # of agents that differ


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", KEEPERS)
def test_rules_without_a_leak_refuse_half_width_state(rule, dtype):
    for options in ({"dtype": torch.float32, "state_dtype": dtype}, {"dtype": dtype}):
        with pytest.raises(ValueError, match=r"never forgets.*for ever .*use state_dtype=torch.float32"):
            make(gf.GossipOptimizer, rule=rule, **options)
    make(gf.GossipOptimizer, rule=rule, dtype=dtype, state_dtype=torch.float32)


def test_mu_of_one_is_refused_with_half_width_state_whenever_it_comes():
    params, optimizer = make(gf.GUT, dtype=torch.float32, state_dtype=torch.bfloat16)
    train(params, optimizer, range(3))
    before = values_of(params)
    optimizer.param_groups[0]["mu"] = 1.0
    set_gradients(params, 3)
    with pytest.raises(ValueError, match="never forgets at mu=1"):
        optimizer.step()
    assert same(values_of(params), before)


def test_the_estimate_is_what_independent_rounding_errors_do():
    """A rule in float64, each of whose states is disturbed by errors of float32's size at every step."""
    eps, steps, columns = torch.finfo(torch.float32).eps, 300, 400
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(6, columns, dtype=torch.float64))
    optimizer = gf.GradientTracking([parameter], lr=0.1, topology=RING)
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for value in optimizer.state[parameter].values():
            value += eps * (torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5)
    expected = analysis.rounding("gradient_tracking", {"lr": 0.1}, RING, 0.0, steps=steps).average
    assert float(parameter.detach().mean(0).square().mean().sqrt()) == pytest.approx(expected, rel=0.2)


def test_predictions_say_what_rounding_will_do():
    values = {"lr": 0.1}
    kept = analysis.predict("d2", values, RING).rounding
    assert kept.warning is None
    assert kept.average < kept.on_flat < 1e-3
    half = analysis.predict("d2", values, RING, state_dtype=torch.bfloat16).rounding
    assert half.on_flat == pytest.approx(kept.on_flat * 2**16)
    assert "use state_dtype=torch.float32" in half.warning
    walking = analysis.rounding("gutm", {**values, "mu": 1.0}, RING, is_recentred=False)
    assert "use all agents in one process, or a rule that forgets" in walking.warning
    assert walking.on_flat > 100 * analysis.rounding("gutm", {**values, "mu": 1.0}, RING).on_flat


@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_steps_of_every_rule_stay_beside_float64(steps):
    lines = []
    assert soak.soak(steps, lines.append) == 0, "\n".join(lines)


def test_the_soak_finds_a_walk(monkeypatch):
    monkeypatch.setattr(gf.GossipOptimizer, "_recentre_if_due", lambda _: None)
    lines = []
    monkeypatch.setattr(soak, "CASES", [("d2", {})])
    assert soak.soak(4000, lines.append) == 2, "\n".join(lines)
