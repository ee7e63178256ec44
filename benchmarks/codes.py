"""Times the coding of messages beside the message in float32, on one thread: `ops.encode`, `ops.decode`, `ops.message`.

    python benchmarks/codes.py --columns 272474 11000000 --seconds 20

GUT, one agent. Before it is timed, every code is compared with its form in plain PyTorch, bit for bit. All take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gut_fast import topology
from gut_fast.bench.timing import interleave, threads, wall_sampler
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.kernels.buffers import allocate
from gut_fast.kernels.codes import Code, Place, encode_rows
from gut_fast.kernels.machine import machine_line
from gut_fast.rules import get_rule
from gut_fast.verify.lockstep import seeded

CPU = torch.device("cpu")

CODES = [Code(16), Code(8), Code(4), Code(8, "modulo"), Code(4, "modulo"), Code(8, seed=1), Code(4, seed=1)]


class Coded:
    """One agent's message, its code, and the receiver's copies."""

    def __init__(self, step: GossipStep, code: Code) -> None:
        self.step, self.code, self.layout = step, code, code.layout(step)
        self.coded = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        self.copy, self.theirs, self.own = (new_row(self.layout.num_numbers).zero_() for _ in range(3))
        widths = torch.full((self.layout.num_blocks,), 16.0)
        self.widths = [widths] if code.kind == "modulo" else []

    def encode(self) -> None:
        """Turns the message into a code."""
        ops.encode(self.step, self.code, [self.coded], [self.copy], self.widths)

    def decode(self) -> None:
        """Turns the code into a copy."""
        ops.decode(self.layout, self.coded, self.theirs, *((self.own, *self.widths) if self.widths else ()))

    def check(self) -> None:
        """Raises AssertionError unless both ends, and plain PyTorch, have the same bits."""
        rows, coded = [new_row(self.layout.num_numbers)], torch.zeros_like(self.coded)
        copy, widths = self.copy.clone(), [width.clone() for width in self.widths]
        ops.message(self.step, rows)
        encode_rows(self.code, self.layout, rows, [coded], [copy], widths, Place())
        self.encode()
        assert torch.equal(coded, self.coded)
        assert torch.equal(copy, self.copy)
        self.own.copy_(copy)
        self.decode()
        assert torch.equal(copy, self.theirs)


def new_row(columns: int) -> Tensor:
    """Returns a row of float32 on huge pages."""
    return allocate(columns, torch.float32, CPU)


def gut_of_one_agent(columns: int) -> GossipStep:
    """Returns a step of one agent whose model is one tensor."""
    rule, numbers = get_rule("gut"), [new_row(columns) for _ in range(3)]
    for seed, row in enumerate(numbers):
        row.copy_(seeded(columns, seed=seed, dtype=torch.float32))
    coefficients = torch.tensor(rule.coefficients(lr=0.1).flat(), dtype=torch.float64)
    mixing = topology.from_matrix([[1.0]]).csr(0, CPU)
    return GossipStep([numbers[0]], [numbers[1]], [numbers[2]], coefficients, rule.num_messages, *mixing, None)


def main() -> None:
    """Compares, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[272_474, 11_000_000])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of columns")
    options = parser.parse_args()
    print(
        f"{machine_line()}\n\n| numbers | | ms, median | of the message's | tenth percentiles |\n|--:|---|--:|--:|--:|"
    )
    with threads(1):
        for columns in options.columns:
            step = gut_of_one_agent(columns)
            tasks: dict[str, Callable[[], None]] = {"message": partial(ops.message, step, [new_row(columns)])}
            for code in CODES:
                each, name = Coded(step, code), f"{code.kind}, {code.bits} bits{', random' * (code.seed is not None)}"
                each.check()
                tasks |= {f"encode {name}": each.encode, f"decode {name}": each.decode}
            times = interleave({name: wall_sampler(task, CPU) for name, task in tasks.items()}, options.seconds)
            first = times["message"]
            for name, own in times.items():
                ratios = f"{own.p50 / first.p50:.2f} | {own.p10 / first.p10:.2f}"
                print(f"| {columns:,} | {name} | {1e3 * own.p50:.3f} | {ratios} |")


if __name__ == "__main__":
    main()
