"""States that were changed are loaded whole or refused whole, and the ones that crashed once stay refused."""

import copy
import math

import pytest
import torch

import gut_fast as gf
import ranks
from attacks import state_dicts
from quadratics import make, refused, train


def attacked(rank, size, seed, count):
    return state_dicts.attack(seed, count)


def test_four_hundred_changed_states_load_or_are_refused_whole():
    assert ranks.run(1, attacked, 0, 400) == [400]


@pytest.mark.slow
def test_four_thousand_changed_states_load_or_are_refused_whole():
    assert ranks.run(1, attacked, 1, 4000) == [4000]


def without_memory(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


FIRST = {
    r"state of parameter 0 is .*of layout torch.sparse_coo": torch.Tensor.to_sparse,
    r"state of parameter 0 is .*on meta, without numbers": lambda tensor: tensor.to("meta"),
    r"state of parameter 0 is .*has no memory": without_memory,
    r"state of parameter 0 is .*torch.complex128": lambda tensor: tensor + 0j,
    r"state of parameter 0 is .*'list'}, expected": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("message", FIRST)
def test_state_that_is_no_dense_tensor_is_refused(message):
    params, optimizer = make(gf.GUTm)
    train(params, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["r"] = FIRST[message](state["state"][0]["r"])
    with refused(params, optimizer, ValueError, message):
        optimizer.load_state_dict(state)


def test_a_step_count_without_memory_is_refused_without_reading_it():
    params, optimizer = make()
    state = {**optimizer.state_dict(), "step": without_memory(torch.ones(3))}
    with refused(params, optimizer, ValueError, "step count must be an integer .* got <Tensor>"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("key", ["r", (0, "r"), 7, None], ids=repr)
def test_state_of_what_is_no_parameter_is_refused(key):
    params, optimizer = make()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][key] = {}
    with refused(params, optimizer, ValueError, "'state' has the key .*no number or name of a parameter"):
        optimizer.load_state_dict(state)


def test_what_is_no_dict_is_refused():
    params, optimizer = make()
    with refused(params, optimizer, TypeError, "a state is a dict, as state_dict.. returns, got list"):
        optimizer.load_state_dict([1])


def change_an_average(inner):
    inner["state"][0]["exp_avg"] = inner["state"][0]["exp_avg"][:1]


INNER = {
    "inner state of parameter 0 has no exp_avg": lambda inner: inner["state"][0].pop("exp_avg"),
    r"inner state of parameter 0: 'exp_avg' must be a tensor \(6, 3, 5\), got \(1, 3, 5\)": change_an_average,
    "inner state of parameter 1: 'step' must be a finite number >= 0, got -1": lambda inner: inner["state"][1][
        "step"
    ].fill_(-1),
    "finite learning rate 'lr' >= 0, got nan": lambda inner: inner["param_groups"][0].update(lr=math.nan),
    "are no options of AdamW: KeyError 'eps'": lambda inner: inner["param_groups"][0].pop("eps"),
    "are no options of AdamW: ValueError Invalid beta": lambda inner: inner["param_groups"][0].update(betas=(2.0, 0.9)),
}


@pytest.mark.parametrize("message", INNER)
def test_inner_state_that_cannot_be_stepped_is_refused(message):
    params, optimizer = state_dicts.trained(state_dicts.TARGETS["AdamW"])
    state = copy.deepcopy(optimizer.state_dict())
    INNER[message](state["inner"])
    before = copy.deepcopy(optimizer.inner.state_dict())
    with refused(params, optimizer, ValueError, message):
        optimizer.load_state_dict(state)
    assert state_dicts.same(optimizer.inner.state_dict(), before)


def test_an_option_that_only_a_second_step_reads_is_tried_too():
    params, optimizer = state_dicts.trained(state_dicts.TARGETS["SGD, momentum"])
    state = copy.deepcopy(optimizer.state_dict())
    state["inner"]["param_groups"][0].update(dampening=10**400, nesterov=False)
    with refused(params, optimizer, ValueError, "are no options of SGD: OverflowError"):
        optimizer.load_state_dict(state)


class LosesItsFile(torch.optim.SGD):
    """An optimizer that fails while it loads a state, after it has begun."""

    def load_state_dict(self, state_dict):
        self.param_groups = []
        raise OSError("the file is gone")


def test_an_inner_optimizer_that_fails_in_loading_leaves_everything_as_it_was():
    params, optimizer = state_dicts.gossip(LosesItsFile, momentum=0.9)
    train(params, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, range(3, 5))
    groups = optimizer.inner.param_groups
    with refused(params, optimizer, ValueError, "LosesItsFile cannot load the inner state: OSError the file is gone"):
        optimizer.load_state_dict(state)
    assert optimizer.inner.param_groups is groups
