"""The split form: agents on several ranks, message and combine, give what one fused step of all of them gives."""

import pytest
import torch

from gut_fast import _core, topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import BACKENDS, GossipStep, arithmetic, cpu
from gut_fast.rules import RULES
from gut_fast.verify.lockstep import seeded

COLUMNS = (5, 1, 130)
LONG = (4097, 33_000, 5)  # several tiles, and enough for a second thread in an agent of its own
SPLIT = [
    name
    for name, backend in BACKENDS.items()
    if hasattr(backend, "combine")
    and backend.unavailable("cpu", torch.float32, 1, 1) is None
    and name != "triton"  # slow in its interpreter: test_triton.py has less of the same
]
GRAPHS = [topology.ring(6), topology.star(7), topology.torus(3, 4), topology.erdos_renyi(9, 0.4, seed=1)]


def whole_step(rule, graph, dtype=torch.float32, state_dtype=None, columns=COLUMNS):
    n, rule = graph.num_agents, RULES[rule]
    return GossipStep(
        [seeded(n, d, seed=d, dtype=dtype) for d in columns],
        [seeded(n * sum(columns), seed=k, dtype=state_dtype or dtype) for k in range(len(rule.states))],
        [seeded(n, d, seed=d + 50, dtype=dtype) for d in columns],
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
        grad_scale=None if step.grad_scale is None else step.grad_scale[agents],
    )


def blocks(buffer, step):
    n = step.num_agents
    return [block.view(n, -1) for block in buffer.split([p.numel() for p in step.parameters])]


def length_of(step):
    """Numbers in a row of messages."""
    return step.num_messages * sum(p[0].numel() for p in step.parameters)


def copied(step):
    return step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])


def fused(step, backend):
    step = copied(step)
    ops.gossip_step_(*step, backend)
    return step


def split(step, ranks, backend, row_dtype=None, only_needed=False):
    """All ranks' messages, or only those that another rank needs, then all ranks' mixing; returns the parts."""
    parts = [part_of(step, agents) for agents in ranks]
    dtype = row_dtype or step.parameters[0].dtype
    sent = torch.full((step.num_agents, length_of(step)), torch.nan, dtype=dtype)
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
def test_instruction_tiers_agree(rule, tier):
    step, ranks = whole_step(rule, GRAPHS[1]), [[0, 2], [1], [3, 4, 5, 6]]
    whole = fused(step, "cpu")
    for name in _core.available_tiers():
        tier(name)
        for only_needed in (False, True):
            assert_same(whole, split(step, ranks, "cpu", only_needed=only_needed), ranks)


@pytest.mark.parametrize("rule", ["gut", "gradient_tracking"])
def test_tiles_and_threads_agree(rule, threads):
    step, ranks = whole_step(rule, topology.ring(4), columns=LONG)._replace(grad_scale=None), [[0], [1, 2, 3]]
    whole, rounded = fused(step, "cpu"), split(step, ranks, "cpu", torch.bfloat16)
    for number in (1, 2, 3):
        threads(number)
        assert_same(whole, split(step, ranks, "cpu", only_needed=True), ranks)
        for part, again in zip(rounded, split(step, ranks, "cpu", torch.bfloat16), strict=True):
            assert all(map(torch.equal, (*part.parameters, *part.state), (*again.parameters, *again.state)))


@pytest.mark.parametrize("dtypes", cpu.PAIRS, ids=str)
def test_storages(dtypes, tier):
    step, ranks = whole_step("qg_gutm", GRAPHS[0], *dtypes), [[0], [1, 2, 3], [4, 5]]
    whole = fused(step, "cpu")
    for name in _core.available_tiers():
        tier(name)
        for only_needed in (False, True):
            assert_same(whole, split(step, ranks, "cpu", arithmetic(dtypes[0]), only_needed), ranks)


@pytest.mark.parametrize(("states", "messages"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_a_rule_that_is_not_in_the_table(states, messages):
    step = whole_step("gut", GRAPHS[1])
    length = messages * (states + 2) + (states + 1) * (states + 2) + 2 * (states + 1) * messages
    step = step._replace(
        state=[seeded(7 * sum(COLUMNS), seed=k, dtype=torch.float32) for k in range(states)],
        coefficients=seeded(length, seed=9, dtype=torch.float64),
        num_messages=messages,
    )
    ranks = [[0, 2], [1], [3, 4, 5, 6]]
    assert_same(fused(step, "cpu"), split(step, ranks, "cpu", only_needed=True), ranks)


@pytest.mark.parametrize("rule", ["gut", "gradient_tracking"])
@pytest.mark.parametrize("missing", [(), (1, 2)])
@pytest.mark.parametrize("in_table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_rows_are_mixed_as_the_same_numbers_in_float32(dtype, in_table, missing, rule, tier):
    rows, part = part_of(whole_step(rule, GRAPHS[0], dtype, columns=(5, 5000)), [0, 1, 2, 3])
    if not in_table:
        part = part._replace(coefficients=seeded(len(part.coefficients), seed=9, dtype=torch.float64))
    halves = [None if i in missing else seeded(length_of(part), seed=i).bfloat16() for i in range(len(rows))]
    expected = copied(part)
    ops.combine_(expected, [None if row is None else row.float() for row in halves], "cpu")
    for name in _core.available_tiers():
        tier(name)
        step = copied(part)
        ops.combine_(step, halves, "cpu")
        assert all(map(torch.equal, (*expected.parameters, *expected.state), (*step.parameters, *step.state)))


def test_bfloat16_messages_are_the_float32_ones_rounded(tier):
    step = whole_step("gradient_tracking", GRAPHS[0])
    exact = torch.empty(6, length_of(step))
    ops.message(step, list(exact), "cpu")
    for name in _core.available_tiers():
        tier(name)
        rounded = exact.new_full(exact.shape, torch.nan, dtype=torch.bfloat16)
        ops.message(step, list(rounded), "cpu")
        assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("backend", [*SPLIT, "triton"])
@pytest.mark.parametrize("only_needed", [False, True])
def test_bfloat16_messages_of_float32_parameters_are_rounded_once(only_needed, backend):
    step, ranks = whole_step("gut", GRAPHS[0]), [[0, 1, 2, 3], [4], [5]]
    parts = split(step, ranks, backend, torch.bfloat16, only_needed)
    rows = [torch.empty(sum(COLUMNS)) for _ in range(6)]
    ops.message(step, rows, "torch")
    inner = {1, 2} if only_needed else set()
    seen = [row if i in inner else row.bfloat16().float() for i, row in enumerate(rows)]
    expected = copied(step)
    ops.combine_(expected, seen, "torch")
    for agents, part in zip(ranks, parts, strict=True):
        for p, q in zip(expected.parameters, part.parameters, strict=True):
            assert torch.allclose(p[agents], q, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fused(step, backend).parameters[2][4], parts[1].parameters[2], rtol=1e-5, atol=1e-6)


def guarded(tensor, guards):
    """A copy with 7.5 for a while before and after it, all of which is appended to `guards`."""
    whole = tensor.new_full((tensor.numel() + 128,), 7.5)
    guards += [whole[:64], whole[-64:]]
    return whole[64:-64].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_the_compiled_halves_write_nothing_else(dtype, wire):
    step, guards = whole_step("gradient_tracking", GRAPHS[0], dtype), []
    step = step._replace(
        parameters=[guarded(p, guards) for p in step.parameters], state=[guarded(s, guards) for s in step.state]
    )
    rows = [guarded(torch.empty(length_of(step), dtype=wire), guards) for _ in range(6)]
    gradients = [g.clone() for g in step.gradients]
    for present in (rows, [None, None, *rows[2:]]):
        ops.message(step, present, "cpu")
        ops.combine_(step, present, "cpu")
    assert all((guard == 7.5).all() for guard in guards)
    assert all(map(torch.equal, gradients, step.gradients))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("only_needed", [False, True])
def test_a_dropped_gradient_brings_nothing_in(only_needed, value):
    step = whole_step("gut", GRAPHS[0])
    step.gradients[2][0] = value  # of agent 0, whose scale is zero
    ranks = [[0], [1, 2], [3, 4, 5]]
    parts = split(step, ranks, "cpu", only_needed=only_needed)
    assert_same(fused(step, "cpu"), parts, ranks)
    for part in parts:
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


def test_rows_of_half_the_width_beside_float64():
    step = whole_step("gut", GRAPHS[0], torch.float64)
    with pytest.raises(TypeError, match=r"row 0 is torch.bfloat16, .* the parameters are torch.float64"):
        ops.message(step, [torch.zeros(sum(COLUMNS), dtype=torch.bfloat16) for _ in range(6)])


@pytest.mark.parametrize("backend", SPLIT)
@pytest.mark.parametrize("neighbor", [-1, 1, 6])  # of agent 1
def test_an_edge_to_a_row_that_is_not_there(neighbor, backend):
    step = whole_step("gut", GRAPHS[0])
    step.neighbor[3] = neighbor
    before = copied(step)
    with pytest.raises(ValueError, match=f"row 1 names agent {neighbor}, which is not another one of the 6"):
        ops.combine_(step, [torch.zeros(sum(COLUMNS)) for _ in range(6)], backend)
    assert all(map(torch.equal, (*before.parameters, *before.state), (*step.parameters, *step.state)))


@pytest.mark.parametrize("backend", [*SPLIT, "triton"])
@pytest.mark.parametrize("only_needed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_rounding_takes_from_a_message_goes_into_the_next(dtype, only_needed, backend):
    step = whole_step("gradient_tracking", GRAPHS[0], dtype)
    exact, rows = torch.empty(6, length_of(step)), torch.empty(6, length_of(step), dtype=torch.bfloat16)
    ops.message(step, list(exact), backend)
    sent = [None if only_needed and i in (1, 4) else row for i, row in enumerate(rows)]
    residuals = [None if row is None else torch.zeros(len(row)) for row in sent]
    total = torch.zeros_like(exact, dtype=torch.float64)
    for count in range(1, 21):
        ops.message(step, sent, backend, residuals=residuals)
        for i, (row, residual) in enumerate(zip(sent, residuals, strict=True)):
            if row is not None:
                total[i] += row.double()
                assert torch.allclose(total[i] + residual, count * exact[i].double(), rtol=1e-5, atol=1e-5)
                assert (residual.abs() <= 2.0**-8 * (exact[i].abs() + residual.abs())).all()


def test_residuals_have_the_same_bits_on_every_tier_and_in_any_layout(tier):
    whole = whole_step("gradient_tracking", GRAPHS[0], columns=LONG)
    strided = whole._replace(gradients=[g.t().contiguous().t() for g in whole.gradients])
    assert cpu.direct_step(strided) is None
    exact = torch.empty(6, length_of(whole))
    ops.message(whole, list(exact), "cpu")
    before = [seeded(length_of(whole), seed=i, dtype=torch.float32) * 1e-3 for i in range(6)]
    expected_rows = [(message + left).bfloat16() for message, left in zip(exact, before, strict=True)]
    for name in _core.available_tiers():
        tier(name)
        for step in (whole, strided):
            rows, residuals = [torch.empty_like(row) for row in expected_rows], [left.clone() for left in before]
            ops.message(step, rows, "cpu", residuals=residuals)
            assert all(map(torch.equal, rows, expected_rows))
            for i in range(6):
                assert torch.equal(residuals[i], exact[i] + before[i] - rows[i])


BAD_RESIDUALS = {
    "too few": (torch.bfloat16, lambda: [torch.zeros(136)] * 5, ValueError, "5 residuals, expected 6"),
    "missing": (torch.bfloat16, lambda: [torch.zeros(136)] * 5 + [None], ValueError, "residual 5 is None"),
    "length": (
        torch.bfloat16,
        lambda: [torch.zeros(135)] * 6,
        ValueError,
        r"residual 0 is \(\(135,\), .* expected 136",
    ),
    "dtype": (torch.bfloat16, lambda: [torch.zeros(136).double()] * 6, TypeError, "residual 0 is torch.float64"),
    "no rounding": (torch.float32, lambda: [torch.zeros(136)] * 6, TypeError, "loses nothing of torch.float32"),
}


@pytest.mark.parametrize("case", BAD_RESIDUALS)
@pytest.mark.parametrize("backend", SPLIT)
def test_bad_residuals_change_nothing(backend, case):
    wire, make, error, message = BAD_RESIDUALS[case]
    rows = [torch.zeros(sum(COLUMNS), dtype=wire) for _ in range(6)]
    with pytest.raises(error, match=message):
        ops.message(whole_step("gut", GRAPHS[0]), rows, backend, residuals=make())
    assert not any(row.any() for row in rows)


@pytest.mark.parametrize("backend", SPLIT)
def test_one_agent_needs_no_leading_dimension(backend):
    _, part = part_of(whole_step("gut", GRAPHS[0]), [2])
    alone = copied(part)
    alone = alone._replace(
        parameters=[p[0].reshape(-1, 1) for p in alone.parameters],
        gradients=[g[0].reshape(-1, 1) for g in alone.gradients],
    )
    for step in (part, alone):
        received = [seeded(sum(COLUMNS), seed=i, dtype=torch.float32) for i in range(2)]
        rows = [torch.empty(sum(COLUMNS)), *received]
        ops.message(step, rows[:1], backend)
        ops.combine_(step, rows, backend)
    for p, q in zip(part.parameters, alone.parameters, strict=True):
        assert torch.equal(p.flatten(), q.flatten())
    assert all(map(torch.equal, part.state, alone.state))
