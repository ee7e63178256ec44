"""Times a step where a training loop makes it: when other threads, or another program, have the processors.

    python benchmarks/threads.py --case ring-16 --seconds 20

After an operation of PyTorch, such as those of a backward pass, its threads spin for milliseconds; after a pause they
sleep; and beside a busy program they are a processor short. The step on one thread and on all, and fused momentum SGD
on the same tensors, take turns.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from gut_fast.bench.cases import CASES
from gut_fast.bench.step import CPU, OURS, Workload, check
from gut_fast.bench.timing import interleave, threads
from gut_fast.kernels.machine import machine_line

SITUATIONS = ("after an operation", "after a pause", "step after step")
PAUSE = 0.01
SPIN = "while True: pass"


def main() -> None:
    """Compares the step with the reference, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="ring-16")
    parser.add_argument("--seconds", type=float, default=20.0, help="on a quiet machine, and as much on a busy one")
    options = parser.parse_args()
    workload, count = Workload(CASES[options.case], CPU), torch.get_num_threads()
    ours, sgd = (OURS[name](workload) for name in ("gut_fast", "SGD"))
    with threads(1):
        check(ours, workload)
    print(f"{machine_line()}; {options.case}; compared with the reference: error {check(ours, workload):.0e}")
    steps = {
        "the step, 1 thread": (ours.step, 1),
        f"the step, {count} threads": (ours.step, count),
        f"momentum SGD, {count} threads": (sgd.step, count),
    }
    samplers = {
        (name, situation): partial(_sample, step, number, count, situation)
        for name, (step, number) in steps.items()
        for situation in SITUATIONS
    }
    print(f"\n| ms a step, medians | {' | '.join(SITUATIONS)} |\n|---|{'--:|' * len(SITUATIONS)}")
    for where, machine in (("", _quiet()), (" beside a busy program", _busy())):
        with machine:
            times = interleave(samplers, options.seconds)
        for name in steps:
            print(f"| {name}{where} |", " | ".join(f"{1e3 * times[name, each].p50:.2f}" for each in SITUATIONS), "|")


def _sample(step: Callable[[], object], number: int, count: int, situation: str, samples: int) -> list[float]:
    source = torch.ones(4_000_000)
    target, seconds = torch.empty_like(source), []
    for _ in range(samples):
        if situation == "after an operation":
            with threads(count):
                torch.add(source, 1.0, out=target)
        elif situation == "after a pause":
            time.sleep(PAUSE)
        with threads(number):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _quiet() -> Iterator[None]:
    yield


@contextmanager
def _busy() -> Iterator[None]:
    """Runs a program that keeps one processor busy."""
    other = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        other.kill()
        other.wait()


if __name__ == "__main__":
    main()
