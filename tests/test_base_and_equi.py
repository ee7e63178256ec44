"""Base-(k+1) graphs average exactly in few steps; EquiTopo graphs are random shifts with the published weights."""

import math
import pickle

import networkx as nx
import pytest
import torch

from gut_fast import topology as tp


def product(topology, first=0):
    """The product of the matrices of a period, which begins at the step `first`."""
    total = torch.eye(topology.num_agents, dtype=torch.float64)
    for step in range(first, first + topology.period):
        total = topology.matrix(step) @ total
    return total


def mean_matrix(n):
    return torch.full((n, n), 1 / n, dtype=torch.float64)


def each_base(sizes):
    return [tp.base(n, k) for n in sizes for k in range(1, min(5, max(n - 1, 1)) + 1)]


# Base-(k+1) graphs


@pytest.mark.parametrize("n", range(1, 41))
def test_a_period_of_a_base_graph_averages_exactly_with_at_most_k_neighbours(n):
    for topology in each_base([n]):
        k = int(topology.name.split()[-1].rstrip(")"))
        assert (product(topology) - mean_matrix(n)).abs().max() < 1e-12, topology
        for step in range(topology.period):
            W = topology.matrix(step)
            assert (W >= 0).all()
            assert torch.equal(W, W.T), topology
            assert (W.sum(0) - 1).abs().max() < 1e-14
            assert topology.csr(step).row_start.diff().max() <= k


@pytest.mark.parametrize("k", range(1, 6))
def test_the_period_of_a_base_graph_is_within_the_published_bound(k):
    for n in range(max(2, k + 1), 200):
        assert tp.base(n, k).period <= 2 * math.log(n, k + 1) + 2 + 1e-9


@pytest.mark.parametrize(
    ("n", "k", "period"),
    [
        *((2, 1, 1), (16, 1, 4), (5, 1, 5), (6, 1, 4), (7, 1, 5), (25, 1, 9), (24, 1, 6)),
        *((25, 2, 6), (27, 2, 3), (25, 4, 2), (7, 2, 4), (49, 4, 5), (40, 39, 1)),
    ],
)
def test_periods_of_base_graphs_are_as_published(n, k, period):
    assert tp.base(n, k).period == period


def test_the_base_2_graph_of_six_agents_is_the_one_of_three_twice_and_one_step_across():
    topology = tp.base(6)
    assert [topology.neighbors(0, step) for step in range(4)] == [[1], [2], [1], [3]]
    assert topology.matrix(1)[0, 2] == pytest.approx(2 / 3)
    assert topology.graph.degree[0] == 3


def test_a_base_graph_of_a_power_is_a_hypercube():
    assert nx.is_isomorphic(tp.base(16).graph, nx.hypercube_graph(4))
    assert tp.base(5, 4).cycle == tp.complete(5).cycle


def test_wherever_a_period_of_a_base_graph_of_a_power_begins_it_averages():
    for first in range(4):
        assert (product(tp.base(16), first) - mean_matrix(16)).abs().max() < 1e-15


def test_no_agent_of_a_base_graph_idles_while_others_exchange():
    topology = tp.base(9, 1)  # 8 + 1: in the exchange one of 8 meets the ninth, six of the others pair up
    lonely = [int((topology.csr(step).row_start.diff() == 0).sum()) for step in range(topology.period)]
    assert lonely == [1, 1, 1, 1, 1, 1, 1]


def test_a_base_graph_of_many_agents_is_made_quickly_and_sparse():
    topology = tp.base(10_007, 2)
    assert topology.period <= 2 * math.log(10_007, 3) + 2
    values = torch.arange(10_007, dtype=torch.float64)
    for step in range(topology.period):
        row_start, neighbor, weight = topology.csr(step)
        rows = torch.repeat_interleave(torch.arange(10_007), row_start.diff())
        values = values + torch.zeros_like(values).index_add(0, rows, weight * (values[neighbor] - values[rows]))
    assert (values - 5_003).abs().max() < 1e-8


def test_those_left_of_a_base_graph_keep_doubly_stochastic_steps():
    rest = tp.base(9, 2).without([4])
    for step in range(rest.period):
        W = rest.matrix(step)
        assert torch.equal(W, W.T)
        assert (W.sum(0) - 1).abs().max() < 1e-14


# EquiTopo graphs


def basis_graph(n, shift):
    """The basis graph of a shift: weight (N − 1)/N ahead, 1/N for itself."""
    ahead = torch.roll(torch.eye(n, dtype=torch.float64), shift, dims=1)
    return (n - 1) / n * ahead + torch.eye(n, dtype=torch.float64) / n


@pytest.mark.parametrize("n", [2, 5, 16])
def test_the_mean_of_all_basis_graphs_is_the_average(n):
    assert torch.allclose(sum(basis_graph(n, shift) for shift in range(1, n)) / (n - 1), mean_matrix(n))


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("n", [2, 3, 8, 25])
def test_a_static_equitopo_graph_is_a_mean_of_basis_graphs(n, directed):
    num_shifts = min(3, n - 1)
    topology = tp.equi_static(n, num_shifts * (1 if directed else 2), seed=2, directed=directed)
    W, found = topology.matrix(), []
    for shift in range(1, n):
        share = float(W[0, shift]) * n / (n - 1) * num_shifts
        found += [shift] * round(share * (1 if directed else 2))
    expected = sum(basis_graph(n, shift) for shift in found) / len(found)
    assert len(found) == num_shifts * (1 if directed else 2)
    assert (W - expected).abs().max() < 1e-14
    assert directed or torch.equal(W, W.T)
    assert topology.is_static
    assert nx.is_strongly_connected(topology.graph.to_directed())


def test_eigenvalues_of_an_undirected_equitopo_graph_are_those_of_its_matrix():
    topology = tp.equi_static(24, 6, seed=5)
    expected = torch.linalg.eigvalsh(topology.matrix()).flip(0)
    assert torch.allclose(topology.eigenvalues, expected, atol=1e-12)
    assert topology.lambda_min >= -1 + 2 / 24


def test_the_gap_of_an_equitopo_graph_of_logarithmic_degree_does_not_shrink_with_n():
    for n in (64, 256, 1024):
        degree = 8 * math.ceil(math.log(n))
        gaps = [tp.equi_static(n, degree, seed, directed=True).lazy(0.5).spectral_gap for seed in range(3)]
        assert min(gaps) > 0.2, n


def test_the_same_seed_draws_the_same_shifts():
    assert tp.equi_static(64, 6, 1) == tp.equi_static(64, 6, 1)
    assert tp.equi_static(64, 6, 1).cycle != tp.equi_static(64, 6, 2).cycle
    assert tp.equi_dynamic(9, 1) == tp.equi_dynamic(9, 1)
    assert tp.equi_dynamic(9, 1) != tp.equi_dynamic(9, 2)
    assert tp.equi_dynamic(9, 1).cycle != tp.equi_dynamic(9, 1, directed=True).cycle


@pytest.mark.parametrize("n", [2, 5, 12])
def test_a_directed_step_is_a_lazy_basis_graph_of_every_shift_in_turn(n):
    topology = tp.equi_dynamic(n, seed=4, eta=0.7, directed=True)
    shifts = set()
    for step in range(60):
        shift = topology.neighbors(0, step)[0]
        expected = 0.3 * torch.eye(n, dtype=torch.float64) + 0.7 * basis_graph(n, shift)
        assert (topology.matrix(step) - expected).abs().max() < 1e-14
        shifts.add(shift)
    assert shifts == set(range(1, n))


@pytest.mark.parametrize("n", [1, 2, 5, 12, 13])
def test_an_undirected_step_pairs_agents_of_one_distance(n):
    topology = tp.equi_dynamic(n, seed=4, eta=0.7)
    for step in range(40):
        W = topology.matrix(step)
        assert torch.equal(W, W.T)
        pairs = [(i, j) for i, j in W.nonzero().tolist() if i < j]
        assert all(W[pair] == pytest.approx(0.7 * (n - 1) / n) for pair in pairs)
        assert len({agent for pair in pairs for agent in pair}) == 2 * len(pairs)
        assert len({min((j - i) % n, (i - j) % n) for i, j in pairs}) <= 1
        assert 2 * len(pairs) >= n / 2 - 1  # of the free agents on a cycle of shifts no two neighbors stay


def test_pairs_begin_anywhere_so_that_nobody_rests_more_often():
    topology, n, steps = tp.equi_dynamic(5, seed=0), 5, 1000
    rests = sum((topology.csr(step).row_start.diff() == 0).double() for step in range(steps))
    assert rests.sum() == steps  # one of five
    assert (rests / steps - 1 / n).abs().max() < 4 * math.sqrt(1 / n * (1 - 1 / n) / steps)


def test_a_dynamic_equitopo_graph_shrinks_disagreement_by_the_same_factor_at_any_size():
    for n in (16, 128):
        topology = tp.equi_dynamic(n, seed=1)
        values = torch.eye(n, dtype=torch.float64) - 1 / n
        for step in range(60):
            values = topology.matrix(step) @ values
        assert float(values.norm() ** 2 / (n - 1)) ** (1 / 60) < 0.75, n


def test_weights_and_departures_of_a_dynamic_equitopo_graph():
    topology = tp.equi_dynamic(8, seed=1, eta=0.5)
    pairs = topology.with_weights("metropolis")
    assert set(pairs.csr(3).weight.tolist()) == {0.5}
    assert topology.lazy(0.5).cycle == tp.equi_dynamic(8, seed=1, eta=0.25).cycle
    assert topology.without([0, 3]).cycle == tp.equi_dynamic(6, seed=1, eta=0.5).cycle
    assert tp.equi_dynamic(8, 1, directed=True).without([7]).cycle == tp.equi_dynamic(7, seed=1).cycle
    with pytest.raises(ValueError, match="the graph is directed; uniform weights need an undirected one"):
        tp.equi_dynamic(8, 1, directed=True).with_weights("uniform")
    assert pickle.loads(pickle.dumps(topology)) == topology
