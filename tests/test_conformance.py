"""One suite for all backends: whole steps, halves of steps and the odd cases, on the same problems for each of them.

The compiled kernel meets every pair of a rule, a graph, a precision and so on in the fast part; the other backends meet
every value there, and every pair in the tests marked slow.
"""

import math
from typing import NamedTuple

import pytest
import torch

from gut_fast import _core, topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import arithmetic, cpu, cuda
from gut_fast.rules import RULES
from gut_fast.verify.cases import Case
from gut_fast.verify.comparison import Candidate, compare_candidate
from gut_fast.verify.lockstep import PRECISIONS, Precision, Problem, same_bits, seeded
from pairwise import all_pairs, each_once
from steps import (
    COLUMNS,
    a_step,
    asymmetric,
    combined_in_float64,
    copied,
    length_of,
    outputs,
    own_rule,
    part_of,
    rows_of,
    stepped,
    unequal_complete,
)

# NumPy, in Triton's interpreter, warns of the infinities and NaNs that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

ALL_RULES = {
    **{name: (rule, {}) for name, rule in RULES.items()},
    **{f"{name} nesterov": (RULES[name], {"nesterov": True}) for name in ("dsgdm", "qg_dsgdm")},
    **{f"own {shape}": (own_rule(*shape), {}) for shape in ((0, 1), (1, 2), (2, 1), (3, 2))},
}
GRAPHS = {
    "one agent": topology.ring(1),
    "two agents": topology.ring(2),
    "three agents": topology.ring(3),
    "ring": topology.ring(16),
    "torus": topology.torus(4, 4).lazy(0.5),
    "star": topology.star(7),
    "petersen": topology.petersen().lazy(0.5),
    "chain": topology.chain(5).lazy(0.5),
    "exponential": topology.exponential(16).lazy(0.5),
    "asymmetric": asymmetric(),
    "one-peer": topology.one_peer_exponential(8),
    "matching": topology.random_matching(5, seed=0),
    "complete": topology.complete(9),
    "large complete": topology.complete(37),
    "unequal complete": unequal_complete(6),
    "dense": topology.erdos_renyi(45, 0.7, seed=0).lazy(0.5),
    "257 agents": topology.ring(257),
}
FEW_RULES = ("dsgd", "gut", "qg_gutm", "gutm", "dsgdm nesterov", "gradient_tracking", "own (0, 1)", "own (3, 2)")
FEW_GRAPHS = ("one agent", "two agents", "star", "asymmetric", "one-peer", "matching", "complete", "ring")
SIZES = [(1,), (2,), (63, 5), (1,) * 40, (4097,), (5, 2048, 1, 300)]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"lr_factors": (1.0, 0.0, 1.0, 0.5)},
    {"scaled": True},
    {"idle": (0,)},
]
PAIRS = {
    "cpu": cpu.PAIRS,
    "cuda": cuda.PAIRS,
    "triton": tuple(PRECISIONS.values()),
    "torch": tuple(PRECISIONS.values()),
}


class Place(NamedTuple):
    """A backend, and the device of the tensors that it is given; "cuda" on "cpu" is the emulation."""

    backend: str
    device: str = "cpu"

    def __str__(self):
        return f"{self.backend}-on-{self.device}"


ON_CPU = [Place(name) for name in PAIRS]
ON_GPU = [Place(name, "cuda") for name in ("cuda", "triton", "torch")]


def is_slow(place):
    """True for Triton's interpreter, which gets fewer and smaller cases."""
    return place == Place("triton")


def marks_of(place):
    return [pytest.mark.gpu] if place in ON_GPU else []


def params_of(cases_of):
    """The parameters of a test of every place and its cases: all pairs, fast on the CPU, each value once elsewhere."""
    params = []
    for place in ON_CPU + ON_GPU:
        fast = cases_of(place, all_pairs if place.backend == "cpu" else each_once)
        has_more = place.backend != "cpu" and (place in ON_CPU or torch.cuda.is_available())
        slow = cases_of(place, all_pairs) if has_more else []
        for case in [*fast, *(case for case in slow if case not in fast)]:
            name = "-".join([str(place), case["rule"], case["graph"], str(Precision(*case["pair"]))])
            marks = [*marks_of(place), *([] if case in fast else [pytest.mark.slow])]
            params.append(pytest.param(place, case, id=name, marks=marks))
    return params


@pytest.fixture
def place(request):
    """The place under test, made ready: the emulation is switched on, Triton is there."""
    if request.param.backend == "triton":
        pytest.importorskip("triton")
    if request.param == Place("cuda"):
        request.getfixturevalue("emulation")
    return request.param


everywhere = pytest.mark.parametrize(
    "place", [pytest.param(place, id=str(place), marks=marks_of(place)) for place in ON_CPU + ON_GPU], indirect=True
)


# Whole steps


def steps_of(place, cover):
    """The cases of whole steps on a backend; several threads only where there is enough work for them."""
    return cover(
        rule=FEW_RULES if is_slow(place) else ALL_RULES,
        graph=FEW_GRAPHS if is_slow(place) else GRAPHS,
        pair=PAIRS[place.backend],
        columns=SIZES[:3] if is_slow(place) else SIZES,
        options=OPTIONS,
        num_steps=[2] if is_slow(place) else [3, 7],
    )


@pytest.mark.parametrize(("place", "case"), params_of(steps_of), indirect=["place"])
def test_steps(place, case):
    rule, hyperparameters = ALL_RULES[case["rule"]]
    graph, options, precision = GRAPHS[case["graph"]], dict(case["options"]), Precision(*case["pair"])
    if options.pop("scaled", False):
        options["grad_scale"] = seeded(graph.num_agents, seed=4).abs()
    settings = {name: options.pop(name) for name in ("weight_decay", "maximize") if name in options}
    problem = Problem(rule, graph, case["columns"], {**hyperparameters, **settings}, **options)
    threads = (1, 3) if place == Place("cpu") and sum(case["columns"]) > 2000 else ()
    num_steps = case["num_steps"] if problem.start.numel() < 100_000 else 2
    given = Case(case["graph"], problem, num_steps, threads)
    candidate = Candidate(rule.name, *place, str(precision))
    exact, plain = (problem.run_reference(given.num_steps, *kind) for kind in ((), (precision,)))
    compare_candidate(candidate, given, precision, exact, plain, _core.available_tiers())
    assert candidate.passed, candidate


# Halves of steps, for agents on several ranks


def ranks_of(name, n):
    """The agents of each rank."""
    return {
        "one rank": [list(range(n))],
        "each alone": [[i] for i in range(n)],
        "two ranks": [[0, 2], [i for i in range(n) if i not in (0, 2)]],
    }[name]


SPLIT_GRAPHS = {
    "ring": topology.ring(6),
    "star": topology.star(7),
    "torus": topology.torus(3, 4),
    "random": topology.erdos_renyi(9, 0.4, seed=1),
    "asymmetric": asymmetric(),
    "dense": topology.erdos_renyi(20, 0.7, seed=0),
    "many rows": topology.ring(70),
    "complete": topology.complete(7),
}


def halves_of(place, cover):
    """The cases of halves of steps on a backend."""
    return cover(
        rule=FEW_RULES if is_slow(place) else ALL_RULES,
        graph=[name for name in SPLIT_GRAPHS if not is_slow(place) or name not in ("many rows", "dense")],
        pair=PAIRS[place.backend],
        ranks=["two ranks", "one rank", "each alone"][: 2 if is_slow(place) else 3],
        columns=[COLUMNS, (1,)] if place.backend in ("triton", "cuda") else [COLUMNS, (1,), (4097, 9000, 5)],
        wire=["parameters", "arithmetic", "bfloat16"],
        only_needed=[False, True],
    )


class Ranks:
    """A step whose agents are on several ranks: their parts, and the agents whose rows must be sent."""

    def __init__(self, step, agents, only_needed):
        self.step, self.agents = step, agents
        split = [part_of(step, own) for own in agents]
        self.names, self.parts = [names for names, _ in split], [part for _, part in split]
        elsewhere = {name for names, own in zip(self.names, agents, strict=True) for name in names[len(own) :]}
        self.senders = elsewhere if only_needed else set(range(step.num_agents))

    def send(self, dtype, backend):
        """The row of each agent, in this dtype; None where nobody hears it. Nothing else may change."""
        shape = self.step.num_agents, length_of(self.step)
        sent = self.step.parameters[0].new_full(shape, math.nan, dtype=dtype)
        for own, part in zip(self.agents, self.parts, strict=True):
            before = copied(part)
            rows = [sent[i] if i in self.senders else None for i in own]
            ops.message(part, rows, backend)
            assert same_bits(outputs(part), outputs(before))
        return [row if i in self.senders else None for i, row in enumerate(sent)]

    def combine(self, sent, backend):
        """The parts after they have mixed the rows."""
        parts = [copied(part) for part in self.parts]
        for names, part in zip(self.names, parts, strict=True):
            ops.combine_(part, [sent[i] for i in names], backend)
        return parts

    def assert_make(self, whole, parts):
        """Asserts that the parts are the whole step, bit for bit."""
        for own, part in zip(self.agents, parts, strict=True):
            assert same_bits(rows_of(part), [row[own].contiguous() for row in rows_of(whole)])


@pytest.mark.parametrize(("place", "case"), params_of(halves_of), indirect=["place"])
def test_halves(place, case, tier):
    rule, hyperparameters = ALL_RULES[case["rule"]]
    dtype, state_dtype = case["pair"]
    step = a_step(
        rule, SPLIT_GRAPHS[case["graph"]], case["columns"], dtype, state_dtype, place.device, **hyperparameters
    )
    exact_dtype = torch.promote_types(arithmetic(dtype), torch.float32)
    ranks = Ranks(step, ranks_of(case["ranks"], step.num_agents), case["only_needed"])
    first = None
    for name in _core.available_tiers() if place.backend == "cpu" else [None]:
        if name is not None:
            tier(name)
        exact = ranks.send(exact_dtype, place.backend)
        whole_in_parts = ranks.combine(exact, place.backend)
        if case["graph"] != "complete":  # some backends sum it in another order where all agents are together
            ranks.assert_make(stepped(step, place.backend), whole_in_parts)
        first = first or whole_in_parts
        assert all(same_bits(outputs(a), outputs(b)) for a, b in zip(first, whole_in_parts, strict=True))
        check_rounded_rows(place, case, ranks, exact)


def check_rounded_rows(place, case, ranks, exact):
    """Rows of another dtype are the exact ones rounded once; they are mixed as they were sent."""
    dtype = ranks.step.dtypes[0]
    wire = {"parameters": dtype, "arithmetic": arithmetic(dtype), "bfloat16": torch.bfloat16}[case["wire"]]
    wire = arithmetic(dtype) if wire == torch.bfloat16 and dtype not in (torch.float32, torch.bfloat16) else wire
    sent = ranks.send(wire, place.backend)
    for row, message in zip(sent, exact, strict=True):
        assert row is None or same_bits([row], [message.to(wire)])
    parts = ranks.combine(sent, place.backend)
    widened = [None if row is None else row.to(arithmetic(dtype)) for row in sent]
    for names, part, result, other in zip(
        ranks.names, ranks.parts, parts, ranks.combine(widened, place.backend), strict=True
    ):
        assert same_bits(outputs(result), outputs(other))
        expected = combined_in_float64(part, [sent[i] for i in names])
        for mine, truth in zip(rows_of(result), expected, strict=True):
            tolerance = 4 * max(torch.finfo(mine.dtype).eps, torch.finfo(arithmetic(dtype)).eps)
            scale = max(truth.abs().max().item(), 10.0)  # 1 / lr: a rounding of z is one of z / lr in the state
            assert (mine.cpu().double() - truth).abs().max() <= tolerance * scale


# Odd cases of a step


@everywhere
@pytest.mark.parametrize("graph", ["ring", "star", "complete"])
def test_nan_reaches_the_neighbours_only(graph, place):
    W = SPLIT_GRAPHS[graph]
    step = a_step("gut", W, device=place.device)
    step.gradients[2][5, 66] = math.nan
    reached = {(agent, 66) for agent in {5, *W.neighbors(5)}}
    z = stepped(step, place.backend).parameters[2]
    assert {tuple(entry) for entry in z.isnan().nonzero().tolist()} == reached


@everywhere
def test_infinity_stays_with_an_agent_that_has_no_neighbour(place):
    step = a_step("dsgd", topology.random_matching(5, seed=0), (9,), device=place.device)
    (lonely,) = torch.nonzero(step.row_start.diff() == 0).flatten().tolist()
    step.parameters[0][lonely, 3] = math.inf
    (z,) = outputs(stepped(step, place.backend))
    assert z[lonely, 3] == math.inf
    assert int(z.isfinite().sum()) == 44


@everywhere
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_scale_of_zero_drops_any_gradient(value, place):
    step = a_step("gutm", device=place.device)
    zeroed, spoiled = ([g.clone() for g in step.gradients] for _ in range(2))
    for g, h in zip(zeroed, spoiled, strict=True):
        g[0], h[0] = 0.0, value  # agent 0 has scale zero
    expected = stepped(step._replace(gradients=zeroed), place.backend)
    result = stepped(step._replace(gradients=spoiled), place.backend)
    assert all(torch.equal(a, b) for a, b in zip(outputs(result), outputs(expected), strict=True))
    rows = [torch.zeros(length_of(step), device=place.device) for _ in range(6)]
    ops.message(step._replace(gradients=spoiled), rows, place.backend)
    assert all(row.isfinite().all() for row in rows)


@everywhere
def test_plain_gossip_reads_no_gradient(place):
    for rule in ALL_RULES if place.backend in ("cpu", "cuda") else ("gut", "gradient_tracking"):
        step = a_step(ALL_RULES[rule][0], columns=(70,), device=place.device, lr=0.0)
        step.gradients[0].fill_(math.nan)
        after = stepped(step, place.backend)
        assert after.parameters[0].isfinite().all(), rule
        assert all(torch.equal(a, b) for a, b in zip(after.state, step.state, strict=True)), rule


@everywhere
def test_gradients_of_any_kind(place):
    step = a_step(columns=(3, 6, 4, 5, 2), device=place.device)
    a, b, c, *_ = step.gradients
    ones = torch.ones(6, 1, device=place.device).expand(6, 5)
    mixed = [a.t().contiguous().t(), torch.cat([b, b], dim=1)[:, ::2], torch._neg_view(c), ones, None]
    plain = [mixed[0].contiguous(), mixed[1].contiguous(), -c, ones.contiguous(), torch.zeros_like(step.gradients[4])]
    expected = outputs(stepped(step._replace(gradients=plain), place.backend))
    assert same_bits(outputs(stepped(step._replace(gradients=mixed), place.backend)), expected)
    empty = [*plain[:4], a.new_empty(0)]
    assert same_bits(outputs(stepped(step._replace(gradients=empty), place.backend)), expected)


@everywhere
def test_as_many_edges_as_the_complete_graph_are_not_yet_that_graph(place):
    step = a_step("gut", topology.complete(6), device=place.device)
    step.neighbor[:5] = 1  # all neighbours of agent 0
    expected = combined_in_float64(step, [None] * 6)
    for mine, truth in zip(rows_of(stepped(step, place.backend)), expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-5, atol=1e-4)


@everywhere
def test_no_columns_and_no_segments(place):
    nothing = stepped(a_step(columns=(0, 0), device=place.device), place.backend)
    assert [tensor.numel() for tensor in outputs(nothing)] == [0, 0, 0]
    with_empty = stepped(a_step(columns=(3, 0), device=place.device), place.backend)
    without = stepped(a_step(columns=(3,), device=place.device), place.backend)
    assert torch.equal(with_empty.parameters[0], without.parameters[0])


@everywhere
def test_one_agent_needs_no_leading_dimension(place):
    _, part = part_of(a_step("gut", device=place.device), [2])
    alone = copied(part)._replace(
        parameters=[p[0].reshape(-1, 1).clone() for p in part.parameters],
        gradients=[g[0].reshape(-1, 1) for g in part.gradients],
    )
    received = [seeded(length_of(part), seed=i, dtype=torch.float32).to(place.device) for i in range(2)]
    results = []
    for step in (copied(part), alone):
        rows = [torch.empty_like(received[0]), *received]
        ops.message(step, rows[:1], place.backend)
        ops.combine_(step, rows, place.backend)
        results.append([tensor.flatten() for tensor in outputs(step)])
    assert same_bits(*results)


@everywhere
def test_the_halves_write_nothing_beside_their_tensors(place):
    guards = []

    def guarded(tensor):
        whole = tensor.new_full((tensor.numel() + 128,), 7.5)
        guards.extend([whole[:64], whole[-64:]])
        return whole[64:-64].view_as(tensor).copy_(tensor)

    for dtype, wire in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        step = a_step("gradient_tracking", SPLIT_GRAPHS["ring"], dtype=dtype, device=place.device)
        step = step._replace(parameters=[guarded(p) for p in step.parameters], state=[guarded(s) for s in step.state])
        rows = [guarded(torch.empty(length_of(step), dtype=wire, device=place.device)) for _ in range(6)]
        gradients = [g.clone() for g in step.gradients]
        for present in (rows, [None, None, *rows[2:]]):
            ops.message(step, present, place.backend)
            ops.combine_(step, present, place.backend)
        assert same_bits(gradients, step.gradients)
    assert all((guard == 7.5).all() for guard in guards)


@everywhere
@pytest.mark.parametrize("rule", ["gut", "own"])
def test_zero_times_nan_is_nothing(place, rule):
    """A coefficient that is zero reads nothing, whether it always is or happens to be in these hyper-parameters."""
    if rule == "gut":
        step = a_step("gut", topology.ring(4), (70,), device=place.device, mu=0.0)  # r leaves z and itself alone
    else:
        step = a_step(own_rule(2, 2), topology.ring(4), (70,), device=place.device)
        K, L, M = 4, 3, 2
        cells = [*range(1, M * K, K), *range(M * K + 1, (M + L) * K, K)]  # the second input in A and in B
        step.coefficients[cells] = 0.0
    clean = step._replace(state=[torch.zeros_like(step.state[0]), *step.state[1:]])
    step.state[0].fill_(math.nan)
    assert same_bits(outputs(stepped(step, place.backend)), outputs(stepped(clean, place.backend)))
