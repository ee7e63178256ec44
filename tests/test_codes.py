"""Coded messages: what a code loses, that both ends have the same copy, and that wrong codes are noticed."""

import math

import pytest
import torch

from gut_fast import topology
from gut_fast.kernels import codes, ops
from gut_fast.kernels.backends import cpu
from gut_fast.kernels.codes import BLOCK, Code, Place
from gut_fast.verify import comparison
from gut_fast.verify.lockstep import seeded
from steps import a_step, own_rule

SIZES = (5, 1, 256, 257, 700)
DIFFERENCES = [Code(16), Code(8), Code(4), Code(8, seed=1), Code(4, seed=1)]
MODULO = [Code(8, "modulo"), Code(4, "modulo"), Code(8, "modulo", seed=1), Code(4, "modulo", seed=1)]


def name_of(code):
    return f"{code.kind}{code.bits}{'' if code.seed is None else ' random'}"


each_difference = pytest.mark.parametrize("code", DIFFERENCES, ids=name_of)
each_modulo = pytest.mark.parametrize("code", MODULO, ids=name_of)


def exact_rows(step):
    """The messages of all agents as they are."""
    rows = step.new_rows(torch.promote_types(step.parameters[0].dtype, torch.float32))
    ops.message(step, rows)
    return rows


def new_codes(code, step):
    layout = code.layout(step)
    return layout, [torch.empty(layout.num_bytes, dtype=torch.uint8) for _ in range(step.num_agents)]


def block_of(layout):
    """The number of the block that each number of a row belongs to."""
    blocks, first = [], 0
    for d in layout.columns * layout.num_messages:
        blocks.append(first + torch.arange(d) // BLOCK)
        first += -(-d // BLOCK)
    assert first == layout.num_blocks or layout.bits == 16
    return torch.cat(blocks)


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def coded_by(backend, step, code, only_first=False):
    """Everything that encoding and decoding makes of a step: plain PyTorch after the cpu backend's own messages."""
    layout, coded = new_codes(code, step)
    copies = [3 * seeded(layout.num_numbers, seed=7 + i, dtype=torch.float32) for i in range(step.num_agents)]
    widths = [seeded(layout.num_blocks, seed=40 + i, dtype=torch.float32).abs() * 9 for i in range(step.num_agents)]
    if code.kind == "difference":
        widths, copies[0][:9] = [], -0.0
    if only_first:
        coded[1:] = [None] * (step.num_agents - 1)
    place = Place(3, 5, 1000)
    if backend == "torch":
        rows = exact_rows(step)
        codes.encode_rows(code, layout, rows, coded, copies, widths, place)
    else:
        ops.encode(step, code, coded, copies, widths, place, backend)
    theirs = [3 * seeded(layout.num_numbers, seed=8, dtype=torch.float32) for _ in range(2)]
    made = [*copies, *widths, *(row for row in coded if row is not None)]
    for seed, copy in enumerate(theirs):
        noise = torch.randint(256, (layout.num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        row = coded[0] if seed == 0 else noise
        row = torch.cat([row[:4], noise[4:]]) if seed == 1 and code.bits != 16 else row
        own = () if code.kind == "difference" else (copies[1], widths[1])
        distance = ops.decode(layout, row, copy, *own, backend=backend)
        made += [copy] if distance is None else [copy, distance]
    return made


def same_but_for_nan(a, b):
    """The same bits, but that one NaN is as good as another."""
    if a.is_floating_point():
        a, b = torch.where(a.isnan(), math.nan, a), torch.where(b.isnan(), math.nan, b)
    return same(a, b)


def assert_compiled_equals_torch(step, code, only_first=False):
    plain = coded_by("torch", step, code, only_first)
    compiled = coded_by("cpu", step, code, only_first)
    assert len(plain) == len(compiled)
    assert all(map(same_but_for_nan, plain, compiled))


@pytest.mark.skipif(cpu.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("name", cpu.tiers())
@pytest.mark.parametrize("code", [*DIFFERENCES, *MODULO], ids=name_of)
def test_compiled_codes_have_the_bits_of_plain_pytorch_in_every_tier(code, name, tier, threads):
    tier(name)
    for rule, columns in [("gut", SIZES), ("dsgd", (1,)), ("gut", (0, 63, 4097, 255, 1024)), ("gut", (130_000, 3))]:
        graph = topology.ring(3) if columns[0] > 9000 else topology.ring(6)
        for count in (1, 2):
            threads(count)
            assert_compiled_equals_torch(a_step(rule, graph, columns), code)
    assert_compiled_equals_torch(a_step("gut", columns=SIZES, dtype=torch.bfloat16), code, only_first=True)
    assert_compiled_equals_torch(a_step(own_rule(2, 2), topology.ring(3), SIZES), code)
    assert_compiled_equals_torch(a_step("gut", topology.ring(40), (300, 5)), code)


@pytest.mark.skipif(cpu.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("plan", ["block=16,ahead=0,fetch=none,threads=2", "block=300,ahead=0,fetch=none,threads=1"])
@pytest.mark.parametrize("code", [*DIFFERENCES, *MODULO], ids=name_of)
def test_codes_do_not_depend_on_the_plan(code, plan, threads):
    step = a_step("gut", columns=(4097, 9000, 5))
    before = coded_by("cpu", step, code)
    threads(2)
    cpu.force_plan(plan)
    try:
        assert all(map(same, before, coded_by("cpu", step, code)))
    finally:
        cpu.force_plan(None)


@pytest.mark.skipif(cpu.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("code", [*DIFFERENCES, *MODULO], ids=name_of)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-40, 3e38])
def test_compiled_codes_have_the_bits_of_plain_pytorch_for_odd_numbers(code, value):
    step = a_step("dsgd", columns=SIZES, lr=0.0, weight_decay=0.0)
    step.parameters[4][2, 300] = value
    step.parameters[0][:] = value
    assert_compiled_equals_torch(step, code)


@pytest.mark.skipif(cpu.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("code", [*DIFFERENCES, *MODULO], ids=name_of)
def test_plain_tensors_of_the_cpu_are_coded_by_the_compiled_kernel(code):
    step = a_step(columns=SIZES)
    layout, coded, _, copies, widths = near_copies(step, MODULO[0], 1e-3)
    layout, coded = new_codes(code, step)
    distance = None if code.kind == "difference" else torch.empty(layout.num_blocks)
    own = (None, None) if distance is None else (copies[1], widths[1])
    assert cpu.direct_encode(step, code, coded, copies, [] if distance is None else widths, Place())
    assert cpu.direct_decode(layout, coded[0], copies[0], *own, distance)


def test_codes_of_float64_are_made_by_plain_pytorch():
    step = a_step("gut", columns=SIZES, dtype=torch.float64)
    for code in (Code(8), Code(16), Code(4, "modulo")):
        layout, coded = new_codes(code, step)
        copies = [torch.zeros(layout.num_numbers, dtype=torch.float64) for _ in coded]
        widths = [torch.full((layout.num_blocks,), 50.0) for _ in coded] if code.kind == "modulo" else []
        ops.encode(step, code, coded, copies, widths)
        theirs = torch.zeros_like(copies[0])
        ops.decode(layout, coded[1], theirs, *((copies[0], widths[0]) if widths else ()))
        assert same(theirs, copies[1])


@each_difference
@pytest.mark.parametrize("rule", ["gut", "dsgd"])
def test_both_ends_have_the_same_copy_and_it_is_within_half_a_step(code, rule):
    step = a_step(rule, columns=SIZES)
    layout, coded = new_codes(code, step)
    assert len(coded[0]) == layout.num_bytes
    copies = [seeded(layout.num_numbers, seed=7 + i, dtype=torch.float32) for i in range(step.num_agents)]
    theirs, messages = [copy.clone() for copy in copies], exact_rows(step)
    before = torch.stack(messages) - torch.stack(copies)
    ops.encode(step, code, coded, copies)
    for i, message in enumerate(messages):
        ops.decode(layout, coded[i], theirs[i])
        assert same(copies[i], theirs[i])
        error = (copies[i] - message).abs()
        if code.bits == 16:
            assert bool((error <= before[i].abs() * 2.0**-8 + 1e-6).all())
            continue
        largest = torch.zeros(layout.num_blocks).scatter_reduce(0, block_of(layout), before[i].abs(), "amax")
        bound = largest / (2 ** (code.bits - 1) - 1) * (0.5 if code.seed is None else 1)
        assert bool((error <= bound[block_of(layout)] * 1.001 + 1e-6).all())


def test_rows_of_codes_have_the_lengths_that_the_layout_says():
    step = a_step(columns=SIZES)
    blocks = 1 + 1 + 1 + 2 + 3
    words = 2 + 1 + 64 + 65 + 175  # of 32 bits: each tensor begins with one
    assert Code(8).layout(step).num_bytes == 4 * (blocks + words)
    assert Code(4).layout(step).num_bytes == 4 * (blocks + 1 + 1 + 32 + 33 + 88)
    assert Code(16).layout(step).num_bytes == 2 * sum(SIZES)
    assert Code(8, "modulo").layout(step).num_bytes == 4 * (2 * blocks + words)


@pytest.mark.parametrize(("bits", "words"), [(8, 3), (4, 2)])
def test_a_word_holds_the_codes_of_numbers_a_stride_apart(bits, words):
    largest, count = 2 ** (bits - 1) - 1, 10
    layout = codes.Layout(bits, "difference", (count,), 1)
    coded, copy = torch.empty(layout.num_bytes, dtype=torch.uint8), torch.zeros(count)
    numbers = [largest, -1, 0, -largest, 2, 3, -3, 1, 5, -5]
    codes.encode_difference(layout, torch.tensor(numbers, dtype=torch.float32), copy, coded, None)
    assert copy.tolist() == numbers
    assert coded[:4].view(torch.float32).item() == 1
    found = coded[4:].view(torch.int32).tolist()
    assert len(found) == words
    for place, number in enumerate(numbers):
        assert found[place % words] >> bits * (place // words) & (2**bits - 1) == number % 2**bits


@pytest.mark.parametrize("bits", [8, 4])
def test_wrong_wraps_do_not_cancel_in_the_check_sum(bits):
    layout = codes.Layout(bits, "modulo", (BLOCK,), 1)
    every = torch.eye(BLOCK)
    single = torch.cat([codes._check_sums(layout, row[None]) for row in every]).long()
    assert bool((single % 2 == 1).all())
    pairs = single[:, None] + torch.stack([single, -single])[:, None]
    assert int((pairs.int() == 0).sum()) == BLOCK  # p − p alone
    generator = torch.Generator().manual_seed(bits)
    for _ in range(2000):
        wrong = torch.randint(-1, 2, (1, BLOCK), generator=generator) * (torch.rand(BLOCK, generator=generator) < 0.05)
        assert (int(codes._check_sums(layout, wrong.float())) == 0) == (not wrong.any())


@each_difference
def test_repeated_differences_reach_a_message_that_stays(code):
    step = a_step(columns=SIZES)
    layout = code.layout(step)
    copies = [torch.zeros(layout.num_numbers) for _ in range(step.num_agents)]
    for number in range(40):
        ops.encode(step, code, [None] * step.num_agents, copies, place=Place(number))
    assert torch.allclose(torch.stack(copies), torch.stack(exact_rows(step)), rtol=1e-6, atol=1e-6)


def near_copies(step, code, distance):
    """Copies and widths after a modulo code of messages that lie within `distance` of each other."""
    layout, coded = new_codes(code, step)
    center = seeded(layout.num_numbers, seed=3, dtype=torch.float32)
    noise = torch.stack([seeded(layout.num_numbers, seed=20 + i, dtype=torch.float32) for i in range(step.num_agents)])
    messages = center + distance * noise / noise.abs().max()
    widths = [torch.full((layout.num_blocks,), 16 * distance) for _ in messages]
    copies = [torch.empty(layout.num_numbers) for _ in messages]
    for agent, (message, width, copy, row) in enumerate(zip(messages, widths, copies, coded, strict=True)):
        dither = None if code.seed is None else codes.dither_of(code.seed, Place(), agent, layout, copy.device)
        codes.encode_modulo(layout, message, copy, width, row, dither)
    return layout, coded, messages, copies, widths


@each_modulo
def test_modulo_decodes_what_is_near_without_an_old_copy(code):
    step = a_step(columns=SIZES)
    layout, coded, messages, copies, widths = near_copies(step, code, 1e-3)
    bound = widths[0].max() / 2**code.bits * (0.5 if code.seed is None else 1)
    assert (torch.stack(copies) - messages).abs().max() <= bound * 1.01
    for i, j in [(0, 1), (1, 0), (2, 5)]:
        found = torch.full((layout.num_numbers,), math.nan)
        distances = ops.decode(layout, coded[j], found, copies[i], widths[i])
        assert same(found, copies[j])
        assert torch.equal(distances, codes.block_distances(layout, copies[i], copies[j]))
        assert torch.equal(distances, codes.judged(distances, widths[i], widths[j]))


@each_modulo
def test_both_ends_drop_the_same_blocks_whatever_their_widths(code):
    step = a_step(columns=(60_000,))
    layout, coded, messages, copies, widths = near_copies(step, code, 1e-3)
    generator = torch.Generator().manual_seed(0)
    dropped = 0
    for agent in range(2):
        scale = 2.0 ** (8 * torch.rand(layout.num_blocks, generator=generator) - 7)
        widths[agent].mul_(scale)
        codes.encode_modulo(layout, messages[agent], copies[agent], widths[agent], coded[agent], None)
    found = [torch.empty(layout.num_numbers) for _ in range(2)]
    there = ops.decode(layout, coded[1], found[0], copies[0], widths[0])
    here = ops.decode(layout, coded[0], found[1], copies[1], widths[1])
    assert torch.equal(here, there)
    assert torch.equal(here, codes.judged(codes.block_distances(layout, *copies[:2]), *widths[:2]))
    dropped = (here < 0)[block_of(layout)]
    assert 0.1 < dropped.float().mean() < 0.9
    assert torch.equal(torch.where(dropped, copies[0], copies[1]), found[0])
    assert torch.equal(torch.where(dropped, copies[1], copies[0]), found[1])
    assert float((found[0] - copies[0] + (found[1] - copies[1])).abs().max()) == 0  # so their mean is kept


@each_modulo
def test_widths_follow_the_distances_and_recover(code):
    step = a_step(columns=SIZES)
    layout, _, _, copies, widths = near_copies(step, code, 1e-3)
    widths[0].fill_(1.0)
    distance = codes.block_distances(layout, copies[0], copies[1])
    codes.next_widths_(layout, widths[0], [distance])
    assert torch.allclose(widths[0], torch.full_like(widths[0], 0.9))
    widths[0].fill_(1e-9)
    codes.next_widths_(layout, widths[0], [distance, distance / 2])
    assert torch.allclose(widths[0], codes.ROOM[code.bits] * distance)
    before = widths[0].clone()
    for theirs, expected in ((before, 4 * before), (before / 100, 0.9 * before), (100 * before, 4 * before)):
        widths[0].copy_(before)
        far = codes.judged(torch.full_like(distance, 1e9), widths[0], theirs)
        codes.next_widths_(layout, widths[0], [0 * distance, far])
        assert torch.allclose(widths[0], expected, rtol=1e-6)
    codes.next_widths_(layout, widths[0], [])
    assert torch.allclose(widths[0], expected, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", [*DIFFERENCES[1:], *MODULO], ids=name_of)
def test_a_number_that_is_not_finite_makes_its_block_nan_at_both_ends(code, value):
    step = a_step(columns=SIZES)
    layout, coded = new_codes(code, step)
    step.parameters[3][1, 256] = value
    copies = [torch.zeros(layout.num_numbers) for _ in coded]
    theirs = torch.zeros(layout.num_numbers)
    if code.kind == "difference":
        ops.encode(step, code, coded, copies)
        ops.decode(layout, coded[1], theirs)
        expected = torch.zeros(layout.num_numbers, dtype=torch.bool)
    else:
        widths = [torch.full((layout.num_blocks,), 30.0) for _ in coded]
        ops.encode(step, code, coded, copies, widths)
        distance = ops.decode(layout, coded[1], theirs, copies[0], widths[0])
        assert distance.isnan().sum() == 1
        mirrored = torch.empty_like(theirs)
        again = ops.decode(layout, coded[0], mirrored, copies[1], widths[1])
        assert torch.equal(distance.nan_to_num(-1), again.nan_to_num(-1))
        assert torch.equal(mirrored.isnan(), theirs.isnan())
    expected = torch.zeros(layout.num_numbers, dtype=torch.bool)
    expected[5 + 1 + 256 + 256] = True
    assert torch.equal(theirs.isnan(), expected)
    assert torch.equal(copies[1].isnan(), expected)
    if code.kind == "difference":
        assert torch.equal(copies[1].nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("code", [*DIFFERENCES[1:3], *MODULO[:2]], ids=name_of)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30, 3e38])
def test_numbers_of_any_size_arrive_and_nothing_becomes_nan(code, size):
    step = a_step("dsgd", columns=SIZES, lr=0.0, weight_decay=0.0)
    for parameter in step.parameters:
        parameter.copy_(parameter / parameter.abs().max() * size)
    layout, coded = new_codes(code, step)
    copies = [torch.zeros(layout.num_numbers) for _ in coded]
    theirs = torch.zeros(layout.num_numbers)
    if code.kind == "difference":
        ops.encode(step, code, coded, copies)
        ops.decode(layout, coded[0], theirs)
    else:
        widths = [torch.full((layout.num_blocks,), min(4 * size, 3e38)) for _ in coded]
        ops.encode(step, code, coded, copies, widths)
        ops.decode(layout, coded[0], theirs, copies[0], widths[0])
    assert same(theirs, copies[0])
    assert bool(theirs.isfinite().all())
    assert (theirs - exact_rows(step)[0]).abs().max() <= max(size / 2, 1e-29)


@each_modulo
@pytest.mark.parametrize("width", [0.0, -1.0, 1e-45, math.inf, math.nan])
def test_any_width_is_made_one_that_serves(code, width):
    step = a_step(columns=SIZES)
    layout, coded = new_codes(code, step)
    copies = [torch.zeros(layout.num_numbers) for _ in coded]
    widths = [torch.full((layout.num_blocks,), width) for _ in coded]
    ops.encode(step, code, coded, copies, widths)
    assert all(bool(width.isfinite().all()) for width in widths)
    assert bool(torch.stack(copies).isfinite().all())
    theirs = torch.empty(layout.num_numbers)
    ops.decode(layout, coded[0], theirs, copies[0], widths[0])
    assert same(theirs, copies[0])


@pytest.mark.parametrize("code", [*DIFFERENCES[:3], *MODULO[:2]], ids=name_of)
def test_any_bytes_decode(code):
    step = a_step(columns=SIZES)
    layout, _, _, copies, widths = near_copies(step, MODULO[0], 1e-3)
    layout = code.layout(step)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        coded = torch.randint(256, (layout.num_bytes,), dtype=torch.uint8, generator=generator)
        copy = copies[1].clone()
        if code.kind == "difference":
            ops.decode(layout, coded, copy)
        else:
            distance = ops.decode(layout, coded, copy, copies[0], widths[0])
            is_right = distance.isfinite()[block_of(layout)]
            assert bool((is_right | copy.isnan() | (copy == copies[0])).all())


def test_a_flipped_bit_of_a_modulo_code_is_noticed():
    step = a_step(columns=(2000,))
    code = Code(8, "modulo")
    layout, coded, _, copies, widths = near_copies(step, code, 1e-3)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        position = int(torch.randint(layout.num_blocks, (1,), generator=generator))
        wrong = coded[1].clone()
        wrong[4 * layout.num_blocks + 4 * position] ^= 1 << seed % 8  # in the check sum
        distance = ops.decode(layout, wrong, torch.empty(layout.num_numbers), copies[0], widths[0])
        assert torch.equal((distance < 0).nonzero().flatten(), torch.tensor([position]))


def test_random_rounding_is_right_in_the_mean_and_depends_on_seed_round_and_agent():
    step = a_step(columns=(700,))
    layout = Code(8, seed=0).layout(step)
    rows = [codes.dither_of(0, Place(number), 0, layout, torch.device("cpu")) for number in range(400)]
    everything = torch.stack(rows)
    assert everything.abs().max() < 0.5
    assert abs(float(everything.mean())) < 4 * 0.29 / math.sqrt(everything.numel())
    assert float(everything.mean(0).abs().max()) < 5 * 0.29 / math.sqrt(400)
    assert abs(float(everything.var()) * 12 - 1) < 0.01
    for other in [
        codes.dither_of(1, Place(0), 0, layout, torch.device("cpu")),
        codes.dither_of(0, Place(0), 1, layout, torch.device("cpu")),
        codes.dither_of(0, Place(0, column=1), 0, layout, torch.device("cpu")),
        rows[1],
    ]:
        correlation = float((other * rows[0]).mean() * 12)
        assert abs(correlation) < 0.2
    assert torch.equal(rows[0], codes.dither_of(0, Place(0, 5), -5, layout, torch.device("cpu")))


def test_random_rounding_does_not_depend_on_where_a_row_is_cut():
    whole = Code(8, seed=4).layout(a_step(columns=(300, 200)))
    part = Code(8, seed=4).layout(a_step(columns=(200,)))
    device = torch.device("cpu")
    all_of_it = codes.dither_of(4, Place(3), 1, whole, device)
    assert torch.equal(all_of_it[300:], codes.dither_of(4, Place(3, 0, 300), 1, part, device))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Code(7), "no difference code of 7 bits"),
        (Code(16, "modulo"), "no modulo code of 16 bits"),
        (Code(8, "sign"), "no sign code of 8 bits"),
        (Code(16, seed=1), "none for 16 bits"),
        (Code(8, seed=1.5), "expected an integer"),
    ],
)
def test_a_code_that_there_is_not_is_refused(code, words):
    with pytest.raises(ValueError, match=words):
        code.layout(a_step())


def test_rows_that_are_wrong_are_refused_before_anything_is_changed():
    step, code = a_step(columns=SIZES), Code(8)
    layout, coded = new_codes(code, step)
    copies = [torch.zeros(layout.num_numbers) for _ in coded]
    wrong = {
        "5 rows, expected 6": (coded[:5], copies),
        "code 2 is torch.uint8 of shape": ([*coded[:2], coded[2][1:], *coded[3:]], copies),
        "code 0 is torch.int8": ([coded[0].view(torch.int8), *coded[1:]], copies),
        "copy 1 is torch.float64": (coded, [copies[0], copies[1].double(), *copies[2:]]),
        "copy 0 must be a tensor": (coded, [None, *copies[1:]]),
        "copy 0 and copy 1 share": (coded, [copies[1], *copies[1:]]),
        "share memory": (coded, [step.state[0][: layout.num_numbers], *copies[1:]]),
    }
    for words, (rows, own) in wrong.items():
        with pytest.raises((TypeError, ValueError), match=words):
            ops.encode(step, code, rows, own)
    with pytest.raises(ValueError, match="differences have none"):
        ops.encode(step, code, coded, copies, copies)
    with pytest.raises(ValueError, match="widths: 0 rows, expected 6"):
        ops.encode(step, Code(8, "modulo"), new_codes(Code(8, "modulo"), step)[1], copies)
    assert all(same(copy, torch.zeros_like(copy)) for copy in copies)


def test_what_cannot_be_decoded_is_refused():
    step = a_step(columns=SIZES)
    layout, coded, _, copies, widths = near_copies(step, MODULO[0], 1e-3)
    copy = torch.zeros(layout.num_numbers)
    for words, given in {
        "needs the receiver's own copy": (coded[1], copy),
        "code is torch.uint8 of shape": (coded[1][1:], copy, copies[0], widths[0]),
        "copy is torch.float32 of shape": (coded[1], copy[1:], copies[0], widths[0]),
        "own is torch.float64": (coded[1], copy, copies[0].double(), widths[0]),
        "widths is torch.float32 of shape": (coded[1], copy, copies[0], widths[0][:1]),
        "a copy is a row of float32": (coded[1], None, copies[0], widths[0]),
        "code must be a tensor": ("code", copy, copies[0], widths[0]),
        "copy and own share": (coded[1], copy, copy, widths[0]),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            ops.decode(layout, *given)
    with pytest.raises(ValueError, match="takes neither"):
        ops.decode(Code(8).layout(step), coded[1], copy, copies[0], widths[0])
    assert same(copy, torch.zeros_like(copy))


def compared(*chosen):
    return comparison.verify(comparison.Request([], ["cpu", "torch"], [], cpu.tiers()[:1], codes=chosen))


@pytest.mark.parametrize("code", [Code(16), Code(4), Code(8, "modulo")], ids=name_of)
def test_verify_finds_codes_right(code):
    result = compared(code)
    assert result.passed
    assert [each.backend for each in result.candidates] == ["cpu", "torch"][cpu.why_missing is not None :]
    assert 0.9 < result.candidates[-1].error <= 1


@pytest.mark.skipif(cpu.why_missing is not None, reason="needs the compiled extension")
def test_verify_finds_a_single_wrong_bit(monkeypatch):
    encode = ops.encode

    def encode_wrongly(step, code, coded, *others):
        encode(step, code, coded, *others)
        coded[2][-1] ^= 1

    monkeypatch.setattr(ops, "encode", encode_wrongly)
    compiled, plain = compared(Code(8)).candidates
    assert "other bits" in compiled.faults[0]
    assert plain.passed
    assert not compiled.passed
