"""The optimizers as torch.optim.Optimizers: against the reference, over groups, schedulers, state, and bad input."""

import collections
import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import gut_fast as gf
import ranks
from gut_fast import reference
from gut_fast.kernels import ops
from gut_fast.kernels.backends import cpu
from gut_fast.verify.lockstep import seeded

RING = gf.topology.ring(6)
SHAPES = ((3, 5), (5,), ())

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
}


def parameters(dtype=torch.float64, num_agents=6, shapes=SHAPES):
    return [torch.nn.Parameter(seeded(num_agents, *shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]


def set_gradients(params, step):
    """Sets the gradients of quadratics of each agent's own, with noise of this step."""
    for k, p in enumerate(params):
        p.grad = (p.detach() - seeded(*p.shape, seed=50 + k).to(p)) + 0.1 * seeded(*p.shape, seed=1000 * step + k).to(p)


def train(optimizer, params, steps, scheduler=None):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values_of(params):
    return [p.detach() for p in params]


def snapshot(optimizer, params):
    """Copies everything that a failed call must leave as it was."""
    state = {k: {n: t.clone() for n, t in optimizer.state[p].items()} for k, p in enumerate(params)}
    groups = [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]
    return [p.detach().clone() for p in params], state, groups, optimizer.num_steps


def same(a, b):
    """Returns whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


SETTINGS = [
    ("cpu", 0.1, {}),
    ("torch", 0.1, {"weight_decay": 0.03}),
    ("cpu", 0.02, {"maximize": True, "weight_decay": 0.01}),
    ("torch", 0.1, {}),
]
"""(backend, learning rate, options)."""


def follow_reference(optimizer, params, num_steps, scheduler=None):
    """Trains with the optimizer and the reference, at the settings that a scheduler makes; returns those settings."""
    rule, rates = optimizer.rule, set()
    z = [value.clone() for value in values_of(params)]
    state = [reference.zero_state(rule, value) for value in z]
    for step in range(num_steps):
        set_gradients(params, step)
        group = optimizer.param_groups[0]
        settings = {key: group[key] for key in ("lr", "weight_decay", "maximize", *rule.hyperparameters)}
        rates.add(tuple(settings.values()))
        for k, p in enumerate(params):
            z[k], state[k] = reference.step(rule, settings, z[k], state[k], p.grad, RING.matrix())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for k, p in enumerate(params):
        torch.testing.assert_close(p.detach(), z[k], rtol=1e-10, atol=1e-10)
        for name in rule.states:
            torch.testing.assert_close(optimizer.state[p][name], state[k][name], rtol=1e-8, atol=1e-8)
    return rates


@pytest.mark.parametrize("rule", gf.rules.RULES)
def test_classes_follow_the_reference(rule):
    cls, hyperparameters = CLASSES[rule]
    for backend, lr, options in SETTINGS:
        params = parameters()
        optimizer = cls(params, lr=lr, topology=RING, backend=backend, **hyperparameters, **options)
        follow_reference(optimizer, params, 25)


def test_every_rule_has_a_class():
    assert CLASSES.keys() == gf.rules.RULES.keys()
    for rule, (cls, _) in CLASSES.items():
        assert cls(parameters(), lr=0.1, topology=RING).rule is gf.rules.RULES[rule]


def test_by_name_by_class_and_by_a_rule_of_ones_own_agree():
    def formula(lr, mu=0.5):
        return gf.Coefficients([[1, -lr * mu, -lr]], [[0, 0, 0], [0, mu, 0]], [[1], [0]], [[1], [-1 / lr]])

    own = gf.UpdateRule("my_gut", ("r",), formula)
    results = []
    for build in (
        lambda p: gf.GUT(p, 0.1, 0.5, topology=RING),
        lambda p: gf.GossipOptimizer(p, "gut", lr=0.1, topology=RING, mu=0.5),
        lambda p: gf.GossipOptimizer(p, own, lr=0.1, topology=RING),
    ):
        params = parameters()
        train(build(params), params, range(5))
        results.append(values_of(params))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_an_ordinary_training_loop_learns():
    topology = gf.topology.ring(4)
    inputs, targets = seeded(4, 32, 3, seed=1).float(), seeded(4, 32, 1, seed=2).float()
    weight = torch.nn.Parameter(torch.zeros(4, 3, 1))
    optimizer = gf.GUT([weight], lr=0.1, mu=0.9, topology=topology)
    for _ in range(400):
        optimizer.zero_grad()
        loss = ((inputs @ weight - targets) ** 2).mean(dim=(1, 2)).sum()
        loss.backward()
        optimizer.step()
    central = torch.linalg.lstsq(inputs.flatten(0, 1), targets.flatten(0, 1)).solution
    assert gf.consensus_error([weight]) < 1e-2
    assert (weight.mean(0) - central).abs().max() < 0.05


def test_groups_have_hyperparameters_of_their_own():
    together, apart = parameters(), parameters()
    optimizer = gf.GUT([{"params": together[:1], "lr": 0.05, "mu": 0.3}, {"params": together[1:]}], 0.1, topology=RING)
    train(optimizer, together, range(10))
    alone = [gf.GUT(apart[:1], 0.05, 0.3, topology=RING), gf.GUT(apart[1:], 0.1, topology=RING)]
    for step in range(10):
        set_gradients(apart, step)
        for one in alone:
            one.step()
    assert same(values_of(together), values_of(apart))


def test_groups_may_differ_in_dtype():
    params = [*parameters(torch.float64), *parameters(torch.float32)]
    optimizer = gf.GUTm([{"params": params[:3]}, {"params": params[3:]}], 0.1, topology=RING)
    train(optimizer, params, range(5))
    assert all(optimizer.state[p]["r"].dtype == p.dtype for p in params)


def test_add_param_group():
    params = parameters()
    optimizer = gf.GUT(params[:2], 0.1, topology=RING)
    train(optimizer, params[:2], range(3))
    before = snapshot(optimizer, params[:2])
    optimizer.add_param_group({"params": params[2:], "mu": 0.1})
    assert same(snapshot(optimizer, params[:2])[:2], before[:2])
    assert optimizer.param_groups[1]["mu"] == 0.1
    train(optimizer, params, range(3, 6))
    assert optimizer.state[params[2]]["r"].abs().sum() > 0


def test_named_parameters():
    params = parameters()
    optimizer = gf.GUT(zip("abc", params, strict=True), 0.1, topology=RING)
    train(optimizer, params, range(2))
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]


def test_closure():
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 10


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
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    params = parameters()
    optimizer = gf.GUTm(params, lr=0.1, topology=RING)
    assert len(follow_reference(optimizer, params, 12, SCHEDULERS[name](optimizer))) > 1


def test_reduce_on_plateau():
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train(optimizer, params, range(1))
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.1


def build(params, topology):
    return gf.GUTm(params, lr=0.1, momentum=0.7, mu=0.5, topology=topology)


TOPOLOGIES = {"static": RING, "time-varying": gf.topology.random_matching(6, seed=3)}
BFLOAT16 = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
FLOAT16 = [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float16, torch.float16)]
"""Dtypes of parameters and state."""


def restored(optimizer, params, scheduler, make):
    """Makes another optimizer and scheduler, which load the state of these from a file."""
    file = io.BytesIO()
    torch.save([params, optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    values, state, schedule = torch.load(file, weights_only=True)
    twins = [torch.nn.Parameter(value.detach().clone()) for value in values]
    twin = make(twins)
    twin_scheduler = lr_scheduler.ExponentialLR(twin, 0.95)
    twin.load_state_dict(state)
    twin_scheduler.load_state_dict(schedule)
    return twin, twins, twin_scheduler


COPIES = {
    "state_dict": restored,
    "pickle": lambda *parts: pickle.loads(pickle.dumps(parts[:3])),
    "deepcopy": lambda *parts: copy.deepcopy(parts[:3]),
}
PAIRS_OF_COPIES = [
    *((how, torch.float32, torch.float32) for how in COPIES),
    *((how, *dtypes) for how, dtypes in zip([*COPIES] * 2, BFLOAT16 + FLOAT16, strict=True)),
    *((how, *dtypes) for how, dtypes in zip(["pickle", "deepcopy", "state_dict"], BFLOAT16, strict=True)),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("how", "dtype", "state_dtype"), PAIRS_OF_COPIES, ids=str)
def test_copies_continue_bit_for_bit(how, dtype, state_dtype, topology):
    def make(params):
        options = {"topology": TOPOLOGIES[topology], "state_dtype": state_dtype}
        return gf.GUTm([{"params": params[:1]}, {"params": params[1:]}], 0.1, 0.7, 0.5, **options)

    params = parameters(dtype)
    optimizer = make(params)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.95)
    train(optimizer, params, range(9), scheduler)
    twin, twins, twin_scheduler = COPIES[how](optimizer, params, scheduler, make)
    assert twin.num_steps == 9
    assert same(snapshot(optimizer, params), snapshot(twin, twins))
    assert all(twin.state[p][name].dtype == state_dtype for p in twins for name in ("m", "r"))
    assert repr(twin) == repr(optimizer)
    train(optimizer, params, range(9, 20), scheduler)
    train(twin, twins, range(9, 20), twin_scheduler)
    assert same(snapshot(optimizer, params), snapshot(twin, twins))


def continued(rank, size, values, state):
    """Goes on from a state in another process, and returns the parameters after twelve steps."""
    params = [torch.nn.Parameter(value) for value in values]
    optimizer = build(params, TOPOLOGIES["time-varying"])
    optimizer.load_state_dict(state)
    train(optimizer, params, range(5, 12))
    return values_of(params)


def test_another_process_continues_bit_for_bit():
    params = parameters(torch.float32)
    optimizer = build(params, TOPOLOGIES["time-varying"])
    train(optimizer, params, range(5))
    saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(5, 12))
    assert same(ranks.run(1, continued, *saved), [values_of(params)])


def test_repr():
    text = repr(gf.GUT(parameters(), 0.1, topology=RING))
    assert "GUT (" in text
    assert "rule: gut, topology: ring(6), backend: auto" in text
    assert "mu: 0.9" in text


def test_none_gradients_count_as_zero_and_still_mix():
    nothing, zero = parameters(), parameters()
    optimizers = [gf.GUT(params, 0.1, topology=RING) for params in (nothing, zero)]
    for step in range(3):
        for params in (nothing, zero):
            set_gradients(params, step)
        nothing[1].grad = None
        zero[1].grad = torch.zeros_like(zero[1])
        for optimizer in optimizers:
            optimizer.step()
    assert same(values_of(nothing), values_of(zero))


def test_gradients_may_be_views_or_strided():
    separate, views = parameters(), parameters()
    optimizers = [gf.GUT(params, 0.1, topology=RING) for params in (separate, views)]
    flat = torch.zeros(sum(p.numel() for p in views), dtype=torch.float64)
    set_gradients(separate, 0)
    offset = 0
    for p, q in zip(separate, views, strict=True):
        q.grad = flat[offset : offset + q.numel()].view_as(q).copy_(p.grad)
        offset += q.numel()
    views[0].grad = views[0].grad.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = [p.grad.clone() for p in views]
    for optimizer in optimizers:
        optimizer.step()
    assert same(values_of(separate), values_of(views))
    assert same([p.grad for p in views], gradients)  # never overwritten


def test_nan_and_inf_gradients_are_carried():
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    set_gradients(params, 0)
    params[1].grad[2, 3] = float("nan")
    params[1].grad[5, 0] = float("inf")
    optimizer.step()
    assert params[1][:, 3].isnan().nonzero().flatten().tolist() == [1, 2, 3]
    assert params[1][:, 1].isfinite().all()
    assert params[0].isfinite().all()


def test_grad_scale_lets_an_agent_sit_out():
    params, twin = parameters(), parameters()
    optimizers = [gf.GUT(p, 0.1, topology=RING) for p in (params, twin)]
    set_gradients(params, 0)
    set_gradients(twin, 0)
    for p in params:
        p.grad[3] = float("nan")
    for p in twin:
        p.grad[3] = 0
    optimizers[0].step(grad_scale=torch.tensor([1.0, 1, 1, 0, 1, 1]))
    optimizers[1].step()
    assert same(values_of(params), values_of(twin))


def test_the_topology_advances_with_the_steps():
    topology = gf.topology.one_peer_exponential(8)
    z = torch.nn.Parameter(seeded(8, 5, seed=1))
    expected = z.detach().clone()
    optimizer = gf.DSGD([z], 0.1, topology=topology)
    for step in range(5):
        expected = topology.matrix(step) @ expected
        optimizer.step()
    torch.testing.assert_close(z.detach(), expected)


def test_compiled_steps_with_groups_and_a_schedule():
    params, twin = parameters(), parameters()
    optimizer, other = (
        gf.GUTm([{"params": values[:1], "lr": 0.05}, {"params": values[1:]}], 0.1, topology=RING)
        for values in (params, twin)
    )
    compiled = torch.compile(lambda: other.step(), fullgraph=True, backend="aot_eager")
    for step in range(4):
        for one, values in ((optimizer, params), (other, twin)):
            set_gradients(values, step)
            for group in one.param_groups:
                group["lr"] *= 0.9 if step > 1 else 1.0
        optimizer.step()
        compiled()
    assert same(snapshot(optimizer, params), snapshot(other, twin))


def test_a_time_varying_topology_says_that_it_cannot_be_compiled():
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=gf.topology.random_matching(6, seed=0))
    set_gradients(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(Exception, match="varies with time; leave"):
        torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")()
    assert same(snapshot(optimizer, params), before)


def test_a_schedule_that_misses_zero_by_a_rounding_is_zero():
    """LinearLR(end_factor=0) ends a rounding beside zero, on either side; the drift is divided by it."""
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    train(optimizer, params, range(3))
    state = [optimizer.state[p]["r"].clone() for p in params]
    for residue in (-1.85e-18, 1.85e-18):
        optimizer.param_groups[0]["lr"] = residue
        train(optimizer, params, range(3, 5))
    assert same([optimizer.state[p]["r"] for p in params], state)
    optimizer.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match=r"lr=-0.001 is outside"):
        optimizer.step()


def test_a_learning_rate_too_small_for_the_dtype_changes_nothing():
    params = parameters(torch.float16)
    optimizer = gf.GUT([{"params": params[:1]}, {"params": params[1:]}], 1e-38, topology=RING)
    train(optimizer, params, range(1))
    set_gradients(params, 1)
    optimizer.param_groups[1]["lr"] = 1e-39
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"lr=1e-39 makes a coefficient of 1e\+39, more than torch.float32 holds"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


def test_state_that_was_assigned_or_reset_is_followed():
    params, twin = parameters(), parameters()
    optimizer, other = gf.GUT(params, 0.1, topology=RING), gf.GUT(twin, 0.1, topology=RING)
    train(optimizer, params, range(3))
    for p, q in zip(params, twin, strict=True):
        q.data.copy_(p.data)
    optimizer.state = collections.defaultdict(dict)  # the usual reset
    train(optimizer, params, range(3, 5))
    train(other, twin, range(3, 5))
    assert same(snapshot(optimizer, params)[:2], snapshot(other, twin)[:2])
    for one, values in ((optimizer, params), (other, twin)):
        one.state[values[0]]["r"] = torch.full_like(values[0], 0.5)
    optimizer.state[params[1]]["r"].fill_(2.0)
    other.state[twin[1]]["r"].fill_(2.0)
    train(optimizer, params, range(5, 6))
    train(other, twin, range(5, 6))
    assert same(snapshot(optimizer, params)[:2], snapshot(other, twin)[:2])
    assert not (optimizer.state[params[0]]["r"] == 0.5).all()


def test_a_shallow_copy_leaves_the_original_alone():
    params, twin = parameters(), parameters()
    optimizer, other = gf.GUT(params, 0.1, topology=RING), gf.GUT(twin, 0.1, topology=RING)
    train(optimizer, params, range(2))
    copy.copy(optimizer)
    train(optimizer, params, range(2, 4))
    train(other, twin, range(4))
    assert same(snapshot(optimizer, params), snapshot(other, twin))


BAD_HYPERPARAMETERS = [
    ({"lr": float("nan")}, ValueError, r"lr=nan is outside \[0, inf\)"),
    ({"lr": -0.1}, ValueError, r"lr=-0.1 is outside \[0, inf\)"),
    ({"lr": "fast"}, TypeError, "lr must be a number, got str"),
    ({"lr": torch.tensor(0.2)}, TypeError, "lr must be a number, got Tensor"),
    ({"momentum": -0.1}, ValueError, r"momentum=-0.1 is outside \[0, 1\)"),
    ({"momentum": 1.0}, ValueError, r"outside \[0, 1\)"),
    ({"mu": 1.1}, ValueError, r"mu=1.1 is outside \[0, 1\]"),
    ({"mu": float("nan")}, ValueError, "outside"),
    ({"mu": None}, TypeError, "mu must be a number"),
    ({"weight_decay": -1.0}, ValueError, r"weight_decay=-1.0 is outside \[0, inf\)"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay=inf is outside"),
    ({"maximize": 1}, TypeError, "maximize must be True or False"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_HYPERPARAMETERS, ids=str)
def test_bad_hyperparameters_change_nothing(bad, error, message):
    params = parameters()
    with pytest.raises(error, match=message):
        gf.GUTm(params, topology=RING, **{"lr": 0.1, **bad})
    optimizer = gf.GUTm([{"params": params[:1]}, {"params": params[1:]}], 0.1, topology=RING)
    train(optimizer, params, range(2))
    set_gradients(params, 2)
    before = snapshot(optimizer, params)
    kept = {key: optimizer.param_groups[1][key] for key in bad}
    optimizer.param_groups[1].update(bad)
    with pytest.raises(error, match=message):
        optimizer.step()
    optimizer.param_groups[1].update(kept)
    assert same(snapshot(optimizer, params), before)


BAD_PARAMETERS = {
    "leading dimension": (lambda: [torch.zeros(5, 3)], ValueError, r"shape \(5, 3\), expected \(6, ...\).*stack"),
    "no dimension": (lambda: [torch.tensor(1.0)], ValueError, r"expected \(6, ...\)"),
    "integers": (lambda: [torch.zeros(6, 3, dtype=torch.int64)], TypeError, "only floating-point ones"),
    "complex": (lambda: [torch.zeros(6, dtype=torch.complex64)], TypeError, "only floating-point ones"),
    "mixed dtypes": (lambda: [torch.zeros(6), torch.zeros(6).double()], TypeError, "parameter 1 is torch.float64"),
    "mixed devices": (lambda: [torch.zeros(6), torch.zeros(6, device="meta")], TypeError, "on meta, but parameter 0"),
    "strides": (lambda: [torch.zeros(3, 6).T], ValueError, "parameter 0 is not contiguous"),
    "sparse": (lambda: [torch.zeros(6, 3).to_sparse()], TypeError, "only dense parameters"),
    "no tensor": (lambda: [{"params": [1.0]}], TypeError, "parameters must be tensors, got"),
    "nothing": (list, ValueError, "empty parameter list"),
    "a set": (lambda: [{"params": {torch.zeros(6)}}], TypeError, "must have an order, got a set"),
    "another rule's": (lambda: [{"params": parameters(), "momentum": 0.5}], ValueError, "no hyper-parameter momentum"),
    "twice": (lambda: parameters()[:1] * 2, ValueError, "stands more than once"),
}


NO_GROUP = ("nothing", "no tensor", "a set", "another rule's")
"""The cases that are groups themselves, or that are right in a group."""


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_bad_parameters_change_nothing(case):
    make, error, message = BAD_PARAMETERS[case]
    with pytest.raises(error, match=message):
        gf.GUT(make(), 0.1, topology=RING)
    if case in NO_GROUP:
        return
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": make()})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert same(snapshot(optimizer, params), before)
    train(optimizer, params, range(2))


@pytest.mark.parametrize("scale", [torch.ones(5), torch.ones(6, 1), torch.ones(6) * 1j, [1.0] * 6], ids=str)
def test_bad_grad_scale(scale):
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"grad_scale must be a real tensor \[6\], got"):
        optimizer.step(grad_scale=scale)
    assert same(snapshot(optimizer, params), before)


def test_bad_topology_rule_and_backend():
    with pytest.raises(TypeError, match=r"must be a gut_fast\.topology\.Topology, got Tensor"):
        gf.GUT(parameters(), 0.1, topology=torch.eye(6))
    with pytest.raises(ValueError, match="unknown rule 'sgd'; known are dsgd, gut"):
        gf.GossipOptimizer(parameters(), "sgd", lr=0.1, topology=RING)
    with pytest.raises(ValueError, match="rule 'dsgd' has no hyper-parameter 'mu'"):
        gf.GossipOptimizer(parameters(), "dsgd", lr=0.1, mu=0.5, topology=RING)
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        gf.GUT(parameters(), 0.1, topology=RING, backend="tpu")
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: it serves .*; not torch.float16 with"):
        gf.GUT(parameters(torch.float16), 0.1, topology=RING, backend="cpu")


def damaged(state, /, **changes):
    state = copy.deepcopy(state)
    for key, change in changes.items():
        state[key] = change(state[key])
    return state


def test_loading_what_does_not_fit_changes_nothing():
    params = parameters()
    optimizer = build(params, TOPOLOGIES["time-varying"])
    train(optimizer, params, range(3))
    good = optimizer.state_dict()
    other_agents = build(parameters(num_agents=8), gf.topology.ring(8)).state_dict()
    without_step = {key: value for key, value in good.items() if key != "step"}
    without_mu = [{key: value for key, value in good["param_groups"][0].items() if key != "mu"}]
    cases = [
        ({}, ValueError, "not that of an optimizer"),
        (damaged(good, step=lambda _: "abc"), ValueError, "step count must be an integer >= 0, got 'abc'"),
        (damaged(good, step=lambda _: -3), ValueError, "step count must be an integer >= 0, got -3"),
        (damaged(good, param_groups=lambda _: without_mu), ValueError, "a parameter group of the state has no mu"),
        (damaged(good, state=lambda state: {**state, 1: [1.0]}), ValueError, "state of parameter 1"),
        (without_step, RuntimeError, r"no step count, and random_matching\(6, .*varies with time"),
        (damaged(good, rule=lambda _: "gut"), ValueError, "the state is of rule 'gut', expected 'gutm'"),
        (other_agents, ValueError, r"state of parameter 0 is .*\(8, 3, 5\).*expected .*\(6, 3, 5\)"),
        (damaged(good, param_groups=lambda groups: groups * 2), ValueError, "groups have other sizes"),
        (damaged(good, param_groups=lambda groups: [{**groups[0], "mu": 3.0}]), ValueError, "mu=3.0 is outside"),
        (damaged(good, state=lambda state: {**state, 1: {"m": state[1]["m"]}}), ValueError, "state of parameter 1"),
    ]
    before = snapshot(optimizer, params)
    for state, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(state)
        assert same(snapshot(optimizer, params), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: gf.GUT(p, 0.1, 0.9, topology=gf.topology.torus(4, 4)), r"GUT: mu=0.9 is unstable on torus\(4, 4\)"),
        (lambda p: gf.QGGUTm(p, 0.1, 0.95, 0.1, topology=gf.topology.ring(16)), "must stay below 1"),
        (lambda p: gf.GUTm(p, 0.1, topology=gf.topology.torus(4, 4)), r"GUTm: .*unstable on torus\(4, 4\).*use "),
    ],
)
def test_unstable_hyperparameters_warn_at_the_callers_line(make, message):
    params = parameters(num_agents=16)
    with pytest.warns(UserWarning, match=message) as caught:
        make(params)
    assert caught[0].filename == __file__


def test_stable_hyperparameters_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in gf.rules.RULES:
            gf.GossipOptimizer(parameters(num_agents=16), rule, lr=0.1, topology=gf.topology.ring(16))
        gf.GUT(parameters(num_agents=16), 0.1, 0.3, topology=gf.topology.torus(4, 4))
        gf.GUT(parameters(num_agents=16), 0.1, 0.9, topology=gf.topology.torus(4, 4).lazy(0.5))


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "backend"),
    [(*pair, "cpu") for pair in BFLOAT16] + [(*pair, "torch") for pair in BFLOAT16 + FLOAT16],
    ids=str,
)
def test_half_width_numbers_are_computed_in_float32_and_rounded_once(dtype, state_dtype, backend):
    params = parameters(dtype)
    optimizer = gf.GUTm(params, lr=0.1, topology=RING, state_dtype=state_dtype, backend=backend)
    names = optimizer.rule.states
    for step in range(5):
        set_gradients(params, step)
        expected = []
        for p in params:
            state = {name: optimizer.state[p][name].double() for name in names}
            settings = {"lr": 0.1, "momentum": 0.9, "mu": 0.8}
            expected.append(
                reference.step("gutm", settings, p.detach().double(), state, p.grad.double(), RING.matrix())
            )
        optimizer.step()
        for p, (z, state) in zip(params, expected, strict=True):
            for stored, exact in ((p.detach(), z), *((optimizer.state[p][name], state[name]) for name in names)):
                assert stored.dtype == (dtype if exact is z else state_dtype)
                rounding = 0.5 * torch.finfo(stored.dtype).eps * exact.abs()
                assert ((stored.double() - exact).abs() <= 1.01 * rounding + 1e-5).all()


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_dtypes_that_do_not_go_together(dtype, state_dtype):
    with pytest.raises(TypeError, match=f"GUT: the state is {state_dtype}; for parameters of {dtype} it can be"):
        gf.GUT(parameters(dtype), 0.1, topology=RING, state_dtype=state_dtype)


def test_capturable_steps_are_the_same_and_their_coefficients_stay_where_they_are():
    params, twin = parameters(), parameters()
    one, other = gf.GUTm(params, 0.1, topology=RING, capturable=True), gf.GUTm(twin, 0.1, topology=RING)
    train(one, params, range(3))
    train(other, twin, range(3))
    coefficients = one._prepared[0].coefficients
    before = coefficients.clone()
    for optimizer in (one, other):
        optimizer.param_groups[0]["lr"] = 0.05
    one.update_coefficients()
    expected = one.rule.coefficients(0.05, **one.rule.hyperparameters).flat()
    assert coefficients.tolist() == expected != before.tolist()
    train(one, params, range(3, 6))
    train(other, twin, range(3, 6))
    assert same(snapshot(one, params), snapshot(other, twin))
    assert one._prepared[0].coefficients is coefficients
    assert one.num_steps == 6


@pytest.fixture
def captured(monkeypatch):
    """Gives a function that makes CPU tensors look as if a CUDA graph of their steps were being captured."""

    def begin():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def test_a_capture_needs_capturable(captured):
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    captured()
    with pytest.raises(RuntimeError, match=r"GUT: to capture steps .* make the optimizer with capturable=True"):
        optimizer.step()


def test_a_capture_records_no_copy_of_coefficients_or_state(captured):
    """At every replay such a copy would bring back what they were at the capture."""
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING, capturable=True)
    train(optimizer, params, range(2))
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


def test_parameters_on_another_device_than_at_the_start():
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(p.to("meta")) for p in params]
    with pytest.raises(TypeError, match="GUT: the parameters are now on meta; make the optimizer after the move"):
        optimizer.step()


def test_capturable_needs_a_static_topology():
    with pytest.raises(ValueError, match="capturable=True needs a topology that does not vary with time, got one_peer"):
        gf.GUT(parameters(num_agents=8), 0.1, topology=gf.topology.one_peer_exponential(8), capturable=True)


def no_detour(*arguments):
    """Stands for the dispatcher, which steps of plain tensors do not need."""
    raise AssertionError("a step of plain tensors went through the dispatcher")


def test_a_plain_step_goes_straight_to_the_kernel(monkeypatch):
    params, twin = parameters(), parameters()
    direct, detour = (gf.GUTm([{"params": p[:1]}, {"params": p[1:]}], 0.1, topology=RING) for p in (params, twin))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_dispatch", no_detour)
        train(direct, params, range(3))
        params[1].grad = None
        direct.step()
    monkeypatch.setattr(cpu, "_reader", None)  # as with PyTorch before 2.10
    train(detour, twin, range(3))
    twin[1].grad = None
    detour.step()
    assert same(snapshot(direct, params), snapshot(detour, twin))


def test_other_backends_take_plain_tensors_without_the_dispatcher(monkeypatch):
    params, twin = parameters(), parameters()
    direct, detour = (gf.GUTm(p, 0.1, topology=RING, backend="torch") for p in (params, twin))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_direct", lambda step, backend: None)
        train(detour, twin, range(3))
    monkeypatch.setattr(ops, "_dispatch", no_detour)
    train(direct, params, range(3))
    assert same(snapshot(direct, params), snapshot(detour, twin))


def strided_gradient(optimizer, params):
    params[0].grad = params[0].grad.transpose(1, 2).contiguous().transpose(1, 2)


def assign_and_delete_state(optimizer, params):
    optimizer.state[params[0]] = {"m": params[0].detach() + 1}
    optimizer.state[params[1]] = {"r": params[1].detach() - 1}


def add_a_group(optimizer, params):
    params.append(torch.nn.Parameter(seeded(6, 2, seed=8)))
    params[-1].grad = seeded(6, 2, seed=9)
    optimizer.add_param_group({"params": params[-1:], "mu": 0.1})


def clone_everything(optimizer, params):
    for p in params:
        p.data, p.grad = p.data.clone(), p.grad.clone()


CHANGES = {
    "data replaced": lambda _, params: setattr(params[0], "data", seeded(*params[0].shape, seed=77)),
    "a strided gradient": strided_gradient,
    "state reset": lambda optimizer, _: setattr(optimizer, "state", collections.defaultdict(dict)),
    "state assigned and deleted": assign_and_delete_state,
    "its own state loaded": lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a group added": add_a_group,
    "another rate": lambda optimizer, _: optimizer.param_groups[0].update(lr=0.03),
    "shared memory": lambda _, params: [p.share_memory_() for p in params],
    "everything cloned": clone_everything,
    "a compiled step": lambda optimizer, _: torch.compile(lambda: optimizer.step(), backend="eager")(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_steps_is_seen(change, monkeypatch):
    """A step that reads tensors directly, as PyTorch 2.10 allows, and one that does not, see the same."""
    results = []
    for reader in (cpu._reader, None):
        monkeypatch.setattr(cpu, "_reader", reader)
        params = parameters()
        optimizer = gf.GUTm(params, 0.1, topology=RING)
        train(optimizer, params, range(2))
        set_gradients(params, 2)
        CHANGES[change](optimizer, params)
        optimizer.step()
        train(optimizer, params, range(3, 5))
        results.append(snapshot(optimizer, params))
    assert same(*results)


def set_data(number, data):
    """Returns a damage that gives a parameter other data."""
    return lambda params: setattr(params[number], "data", data(params[number].data))


def set_gradient(data):
    """Returns a damage that gives the first parameter another gradient."""
    return lambda params: setattr(params[0].grad, "data", data)


def convert_all(dtype):
    """Returns a damage that converts all parameters, without gradients."""

    def damage(params):
        for p in params:
            p.grad, p.data = None, p.data.to(dtype)

    return damage


def sparse_gradient(params):
    params[0].grad = params[0].grad.to_sparse()


REFUSED = {
    "gradient of another shape": (
        set_gradient(torch.zeros(6, 5, 3, dtype=torch.float64)),
        ValueError,
        r"gradient 0 has shape \(6, 5, 3\), expected \(6, 3, 5\)",
    ),
    "gradient of another dtype": (
        set_gradient(torch.zeros(6, 3, 5)),
        TypeError,
        "gradient 0 is torch.float32 on cpu, but parameter 0 is torch.float64",
    ),
    "sparse gradient": (sparse_gradient, TypeError, "gradient 0 is torch.sparse_coo; use dense gradients"),
    "parameters cut short": (
        set_data(0, lambda data: data[:4]),
        ValueError,
        r"parameter 0 has shape \(4, 3, 5\), expected \(6, ...\)",
    ),
    "parameters turned": (
        set_data(0, lambda data: data.transpose(1, 2)),
        ValueError,
        "parameter 0 is not contiguous",
    ),
    "one parameter converted": (
        set_data(1, lambda data: data.float()),
        TypeError,
        "parameter 1 is torch.float32 on cpu, but parameter 0",
    ),
    "all converted to float32": (
        convert_all(torch.float32),
        TypeError,
        "the state is torch.float64; for parameters of torch.float32 it can be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_longer_fits_changes_nothing(case):
    damage, error, message = REFUSED[case]
    params = parameters()
    optimizer = gf.GUTm([{"params": params[2:]}, {"params": params[:2]}], 0.1, topology=RING)
    train(optimizer, params, range(2))
    set_gradients(params, 2)
    damage(params)
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


def test_converted_parameters_need_a_new_optimizer():
    params = parameters(torch.float32)
    optimizer = gf.GUT(params, 0.1, topology=RING)
    convert_all(torch.bfloat16)(params)
    before = snapshot(optimizer, params)
    with pytest.raises(TypeError, match=r"parameters are now torch.bfloat16, their state is torch.float32; make"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("profiler", [torch.autograd.profiler.profile, torch.profiler.profile])
def test_hooks_run_once_and_profilers_see_the_step(profiler):
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    train(optimizer, params, range(2))
    assert calls == ["before", "after"] * 2
    for handle in handles:
        handle.remove()
    with profiler() as profile:
        train(optimizer, params, range(1))
    assert any(event.key == "Optimizer.step#GUT.step" for event in profile.key_averages())
    assert len(calls) == 4


def test_dispatch_modes_see_the_op():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    params = parameters()
    optimizer = gf.GUT(params, 0.1, topology=RING)
    with Watch():
        optimizer.step()
    assert any("gossip_step_" in name for name in seen)


def test_steps_in_threads_of_their_own():
    def run(params):
        torch.set_num_threads(1)
        train(gf.GUT(params, 0.1, topology=RING), params, range(30))
        return [p.detach() for p in params]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [parameters() for _ in range(4)]))
    assert all(same(result, run(parameters())) for result in results)
