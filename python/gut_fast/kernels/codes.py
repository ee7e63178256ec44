"""Messages in few bits: how rows of codes are laid out, and their coding in plain PyTorch operations.

Between `message` and `combine_` a row of messages may travel as a code. Every agent i keeps a *copy* X_i, a row in the
dtype of arithmetic: what its neighbours know of it. Encoding turns the message S into a code and the new X_i; decoding
turns the code into the same X_i, bit for bit, at every neighbour. `combine_` mixes the copies.

Numbers are coded in blocks of up to 256, each of one tensor of one message. With L = 2^(bits−1) − 1:

differences  x = S − X;  a = max|x|;  q = round(x L/a);  X ← X + q a/L.  16 bits: q is x as bfloat16, there is no a.
             A row: the scales a/L of all blocks, then all codes. The neighbours' X must be the old one.
modulo       step = B/2^bits;  k = round(S/step);  X = k step.  The code is k mod 2^bits, and nobody needs an old X: the
             neighbour takes the k of that code which is nearest to its own copy, right while they differ by less than
             B/2. A row: the widths B of all blocks, their check sums of k div 2^bits, then all codes (Moniqua: Lu and
             De Sa, ICML 2020; widths that follow the distances, and the check, are ours).

Codes of 8 and 4 bits fill words of 32. With m = 32/bits, a block of n numbers has s = ⌈n/m⌉ words, and word w holds the
codes of numbers w, w + s, w + 2s …, the first in its lowest bits: so no bytes change places, only words are shifted.

A number that is not finite makes its block NaN at everybody who hears it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gut_fast.kernels.step import GossipStep, Rows

__all__ = [
    "BLOCK",
    "Code",
    "Layout",
    "Place",
    "block_distances",
    "decode_difference",
    "decode_modulo",
    "dither_of",
    "drop_",
    "encode_difference",
    "encode_modulo",
    "encode_rows",
    "judged",
    "keys_of",
    "next_widths_",
]

BLOCK = 256
"""The numbers that share a scale or a width."""

LEAST, LEAST_WIDTH, MOST_WIDTH = 2.0**-118, 2.0**-100, 2.0**100
"""Differences below `LEAST` are sent as zero: L/a would overflow. Widths stay within the other two."""

MARGIN = 7 / 16
"""Two copies may differ by this part of the smaller width; beyond B/2, less what rounding takes, decoding is wrong."""

ROOM = {8: 16.0, 4: 5.0}
"""How many times the largest distance seen a width is, by bits: the distance may grow by this times `MARGIN`.

With 4 bits there is little choice: on noisy quadratics, where trackers forget nothing, 3.5 drops a tenth of all blocks
on matchings, and with 8 rounding is so coarse that it feeds on itself.
"""

MASK32, MASK64 = 2**32 - 1, 2**64 - 1

KINDS = ("difference", "modulo")


class Code(NamedTuple):
    """How messages are coded.

    Attributes:
        bits: 8 or 4; or 16, bfloat16, by differences.
        kind: ``"difference"`` or ``"modulo"``.
        seed: numbers are rounded to the nearest, ties to even; with a seed up or down at random, right in the mean.
    """

    bits: int
    kind: str = "difference"
    seed: int | None = None

    def check(self) -> Code:
        """Returns the code itself. Raises ValueError for one that there is not."""
        allowed = (16, 8, 4) if self.kind == "difference" else (8, 4)
        if self.kind not in KINDS or self.bits not in allowed:
            raise ValueError(f"there is no {self.kind} code of {self.bits} bits; expected 8 or 4, or differences of 16")
        if self.seed is not None and (self.bits == 16 or not isinstance(self.seed, int)):
            raise ValueError(f"seed={self.seed!r}; expected an integer, and none for 16 bits, which round to nearest")
        return self

    def layout(self, step: GossipStep) -> Layout:
        """Returns how the step's rows of codes are laid out. Raises ValueError for a code that there is not."""
        columns = tuple(parameter.numel() // step.num_agents for parameter in step.parameters)
        return Layout(*self.check()[:2], columns, step.num_messages)


class Layout(NamedTuple):
    """How a row of codes is laid out; equal for sender and receiver.

    Attributes:
        bits, kind: as in `Code`.
        columns: how many numbers of an agent each tensor has.
        num_messages: M.
    """

    bits: int
    kind: str
    columns: tuple[int, ...]
    num_messages: int

    @property
    def num_numbers(self) -> int:
        """The length of a row of messages and of a copy, M ΣD."""
        return self.num_messages * sum(self.columns)

    @property
    def num_blocks(self) -> int:
        """The number of blocks, and so of scales or widths; none in 16 bits."""
        return 0 if self.bits == 16 else self.num_messages * sum(_num_blocks(d) for d in self.columns)

    @property
    def num_bytes(self) -> int:
        """The bytes of a row of codes; in 8 and 4 bits each tensor begins with a word."""
        codes = sum(2 * d if self.bits == 16 else 4 * -(-d * self.bits // 32) for d in self.columns)
        return self.head_bytes + self.num_messages * codes

    @property
    def head_bytes(self) -> int:
        """The bytes before the codes: a scale for each block, or a width and a check sum."""
        return self.num_blocks * (8 if self.kind == "modulo" else 4)


class Place(NamedTuple):
    """Where numbers belong that are rounded at random: the same numbers are rounded alike however they are cut up.

    Attributes:
        round: the number of the step.
        first_agent: the number of the first agent here, among all agents.
        column: the column of the step's first number among all that an agent sends, of all parameter groups.
    """

    round: int = 0
    first_agent: int = 0
    column: int = 0


def encode_rows(
    code: Code,
    layout: Layout,
    rows: Sequence[Tensor],
    coded: Rows,
    copies: Sequence[Tensor],
    widths: Sequence[Tensor],
    place: Place,
) -> None:
    """Does `ops.encode` after the messages of all agents have been computed into `rows`."""
    for agent, (row, copy, own) in enumerate(zip(rows, copies, coded, strict=True)):
        dither = None if code.seed is None else dither_of(code.seed, place, agent, layout, row.device)
        if code.kind == "difference":
            encode_difference(layout, row, copy, own, dither)
        else:
            encode_modulo(layout, row, copy, widths[agent], own, dither)


def encode_difference(layout: Layout, row: Tensor, copy: Tensor, coded: Tensor | None, dither: Tensor | None) -> None:
    """Turns a message into a code, which is None if nobody hears it, and the old copy into the new one.

    Args:
        layout: of the code.
        row: the message S, [M ΣD]. The copy's dtype is that of arithmetic.
        copy: X, in place.
        coded: uint8 [num_bytes].
        dither: what is added before rounding (`_dither`), or None.
    """
    if layout.bits == 16:
        q = (row - copy).bfloat16()
        copy += q
        if coded is not None:
            coded.copy_(q.view(torch.uint8))
        return
    x = _blocks(layout, row - copy)
    largest = x.abs().amax(1, keepdim=True).float()
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    levels = torch.full_like(largest, 2 ** (layout.bits - 1) - 1)  # a tensor: division by a number may be inexact
    scale = torch.where(largest < LEAST, 0.0, largest / levels)
    factor = torch.where(largest < LEAST, 0.0, levels / largest)
    q = _rounded(layout, x * factor, dither).masked_fill_(scale.isnan(), 0.0)
    copy += _row(layout, q * scale)
    if coded is not None:
        _write(layout, coded, [scale], q)


def decode_difference(layout: Layout, coded: Tensor, copy: Tensor) -> None:
    """Turns the old copy into the new one, by a code as `encode_difference` has made it. Any bytes will do."""
    if layout.bits == 16:
        copy += coded.clone().view(torch.bfloat16)
        return
    (scale,), code = _read(layout, coded, copy.dtype)
    half = 2 ** (layout.bits - 1)
    q = torch.where(code < half, code, code - 2 * half)
    copy += _row(layout, q * scale[:, None])


def encode_modulo(
    layout: Layout, row: Tensor, copy: Tensor, widths: Tensor, coded: Tensor | None, dither: Tensor | None
) -> None:
    """Turns a message into a code, which is None if nobody hears it, and a copy.

    Args:
        layout: of the code.
        row: the message S, [M ΣD].
        copy: X, which is overwritten.
        widths: B, float32 [num_blocks], in place: too small ones grow until every |k| is at most 2^21, and it is NaN
            where the message is not finite.
        coded: uint8 [num_bytes].
        dither: as in `encode_difference`.
    """
    S = _blocks(layout, row)
    largest = S.abs().amax(1).float()
    least = torch.where(largest.isfinite(), largest * 2.0 ** (layout.bits - 21), torch.nan)
    widths.copy_(torch.maximum(torch.where(widths > LEAST_WIDTH, widths, LEAST_WIDTH).clamp(max=MOST_WIDTH), least))
    step, factor = _step_and_factor(layout, widths)
    k = _rounded(layout, S * factor, dither)
    copy.copy_(_row(layout, k * step))
    if coded is not None:
        k = k.masked_fill_(widths.isnan()[:, None], 0.0)
        wraps = (k * 2.0**-layout.bits).floor()
        _write(layout, coded, [widths, _check_sums(layout, wraps)], k - wraps * 2.0**layout.bits)


def decode_modulo(layout: Layout, coded: Tensor, copy: Tensor, own: Tensor, widths: Tensor) -> Tensor:
    """Turns a code into the sender's copy X_j, given the receiver's own X_i; returns how far apart they are.

    A block is right if the check sum is, and if max|X_j − X_i| is below `MARGIN` of the smaller width. If it is not,
    the other end sees it too, provided that both hear each other: so the copy becomes X_i there, which drops the block
    from the mixing at both ends, and the mean over agents is kept.

    Args:
        layout: of the code.
        coded: uint8 [num_bytes], any bytes.
        copy: X_j, which is overwritten.
        own: X_i, of the same round.
        widths: the receiver's own widths, as `encode_modulo` has left them.

    Returns:
        max|X_j − X_i| of each block, float32 [num_blocks]; −4 min(B_i, B_j) where it is dropped, NaN where one of the
        two messages is not finite: there the copy is NaN.
    """
    (theirs, check), code = _read(layout, coded, copy.dtype)
    step, factor = _step_and_factor(layout, theirs)
    t = (_blocks(layout, own) * factor).clamp(-(2.0**22), 2.0**22)
    wraps = _rounded(layout, (t - code) * 2.0**-layout.bits)
    copy.copy_(_row(layout, (code + wraps * 2.0**layout.bits) * step))
    distance = block_distances(layout, own, copy)
    is_right = _check_sums(layout, wraps) == check.view(torch.int32)
    distance = judged(torch.where(is_right, distance, torch.inf), widths, theirs)
    drop_(layout, copy, own, distance)
    return distance


def block_distances(layout: Layout, first: Tensor, second: Tensor) -> Tensor:
    """Returns max|first − second| of each block of two rows, float32 [num_blocks]; NaN where one is."""
    return _blocks(layout, first - second).abs().amax(1).float()


def judged(distance: Tensor, widths: Tensor, theirs: Tensor) -> Tensor:
    """Returns the distances of two agents' copies, and −4 min(B_i, B_j) where these widths B cannot tell them apart.

    It is NaN where one of the widths is. Where both copies are in one process, the distances are `block_distances`, and
    the result is what `decode_modulo` returns elsewhere, at both ends.
    """
    smaller = torch.minimum(widths, theirs)
    too_far = torch.where(smaller.isnan(), torch.nan, -4 * smaller.clamp(min=LEAST_WIDTH))
    return torch.where(distance < MARGIN * smaller, distance, too_far)


def drop_(layout: Layout, copy: Tensor, own: Tensor, distance: Tensor) -> None:
    """Puts X_i in the place of X_j in the blocks whose distance is negative, and NaN where it is NaN, in place."""
    if not bool((distance >= 0).all()):
        kept, is_nan = (distance >= 0)[:, None], distance.isnan()[:, None]
        instead = torch.where(is_nan, torch.nan, _blocks(layout, own))
        copy.copy_(_row(layout, torch.where(kept, _blocks(layout, copy), instead)))


def next_widths_(layout: Layout, widths: Tensor, distances: Sequence[Tensor]) -> None:
    """Sets the widths for an agent's next message from what it has seen of its neighbours, in place.

    B_i ← max(m max|X_j − X_i|, .9 B_i) over the neighbours j, and at least 4 min(B_i, B_j) where one was too far: so
    the wider of the two waits until the other can hear it. If both grew they would never meet, for what rounding to a
    wide width adds is as far as a narrow one sees. Nobody heard: unchanged.

    Args:
        layout: of the code.
        widths: B, float32 [num_blocks].
        distances: of each neighbour that is heard, as `decode_modulo` returns them.
    """
    if distances:
        seen = torch.stack(tuple(distances))
        nearer = torch.maximum(ROOM[layout.bits] * seen.amax(0), 0.9 * widths)
        widths.copy_(torch.maximum(nearer, -seen.amin(0)).clamp(LEAST_WIDTH, MOST_WIDTH))


def dither_of(seed: int, place: Place, agent: int, layout: Layout, device: torch.device) -> Tensor:
    """Returns what makes rounding to the nearest random, for each number of an agent's row: float32 in (−1/2, 1/2).

    It is a hash of (seed, round, agent, message, column), alike on all devices.
    """
    columns = torch.arange(sum(layout.columns), dtype=torch.int64, device=device) + place.column
    rows = [_hash(columns, *keys) for keys in keys_of(seed, place, agent, layout.num_messages)]
    return ((2 * torch.cat(rows) + 1).float() * 2.0**-15) - 0.5


def keys_of(seed: int, place: Place, agent: int, num_messages: int) -> list[tuple[int, int]]:
    """Returns two keys of 32 bits for the random numbers of each of an agent's messages."""
    keys = []
    for m in range(num_messages):
        mixed = 0
        for part in (seed, place.round, place.first_agent + agent, m):
            mixed = (mixed ^ (part & MASK64)) * 0x9E3779B97F4A7C15 & MASK64
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
            mixed ^= mixed >> 31
        keys.append((mixed & MASK32, mixed >> 32))
    return keys


def _hash(x: Tensor, first: int, second: int) -> Tensor:
    """Returns 14 bits for each x, which is int64: a finalizer in 32-bit integers, with a key in the middle too."""
    x = (x ^ first) & MASK32
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK32
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B & MASK32
    return x >> 18


def _rounded(layout: Layout, values: Tensor, dither: Tensor | None = None) -> Tensor:
    """Rounds blocks to the nearest, ties to even, with a row of dither; never to −0, which no code can tell from 0."""
    return torch.round(values if dither is None else values + _blocks(layout, dither)).add_(0.0)


def _step_and_factor(layout: Layout, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns B/2^bits and its inverse, [num_blocks, 1]."""
    levels = torch.full_like(widths, 2.0**layout.bits)
    return (widths * 2.0**-layout.bits)[:, None], (levels / widths)[:, None]


def _check_sums(layout: Layout, wraps: Tensor) -> Tensor:
    """Returns Σ_jw 5^(15−t) h_(w mod 16) wraps_jw mod 2^32 of each block, int32, with t = m (w div 16) + j.

    wraps_jw belongs to the j-th code of word w. All factors are odd, and so odd that wrong wraps do not cancel.
    """
    return (_in_words(layout, wraps.nan_to_num(0.0)).long() * _factors(layout.bits, wraps.device)).sum((1, 2)).int()


@lru_cache(maxsize=16)
def _factors(bits: int, device: torch.device) -> Tensor:
    """Returns the factors of the check sum, int64 [m, words]."""
    word, x = torch.arange(BLOCK * bits // 32), torch.arange(16)
    h = (_hash(x, 1, 0) << 18 | _hash(x, 2, 0) << 4) | 1
    t = 32 // bits * (word // 16) + torch.arange(32 // bits)[:, None]
    powers = torch.tensor([5 ** (15 - k) % 2**32 for k in range(16)])
    return (powers[t] * h[word % 16] & MASK32).to(device)


@lru_cache(maxsize=16)
def _tails(layout: Layout) -> dict[int, list[int]]:
    """Returns the blocks that are not whole, by their number s of words."""
    tails: dict[int, list[int]] = {}
    block = 0
    for columns in layout.columns * layout.num_messages:
        block += _num_blocks(columns)
        if columns % BLOCK:
            tails.setdefault(-(-(columns % BLOCK) * layout.bits // 32), []).append(block - 1)
    return tails


def _in_words(layout: Layout, blocks: Tensor) -> Tensor:
    """Returns blocks [num_blocks, 256] as [num_blocks, m, words]: the numbers whose codes are the j-th of word w."""
    parts = blocks.reshape(layout.num_blocks, 32 // layout.bits, -1).clone()
    for stride, tail in _tails(layout).items():
        parts[tail] = 0
        parts[tail, :, :stride] = blocks[tail, : parts.shape[1] * stride].view(len(tail), -1, stride)
    return parts


def _out_of_words(layout: Layout, parts: Tensor) -> Tensor:
    """Returns the blocks whose numbers these are, and zeros behind the end of each tensor whatever is there."""
    blocks = parts.reshape(layout.num_blocks, -1).clone()
    for stride, tail in _tails(layout).items():
        blocks[tail, : parts.shape[1] * stride] = parts[tail, :, :stride].reshape(len(tail), -1)
    return _blocks(layout, _row(layout, blocks))


def _num_blocks(columns: int) -> int:
    return (columns + BLOCK - 1) // BLOCK


def _parts(layout: Layout, numbers: int = BLOCK) -> Iterator[tuple[int, int, int]]:
    """For each tensor of each message: where it begins in a row, its length, and where its first block begins.

    A number of the row stands for ``BLOCK / numbers`` numbers that are coded together.
    """
    begin = block = 0
    for columns in layout.columns * layout.num_messages:
        length = -(-columns * numbers // BLOCK)
        yield begin, length, block * numbers
        begin, block = begin + length, block + _num_blocks(columns)


def _blocks(layout: Layout, row: Tensor, numbers: int = BLOCK) -> Tensor:
    """Returns the row's numbers as [num_blocks, numbers], with zeros behind the end of each tensor."""
    blocks = row.new_zeros(layout.num_blocks, numbers)
    for begin, length, place in _parts(layout, numbers):
        blocks.view(-1)[place : place + length] = row[begin : begin + length]
    return blocks


def _row(layout: Layout, blocks: Tensor) -> Tensor:
    """Returns the row whose blocks these are."""
    numbers = blocks.shape[1]
    parts = [blocks.reshape(-1)[place : place + length] for _, length, place in _parts(layout, numbers)]
    return torch.cat(parts) if parts else blocks.new_zeros(0)


def _write(layout: Layout, coded: Tensor, heads: Sequence[Tensor], code: Tensor) -> None:
    """Fills a row of codes: four bytes a block of each of `heads`, then `code`, of which `bits` bits count."""
    code = _in_words(layout, code).long() & (2**layout.bits - 1)
    places = torch.arange(0, 32, layout.bits, device=code.device)
    words = _row(layout, (code << places[:, None]).sum(1).int())
    coded.copy_(torch.cat([head.reshape(-1).contiguous().view(torch.uint8) for head in (*heads, words)]))


def _read(layout: Layout, coded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the heads, float32 [1 or 2, num_blocks], and the codes of all blocks, from 0 on."""
    heads, words = coded.clone().split([layout.head_bytes, len(coded) - layout.head_bytes])
    places = torch.arange(0, 32, layout.bits, dtype=torch.int32, device=coded.device)
    words = _blocks(layout, words.view(torch.int32), BLOCK * layout.bits // 32)
    code = (words[:, None] >> places[:, None]) & (2**layout.bits - 1)
    return heads.view(torch.float32).view(-1, layout.num_blocks), _out_of_words(layout, code.to(dtype))
