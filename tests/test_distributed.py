"""Agents on several ranks: the numbers of the stacked run, bit for bit; what differs between ranks is refused."""

import copy
import itertools
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, MismatchError, PeerError
from gut_fast.distributed.agreement import group_settings
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded

SHAPES = [(5, 3), (7,), (1,), (33, 4), (2, 2, 2)]


def graph_of(name, n):
    if name == "random":
        return gf.topology.erdos_renyi(n, 0.5, seed=3)
    if name == "torus":
        return gf.topology.torus(3, n // 3)
    return getattr(gf.topology, name)(n, 2) if name == "random_matching" else getattr(gf.topology, name)(n)


def train_on_quadratics(rule, graph, agents, steps, has_dimension=True, **options):
    """Trains the agents given, all with quadratics of their own; returns parameters, state and bytes sent.

    In some steps some parameters get no gradient. The noise is the same for an agent, whoever else is there.
    """
    n = graph.num_agents
    start = [seeded(n, *shape, seed=k, dtype=torch.float32)[agents] for k, shape in enumerate(SHAPES)]
    best = [seeded(n, *shape, seed=50 + k, dtype=torch.float32)[agents] for k, shape in enumerate(SHAPES)]
    parameters = [nn.Parameter(rows.clone() if has_dimension else rows[0].clone()) for rows in start]
    optimizer = gf.GossipOptimizer(parameters, rule, lr=0.02, topology=graph, weight_decay=0.01, **options)
    for step in range(steps):
        noise = 0.1 * seeded(n, 1, seed=1000 + step, dtype=torch.float32)[agents]
        for k, parameter in enumerate(parameters):
            difference = parameter.detach().reshape(len(agents), -1) - best[k].reshape(len(agents), -1)
            parameter.grad = None if (k + step) % 7 == 0 else (difference + noise).reshape(parameter.shape)
        optimizer.step()
    state = [optimizer.state[p][name].clone() for name in optimizer.rule.states for p in parameters]
    return [*(p.detach().clone() for p in parameters), *state], optimizer.bytes_sent


def rank_run(rank, size, cases, steps):
    """Runs the cases, (rule, graph, number of agents, options), and returns for each the tensors of the agents here."""
    results = []
    for rule, graph, n, options in cases:
        k = n // size
        where = {"process_group": dist.group.WORLD, "agents_per_rank": k if k > 1 else None}
        agents = list(range(rank * k, rank * k + k))
        results.append(train_on_quadratics(rule, graph_of(graph, n), agents, steps, k > 1, **where, **options)[0])
    return results


def assert_stacked_numbers(size, cases, steps, run=rank_run):
    outcomes = ranks.run(size, run, cases, steps)
    for index, (rule, graph, n, _) in enumerate(cases):
        whole, _ = train_on_quadratics(rule, graph_of(graph, n), list(range(n)), steps)
        k = n // size
        for rank, results in enumerate(outcomes):
            for own, stacked in zip(results[index], whole, strict=True):
                expected = stacked[rank * k : rank * k + k]
                assert torch.equal(own.reshape(expected.shape), expected), (rule, graph, rank)


GRAPHS = [
    (1, "ring", 5),
    (2, "ring", 6),
    (2, "random", 8),
    (3, "star", 6),
    (3, "one_peer_exponential", 3),
    (4, "torus", 12),
    (4, "random_matching", 4),
    (7, "ring", 7),
    (7, "random", 7),
    (7, "star", 7),
]
"""(number of ranks, graph, number of agents)."""

OPTIONS = [
    {"bucket_bytes": buckets, "shared_memory": shared}
    for buckets, shared in itertools.product((400, 1 << 20), (False, True))
]


@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize(("size", "graph", "n"), GRAPHS[:-2])
def test_ranks_give_the_stacked_numbers(size, graph, n):
    """Every rule runs on three graphs, every graph with three or four rules, all with different options."""
    place = GRAPHS.index((size, graph, n))
    rules = [rule for k, rule in enumerate(RULES) if (k + place) % 3 == 0]
    cases = [(rule, graph, n, OPTIONS[(k + place) % 4]) for k, rule in enumerate(rules)]
    assert_stacked_numbers(size, cases, 15)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize(("size", "graph", "n"), GRAPHS)
def test_ranks_give_the_stacked_numbers_with_every_rule(size, graph, n):
    assert_stacked_numbers(size, [(rule, graph, n, OPTIONS[k % 4]) for k, rule in enumerate(RULES)], 60)


class Model(nn.Module):
    """A model whose last parameter is used first, with a frozen parameter and one that some steps do not use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.sometimes = nn.Parameter(torch.ones(6))

    def forward(self, x, step):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x * self.frozen * (self.sometimes if step % 3 else 1.0)).square().mean()


def train_model(rank, size, how, overlap, steps=12):
    """Returns the parameters after some steps, what the optimizer says of overlap, and which messages left early."""
    torch.manual_seed(0)
    model, ring = Model(), gf.topology.ring(size)
    where = {"process_group": dist.group.WORLD, "bucket_bytes": 200}
    optimizer = gf.GUT(model.parameters(), 0.1, 0.5, topology=ring, overlap=overlap, **where)
    left, said, in_backward = [], [], False
    begin = optimizer._exchange.begin
    optimizer._exchange.begin = lambda *a: (left.append(in_backward), begin(*a))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(steps):
        optimizer.zero_grad()
        batches = [seeded(4, 6, seed=100 * rank + 10 * step + k, dtype=torch.float32) for k in range(2)]
        in_backward = True
        if how == "accumulated":
            with optimizer.no_sync():
                model(batches[0], step).backward()
        elif how == "twice":
            model(batches[0], step).backward()
        loss = model(batches[1], step)
        if how == "scaled":
            loss = scaler.scale(loss if (step, rank) != (5, 1) else loss * torch.inf)
        loss.backward()
        in_backward = False
        if how == "clipped" or (how == "clipped later" and step > 2):
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if how == "clamped":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.clamp_(-1e-3, 1e-3)
        if how == "scaled":
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        said.append(optimizer.overlap)
    assert optimizer.num_steps == steps
    return [p.detach().clone() for p in model.parameters()], said, left


TURNED_OFF = {
    "clipped": "gradients change",
    "clamped": "gradients change",
    "twice": "gradients change",
    "scaled": "scales the gradients",
}


@pytest.mark.parametrize("how", ["plain", "accumulated", "clipped", "clamped", "twice", "scaled"])
def test_overlap_changes_no_number(how):
    without = ranks.run(3, train_model, how, False)
    overlapped = ranks.run(3, train_model, how, True)
    for (mine, said, left), (theirs, _, left_late) in zip(overlapped, without, strict=True):
        assert all(map(torch.equal, mine, theirs))
        assert not any(left_late)
        if how in TURNED_OFF:
            assert said[-1].startswith("off: ")
            assert TURNED_OFF[how] in said[-1]
            assert not any(left)
        else:
            assert said[-1] == "on"
            assert sum(left) >= 11 * 2  # all steps but the first; some wait for the parameter that is not always used
    assert all(torch.isfinite(p).all() for p in overlapped[0][0])


def test_overlap_turns_itself_off_when_gradients_change_later():
    for _, said, _ in ranks.run(2, train_model, "clipped later", True, 6):
        assert said[:3] == ["on"] * 3
        assert all(text.startswith("off: gradients change") for text in said[3:])


def differing(rank, size, odd):
    """Returns what the constructor raises where rank 2 is odd in one setting."""
    graph, shape = gf.topology.ring(size), (3, 2)
    options = {"rule": "gut", "lr": 0.1, "topology": graph}
    if rank == 2:
        weaker = gf.topology.from_matrix(graph.lazy(0.5).matrix(), name="ring(4)")
        odd_ones = {"W": {"topology": weaker}, "rule": {"rule": "d2"}, "lr": {"lr": 0.2}}
        odd_ones |= {"bucket": {"bucket_bytes": 7}, "wire": {"wire_dtype": torch.bfloat16}}
        odd_ones |= {"policy": {"on_peer_failure": "continue"}, "agents": {"agents_per_rank": 2}}
        odd_ones |= {"backend": {"backend": "torch"}, "state": {"state_dtype": torch.bfloat16}}
        odd_ones |= {"timeout": {"timeout": 7.5}, "memory": {"shared_memory": False}, "overlap": {"overlap": True}}
        odd_ones |= {"initial": {"sync_initial": True}, "drift": {"drift_memory": 0.5}}
        options |= odd_ones.get(odd, {})
        shape = (2, 3) if odd == "shape" else shape
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(shape))]
    began = time.monotonic()
    with pytest.raises(MismatchError) as caught:
        gf.GossipOptimizer(parameters, process_group=dist.group.WORLD, **options)
    assert time.monotonic() - began < 30.0  # at once, and not after the time limit
    return str(caught.value)


def with_other_inner_optimizers(rank, size, odd):
    """Returns what the constructor raises where rank 2 has another inner optimizer, or other options of it."""
    parameters, ring = [nn.Parameter(torch.zeros(3))], gf.topology.ring(size)
    kind = torch.optim.SGD if (odd, rank) == ("kind", 2) else torch.optim.Adam
    options = {"betas": (0.5, 0.999)} if (odd, rank) == ("options", 2) else {}
    with pytest.raises(MismatchError) as caught:
        gf.Gossip(kind(parameters, lr=0.1, **options), topology=ring, process_group=dist.group.WORLD)
    return str(caught.value)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ("kind", "inner optimizer: Adam on ranks [0, 1]; SGD on ranks [2]"),
        ("options", "hyper-parameters: ['inner group 0: betas = (0.9, 0.999)'] on ranks [0, 1]; "),
    ],
)
def test_ranks_with_different_inner_optimizers_are_told(odd, expected):
    for said in ranks.run(3, with_other_inner_optimizers, odd):
        assert expected in said


def test_learning_rates_in_tensors_are_compared_as_numbers_whatever_their_device():
    parameter, lr = nn.Parameter(torch.zeros(2, 3)), torch.tensor(0.5)
    inner = torch.optim.Adam([parameter], lr=lr)
    optimizer = gf.Gossip(inner, "dsgd", topology=gf.topology.complete(2))
    found = group_settings(optimizer.rule, optimizer.param_groups, [None], inner)["hyper-parameters"]
    assert "inner group 0: lr = 0.5" in found
    assert "'lr': 0.5" in found[0]
    assert not any("tensor(" in text for text in found)


DIFFERENCES = {
    "W": "the mixing matrices of ranks [0, 1, 3], ranks [2] differ in rows [0, 1, 2, 3]",
    "rule": "differ in their rule: gut on ranks [0, 1, 3]; d2 on ranks [2]",
    "lr": "'lr': 0.2, 'weight_decay': 0.0, 'maximize': False, 'drift_memory': 0.95, 'mu': 0.9, ",
    "shape": "parameters: ['group 0, parameter 1: (3, 2) torch.float32'] on ranks [0, 1, 3]; ",
    "bucket": "bucket_bytes: automatic on ranks [0, 1, 3]; 7 on ranks [2]",
    "wire": "wire_dtype: None on ranks [0, 1, 3]; torch.bfloat16 on ranks [2]",
    "policy": "on_peer_failure: raise on ranks [0, 1, 3]; continue on ranks [2]",
    "agents": "agents_per_rank: 1 on ranks [0, 1, 3]; 2 on ranks [2]",
    "backend": "backend: auto on ranks [0, 1, 3]; torch on ranks [2]",
    "state": "state_dtype: ['group 0: torch.float32'] on ranks [0, 1, 3]; ['group 0: torch.bfloat16'] on ranks [2]",
    "timeout": "timeout: 60 s on ranks [0, 1, 3]; 7.5 s on ranks [2]",
    "memory": "shared_memory: True on ranks [0, 1, 3]; False on ranks [2]",
    "overlap": "overlap: False on ranks [0, 1, 3]; True on ranks [2]",
    "initial": "sync_initial: False on ranks [0, 1, 3]; True on ranks [2]",
    "drift": "'drift_memory': 0.95, 'mu': 0.9, 'kappa': 1.0}\"] on ranks [0, 1, 3]",
}


def all_differences(rank, size):
    return {odd: differing(rank, size, odd) for odd in DIFFERENCES}


def test_differences_between_ranks_are_named_by_all():
    first, *others = ranks.run(4, all_differences)
    assert others == [first] * 3
    for odd, text in DIFFERENCES.items():
        assert text in first[odd]


def fail_alone(rank, size):
    """Rank 1 cannot make its optimizer, before and after the ranks have met; then all can. Returns what is raised."""
    parameter, ring, world = nn.Parameter(torch.zeros(4)), gf.topology.ring(size), dist.group.WORLD
    given, said = Group(ranks.store, rank, range(size)), []
    bad = [{"mu": 2.0}, {"bucket_bytes": 0}, {"wire_dtype": torch.int8}, {"params": [torch.zeros(4)] * 2}, {"mu": -1}]
    for number, odd in enumerate(bad):
        options = {"params": [parameter], "process_group": given if number == len(bad) - 1 else world}
        began = time.monotonic()
        with pytest.raises((ValueError, TypeError, PeerError)) as caught:
            gf.GUT(lr=0.1, topology=ring, **(options | (odd if rank == 1 else {})))
        assert time.monotonic() - began < 30.0
        said.append((type(caught.value), str(caught.value)))
    with pytest.raises((TypeError, PeerError)) as caught:
        gf.Gossip(None if rank == 1 else torch.optim.Adam([parameter]), topology=ring, process_group=world)
    said.append((type(caught.value), str(caught.value)))
    for group in (world, given):
        gf.GUT([parameter], 0.1, topology=ring, process_group=group).step()
    return said


def test_a_rank_that_cannot_make_its_optimizer_tells_the_others_at_once():
    first, odd, last = ranks.run(3, fail_alone)
    for k, (kind, text) in enumerate(odd):
        assert issubclass(kind, (ValueError, TypeError))
        for other, said in (first[k], last[k]):
            assert other is PeerError
            assert said.startswith("rank 1 does not come to ")
            assert said.endswith(f"it has failed: {kind.__name__}: {text}")


def absent(rank, size):
    """Rank 1 does not come until the others have noticed."""
    if rank == 1:
        ranks.store.wait(["noticed 0", "noticed 2"])
        return None
    parameter, where = nn.Parameter(torch.zeros(4)), {"process_group": dist.group.WORLD, "timeout": 1.0}
    with pytest.raises(PeerError) as caught:
        gf.DSGD([parameter], 0.1, topology=gf.topology.ring(3), **where)
    ranks.store.set(f"noticed {rank}", "")
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named():
    first, _, last = ranks.run(3, absent)
    assert "ranks [1] have not come" in first
    assert "ranks [1] have not come" in last


REFUSED = {
    "size": (ValueError, {"topology": gf.topology.ring(3)}, "ring(3) has 3 agents, but 1 ranks with 1 each have 1; "),
    "group": (TypeError, {"process_group": "world"}, "process_group must be a torch.distributed.ProcessGroup"),
    "k": (TypeError, {"agents_per_rank": 1.5}, "agents_per_rank must be an integer, got 1.5"),
    "shape": (ValueError, {"topology": gf.topology.ring(3), "agents_per_rank": 3}, "expected (3, ...)"),
    "wire": (
        TypeError,
        {"wire_dtype": torch.float16},
        "is torch.float16; messages about parameters of torch.float32 can be torch.float32 or torch.bfloat16",
    ),
    "wire int": (TypeError, {"wire_dtype": torch.int8}, "wire_dtype must be a floating-point torch.dtype"),
    "wire seed": (ValueError, {"wire_seed": 1}, "rounds messages of wire_dtype"),
    "timeout": (ValueError, {"timeout": -1.0}, "timeout must be a number of seconds between 0 and 1e+06, got -1.0"),
    "policy": (
        ValueError,
        {"on_peer_failure": "ignore"},
        "must be 'raise' or 'continue', got 'ignore'",
    ),
    "bucket": (ValueError, {"bucket_bytes": 0}, "bucket_bytes must be at least 1, got 0"),
    "capturable": (ValueError, {"capturable": True}, "steps of several ranks cannot be captured"),
    "alone": (
        ValueError,
        {"process_group": None, "overlap": True},
        "gut: overlap= needs process_group=; this optimizer holds all agents itself",
    ),
}


def refused(rank, size):
    """Tries everything that the constructor and the methods refuse, in a world of one; returns what they say."""
    parameter, said = nn.Parameter(torch.zeros(1, 4)), {}
    where = {"topology": gf.topology.ring(1), "process_group": dist.group.WORLD}
    for name, (error, options, _) in REFUSED.items():
        with pytest.raises(error) as caught:
            gf.GossipOptimizer([parameter], "gut", lr=0.1, **{**where, **options})
        said[name] = str(caught.value)
    optimizer = gf.GUT([parameter], 0.1, **where)
    with pytest.raises(TypeError, match=r"keep its state_dict\(\)"):
        pickle.dumps(optimizer)
    parameter.grad = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="grad_scale"):
        optimizer.step(grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match="overlap"):
        gf.Gossip(torch.optim.SGD([parameter], lr=0.1), overlap=True, **where)
    return said


def test_what_is_refused():
    [said] = ranks.run(1, refused)
    for name, (_, _, text) in REFUSED.items():
        assert text in said[name]


def rounded(rank, size, wire, steps):
    """Gossips, then trains; returns the drift of the mean over agents, the last mean, parameters and bytes."""
    parameter = nn.Parameter(seeded(size, 300, seed=1, dtype=torch.float32)[rank])
    goal = seeded(size, 300, seed=2, dtype=torch.float32)[rank]
    where = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD, "wire_dtype": wire}
    optimizer = gf.GUT([parameter], 0.05, 0.5, **where)

    def mean():
        total = parameter.detach().double()
        optimizer.group.all_reduce(total)
        return total / size

    before = mean()
    for _ in range(20):
        optimizer.step()
    drift = (mean() - before).abs().max().item()
    for _ in range(steps):
        parameter.grad = parameter.detach() - goal
        optimizer.step()
    return drift, mean(), parameter.detach().clone(), optimizer.bytes_sent


BYTES = {torch.bfloat16: 600, "int8": 4 * 75 + 2 * 4, "int4": 4 * 38 + 2 * 4}
"""The bytes of a message of 300 numbers: words of 32 bits, and the scales of two blocks."""


@pytest.mark.parametrize("wire", BYTES, ids=str)
def test_coded_messages_keep_the_mean_and_lose_nothing_in_the_end(wire):
    goal = seeded(4, 300, seed=2, dtype=torch.float32).mean(0)
    exact, coded = (ranks.run(4, rounded, each, 400) for each in (None, wire))
    for (drift, mean, mine, sent), (_, _, theirs, full) in zip(coded, exact, strict=True):
        assert drift < 5e-6  # roundings of float32 in twenty steps
        assert (mean - goal).abs().max() < 1e-5
        assert (mine - theirs).abs().max() < 1e-5
        assert full == dict.fromkeys(full, 420 * 1200)
        assert sent == dict.fromkeys(full, 1200 + 419 * BYTES[wire])


def train_halves(parameter, optimizer, agents):
    for _ in range(30):
        parameter.grad = parameter.detach() - agents
        optimizer.step()
    return parameter.detach()


def halves(rank, size, wire):
    parameter = nn.Parameter(seeded(size, 64, seed=1, dtype=torch.bfloat16)[rank])
    where = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD, "wire_dtype": wire}
    return train_halves(parameter, gf.GUT([parameter], 0.05, **where), rank)


def test_float32_messages_give_half_width_parameters_the_stacked_numbers():
    stacked = nn.Parameter(seeded(3, 64, seed=1, dtype=torch.bfloat16))
    optimizer = gf.GUT([stacked], 0.05, topology=gf.topology.ring(3))
    expected = train_halves(stacked, optimizer, torch.arange(3, dtype=torch.bfloat16)[:, None])
    assert torch.equal(torch.stack(ranks.run(3, halves, torch.float32)), expected)
    assert not torch.equal(torch.stack(ranks.run(3, halves, None)), expected)


def counted(rank, size, rules):
    """Returns the bytes that five steps of each rule send on a star."""
    star, sent = gf.topology.star(size), []
    for rule in rules:
        model = nn.Linear(10, 7)
        optimizer = gf.GossipOptimizer(model.parameters(), rule, lr=0.1, topology=star, process_group=dist.group.WORLD)
        for _ in range(5):
            model(torch.ones(2, 10)).sum().backward()
            optimizer.step()
        sent.append(optimizer.bytes_sent)
    return sent


def test_each_neighbour_gets_one_model_a_step():
    model, messages = 4 * (10 * 7 + 7), {"dsgd": 1, "gut": 1, "gradient_tracking": 2}
    for rank, sent in enumerate(ranks.run(4, counted, list(messages))):
        neighbors = [1, 2, 3] if rank == 0 else [0]
        assert sent == [{(rank, other): 5 * count * model for other in neighbors} for count in messages.values()]


def train_adam(model, agents, **where):
    """Trains with decentralized Adam and tracking; `agents` are the modules of the agents here, by number."""
    optimizer = gf.Gossip(
        torch.optim.Adam(model.parameters(), lr=0.01), rule="gut", topology=gf.topology.ring(3), **where
    )
    for step in range(10):
        model.zero_grad()
        for number, module in agents.items():
            module(seeded(8, 4, seed=10 * step + number, dtype=torch.float32)).square().sum().backward()
        optimizer.step()


def adam_of_a_rank(rank, size):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    train_adam(model, {rank: model}, process_group=dist.group.WORLD)
    return [p.detach() for p in model.parameters()]


def test_any_inner_optimizer_works_across_ranks():
    torch.manual_seed(0)
    stacked = gf.stack(nn.Linear(4, 3), 3)
    train_adam(stacked, {number: stacked.agent(number) for number in range(3)})
    for rank, parameters in enumerate(ranks.run(3, adam_of_a_rank)):
        for mine, theirs in zip(parameters, stacked.parameters(), strict=True):
            assert torch.equal(mine, theirs[rank])


def resumed(rank, size, wire):
    """Returns the parameters of a run that is saved in the middle, and of another one that goes on from there."""
    where = {"topology": gf.topology.random_matching(size, 1), "process_group": dist.group.WORLD, "wire_dtype": wire}

    def train(parameter, optimizer):
        for _ in range(7):
            parameter.grad = parameter.detach() - rank
            optimizer.step()

    parameter = nn.Parameter(seeded(size, 40, seed=1, dtype=torch.float32)[rank])
    optimizer = gf.GUTm([parameter], 0.05, mu=0.3, **where)
    train(parameter, optimizer)
    saved, other = copy.deepcopy(optimizer.state_dict()), nn.Parameter(parameter.detach().clone())
    train(parameter, optimizer)
    restored = gf.GUTm([other], 0.05, mu=0.3, **where)
    restored.load_state_dict(saved)
    train(other, restored)
    return parameter.detach(), other.detach()


@pytest.mark.parametrize("wire", [None, torch.bfloat16, "int8", "int4"], ids=str)
def test_a_restored_run_goes_on_bit_for_bit(wire):
    for whole, restored in ranks.run(4, resumed, wire):
        assert torch.equal(whole, restored)
