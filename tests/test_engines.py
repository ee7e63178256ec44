"""Compiled, graphed and automatic engines: on a CPU with stand-ins for CUDA, and on a GPU if there is one."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import gut_fast as gf
from gut_fast.data import Dataset, RandomCropFlip
from gut_fast.simulation import Simulator, StackedModule, cuda_graphs, stack
from gut_fast.simulation.engines import (
    ENGINES,
    AutoEngine,
    GraphedEngine,
    LoopEngine,
    StreamsEngine,
    VmapEngine,
    WorkersEngine,
    make_engine,
)
from gut_fast.simulation.objective import Supervised

trains_alone = pytest.mark.filterwarnings("ignore:.*mixes nothing over .* each agent trains alone:UserWarning")

OBJECTIVE = Supervised(cross_entropy)
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores:UserWarning")
"""torch.compile sets off warnings of torch's own."""

NUM_AGENTS = 3
CHANNELS, SIZE, CLASSES = 3, 8, 4
STEPS = 5


class CountsCalls(nn.Module):
    """A module that replaces its buffer instead of changing it in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        self.calls = self.calls + 1
        return inputs


def convolutional(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        CountsCalls(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * (SIZE // 2) ** 2, CLASSES),
    )


def spread(module, device="cpu"):
    """A stack of agents with different parameters."""
    stacked = stack(module.to(device), NUM_AGENTS)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(stacked.values.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        stacked.values += (0.03 * noise).to(stacked.values)
    return stacked


def batch(step=0, size=6, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(NUM_AGENTS, size, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return inputs.to(device, dtype), torch.randint(CLASSES, (NUM_AGENTS, size), generator=generator).to(device)


def channels_last(inputs):
    return inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def results(engine, stacked, inputs, targets):
    """Copies of the losses, gradients and buffers."""
    losses = engine((inputs, targets))
    tensors = [losses, *(parameter.grad for parameter in stacked.parameters())]
    return [tensor.clone() for tensor in (*tensors, *(buffer for _, buffer in stacked.named_buffers()))]


def error(mine, truth):
    """The largest relative error of a tensor, in the Euclidean norm."""
    pairs = zip(mine, truth, strict=True)
    return max(float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().cpu()) for a, b in pairs)


def assert_equal(mine, truth):
    assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))


@pytest.fixture
def compiler(request):
    """A compiler that traces the forward pass, or both passes with "aot_eager"; its caches are empty at the start."""
    torch.compiler.reset()
    yield partial(torch.compile, backend=getattr(request, "param", "eager"), dynamic=False)
    torch.compiler.reset()


# Compiled


@pytest.mark.parametrize("engine", [pytest.param(LoopEngine, marks=pytest.mark.slow), VmapEngine])
@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
def test_a_compiled_engine_equals_plain_autograd_over_several_steps(engine, compiler):
    stacks = [spread(convolutional().double()) for _ in range(2)]
    compiled, plain = (
        engine(stacks[0], OBJECTIVE, compiler=compiler),
        LoopEngine(stacks[1], OBJECTIVE),
    )
    assert compiled.name == f"compiled-{engine.name}"
    for step in range(3):
        inputs, targets = batch(step, dtype=torch.float64)
        mine = results(compiled, stacks[0], inputs, targets)
        assert error(mine, results(plain, stacks[1], inputs, targets)) < 1e-12


@pytest.mark.parametrize("engine", [LoopEngine, VmapEngine])
def test_compiled_dropout_differs_between_agents_and_steps_and_repeats_from_the_seed(engine, compiler):
    stacked = stack(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).double(), NUM_AGENTS)
    run = engine(stacked, OBJECTIVE, compiler=compiler)
    inputs, targets = torch.ones(NUM_AGENTS, 6, 4, dtype=torch.float64), torch.zeros(NUM_AGENTS, 6, dtype=torch.int64)
    torch.manual_seed(0)
    losses = [run((inputs, targets)) for _ in range(2)]
    assert len(set(torch.cat(losses).tolist())) == 2 * NUM_AGENTS
    torch.manual_seed(0)
    assert torch.equal(run((inputs, targets)), losses[0])


def float64_truth(inputs, targets):
    stacked = spread(convolutional().double())
    return results(LoopEngine(stacked, OBJECTIVE), stacked, inputs.double(), targets)


def in_precision(make, inputs, targets, autocast=None, dtype=torch.float32):
    """The results of an engine, after a check that losses are float32 and gradients have the parameters' dtype."""
    stacked = spread(convolutional().to(dtype))
    mine = results(make(stacked, Supervised(cross_entropy, autocast=autocast)), stacked, inputs.to(dtype), targets)
    assert mine[0].dtype == torch.float32
    assert all(parameter.grad.dtype == dtype for parameter in stacked.parameters())
    return mine


@pytest.mark.parametrize("make", [LoopEngine, VmapEngine, WorkersEngine])
def test_mixed_precision_and_channels_last_with_every_engine(make):
    """bfloat16 keeps 8 bits, so the error may be 2^-8 times the depth; the layout adds no error."""
    inputs, targets = batch()
    truth = float64_truth(inputs, targets)
    assert error(in_precision(make, inputs, targets), truth) < 1e-5
    assert error(in_precision(make, channels_last(inputs), targets), truth) < 1e-5
    for autocast, dtype in ((torch.bfloat16, torch.float32), (None, torch.bfloat16)):
        contiguous = in_precision(make, inputs, targets, autocast, dtype)
        last = in_precision(make, channels_last(inputs), targets, autocast, dtype)
        assert 1e-4 < error(contiguous, truth) < 0.15
        assert error(last, contiguous) < 0.1
        if autocast is not None:
            assert error(contiguous[:1], truth[:1]) < 2e-3  # losses in bfloat16 would be off by up to 4e-3


@pytest.mark.parametrize("engine", [LoopEngine, VmapEngine])
def test_mixed_precision_and_channels_last_compiled(engine, compiler):
    inputs, targets = batch()
    mine = in_precision(partial(engine, compiler=compiler), channels_last(inputs), targets, torch.bfloat16)
    assert 1e-4 < error(mine, float64_truth(inputs, targets)) < 0.15
    assert error(mine, in_precision(engine, channels_last(inputs), targets, torch.bfloat16)) < 1e-5


# Captured in a graph


class FakeGraph:
    """A stand-in for a CUDA graph on the CPU: a replay repeats the function and writes to the same memory."""

    def __init__(self, stacked, warm_ups=3):
        self.stacked, self.warm_ups = stacked, warm_ups
        self.captures = self.replays = 0

    def gradients(self):
        return [parameter.grad for parameter in self.stacked.parameters() if parameter.grad is not None]

    def __call__(self, function):
        self.captures += 1
        for _ in range(self.warm_ups):
            function()
        undo = cuda_graphs.remember(self.stacked)
        losses = function()
        undo()  # a capture records, and computes nothing
        memory = [losses, *self.gradients()]
        for tensor in memory:
            tensor.fill_(torch.nan)

        def replay():
            self.replays += 1
            fresh = [function(), *self.gradients()]
            for tensor, value in zip(memory, fresh, strict=True):
                tensor.copy_(value)
            for parameter in self.stacked.parameters():
                parameter.grad = None  # a graph knows nothing of Python's objects

        return losses, replay


@pytest.mark.parametrize("engine", [LoopEngine, VmapEngine])
def test_a_graphed_engine_equals_the_one_it_records_bit_for_bit(engine):
    """Warm-ups and capture leave buffers and random numbers alone, and results are read from fixed memory."""
    stacks = [spread(convolutional(dropout=0.3)) for _ in range(2)]
    graph = FakeGraph(stacks[0])
    graphed = GraphedEngine(engine(stacks[0], OBJECTIVE), stacks[0], graph)
    plain = engine(stacks[1], OBJECTIVE)
    assert graphed.name == f"graphed-{engine.name}"
    mine, truth = [], []
    for run, each, into in ((graphed, stacks[0], mine), (plain, stacks[1], truth)):
        torch.manual_seed(3)
        for step in range(STEPS):
            into.append(results(run, each, *batch(step)))
        into.append([torch.get_rng_state()])
    for a, b in zip(mine, truth, strict=True):
        assert_equal(a, b)
    assert (graph.captures, graph.replays) == (1, STEPS)


def test_losses_and_gradients_of_a_graphed_engine():
    """Losses are new tensors at every call; gradients are in the same memory and linked again."""
    stacked = spread(convolutional())
    graphed = GraphedEngine(VmapEngine(stacked, OBJECTIVE), stacked, FakeGraph(stacked))
    first = graphed(batch(0))
    kept, places = first.clone(), [parameter.grad.data_ptr() for parameter in stacked.parameters()]
    for parameter in stacked.parameters():
        parameter.grad = None
    graphed(batch(1))
    assert torch.equal(first, kept)
    assert [parameter.grad.data_ptr() for parameter in stacked.parameters()] == places


def test_a_graphed_engine_is_recorded_anew_where_the_batch_has_another_layout():
    stacked, other = spread(convolutional()), spread(convolutional())
    graph = FakeGraph(stacked)
    graphed, plain = (
        GraphedEngine(LoopEngine(stacked, OBJECTIVE), stacked, graph),
        LoopEngine(other, OBJECTIVE),
    )
    inputs, targets = batch()
    batches = [(inputs, targets), batch(1, size=4), (channels_last(inputs), targets), (channels_last(inputs), targets)]
    for each in batches:
        assert_equal(results(graphed, stacked, *each), results(plain, other, *each))
    assert graph.captures == 3


def test_a_graphed_engine_is_recorded_once_for_batches_whose_samples_share_memory():
    stacked = spread(convolutional())
    graph = FakeGraph(stacked)
    graphed = GraphedEngine(LoopEngine(stacked, OBJECTIVE), stacked, graph)
    inputs, targets = batch()
    for _ in range(3):
        graphed((inputs[:1].expand_as(inputs), targets))
    assert graph.captures == 1


class FakeStreams:
    """A stand-in for torch.cuda that logs which stream waits for which, and where agents run."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], self.Stream(self, "here")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.Stream(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.use)

    class Stream:
        def __init__(self, cuda, name="side"):
            self.cuda, self.name = cuda, name

        def wait_stream(self, other):
            self.cuda.log.append((self, "waits for", other))

    @contextlib.contextmanager
    def use(self, stream):
        self.log.append((stream, "computes", None))
        self.current, before = stream, self.current
        try:
            yield
        finally:
            self.current = before


def test_agents_are_dealt_out_to_streams_between_a_fork_and_a_join(monkeypatch):
    cuda = FakeStreams(monkeypatch)
    monkeypatch.setattr(StreamsEngine, "max_streams", 2)
    stacks = [spread(convolutional()) for _ in range(2)]
    engine = StreamsEngine(stacks[0], OBJECTIVE)
    mine = results(engine, stacks[0], *batch())
    assert_equal(mine, results(LoopEngine(stacks[1], OBJECTIVE), stacks[1], *batch()))
    here, (a, b) = cuda.current, dict.fromkeys(stream for stream, what, _ in cuda.log if what == "computes")
    assert here not in (a, b)
    assert cuda.log == [
        *((stream, "waits for", here) for stream in (a, b)),
        *((stream, "computes", None) for stream in (a, b, a)),
        *((here, "waits for", stream) for stream in (a, b)),
    ]
    cuda.log.clear()
    inputs, targets = batch()
    with pytest.raises(IndexError):  # in the second agent
        engine((inputs, targets + torch.tensor([0, CLASSES, 0])[:, None]))
    assert cuda.log[-2:] == [(here, "waits for", stream) for stream in (a, b)]


# The table and the choice


@compiles
def test_engines_that_need_a_gpu_say_so_on_a_cpu():
    stacked = spread(convolutional())
    for name in ENGINES:
        if name.startswith("graphed"):
            with pytest.raises(ValueError, match="graphed engine is for CUDA devices, the model is on cpu; use 'loop'"):
                make_engine(name, stacked, OBJECTIVE)
        else:
            assert make_engine(name, stacked, OBJECTIVE).name == name


def test_auto_chooses_among_loop_vmap_and_their_graphs_on_a_gpu(monkeypatch):
    stacked = spread(convolutional())
    monkeypatch.setattr(StackedModule, "device", torch.device("cuda"))
    auto = AutoEngine(stacked, OBJECTIVE)
    assert list(auto.state_dict()["seconds"]) == ["loop", "vmap", "graphed-loop", "graphed-vmap"]


def auto_on_a_gpu(monkeypatch, engines, seconds):
    """An automatic engine for a pretended GPU, and a log of its calls; each of its engines takes so many `seconds`."""
    stacked = spread(convolutional())
    with monkeypatch.context() as patch:
        patch.setattr(StackedModule, "device", torch.device("cuda"))
        auto = AutoEngine(stacked, OBJECTIVE)
    clock, called = [0.0], []

    def make(name):
        def engine(batch):
            called.append(name)
            clock[0] += seconds[name]
            return engines[name]()

        return engine

    monkeypatch.setattr(auto, "_make", make)
    monkeypatch.setattr(auto, "_now", lambda: clock[0])
    return auto, called


def fail():
    raise RuntimeError("vmap: not supported\nand a long explanation")


def losses():
    return torch.zeros(NUM_AGENTS)


def test_auto_keeps_the_fastest_engine_and_lets_the_others_go(monkeypatch):
    names = ["loop", "vmap", "graphed-loop", "graphed-vmap"]
    seconds = dict(zip(names, (4.0, 3.0, 1.0, 2.0), strict=True))
    auto, called = auto_on_a_gpu(monkeypatch, dict.fromkeys(names, losses), seconds)
    for _ in range(4 * 6):
        assert auto.name == "auto"
        auto(batch())
    assert called == names * 6
    assert auto.name == "graphed-loop"
    assert list(auto._engines) == ["graphed-loop"]
    auto.load_state_dict({"chosen": "graphed-vmap", "seconds": {}})
    auto(batch())
    assert called[-1] == "graphed-vmap"


def test_auto_leaves_out_what_fails_and_what_is_built_upon_it_with_one_warning(monkeypatch):
    seconds = {"loop": 4.0, "vmap": 3.0, "graphed-loop": 5.0, "graphed-vmap": 0.0}
    engines = {"loop": losses, "vmap": fail, "graphed-loop": losses, "graphed-vmap": fail}
    auto, called = auto_on_a_gpu(monkeypatch, engines, seconds)
    auto(batch())
    with pytest.warns(UserWarning, match="engine 'vmap' is left out: it failed with 'vmap: not supported'$"):
        auto(batch())
    for _ in range(11):
        auto(batch())  # any other warning would be an error
    assert "graphed-vmap" not in called
    assert auto.chosen == "loop"


# Nothing waits for the device


DATA = Dataset("images", CLASSES, *(batch(step, 40)[i].flatten(0, 1) for step in (0, 1) for i in (0, 1)))


def gut(params, **options):
    return gf.GUT(params, lr=0.05, mu=0.5, topology=gf.topology.ring(NUM_AGENTS), **options)


def simulator(engine="vmap", device="cpu", optimizer=gut, dropout=0.3, **options):
    return Simulator(
        convolutional(dropout).to(device),
        gf.topology.ring(NUM_AGENTS),
        optimizer=optimizer,
        data=DATA,
        parts=list(torch.arange(120).view(NUM_AGENTS, -1)),
        batch_size=5,
        engine=engine,
        **options,
    )


class NothingIsRead(TorchDispatchMode):
    """A mode that raises where a tensor's value is read or decides a shape, which on a GPU waits for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@trains_alone
def test_a_step_reads_no_value(engine):
    """The optimizer is one of torch's, since the library's own reads its mixing weights on the CPU."""

    def sgd(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=True)

    sim = simulator(engine, optimizer=sgd, autocast=torch.bfloat16)
    with NothingIsRead():
        for _ in range(70):  # more than one block of batches
            sim._train_step()
    assert sim.step == 70
    with NothingIsRead(), pytest.raises(AssertionError, match="waits for the device"):
        float(sim.stacked.values.sum())


def test_an_evaluation_reads_all_its_numbers_at_once():
    sim = simulator()
    with NothingIsRead():
        row = sim.evaluate()
    assert row["test_loss"] > 0
    assert isinstance(row["diverged_agents"], int)


# On a GPU


GPU_ENGINES = [name for name in ENGINES if name not in ("auto", "workers") and "compiled" not in name]
COMPILED_ENGINES = [name for name in ENGINES if "compiled" in name]


@pytest.fixture
def exact():
    """A context of float32 convolutions without TF32 that are the same from run to run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch has another name for the first, and not all of it knows that
        before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


@compiles
@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_ENGINES + COMPILED_ENGINES)
@pytest.mark.parametrize(
    ("autocast", "layout", "tolerance"),
    [(None, torch.clone, 1e-4), (None, channels_last, 1e-4), (torch.bfloat16, channels_last, 0.2)],
    ids=["float32", "channels last", "bfloat16"],
)
def test_engines_on_a_gpu_equal_plain_autograd_in_float64(name, autocast, layout, tolerance, exact):
    torch.compiler.reset()
    truth_stack, stacked = spread(convolutional().double()), spread(convolutional(), "cuda")
    truth, engine = (
        LoopEngine(truth_stack, OBJECTIVE),
        make_engine(name, stacked, Supervised(cross_entropy, autocast=autocast)),
    )
    for step in range(3):
        inputs, targets = batch(step)
        expected = results(truth, truth_stack, inputs.double(), targets)
        mine = results(engine, stacked, layout(inputs.cuda()), targets.cuda())
        assert error(mine, expected) < tolerance
        if autocast is not None:
            assert error(mine[:1], expected[:1]) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "plain"), [("graphed-loop", "loop"), ("graphed-vmap", "vmap")])
def test_graphs_on_a_gpu_equal_what_they_record_dropout_included(name, plain, exact):
    runs = []
    for each in (name, plain):
        sim = simulator(each, "cuda")
        sim.run(8, progress=False)
        runs.append([*sim.stacked.state_dict().values(), sim._random_state["cuda"]])
    assert error(runs[0][:-1], runs[1][:-1]) < 1e-5
    assert torch.equal(runs[0][-1], runs[1][-1])


@compiles
@pytest.mark.gpu
@pytest.mark.parametrize("name", [*GPU_ENGINES, "compiled-vmap", "auto"])
def test_a_run_on_a_gpu_repeats_and_resumes_bit_for_bit(name, exact, tmp_path):
    def run(sim, steps):
        sim.run(steps, milestones=(), progress=False, checkpoint=tmp_path / "run.checkpoint")
        return [*sim.stacked.state_dict().values(), sim._random_state["cuda"]]

    options = {"augment": RandomCropFlip(1), "autocast": torch.bfloat16, "channels_last": True}
    whole = simulator(name, "cuda", **options)
    half = run(whole, 30)
    resumed = simulator(name, "cuda", **options)
    resumed.load_checkpoint(tmp_path / "run.checkpoint")
    if name != "auto":
        assert_equal(run(simulator(name, "cuda", **options), 30), half)
    assert whole.engine in GPU_ENGINES + COMPILED_ENGINES
    first = run(whole, 36)
    assert_equal(run(resumed, 36), first)
    assert resumed.engine == whole.engine


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_ENGINES)
def test_a_step_on_a_gpu_never_waits_for_it(name):
    sim = simulator(name, "cuda", augment=RandomCropFlip(1))
    for _ in range(3):
        sim._train_step()
    with cuda_graphs._synchronisation_is_an_error():
        for _ in range(130):  # across blocks of batches
            sim._train_step()


@pytest.mark.gpu
def test_the_same_batches_on_both_devices():
    pairs = [simulator(device=device, augment=RandomCropFlip(2)).batches for device in ("cpu", "cuda")]
    for step in (0, 1, 63, 64, 100):
        (a, s), (b, t) = (batches(step) for batches in pairs)
        assert torch.equal(a, b.cpu())
        assert torch.equal(s, t.cpu())


class Waits(nn.Module):
    """A module that reads a value, which no graph can record."""

    def forward(self, inputs):
        return inputs * (1.0 + 0.0 * inputs.detach().sum().item())


@pytest.mark.gpu
def test_what_cannot_be_captured_is_found_out_before_it_does_harm():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), Waits(), nn.Linear(CHANNELS * SIZE**2, CLASSES)).cuda()
    inputs, targets = (each.cuda() for each in batch())
    with pytest.raises(RuntimeError, match="synchronizing"):
        make_engine("graphed-loop", stack(module, NUM_AGENTS), OBJECTIVE)(inputs, targets)
    auto = AutoEngine(stack(module, NUM_AGENTS), OBJECTIVE)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(20):
            assert auto((inputs, targets)).isfinite().all()
    assert ["left out" in str(each.message) for each in warned] == [True, True]
    assert auto.chosen == "loop"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
