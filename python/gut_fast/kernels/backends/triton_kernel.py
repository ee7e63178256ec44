"""The Triton kernel: a step of any rule, of all segments and agents, in one launch; `triton` beside it calls it.

A program takes a tile at a time: some columns of one segment, of all agents, in blocks of ``BLOCK_AGENTS``. It writes
the tile's messages into scratch of its own, which stays in the caches, waits for its threads, and then mixes: the drift
reads the neighbours' messages there. In the split form the messages go to, or come from, the rows that agents send.

Results do not depend on how tiles are cut, and the halves of the split form round as the whole step does: sums run in
the order of the coefficients and of the CSR rows, and every product is added by an explicit fma.

Expected on an H100, not measured: 16 agents on a ring, GUT in float32, move 20 bytes a number through device memory and
28 to 32 through the L2 cache (u 12, messages 4 out and 4 to 8 in, outputs 8), which should hide behind the former.
Compiled for sm_90 this takes 88 registers, spills nothing, and all accesses are 16 bytes wide; odd columns make them
4 bytes. On dense graphs the messages read from the L1 cache bound it: 252 bytes a number on the complete graph of 64
agents, at best 0.6 of the speed of memory. Beyond 128 agents inputs are read twice, the second time from L2.

Names of tuples: ``tile`` is where a tile lies, ``channel`` where its messages lie, ``own`` a block of agents' numbers.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton knows no starred expressions)

import triton
import triton.language as tl

__all__ = ["gossip_kernel"]


@triton.jit(do_not_specialize=["num_segments", "num_agents", "num_rows"])
def gossip_kernel(
    table,
    num_segments,
    num_agents,
    coefficients,
    grad_scale,
    row_start,
    neighbor,
    weight,
    num_rows,
    rows,
    Q: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROW_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SENDS: tl.constexpr,
    MIXES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_AGENTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Computes a step (`SENDS` and `MIXES`), or one half of it.

    Args:
        table: int64 [q + 4 (P + 1)]: addresses of the states; for each of P segments addresses of parameters and
            gradients (0: none), its first column in an agent's whole model, its first tile; 0, 0, ΣD, all tiles.
        num_segments: P.
        num_agents: N.
        coefficients: float64: A, B, C, E.
        grad_scale: float64 [N], or None.
        row_start: int64 [N + 1], with the next two the CSR rows of W.
        neighbor: int64 [edges].
        weight: float64 [edges].
        num_rows: every neighbour's index is below it; an index that is not makes the agent's drift NaN.
        rows: scratch [programs, M, agents, columns]; in the split form int64 [num_rows], addresses of rows [M ΣD].
        Q: number of states.
        M: number of messages.
        DTYPE: dtype of parameters and gradients.
        STATE_DTYPE: dtype of the state.
        ROW_DTYPE: dtype of the messages in the rows of the split form.
        COMPUTE: dtype of arithmetic.
        SENDS: true if messages are written.
        MIXES: true if parameters and state are written.
        ALIGNMENT: divides all segments' columns; addresses are multiples of the space of so many numbers.
        BLOCK_AGENTS: number of agents in a block.
        BLOCK_COLUMNS: number of columns in a tile.
        ONE_BLOCK: true if all agents are one block, which stays in registers from message to mixing.
        BY_HAND: true if bfloat16 is rounded to by integer operations.
    """
    program = tl.program_id(0)
    end = table + Q + 4 * num_segments
    stride, num_tiles = tl.multiple_of(tl.load(end + 2), ALIGNMENT), tl.load(end + 3)
    factors = _scalars(coefficients, M * (Q + 2) + (Q + 1) * (Q + 2 + 2 * M), COMPUTE)
    if SENDS and MIXES:
        stride = tl.cdiv(num_agents, BLOCK_AGENTS).to(tl.int64) * (BLOCK_AGENTS * BLOCK_COLUMNS)
        rows += program * (M * stride)
    channel = (rows, stride, num_rows)
    edges = (neighbor, weight)
    if ONE_BLOCK and MIXES:
        links = _links(0, num_agents, row_start, BLOCK_AGENTS)
    for index in range(program, num_tiles, tl.num_programs(0)):
        tile = _tile(index, table, num_segments, num_agents, Q, DTYPE, STATE_DTYPE, ALIGNMENT, BLOCK_COLUMNS)
        if ONE_BLOCK:
            own = _own(0, tile, num_agents, factors, grad_scale, Q, M, COMPUTE, BLOCK_AGENTS)
            if SENDS:
                _send(own, tile, channel, M, ROW_DTYPE, ALIGNMENT, BY_HAND)
            if SENDS and MIXES:
                tl.debug_barrier()
            if MIXES:
                _mix(own, tile, channel, factors, links, edges, Q, M, ROW_DTYPE, ALIGNMENT, BY_HAND)
        else:
            if SENDS:
                for first in range(0, num_agents, BLOCK_AGENTS):
                    own = _own(first, tile, num_agents, factors, grad_scale, Q, M, COMPUTE, BLOCK_AGENTS)
                    _send(own, tile, channel, M, ROW_DTYPE, ALIGNMENT, BY_HAND)
            if SENDS and MIXES:
                tl.debug_barrier()
            if MIXES:
                for first in range(0, num_agents, BLOCK_AGENTS):
                    own = _own(first, tile, num_agents, factors, grad_scale, Q, M, COMPUTE, BLOCK_AGENTS)
                    links = _links(first, num_agents, row_start, BLOCK_AGENTS)
                    _mix(own, tile, channel, factors, links, edges, Q, M, ROW_DTYPE, ALIGNMENT, BY_HAND)
        if SENDS and MIXES:
            tl.debug_barrier()


@triton.jit
def _scalars(source, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(source + k).to(COMPUTE),)
    return values


@triton.jit
def _links(first, num_agents, row_start, BLOCK_AGENTS: tl.constexpr):
    """The starts of the CSR rows of a block of agents, their numbers of neighbours, and the largest number."""
    agents = first + tl.arange(0, BLOCK_AGENTS)
    start = tl.load(row_start + agents, agents < num_agents, 0)
    degree = tl.load(row_start + agents + 1, agents < num_agents, 0) - start
    return start, degree, tl.max(degree, 0)


@triton.jit
def _tile(
    index,
    table,
    num_segments,
    num_agents,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The tile's place: where the segment's z, states and gradient begin, its width, columns in segment and model."""
    segments = table + Q
    place = segments + 4 * _segment_of(index, segments, num_segments)
    before = tl.multiple_of(tl.load(place + 2), ALIGNMENT)
    width = tl.multiple_of(tl.load(place + 6) - before, ALIGNMENT)
    bases = (_pointer(tl.load(place), DTYPE, ALIGNMENT),)
    for k in tl.static_range(Q):
        bases = bases + (_pointer(tl.load(table + k), STATE_DTYPE, ALIGNMENT) + num_agents * before,)
    gradient = tl.load(place + 1)
    first = (index - tl.load(place + 3)) * BLOCK_COLUMNS
    columns = first + tl.arange(0, BLOCK_COLUMNS)
    return bases, _pointer(gradient, DTYPE, ALIGNMENT), gradient != 0, width, columns, before + columns


@triton.jit
def _segment_of(index, segments, num_segments):
    """The last segment whose first tile is not after this one."""
    low, high = 0, num_segments
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(segments + 4 * middle + 3) <= index
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT * (DTYPE.primitive_bitwidth // 8))


@triton.jit
def _own(
    first,
    tile,
    num_agents,
    factors,
    grad_scale,
    Q: tl.constexpr,
    M: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_AGENTS: tl.constexpr,
):
    """A block of agents: their indices, which numbers are there, where z and states lie, inputs u and messages S."""
    bases, gradient, has_gradient, width, columns, _ = tile
    agents = first + tl.arange(0, BLOCK_AGENTS).to(tl.int64)
    is_agent = agents < num_agents
    mask = is_agent[:, None] & (columns < width)[None, :]
    offset = agents[:, None] * width + columns[None, :]
    places, inputs = (), ()
    for k in tl.static_range(Q + 1):
        places = places + (bases[k] + offset,)
        inputs = inputs + (tl.load(places[k], mask, 0.0).to(COMPUTE),)
    g = tl.load(gradient + offset, mask & has_gradient, 0.0).to(COMPUTE)
    if grad_scale is not None:
        scale = tl.load(grad_scale + agents, is_agent, 0.0).to(COMPUTE)[:, None]
        g = tl.where(scale == 0, 0.0, g * scale)
    inputs = inputs + (g,)
    messages = ()
    for m in tl.static_range(M):
        messages = messages + (_sum(tl.zeros_like(g), factors, m * (Q + 2), inputs, Q + 2),)
    return agents, is_agent, mask, places, inputs, messages


@triton.jit
def _sum(total, factors, FIRST: tl.constexpr, terms, COUNT: tl.constexpr):
    """Adds the terms times the factors from `FIRST` on; a factor of zero drops its term, NaN included."""
    for k in tl.static_range(COUNT):
        factor = factors[FIRST + k]
        total = tl.where(factor != 0, tl.fma(terms[k], factor, total), total)
    return total


@triton.jit
def _messages_of(agents, is_there, tile, channel, ROW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The addresses of the first messages of these agents, [agents, columns]."""
    rows, _, _ = channel
    _, _, _, _, columns, in_model = tile
    if rows.dtype.element_ty == tl.int64:  # the split form
        row = _pointer(tl.load(rows + agents, is_there, 0), ROW_DTYPE, ALIGNMENT)
        return row[:, None] + in_model[None, :]
    else:
        local = tl.arange(0, columns.shape[0])
        return rows + agents[:, None] * columns.shape[0] + local[None, :]


@triton.jit
def _send(own, tile, channel, M: tl.constexpr, ROW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, BY_HAND: tl.constexpr):
    agents, is_agent, mask, _, _, messages = own
    _, stride, _ = channel
    places = _messages_of(agents, is_agent, tile, channel, ROW_DTYPE, ALIGNMENT)
    for m in tl.static_range(M):
        tl.store(places + m * stride, _rounded(messages[m], ROW_DTYPE, BY_HAND), mask)


@triton.jit
def _mix(
    own,
    tile,
    channel,
    factors,
    links,
    edges,
    Q: tl.constexpr,
    M: tl.constexpr,
    ROW_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Computes and stores the outputs."""
    _, _, mask, places, inputs, messages = own
    drifts = ()
    for m in tl.static_range(M):
        drifts = drifts + (_drift(m, own, tile, channel, links, edges, ROW_DTYPE, ALIGNMENT),)
    B: tl.constexpr = M * (Q + 2)
    C: tl.constexpr = B + (Q + 1) * (Q + 2)
    E: tl.constexpr = C + (Q + 1) * M
    for k in tl.static_range(Q + 1):
        output = _sum(tl.zeros_like(messages[0]), factors, B + k * (Q + 2), inputs, Q + 2)
        output = _sum(output, factors, C + k * M, messages, M)
        output = _sum(output, factors, E + k * M, drifts, M)
        tl.store(places[k], _rounded(output, places[k].dtype.element_ty, BY_HAND), mask)


@triton.jit
def _drift(m: tl.constexpr, own, tile, channel, links, edges, ROW_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Σ_j w_ij (S_m(j) − S_m(i)), neighbour after neighbour; all agents of a block in step."""
    agents, is_agent, mask, _, _, messages = own
    start, degree, longest = links
    neighbor, weight = edges
    rows, stride, num_rows = channel
    mine = messages[m]
    if rows.dtype.element_ty == tl.int64:  # as it was sent, perhaps rounded
        place = _messages_of(agents, is_agent, tile, channel, ROW_DTYPE, ALIGNMENT) + m * stride
        mine = tl.load(place, mask, 0.0).to(mine.dtype)
    drift = tl.zeros_like(mine)
    for k in range(longest):
        has_more = k < degree
        j = tl.load(neighbor + start + k, has_more, 0)
        is_row = (j >= 0) & (j < num_rows)
        w = tl.load(weight + start + k, has_more, 0.0).to(mine.dtype)
        w = tl.where(is_row, w, float("nan"))
        place = _messages_of(tl.where(is_row, j, 0), has_more, tile, channel, ROW_DTYPE, ALIGNMENT) + m * stride
        theirs = tl.load(place, mask & has_more[:, None], 0.0).to(mine.dtype)
        drift = tl.where(has_more[:, None], tl.fma(w[:, None], theirs - mine, drift), drift)
    return drift


@triton.jit
def _rounded(value, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """The value rounded to nearest, ties to even, as compiled casts do; the interpreter's bfloat16 cast truncates."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)
