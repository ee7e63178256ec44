"""Local steps: rounds against the reference, on any topology, with any inner optimizer, across ranks."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

import gut_fast as gf
import ranks
from gut_fast import reference
from gut_fast.distributed import MismatchError
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded
from quadratics import MATCHING, RING, make, refused, same, set_gradients, train, values_of


def by_name(rule, **options):
    return make(functools.partial(gf.GossipOptimizer, rule=rule), **options)


def follow_reference(params, optimizer, num_steps, scheduler=None, local_steps_at=None):
    """Trains with the optimizer and with the reference's steps and local steps; they must agree."""
    rule, topology = optimizer.rule, optimizer.topology
    z = [value.clone() for value in values_of(params)]
    state = [reference.zero_state(rule, value) for value in z]
    rates, rounds, before = [], 0, 0.0
    for step in range(num_steps):
        optimizer.local_steps = (local_steps_at or {}).get(step, optimizer.local_steps)
        set_gradients(params, step)
        group = optimizer.param_groups[0]
        settings = {key: group[key] for key in ("lr", "weight_decay", "maximize", *rule.hyperparameters)}
        rates.append(settings["lr"])
        if len(rates) < optimizer.local_steps:
            settings["is_local"] = True
        else:
            before = max(sum(rates) / len(rates), group["drift_memory"] ** len(rates) * before)
            settings["drift_lr"] = len(rates) * before
        W = topology.matrix(rounds)
        for k, p in enumerate(params):
            z[k], state[k] = reference.step(rule, settings, z[k], state[k], p.grad, W)
        optimizer.step()
        if "is_local" not in settings:
            rates, rounds = [], rounds + 1
        if scheduler is not None:
            scheduler.step()
        assert (optimizer.num_steps, optimizer.num_rounds) == (step + 1, rounds)
    for k, p in enumerate(params):
        torch.testing.assert_close(p.detach(), z[k], rtol=1e-10, atol=1e-10)
        for name in rule.states:
            torch.testing.assert_close(optimizer.state[p][name], state[k][name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rule", RULES)
def test_rounds_follow_the_reference(rule, backend):
    follow_reference(*by_name(rule, lr=0.05, local_steps=3, backend=backend, weight_decay=0.01), 20)


@pytest.mark.parametrize("drift_memory", [0.0, 0.9])
@pytest.mark.parametrize("rule", ["gut", "gutm", "qg_dsgdm", "k_gt"])
def test_rounds_of_any_schedule_follow_the_reference(rule, drift_memory):
    params, optimizer = by_name(rule, lr=0.05, local_steps=4, drift_memory=drift_memory)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=1e-4)
    follow_reference(params, optimizer, 30, scheduler, local_steps_at={9: 2, 15: 7})


@pytest.mark.filterwarnings("ignore:.* unstable on")
def test_a_topology_that_varies_advances_once_a_round():
    follow_reference(*make(topology=MATCHING, local_steps=3), 20)
    follow_reference(*make(topology=gf.topology.one_peer_exponential(6), local_steps=2, kappa=0.2), 20)


def test_nothing_is_mixed_before_the_end_of_a_round():
    params, optimizer = make(gf.DSGD, local_steps=5)
    alone, sgd = make(gf.DSGD, topology=gf.topology.sequence([RING.lazy(1e-300)]))
    for step in range(4):
        set_gradients(params, step)
        set_gradients(alone, step)
        optimizer.step()
        sgd.step()
    assert same(values_of(params), values_of(alone))
    assert optimizer.num_rounds == 0


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_moves_as_on_one_agent_with_the_mean_gradient(rule):
    """The gradients do not depend on the models, so that their mean is known."""
    params, optimizer = by_name(rule, local_steps=3)
    one = [nn.Parameter(value.mean(0, keepdim=True).clone()) for value in values_of(params)]
    single = gf.GossipOptimizer(one, rule, lr=0.1, topology=gf.topology.complete(1), local_steps=3)
    for step in range(12):
        for k, (p, mean) in enumerate(zip(params, one, strict=True)):
            p.grad = seeded(*p.shape, seed=100 * step + k)
            mean.grad = p.grad.mean(0, keepdim=True)
        optimizer.step()
        single.step()
    for p, mean in zip(params, one, strict=True):
        torch.testing.assert_close(p.detach().mean(0, keepdim=True), mean.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_a_run_goes_on_within_a_round_bit_for_bit(stop):
    params, optimizer = make(topology=MATCHING, local_steps=3, kappa=0.3)
    train(params, optimizer, range(stop))
    saved, values = copy.deepcopy(optimizer.state_dict()), [value.clone() for value in values_of(params)]
    train(params, optimizer, range(stop, 20))
    others, other = make(topology=MATCHING, local_steps=3, kappa=0.3)
    for p, value in zip(others, values, strict=True):
        p.data.copy_(value)
    other.load_state_dict(saved)
    train(others, other, range(stop, 20))
    assert same(values_of(others), values_of(params))
    assert same(other.state_dict(), optimizer.state_dict())


def test_copies_go_on_within_a_round():
    params, optimizer = make(local_steps=4)
    train(params, optimizer, range(5))
    others, other = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(5, 10))
    train(others, other, range(5, 10))
    assert same(values_of(others), values_of(params))
    assert other.local_steps == 4


def test_states_without_rounds_are_loaded_as_without_local_steps():
    params, optimizer = make()
    train(params, optimizer, range(5))
    saved = optimizer.state_dict()
    for key in ("round", "local_before"):
        del saved[key]
    for group in saved["param_groups"]:
        del group["round_lr"], group["kappa"]
    _, other = make()
    other.load_state_dict(saved)
    assert (other.num_steps, other.num_rounds) == (5, 5)
    assert other.param_groups[0]["kappa"] == 1.0


@pytest.mark.parametrize("key", ["round", "local_before"])
@pytest.mark.parametrize("value", [-1, True, 1.5, "many", 2**63])
def test_counts_that_are_none_are_refused(key, value):
    params, optimizer = make()
    saved = optimizer.state_dict()
    with refused(params, optimizer, ValueError, f"{key} count must be an integer >= 0"):
        optimizer.load_state_dict({**saved, key: value})


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_an_inner_optimizer_moves_in_every_step(inner):
    params, optimizer = make(
        lambda groups, lr, topology: gf.Gossip(inner(groups, lr=lr), topology=topology, local_steps=3)
    )
    expected, plain = make(local_steps=3)
    train(params, optimizer, range(9))
    train(expected, plain, range(9))
    assert optimizer.num_rounds == 3
    if inner is torch.optim.SGD:
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-12)
    else:
        assert all(int(optimizer.inner.state[p]["step"]) == 9 for p in params)


def test_bad_numbers_of_local_steps_are_refused():
    for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("many", TypeError)):
        with pytest.raises(error, match="local_steps"):
            make(local_steps=value)
        _, optimizer = make()
        with pytest.raises(error, match="local_steps"):
            optimizer.local_steps = value
        assert optimizer.local_steps == 1
    with pytest.raises(ValueError, match="capturable=True with local_steps=2"):
        make(local_steps=2, capturable=True)
    _, optimizer = make(capturable=True)
    with pytest.raises(ValueError, match="capturable=True with local_steps=2"):
        optimizer.local_steps = 2


def test_compiled_steps_are_refused():
    params, optimizer = make(local_steps=2)
    set_gradients(params, 0)
    with pytest.raises(Exception, match="with local_steps, leave step"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_the_simulator_counts_the_bytes_of_rounds():
    data = (seeded(60, 4, seed=1, dtype=torch.float32), torch.arange(60) % 3)
    parts = list(torch.arange(60).view(6, 10))

    def sent(local_steps):
        simulator = gf.Simulator(
            nn.Linear(4, 3),
            RING,
            optimizer=lambda p: gf.GUT(p, lr=0.1, topology=RING, local_steps=local_steps),
            data=data,
            parts=parts,
            batch_size=2,
            engine="loop",
        )
        simulator.run(steps=8)
        return simulator.bytes_sent.tolist()

    assert sent(1) == [8 * 2 * 15 * 4] * 6
    assert sent(4) == [2 * 2 * 15 * 4] * 6


# Across ranks


def rank_run(rank, size, rule, graph, overlap, local_steps):
    parameters = [
        nn.Parameter(seeded(size, *shape, seed=k, dtype=torch.float32)[rank]) for k, shape in enumerate(((9, 4), (7,)))
    ]
    where = {"topology": graph, "process_group": dist.group.WORLD, "bucket_bytes": 60, "overlap": overlap}
    optimizer = gf.GossipOptimizer(parameters, rule, lr=0.05, local_steps=local_steps, **where)
    for _ in range(11):
        optimizer.zero_grad()
        sum(
            ((p - seeded(size, *p.shape, seed=50 + k, dtype=torch.float32)[rank]) ** 2).sum()
            for k, p in enumerate(parameters)
        ).backward()
        optimizer.step()
    return [p.detach() for p in parameters], optimizer.bytes_sent, optimizer.overlap, optimizer.num_rounds


def stacked_run(size, rule, graph, local_steps):
    parameters = [
        nn.Parameter(seeded(size, *shape, seed=k, dtype=torch.float32)) for k, shape in enumerate(((9, 4), (7,)))
    ]
    optimizer = gf.GossipOptimizer(parameters, rule, lr=0.05, topology=graph, local_steps=local_steps)
    for _ in range(11):
        optimizer.zero_grad()
        sum(
            ((p - seeded(*p.shape, seed=50 + k, dtype=torch.float32)) ** 2).sum() for k, p in enumerate(parameters)
        ).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize(
    ("rule", "graph", "overlap"),
    [
        ("gut", gf.topology.ring(3), True),
        ("gutm", gf.topology.ring(3), False),
        ("k_gt", gf.topology.random_matching(4, seed=1), True),
        ("gasloc", gf.topology.one_peer_exponential(4), False),
    ],
    ids=str,
)
def test_ranks_give_the_stacked_numbers_of_rounds(rule, graph, overlap):
    size = graph.num_agents
    expected = stacked_run(size, rule, graph, 3)
    outcomes = ranks.run(size, rank_run, rule, graph, overlap, 3)
    every_step = ranks.run(size, rank_run, rule, graph, overlap, 1)
    for rank, (values, sent, said, rounds) in enumerate(outcomes):
        assert all(torch.equal(own, whole[rank]) for own, whole in zip(values, expected, strict=True))
        assert said == ("on" if overlap else "off")
        assert rounds == 3
        if graph.is_static:
            assert {way: 11 * count for way, count in sent.items()} == {
                way: 3 * count for way, count in every_step[rank][1].items()
            }


def disagreeing(rank, size):
    with pytest.raises(MismatchError, match=r"differ in their local_steps: 3 on ranks \[0\]; 2 on ranks \[1\]"):
        gf.GUT(
            [nn.Parameter(torch.zeros(3))],
            0.1,
            topology=gf.topology.complete(2),
            process_group=dist.group.WORLD,
            local_steps=3 - rank,
        )
    return True


def test_ranks_agree_on_local_steps():
    assert ranks.run(2, disagreeing) == [True, True]
