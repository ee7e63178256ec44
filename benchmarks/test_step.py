"""Times of the steps of `gut-fast bench step` for pytest-benchmark, to see whether a change has made them slower.

    pytest benchmarks --benchmark-save=before                       # then change something
    pytest benchmarks --benchmark-compare='*before' --benchmark-compare-fail=median:10%
    pytest benchmarks -k "ring-16 and not large" --benchmark-sort=name

Every step that gossips is compared with the float64 reference before it is timed; the ceiling, which does not, is there
to tell a slower kernel from a slower machine. One thread, unless the environment variable THREADS says otherwise.
"""

import os

import pytest

from gut_fast.bench.cases import GROUPS
from gut_fast.bench.step import OURS, Workload, check
from gut_fast.bench.timing import threads
from gut_fast.kernels import machine

THREADS = int(os.environ.get("THREADS", "1"))
CASES = [
    pytest.param(case, id=f"{case.name}{'-large' * (group == 'large')}")
    for group in ("table", "storage", "large")
    for case in GROUPS[group]
]


@pytest.fixture(autouse=True)
def on_so_many_threads():
    with threads(THREADS):
        yield


@pytest.fixture(scope="module")
def workload(request):
    """The tensors of a case, shared by its contenders."""
    return Workload(request.param)


@pytest.mark.parametrize("workload", CASES, indirect=True, scope="module")
@pytest.mark.parametrize("name", ["ceiling", "gut_fast", "SGD"])
def test_step(benchmark, workload, name):
    contender = OURS[name](workload)
    benchmark.extra_info |= {
        "error": check(contender, workload),
        "machine": machine.machine_line(),
        "versions": machine.versions(),
        "bytes": workload.case.bytes_per_step(workload.num_agents),
    }
    benchmark.group = workload.case.name
    benchmark(contender.step)
