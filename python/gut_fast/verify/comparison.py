"""All comparisons, gathered in one line for each rule, backend and precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gut_fast.rules import UpdateRule
from gut_fast.verify import players
from gut_fast.verify.cases import Case, cases
from gut_fast.verify.lockstep import EXACT, LIMIT, OpRun, Precision, excess_error
from gut_fast.verify.published import published_errors

__all__ = ["Line", "Request", "Result", "num_cases", "verify"]

PUBLISHED = "published"
"""Stands in the place of a backend where the reference is compared with the published form."""


@dataclass
class Line:
    """What was found of one rule on one backend in one precision.

    Attributes:
        error: the worst `excess_error`.
        worst_case: label of the case where it was found.
        num_comparisons: tensors (z and each state, for every case, tier and thread count) that were compared.
        faults: what no size of error measures: bits that differ between tiers, threads or runs, writes beside the
            buffers, steps that fail.
    """

    rule: str
    backend: str
    device: str
    precision: str
    error: float = 0.0
    worst_case: str = ""
    num_comparisons: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The backend, and the device unless it is the usual one."""
        return self.backend if self.device in ("cpu", self.backend) else f"{self.backend}, {self.device}"

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.error <= LIMIT and not self.faults

    def add(self, label: str, error: float, num_comparisons: int = 1) -> None:
        """Counts the comparisons and keeps the worst error."""
        self.num_comparisons += num_comparisons
        if error > self.error or not self.worst_case:
            self.error, self.worst_case = error, label


@dataclass(frozen=True)
class Request:
    """What to compare."""

    rules: Sequence[UpdateRule]
    backends: Sequence[str]
    precisions: Sequence[Precision]
    tiers: Sequence[str]
    seed: int = 0
    full: bool = False
    devices: Sequence[str] = field(default_factory=players.devices)


@dataclass(frozen=True)
class Result:
    """Lines in the order of rules, and what could not be compared: precisions by backend and its reason."""

    lines: list[Line]
    missing: dict[tuple[str, str], list[str]]

    @property
    def passed(self) -> bool:
        """Whether every line has passed."""
        return all(line.passed for line in self.lines)


def num_cases(request: Request) -> int:
    """How often `verify` calls back."""
    return sum(1 for rule in request.rules for _ in cases(rule, request.seed, request.full))


def verify(request: Request, on_case: Callable[[str], object] = lambda label: None) -> Result:
    """Compares; calls `on_case` with the name of what comes next."""
    lines: list[Line] = []
    missing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for rule in request.rules:
        if EXACT in request.precisions:
            lines += _compare_published(rule, request)
        servers = _servers(rule, request, missing)
        for case in cases(rule, request.seed, request.full):
            on_case(f"{rule.name} on {case.label}")
            _compare_case(case, request, servers)
        found = [line for pairs in servers.values() for line in pairs]
        lines += sorted(found, key=lambda line: request.backends.index(line.backend))
    return Result(lines, {key: list(dict.fromkeys(names)) for key, names in missing.items()})


def _compare_published(rule: UpdateRule, request: Request) -> list[Line]:
    line = Line(rule.name, PUBLISHED, "cpu", str(EXACT))
    for label, error in published_errors(rule, request.seed, num_steps=300 if request.full else 40):
        line.add(label, error)
    return [line] if line.num_comparisons else []


def _servers(
    rule: UpdateRule, request: Request, missing: dict[tuple[str, str], list[str]]
) -> dict[Precision, list[Line]]:
    """An empty line for each backend and device that can serve the rule, by precision; the others go to `missing`."""
    different = [precision for precision in request.precisions if rule.states or len(set(precision)) == 1]
    servers: dict[Precision, list[Line]] = {precision: [] for precision in different}
    for backend in request.backends:
        for precision in different:
            reasons = {device: players.unavailable(rule, precision, backend, device) for device in request.devices}
            able = [device for device, reason in reasons.items() if reason is None]
            servers[precision] += [Line(rule.name, backend, device, str(precision)) for device in able]
            if not able:
                missing[backend, str(reasons[request.devices[-1]])].append(str(precision))
    return servers


def _compare_case(case: Case, request: Request, servers: dict[Precision, list[Line]]) -> None:
    exact = case.problem.run_reference(case.num_steps)
    for precision, lines in servers.items():
        if not lines:
            continue
        plain = exact if precision == EXACT else case.problem.run_reference(case.num_steps, precision)
        for line in lines:
            settings = players.settings(line.backend, request.tiers, case.threads, line.device)
            _compare_settings(case, precision, line, settings, exact, plain)


def _compare_settings(
    case: Case,
    precision: Precision,
    line: Line,
    settings: Iterable[players.Setting],
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
) -> None:
    first: tuple[players.Setting, list[Tensor]] | None = None
    for setting in settings:
        try:
            with setting.in_force():
                run = OpRun(case.problem, precision, line.backend, line.device).run(case.num_steps)
            rows = run.rows()
        except Exception as error:  # of a compiler's or a device's, of any kind
            line.faults.append(f"{case.label}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            return
        line.add(case.label, excess_error(rows, exact, plain, case.problem.lr), len(rows))
        if not run.guards_intact():
            line.faults.append(f"{case.label}: writes beside its buffers")
        first = first or (setting, rows)
        if not all(_same_bits(a, b) for a, b in zip(rows, first[1], strict=True)):
            line.faults.append(f"{case.label}: other bits with {setting} than with {first[0]}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
