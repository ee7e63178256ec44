"""Mixed second moments across ranks: the numbers of the stacked run, bit for bit, however messages travel."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, MismatchError, PeerError, rejoin
from gut_fast.verify.lockstep import seeded
from quadratics import same

SHAPES = [(5, 3), (7,), (), (33, 4)]


def parameters_of(n, agents, is_stacked, dtype=torch.float32):
    """The parameters of these agents of n."""
    whole = [seeded(n, *shape, seed=k, dtype=dtype)[agents] for k, shape in enumerate(SHAPES)]
    return [nn.Parameter((rows if is_stacked else rows[0]).clone()) for rows in whole]


def make(parameters, **options):
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.003}]
    given = {"mix_state": ("exp_avg_sq",), "rule": "gut", **options}
    return gf.Gossip(torch.optim.AdamW(groups, lr=0.01), **given)


def set_gradients(parameters, n, agents, step):
    """Sets gradients of quadratics of the agents' own; the first parameter has none before step 3, others now and then.

    All numbers of an agent are the same, whoever else is here.
    """
    for k, parameter in enumerate(parameters):
        rows = parameter.detach().reshape(len(agents), -1)
        best = seeded(n, rows.shape[1], seed=50 + k, dtype=torch.float32)[agents]
        noise = 0.3 * seeded(n, 1, seed=1000 + step, dtype=torch.float32)[agents]
        has_none = step < 3 if k == 0 else (k + step) % 7 == 0
        parameter.grad = None if has_none else (rows - best + noise).to(rows.dtype).reshape(parameter.shape)


def train(parameters, optimizer, n, agents, steps):
    for step in steps:
        set_gradients(parameters, n, agents, step)
        optimizer.step()


def values_of(parameters, optimizer):
    states = optimizer.inner.state
    mixed = [states[p][name].clone() for name in optimizer.mix_state for p in parameters if name in states.get(p, {})]
    return [*(p.detach().clone() for p in parameters), *mixed]


CASES = {
    "shared memory": (3, 1, gf.topology.ring(3), {"bucket_bytes": 100}),
    "gloo": (3, 2, gf.topology.erdos_renyi(6, 0.5, seed=3), {"shared_memory": False, "local_steps": 3}),
    "group": (3, 2, gf.topology.exponential(6), {"group": True, "rule": "dsgd"}),
    "matching": (4, 1, gf.topology.random_matching(4, seed=2), {"wire_dtype": "int8", "local_steps": 3, "kappa": 0.3}),
    "exponential": (4, 1, gf.topology.one_peer_exponential(4), {"mix_state": ("exp_avg", "exp_avg_sq"), "kappa": 0.2}),
    "two of matching": (3, 2, gf.topology.random_matching(6, seed=2), {"wire_dtype": "int4", "wire_seed": 1}),
    "narrow wire": (3, 1, gf.topology.ring(3), {"wire_dtype": torch.bfloat16, "local_steps": 3}),
    "narrow parameters": (2, 2, gf.topology.ring(4), {"dtype": torch.bfloat16, "wire_dtype": torch.float32}),
    "wide parameters": (2, 1, gf.topology.complete(2), {"dtype": torch.float64, "local_steps": 3}),
}
"""(number of ranks, agents of each, topology, options)."""

STEPS, STOP = 13, 7  # a run is stopped within a round of three


def run_of(n, agents, is_stacked, dtype=torch.float32, **options):
    """Trains, and trains again from what a state dict holds in the middle; returns both runs' numbers, and bytes."""
    parameters = parameters_of(n, agents, is_stacked, dtype)
    optimizer = make(parameters, **options)
    train(parameters, optimizer, n, agents, range(STOP))
    saved, others = copy.deepcopy(optimizer.state_dict()), [nn.Parameter(p.detach().clone()) for p in parameters]
    train(parameters, optimizer, n, agents, range(STOP, STEPS))
    if (group := options.get("process_group")) is not None and isinstance(group, Group):
        options["process_group"] = Group(dist.PrefixStore("again", ranks.store), group.rank, range(group.size))
    restored = make(others, **options)
    restored.load_state_dict(saved)
    train(others, restored, n, agents, range(STOP, STEPS))
    counts = optimizer.bytes_sent, optimizer.num_rounds, optimizer.message_bytes().tolist()
    return values_of(parameters, optimizer), values_of(others, restored), counts


def rank_run(rank, size, case):
    _, k, topology, options = CASES[case]
    options = {**options, "topology": topology, "agents_per_rank": k if k > 1 else None}
    is_own = options.pop("group", False)
    options["process_group"] = Group(ranks.store, rank, range(size)) if is_own else dist.group.WORLD
    return run_of(size * k, list(range(rank * k, rank * k + k)), k > 1, **options)


@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_stacked_numbers(case):
    size, k, topology, options = CASES[case]
    n = size * k
    options = {name: value for name, value in options.items() if name not in ("group", "bucket_bytes", "shared_memory")}
    whole, again, _ = run_of(n, list(range(n)), True, topology=topology, **options)
    assert same(whole, again)
    assert len(whole) == len(SHAPES) * (1 + len(options.get("mix_state", "1")))
    for rank, (own, restored, _) in enumerate(ranks.run(size, rank_run, case)):
        assert same(own, restored)
        for mine, stacked in zip(own, whole, strict=True):
            expected = stacked[rank * k : rank * k + k]
            assert torch.equal(mine.reshape(expected.shape), expected)


def test_bytes_of_second_moments_are_counted():
    """Two bytes a number and one number a tensor, beside four bytes a number of the model."""
    numbers = 15 + 7 + 1 + 132
    for rank, (_, _, (sent, rounds, each)) in enumerate(ranks.run(3, rank_run, "shared memory")):
        assert each == [4 * numbers + 2 * (numbers + len(SHAPES))] * 3
        assert sent == {(rank, other): rounds * each[0] for other in range(3) if other != rank}


def with_a_late_group(n, agents, is_stacked, **options):
    parameters = parameters_of(n, agents, is_stacked)
    inner = torch.optim.AdamW(parameters[:2], lr=0.01)
    optimizer = gf.Gossip(inner, topology=gf.topology.ring(n), mix_state=("exp_avg_sq",), **options)
    train(parameters[:2], optimizer, n, agents, range(4))
    optimizer.add_param_group({"params": parameters[2:]})
    train(parameters, optimizer, n, agents, range(4, 9))
    return values_of(parameters, optimizer)


def late_group_on_ranks(rank, size):
    return with_a_late_group(size, [rank], False, process_group=dist.group.WORLD)


def test_a_group_that_is_added_later_is_mixed_too():
    whole = with_a_late_group(3, [0, 1, 2], True)
    assert len(whole) == 2 * len(SHAPES)
    for rank, own in enumerate(ranks.run(3, late_group_on_ranks)):
        assert same(own, [rows[rank] for rows in whole])


def disagree(rank, size, names):
    with pytest.raises((MismatchError, PeerError, ValueError)) as caught:
        make(parameters_of(3, [rank], False), topology=gf.topology.ring(3), process_group=dist.group.WORLD,
             mix_state=names if rank == 1 else ("exp_avg_sq",))  # fmt: skip
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(("names", "said"), [((), "()"), (("exp_avg_sq", "exp_avg"), "('exp_avg_sq', 'exp_avg')")])
def test_ranks_must_mix_the_same_state(names, said):
    text = f"differ in their mix_state: ('exp_avg_sq') on ranks [0, 2]; {said} on ranks [1]"
    for kind, message in ranks.run(3, disagree, names):
        assert kind is MismatchError
        assert text in message


def test_a_rank_with_a_name_that_there_is_not_tells_the_others():
    first, odd, last = ranks.run(3, disagree, ("second",))
    assert odd[0] is ValueError
    assert first[0] is last[0] is PeerError
    assert odd[1] in first[1]


LATE = 4
"""The step in which rank 0 has its first gradient."""


def moments(parameter, agents, seed, steps, options):
    """Takes steps with gradients that do not depend on the model; returns the second moments after each."""
    optimizer = gf.Gossip(torch.optim.AdamW([parameter], lr=0.01), "dsgd", mix_state=("exp_avg_sq",), **options)
    seen = []
    for step in steps:
        gradient = seeded(3, 9, seed=seed + step, dtype=torch.float32)[agents].reshape(parameter.shape)
        parameter.grad = None if agents == [0] and step < LATE else gradient
        optimizer.step()
        seen.append(optimizer.inner.state.get(parameter, {}).get("exp_avg_sq", torch.zeros(0)).clone())
    return seen


def late_run(rank, size):
    options = {"topology": gf.topology.complete(3).lazy(0.5), "process_group": dist.group.WORLD}
    return moments(nn.Parameter(torch.zeros(9)), [rank], 7, range(2 * LATE), options)


def test_an_agent_without_second_moments_neither_gives_nor_takes():
    """Before rank 0 has a gradient the two others mix as if they were alone, with the weights that they have."""
    W = gf.topology.complete(3).lazy(0.5).matrix()
    w = float(W[1, 2])
    pair = gf.topology.from_matrix([[1 - w, w], [w, 1 - w]])
    expected = moments(nn.Parameter(torch.zeros(2, 9)), [1, 2], 7, range(LATE), {"topology": pair})
    late, *others = ranks.run(3, late_run)
    assert all(not seen.numel() for seen in late[:LATE])
    for agent, seen in enumerate(others):
        assert same(seen[:LATE], [rows[agent] for rows in expected])
    rows = torch.stack([each[-1] for each in (late, *others)])
    alone = ranks.run(3, late_run_unmixed)
    assert torch.allclose(rows.mean(0), torch.stack(alone).mean(0), rtol=1e-5)
    assert rows.std(0).mean() < 0.7 * torch.stack(alone).std(0).mean()


def late_run_unmixed(rank, size):
    parameter = nn.Parameter(torch.zeros(9))
    inner = torch.optim.AdamW([parameter])
    for step in range(0 if rank else LATE, 2 * LATE):
        parameter.grad = seeded(3, 9, seed=7 + step, dtype=torch.float32)[rank]
        inner.step()
    return inner.state[parameter]["exp_avg_sq"]


VICTIM, FALL = 2, 7


def fall(rank, size, local_steps):
    """One rank leaves before a step for which all wait; returns the others' numbers."""
    parameters, complete = parameters_of(size, [rank], False), gf.topology.complete(size)
    where = {"topology": complete, "process_group": Group(ranks.store, rank, range(size), timeout=20.0)}
    optimizer = make(parameters, local_steps=local_steps, on_peer_failure="continue", **where)
    train(parameters, optimizer, size, [rank], range(FALL))
    if rank == VICTIM:
        return optimizer.group.close()
    train(parameters, optimizer, size, [rank], range(FALL, 15))
    return values_of(parameters, optimizer), list(optimizer.group.members)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_ranks_that_are_left_give_the_numbers_of_a_stacked_run_of_them(local_steps):
    """It goes on with the second moments that they have, and with trackers that are zero since the next round."""
    n, left = 4, [agent for agent in range(4) if agent != VICTIM]
    whole, graph = parameters_of(n, list(range(n)), True), gf.topology.complete(n)
    optimizer = make(whole, topology=graph, local_steps=local_steps)
    mixed = FALL if local_steps == 1 else 8  # the step that ends the victim's round
    train(whole, optimizer, n, list(range(n)), range(FALL))
    some = [nn.Parameter(p.detach()[left].clone()) for p in whole]
    other = make(some, topology=graph.without([VICTIM]), local_steps=local_steps)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in (saved["state"], saved["inner"]["state"]):
        for own in state.values():
            own.update({name: t[left] for name, t in own.items() if isinstance(t, torch.Tensor) and t.dim()})
    other.load_state_dict(saved)
    train(some, other, n, left, range(FALL, mixed))
    for p in some:
        other.state[p]["r"].zero_()
    train(some, other, n, left, range(mixed, 15))
    expected = values_of(some, other)
    outcomes = ranks.run(n, fall, local_steps)
    for place, rank in enumerate(left):
        own, members = outcomes[rank]
        assert members == left
        assert same(own, [rows[place] for rows in expected])


def come_back(rank, size):
    """Rank 1 leaves at step 12 and comes back; returns what it starts and ends with, or the others' last moments."""
    store = ranks.store
    parameter = nn.Parameter(torch.zeros(50))

    def made(group):
        inner = torch.optim.AdamW([parameter], lr=0.01)
        where = {"topology": gf.topology.ring(size), "process_group": group, "on_peer_failure": "continue"}
        return gf.Gossip(inner, "dsgd", mix_state=("exp_avg_sq",), **where)

    optimizer, end = made(Group(store, rank, range(size), timeout=20.0)), None
    while end is None or optimizer.num_steps < end:
        if end is None and rank == 1 and optimizer.num_steps == 12:
            optimizer.group.close()
            del optimizer  # which keeps connections open
            optimizer = made(rejoin(store, rank, size, timeout=20.0))
            assert not optimizer.inner.state
        if end is None:
            time.sleep(0.002)  # leaves a core to the rank that comes back
        parameter.grad = torch.full((50,), 1.0 + rank)
        optimizer.step()
        if end is None and optimizer.group.epoch > 1 and optimizer.group.size == size:
            end = optimizer.num_steps + 60
    return optimizer.inner.state[parameter]["exp_avg_sq"].clone(), parameter.detach().clone()


def test_a_rank_comes_back_without_second_moments_and_mixes_those_it_makes():
    with ranks.Crew(3, come_back) as crew:
        outcomes = crew.outcomes()
    assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    moments, models = (torch.stack(each) for each in zip(*outcomes, strict=True))
    assert moments.std(0).max() < 0.02 * moments.mean()  # of gradients 1, 2 and 3, whose squares are 1 to 9
    assert models.std(0).max() < 0.02 * models.mean().abs()
