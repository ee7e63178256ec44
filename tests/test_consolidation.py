"""The averaged model: over all agents of all ranks, with the names, dtypes and counters of a plain state dict."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import Group, MismatchError
from gut_fast.distributed.consolidation import consolidate


class Tied(nn.Module):
    """A module with batch normalisation, and a weight with two names."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight


def agent(number):
    """Makes an agent's module from its number; it has seen as many batches and one more."""
    torch.manual_seed(number)
    module = Tied()
    module.norm.running_mean.normal_()
    module.norm.num_batches_tracked += number + 1
    return module


def mean_of(agents, counter_of):
    states = [module.state_dict() for module in agents]
    return {
        name: torch.stack([state[name] for state in states]).double().mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else states[counter_of][name]
        for name, tensor in states[0].items()
    }


def assert_state(state, expected):
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, rtol=1e-7 if tensor.dtype == torch.float32 else 0, atol=0)
    assert state["first.weight"] is state["last.weight"]
    agent(0).load_state_dict(state)


def every_way(rank, size):
    """Returns what consolidate gives a rank, by the kind of group and by `to`; the module must not change."""
    module = agent(rank)
    before = copy.deepcopy(module.state_dict())
    optimizer = gf.DSGD(module.parameters(), 0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD)
    found = {
        (name, to): consolidate(module, group, to=to)
        for name, group in (("world", dist.group.WORLD), ("optimizer", optimizer), ("group", optimizer.group))
        for to in (None, size - 1)
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_mean_over_ranks(size):
    for rank, found in enumerate(ranks.run(size, every_way)):
        expected = mean_of([agent(number) for number in range(size)], rank)
        for (_, to), state in found.items():
            if to is None or to == rank:
                assert_state(state, expected)
            else:
                assert state is None


def stack_of(numbers):
    stacked = gf.stack(Tied(), len(numbers))
    for place, number in enumerate(numbers):
        stacked.agent(place).load_state_dict(agent(number).state_dict())
    return stacked


def stacked(rank, size):
    numbers = [[0, 1], [2, 3, 4], [5]][rank]
    return consolidate(stack_of(numbers), dist.group.WORLD), consolidate(stack_of(numbers))


def test_the_mean_over_stacked_agents_of_ranks_that_hold_different_numbers_of_them():
    agents = [agent(number) for number in range(6)]
    for (everywhere, here), numbers in zip(ranks.run(3, stacked), [[0, 1], [2, 3, 4], [5]], strict=True):
        assert_state(everywhere, mean_of(agents, numbers[0]))
        assert_state(here, mean_of([agents[number] for number in numbers], 0))


def test_one_process_gets_a_copy_of_its_own():
    module = agent(1).to(torch.bfloat16)
    module.register_buffer("nothing", torch.zeros(0))
    for group in (None, torch.optim.SGD(module.parameters(), lr=0.1)):
        state = consolidate(module, group)
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        state["first.weight"].zero_()
        state["norm.num_batches_tracked"].zero_()
    assert module.first.weight.any()
    assert module.norm.num_batches_tracked == 2


def after_a_loss(rank, size):
    """Consolidates among ranks 0 and 2 of 3, which keep their numbers."""
    if rank == 1:
        return None
    group = Group(ranks.store, rank // 2, [0, 2], everyone=size)
    with pytest.raises(ValueError, match=r"there is no rank 1; ranks are \[0, 2\]"):
        consolidate(agent(rank), group, to=1)
    return consolidate(agent(rank), group, to=2)


def test_the_ranks_that_are_left_keep_their_numbers():
    outcomes = ranks.run(3, after_a_loss)
    assert outcomes[:2] == [None, None]
    assert_state(outcomes[2], mean_of([agent(0), agent(2)], 1))


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module or what gut_fast.stack returns, got list"):
        consolidate([])
    with pytest.raises(TypeError, match=r"group must be an optimizer .* got str"):
        consolidate(nn.Linear(1, 1), "world")
    with pytest.raises(ValueError, match=r"there is no rank 1; ranks are \[0\]"):
        consolidate(nn.Linear(1, 1), to=1)
    with pytest.raises(TypeError, match=r"to must be an integer, got 0\.5"):
        consolidate(nn.Linear(1, 1), to=0.5)
    with pytest.raises(TypeError, match=r"weight is torch.complex64; complex numbers are not averaged"):
        consolidate(nn.Linear(1, 1, dtype=torch.complex64))


def of_other_sizes(rank, size):
    """Returns what consolidate says where the last rank's model is another; with the same models it works again."""
    module = nn.Linear(3, 2 if rank < size - 1 else 5)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = gf.DSGD([parameter], 0.1, topology=gf.topology.ring(size), process_group=dist.group.WORLD)
    said = []
    for group in (optimizer, dist.group.WORLD):
        for to in (None, 0):
            with pytest.raises(MismatchError) as caught:
                consolidate(module, group, to=to)
            said.append(str(caught.value))
        mean = consolidate(nn.Linear(3, 2), group)
        assert mean["bias"].shape == (2,)
    return said


def test_models_of_different_sizes_are_an_error_and_no_crash():
    expected = "consolidate: the ranks' models differ in their numbers to average: rank 0 8; rank 1 8; rank 2 20"
    assert ranks.run(3, of_other_sizes) == [[expected] * 4] * 3
