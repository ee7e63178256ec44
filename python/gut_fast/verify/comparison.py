"""All comparisons, gathered in one `Candidate` for each rule, backend, device and precision."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gut_fast import topology
from gut_fast.kernels.backends import BACKENDS, cpu
from gut_fast.kernels.codes import Code
from gut_fast.reference import PUBLISHED
from gut_fast.rules import UpdateRule
from gut_fast.verify.cases import THREADS, Case, cases
from gut_fast.verify.coding import code_name, coded, losses
from gut_fast.verify.lockstep import EXACT, LIMIT, ROUNDINGS, OpRun, Precision, Problem, excess_error, same_bits

__all__ = [
    "Candidate",
    "Request",
    "Result",
    "Setting",
    "compare_candidate",
    "devices",
    "num_cases",
    "settings",
    "verify",
]

BACKENDS_WITH_TIERS = ("cpu",)

PUBLISHED_FORM = "published"
"""Stands in the place of a backend where the reference is compared with the published form."""

HALF_THE_BITS = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


@dataclass
class Candidate:
    """One implementation under test: a rule on a backend and device in one precision, and what was found of it.

    Attributes:
        error: the worst `excess_error`.
        worst_case: label of the case where it was found.
        num_comparisons: tensors (z and each state, for every case, tier and thread count) that were compared.
        faults: everything that no size of error measures: bits that differ between tiers, threads or runs, writes
            beside the buffers, steps that fail.
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
        """True if nothing is wrong."""
        return self.error <= LIMIT and not self.faults

    def add(self, label: str, error: float, num_comparisons: int = 1) -> None:
        """Counts the comparisons and keeps the worst error."""
        self.num_comparisons += num_comparisons
        if error > self.error or not self.worst_case:
            self.error, self.worst_case = error, label


class Setting(NamedTuple):
    """The circumstances of a run, which must not change a single bit; None leaves the tier or threads as they are."""

    tier: str | None = None
    threads: int | None = None
    repeat: int = 0

    def __str__(self) -> str:
        tier = "" if self.tier is None else f"tier {self.tier}"
        threads = "" if self.threads is None else f"{self.threads} thread{'s' * (self.threads != 1)}"
        repeat = "" if self.repeat == 0 else "once more"
        return ", ".join(filter(None, (tier, threads, repeat))) or "as it is"

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Sets the tier and the thread count, and puts both back at the end."""
        tier_before, threads_before = cpu.tier(), torch.get_num_threads()
        try:
            if self.tier is not None:
                cpu.set_tier(self.tier)
            torch.set_num_threads(self.threads or threads_before)
            yield
        finally:
            torch.set_num_threads(threads_before)
            if self.tier is not None and tier_before is not None:
                cpu.set_tier(tier_before)


def settings(backend: str, tiers: Sequence[str], threads: Sequence[int], device: str = "cpu") -> list[Setting]:
    """All settings in which a backend must give the same bits; on another device it simply has to do so twice."""
    if device != "cpu":
        return [Setting(), Setting(repeat=1)]
    if backend not in BACKENDS_WITH_TIERS:
        return [Setting()]
    return [Setting(tier, count) for tier in tiers for count in threads or (None,)]


def devices() -> list[str]:
    """The devices of this machine that tensors can be put on."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Request:
    """The rules, backends, precisions, instruction tiers, codes of messages and devices to compare."""

    rules: Sequence[UpdateRule]
    backends: Sequence[str]
    precisions: Sequence[Precision]
    tiers: Sequence[str]
    seed: int = 0
    full: bool = False
    codes: Sequence[Code] = ()
    devices: Sequence[str] = field(default_factory=devices)


@dataclass(frozen=True)
class Result:
    """The candidates in the order of rules, and the precisions that no device serves, by backend and its reason."""

    candidates: list[Candidate]
    missing: dict[tuple[str, str], list[str]]

    @property
    def passed(self) -> bool:
        """True if every candidate has passed."""
        return all(candidate.passed for candidate in self.candidates)


def num_cases(request: Request) -> int:
    """The number of times `verify` calls `on_case`."""
    return sum(1 for rule in request.rules for _ in cases(rule, request.seed, request.full)) + len(request.codes)


def verify(request: Request, on_case: Callable[[str], object] = lambda label: None) -> Result:
    """Compares all that is asked for; calls `on_case` with the name of each case before it runs."""
    found: list[Candidate] = []
    missing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for rule in request.rules:
        if EXACT in request.precisions:
            found += _compare_published(rule, request)
        candidates = _candidates(rule, request, missing)
        for case in cases(rule, request.seed, request.full):
            on_case(f"{rule.name} on {case.label}")
            _compare_case(case, request, candidates)
        compared = [candidate for each in candidates.values() for candidate in each]
        found += sorted(compared, key=lambda candidate: request.backends.index(candidate.backend))
    for code in request.codes:
        on_case(code_name(code))
        found += _compare_code(code, request)
    return Result(found, {key: list(dict.fromkeys(names)) for key, names in missing.items()})


def _candidates(
    rule: UpdateRule, request: Request, missing: dict[tuple[str, str], list[str]]
) -> dict[Precision, list[Candidate]]:
    """A new candidate for each backend and device that can serve the rule, by precision; the others go to `missing`."""
    precisions = [precision for precision in request.precisions if rule.states or len(set(precision)) == 1]
    candidates: dict[Precision, list[Candidate]] = {precision: [] for precision in precisions}
    for backend in request.backends:
        for precision in precisions:
            dtype, state_dtype = precision
            reasons: dict[str, str | None] = {
                device: BACKENDS[backend].unavailable(device, dtype, len(rule.states), rule.num_messages, state_dtype)
                for device in request.devices
            }
            able = [device for device, reason in reasons.items() if reason is None]
            candidates[precision] += [Candidate(rule.name, backend, device, str(precision)) for device in able]
            if not able:
                missing[backend, str(reasons[request.devices[-1]])].append(str(precision))
    return candidates


def _compare_case(case: Case, request: Request, candidates: dict[Precision, list[Candidate]]) -> None:
    exact = case.problem.run_reference(case.num_steps)
    for precision, able in candidates.items():
        if not able:
            continue
        plain = exact if precision == EXACT else case.problem.run_reference(case.num_steps, precision)
        for candidate in able:
            compare_candidate(candidate, case, precision, exact, plain, request.tiers)


def compare_candidate(
    candidate: Candidate,
    case: Case,
    precision: Precision,
    exact: Sequence[Tensor],
    plain: Sequence[Tensor],
    tiers: Sequence[str] = (),
) -> None:
    """Runs a case in all settings of the candidate's backend, and adds errors and faults to the candidate.

    Args:
        candidate: the candidate; its backend must serve the rule in this precision.
        case: the problem, its steps and thread counts.
        precision: the precision of the run.
        exact: z and every state after the reference's steps in float64.
        plain: z and every state after the reference's steps in this precision.
        tiers: the instruction tiers that must give the same bits.
    """
    first: tuple[Setting, list[Tensor]] | None = None
    for setting in settings(candidate.backend, tiers, case.threads, candidate.device):
        try:
            with setting.in_force():
                run = OpRun(case.problem, precision, candidate.backend, candidate.device).run(case.num_steps)
            rows = run.rows()
        except Exception as error:  # a compiler or a device may raise anything
            first_line = str(error).strip().partition("\n")[0]
            candidate.faults.append(f"{case.label}: {type(error).__name__}: {first_line}")
            return
        candidate.add(case.label, excess_error(rows, exact, plain, case.problem.lr), len(rows))
        if not run.guards_intact():
            candidate.faults.append(f"{case.label}: writes beside its buffers")
        first = first or (setting, rows)
        if not same_bits(rows, first[1]):
            candidate.faults.append(f"{case.label}: other bits with {setting} than with {first[0]}")


def _compare_code(code: Code, request: Request) -> list[Candidate]:
    """Plain PyTorch's code beside the message, and the compiled one beside plain PyTorch's."""
    plain = Candidate(code_name(code), "torch", "cpu", "float32")
    for label, error in losses(code, request.seed):
        plain.add(label, error)
    if "cpu" not in request.backends or cpu.why_missing is not None:
        return [plain]
    compiled, expected = Candidate(plain.rule, "cpu", "cpu", "float32"), coded(code, "torch", request.seed)
    for setting in settings("cpu", request.tiers, THREADS):
        with setting.in_force():
            made = coded(code, "cpu", request.seed)
        compiled.add("all codes", 0.0, len(made))
        if not same_bits(made, expected):
            compiled.faults.append(f"other bits with {setting} than plain PyTorch")
    return [compiled, plain]


def _compare_published(rule: UpdateRule, request: Request) -> list[Candidate]:
    """The reference beside the form in the paper, in float64; empty for a rule that has no published form."""
    if rule.name not in PUBLISHED:
        return []
    candidate = Candidate(rule.name, PUBLISHED_FORM, "cpu", str(EXACT))
    flags = [{}, *({name: not value} for name, value in rule.hyperparameters.items() if isinstance(value, bool))]
    for graph in (
        topology.ring(5),
        topology.torus(3, 3),
        topology.star(6),
        topology.petersen(),
        topology.erdos_renyi(7, 0.5, request.seed),
    ):
        for changed in flags:
            problem = Problem(rule, graph.lazy(0.5), (101,), {**rule.hyperparameters, **changed}, seed=request.seed)
            problem.start = problem.start[:1].expand_as(problem.start)
            error = _published_error(problem, num_steps=300 if request.full else 40)
            candidate.add(", ".join((graph.name, *changed)), error)
    return [candidate]


def _published_error(problem: Problem, num_steps: int) -> float:
    """The largest difference between z of the reference and of the published form, in float64.

    Its unit is the loss of the published form: nothing is more exact than float64, but in float32 the form loses 2²⁹
    times as much, and that can be measured.
    """
    z = problem.run_reference(num_steps)[0]
    exact, single = (_run_published(problem, num_steps, dtype) for dtype in (torch.float64, torch.float32))
    lost = (single - exact).abs().max().item()
    floor = ROUNDINGS[torch.float64] * torch.finfo(torch.float64).eps * exact.abs().max().item()
    error = (z - exact).abs().max().item()
    return error / max(HALF_THE_BITS * lost, floor) if math.isfinite(error) else math.inf


def _run_published(problem: Problem, num_steps: int, dtype: torch.dtype) -> Tensor:
    W, x = problem.topology.matrix().to(dtype), problem.start.to(dtype)
    method = PUBLISHED[problem.rule.name](W, x, problem.lr, **problem.hyperparameters)
    for _ in range(num_steps):
        method.step(problem.gradient(method.z))
    return method.z
