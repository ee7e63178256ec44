"""Times of the steps of `gut-fast bench step` for pytest-benchmark, to see whether a change has made them slower.

    pytest benchmarks --benchmark-save=before                       # then change something
    pytest benchmarks --benchmark-compare='*before' --benchmark-compare-fail=median:10%
    pytest benchmarks -k "ring-16 and not large" --benchmark-sort=name

Every contender is compared with the float64 reference before it is timed; the ceiling, which makes no gossip step, is
there to tell a slower kernel from a slower machine. One thread, unless the environment variable THREADS says otherwise.
"""

import os

import pytest
from gut_fast.benchmark import comparison, timing
from gut_fast.benchmark.cases import GROUPS
from gut_fast.benchmark.contenders import Workload
from gut_fast.benchmark.peers import enter

from gut_fast.kernels import machine

THREADS = int(os.environ.get("THREADS", "1"))
CASES = [
    pytest.param(case, id=f"{case.name}{'-large' * (group == 'large')}")
    for group in ("table", "storage", "large")
    for case in GROUPS[group]
]


@pytest.fixture(autouse=True)
def on_so_many_threads():
    with timing.threads(THREADS):
        yield


@pytest.fixture(scope="module")
def field(request):
    """The buffers of a case, shared by its contenders, and these."""
    workload = Workload(request.param)
    return workload, enter(workload, ["ceiling", "sgd"])


@pytest.mark.parametrize("field", CASES, indirect=True, scope="module")
@pytest.mark.parametrize("name", ["ceiling", "gut_fast", "momentum SGD, fused"])
def test_step(benchmark, field, name):
    workload, entered = field
    contender = entered.contenders[name]
    if contender.blocks() is not None:
        columns = comparison.checked_columns(workload)
        benchmark.extra_info["error"] = comparison.largest_error(contender, workload, columns)
    benchmark.group = workload.case.name
    benchmark.extra_info |= {
        "machine": machine.machine_line(),
        "versions": machine.versions(),
        "bytes": workload.case.bytes_per_step(workload.num_agents),
        "storage": workload.case.storage_name,
    }
    benchmark(contender.step)
