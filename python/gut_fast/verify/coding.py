"""Codes of messages: the compiled ones beside plain PyTorch, bit for bit, and what a code loses of a message."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.kernels.codes import BLOCK, Code, Place, encode_rows
from gut_fast.rules import get_rule
from gut_fast.verify.lockstep import same_bits, seeded

__all__ = ["CODES", "code_name", "coded", "losses"]

CODES = (
    Code(16),
    Code(8),
    Code(4),
    Code(8, "modulo"),
    Code(4, "modulo"),
    *(Code(bits, kind, seed=1) for kind in ("difference", "modulo") for bits in (8, 4)),
)
"""The codes that are compared."""

COLUMNS = (1, 2, 63, 4097, 22_000)
WIDTH = 24.0


def code_name(code: Code) -> str:
    """Returns what a code is called in the table of rules."""
    return f"{code.kind}, {code.bits} bits{', random' * (code.seed is not None)}"


def _step(seed: int) -> GossipStep:
    graph, rule, d = topology.ring(3), get_rule("gut"), sum(COLUMNS)
    coefficients = torch.tensor(rule.coefficients(lr=0.1).flat(), dtype=torch.float64)
    parameters = [seeded(3, columns, seed=seed + 10 * k, dtype=torch.float32) for k, columns in enumerate(COLUMNS)]
    gradients: list[Tensor | None] = [torch.sin(3 * parameter) for parameter in parameters]
    state = [seeded(3 * d, seed=seed, dtype=torch.float32)]
    return GossipStep(parameters, state, gradients, coefficients, 1, *graph.csr(0, torch.device("cpu")), None)


def coded(code: Code, backend: str, seed: int) -> list[Tensor]:
    """Returns all that comes of coding the messages of three agents twice: copies, widths, codes and distances.

    Args:
        code: how messages are coded.
        backend: ``"cpu"``, or ``"torch"``: then plain PyTorch codes the messages, which the fastest backend computes.
        seed: of the numbers.
    """
    step = _step(seed)
    layout = code.layout(step)
    rows = step.new_rows(torch.float32)
    ops.message(step, rows)
    copies = [torch.zeros(layout.num_numbers) for _ in rows]
    codes = [torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in rows]
    theirs = torch.zeros(layout.num_numbers)
    widths = [torch.full((layout.num_blocks,), WIDTH) for _ in rows] if code.kind == "modulo" else []
    made: list[Tensor] = []
    for number in range(2):
        place = Place(number, 5)
        if backend == "torch":
            encode_rows(code, layout, rows, codes, copies, widths, place)
        else:
            ops.encode(step, code, codes, copies, widths, place, backend)
        own, width = (copies[0], widths[0]) if widths else (None, None)
        distance = ops.decode(layout, codes[1], theirs, own, width, backend)
        made += [each.clone() for each in (*copies, *widths, *codes, theirs, *([] if distance is None else [distance]))]
    return made


def losses(code: Code, seed: int) -> Iterator[tuple[str, float]]:
    """Yields what plain PyTorch's code loses of a message, in units of the most that it may, in round 0; and faults.

    The most is half a step of the block where numbers are rounded to the nearest, a whole one at random. A fault, both
    ends not having the same copy, is infinite.
    """
    step = _step(seed)
    rows = step.new_rows(torch.float32)
    ops.message(step, rows)
    made = coded(code, "torch", seed)
    theirs = made[len(made) // 2 - (2 if code.kind == "modulo" else 1)]
    yield "both ends", 0.0 if same_bits([theirs], [made[1]]) else math.inf
    begin = 0
    for columns in COLUMNS:
        for first in range(begin, begin + columns, BLOCK):
            block = slice(first, min(first + BLOCK, begin + columns))
            exact = rows[1][block].double()
            if code.bits == 16:
                most = exact.abs() * 2.0**-8
            else:
                size = WIDTH / 2**code.bits if code.kind == "modulo" else exact.abs().max() / (2 ** (code.bits - 1) - 1)
                most = torch.as_tensor(size if code.seed is not None else size / 2)
            lost = (made[1][block].double() - exact).abs() / (most + 2.0**-22)
            yield f"{columns} columns", float(lost.max())
        begin += columns
