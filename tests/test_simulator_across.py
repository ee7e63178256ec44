"""The simulator with its agents shared out over ranks: the history and the models of one process."""

import itertools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.data import Dataset, RandomCropFlip, partition
from gut_fast.distributed import PeerError
from gut_fast.simulation import Simulator, stack

NUM_AGENTS = 4


def blobs(num_samples=60):
    """Makes three noisy classes of small images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * num_samples) % 3
    inputs = torch.randn(2 * num_samples, 4, generator=generator) + 4.0 * torch.eye(3, 4)[labels]
    inputs = inputs.view(-1, 1, 2, 2).repeat(1, 1, 2, 2)
    return Dataset("blobs", 3, inputs[:num_samples], labels[:num_samples], inputs[num_samples:], labels[num_samples:])


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.ReLU(), nn.Linear(8, 3))


def different_agents():
    """Stacks agents that differ, with batch statistics, whose counters are integers."""
    return stack(network(nn.BatchNorm1d(8)), NUM_AGENTS, init="different", seed=3)


def ring():
    return gf.topology.ring(NUM_AGENTS)


def matching():
    return gf.topology.random_matching(NUM_AGENTS, 2)


CASES = {
    "loop": ("gut", ring, {}),
    "workers": ("gut", ring, {"engine": "workers"}),
    "two messages": ("gradient_tracking", matching, {}),
    "augmented": ("qg_gutm", ring, {"augment": RandomCropFlip(1)}),
}


def simulator(rule="gut", graph=ring, across=False, model=different_agents, **options):
    topology, data = graph(), blobs()
    group = dist.group.WORLD if across else None
    where = {"process_group": group, "agents_per_rank": NUM_AGENTS // dist.get_world_size()} if across else {}
    arguments = {
        "optimizer": lambda params: gf.GossipOptimizer(params, rule, lr=0.1, topology=topology, **where),
        "data": data,
        "parts": partition.dirichlet(data.train_labels, NUM_AGENTS, 0.5),
        "batch_size": 5,
        "engine": "loop",
        "seed": 7,
        "process_group": group,
    }
    return Simulator(model(), topology, **{**arguments, **options})


def run(sim, steps=12, **options):
    return sim.run(steps, **{"eval_every": 4, "progress": False, **options})


def values(sim):
    return {name: rows.clone() for name, rows in sim.stacked.state_dict().items()}


def run_cases(rank, size):
    results = {}
    for name, (rule, graph, options) in CASES.items():
        sim = simulator(rule, graph, across=True, **options)
        results[name] = run(sim), values(sim), sim.bytes_sent
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_have_the_history_of_one_process_and_the_models_of_their_agents(size):
    everywhere = ranks.run(size, run_cases)
    k = NUM_AGENTS // size
    for name, (rule, graph, options) in CASES.items():
        sim = simulator(rule, graph, **options)
        run(sim)
        for rank, results in enumerate(everywhere):
            history, models, bytes_sent = results[name]
            assert history == sim.history, name
            assert torch.equal(bytes_sent, sim.bytes_sent)
            for own, whole in zip(models.values(), values(sim).values(), strict=True):
                assert torch.equal(own, whole[rank * k : rank * k + k]), name


def run_at_once(rank, size):
    sim = simulator(across=True, engine="vmap")
    return run(sim)[-1], values(sim)


def test_all_agents_of_a_rank_at_once_agree_to_rounding():
    sim = simulator(engine="vmap")
    run(sim)
    for rank, (last, models) in enumerate(ranks.run(2, run_at_once)):
        assert last == pytest.approx(sim.history[-1], rel=1e-4)
        torch.testing.assert_close(models, {n: v[2 * rank : 2 * rank + 2] for n, v in values(sim).items()})


def diverge(rank, size):
    sim = simulator(across=True)
    if rank == 1:
        sim.stacked.values[0] = float("nan")
    return run(sim, 2)[-1]


def test_a_loss_of_nan_anywhere_is_seen_everywhere():
    rows = ranks.run(2, diverge)
    assert [row["diverged_agents"] for row in rows] == [3, 3]  # the neighbours of that agent too, in the second step


def draw(rank, size):
    sim = simulator(across=True, model=lambda: network(nn.Dropout(0.5)))
    run(sim, 1, eval_every=None)
    return sim.stacked.parameters()[1].grad.clone()  # biases before the dropout: zero where it dropped all


def test_agents_on_different_ranks_drop_out_different_units():
    first, second = ranks.run(2, draw)
    assert not torch.equal(first == 0, second == 0)


def in_step_3(act):
    """Makes a loss that calls `act` before its first computation in step 3, with two agents here."""
    calls = itertools.count()

    def loss(outputs, labels):
        if next(calls) == 3 * 2:
            act()
        return nn.functional.cross_entropy(outputs, labels)

    return loss


def stop_and_go_on(rank, size, folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sim = simulator(across=True, loss=in_step_3(lambda: rank and signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        run(sim, 16, checkpoint=folder / "states")
    stopped_at = sim.step
    again = simulator(across=True)
    again.load_checkpoint(folder / "states")
    other = simulator(across=True, seed=8)
    with pytest.raises(ValueError, match="seed is 7 there, 8 here"):
        other.load_checkpoint(folder / "states")
    with pytest.raises(FileNotFoundError, match="no checkpoint that all ranks have"):
        other.load_checkpoint(folder / "nothing")
    return stopped_at, again.step, run(again, 16), values(again)


def test_interrupted_anywhere_all_stop_after_the_same_step_and_go_on_from_there(tmp_path):
    sim = simulator()
    run(sim, 16)
    for rank, (stopped_at, step, history, models) in enumerate(ranks.run(2, stop_and_go_on, tmp_path)):
        assert stopped_at == step == 10
        assert history == sim.history
        for own, whole in zip(models.values(), values(sim).values(), strict=True):
            assert torch.equal(own, whole[2 * rank : 2 * rank + 2])


def stop_in_the_last_step(rank, size):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sim = simulator(across=True, loss=in_step_3(lambda: rank and signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        run(sim, 4)
    return sim.step


def test_an_interrupt_in_the_last_steps_is_not_lost():
    assert ranks.run(2, stop_in_the_last_step) == [4, 4]


def ask_for_the_impossible(rank, size):
    with pytest.raises(ValueError, match="4 agents cannot be shared out evenly over 3 ranks"):
        simulator(process_group=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
        simulator(process_group="everybody")
    return True


def forget_the_group(rank, size):
    def alone(params):
        return torch.optim.SGD(params, lr=0.1)

    with pytest.raises(ValueError, match="was given one of 2 ranks, its optimizer no process_group"):
        simulator(process_group=dist.group.WORLD, optimizer=alone)
    return True


def test_what_does_not_fit_the_ranks_is_refused():
    assert all(ranks.run(3, ask_for_the_impossible))
    assert all(ranks.run(2, forget_the_group))


def fail_on_one_rank(rank, size):
    """Rank 1 asks for the impossible; then none does."""
    start = time.monotonic()
    error, message = (ValueError, "batch_size") if rank == 1 else (PeerError, "rank 1 does not come .* batch_size")
    with pytest.raises(error, match=message):
        simulator(across=True, batch_size=0 if rank == 1 else 4)
    waited = time.monotonic() - start
    sim = simulator(across=True)
    run(sim)
    return waited, sim.step


def test_a_rank_that_cannot_make_its_simulator_tells_the_others():
    for waited, step in ranks.run(2, fail_on_one_rank):
        assert waited < 10
        assert step == 12


def lose_a_rank(rank, size):
    def forgiving(params):
        return gf.GUT(
            params,
            lr=0.1,
            mu=0.5,
            topology=ring(),
            process_group=dist.group.WORLD,
            agents_per_rank=2,
            on_peer_failure="continue",
        )

    sim = simulator(across=True, optimizer=forgiving, loss=in_step_3(lambda: rank and os._exit(0)))
    with pytest.warns(UserWarning, match=r"ranks \[1\] are gone"), pytest.raises(RuntimeError, match="no numbers of"):
        run(sim, 4)
    return True


def test_without_some_agents_there_are_no_numbers_of_all():
    with ranks.Crew(2, lose_a_rank) as crew:
        assert crew.outcomes() == [True, None]


def bytes_of(rank, size, wire_dtype):
    def optimizer(parameters):
        where = {"process_group": dist.group.WORLD, "agents_per_rank": NUM_AGENTS // size, "wire_dtype": wire_dtype}
        return gf.GUT(parameters, 0.1, topology=ring(), **where)

    sim = simulator(across=True, optimizer=optimizer)
    run(sim, 3)
    return sim.bytes_sent


def test_rounded_messages_count_what_they_are():
    exact, rounded = (ranks.run(2, bytes_of, dtype)[0] for dtype in (None, torch.bfloat16))
    numbers = sum(parameter.numel() for parameter in network(nn.BatchNorm1d(8)).parameters())
    assert exact.tolist() == [3 * 2 * 4 * numbers] * NUM_AGENTS
    assert rounded.tolist() == [2 * (4 + 2 + 2) * numbers] * NUM_AGENTS  # the first message is sent as it is
