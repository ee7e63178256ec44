"""A table of what `torch.optim.SGD` does, row by row, and what `gf.DSGDm` of one agent does in its place.

At one agent DSGDm is SGD with momentum, so a row is a function that uses an optimizer, and both must return the same.
Where ours sensibly does something else, the row says what and why.
"""

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import gut_fast as gf
from gut_fast.verify import lockstep

ONE = gf.topology.complete(1)


def seeded(*shape, seed):
    """Returns standard normal numbers, the same ones for the same seed."""
    return lockstep.seeded(1, *shape, seed=seed)[0].clone()


class Row(NamedTuple):
    """One behaviour: what is done with an optimizer, what ours returns if not what SGD does, and why."""

    act: object
    ours: object = None
    reason: str = ""


ROWS = {}


def row(act):
    """Puts a row into the table in which both do the same."""
    ROWS[act.__name__] = Row(act)
    return act


def differs(ours, reason):
    """Puts a row into the table in which ours does something else."""

    def put(act):
        ROWS[act.__name__] = Row(act, ours, reason)
        return act

    return put


def sgd(params, *positional, **options):
    return torch.optim.SGD(params, *positional, **{"momentum": 0.9, **options})


def ours(params, *positional, **options):
    return gf.DSGDm(params, *positional, **{"topology": ONE, **options})


def parameters(*shapes, dtype=torch.float64):
    shapes = shapes or ((3, 5), (5,), ())
    return [torch.nn.Parameter(seeded(*shape, seed=k).to(dtype)) for k, shape in enumerate(shapes)]


def loss_of(params, step=0):
    return sum(((p - seeded(*p.shape, seed=70 + k + step).to(p)) ** 2).sum() for k, p in enumerate(params))


def train(params, optimizer, steps=4, scheduler=None):
    """Trains on quadratics and returns the values of the parameters."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(params, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in params]


def trained(make, params=None, **options):
    params = parameters() if params is None else params
    return train(params, make(params, lr=0.05, **options))


def outcome(act):
    """Returns what a call returns, or the class of its error that callers would catch."""
    try:
        return act()
    except Exception as error:
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def same(a, b):
    if isinstance(a, torch.Tensor):
        rtol, atol = (1e-4, 1e-6) if a.dtype == torch.float32 else (1e-9, 1e-12)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        return True
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == (pytest.approx(b) if isinstance(b, float) else b)


# Constructing


@row
def a_list(make):
    return trained(make)


@row
def a_generator(make):
    params = parameters()
    return train(params, make((p for p in params), lr=0.05))


@row
def named_parameters(make):
    optimizer = make(zip(["a", "b"], parameters(), strict=False), lr=0.1)
    return optimizer.param_groups[0]["param_names"], optimizer.state_dict()["param_groups"][0]["param_names"]


@row
def named_and_unnamed_together(make):
    a, b, _ = parameters()
    return outcome(lambda: make([("a", a), b], lr=0.1) and None)


@row
def a_named_group_beside_an_unnamed_one(make):
    a, b, _ = parameters()
    return outcome(lambda: make([{"params": [("a", a)]}, {"params": [b]}], lr=0.1) and None)


@row
def plain_tensors(make):
    params = [p.detach().requires_grad_() for p in parameters()]
    return trained(make, params)


@row
def an_empty_list(make):
    return outcome(lambda: make([], lr=0.1))


@row
def one_bare_tensor(make):
    return outcome(lambda: make(parameters()[0], lr=0.1))


@row
def a_set_of_parameters(make):
    return outcome(lambda: make([{"params": set(parameters())}], lr=0.1))


@row
def something_that_is_no_tensor(make):
    return outcome(lambda: make([1.0], lr=0.1))


@row
def a_tensor_that_is_no_leaf(make):
    return outcome(lambda: make([parameters()[0] * 2], lr=0.1))


@row
def a_parameter_in_two_groups(make):
    a, b, _ = parameters()
    return outcome(lambda: make([{"params": [a]}, {"params": [a, b]}], lr=0.1))


@differs("ValueError", "its gradient would be taken twice; torch only warns, and says that it will be an error")
def a_parameter_twice_in_a_group(make):
    a = parameters()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(lambda: len(make([a, a], lr=0.1).param_groups))


@row
def the_learning_rate_is_the_second_argument(make):
    return make(parameters(), 0.3).param_groups[0]["lr"]


@row
def the_default_learning_rate(make):
    return make(parameters()).param_groups[0]["lr"]


@row
def defaults_hold_the_options(make):
    defaults = make(parameters(), 0.3, weight_decay=0.1).defaults
    return {name: defaults[name] for name in ("lr", "momentum", "weight_decay", "maximize", "nesterov")}


@row
def a_negative_learning_rate(make):
    return outcome(lambda: make(parameters(), -0.1))


@row
def a_learning_rate_that_is_a_word(make):
    return outcome(lambda: make(parameters(), "fast"))


@row
def a_negative_momentum(make):
    return outcome(lambda: make(parameters(), momentum=-0.1))


@differs("ValueError", "such a momentum diverges")
def a_momentum_of_one(make):
    return outcome(lambda: make(parameters(), momentum=1.0).defaults["momentum"])


@row
def a_negative_weight_decay(make):
    return outcome(lambda: make(parameters(), weight_decay=-0.1))


@differs(0, "the equations make sense: it is plain DSGD")
def nesterov_without_momentum(make):
    return outcome(lambda: make(parameters(), momentum=0, nesterov=True).defaults["momentum"])


@row
def an_unknown_keyword(make):
    return outcome(lambda: make(parameters(), momentun=0.9))


@row
def foreach_false(make):
    return trained(make, foreach=False)


@row
def foreach_none_fused_none(make):
    return trained(make, foreach=None, fused=None)


@row
def fused_false_differentiable_false(make):
    return trained(make, fused=False, differentiable=False)


@differs("ValueError", "one kernel takes the step of all tensors already")
def foreach_true(make):
    return outcome(lambda: trained(make, foreach=True) and None)


@differs("ValueError", "every step is fused already, by the kernel that `backend` names")
def fused_true(make):
    return outcome(lambda: trained(make, fused=True) and None)


@differs("ValueError", "steps work in place, below autograd")
def differentiable_true(make):
    return outcome(lambda: make(parameters(), differentiable=True) and None)


# Learning rates that are tensors


@row
def a_tensor_learning_rate(make):
    params = parameters()
    return train(params, make(params, lr=torch.tensor(0.05, dtype=torch.float64)))


@row
def a_tensor_learning_rate_of_one_dimension(make):
    return outcome(lambda: make(parameters(), torch.tensor([0.1])).param_groups[0]["lr"].shape)


@row
def a_tensor_learning_rate_of_two_numbers(make):
    return outcome(lambda: make(parameters(), torch.tensor([0.1, 0.2])))


@row
def schedulers_fill_a_tensor_learning_rate(make):
    params, lr = parameters(), torch.tensor(0.05, dtype=torch.float64)
    optimizer = make(params, lr=lr)
    values = train(params, optimizer, 8, lr_scheduler.ExponentialLR(optimizer, 0.9))
    return values, lr, optimizer.param_groups[0]["lr"] is lr


@row
def a_tensor_learning_rate_changed_in_place(make):
    params, lr = parameters(), torch.tensor(0.05, dtype=torch.float64)
    optimizer = make(params, lr=lr)
    train(params, optimizer)
    lr.fill_(0.01)
    return train(params, optimizer)


@row
def a_tensor_learning_rate_in_a_state_dict(make):
    optimizer = make(parameters(), lr=torch.tensor(0.05))
    other = make(parameters(), lr=0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other.param_groups[0]["lr"]


# Groups


@row
def groups_have_options_of_their_own(make):
    a, b, c = parameters()
    groups = [{"params": [a], "lr": 0.2, "momentum": 0.5}, {"params": [b, c], "weight_decay": 0.1}]
    optimizer = make(groups, lr=0.05)
    return train([a, b, c], optimizer), [group["lr"] for group in optimizer.param_groups]


@row
def groups_from_a_generator(make):
    params = parameters()
    return train(params, make(({"params": [p]} for p in params), lr=0.05))


@row
def a_group_of_one_bare_tensor(make):
    a = parameters()[0]
    return train([a], make([{"params": a}], lr=0.05))


@row
def a_group_without_parameters(make):
    params = parameters()
    return train(params, make([{"params": []}, {"params": params}], lr=0.05))


@row
def keys_of_the_users_own_are_kept(make):
    optimizer = make([{"params": parameters(), "name": "all", "lr_scale": 0.5}], lr=0.1)
    return [optimizer.state_dict()["param_groups"][0][key] for key in ("name", "lr_scale")]


@row
def a_group_is_added(make):
    a, b, c = parameters()
    optimizer = make([a], lr=0.05)
    train([a], optimizer)
    optimizer.add_param_group({"params": [b, c], "lr": 0.01})
    return train([a, b, c], optimizer), [len(group["params"]) for group in optimizer.param_groups]


@row
def an_added_group_that_is_no_dict(make):
    return outcome(lambda: make(parameters()).add_param_group([torch.zeros(3)]))


@differs("TypeError", "it is an error of the argument, as for a group that is no dict")
def an_added_group_without_params(make):
    return outcome(lambda: make(parameters()).add_param_group({"lr": 0.1}))


@row
def an_added_parameter_that_is_there_already(make):
    params = parameters()
    return outcome(lambda: make(params).add_param_group({"params": params[:1]}))


@row
def an_option_is_changed_between_steps(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    train(params, optimizer)
    optimizer.param_groups[0].update(lr=0.02, momentum=0.5, weight_decay=0.1)
    return train(params, optimizer)


@row
def a_parameter_is_replaced_in_its_group(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    train(params, optimizer)
    params[0] = torch.nn.Parameter(seeded(3, 5, seed=9))
    optimizer.param_groups[0]["params"][0] = params[0]
    return train(params, optimizer)


@row
def a_parameter_is_appended_to_its_group(make):
    params = parameters()
    optimizer = make(params[:2], lr=0.05)
    train(params[:2], optimizer)
    optimizer.param_groups[0]["params"].append(params[2])
    return train(params, optimizer)


@row
def a_parameter_is_taken_out_of_its_group(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    train(params, optimizer)
    del optimizer.param_groups[0]["params"][0]
    return train(params, optimizer)


# Steps


@row
def weight_decay(make):
    return trained(make, weight_decay=0.1)


@row
def maximize(make):
    return trained(make, maximize=True)


@row
def nesterov(make):
    return trained(make, nesterov=True)


@row
def single_precision(make):
    return trained(make, parameters(dtype=torch.float32))


@row
def no_dimension_and_no_numbers(make):
    return trained(make, parameters((), (0, 3), (1,)))


@row
def a_step_returns_none(make):
    return make(parameters()).step()


@row
def a_closure(make):
    params = parameters()
    optimizer = make(params, lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    with torch.no_grad():
        return [optimizer.step(closure).detach() for _ in range(3)], [p.detach() for p in params]


@row
def a_closure_that_fails_changes_nothing(make):
    params = parameters()
    optimizer = make(params)

    def closure():
        raise KeyError("no loss")

    return outcome(lambda: optimizer.step(closure)), [p.detach() for p in params]


@differs(True, "a gradient of None counts as zero, in every mode, so ranks never disagree on what is sent")
def no_gradient_after_steps_with_one(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    before = train(params, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    return not torch.equal(before[0], params[0].detach())


@row
def never_a_gradient(make):
    params = parameters()
    before = [p.detach().clone() for p in params]
    make(params).step()
    return [torch.equal(p.detach(), value) for p, value in zip(params, before, strict=True)]


@row
def a_frozen_parameter(make):
    params = parameters()
    params[1].requires_grad_(False)
    return trained(make, params)


@differs(True, "as above; a warning says so, and a group of their own with weight_decay=0 leaves frozen parameters")
def a_frozen_parameter_with_weight_decay(make):
    params = parameters()
    before = params[0].requires_grad_(False).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(params, lr=0.05, weight_decay=0.1).step()
    return not torch.equal(before, params[0])


@row
def frozen_after_some_steps_with_zero_momentum(make):
    params = parameters()
    optimizer = make(params, lr=0.05, momentum=0.0)
    train(params, optimizer)
    params[0].requires_grad_(False)
    return train(params, optimizer)


@differs("TypeError", "neighbours' numbers are dense; use dense gradients (sparse=False)")
def sparse_gradients(make):
    a = parameters()[0]
    optimizer = make([a], momentum=0.0)
    a.grad = torch.ones_like(a).to_sparse()
    return outcome(optimizer.step)


@differs("TypeError", "kernels compute in real numbers")
def complex_parameters(make):
    return outcome(lambda: make([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))]).step())


@row
def gradients_that_are_strided(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    for _ in range(3):
        params[0].grad = seeded(5, 3, seed=3).T
        params[1].grad = torch.ones((), dtype=torch.float64).expand(5)
        optimizer.step()
    return [p.detach() for p in params]


@row
def gradients_that_are_lazily_negated(make):
    re, im = parameters((1,), (1,))
    optimizer = make([re, im], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (torch.complex(re, im).conj() - (1 + 2j)).abs().square().sum().backward()
        optimizer.step()
    return im.grad.is_neg(), re.detach(), im.detach()


@differs("ValueError", "agents' rows are contiguous; use .contiguous()")
def parameters_that_are_strided(make):
    return outcome(lambda: trained(make, [torch.nn.Parameter(seeded(5, 3, seed=1).T)]) and None)


@row
def nan_and_infinity_are_carried(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    params[0].grad[1] = float("nan")
    optimizer.step()
    return [p.detach() for p in params]


@row
def gradients_that_require_grad(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it makes a cycle
        loss_of(params).backward(create_graph=True)
    optimizer.step()
    values, leaves = [p.detach().clone() for p in params], [p.is_leaf for p in params]
    for p in params:
        p.grad = None  # breaks the cycle of the graph
    return values, leaves


@row
def data_is_replaced(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    train(params, optimizer)
    params[0].data = seeded(3, 5, seed=9)
    return train(params, optimizer)


@row
def a_subclass_of_parameter(make):
    class Own(torch.nn.Parameter):
        pass

    return [value.as_subclass(torch.Tensor) for value in trained(make, [Own(seeded(3, 5, seed=1))])]


@row
def backward_through_what_a_step_has_changed(make):
    a = parameters()[0]
    optimizer = make([a], lr=0.1)
    loss = (a**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    return outcome(loss.backward)


@row
def two_optimizers_of_one_parameter(make):
    params = parameters()
    one, other = make(params, lr=0.05), make(params[:1], lr=0.02)
    train(params, one)
    train(params[:1], other)
    return train(params, one)


@row
def clipped_gradients(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    loss_of(params).backward()
    norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()
    return norm, [p.detach() for p in params]


@row
def accumulated_gradients(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    for step in range(3):
        loss_of(params, step).backward()
    optimizer.step()
    return [p.detach() for p in params]


# Gradients set to zero


@row
def zero_grad_sets_to_none(make):
    params = parameters()
    loss_of(params).backward()
    make(params).zero_grad()
    return [p.grad for p in params]


@row
def zero_grad_sets_to_zero(make):
    params = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(params).backward(create_graph=True)
    grads = [p.grad for p in params]
    make(params).zero_grad(set_to_none=False)
    return [p.grad.detach() for p in params], [
        p.grad is g and not g.requires_grad for p, g in zip(params, grads, strict=True)
    ]


# Hooks


@row
def step_hooks(make):
    params, calls = parameters(), []
    optimizer = make(params, lr=0.05)
    first = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: calls.append(("pre", o is optimizer, args, kwargs))
    )
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", len(args), len(kwargs))))
    train(params, optimizer, 2)
    first.remove()
    train(params, optimizer, 1)
    return [call[0] for call in calls], calls[0][1]


@row
def a_step_hook_that_changes_the_arguments(make):
    params, calls = parameters(), []
    optimizer = make(params, lr=0.05)

    def closure():
        calls.append("closure")
        return 3.0

    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": closure}))
    return optimizer.step(), calls


@row
def hooks_of_all_optimizers(make):
    params, calls = parameters(), []
    optimizer = make(params, lr=0.05)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    train(params, optimizer, 2)
    for handle in handles:
        handle.remove()
    train(params, optimizer, 1)
    return calls


@row
def state_dict_hooks(make):
    optimizer, calls = make(parameters()), []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before that"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    return optimizer.state_dict()["more"], calls


@row
def load_state_dict_hooks(make):
    optimizer, calls = make(parameters()), []
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.load_state_dict(state)
    optimizer.load_state_dict(state)
    return calls


@row
def a_load_hook_that_repairs_a_state_dict(make):
    optimizer = make(parameters(), lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    groups = state.pop("param_groups")
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "param_groups": [{**groups[0], "lr": 0.7}]})
    optimizer.load_state_dict(state)
    return optimizer.param_groups[0]["lr"], sorted(state)[-1] == "param_groups"


# Schedules


def constant_then_exponential(o):
    return [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 8]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: min(1.0, (epoch + 1) / 3)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.01),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR without momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, constant_then_exponential(o), [3]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(constant_then_exponential(o)),
    "SWALR": lambda o: SWALR(o, 0.01, 5),
}


def scheduled(schedule):
    def act(make):
        params = parameters()
        optimizer = make(params, lr=0.05)
        scheduler, rates = schedule(optimizer), []
        for _ in range(12):
            train(params, optimizer, 1)
            rates.append([float(optimizer.param_groups[0][key]) for key in ("lr", "momentum")])
            scheduler.step()
        return rates, [p.detach() for p in params]

    return act


ROWS.update({f"schedule {name}": Row(scheduled(schedule)) for name, schedule in SCHEDULES.items()})


@differs(True, "nothing divides by zero: agents mix, and the state stays as it is")
def the_state_stays_at_a_learning_rate_of_zero(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    train(params, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [next(iter(entries.values())).clone() for entries in optimizer.state.values()]
    train(params, optimizer, 1)
    return all(torch.equal(next(iter(o.values())), b) for o, b in zip(optimizer.state.values(), before, strict=True))


@row
def a_schedule_by_plateaus(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    scheduler, rates = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1), []
    for _ in range(6):
        train(params, optimizer, 1)
        scheduler.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, [p.detach() for p in params]


def warned(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message).split(".")[0][:40] for warning in caught]


@row
def a_scheduler_that_steps_after_the_optimizer_warns_of_nothing(make):
    params = parameters()
    optimizer = make(params)
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    return warned(lambda: train(params, optimizer, 4, scheduler))


@row
def a_scheduler_that_steps_first_warns(make):
    optimizer = make(parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    return warned(lambda: [scheduler.step(), scheduler.step()])


@row
def a_scheduler_after_hooks_warns_of_nothing(make):
    params = parameters()
    optimizer = make(params)
    optimizer.register_step_post_hook(lambda *_: None)
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    return warned(lambda: train(params, optimizer, 4, scheduler))


@row
def a_scheduler_goes_on_from_its_state(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(params, optimizer, 4, scheduler)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(twins, lr=0.7)
    later = lr_scheduler.CosineAnnealingLR(other, 10)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later.load_state_dict(scheduler.state_dict())
    return train(twins, other, 4, later), other.param_groups[0]["lr"]


# State


def saved(make, **options):
    params = parameters()
    optimizer = make(params, lr=0.05, **options)
    train(params, optimizer)
    return params, optimizer


def continued(params, make, state):
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(twins, lr=0.7)
    other.load_state_dict(state)
    return train(twins, other)


@row
def a_state_dict_continues(make):
    params, optimizer = saved(make)
    return continued(params, make, copy.deepcopy(optimizer.state_dict()))


@row
def a_state_dict_through_a_file(make):
    params, optimizer = saved(make)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return continued(params, make, torch.load(file, weights_only=True, map_location="cpu"))


@differs(
    ["local_before", "param_groups", "round", "rule", "state", "step"],
    "the rule is checked, topologies may vary with the round, and a round may have begun",
)
def the_keys_of_a_state_dict(make):
    return sorted(saved(make)[1].state_dict())


@differs(["m"], "the name in the equations")
def the_names_of_the_state(make):
    _, optimizer = saved(make)
    return sorted(optimizer.state_dict()["state"][0])


@differs(3, "state is there from the start, zero: ranks and captured graphs need it")
def the_state_before_the_first_step(make):
    return len(make(parameters()).state)


@row
def parameters_are_numbered_over_the_groups(make):
    a, b, c = parameters()
    state = make([{"params": [a, b]}, {"params": [c]}]).state_dict()
    return [group["params"] for group in state["param_groups"]]


@row
def options_are_those_of_the_loaded_state(make):
    _, optimizer = saved(make, weight_decay=0.1)
    other = make(parameters(), lr=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [other.param_groups[0][key] for key in ("lr", "weight_decay", "momentum")]


@row
def a_state_dict_of_other_groups(make):
    return outcome(
        lambda: make(parameters()).load_state_dict(make([{"params": [p]} for p in parameters()]).state_dict())
    )


@row
def a_state_dict_of_fewer_parameters(make):
    return outcome(lambda: make(parameters()).load_state_dict(make(parameters()[:2]).state_dict()))


@differs("ValueError", "it says what is wrong")
def a_state_dict_that_is_none(make):
    return outcome(lambda: make(parameters()).load_state_dict({}))


@row
def loading_casts_the_state(make):
    params, optimizer = saved(make)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries.update({name: value.float() for name, value in entries.items()})
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(twins, lr=0.7)
    other.load_state_dict(state)
    return [value.dtype for value in other.state[twins[0]].values()]


@differs(False, "state lives in flat buffers, so values are copied into them")
def loaded_tensors_are_shared(make):
    params, optimizer = saved(make)
    state = optimizer.state_dict()
    other = make([torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(state)
    theirs = next(iter(other.state.values()))
    return next(iter(theirs.values())).data_ptr() == next(iter(state["state"][0].values())).data_ptr()


@row
def cleared_state_starts_anew(make):
    params, optimizer = saved(make)
    optimizer.state.clear()
    return train(params, optimizer)


@row
def cleared_state_after_loading_starts_anew(make):
    params, optimizer = saved(make)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.state.clear()
    return train(params, optimizer), len(optimizer.state_dict()["state"])


@row
def the_state_of_one_parameter_is_deleted(make):
    params, optimizer = saved(make)
    del optimizer.state[params[0]]
    return train(params, optimizer)


@row
def state_is_scaled_in_place(make):
    params, optimizer = saved(make)
    for entries in optimizer.state.values():
        for value in entries.values():
            value.mul_(0.5)
    return train(params, optimizer)


@row
def a_deep_copy_with_its_parameters(make):
    params, optimizer = saved(make)
    twins, twin = copy.deepcopy((params, optimizer))
    return train(twins, twin), train(params, optimizer)


@row
def a_deep_copy_with_its_scheduler(make):
    params, optimizer = saved(make)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    twins, twin, later = copy.deepcopy((params, optimizer, scheduler))
    return train(twins, twin, 2), later.get_last_lr(), later.optimizer is twin


@row
def a_pickle(make):
    twins, twin = pickle.loads(pickle.dumps(saved(make)))
    return train(twins, twin)


@row
def a_pickle_of_an_older_version(make):
    params, optimizer = saved(make)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for later in ("nesterov", "maximize", "foreach", "differentiable", "fused", "drift_memory", "drift_lr"):
            if later in group and not (later in ("nesterov", "maximize") and "drift_lr" in optimizer.param_groups[0]):
                del group[later]
    twin = type(optimizer).__new__(type(optimizer))
    twin.__setstate__(state)
    return train(params, twin)


@row
def it_can_be_collected(make):
    optimizer = make(parameters())
    optimizer.step()
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    return alive()


@row
def how_it_prints_itself(make):
    params = parameters()
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1)
    text = repr(optimizer)
    return text.startswith(type(optimizer).__name__), text.count("Parameter Group"), "lr: 0.3" in text


# Around it


@row
def profilers_see_steps_and_zero_grad(make):
    params = parameters()
    optimizer = make(params)
    with torch.profiler.profile() as profile:
        train(params, optimizer, 2)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    return {key.replace(type(optimizer).__name__, "It"): count for key, count in counts.items()}


@row
def grad_scaler(make):
    params = parameters(dtype=torch.float32)
    optimizer, scaler = make(params, lr=0.05), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step) * (float("inf") if step == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale(), [p.detach() for p in params]


@row
def compiled_steps(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for k in range(12):
        optimizer.zero_grad()
        loss_of(params, k).backward()
        optimizer.param_groups[0]["lr"] *= 0.9
        step()
    return [p.detach() for p in params]


@row
def compiled_steps_with_a_tensor_learning_rate(make):
    params = parameters()
    optimizer = make(params, lr=torch.tensor(0.05, dtype=torch.float64))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for k in range(4):
        optimizer.zero_grad()
        loss_of(params, k).backward()
        step()
        scheduler.step()
    return [p.detach() for p in params]


@row
def averaged_weights(make):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    params, optimizer = list(module.parameters()), make(module.parameters(), lr=0.05)
    for _ in range(4):
        train(params, optimizer, 1)
        averaged.update_parameters(module)
    return [p.detach() for p in averaged.parameters()]


def module_and(make, **options):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()
    return module, make(module.parameters(), lr=0.05, **options)


@row
def a_distributed_checkpoint_before_the_first_step_moves_nothing(make):
    module, optimizer = module_and(make)
    before = copy.deepcopy(module.state_dict())
    state = checkpoint.get_optimizer_state_dict(module, optimizer)
    return same(before, module.state_dict()), sorted(state["state"]), getattr(optimizer, "num_steps", 0)


@row
def a_distributed_checkpoint_without_momentum_moves_nothing(make):
    module, optimizer = module_and(make, momentum=0.0)
    before = copy.deepcopy(module.state_dict())
    checkpoint.get_state_dict(module, optimizer)
    return same(before, module.state_dict())


@row
def a_distributed_checkpoint_goes_on(make):
    module, optimizer = module_and(make)
    train(list(module.parameters()), optimizer)
    weights, state = map(copy.deepcopy, checkpoint.get_state_dict(module, optimizer))
    other, twin = module_and(make)
    checkpoint.set_state_dict(other, twin, model_state_dict=weights, optim_state_dict=state)
    return train(list(other.parameters()), twin)


@row
def a_flat_distributed_checkpoint_goes_on(make):
    module, optimizer = module_and(make)
    train(list(module.parameters()), optimizer)
    flat = checkpoint.StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = map(copy.deepcopy, checkpoint.get_state_dict(module, optimizer, options=flat))
    other, twin = module_and(make)
    checkpoint.set_state_dict(other, twin, model_state_dict=weights, optim_state_dict=state, options=flat)
    return train(list(other.parameters()), twin)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, in torch.compile
@pytest.mark.parametrize("name", ROWS)
def test_it_does_what_sgd_does_or_what_the_row_says(name):
    table_row = ROWS[name]
    theirs, own = table_row.act(sgd), table_row.act(ours)
    if not table_row.reason:
        assert same(own, theirs)
    else:
        assert own == table_row.ours
        assert own != theirs, f"there is no difference any more: {table_row.reason}"


def test_the_table_has_at_least_75_rows():
    assert len(ROWS) >= 75
