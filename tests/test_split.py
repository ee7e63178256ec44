"""The split form: agents on several ranks, message and combine, give what one fused step of all of them gives."""

import pytest
import torch

from gut_fast import _core, ops, topology
from gut_fast.backends import BACKENDS, GossipStep
from gut_fast.lockstep import seeded
from gut_fast.rules import RULES

COLUMNS = (5, 1, 130)
SPLIT = [
    name
    for name, backend in BACKENDS.items()
    if hasattr(backend, "combine")
    and backend.unavailable("cpu", torch.float32, 1, 1) is None
    and name != "triton"  # slow in its interpreter: test_triton.py has less of the same
]
GRAPHS = [topology.ring(6), topology.star(7), topology.torus(3, 4), topology.erdos_renyi(9, 0.4, seed=1)]


def whole_step(rule, graph, dtype=torch.float32, state_dtype=None):
    n, rule = graph.num_agents, RULES[rule]
    return GossipStep(
        [seeded(n, d, seed=d, dtype=dtype) for d in COLUMNS],
        [seeded(n * sum(COLUMNS), seed=k, dtype=state_dtype or dtype) for k in range(len(rule.states))],
        [seeded(n, d, seed=d + 50, dtype=dtype) for d in COLUMNS],
        torch.tensor(rule.coefficients(0.1, weight_decay=0.01).flat(), dtype=torch.float64),
        rule.num_messages,
        *graph.csr(),
        torch.linspace(0, 1, n, dtype=torch.float64),
    )


def part_of(step, agents):
    """The step of these agents alone, and which agents' rows it needs, its own first."""
    state = [[block[agents].flatten() for block in blocks(buffer, step)] for buffer in step.state]
    edges = [range(int(step.row_start[i]), int(step.row_start[i + 1])) for i in agents]
    names = [[int(step.neighbor[e]) for e in own] for own in edges]
    rows = [*agents, *sorted({name for own in names for name in own} - set(agents))]
    starts = torch.tensor([0, *map(len, edges)]).cumsum(0)
    return rows, step._replace(
        parameters=[p[agents] for p in step.parameters],
        state=[torch.cat(pieces) for pieces in state],
        gradients=[g[agents] for g in step.gradients],
        row_start=starts,
        neighbor=torch.tensor([rows.index(name) for own in names for name in own], dtype=torch.int64),
        weight=torch.cat([step.weight[list(own)] for own in edges]),
        grad_scale=step.grad_scale[agents],
    )


def blocks(buffer, step):
    n = step.num_agents
    return [block.view(n, -1) for block in buffer.split([n * d for d in COLUMNS])]


def fused(step, backend):
    step = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    ops.gossip_step_(*step, backend)
    return step


def split(step, ranks, backend, row_dtype=None, only_needed=False):
    """All ranks' messages, or only those that another rank needs, then all ranks' mixing; returns the parts."""
    parts = [part_of(step, agents) for agents in ranks]
    length = step.num_messages * sum(COLUMNS)
    dtype = row_dtype or step.parameters[0].dtype
    sent = torch.full((step.num_agents, length), torch.nan, dtype=dtype)
    own = []
    for agents, (_, part) in zip(ranks, parts, strict=True):
        before = [tensor.clone() for tensor in (*part.parameters, *part.state)]
        heard = {name for rows, _ in parts for name in rows[len(agents_of(rows, ranks)) :]} if only_needed else agents
        own.append([sent[i] if i in heard else None for i in agents])
        ops.message(part, own[-1], backend)
        assert all(map(torch.equal, before, (*part.parameters, *part.state)))
    for mine, (rows, part) in zip(own, parts, strict=True):
        ops.combine_(part, [*mine, *(sent[i] for i in rows[len(mine) :])], backend)
    return [part for _, part in parts]


def agents_of(rows, ranks):
    return next(agents for agents in ranks if agents == rows[: len(agents)])


def assert_same(whole, parts, ranks):
    for agents, part in zip(ranks, parts, strict=True):
        assert all(torch.equal(p[agents], q) for p, q in zip(whole.parameters, part.parameters, strict=True))
        for buffer, own in zip(whole.state, part.state, strict=True):
            assert torch.equal(torch.cat([block[agents].flatten() for block in blocks(buffer, whole)]), own)


@pytest.mark.parametrize("backend", SPLIT)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_together_make_the_fused_step(rule, graph, backend):
    step, n = whole_step(rule, graph), graph.num_agents
    for ranks in ([list(range(n))], [[i] for i in range(n)], [[0, 2], [1], list(range(3, n))]):
        assert_same(fused(step, backend), split(step, ranks, backend), ranks)


@pytest.mark.parametrize("backend", [*SPLIT, "triton"])
@pytest.mark.parametrize("rule", ["gut", "momentum_tracking"])
def test_agents_that_only_neighbours_here_hear_need_no_row(rule, backend):
    step, ranks = whole_step(rule, GRAPHS[0]), [[0, 1, 2, 3], [4, 5]]
    assert_same(fused(step, backend), split(step, ranks, backend, only_needed=True), ranks)


@pytest.fixture
def tier():
    """Sets the instruction tier, and puts it back."""
    before = _core.tier()
    yield _core.set_tier
    _core.set_tier(before)


@pytest.mark.parametrize("rule", RULES)
def test_instruction_tiers_and_threads_agree(rule, tier, threads):
    step, ranks = whole_step(rule, GRAPHS[1]), [[0, 2], [1], [3, 4, 5, 6]]
    whole = fused(step, "cpu")
    for name in _core.available_tiers():
        tier(name)
        for number in (1, 2):
            threads(number)
            for only_needed in (False, True):
                assert_same(whole, split(step, ranks, "cpu", only_needed=only_needed), ranks)


@pytest.mark.parametrize("backend", [*SPLIT, "triton"])
@pytest.mark.parametrize("only_needed", [False, True])
def test_bfloat16_messages_of_float32_parameters_are_rounded_once(only_needed, backend):
    step, ranks = whole_step("gut", GRAPHS[0]), [[0, 1, 2, 3], [4], [5]]
    parts = split(step, ranks, backend, torch.bfloat16, only_needed)
    rows = [torch.empty(sum(COLUMNS)) for _ in range(6)]
    ops.message(step, rows, "torch")
    inner = {1, 2} if only_needed else set()
    seen = [row if i in inner else row.bfloat16().float() for i, row in enumerate(rows)]
    expected = step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])
    ops.combine_(expected, seen, "torch")
    for agents, part in zip(ranks, parts, strict=True):
        for p, q in zip(expected.parameters, part.parameters, strict=True):
            assert torch.allclose(p[agents], q, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fused(step, backend).parameters[2][4], parts[1].parameters[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_compiled_halves_write_nothing_else(dtype):
    step = whole_step("gradient_tracking", GRAPHS[0], dtype)
    kind = torch.float32 if dtype == torch.bfloat16 else dtype
    length = 2 * sum(COLUMNS)
    whole = torch.full((6, length + 128), 7.5, dtype=kind)
    rows = [row[64:-64] for row in whole]
    ops.message(step, rows, "cpu")
    ops.combine_(step, rows, "cpu")
    assert (whole[:, :64] == 7.5).all()
    assert (whole[:, -64:] == 7.5).all()


def test_a_dropped_gradient_brings_no_nan():
    step = whole_step("gut", GRAPHS[0])
    step.gradients[2][0] = torch.nan  # of agent 0, whose scale is zero
    for part in split(step, [[0], [1, 2], [3, 4, 5]], "cpu"):
        assert all(p.isfinite().all() for p in (*part.parameters, *part.state))


def test_a_received_row_must_be_there():
    step = whole_step("gut", GRAPHS[0])
    rows = [None] * 6
    with pytest.raises(ValueError, match="row 6 is None, but it is of an agent that is not here"):
        ops.combine_(step, [*rows, None])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in SPLIT for d in (torch.bfloat16, torch.float16) if (b, d) != ("cpu", torch.float16)],
    ids=str,
)
def test_messages_in_the_dtype_of_arithmetic_lose_nothing(dtype, backend):
    step = whole_step("gutm", GRAPHS[0], dtype, torch.float32)
    ranks = [[0, 1, 2], [3, 4, 5]]
    assert_same(fused(step, backend), split(step, ranks, backend, torch.float32), ranks)


@pytest.mark.parametrize("backend", SPLIT)
def test_rounded_messages_keep_the_mean_over_agents(backend):
    step = whole_step("dsgd", GRAPHS[2], torch.bfloat16)._replace(grad_scale=torch.zeros(12, dtype=torch.float64))
    step = step._replace(
        parameters=[p.float() for p in step.parameters],
        gradients=[g.float() for g in step.gradients],
        coefficients=torch.tensor(RULES["dsgd"].coefficients(0.0).flat(), dtype=torch.float64),
    )
    exact = step._replace(parameters=[p.double() for p in step.parameters])
    rows = [torch.empty(sum(COLUMNS)) for _ in range(12)]
    ops.message(step, rows, backend)
    ops.combine_(step, [row.bfloat16().float() for row in rows], backend)
    for before, after in zip(exact.parameters, step.parameters, strict=True):
        assert (before.mean(0) - after.double().mean(0)).abs().max() < 1e-6


BAD = {
    "too few": (lambda rows: rows[:5], ValueError, "5 rows of messages, expected 6"),
    "length": (lambda rows: [row[:-1] for row in rows], ValueError, "row 0 has shape .* expected 136 contiguous"),
    "strides": (lambda rows: [torch.empty(272)[::2] for _ in rows], ValueError, "row 0 has shape"),
    "dtype": (lambda rows: [row.double() for row in rows], TypeError, "row 0 is torch.float64"),
    "device": (lambda rows: [row.to("meta") for row in rows], TypeError, "row 0 is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_change_nothing(case):
    change, error, message = BAD[case]
    step = whole_step("gut", GRAPHS[0])
    before = [p.clone() for p in step.parameters]
    rows = [torch.zeros(sum(COLUMNS)) for _ in range(6)]
    for call in (ops.message, ops.combine_):
        with pytest.raises(error, match=message):
            call(step, change(rows))
    assert all(map(torch.equal, before, step.parameters))
    assert not any(row.any() for row in rows)


@pytest.mark.parametrize("backend", SPLIT)
def test_an_edge_to_a_row_that_is_not_there(backend):
    step = whole_step("gut", GRAPHS[0])
    step.neighbor[3] = 6
    with pytest.raises(ValueError, match="row 1 names agent 6, which is not another one of the 6"):
        ops.combine_(step, [torch.zeros(sum(COLUMNS)) for _ in range(6)], backend)
