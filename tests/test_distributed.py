"""Agents on several ranks: the numbers of the stacked run, bit for bit; what differs between ranks is refused."""

import copy
import pickle
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import MismatchError, PeerError
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded

SHAPES = [(5, 3), (7,), (1,), (33, 4), (2, 2, 2)]
STEPS = 100


def graph_of(name, n):
    if name == "random":
        return gf.topology.erdos_renyi(n, 0.5, seed=3)
    if name == "torus":
        return gf.topology.torus(3, n // 3)
    return getattr(gf.topology, name)(n, 2) if name == "random_matching" else getattr(gf.topology, name)(n)


class Task:
    """Quadratics of each agent's own, with noise."""

    def __init__(self, num_agents, dtype=torch.float32):
        self.start = [seeded(num_agents, *s, seed=k, dtype=dtype) for k, s in enumerate(SHAPES)]
        self.best = [seeded(num_agents, *s, seed=50 + k, dtype=dtype) for k, s in enumerate(SHAPES)]

    def gradients(self, parameters, agents, step):
        noise = seeded(len(self.start[0]), 1, seed=1000 + step, dtype=self.start[0].dtype)[agents]
        for k, parameter in enumerate(parameters):
            if (k + step) % 7 == 0:
                parameter.grad = None  # some parameters get no gradient in some steps
                continue
            flat = parameter.detach().reshape(len(agents), -1) - self.best[k][agents].reshape(len(agents), -1)
            value = flat + 0.1 * noise
            parameter.grad = value.reshape(parameter.shape)


def stacked_run(rule, graph, steps=STEPS, **options):
    task, n = Task(graph.num_agents), graph.num_agents
    parameters = [nn.Parameter(start.clone()) for start in task.start]
    optimizer = gf.GossipOptimizer(parameters, rule, lr=0.02, topology=graph, weight_decay=0.01, **options)
    for step in range(steps):
        task.gradients(parameters, list(range(n)), step)
        optimizer.step()
    return parameters, [[optimizer.state[p][name] for p in parameters] for name in optimizer.rule.states]


def rank_run(rank, size, cases, steps=STEPS):
    """For each case the final parameters and state of the agents here, [k, ...]."""
    warnings.simplefilter("ignore")
    results = []
    for rule, graph_name, n, options in cases:
        graph, k = graph_of(graph_name, n), n // size
        agents, task = list(range(rank * k, rank * k + k)), Task(n)
        has_dimension = options.pop("stacked", k > 1)
        parameters = [
            nn.Parameter(start[agents].clone() if has_dimension else start[rank].clone()) for start in task.start
        ]
        optimizer = gf.GossipOptimizer(
            parameters,
            rule,
            lr=0.02,
            topology=graph,
            weight_decay=0.01,
            process_group=dist.group.WORLD,
            agents_per_rank=k if has_dimension else None,
            **options,
        )
        for step in range(steps):
            task.gradients(parameters, agents, step)
            optimizer.step()
        states = [[optimizer.state[p][name].clone() for p in parameters] for name in optimizer.rule.states]
        results.append(([p.detach().clone() for p in parameters], states, optimizer.bytes_sent))
    return results


def assert_same(cases, outcomes, size, steps=STEPS):
    for index, (rule, graph_name, n, _) in enumerate(cases):
        parameters, states = stacked_run(rule, graph_of(graph_name, n), steps)
        k = n // size
        for rank, results in enumerate(outcomes):
            mine, my_states, _ = results[index]
            agents = slice(rank * k, rank * k + k)
            for ours, theirs in zip([mine, *my_states], [parameters, *states], strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert torch.equal(one.reshape(other[agents].shape), other[agents].detach()), (
                        rule,
                        graph_name,
                        rank,
                    )


GRAPHS = {
    1: [("ring", 5)],
    2: [("ring", 6), ("random", 8)],
    3: [("star", 6), ("one_peer_exponential", 3)],
    4: [("torus", 12), ("random_matching", 4)],
    7: [("ring", 7), ("random", 7), ("star", 7)],
}


@pytest.mark.filterwarnings("ignore:.* unstable on")
@pytest.mark.parametrize(("size", "graph", "n"), [(size, *graph) for size in GRAPHS for graph in GRAPHS[size]])
def test_ranks_give_the_stacked_numbers(size, graph, n):
    buckets = {"gut": 400, "gradient_tracking": 400}
    cases = [
        (rule, graph, n, {"bucket_bytes": buckets.get(rule, 1 << 20), "shared_memory": index % 2 == 0})
        for index, rule in enumerate(RULES)
    ]
    assert_same(cases, ranks.run(size, rank_run, cases), size)


class Model(nn.Module):
    """A parameter that is used last comes first; one is frozen, one unused in some steps."""

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
    """Parameters after some steps, and what the optimizer says of its overlap."""
    torch.manual_seed(0)
    model = Model()
    optimizer = gf.GUT(
        model.parameters(),
        lr=0.1,
        mu=0.5,
        topology=gf.topology.ring(size),
        process_group=dist.group.WORLD,
        overlap=overlap,
        bucket_bytes=200,
    )
    left = []
    begin = optimizer._exchange.begin
    optimizer._exchange.begin = lambda *a: (left.append(in_backward), begin(*a))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    in_backward = False
    for step in range(steps):
        optimizer.zero_grad()
        batches = [seeded(4, 6, seed=100 * rank + 10 * step + k, dtype=torch.float32) for k in range(2)]
        in_backward = True
        if how == "plain" or how == "clipped":
            model(batches[0], step).backward()
        elif how == "accumulated":
            with optimizer.no_sync():
                model(batches[0], step).backward()
            model(batches[1], step).backward()
        elif how == "twice":
            model(batches[0], step).backward()
            model(batches[1], step).backward()
        elif how == "scaled":
            loss = model(batches[0], step)
            scaler.scale(loss if (step, rank) != (5, 1) else loss * torch.inf).backward()
        in_backward = False
        if how == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if how == "scaled":
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    assert optimizer.num_steps == steps
    return [p.detach().clone() for p in model.parameters()], optimizer.overlap, left


WARNS = {"clipped": "gradients change", "twice": "gradients change", "scaled": "scales the gradients"}


@pytest.mark.filterwarnings("ignore:overlap is off from now on")
@pytest.mark.parametrize("how", ["plain", "accumulated", "clipped", "twice", "scaled"])
def test_overlap_changes_no_number(how):
    without = ranks.run(3, train_model, how, False)
    overlapped = ranks.run(3, train_model, how, True)
    for (mine, said, left), (theirs, _, left_late) in zip(overlapped, without, strict=True):
        assert all(map(torch.equal, mine, theirs))
        assert not any(left_late)
        if how in WARNS:
            assert said.startswith("off: ")
            assert WARNS[how] in said
            assert not any(left)
        else:
            assert said == "on"
            assert (
                sum(left) >= 11 * 2
            )  # all steps but the first; the last bucket holds the parameter that is not always used
    assert all(torch.isfinite(p).all() for p in overlapped[0][0])


def late_clipping(rank, size):
    torch.manual_seed(0)
    model = Model()
    optimizer = gf.DSGD(
        model.parameters(), lr=0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD, overlap=True
    )
    said = []
    for step in range(6):
        optimizer.zero_grad()
        model(seeded(4, 6, seed=rank, dtype=torch.float32), 1).backward()
        if step > 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        said.append(optimizer.overlap)
    total = [p.detach().clone() for p in model.parameters()]
    for tensor in total:
        optimizer.group.all_reduce(tensor)
    return said


@pytest.mark.filterwarnings("ignore:overlap is off from now on")
def test_overlap_turns_itself_off_when_gradients_change_later():
    for said in ranks.run(2, late_clipping):
        assert said[:3] == ["on"] * 3
        assert all(text.startswith("off: gradients change") for text in said[3:])


def differing(rank, size, odd):
    """What the constructor says where one rank does `odd`ly."""
    graph, shape = gf.topology.ring(size), (3, 2)
    options = {"rule": "gut", "lr": 0.1, "topology": graph}
    if rank == 2:
        weaker = gf.topology.from_matrix(graph.lazy(0.5).matrix(), name="ring(4)")
        options |= {"W": {"topology": weaker}, "rule": {"rule": "d2"}, "lr": {"lr": 0.2}}.get(odd, {})
        shape = (2, 3) if odd == "shape" else shape
        options |= {"bucket": {"bucket_bytes": 7}, "wire": {"wire_dtype": torch.bfloat16}}.get(odd, {})
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(shape))]
    gf.GossipOptimizer(parameters, options.pop("rule"), process_group=dist.group.WORLD, **options)


DIFFERENCES = {
    "W": r"mixing matrices of ranks \[0, 1, 3\], ranks \[2\] differ in rows \[0, 1, 2, 3\]",
    "rule": r"differ in their rule: gut on ranks \[0, 1, 3\]; d2 on ranks \[2\]",
    "lr": r"'lr': 0.1, .* on ranks \[0, 1, 3\]; .*'lr': 0.2, .* on ranks \[2\]",
    "shape": r"parameters: \['group 0, parameter 1: \(3, 2\) torch.float32'\] on ranks \[0, 1, 3\]; .*\(2, 3\)",
    "bucket": r"bucket_bytes: automatic without overlap on ranks \[0, 1, 3\]; 7 on ranks \[2\]",
    "wire": r"wire_dtype: None on ranks \[0, 1, 3\]; torch.bfloat16 on ranks \[2\]",
}


@pytest.mark.parametrize("odd", DIFFERENCES)
def test_differences_between_ranks_are_named_by_all(odd):
    with ranks.Crew(4, differing, odd) as crew:
        outcomes = crew.outcomes()
    for outcome in outcomes:
        assert isinstance(outcome, MismatchError)
        with pytest.raises(MismatchError, match=DIFFERENCES[odd]):
            raise outcome


def absent(rank, size):
    if rank == 1:
        time.sleep(3)
        return None
    try:
        gf.DSGD(
            [nn.Parameter(torch.zeros(4))],
            0.1,
            topology=gf.topology.ring(3),
            timeout=1.0,
            process_group=dist.group.WORLD,
        )
    except PeerError as error:
        return str(error)


def test_a_rank_that_does_not_come_is_named():
    outcomes = ranks.run(3, absent)
    assert "ranks [1] have not come" in outcomes[0]
    assert "ranks [1] have not come" in outcomes[2]


def refused(rank, size):
    """Messages of what the constructor and the methods refuse, in a world of one."""
    parameter = nn.Parameter(torch.zeros(1, 4))
    world, ring = dist.group.WORLD, gf.topology.ring
    said = {}

    def refuse(name, error, **options):
        rule, p = options.pop("rule", "gut"), options.pop("p", parameter)
        with pytest.raises(error) as caught:
            gf.GossipOptimizer([p], rule, lr=0.1, **{"topology": ring(1), "process_group": world, **options})
        said[name] = str(caught.value)

    refuse("size", ValueError, topology=ring(3))
    refuse("group", TypeError, process_group="world")
    refuse("k", TypeError, agents_per_rank=1.5)
    refuse("shape", ValueError, topology=ring(3), agents_per_rank=3, p=nn.Parameter(torch.zeros(2, 4)))
    refuse("wire", TypeError, wire_dtype=torch.float16)
    refuse("wire int", TypeError, wire_dtype=torch.int8)
    refuse("timeout", ValueError, timeout=-1.0)
    refuse("policy", ValueError, on_peer_failure="ignore")
    refuse("bucket", ValueError, bucket_bytes=0)
    refuse("capturable", ValueError, capturable=True)
    refuse("alone", ValueError, process_group=None, overlap=True)
    optimizer = gf.GUT([parameter], 0.1, topology=ring(1), process_group=world)
    with pytest.raises(TypeError) as caught:
        pickle.dumps(optimizer)
    said["pickle"] = str(caught.value)
    parameter.grad = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="grad_scale") as caught:
        optimizer.step(grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match="overlap") as caught:
        gf.Gossip(torch.optim.SGD([parameter], lr=0.1), topology=ring(1), process_group=world, overlap=True)
    return said


def test_what_is_refused():
    said = ranks.run(1, refused)[0]
    assert said["size"] == (
        "ring(3) has 3 agents, but 1 ranks with 1 each have 1; give a topology of that many, or agents_per_rank="
    )
    assert said["group"].startswith("process_group must be a torch.distributed.ProcessGroup")
    assert said["wire"] == (
        "wire_dtype is torch.float16; messages about parameters of torch.float32 can be torch.float32 or torch.bfloat16"
    )
    assert said["alone"] == "gut: overlap= needs process_group=; this optimizer holds all agents itself"
    assert "keep its state_dict()" in said["pickle"]
    for name in ("k", "timeout", "policy", "bucket"):
        assert "got" in said[name]


def rounded(rank, size, wire, rule, steps):
    """Sum of the parameters over agents, in float64, after gossip alone and after training, and the last parameters."""
    parameter = nn.Parameter(seeded(size, 300, seed=1, dtype=torch.float32)[rank])
    goal = seeded(size, 300, seed=2, dtype=torch.float32)[rank]
    optimizer = gf.GossipOptimizer(
        [parameter], rule, lr=0.05, topology=gf.topology.ring(size), process_group=dist.group.WORLD, wire_dtype=wire
    )

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
    return drift, mean(), parameter.detach().clone(), optimizer.bytes_sent, optimizer.state_dict()["residuals"]


def test_bfloat16_messages_keep_the_mean_and_halve_the_bytes():
    goal = seeded(4, 300, seed=2, dtype=torch.float32).mean(0)
    exact = ranks.run(4, rounded, None, "gut", 300)
    half = ranks.run(4, rounded, torch.bfloat16, "gut", 300)
    for (drift, mean, mine, sent, residuals), (_, _, theirs, full, _) in zip(half, exact, strict=True):
        assert drift < 5e-6  # roundings of float32 in twenty steps
        assert (mean - goal).abs().max() < 1e-4
        assert (mine - theirs).abs().max() < 0.03  # a few roundings
        assert {edge: 2 * count for edge, count in sent.items()} == full
        assert 0 < residuals[0][0].abs().max() < 0.01


def halves(rank, size, wire):
    parameter = nn.Parameter(seeded(size, 64, seed=1, dtype=torch.bfloat16)[rank])
    optimizer = gf.GUT(
        [parameter], 0.05, topology=gf.topology.ring(size), process_group=dist.group.WORLD, wire_dtype=wire
    )
    for _ in range(30):
        parameter.grad = parameter.detach() - rank
        optimizer.step()
    return parameter.detach()


def test_float32_messages_give_half_width_parameters_the_stacked_numbers():
    stacked = nn.Parameter(seeded(3, 64, seed=1, dtype=torch.bfloat16))
    optimizer = gf.GUT([stacked], 0.05, topology=gf.topology.ring(3))
    for _ in range(30):
        stacked.grad = stacked.detach() - torch.arange(3, dtype=torch.bfloat16)[:, None]
        optimizer.step()
    assert torch.equal(torch.stack(ranks.run(3, halves, torch.float32)), stacked.detach())
    assert not torch.equal(torch.stack(ranks.run(3, halves, None)), stacked.detach())


def counted(rank, size, rule):
    model = nn.Linear(10, 7)
    optimizer = gf.GossipOptimizer(
        model.parameters(), rule, lr=0.1, topology=gf.topology.star(size), process_group=dist.group.WORLD
    )
    for _ in range(5):
        model(torch.ones(2, 10)).sum().backward()
        optimizer.step()
    return optimizer.bytes_sent


def test_each_neighbour_gets_one_model_a_step():
    model = 4 * (10 * 7 + 7)
    for rule, messages in (("dsgd", 1), ("gut", 1), ("gradient_tracking", 2)):
        for rank, sent in enumerate(ranks.run(4, counted, rule)):
            expected = [1, 2, 3] if rank == 0 else [0]
            assert sent == {(rank, other): 5 * messages * model for other in expected}


def inner(rank, size):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = gf.Gossip(
        torch.optim.Adam(model.parameters(), lr=0.01),
        rule="gut",
        topology=gf.topology.ring(size),
        process_group=dist.group.WORLD,
    )
    for step in range(20):
        optimizer.zero_grad()
        model(seeded(8, 4, seed=10 * step + rank, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_any_inner_optimizer_works_across_ranks():
    torch.manual_seed(0)
    stacked = gf.stack(nn.Linear(4, 3), 3)
    optimizer = gf.Gossip(torch.optim.Adam(stacked.parameters(), lr=0.01), rule="gut", topology=gf.topology.ring(3))
    for step in range(20):
        stacked.zero_grad()
        for rank in range(3):
            stacked.agent(rank)(seeded(8, 4, seed=10 * step + rank, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
    for rank, parameters in enumerate(ranks.run(3, inner)):
        for mine, theirs in zip(parameters, stacked.parameters(), strict=True):
            assert torch.equal(mine, theirs[rank])


def resumed(rank, size, wire):
    """Parameters of a run that is saved in the middle and of another one that goes on from there."""

    def make():
        parameter = nn.Parameter(seeded(size, 40, seed=1, dtype=torch.float32)[rank])
        return parameter, gf.GUTm(
            [parameter],
            0.05,
            mu=0.3,
            topology=gf.topology.random_matching(size, 1),
            process_group=dist.group.WORLD,
            wire_dtype=wire,
        )

    def train(parameter, optimizer, steps):
        for _ in range(steps):
            parameter.grad = parameter.detach() - rank
            optimizer.step()

    parameter, optimizer = make()
    train(parameter, optimizer, 7)
    saved = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    train(parameter, optimizer, 7)
    other, restored = make()
    other.data.copy_(saved[1])
    restored.load_state_dict(saved[0])
    train(other, restored, 7)
    return parameter.detach(), other.detach()


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=str)
def test_a_restored_run_goes_on_bit_for_bit(wire):
    for whole, restored in ranks.run(4, resumed, wire):
        assert torch.equal(whole, restored)
