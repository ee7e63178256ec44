"""Measures everything on a GPU in one call of under ten minutes: first whether it computes what it should.

    python benchmarks/gpu/run.py FOLDER [--parts verify,steps] [--seconds 540] [--device cpu]

Writes FOLDER/PART.txt, which is also printed, and FOLDER/results.json after every measurement; `picture.py` draws the
latter. Needs gut_fast, built where nvcc is found, and nothing besides what torch brings. Each part has a process of its
own, so that one that crashes, hangs or breaks the device leaves the others their turn. The exit code is 1 if something
was wrong or broke off. With ``--device cpu`` all parts run on small stand-ins, to see that they work.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from gut_fast.bench import results, step, train
from gut_fast.bench.cases import Case
from gut_fast.bench.device import find_device, machine_line, versions
from gut_fast.bench.peers import PEERS
from gut_fast.bench.step import Workload
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS
from gut_fast.kernels.machine import instruction_tiers
from gut_fast.rules import RULES
from gut_fast.topology import ring
from gut_fast.verify.comparison import Request, verify
from gut_fast.verify.lockstep import PRECISIONS, OpRun, Problem, same_bits

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import MORE_PEERS

CASES = (
    Case("ring-16-1m", parameters="resnet56"),
    Case("ring-16", parameters="resnet20"),
    Case("torus-64", topology="torus:8x8", parameters="resnet20"),
    Case("complete-16", topology="complete:16", parameters="resnet56"),
    Case("ring-16-9m", parameters="vgg11"),
    Case("ring-256", topology="ring:256", parameters="lenet5"),
    Case("complete-64", topology="complete:64", parameters="resnet20"),
    Case("ring-1024", topology="ring:1024", parameters="lenet5"),
    Case("regular-1024", topology="random-regular:1024:4:0", parameters="lenet5"),
    Case("bf16", parameters="resnet56", dtype="bfloat16"),
    Case("f16", parameters="resnet56", dtype="float16"),
    Case("bf16-state", parameters="resnet56", state_dtype="bfloat16"),
    Case("qg-gutm", "qg_gutm", parameters="resnet56"),
    Case("gradient-tracking", "gradient_tracking", parameters="resnet56"),
)
"""The cases on a GPU, each beside the other backends, a CUDA graph, momentum SGD and a copy of as many bytes."""

CASES_WITH_PEERS = 4
"""The number of the first cases that are also timed beside peers, most of which have to be compiled."""

DRY_CASES = (Case("dry-gut", topology="ring:5", parameters=13), Case("dry-dsgd", "dsgd", "ring:5", 13))
GRACE = {"cuda": 30.0, "cpu": 300.0}
"""The seconds after its time that a part has to start and to end by itself, by device; a dry run is in no hurry."""

NCU_METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread"
)
PROFILED_STEPS = 3


def called(thing):
    """The name of a case, or of several things together."""
    return " ".join(map(called, thing)) if type(thing) is tuple else getattr(thing, "name", str(thing))


class Part:
    """One part at work: where it measures, how long it may, and where the results go."""

    def __init__(self, device, seconds, folder):
        self.device, self.dry, self.folder = device, device.type == "cpu", folder
        self.end, self.failed = time.monotonic() + seconds, False

    def each(self, things, function):
        """Calls ``function(thing, seconds)`` for each, as long as there is time. One may fail."""
        for done, thing in enumerate(things):
            left = self.end - time.monotonic()
            if done and left <= 0:
                print(f"no time for {', '.join(map(called, things[done:]))}")
                return
            try:
                function(thing, max(left, 0.0) / (len(things) - done))
            except Exception as error:  # whatever it is, it is told; the traceback would hold on to its tensors
                print(f"FAILED: {called(thing)}: {''.join(traceback.format_exception_only(error)).strip()}", flush=True)
                self.failed = True

    def keep(self, result):
        """Prints a result and puts it into the file."""
        file = self.folder / "results.json"
        others = [old for old in (results.load(file) if file.exists() else []) if old.key != result.key]
        results.save([*others, result], file)
        print(results.describe(result), flush=True)


def environment(part):
    """Prints what this is measured on, and with; why a backend does not serve it."""
    print(machine_line(part.device))
    print(" · ".join(f"{name} {version}" for name, version in versions(part.device).items()))
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(part.device.type, torch.float32, 1, 1, torch.float32)
        print(f"backend {name}: {'serves this device' if reason is None else reason}")
    for command in (["nvidia-smi"], ["nvcc", "--version"]):
        if shutil.which(command[0]):
            print(subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout)


def verification(part):
    """Verifies every rule in float32, then in the next precision, and so on; and that runs repeat bit for bit."""
    where, rules = part.device.type, [RULES["dsgd"]] if part.dry else list(RULES.values())

    def compare(kind, _):
        precision, rule = kind
        request = Request([rule], AUTOMATIC[where], [precision], instruction_tiers()[:1], devices=[where])
        for found in verify(request).candidates:
            print(f"{found.rule} on {found.backend} in {found.precision}: ", end="")
            print(
                f"{found.num_comparisons} comparisons, error {found.error:.2f}, {'right' if found.passed else 'WRONG'}"
            )
            print("".join(f"  {fault}\n" for fault in found.faults), end="", flush=True)
            part.failed |= not found.passed

    def repeat(name, _):
        problem, precision = Problem(RULES["gut"], ring(16).lazy(0.5), (5, 4097)), PRECISIONS["float32"]
        if (reason := BACKENDS[name].unavailable(where, precision.dtype, 1, 1, precision.state_dtype)) is not None:
            print(f"{name}: {reason}")
            return
        first, *others = (OpRun(problem, precision, name, where).run(12).rows() for _ in range(3))
        repeats = all(same_bits(first, other) for other in others)
        print(f"{name}: three runs {'have the same bits' if repeats else 'have OTHER bits: WRONG'}")
        part.failed |= not repeats

    part.each(AUTOMATIC[where], repeat)
    part.each([(precision, rule) for precision in PRECISIONS.values() for rule in rules], compare)


def steps(part):
    """Times a step of every case, those with peers first."""

    def measure(case, seconds):
        peers = {**PEERS, **MORE_PEERS} if case in CASES[:CASES_WITH_PEERS] else {}
        found = step.measure(case, torch.get_num_threads(), min(5.0, seconds / 2), peers, part.device)
        part.failed |= any(reason.startswith("WRONG") for reason in found.absent.values())
        part.keep(found)

    part.each(DRY_CASES if part.dry else CASES, measure)


def training(part):
    """Times whole training steps: each engine, a plain loop and vmap over agents, and one model on all samples."""
    sizes = [("mlp", 3, 2)] if part.dry else [(m, n, 32) for n in (16, 64) for m in ("lenet5", "mlp", "resnet20")]

    def measure(case, seconds):
        part.keep(train.measure(case, None, torch.get_num_threads(), min(10.0, seconds / 3)))

    part.each([train.Training(*size, part.device) for size in sizes], measure)


def profile(part):
    """Shows the kernels of the first case's step: by PyTorch's profiler, and Nsight Compute where it is installed."""
    workload = Workload((DRY_CASES if part.dry else CASES)[0], part.device)
    workload.optimizer.step()
    activity = torch.profiler.ProfilerActivity.CPU if part.dry else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(PROFILED_STEPS):
            workload.optimizer.step()
    print(profiler.key_averages().table(row_limit=20))
    if part.dry or shutil.which("ncu") is None:
        print("no figures of Nsight Compute: it is not installed, or this is no GPU")
        return
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--metrics",
        NCU_METRICS,
        sys.executable,
    ]
    limit = max(part.end - time.monotonic(), 5.0)
    subprocess.run([*command, __file__, str(part.folder), "--profiled"], timeout=limit, check=False)


def profiled(device):
    """Makes steps of the first case, of which a profiler that is attached sees those after the first ones."""
    workload = Workload(CASES[0], device)
    for count in range(2 * PROFILED_STEPS):
        if count == PROFILED_STEPS:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        workload.optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


PARTS = {environment: 15, verification: 110, steps: 260, training: 115, profile: 40}
"""The parts in their order, and the seconds that each may take."""

NAMES = {"verify" if part is verification else part.__name__: part for part in PARTS}


def run_part(name, options):
    """Runs a part in a process of its own, which ends with all that it has started; returns its exit code."""
    arguments = [options.folder, "--device", options.device, "--child", name, "--seconds", f"{options.seconds:.0f}"]
    with (
        (options.folder / f"{name}.txt").open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-u", __file__, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):

        def end():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(options.seconds + GRACE[options.device], end)
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
            return process.wait()
        finally:
            timer.cancel()
            end()


def main():
    """Runs the parts, or as a child one of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--parts", default=",".join(NAMES), help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=sum(PARTS.values()), help="in all; default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of small cases")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, names = find_device(options.device), options.parts.split(",")
    if options.profiled:
        profiled(device)
        return 0
    if options.child is not None:
        part = Part(device, options.seconds, options.folder)
        NAMES[options.child](part)
        return int(part.failed)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(NAMES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    end, codes = time.monotonic() + options.seconds, {}
    for place, name in enumerate(names):
        share = PARTS[NAMES[name]] / sum(PARTS[NAMES[other]] for other in names[place:])
        options.seconds = max(end - time.monotonic(), 0.0) * share
        print(f"\n== {name}: up to {options.seconds:.0f} s", flush=True)
        codes[name] = run_part(name, options)
        print(f"== {name}: {'done' if codes[name] == 0 else f'exit code {codes[name]}'}", flush=True)
    return int(any(codes.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # by an exception, so that the part at work ends too
    sys.exit(main())
