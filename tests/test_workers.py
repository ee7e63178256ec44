"""The threads that share jobs, and the engine that computes one agent per thread."""

import contextlib
import gc
import multiprocessing
import threading
import warnings
from concurrent import futures

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gut_fast as gf
from gut_fast.data import Dataset
from gut_fast.simulation import Simulator, StackedModule, stack
from gut_fast.simulation import workers as workers_module
from gut_fast.simulation.engines import AutoEngine, LoopEngine, WorkersEngine, make_engine
from gut_fast.simulation.objective import Supervised
from gut_fast.simulation.workers import Workers
from products import covering

OBJECTIVE = Supervised(cross_entropy)
NUM_AGENTS = 5
MANY = 100


def meeting(number):
    """A barrier at which so many threads wait for each other."""
    return threading.Barrier(number, timeout=30)


# Jobs and threads


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_every_job_is_done_once_and_results_are_in_the_order_of_the_jobs(threads, num_threads):
    threads(num_threads)
    done = []

    def job(index):
        done.append(index)
        return index**2

    workers = Workers(max_threads=4)
    for _ in range(3):
        done.clear()
        assert workers.run((lambda i=i: job(i)) for i in range(MANY)) == [i**2 for i in range(MANY)]
        assert sorted(done) == list(range(MANY))
    assert workers.run([]) == []


@pytest.mark.parametrize(("num_threads", "max_threads", "expected"), [(3, 8, 3), (8, 3, 3), (1, 8, 1)])
def test_jobs_run_side_by_side_in_as_many_threads_as_torch_has(threads, num_threads, max_threads, expected):
    threads(num_threads)
    together = meeting(expected)

    def job():
        together.wait()
        return threading.get_ident()

    ran_in = set(Workers(max_threads).run([job] * expected))
    assert len(ran_in) == expected
    assert threading.get_ident() in ran_in


def test_operators_of_a_job_have_one_thread_and_everyone_else_what_they_had(threads):
    threads(3)
    together = meeting(3)

    def job():
        together.wait()
        return torch.get_num_threads()

    assert Workers(3).run([job] * 3) == [1, 1, 1]
    assert torch.get_num_threads() == 3
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [3]


def threads_that_meet(workers, number):
    """The number of threads that do `number` jobs, none of which ends before all have begun."""
    together = meeting(number)
    return len(set(workers.run([lambda: together.wait() or threading.get_ident()] * number)))


def test_the_number_of_threads_may_change_between_calls(threads):
    workers = Workers(4)
    for number in (2, 4, 1, 2):
        threads(number)
        assert threads_that_meet(workers, number) == number


def test_jobs_are_made_in_order_by_one_thread_at_a_time(threads):
    """A generator that two threads advanced at once would raise ValueError."""
    threads(4)
    made = []

    def jobs():
        for index in range(MANY):
            torch.ones(100).sum()  # lets another thread come in between
            made.append(index)
            yield lambda index=index: index

    assert Workers(4).run(jobs()) == made == list(range(MANY))


def test_the_caller_finishes_alone_where_no_other_thread_gets_a_turn(threads):
    threads(2)
    workers, machine_is_free = Workers(2), threading.Event()
    busy = workers._prepare(1).submit(machine_is_free.wait)
    try:
        assert set(workers.run([threading.get_ident] * 7)) == {threading.get_ident()}
        assert set(workers.run([threading.get_ident] * 7)) == {threading.get_ident()}
    finally:
        machine_is_free.set()
    busy.result()


@pytest.mark.parametrize("error", [ZeroDivisionError("job"), SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("in_caller", [True, False], ids=["caller", "helper"])
def test_an_error_reaches_the_caller_when_no_job_runs_and_stops_the_others(threads, error, in_caller):
    threads(2)
    together, running, done, enough = meeting(2), set(), [], 10**6

    def first(index):
        together.wait()
        if (threading.current_thread() is threading.main_thread()) == in_caller:
            raise error
        later(index)

    def later(index):
        running.add(index)
        done.append(index)
        running.remove(index)

    workers = Workers(2)
    with pytest.raises(type(error)) as caught:
        workers.run((lambda i=i: first(i) if i < 2 else later(i)) for i in range(enough))
    assert caught.value is error
    assert not running
    assert 0 < len(done) < enough
    assert torch.get_num_threads() == 2
    assert workers.run([lambda: 1, lambda: 2]) == [1, 2]


def test_an_error_while_a_job_is_made_reaches_the_caller(threads):
    threads(2)

    def jobs():
        yield lambda: 1
        raise ZeroDivisionError("no more jobs")

    with pytest.raises(ZeroDivisionError, match="no more jobs"):
        Workers(2).run(jobs())


@pytest.mark.parametrize("num_threads", [2, 1, 3])
def test_an_interrupted_wait_is_made_good_at_the_next_call(threads, monkeypatch, num_threads):
    """Ctrl-C while the caller waits for a helper: the next call begins when that helper has ended."""
    threads(2)
    workers, together, go_on, log = Workers(3), meeting(2), threading.Event(), []

    def interrupted(helpers):
        monkeypatch.setattr(workers_module, "wait", patient)
        raise KeyboardInterrupt

    def patient(helpers):
        go_on.set()  # the old job ends only when somebody waits
        return futures.wait(helpers)

    def job():
        together.wait()
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(workers_module, "wait", interrupted)
        else:
            go_on.wait()
            log.append("old job has ended")

    with pytest.raises(KeyboardInterrupt):
        workers.run([job] * 2)
    assert torch.get_num_threads() == 2
    threads(num_threads)
    workers.run([lambda: log.append("new job")])
    assert log == ["old job has ended", "new job"]


def test_gradient_mode_and_autocasting_are_the_callers_in_every_thread(threads):
    threads(2)
    both = threading.Barrier(2)

    def modes():
        both.wait(timeout=30)
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert Workers(2).run([modes, modes]) == [(False, True, torch.bfloat16)] * 2
    assert Workers(2).run([modes, modes])[0][:2] == (True, False)


def threads_of_workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gut_fast")]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_end_with_the_object(threads, fails):
    threads(3)
    gc.collect()
    others = threads_of_workers()
    workers, together = Workers(3), meeting(3)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        workers.run([lambda: together.wait() and 1 // (not fails)] * 3)
    mine = [thread for thread in threads_of_workers() if thread not in others]
    assert len(mine) == 2
    del workers
    gc.collect()
    for thread in mine:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in mine)


def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    workers = Workers(2)

    def child():
        raise SystemExit([threads_that_meet(workers, 2) for _ in range(2)] != [2, 2])

    assert threads_that_meet(workers, 2) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork beside threads
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert threads_that_meet(workers, 2) == 2


# The engine


class Sometimes(nn.Module):
    """Dropout that begins at the third call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return nn.functional.dropout(inputs, 0.5 * (self.calls > 2))


MODULES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    "dropout": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)
    ),
    "dropout that begins later": lambda: nn.Sequential(nn.Linear(4, 6), Sometimes(), nn.Linear(6, 3)),
}


def make(name="linear"):
    torch.manual_seed(0)
    return MODULES[name]()


def batch(step=0, size=6):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(NUM_AGENTS, size, 4, generator=generator)
    return inputs, torch.randint(3, (NUM_AGENTS, size), generator=generator)


def trace(engine, stacked, steps=4):
    """Yields losses, gradients, buffers and random state of some steps from a fixed random state on."""
    torch.manual_seed(5)
    for step in range(steps):
        losses = engine(batch(step))
        assert not losses.requires_grad
        yield [losses, stacked.gradients.clone(), *(buffer.clone() for _, buffer in stacked.named_buffers())]
        yield [parameter.grad.clone() for parameter in stacked.parameters()] + [torch.get_rng_state()]


@pytest.mark.parametrize(("name", "num_threads"), covering(list(MODULES), [2, 1, 4, 16]))
def test_workers_equal_the_loop_on_one_thread_bit_for_bit(threads, name, num_threads):
    stacks = [stack(make(name), NUM_AGENTS, init="different", seed=1) for _ in range(2)]
    expected = list(trace(LoopEngine(stacks[0], OBJECTIVE), stacks[0]))
    threads(num_threads)
    for mine, its in zip(trace(WorkersEngine(stacks[1], OBJECTIVE), stacks[1]), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("name", ["linear", "dropout"])
def test_forward_passes_are_in_order_only_where_the_model_draws_random_numbers(threads, name):
    threads(2)
    together, agents_met = meeting(2), []

    def loss(outputs, targets):
        """A loss at which two forward passes meet, unless they run one after the other."""
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()
            agents_met.append(targets[0])
        return cross_entropy(outputs, targets)

    engine = WorkersEngine(stack(make(name), 2), OBJECTIVE)
    inputs, targets = (each[:2] for each in batch())
    engine((inputs, targets))
    engine._objective = Supervised(loss)
    together = threading.Barrier(2, timeout=30 if name == "linear" else 0.2)
    engine((inputs, targets))
    assert len(agents_met) == (2 if name == "linear" else 0)


def simulator(engine, **options):
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + 4.0 * torch.eye(3, 4)[labels]
    data = Dataset("blobs", 3, inputs, labels, inputs[:12], labels[:12])
    topology = gf.topology.ring(NUM_AGENTS)
    return Simulator(
        make("dropout"),
        topology,
        optimizer=lambda params: gf.GUT(params, lr=0.1, mu=0.5, topology=topology),
        data=data,
        parts=list(torch.arange(60).view(NUM_AGENTS, -1)),
        batch_size=4,
        engine=engine,
        **options,
    )


def test_a_simulation_with_workers_is_the_one_with_the_loop(threads):
    loop, workers = simulator("loop"), simulator("workers")
    loop.run(12, eval_every=4, progress=False)
    threads(2)
    workers.run(12, eval_every=4, progress=False)
    assert workers.engine == "workers"
    assert loop.history == workers.history
    for mine, its in zip(workers.stacked.state_dict().values(), loop.stacked.state_dict().values(), strict=True):
        assert torch.equal(mine, its)


def test_an_error_in_one_agent_leaves_the_simulation_as_it_was(threads):
    threads(2)
    calls = []

    def loss(outputs, targets):
        calls.append(None)
        if len(calls) == 18:
            raise ZeroDivisionError("agent's error")
        return cross_entropy(outputs, targets)

    failing, whole = simulator("workers", loss=loss), simulator("workers")
    with pytest.raises(ZeroDivisionError, match="agent's error"):
        failing.run(8, progress=False)
    failing.run(8, progress=False)
    whole.run(8, progress=False)
    assert torch.equal(failing.stacked.values, whole.stacked.values)


def test_workers_are_for_the_cpu(monkeypatch):
    stacked = stack(make(), NUM_AGENTS)
    monkeypatch.setattr(StackedModule, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="engine 'workers' is for the CPU, the model is on cuda; use 'vmap' or 'loop'"):
        make_engine("workers", stacked, OBJECTIVE)
    assert "workers" not in AutoEngine(stacked, OBJECTIVE).state_dict()["seconds"]


# The choice


def test_auto_considers_workers_where_there_are_threads(threads):
    assert list(AutoEngine(stack(make(), NUM_AGENTS), OBJECTIVE).state_dict()["seconds"]) == [
        "loop",
        "vmap",
    ]
    threads(2)
    stacked = stack(make(), NUM_AGENTS)
    auto = AutoEngine(stacked, OBJECTIVE)
    for step in range(18):
        assert auto.chosen is None
        auto(batch(step))
    seconds = auto.state_dict()["seconds"]
    assert {name: len(each) for name, each in seconds.items()} == {"loop": 6, "vmap": 6, "workers": 6}
    assert auto.chosen in seconds


def test_auto_chooses_between_the_loop_and_workers_where_vmap_fails(threads):
    class DependsOnValues(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs if inputs.sum() > 0 else -inputs)

    threads(2)
    auto = AutoEngine(stack(DependsOnValues(4, 3), NUM_AGENTS), OBJECTIVE)
    auto(batch())
    with pytest.warns(UserWarning, match="engine 'vmap' is left out"):
        auto(batch())
    for _ in range(11):
        auto(batch())
    assert list(auto.state_dict()["seconds"]) == ["loop", "workers"]
    assert auto.chosen in ("loop", "workers")


def test_a_choice_of_workers_is_kept_where_there_is_one_thread():
    auto = AutoEngine(stack(make(), NUM_AGENTS), OBJECTIVE)
    auto.load_state_dict({"chosen": "workers", "seconds": {"loop": [1.0], "vmap": [1.0], "workers": [1.0]}})
    assert auto.name == "workers"
    assert auto(batch()).shape == (NUM_AGENTS,)
