"""The state of optimizers: saved, copied, loaded, assigned; whatever changes between two steps is seen."""

import collections
import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

import gut_fast as gf
import ranks
from gut_fast.kernels.backends import cpu
from gut_fast.verify.lockstep import seeded
from quadratics import MATCHING, RING, make, parameters, refused, same, set_gradients, snapshot, train, values_of

HALVES = (torch.bfloat16, torch.float16)
DTYPES = [(torch.float32, torch.float32)]
DTYPES += [pair for half in HALVES for pair in ((torch.float32, half), (half, torch.float32), (half, half))]
"""Dtypes of parameters and state."""


def restored(params, optimizer, scheduler, options):
    """Makes another optimizer and scheduler, which load the state of these from a file."""
    file = io.BytesIO()
    torch.save([params, optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    values, state, schedule = torch.load(file, weights_only=True)
    twins, twin = make(gf.GUTm, **options)
    for own, value in zip(twins, values, strict=True):
        own.data.copy_(value)
    twin_scheduler = lr_scheduler.ExponentialLR(twin, 0.95)
    twin.load_state_dict(state)
    twin_scheduler.load_state_dict(schedule)
    return twins, twin, twin_scheduler


COPIES = {
    "state_dict": restored,
    "pickle": lambda *parts: pickle.loads(pickle.dumps(parts[:3])),
    "deepcopy": lambda *parts: copy.deepcopy(parts[:3]),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("place", range(len(DTYPES)))
def test_copies_continue_bit_for_bit(how, place):
    dtype, state_dtype = DTYPES[place]
    topology = [RING, MATCHING][(place + [*COPIES].index(how)) % 2]
    options = {"topology": topology, "dtype": dtype, "state_dtype": state_dtype, "split": 1}
    params, optimizer = make(gf.GUTm, **options)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.95)
    train(params, optimizer, range(9), scheduler)
    twins, twin, twin_scheduler = COPIES[how](params, optimizer, scheduler, options)
    assert twin.num_steps == 9
    assert same(snapshot(params, optimizer), snapshot(twins, twin))
    assert all(twin.state[p][name].dtype == state_dtype for p in twins for name in ("m", "r"))
    assert repr(twin) == repr(optimizer)
    train(params, optimizer, range(9, 20), scheduler)
    train(twins, twin, range(9, 20), twin_scheduler)
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def test_loading_sets_the_step_count_whatever_was_compiled_before():
    params, optimizer = make()
    train(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert optimizer.num_steps == 3
    optimizer.load_state_dict(saved)
    assert optimizer.num_steps == 2


def test_repr():
    text = repr(make()[1])
    assert "GUT (" in text
    assert "rule: gut, topology: ring(6), backend: auto" in text
    assert "mu: 0.9" in text


def continued(rank, size, values, state):
    """Goes on from a state in another process, and returns the parameters after twelve steps."""
    params, optimizer = make(gf.GUTm, topology=MATCHING)
    for own, value in zip(params, values, strict=True):
        own.data.copy_(value)
    optimizer.load_state_dict(state)
    train(params, optimizer, range(5, 12))
    return values_of(params)


def test_another_process_continues_bit_for_bit():
    params, optimizer = make(gf.GUTm, topology=MATCHING)
    train(params, optimizer, range(5))
    saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, range(5, 12))
    assert same(ranks.run(1, continued, *saved), [values_of(params)])


def test_a_shallow_copy_leaves_the_original_alone():
    (params, optimizer), (twins, twin) = make(), make()
    train(params, optimizer, range(2))
    copy.copy(optimizer)
    train(params, optimizer, range(2, 4))
    train(twins, twin, range(4))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))


def test_state_that_was_assigned_or_reset_is_followed():
    (params, optimizer), (twins, twin) = make(), make()
    train(params, optimizer, range(3))
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    optimizer.state = collections.defaultdict(dict)  # the usual reset
    train(params, optimizer, range(3, 5))
    train(twins, twin, range(3, 5))
    assert same(snapshot(params, optimizer)[:2], snapshot(twins, twin)[:2])
    for values, one in ((params, optimizer), (twins, twin)):
        one.state[values[0]]["r"] = torch.full_like(values[0], 0.5)
        one.state[values[1]]["r"].fill_(2.0)
        train(values, one, range(5, 6))
    assert same(snapshot(params, optimizer)[:2], snapshot(twins, twin)[:2])
    assert not (optimizer.state[params[0]]["r"] == 0.5).all()


def strided_gradient(params, optimizer):
    params[0].grad = params[0].grad.transpose(1, 2).contiguous().transpose(1, 2)


def assign_and_delete_state(params, optimizer):
    optimizer.state[params[0]] = {"m": params[0].detach() + 1}
    optimizer.state[params[1]] = {"r": params[1].detach() - 1}


def add_a_group(params, optimizer):
    params.append(torch.nn.Parameter(seeded(6, 2, seed=8)))
    params[-1].grad = seeded(6, 2, seed=9)
    optimizer.add_param_group({"params": params[-1:], "mu": 0.1})


def clone_everything(params, optimizer):
    for p in params:
        p.data, p.grad = p.data.clone(), p.grad.clone()


CHANGES = {
    "data replaced": lambda params, _: setattr(params[0], "data", seeded(*params[0].shape, seed=77)),
    "a strided gradient": strided_gradient,
    "state reset": lambda _, optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),
    "state assigned and deleted": assign_and_delete_state,
    "its own state loaded": lambda _, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a group added": add_a_group,
    "another rate": lambda _, optimizer: optimizer.param_groups[0].update(lr=0.03),
    "shared memory": lambda params, _: [p.share_memory_() for p in params],
    "everything cloned": clone_everything,
    "a compiled step": lambda _, optimizer: torch.compile(lambda: optimizer.step(), backend="eager")(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_steps_is_seen(change, monkeypatch):
    """A step that reads tensors through DLPack, as PyTorch 2.10 allows, and one through attributes see the same."""
    results = []
    for reader in (cpu._reader, cpu._core.TensorReader(torch, through_dlpack=False)):
        monkeypatch.setattr(cpu, "_reader", reader)
        params, optimizer = make(gf.GUTm)
        train(params, optimizer, range(2))
        set_gradients(params, 2)
        CHANGES[change](params, optimizer)
        optimizer.step()
        train(params, optimizer, range(3, 5))
        results.append(snapshot(params, optimizer))
    assert same(*results)


def damaged(state, /, **changes):
    """Copies a state with some entries replaced, or with None, left out."""
    state = {key: value for key, value in copy.deepcopy(state).items() if changes.get(key, ...) is not None}
    return state | {key: change(state[key]) for key, change in changes.items() if change is not None}


def of_another_rule(state):
    return damaged(state, rule=lambda _: "gut")


def of_other_agents(state):
    return gf.GUTm(parameters(num_agents=8), 0.1, topology=gf.topology.ring(8)).state_dict()


BAD_STATES = {
    "not that of an optimizer": lambda good: {},
    "step count must be an integer >= 0 .* got 'abc'": lambda good: damaged(good, step=lambda _: "abc"),
    "step count must be an integer >= 0 .* got -3": lambda good: damaged(good, step=lambda _: -3),
    "step count must be an integer >= 0 .* got True": lambda good: damaged(good, step=lambda _: True),
    "a parameter group of the state has no mu": lambda good: damaged(
        good, param_groups=lambda groups: [{key: value for key, value in groups[0].items() if key != "mu"}]
    ),
    r"state of parameter 1 is \[1.0\]": lambda good: damaged(good, state=lambda state: {**state, 1: [1.0]}),
    r"state of parameter 1 is \{'m'": lambda good: damaged(good, state=lambda s: {**s, 1: {"m": s[1]["m"]}}),
    r"no step count, and random_matching\(6, .*varies with time": lambda good: damaged(good, step=None),
    "the state is of rule 'gut', expected 'gutm'": of_another_rule,
    r"state of parameter 0 is .*\(8, 3, 5\).*expected .*\(6, 3, 5\)": of_other_agents,
    "groups have other sizes": lambda good: damaged(good, param_groups=lambda groups: groups * 2),
    "mu=3.0 is outside": lambda good: damaged(good, param_groups=lambda groups: [{**groups[0], "mu": 3.0}]),
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_loading_what_does_not_fit_changes_nothing(message):
    params, optimizer = make(gf.GUTm, topology=MATCHING)
    train(params, optimizer, range(3))
    bad = BAD_STATES[message](optimizer.state_dict())
    with refused(params, optimizer, RuntimeError if "no step count" in message else ValueError, message):
        optimizer.load_state_dict(bad)


def new():
    return make(gf.GUTm, split=1)


def trained():
    params, optimizer = new()
    train(params, optimizer, range(3))
    return params, optimizer


def loaded():
    params, optimizer = trained()
    twins, twin = new()
    for own, value in zip(twins, params, strict=True):
        own.data.copy_(value.data)
    twin.load_state_dict(optimizer.state_dict())
    return twins, twin


def shallow_copied():
    params, optimizer = trained()
    return params, copy.copy(optimizer)


def grown():
    params, optimizer = trained()
    params.append(torch.nn.Parameter(seeded(6, 2, seed=8)))
    optimizer.add_param_group({"params": params[-1:]})
    return params, optimizer


ORIGINS = {
    "new": new,
    "trained": trained,
    "loaded": loaded,
    "deep copy": lambda: copy.deepcopy(trained()),
    "pickle": lambda: pickle.loads(pickle.dumps(trained())),
    "shallow copy": shallow_copied,
    "grown": grown,
}


def half(parameter):
    return torch.full_like(parameter, 0.5)


ASSIGNMENTS = {
    "cleared": lambda params, optimizer: optimizer.state.clear(),
    "another dict": lambda params, optimizer: setattr(optimizer, "state", collections.defaultdict(dict)),
    "a plain dict": lambda params, optimizer: setattr(optimizer, "state", {params[1]: {"m": half(params[1])}}),
    "a parameter's popped": lambda params, optimizer: optimizer.state.pop(params[0]),
    "a parameter's cleared": lambda params, optimizer: optimizer.state[params[0]].clear(),
    "a name popped": lambda params, optimizer: optimizer.state[params[0]].pop("r"),
    "a tensor assigned": lambda params, optimizer: optimizer.state[params[0]].update(m=half(params[0])),
    "an entry assigned": lambda params, optimizer: optimizer.state.update({params[0]: {"m": half(params[0])}}),
    "filled": lambda params, optimizer: optimizer.state[params[0]]["m"].fill_(3.0),
}


def saved_and_loaded(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    return params, optimizer


USES = {
    "step": lambda params, optimizer: (params, optimizer),
    "load": saved_and_loaded,
    "pickle": lambda params, optimizer: pickle.loads(pickle.dumps((params, optimizer))),
    "deep copy": lambda params, optimizer: copy.deepcopy((params, optimizer)),
    "shallow copy": lambda params, optimizer: (params, copy.copy(optimizer)),
}


def stepped_from_what_is_there(params, optimizer):
    """Gives a new optimizer the same values, state and settings by hand, and takes its next step."""
    values, raw = [p.detach().clone() for p in params], vars(optimizer)["state"]
    twins = [torch.nn.Parameter(value) for value in values]
    twin = gf.GUTm([{"params": [each]} for each in twins], lr=0.1, topology=RING)
    rates = {id(p): group["drift_lr"] for group in optimizer.param_groups for p in group["params"]}
    for own, p, group in zip(twins, params, twin.param_groups, strict=True):
        group["drift_lr"] = rates[id(p)]
        for name in ("m", "r"):
            value = raw.get(p, {}).get(name)
            twin.state[own][name].copy_(torch.zeros_like(p) if value is None else value)
    set_gradients(twins, 9)
    twin.step()
    return values_of(twins), [twin.state[p][name].clone() for p in twins for name in ("m", "r")]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_state_is_followed_whoever_changes_it_and_whenever(origin, assignment, use):
    params, optimizer = ORIGINS[origin]()
    ASSIGNMENTS[assignment](params, optimizer)
    expected = stepped_from_what_is_there(params, optimizer)
    params, optimizer = USES[use](params, optimizer)
    set_gradients(params, 9)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    assert [set(saved[number]) for number in range(len(params))] == [{"m", "r"}] * len(params)
    assert same((values_of(params), [saved[k][name] for k in range(len(params)) for name in ("m", "r")]), expected)


NO_STATES = {
    "state must be a dict by parameters, got NoneType": lambda params, optimizer: setattr(optimizer, "state", None),
    "must be a dict of tensors, got NoneType": lambda params, optimizer: optimizer.state.update({params[0]: None}),
    "must be a dict of tensors, got list": lambda params, optimizer: optimizer.state.update({params[0]: [1]}),
    r"state 'r' .* must be a tensor \(6, 5\), got float": lambda params, optimizer: optimizer.state[params[1]].update(
        r=3.0
    ),
    r"state 'r' .*sparse_coo": lambda params, optimizer: optimizer.state[params[1]].update(
        r=params[1].detach().to_sparse()
    ),
    r"state 'r' .*on meta": lambda params, optimizer: optimizer.state[params[1]].update(r=params[1].data.to("meta")),
}


@pytest.mark.parametrize("message", NO_STATES)
def test_what_is_no_state_is_refused_by_the_next_step(message):
    params, optimizer = trained()
    set_gradients(params, 3)
    before = values_of(params), optimizer.num_steps

    def assign_and_step():
        NO_STATES[message](params, optimizer)
        optimizer.step()

    with pytest.raises((TypeError, ValueError), match=message):
        assign_and_step()
    assert same((values_of(params), optimizer.num_steps), before)


def test_a_state_dict_is_of_the_parameters_that_are_there():
    params, optimizer = trained()
    optimizer.param_groups[1]["params"] = params[1:2]
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(params[0].detach().clone())
    set_gradients(params, 3)
    optimizer.step()
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
