"""The compiled CPU kernel alone: instruction tiers, threads, processes, and the rules that it is compiled for."""

import ctypes
import ctypes.util
import os
import platform
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from gut_fast import _core, topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import arithmetic, cpu
from gut_fast.rules import RULES
from gut_fast.topology.names import parse_topology
from gut_fast.verify.lockstep import same_bits
from steps import a_step, copied, outputs, own_rule, stepped

LARGE = (9000, 3, 4097)


def test_thread_counts_agree_bit_for_bit(threads):
    for rule in ("gut", "gradient_tracking"):
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(outputs(stepped(a_step(rule, topology.ring(16), LARGE), "cpu")))
        assert all(same_bits(result, results[0]) for result in results)


def test_threads_and_tiers_share_the_halves_bit_for_bit(threads, tier):
    step = a_step("gradient_tracking", topology.ring(4), (4097, 33_000, 5))  # enough for a second thread in one agent
    results = []
    for count, name in ((1, "baseline"), (4, "baseline"), (3, _core.available_tiers()[0])):
        threads(count)
        tier(name)
        part, rows = copied(step), [torch.empty(2 * 37_102, dtype=torch.bfloat16) for _ in range(4)]
        ops.message(part, rows, "cpu")
        ops.combine_(part, rows, "cpu")
        results.append([*rows, *outputs(part)])
    assert all(same_bits(result, results[0]) for result in results)


def test_threads_share_the_callers_floating_point_modes(threads):
    """Denormals are flushed, or not, whichever thread computes them."""
    step = a_step("gut", topology.ring(16), (20_000,))
    step = step._replace(
        parameters=[1e-38 * step.parameters[0]],
        state=[torch.zeros_like(step.state[0])],
        gradients=[1e-38 * step.gradients[0]],
    )

    def results():
        for count in (1, 4):
            threads(count)
            yield stepped(step, "cpu").parameters

    assert torch.set_flush_denormal(True)
    try:
        flushed, flushed_in_threads = results()
    finally:
        torch.set_flush_denormal(False)
    kept, kept_in_threads = results()
    assert same_bits(flushed, flushed_in_threads)
    assert same_bits(kept, kept_in_threads)
    assert not torch.equal(flushed[0], kept[0])


def test_steps_in_several_python_threads_at_once(threads):
    threads(2)
    steps = [a_step(rule, topology.ring(16), (9000, 3)) for rule in ("gut", "gutm", "dsgd", "gradient_tracking")]
    one_by_one = [outputs(stepped(step, "cpu")) for step in steps]
    together = [copied(step) for step in steps]
    workers = [threading.Thread(target=ops.gossip_step_, args=(*step, "cpu")) for step in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same_bits(outputs(a), b) for a, b in zip(together, one_by_one, strict=True))


def test_the_gil_is_released():
    step = a_step("gut", topology.ring(16), (500_000,))
    running, done, seen = threading.Event(), threading.Event(), 0

    def steps():
        running.set()
        for _ in range(10):
            ops.gossip_step_(*step, "cpu")
        done.set()

    worker = threading.Thread(target=steps)
    worker.start()
    running.wait()
    while not done.is_set():
        seen += 1
    worker.join()
    assert seen > 10_000  # a kernel that kept the GIL would let this loop turn only between steps


FORK = """
import os, signal, torch
from gut_fast import topology
from gut_fast.kernels import ops
from steps import a_step

torch.set_num_threads(4)
step = a_step("gut", topology.ring(16), (9000,))
ops.gossip_step_(*step)  # the pool's threads exist now, and will not in the child
child = os.fork()
signal.alarm(30)
ops.gossip_step_(*step)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both stepped")
"""


def script(text, **environment):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=100)


def test_a_forked_child_can_step():
    result = script(FORK)
    assert (result.stdout.strip(), result.returncode) == ("both stepped", 0), result.stderr


TIER = """
import torch
from gut_fast.kernels import ops
from gut_fast.kernels.backends import arithmetic, cpu
print(cpu.tier(), "|", cpu.unavailable("cpu", torch.float32, 1, 1))
print(ops.select_backend("auto", "cpu", torch.float32, 1, 1).__name__)
"""


@pytest.mark.parametrize("tier", ["baseline", "no-such-tier"])
def test_the_environment_forces_a_tier(tier):
    result = script(TIER, GUT_FAST_TIER=tier)
    if tier == "baseline":
        assert result.stdout.split("\n")[:2] == ["baseline | None", "gut_fast.kernels.backends.cpu"]
        assert not result.stderr
    else:
        assert "steps are slow without the compiled kernel: backend 'cpu' is not available: env" in result.stderr
        assert "None | environment variable GUT_FAST_TIER: instruction tier 'no-such-tier'" in result.stdout
        assert result.stdout.split("\n")[1] == "gut_fast.kernels.backends.torch"


def test_the_environment_forces_a_plan():
    text = TIER.replace("print(cpu.tier()", "print(cpu.last_plan()")
    step = "from steps import a_step\nops.gossip_step_(*a_step('gut', columns=(5000,)))\nprint(cpu.last_plan())"
    result = script(f"{text}{step}", GUT_FAST_PLAN="block=512,ahead=1024,fetch=write,threads=1")
    assert result.stdout.split("\n")[2] == "block=512,ahead=1024,fetch=write,threads=1", result.stderr
    result = script(text, GUT_FAST_PLAN="block=512")
    assert "environment variable GUT_FAST_PLAN: expected block=COLUMNS,ahead=" in result.stdout


@pytest.fixture
def plan():
    """Forces a plan, and puts the processor's own back."""
    yield cpu.force_plan
    cpu.force_plan(None)


PLANS = [
    f"block={block},ahead={ahead},fetch={fetch},threads=8"
    for block, ahead, fetch in ((1, 0, "none"), (64, 10**6, "near"), (192, 128, "outer"), (4096, 300, "write"))
]


@pytest.mark.parametrize("graph", ["ring:16", "torus:4x5", "complete:9", "star:7", "random-regular:70:4:0"])
def test_bits_do_not_depend_on_the_plan(plan, threads, graph):
    """Nor do those of the halves."""
    for dtype, state_dtype in cpu.PAIRS:
        step = a_step("gutm", parse_topology(graph), (3, 64, 4999), dtype=dtype, state_dtype=state_dtype)
        results = []
        for count, forced in enumerate([None, *PLANS], start=1):
            threads(count)
            plan(forced)
            part, rows = copied(step), step.new_rows(arithmetic(dtype))
            ops.message(part, rows, "cpu")
            ops.combine_(part, rows, "cpu")
            results.append([*outputs(stepped(step, "cpu")), *rows, *outputs(part)])
        assert all(same_bits(result, results[0]) for result in results)


def columns(plan):
    return int(plan.split(",")[0].removeprefix("block="))


def test_the_first_steps_try_plans_and_one_stays(threads, plan):
    threads(2)
    step = a_step("gut", topology.ring(16), (6000,))
    expected, plans = copied(step), []
    for _ in range(70):
        ops.gossip_step_(*step, backend="cpu")
        plans.append(cpu.last_plan())
        plan(PLANS[-1])
        ops.gossip_step_(*expected, backend="cpu")
        plan(None)
    assert same_bits(outputs(step), outputs(expected))
    blocks, variants, rest = plans[:30], plans[30:60], plans[60:]
    assert [columns(each) for each in blocks[:6]] == [256, 128, 512, 1024, 2048, 4096]
    assert len({columns(each) for each in variants}) == 1
    assert len(set(variants[:6])) == 6
    assert blocks == blocks[:6] * 5
    assert variants == variants[:6] * 5
    assert variants[0] in blocks
    assert rest == [rest[0]] * 10
    assert rest[0] in variants
    threads(1)
    ops.gossip_step_(*step, backend="cpu")
    assert cpu.last_plan().endswith("threads=1")


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_workers_keep_to_the_cores_of_their_caller():
    """Off the one on which it runs, where they would wait for it; and its own cores stay what they were."""
    text = """
        import os, torch
        from gut_fast.kernels import ops
        from steps import a_step
        from gut_fast import topology
        from gut_fast.kernels.backends import cpu

        torch.set_num_threads(3)
        step = a_step("gut", topology.ring(16), (60_000,))
        others = set(os.listdir("/proc/self/task"))
        cores = os.sched_getaffinity(0)
        cpu.force_plan("block=256,ahead=512,fetch=near,threads=3")
        ops.gossip_step_(*step, backend="cpu")
        workers = set(os.listdir("/proc/self/task")) - others
        print(len(workers), os.sched_getaffinity(0) == cores)
        for core in sorted(cores):
            os.sched_setaffinity(0, {core})
            ops.gossip_step_(*step, backend="cpu")
        print(all(os.sched_getaffinity(int(worker)) == {core} for worker in workers))
        os.sched_setaffinity(0, cores)
        ops.gossip_step_(*step, backend="cpu")
        print(all(os.sched_getaffinity(int(worker)) <= cores for worker in workers))
    """
    result = script(textwrap.dedent(text))
    assert result.stdout.split("\n")[:3] == ["2 True", "True", "True"], result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "near",
        "block=x",
        "block=64,ahead=0,fetch=near",
        "block=0,ahead=0,fetch=near,threads=1",
        "block=64,ahead=-1,fetch=near,threads=1",
        "block=64,ahead=0,fetch=near,threads=0",
    ],
)
def test_plans_that_are_refused(plan, wrong):
    with pytest.raises(ValueError, match="block"):
        plan(wrong)


def test_tier_names(tier):
    with pytest.raises(ValueError, match=r"instruction tier 'x87' is not available here; there are: .*baseline"):
        tier("x87")
    for name in cpu._core.available_tiers():
        tier(name)
        assert cpu.tier() == name


def test_rules_beyond_the_compiled_shapes_run_in_torch():
    step = a_step(own_rule(5, 3), topology.ring(4), (5,))
    with pytest.raises(RuntimeError, match="'cpu' is not available: it is compiled for up to 3 states and 2 messages"):
        stepped(step, "cpu")
    assert same_bits(outputs(stepped(step, "auto")), outputs(stepped(step, "torch")))


def test_every_rule_of_the_table_is_compiled():
    for rule in RULES.values():
        assert cpu.unavailable("cpu", torch.float32, len(rule.states), rule.num_messages) is None


def test_many_agents_on_a_random_graph():
    step = a_step("gut", topology.random_regular(1024, 4, seed=0), (3, 70))
    for mine, other in zip(outputs(stepped(step, "cpu")), outputs(stepped(step, "torch")), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_rounded_messages_have_the_same_bits_in_any_layout_of_the_gradients():
    step = a_step("gradient_tracking", columns=(4097, 5))
    strided = step._replace(gradients=[g.t().contiguous().t() for g in step.gradients])
    assert cpu.direct_step(step) is not None
    assert cpu.direct_step(strided) is None
    results = []
    for given in (step, strided):
        results.append([torch.empty(2 * 4102, dtype=torch.bfloat16) for _ in range(6)])
        ops.message(given, results[-1], "cpu")
    assert same_bits(*results)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag's place is that of x86-64")
@pytest.mark.parametrize("columns", [1, 16, 65])
def test_what_fills_up_a_tail_does_not_become_subnormal(threads, columns):
    """Such numbers, fed back from block to block, decay and make a step several times as slow; nobody sees them."""
    underflow, math = 0x10, ctypes.CDLL(ctypes.util.find_library("m"))
    step = a_step("gut", topology.ring(6), (columns,) * 4)
    threads(1)
    run = cpu.direct_step(step)
    for _ in range(3000):
        run()
    math.feclearexcept(underflow)
    for _ in range(20):
        run()
    assert not math.fetestexcept(underflow)
