"""The four matrices of a step, and the numbers that hyper-parameters may be."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ANY_NUMBER", "Coefficients", "Interval", "is_number", "plain_gossip"]

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """The values a hyper-parameter may take: ``low <= value <= high`` (``value < high`` where `open_above`)."""

    low: float
    high: float
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        below = value < self.high if self.open_above else value <= self.high
        return _is_finite(value) and self.low <= value and below

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}" + (")" if self.open_above else "]")


LARGEST = sys.float_info.max

ANY_NUMBER = Interval(-math.inf, math.inf, open_above=True)


@dataclass(frozen=True)
class Coefficients:
    """The four matrices of one step: A [M, K], B [K − 1, K], C [K − 1, M], E [K − 1, M], nested sequences of floats.

    L [K − 1, K], or None for what `local` makes of the others, is a local step, in which nothing is sent.
    """

    A: Matrix
    B: Matrix
    C: Matrix
    E: Matrix
    L: Matrix | None = None

    def flat(self) -> list[float]:
        """A, B, C, E one after the other, each row by row: the layout every kernel reads."""
        return [float(value) for matrix in (self.A, self.B, self.C, self.E) for row in matrix for value in row]

    def check(self, where: str, inputs: Sequence[str], outputs: Sequence[str], num_messages: int | None) -> None:
        """Raises TypeError or ValueError, its message after `where`, unless these are a step's matrices.

        Args:
            where: how the message opens.
            inputs: the names of the K inputs.
            outputs: the names of the K − 1 outputs.
            num_messages: M, or None if any will do.
        """
        for letter in "ABCE":
            if not _is_matrix(getattr(self, letter)):
                raise TypeError(f"{where}{letter} must be a list of rows, got {getattr(self, letter)!r}")
        messages = [f"S{m + 1}" for m in range(len(self.A))]
        if not messages:
            raise ValueError(f"{where}A has no row; a rule sends at least one message")
        if len(messages) != (num_messages or len(messages)):
            raise ValueError(f"{where}A has {len(messages)} rows, but {num_messages} at the defaults")
        drifts = [f"D{m + 1}" for m in range(len(messages))]
        for letter, rows, columns in (
            ("A", messages, inputs),
            ("B", outputs, inputs),
            ("C", outputs, messages),
            ("E", outputs, drifts),
        ):
            _check_matrix(where, letter, getattr(self, letter), rows, columns)
        if self.L is not None:
            if not _is_matrix(self.L):
                raise TypeError(f"{where}L must be a list of rows or None, got {self.L!r}")
            _check_matrix(where, "L", self.L, outputs, inputs)

    def local(self) -> Coefficients:
        """The matrices of a local step, to be taken without neighbours: outputs ``o = L u``.

        Without an L of the rule's own a local step is one whose drift is zero; but a state that the drift feeds and no
        gradient does, as GUT's r, stays as it is: what it has learned of the others holds until there is news.
        """
        B, C = list(self.B), list(self.C)
        for row in range(len(B)):
            if self.L is not None:
                B[row], C[row] = self.L[row], [0.0] * len(self.A)
            elif row and any(self.E[row]) and not self._from_gradient(row):
                B[row], C[row] = [float(k == row) for k in range(len(self.A[0]))], [0.0] * len(self.A)
        return replace(self, B=B, C=C, L=None)

    def _from_gradient(self, row: int) -> float:
        """The coefficient of the gradient in an output, that in the messages included."""
        through = sum(c * a[-1] for c, a in zip(self.C[row], self.A, strict=True))
        return self.B[row][-1] + through

    def with_gradient(self, weight_decay: float, maximize: bool) -> Coefficients:
        """The matrices with ±g + weight_decay z in place of g."""
        if not weight_decay and not maximize:
            return self
        sign = -1.0 if maximize else 1.0

        def fold(matrix: Matrix) -> list[list[float]]:
            return [[row[0] + weight_decay * row[-1], *row[1:-1], sign * row[-1]] for row in matrix]

        L = None if self.L is None else fold(self.L)
        return Coefficients(fold(self.A), fold(self.B), self.C, self.E, L)


def plain_gossip(num_inputs: int, num_messages: int) -> Coefficients:
    """The matrices of a step without learning: ``S = z,  z' = S + D``, and the state stays as it is."""
    num_outputs = num_inputs - 1

    def single_ones(rows: int, columns: int, ones: set[tuple[int, int]]) -> list[list[float]]:
        return [[float((row, column) in ones) for column in range(columns)] for row in range(rows)]

    return Coefficients(
        A=single_ones(num_messages, num_inputs, {(0, 0)}),
        B=single_ones(num_outputs, num_inputs, {(row, row) for row in range(1, num_outputs)}),
        C=single_ones(num_outputs, num_messages, {(0, 0)}),
        E=single_ones(num_outputs, num_messages, {(0, 0)}),
    )


def is_number(value: Any) -> bool:
    """True for a real number, which a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """Equals math.isfinite, which torch.compile cannot trace; integers beyond a float's range are not finite either."""
    is_beyond = isinstance(value, int) and abs(value) > LARGEST
    return -math.inf < value < math.inf and not is_beyond


def _is_matrix(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in value)


def _check_matrix(where: str, letter: str, matrix: Matrix, rows: Sequence[str], columns: Sequence[str]) -> None:
    shape = f"({len(rows)}, {len(columns)}): rows {', '.join(rows)}; columns {', '.join(columns)}"
    if len(matrix) != len(rows):
        raise ValueError(f"{where}{letter} has {len(matrix)} rows, expected shape {shape}")
    for row_name, row in zip(rows, matrix, strict=True):
        if len(row) != len(columns):
            raise ValueError(f"{where}row {row_name} of {letter} has {len(row)} entries, expected shape {shape}")
        for column_name, value in zip(columns, row, strict=True):
            if not is_number(value) or not _is_finite(value):
                raise ValueError(f"{where}{letter}[{row_name}, {column_name}] = {value!r} is not a finite number")
