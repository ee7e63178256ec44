"""The parts: each looks at one thing on a device, puts what it finds into the notes, and says how it ended."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gut_fast.benchmark import results, train_run
from gut_fast.benchmark.cases import Case
from gut_fast.benchmark.comparison import WrongResultError
from gut_fast.benchmark.contenders import GutFast, Workload
from gut_fast.benchmark.device import Device, nvidia_smi
from gut_fast.benchmark.gpu.notes import ABSENT, DONE, FAILED, WRONG, Budget, Notes
from gut_fast.benchmark.gpu.plan import BESIDE, Plan
from gut_fast.benchmark.run import run, versions
from gut_fast.benchmark.training import Task, engines_of
from gut_fast.kernels import machine
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS
from gut_fast.rules import RULES, get_rule
from gut_fast.topology import ring
from gut_fast.verify import comparison
from gut_fast.verify.lockstep import LIMIT, PRECISIONS, OpRun, Problem, excess_error

__all__ = ["FUNCTIONS", "Part", "profile_steps"]

SMI_FIELDS = (
    *("name", "driver_version", "memory.total", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu", "mig.mode.current"),
)
MAX_COMPARED = 2**20
"""Numbers of a step that are compared with the reference: the ends of every tensor, and some by chance."""

FLOAT32 = PRECISIONS["float32"]
RUNS, STEPS = 3, 12
"""Of the search for what is not deterministic."""

NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block_dynamic": "dynamic shared memory",
}
NCU_STEPS = 3
NO_PERMISSION = "ERR_NVGPUCTRPERM"
"""Where the driver keeps its counters to administrators."""


@dataclass
class Part:
    """One part at work: where, on what, for how long, and where its findings go."""

    name: str
    device: Device
    plan: Plan
    budget: Budget
    notes: Notes
    say: Callable[[str], None]

    def put(self, **entries: Any) -> None:
        """Keeps what has been found so far."""
        self.notes.put(self.name, **entries)

    def while_time(self, things: Sequence[Any], name_of: Callable[[Any], str]) -> Iterator[tuple[Any, float]]:
        """Each of these with its share of the seconds; noted are those left when there is no time for one as long as
        the longest before.
        """
        longest = 0.0
        for done, thing in enumerate(things):
            left = self.budget.left
            if done and left <= longest:
                self.put(not_reached=[name_of(each) for each in things[done:]])
                return
            self.say(f"{self.name}: {name_of(thing)}")
            yield thing, self.budget.share(of=len(things) - done)
            longest = max(longest, left - self.budget.left)


def environment(part: Part) -> str:
    """What this is measured on, and with."""
    device = part.device
    nvcc = _output("nvcc", "--version").strip().splitlines()
    smi = nvidia_smi(*SMI_FIELDS) if device.is_gpu else None
    kind = (device.torch_device.type, torch.float32, 1, 1, torch.float32)
    part.put(
        machine=device.machine_line(),
        versions=versions(device),
        nvcc=nvcc[-1] if nvcc else None,
        nvidia_smi=None if smi is None else dict(zip(SMI_FIELDS, smi.split(", "), strict=False)),
        backends={name: backend.unavailable(*kind) for name, backend in BACKENDS.items()},
    )
    return DONE


def verify(part: Part) -> str:
    """As ``gut-fast verify``, on this device alone: every rule in float32, then in the next precision, and so on."""
    where, tiers = part.device.torch_device.type, machine.instruction_tiers()[:1]
    kinds = [(rule, precision) for precision in PRECISIONS.values() for rule in part.plan.rules]
    lines: list[comparison.Candidate] = []
    for (rule, precision), _ in part.while_time(kinds, lambda kind: f"{kind[0]} in {kind[1]}"):
        request = comparison.Request([RULES[rule]], AUTOMATIC[where], [precision], tiers, devices=[where])
        lines += comparison.verify(request).candidates
        part.put(limit=LIMIT, lines=[dataclasses.asdict(line) | {"passed": line.passed} for line in lines])
    return DONE if all(line.passed for line in lines) else WRONG


def determinism(part: Part) -> str:
    """Whether a backend computes the same bits in every run, and how far it is from the compiled kernel of the CPU.

    Errors, in the units of ``gut-fast verify``, are those against the float64 reference; the difference is that of the
    two, relative to the largest entry of each tensor.
    """
    entries: list[dict[str, Any]] = []
    kind = part.device.torch_device.type

    def look(rule: str, _: float) -> None:
        problem = Problem(get_rule(rule), ring(16).lazy(0.5), part.plan.columns)
        exact, plain = problem.run_reference(STEPS), problem.run_reference(STEPS, FLOAT32)
        cpu = OpRun(problem, FLOAT32, "auto").run(STEPS).rows()
        served = (FLOAT32.dtype, len(problem.rule.states), problem.rule.num_messages, FLOAT32.state_dtype)
        for name in AUTOMATIC[kind]:
            if BACKENDS[name].unavailable(kind, *served) is not None:
                continue
            runs = [OpRun(problem, FLOAT32, name, kind).run(STEPS).rows() for _ in range(RUNS)]
            entries.append(
                {
                    "rule": rule,
                    "backend": name,
                    "same bits": all(torch.equal(a, b) for rows in runs for a, b in zip(rows, runs[0], strict=True)),
                    "error": excess_error(runs[0], exact, plain, problem.lr),
                    "error on the CPU": excess_error(cpu, exact, plain, problem.lr),
                    "difference": max(
                        float((a - b).abs().max() / b.abs().max()) for a, b in zip(runs[0], cpu, strict=True)
                    ),
                }
            )
            part.put(limit=LIMIT, steps=STEPS, runs=RUNS, entries=entries)

    end = _each(part, ["gut", "gradient_tracking"], str, look)
    is_right = all(entry["same bits"] and max(entry["error"], entry["error on the CPU"]) <= LIMIT for entry in entries)
    return end if is_right else WRONG


def steps(part: Part) -> str:
    """A step in every case, beside the copy, momentum SGD, and the other backends."""
    return _measure_cases(part, part.plan.cases, BESIDE)


def peers(part: Part) -> str:
    """A step in some cases, beside everyone."""
    return _measure_cases(part, part.plan.peer_cases, part.plan.peers)


def _measure_cases(part: Part, cases: Sequence[Case], families: Sequence[str]) -> str:
    measured: list[results.Result] = []

    def measure(case: Case, share: float) -> None:
        seconds = min(part.plan.seconds, share / 2)
        result = run(case, part.plan.threads, seconds, families, max_compared=MAX_COMPARED, device=part.device)
        measured.append(result)
        part.put(results=results.as_json(measured))
        fraction = result.fraction_of_ceiling()
        part.say(f"  {1e3 * result.ours:.3f} ms" + ("" if fraction is None else f", {fraction:.2f} of the ceiling"))

    return _each(part, cases, lambda case: case.name, measure)


def training(part: Part) -> str:
    """Whole training steps: each engine, a plain loop over agents, and one model on all samples."""
    measured: list[train_run.TrainingResult] = []
    tasks = [
        Task(model, agents, part.plan.batch_size, part.device)
        for agents in part.plan.agents
        for model in part.plan.models
    ]

    def measure(task: Task, share: float) -> None:
        seconds = min(2 * part.plan.seconds, share / 3)
        engines = engines_of(part.device)
        measured.append(train_run.run(task, engines, part.plan.threads, seconds, controls=False))
        part.put(results=train_run.as_json(measured))
        result = measured[-1]
        part.say(f"  {result.best}: {result.rate(result.best):,.0f} samples/s")

    return _each(part, tasks, lambda task: f"{task.model}, {task.agents} agents", measure)


def _each(
    part: Part, things: Sequence[Any], name_of: Callable[[Any], str], measure: Callable[[Any, float], None]
) -> str:
    """Measures each; one that raises does not keep the others from their turn. The worst of their ends."""
    failures: dict[str, str] = {}
    ends = {DONE}
    for thing, share in part.while_time(things, name_of):
        end, problem = _end_of(partial(measure, thing, share))
        ends.add(end)
        if end != DONE:
            failures[name_of(thing)] = problem
            part.say(f"  {problem}")
            part.put(failures=failures)
    return next(end for end in (WRONG, FAILED, DONE) if end in ends)


def _end_of(measure: Callable[[], None]) -> tuple[str, str]:
    """How a measurement has ended, and why. The exception itself would hold on to its tensors, on the device."""
    try:
        measure()
    except Exception as error:  # whatever it is, it goes into the notes
        problem = "".join(traceback.format_exception_only(error)).strip()
        return WRONG if isinstance(error, WrongResultError) else FAILED, problem
    return DONE, ""


def ncu(part: Part) -> str:
    """What Nsight Compute counts in the kernel of the main case; the GPU's clocks are left as they are."""
    tool = shutil.which("ncu")
    if tool is None or not part.device.is_gpu:
        part.put(reason="ncu is not installed" if part.device.is_gpu else "ncu looks into GPUs")
        return ABSENT
    command = [
        *(tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"),
        *("--print-units", "base", "--metrics", ",".join(NCU_METRICS)),
        *(sys.executable, "-m", "gut_fast.benchmark.gpu.run", "--profile-steps"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, part.budget.left), check=False)
    kernels = list(_ncu_rows(done.stdout))
    part.put(case=part.plan.profiled.name, kernels=kernels)
    if kernels:
        return DONE
    said = done.stdout + done.stderr
    part.put(reason=_ncu_problem(said))
    return ABSENT if NO_PERMISSION in said else FAILED


def _ncu_problem(said: str) -> str:
    """Its own words for what went wrong, else the last it said."""
    lines = said.strip().splitlines() or ["ncu says nothing"]
    return next((line for line in lines if line.startswith("==ERROR==")), lines[-1])


def _ncu_rows(output: str) -> Iterator[dict[str, str]]:
    """The table in what ncu prints: a heading, units, and a row for each kernel."""
    table = [line for line in output.splitlines() if line.startswith('"')]
    for row in list(csv.DictReader(io.StringIO("\n".join(table))))[1:]:
        yield {
            "kernel": row["Kernel Name"],
            **{name: row[metric] for metric, name in NCU_METRICS.items() if metric in row},
        }


def profile_steps(device: Device, case: Case) -> None:
    """Steps of a case, of which a profiler that is attached sees those after the first ones."""
    ours = GutFast(Workload(case, device))
    for _ in range(NCU_STEPS):
        ours.step()
    device.synchronize()
    torch.cuda.profiler.start()
    for _ in range(NCU_STEPS):
        ours.step()
    device.synchronize()
    torch.cuda.profiler.stop()


def _output(*command: str) -> str:
    """What a program prints; nothing where there is none of that name."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


FUNCTIONS: dict[str, Callable[[Part], str]] = {
    function.__name__: function for function in (environment, verify, determinism, steps, peers, training, ncu)
}
"""Parts by name; each returns how it ended."""
