"""The optimizers as torch.optim.Optimizers: against the reference, over groups, schedules, compilers and threads."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import gut_fast as gf
from gut_fast import reference
from gut_fast.kernels import ops
from gut_fast.verify.lockstep import seeded
from quadratics import MATCHING, RING, make, parameters, refused, same, set_gradients, snapshot, train, values_of


def named(rule):
    return functools.partial(gf.GossipOptimizer, rule=rule)


CLASSES = {
    "dsgd": (gf.DSGD, {}),
    "gut": (gf.GUT, {"mu": 0.7}),
    "gutm": (gf.GUTm, {"momentum": 0.8, "mu": 0.6}),
    "qgt": (gf.QGT, {"momentum": 0.8, "mu": 0.6}),
    "d2": (gf.D2, {}),
    "qg_gutm": (gf.QGGUTm, {"momentum": 0.8, "mu": 0.1}),
    "dsgdm": (gf.DSGDm, {"momentum": 0.8, "nesterov": True}),
    "qg_dsgdm": (gf.QGDSGDm, {"momentum": 0.8, "nesterov": True}),
    "gradient_tracking": (gf.GradientTracking, {}),
    "momentum_tracking": (gf.MomentumTracking, {"momentum": 0.8}),
    "edm": (named("edm"), {"momentum": 0.8}),
    "extra": (named("extra"), {}),
    "awc_gut": (named("awc_gut"), {"mu": 0.7}),
    "decentlam": (named("decentlam"), {"momentum": 0.8}),
    "gasloc": (named("gasloc"), {"momentum": 0.8}),
    "k_gt": (named("k_gt"), {}),
}
"""What makes the optimizer of each rule, by its class or by name, and hyper-parameters."""

SETTINGS = [
    {"backend": "cpu"},
    {"backend": "torch", "weight_decay": 0.03},
    {"backend": "cpu", "lr": 0.02, "maximize": True, "weight_decay": 0.01},
    {"backend": "torch"},
]


def follow_reference(params, optimizer, num_steps, scheduler=None):
    """Trains with the optimizer and the reference, at the settings that a scheduler makes; returns those settings."""
    rule, used, settings_before = optimizer.rule, set(), {}
    z = [value.clone() for value in values_of(params)]
    state = [reference.zero_state(rule, value) for value in z]
    for step in range(num_steps):
        set_gradients(params, step)
        group = optimizer.param_groups[0]
        settings = {key: group[key] for key in ("lr", "weight_decay", "maximize", *rule.hyperparameters)}
        settings["drift_lr"] = max(group["lr"], group["drift_memory"] * settings_before.get("drift_lr", 0.0))
        settings_before = settings
        used.add(tuple(settings.values()))
        for k, p in enumerate(params):
            z[k], state[k] = reference.step(rule, settings, z[k], state[k], p.grad, RING.matrix())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for k, p in enumerate(params):
        torch.testing.assert_close(p.detach(), z[k], rtol=1e-10, atol=1e-10)
        for name in rule.states:
            torch.testing.assert_close(optimizer.state[p][name], state[k][name], rtol=1e-8, atol=1e-8)
    return used


@pytest.mark.parametrize("rule", gf.rules.RULES)
def test_classes_follow_the_reference(rule):
    cls, hyperparameters = CLASSES[rule]
    assert cls(parameters(), lr=0.1, topology=RING).rule is gf.rules.RULES[rule]
    for settings in SETTINGS:
        follow_reference(*make(cls, **hyperparameters, **settings), 25)


def test_by_name_by_class_and_by_a_rule_of_ones_own_agree():
    def formula(lr, mu=0.5):
        return gf.Coefficients([[1, -lr * mu, -lr]], [[0, 0, 0], [0, mu, 0]], [[1], [0]], [[1], [-1 / lr]])

    results = []
    for rule in (gf.GUT, "gut", gf.UpdateRule("my_gut", ("r",), formula)):
        if rule is gf.GUT:
            params, optimizer = make(gf.GUT, mu=0.5)
        else:
            params, optimizer = make(gf.GossipOptimizer, rule=rule, mu=0.5)
        train(params, optimizer, range(5))
        results.append(values_of(params))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_an_ordinary_training_loop_learns():
    inputs, targets = seeded(4, 32, 3, seed=1).float(), seeded(4, 32, 1, seed=2).float()
    weight = torch.nn.Parameter(torch.zeros(4, 3, 1))
    optimizer = gf.GUT([weight], lr=0.1, mu=0.9, topology=gf.topology.ring(4))

    def closure():
        optimizer.zero_grad()
        loss = ((inputs @ weight - targets) ** 2).mean(dim=(1, 2)).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(400)]
    central = torch.linalg.lstsq(inputs.flatten(0, 1), targets.flatten(0, 1)).solution
    assert losses[-1] < losses[0]
    assert gf.consensus_error([weight]) < 1e-2
    assert (weight.mean(0) - central).abs().max() < 0.05


def test_groups_have_hyperparameters_of_their_own():
    together, apart = parameters(), parameters()
    optimizer = gf.GUT([{"params": together[:1], "lr": 0.05, "mu": 0.3}, {"params": together[1:]}], 0.1, topology=RING)
    train(together, optimizer, range(10))
    alone = [gf.GUT(apart[:1], 0.05, 0.3, topology=RING), gf.GUT(apart[1:], 0.1, topology=RING)]
    for step in range(10):
        set_gradients(apart, step)
        for one in alone:
            one.step()
    assert same(values_of(together), values_of(apart))


def test_groups_may_differ_in_dtype():
    params = [*parameters(torch.float64), *parameters(torch.float32)]
    optimizer = gf.GUTm([{"params": params[:3]}, {"params": params[3:]}], 0.1, topology=RING)
    train(params, optimizer, range(5))
    assert all(optimizer.state[p]["r"].dtype == p.dtype for p in params)


def test_add_param_group():
    params = parameters()
    optimizer = gf.GUT(zip("ab", params, strict=False), 0.1, topology=RING)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    train(params[:2], optimizer, range(3))
    before = snapshot(params[:2], optimizer)
    optimizer.add_param_group({"params": [("c", params[2])], "mu": 0.1})
    assert same(snapshot(params[:2], optimizer)[:2], before[:2])
    assert optimizer.param_groups[1]["mu"] == 0.1
    train(params, optimizer, range(3, 6))
    assert optimizer.state[params[2]]["r"].abs().sum() > 0


def constant_then_exponential(optimizer):
    return [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 8]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: min(1.0, epoch / 3)),  # lr = 0 at first
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.01),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),  # ends at lr = 0
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),  # cycles the momentum too
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, constant_then_exponential(o), [3]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(constant_then_exponential(o)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    params, optimizer = make(gf.GUTm)
    assert len(follow_reference(params, optimizer, 12, SCHEDULERS[name](optimizer))) > 1


def test_reduce_on_plateau():
    params, optimizer = make()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train(params, optimizer, range(1))
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_a_schedule_that_misses_zero_by_a_rounding_is_zero():
    """LinearLR(end_factor=0) ends a rounding beside zero, on either side; the drift is divided by it."""
    params, optimizer = make()
    train(params, optimizer, range(3))
    state = [optimizer.state[p]["r"].clone() for p in params]
    for residue in (-1.85e-18, 1.85e-18):
        optimizer.param_groups[0]["lr"] = residue
        train(params, optimizer, range(3, 5))
    assert same([optimizer.state[p]["r"] for p in params], state)
    optimizer.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match=r"lr=-0.001 is outside"):
        optimizer.step()


def without_gradient(params, twins):
    params[1].grad, twins[1].grad = None, torch.zeros_like(twins[1])


def strided_views(params, twins):
    """Makes gradients views of one tensor, and one of them strided; they must not be written."""
    flat = torch.cat([p.grad.flatten() for p in params])
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    params[0].grad = params[0].grad.transpose(1, 2).contiguous().transpose(1, 2)


def sits_out(params, twins):
    for p, twin in zip(params, twins, strict=True):
        p.grad[3], twin.grad[3] = float("nan"), 0


@pytest.mark.parametrize(
    ("change", "scale"),
    [(without_gradient, None), (strided_views, None), (sits_out, torch.tensor([1.0, 1, 1, 0, 1, 1]))],
)
def test_gradients_that_count_the_same_give_the_same_step(change, scale):
    (params, optimizer), (twins, twin) = make(), make()
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        change(params, twins)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step(grad_scale=scale)
        twin.step()
        after = [p.grad for p in params]
        assert all(a is b or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def test_nan_and_inf_gradients_are_carried():
    params, optimizer = make()
    set_gradients(params, 0)
    params[1].grad[2, 3] = float("nan")
    params[1].grad[5, 0] = float("inf")
    optimizer.step()
    assert params[1][:, 3].isnan().nonzero().flatten().tolist() == [1, 2, 3]
    assert params[1][:, 1].isfinite().all()
    assert params[0].isfinite().all()


def test_the_topology_advances_with_the_steps():
    topology = gf.topology.one_peer_exponential(8)
    z = torch.nn.Parameter(seeded(8, 5, seed=1))
    expected = z.detach().clone()
    optimizer = gf.DSGD([z], 0.1, topology=topology)
    for step in range(5):
        expected = topology.matrix(step) @ expected
        optimizer.step()
    torch.testing.assert_close(z.detach(), expected)


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "backend"),
    [
        (torch.float32, torch.bfloat16, "cpu"),
        (torch.bfloat16, torch.float32, "cpu"),
        (torch.bfloat16, torch.bfloat16, "cpu"),
        (torch.float32, torch.bfloat16, "torch"),
        (torch.bfloat16, torch.bfloat16, "torch"),
        (torch.float32, torch.float16, "torch"),
        (torch.float16, torch.float32, "torch"),
        (torch.float16, torch.float16, "auto"),
    ],
    ids=str,
)
def test_half_width_numbers_are_computed_in_float32_and_rounded_once(dtype, state_dtype, backend):
    params, optimizer = make(gf.GUTm, dtype=dtype, state_dtype=state_dtype, backend=backend)
    names, settings = optimizer.rule.states, {"lr": 0.1, "momentum": 0.9, "mu": 0.8}
    for step in range(5):
        set_gradients(params, step)
        expected = []
        for p in params:
            state = {name: optimizer.state[p][name].double() for name in names}
            z, gradient = p.detach().double(), p.grad.double()
            expected.append(reference.step("gutm", settings, z, state, gradient, RING.matrix()))
        optimizer.step()
        for p, (z, state) in zip(params, expected, strict=True):
            for stored, exact in ((p.detach(), z), *((optimizer.state[p][name], state[name]) for name in names)):
                assert stored.dtype == (dtype if exact is z else state_dtype)
                rounding = 0.5 * torch.finfo(stored.dtype).eps * exact.abs()
                assert ((stored.double() - exact).abs() <= 1.01 * rounding + 1e-5).all()


def test_compiled_steps_with_groups_and_a_schedule():
    (params, optimizer), (twins, twin) = make(gf.GUTm, split=1), make(gf.GUTm, split=1)
    compiled = torch.compile(lambda: twin.step(), fullgraph=True, backend="aot_eager")
    for step in range(4):
        for values, one in ((params, optimizer), (twins, twin)):
            set_gradients(values, step)
            one.param_groups[0]["lr"] *= 0.9 if step > 1 else 1.0
        optimizer.step()
        compiled()
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def put_gradients(agents):
    for i in range(6):
        for p in agents.agent(i).parameters():
            p.grad = torch.full_like(p, i + 1.0)


def put_weights(agents):
    agents.agent(2).load_state_dict({"weight": torch.full((2, 3), 5.0), "bias": torch.zeros(2)}, assign=True)


@pytest.mark.parametrize("put", [put_gradients, put_weights])
def test_compiled_steps_take_what_was_put_into_agents(put):
    ends, module = [], torch.nn.Linear(3, 2)
    for is_compiled in (False, True):
        agents = gf.stack(module, 6)
        optimizer = gf.GUT(agents.parameters(), 0.1, 0.5, topology=RING)
        step = torch.compile(lambda one=optimizer: one.step(), backend="eager") if is_compiled else optimizer.step
        for _ in range(3):
            step()
            optimizer.zero_grad()
            put(agents)
        step()
        ends.append(values_of(agents.parameters()))
    assert same(*ends)


def test_a_time_varying_topology_says_that_it_cannot_be_compiled():
    params, optimizer = make(topology=MATCHING)
    set_gradients(params, 0)
    with refused(params, optimizer, Exception, "varies with time; leave"):
        torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")()


def test_capturable_steps_are_the_same_and_their_coefficients_stay_where_they_are():
    (params, optimizer), (twins, twin) = make(gf.GUTm, capturable=True), make(gf.GUTm, drift_memory=0.0)
    train(params, optimizer, range(3))
    train(twins, twin, range(3))
    coefficients = optimizer._prepared[0].coefficients
    before = coefficients.clone()
    for one in (optimizer, twin):
        one.param_groups[0]["lr"] = 0.05
    optimizer.update_coefficients()
    expected = optimizer.rule.coefficients(0.05, **optimizer.rule.hyperparameters).flat()
    assert coefficients.tolist() == expected != before.tolist()
    train(params, optimizer, range(3, 6))
    train(twins, twin, range(3, 6))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))
    assert optimizer._prepared[0].coefficients is coefficients
    assert optimizer.num_steps == 6


@pytest.fixture
def captured(monkeypatch):
    """Gives a function that makes CPU tensors look as if a CUDA graph of their steps were being captured."""

    def begin():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def test_a_capture_needs_capturable_and_a_static_topology(captured):
    with pytest.raises(ValueError, match="capturable=True needs a topology that does not vary with time, got random"):
        make(topology=MATCHING, capturable=True)
    _, optimizer = make()
    captured()
    with pytest.raises(RuntimeError, match=r"GUT: to capture steps .* make the optimizer with capturable=True"):
        optimizer.step()


def test_a_capture_records_no_copy_of_coefficients_or_state(captured):
    """At every replay such a copy would bring back what they were at the capture."""
    params, optimizer = make(capturable=True)
    train(params, optimizer, range(2))
    captured()
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(RuntimeError, match=r"GUT: call update_coefficients\(\) before the capture"):
        optimizer.step()
    optimizer.update_coefficients()
    optimizer.state[params[0]]["r"] = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match=r"GUT: call update_coefficients\(\) before the capture"):
        optimizer.step()
    optimizer.update_coefficients()
    assert bool((optimizer.state[params[0]]["r"] == 1).all())
    optimizer.step()
    assert optimizer.num_steps == 3


def no_detour(*arguments):
    """Stands for the dispatcher, which steps of plain tensors do not need."""
    raise AssertionError("a step of plain tensors went through the dispatcher")


def train_without_a_gradient(params, optimizer):
    train(params, optimizer, range(3))
    params[1].grad = None
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_plain_step_goes_straight_to_the_kernel(monkeypatch, backend):
    direct, detour = (make(gf.GUTm, split=1, backend=backend) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_dispatch", no_detour)
        train_without_a_gradient(*direct)
    if backend == "auto":
        monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    else:
        monkeypatch.setattr(ops, "_are_of_torch", lambda tensors: False)
    train_without_a_gradient(*detour)
    assert same(snapshot(*direct), snapshot(*detour))


def test_dispatch_modes_see_the_op():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    _, optimizer = make()
    with Watch():
        optimizer.step()
    assert any("gossip_step_" in name for name in seen)


@pytest.mark.parametrize("profiler", [torch.autograd.profiler.profile, torch.profiler.profile])
def test_hooks_run_once_and_profilers_see_the_step(profiler):
    params, optimizer = make()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    train(params, optimizer, range(2))
    assert calls == ["before", "after"] * 2
    for handle in handles:
        handle.remove()
    with profiler() as profile:
        train(params, optimizer, range(1))
    assert any(event.key == "Optimizer.step#GUT.step" for event in profile.key_averages())
    assert len(calls) == 4


def test_steps_in_threads_of_their_own():
    def run(params):
        torch.set_num_threads(1)
        train(params, gf.GUT(params, 0.1, topology=RING), range(30))
        return values_of(params)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [parameters() for _ in range(4)]))
    assert all(same(result, run(parameters())) for result in results)
