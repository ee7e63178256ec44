"""The graphs have their published properties, W follows the documented equations, and bad input is named."""

import copy
import math
import pickle
import re
import time
import warnings

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gut_fast import topology as tp
from gut_fast.topology import drawn, mixing

SIZES = [1, 2, 3, 4, 5, 7, 16, 33]
STATIC = [
    *(constructor(n) for n in SIZES for constructor in (tp.ring, tp.complete, tp.chain, tp.star, tp.exponential)),
    *(tp.torus(*sides) for sides in [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (2, 3), (3, 3), (3, 4), (4, 8), (5, 5)]),
    *(tp.hypercube(k) for k in range(6)),
    *(tp.erdos_renyi(n, 0.5, seed=n) for n in SIZES),
    *(tp.random_regular(n, d, seed=1) for n, d in [(1, 0), (2, 1), (3, 2), (5, 4), (10, 3), (33, 2), (33, 6)]),
    *(tp.equi_static(n, 2, seed=n) for n in SIZES),
    tp.equi_static(7, 12, seed=0),
    tp.circulant(1, ()),
    tp.circulant(16, (1, 4)),
    tp.circulant(7, [2, 3]),
    tp.petersen(),
    tp.dyck(),
    tp.from_networkx(nx.barbell_graph(3, 2)),
    tp.from_matrix([[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.25, 0.75]]),
    tp.from_matrix([[0.1, 0.5, 0, 0.4], [0.5, 0.1, 0.4, 0], [0, 0.4, 0.1, 0.5], [0.4, 0, 0.5, 0.1]]),
]
VARYING = [
    *(tp.one_peer_exponential(n) for n in SIZES),
    *(tp.random_matching(n, seed=3) for n in SIZES),
    *(tp.base(n) for n in SIZES),
    *(tp.base(n, k) for n, k in [(5, 2), (11, 3), (12, 11)]),
    *(tp.equi_dynamic(n, seed=3, directed=directed) for n in (1, 2, 5, 16) for directed in (False, True)),
    tp.sequence([tp.ring(6), tp.random_matching(6, 1), tp.one_peer_exponential(6)]),
]
EVERY = STATIC + VARYING
FAST_SIZES = {1, 2, 5, 16}


def each_of(topologies):
    """Parametrises a test by the topologies; named graphs of sizes between the `FAST_SIZES` are slow."""

    def marks(topology):
        is_named = re.match(
            r"(ring|complete|chain|star|exponential|erdos_renyi|one_peer|random_m|base|equi)", repr(topology)
        )
        return pytest.mark.slow if is_named and topology.num_agents not in FAST_SIZES else ()

    return pytest.mark.parametrize(
        "topology", [pytest.param(each, id=repr(each), marks=marks(each)) for each in topologies]
    )


every_static = each_of(STATIC)
every_topology = each_of(EVERY)


def identity(topology):
    return torch.eye(topology.num_agents, dtype=torch.float64)


def assert_equal(actual, expected, tolerance=1e-14):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Every topology


@every_topology
def test_matrix_csr_and_neighbors_agree_and_rows_and_columns_sum_to_one(topology):
    num_agents = topology.num_agents
    ones = torch.ones(num_agents, dtype=torch.float64)
    for step in range(5):
        W = topology.matrix(step)
        assert (W.shape, W.dtype) == ((num_agents, num_agents), torch.float64)
        assert (W >= 0).all()
        assert_equal(W.sum(0), ones)
        assert_equal(W.sum(1), ones)
        row_start, neighbor, weight = topology.csr(step)
        assert (row_start.dtype, neighbor.dtype, weight.dtype) == (torch.int64, torch.int64, torch.float64)
        assert row_start.shape == (num_agents + 1,)
        assert row_start[0] == 0
        assert row_start[-1] == len(neighbor) == len(weight)
        for agent in range(num_agents):
            expected = [j for j in range(num_agents) if j != agent and W[agent, j] != 0]
            row = slice(int(row_start[agent]), int(row_start[agent + 1]))
            assert neighbor[row].tolist() == topology.neighbors(agent, step) == expected
            assert torch.equal(weight[row], W[agent, expected])
        assert topology.csr(step, torch.device("cpu")) is topology.csr(step)
        topology.matrix(step).zero_()
        assert torch.equal(topology.matrix(step), W)


def test_csr_goes_to_the_device_asked_for():
    ring = tp.ring(5)
    copies = ring.csr(0, "meta")
    assert all(values.device.type == "meta" for values in copies)
    assert ring.csr(9, torch.device("meta")) is copies
    assert ring.csr(0, "cpu") is not copies


def test_the_next_csr_call_is_a_look_up(monkeypatch):
    ring = tp.ring(5)
    expected = ring.csr(0, "cpu")
    monkeypatch.setattr(mixing.MixingMatrix, "_copy_to", None)
    assert ring.csr(1, "cpu") is ring.csr(2, torch.device("cpu")) is expected


@every_topology
def test_lazy_is_the_identity_plus_gamma_times_the_rest(topology):
    lazy = topology.lazy(0.3)
    for step in range(3):
        expected = identity(topology) + 0.3 * (topology.matrix(step) - identity(topology))
        assert_equal(lazy.matrix(step), expected)
    assert lazy.name == f"{topology.name}.lazy(0.3)"
    assert lazy.period == topology.period
    twice = topology.lazy(0.5).lazy(0.5)
    assert_equal(twice.matrix(1), topology.lazy(0.25).matrix(1))


@every_topology
def test_a_pickled_topology_mixes_the_same_and_drops_its_caches(topology):
    fresh_size = len(pickle.dumps(topology))
    for step in range(4):
        topology.csr(step)
        topology.csr(step, "meta")
    if topology.is_static:
        assert topology.eigenvalues.shape == (topology.num_agents,)
    assert len(pickle.dumps(topology)) == fresh_size
    for twin in (pickle.loads(pickle.dumps(topology)), copy.deepcopy(topology)):
        assert twin == topology
        assert hash(twin) == hash(topology)
        assert repr(twin) == topology.name
        assert all(torch.equal(twin.matrix(step), topology.matrix(step)) for step in range(5))


def test_equal_topologies_have_the_same_name_and_mixing():
    assert tp.ring(5) == tp.ring(5)
    assert tp.ring(5) != tp.ring(6)
    assert tp.ring(5) != "ring(5)"
    assert tp.ring(2).cycle == tp.chain(2).cycle
    assert tp.ring(2) != tp.chain(2)
    assert tp.ring(5).lazy(0.5) != tp.ring(5).lazy(0.25)
    assert tp.random_matching(5, 1) == tp.random_matching(5, 1)
    assert tp.random_matching(5, 1) != tp.random_matching(5, 2)
    matrices = [[[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.75, 0.25]]]
    assert tp.from_matrix(matrices[0]) == tp.from_matrix(np.array(matrices[0]))
    assert tp.from_matrix(matrices[0]) != tp.from_matrix(matrices[1])
    assert tp.from_matrix(matrices[0]).cycle[0] != "a matrix"


@pytest.mark.parametrize("attribute", ["name", "cycle", "num_agents", "period"])
def test_a_topology_cannot_be_changed(attribute):
    ring = tp.ring(4)
    with pytest.raises(AttributeError):
        setattr(ring, attribute, None)
    assert ring == tp.ring(4)


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        (tp.ring(16), "ring(16)"),
        (tp.torus(4, 8), "torus(4, 8)"),
        (tp.circulant(16, [1, 4]), "circulant(16, (1, 4))"),
        (tp.erdos_renyi(8, 1, seed=3), "erdos_renyi(8, 1.0, seed=3)"),
        (tp.random_regular(np.int64(8), 3, seed=0), "random_regular(8, 3, seed=0)"),
        (tp.random_matching(8, 2), "random_matching(8, seed=2)"),
        (tp.one_peer_exponential(8), "one_peer_exponential(8)"),
        (tp.base(np.int64(8)), "base(8, 1)"),
        (tp.equi_static(8, 4, seed=1), "equi_static(8, 4, seed=1)"),
        (tp.equi_static(8, 3, 1, directed=True), "equi_static(8, 3, seed=1, directed=True)"),
        (tp.equi_dynamic(8, 1), "equi_dynamic(8, seed=1, eta=0.5)"),
        (tp.equi_dynamic(8, 1, eta=1, directed=True), "equi_dynamic(8, seed=1, eta=1.0, directed=True)"),
        (tp.sequence([tp.ring(4), tp.star(4).lazy(0.5)]), "sequence([ring(4), star(4).lazy(0.5)])"),
        (tp.from_networkx(nx.path_graph(3)), "from_networkx(3 agents)"),
        (tp.from_networkx(nx.path_graph(3), name="my path"), "my path"),
        (tp.from_matrix([[1.0]]), "from_matrix(1 agents)"),
        (tp.from_matrix([[1.0]], name="alone"), "alone"),
        (tp.ring(16).lazy(0.5), "ring(16).lazy(0.5)"),
        (tp.star(4).lazy(1).with_weights("metropolis"), "star(4).lazy(1.0).with_weights('metropolis')"),
    ],
)
def test_a_topology_is_called_what_makes_it(topology, name):
    assert topology.name == name
    assert repr(topology) == name


# Graphs


@every_static
def test_graph_is_connected_and_matches_the_neighbors(topology):
    graph = topology.graph
    assert sorted(graph) == list(range(topology.num_agents))
    assert not graph.is_directed()
    assert nx.is_connected(graph)
    assert nx.number_of_selfloops(graph) == 0
    for agent in graph:
        assert sorted(graph.neighbors(agent)) == topology.neighbors(agent)
    graph.clear()
    assert topology.graph.number_of_nodes() == topology.num_agents


def test_petersen_is_the_petersen_graph():
    graph = tp.petersen().graph
    assert nx.is_isomorphic(graph, nx.complement(nx.line_graph(nx.complete_graph(5))))  # Kneser(5, 2)
    assert (nx.girth(graph), nx.diameter(graph), graph.size()) == (5, 2, 15)


def test_dyck_is_the_dyck_graph():
    graph = tp.dyck().graph
    assert nx.is_isomorphic(graph, nx.LCF_graph(32, [5, -5, 13, -13], 8))
    assert set(dict(graph.degree).values()) == {3}
    assert (len(graph), graph.size(), nx.girth(graph), nx.diameter(graph)) == (32, 48, 6, 5)
    assert nx.is_bipartite(graph)
    # The characteristic polynomial of the Dyck graph: (x−3)(x−√5)⁶(x−1)⁹(x+1)⁹(x+√5)⁶(x+3).
    adjacency = torch.linalg.eigvalsh(torch.tensor(nx.to_numpy_array(graph)))
    expected = [-3.0] + [-math.sqrt(5)] * 6 + [-1.0] * 9 + [1.0] * 9 + [math.sqrt(5)] * 6 + [3.0]
    assert_equal(adjacency, torch.tensor(expected, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("rows", "cols"), [(3, 3), (3, 4), (4, 4), (4, 8), (5, 7)])
def test_torus_is_the_product_of_two_cycles(rows, cols):
    topology = tp.torus(rows, cols)
    assert nx.is_isomorphic(topology.graph, nx.cartesian_product(nx.cycle_graph(rows), nx.cycle_graph(cols)))
    for row in range(rows):
        for col in range(cols):
            around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
            assert topology.neighbors(row * cols + col) == sorted(r % rows * cols + c % cols for r, c in around)


@pytest.mark.parametrize(("rows", "cols", "degree"), [(1, 1, 0), (1, 2, 1), (2, 1, 1), (2, 2, 2), (1, 5, 2), (2, 5, 3)])
def test_short_sides_of_a_torus_have_single_edges(rows, cols, degree):
    topology = tp.torus(rows, cols)
    assert all(len(topology.neighbors(agent)) == degree for agent in range(rows * cols))
    expected = 1 / (degree + 1)
    assert torch.allclose(topology.csr().weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


def test_a_torus_of_one_row_is_a_ring():
    for n in SIZES:
        assert tp.torus(1, n).cycle == tp.torus(n, 1).cycle == tp.ring(n).cycle


def test_the_circulant_of_the_authors_is_not_the_torus():
    circulant = tp.circulant(16, (1, 4)).graph
    assert set(dict(circulant.degree).values()) == {4}
    assert not nx.is_isomorphic(circulant, tp.torus(4, 4).graph)


@pytest.mark.parametrize("n", SIZES)
def test_named_graphs(n):
    assert nx.utils.graphs_equal(tp.complete(n).graph, nx.complete_graph(n))
    assert nx.utils.graphs_equal(tp.chain(n).graph, nx.path_graph(n))
    assert nx.utils.graphs_equal(tp.star(n).graph, nx.star_graph(n - 1))
    for agent in range(n):
        hops = [2**k for k in range(10) if 2**k < n]
        meets = {(agent + hop) % n for hop in hops} | {(agent - hop) % n for hop in hops}
        assert tp.exponential(n).neighbors(agent) == sorted(meets)
        assert tp.ring(n).neighbors(agent) == sorted({(agent + 1) % n, (agent - 1) % n} - {agent})


def test_hypercube_is_the_hypercube():
    for k in range(1, 6):
        assert nx.is_isomorphic(tp.hypercube(k).graph, nx.hypercube_graph(k))
    assert tp.hypercube(3).neighbors(5) == [1, 4, 7]
    assert tp.hypercube(0).matrix().tolist() == [[1.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.2, 1.0), st.integers(0, 2**32))
def test_erdos_renyi_is_a_function_of_its_seed(n, p, seed):
    topology = tp.erdos_renyi(n, p, seed)
    assert topology == tp.erdos_renyi(n, p, seed)
    assert nx.is_connected(topology.graph)


def test_erdos_renyi_has_as_many_edges_as_p_says():
    assert tp.erdos_renyi(20, 1.0, seed=0).cycle == tp.complete(20).cycle
    edges = [tp.erdos_renyi(40, 0.3, seed).graph.size() for seed in range(20)]
    assert len(set(edges)) > 5
    assert abs(np.mean(edges) - 0.3 * 780) < 4 * math.sqrt(780 * 0.21 / 20)


def test_erdos_renyi_near_the_threshold_draws_again():
    graphs = [tp.erdos_renyi(12, 0.15, seed).graph for seed in range(10)]
    assert all(nx.is_connected(graph) for graph in graphs)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), st.integers(2, 8), st.integers(0, 2**32))
def test_random_regular_is_regular_connected_and_a_function_of_its_seed(n, d, seed):
    if d >= n or n * d % 2:
        with pytest.raises(ValueError, match=f"random_regular\\({n}, {d}"):
            tp.random_regular(n, d, seed)
        return
    topology = tp.random_regular(n, d, seed)
    assert topology == tp.random_regular(n, d, seed)
    assert set(dict(topology.graph.degree).values()) == {d}
    assert nx.is_connected(topology.graph)


def test_other_seeds_give_other_graphs():
    assert len({tuple(tp.random_regular(20, 3, seed).graph.edges) for seed in range(5)}) == 5


def test_from_networkx_numbers_the_agents():
    shuffled = nx.Graph([(2, 0), (0, 1)])
    assert tp.from_networkx(shuffled).neighbors(0) == [1, 2]
    assert tp.from_networkx(nx.Graph([("b", "a"), ("a", "c")])).neighbors(1) == [0, 2]
    assert tp.from_networkx(nx.path_graph([7, 3, 5])).neighbors(1) == [0, 2]
    graph = nx.path_graph(3)
    topology = tp.from_networkx(graph)
    graph.add_edge(0, 2)
    assert topology.neighbors(0) == [1]


# Weights


def test_uniform_weights_where_the_graph_is_regular():
    for topology in (tp.ring(5), tp.torus(3, 4), tp.petersen(), tp.dyck(), tp.hypercube(3), tp.complete(6)):
        degree = len(topology.neighbors(0))
        weight = topology.csr().weight
        assert torch.equal(weight, torch.full_like(weight, 1 / (degree + 1)))
        assert topology.with_weights("uniform").cycle == topology.with_weights("metropolis").cycle == topology.cycle


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.floats(0.2, 1.0), st.integers(0, 1000))
def test_metropolis_weights_elsewhere(n, p, seed):
    topology = tp.erdos_renyi(n, p, seed)
    degree, W = topology.graph.degree, topology.matrix()
    for i, j in topology.graph.edges:
        assert W[i, j] == W[j, i] == 1 / (1 + max(degree[i], degree[j]))
    assert_equal(W.sum(1), torch.ones(n, dtype=torch.float64))
    assert (W.diagonal() > 0).all()


def test_uniform_weights_on_a_star_warn_of_the_lost_average():
    with pytest.warns(UserWarning, match=r"star\(4\)\.with_weights\('uniform'\).*not doubly stochastic"):
        star = tp.star(4).with_weights("uniform")
    expected = [[0.25] * 4, [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5]]
    assert_equal(star.matrix(), torch.tensor(expected, dtype=torch.float64))
    assert star.with_weights("metropolis").cycle == tp.star(4).cycle


def test_with_weights_replaces_lazy_weights_and_follows_time():
    assert tp.ring(5).lazy(0.5).with_weights("uniform").cycle == tp.ring(5).cycle
    matching = tp.random_matching(5, seed=1)
    assert matching.lazy(0.5).with_weights("uniform").cycle == matching.cycle
    alternating = tp.sequence([tp.ring(4), tp.star(4)])
    assert alternating.lazy(0.5).with_weights("metropolis").cycle == alternating.cycle
    assert alternating.with_weights("metropolis").period == 2


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda W: torch.tensor(W).to_sparse()])
def test_from_matrix_returns_what_it_was_given(convert):
    W = [[0.5, 0.5, 0.0], [0.5, 0.2, 0.3], [0.0, 0.3, 0.7]]
    topology = tp.from_matrix(convert(W))
    assert_equal(topology.matrix(), torch.tensor(W, dtype=torch.float64), 1e-7)
    assert topology.neighbors(0) == [1]


def test_from_matrix_keeps_a_copy():
    W = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    topology = tp.from_matrix(W)
    W.data.zero_()
    assert topology.matrix().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert not topology.matrix().requires_grad


def test_from_matrix_takes_float32_and_integers():
    third = torch.full((3, 3), 1 / 3, dtype=torch.float32)
    assert_equal(tp.from_matrix(third).matrix().sum(1), torch.ones(3, dtype=torch.float64))
    assert tp.from_matrix([[0, 1], [1, 0]]).lambda_min == -1


def test_optimal_weights_may_be_negative():
    # The best constant edge weight on a star is 2/(N + 1); the middle is then left with a negative diagonal.
    n = 6
    laplacian = torch.tensor(nx.to_numpy_array(nx.star_graph(n - 1)))
    laplacian = torch.diag(laplacian.sum(1)) - laplacian
    best = tp.from_matrix(torch.eye(n) - 2 / (n + 1) * laplacian)
    assert best.matrix()[0, 0] < 0
    assert best.spectral_gap == pytest.approx(2 / (n + 1))
    assert best.spectral_gap > tp.star(n).spectral_gap
    negative = [[0.6, 0.6, -0.2], [0.6, 0.0, 0.4], [-0.2, 0.4, 0.8]]
    assert_equal(tp.from_matrix(negative).matrix(), torch.tensor(negative, dtype=torch.float64))


def test_symmetric_weights_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.from_matrix(tp.star(5).matrix())


def test_asymmetric_but_doubly_stochastic_keeps_the_average():
    with pytest.warns(
        UserWarning, match="asymmetric; its columns sum to one, so the average over agents is kept"
    ) as seen:
        shift = tp.from_matrix([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])
    assert seen[0].filename == __file__
    assert shift.neighbors(0) == [1]
    assert sorted(shift.graph.edges) == [(0, 2), (1, 0), (2, 1)]
    assert shift.eigenvalues.dtype == torch.complex128


def test_asymmetric_and_not_doubly_stochastic_loses_the_average():
    with pytest.warns(UserWarning, match="not doubly stochastic.*weighted average"):
        topology = tp.from_matrix([[0.5, 0.5], [0.25, 0.75]])
    assert_equal(torch.linalg.matrix_power(topology.matrix(), 99)[0], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_a_dense_asymmetric_matrix_of_many_agents_takes_no_longer_than_its_entries():
    """A graph of two million edges as Python objects took half a minute."""
    W = torch.rand(1500, 1500, dtype=torch.float64)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="asymmetric"):
        many = tp.from_matrix(W / W.sum(1, keepdim=True))
    assert len(many.neighbors(7)) == 1499
    assert time.perf_counter() - start < 10


def test_one_way_is_not_connected():
    """Agent 0 hears all, and nobody hears it; or the other way round."""
    heard = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    for W in (heard, heard.flip(0, 1)):
        with pytest.raises(ValueError, match=r"not strongly connected.*3 components"):
            tp.from_matrix(W)


# Spectra


def descending(values):
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@every_static
def test_eigenvalues_are_those_of_the_matrix(topology):
    eigenvalues = topology.eigenvalues
    assert eigenvalues.dtype == torch.float64
    assert torch.equal(eigenvalues, eigenvalues.sort(descending=True).values)
    assert_equal(eigenvalues, torch.linalg.eigvalsh(topology.matrix()).flip(0), 1e-12)
    eigenvalues.zero_()
    assert topology.eigenvalues[0] == pytest.approx(1)


@every_static
def test_lambda_2_lambda_min_and_gap_agree_with_the_eigenvalues(topology):
    rest = torch.linalg.eigvalsh(topology.matrix())[:-1].tolist() or [0.0]
    assert topology.lambda_2 == pytest.approx(max(rest), abs=1e-12)
    assert topology.lambda_min == pytest.approx(min(rest), abs=1e-12)
    assert topology.spectral_gap == pytest.approx(1 - max(map(abs, rest)), abs=1e-12)


@pytest.mark.parametrize("n", [3, 4, 5, 16, 101, 5000])
def test_spectrum_of_the_ring(n):
    expected = descending((1 + 2 * math.cos(2 * math.pi * k / n)) / 3 for k in range(n))
    assert_equal(tp.ring(n).eigenvalues, expected, 1e-13)


@pytest.mark.parametrize(("rows", "cols"), [(3, 3), (3, 7), (4, 8), (60, 50)])
def test_spectrum_of_the_torus(rows, cols):
    def cosine(k, n):
        return 2 * math.cos(2 * math.pi * k / n)

    expected = descending((1 + cosine(j, rows) + cosine(k, cols)) / 5 for j in range(rows) for k in range(cols))
    assert_equal(tp.torus(rows, cols).eigenvalues, expected, 1e-13)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_spectrum_of_the_hypercube(k):
    expected = descending((1 + k - 2 * ones) / (k + 1) for ones in range(k + 1) for _ in range(math.comb(k, ones)))
    assert_equal(tp.hypercube(k).eigenvalues, expected, 1e-13)


def test_spectra_of_petersen_dyck_chain_and_star():
    assert_equal(tp.petersen().eigenvalues, descending([1.0] + [0.5] * 5 + [-0.25] * 4), 1e-14)
    assert tp.dyck().lambda_2 == pytest.approx((1 + math.sqrt(5)) / 4)
    assert tp.dyck().lambda_min == pytest.approx(-1 / 2)
    expected = descending((1 + 2 * math.cos(math.pi * k / 9)) / 3 for k in range(9))
    assert_equal(tp.chain(9).eigenvalues, expected, 1e-14)
    assert tp.star(9).lambda_2 == pytest.approx(8 / 9)
    assert tp.star(9).lambda_min == pytest.approx(0, abs=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.floats(0.3, 1.0), st.floats(0.05, 1.0), st.integers(0, 100))
def test_lazy_moves_the_spectrum_towards_one(n, p, gamma, seed):
    topology = tp.erdos_renyi(n, p, seed)
    assert_equal(topology.lazy(gamma).eigenvalues, 1 + gamma * (topology.eigenvalues - 1), 1e-12)


def test_a_directed_ring_has_a_complex_spectrum():
    n = 7
    with pytest.warns(UserWarning, match="asymmetric"):
        topology = tp.from_matrix((torch.eye(n) + torch.eye(n).roll(1, 1)) / 2)
    root = complex(math.cos(2 * math.pi / n), math.sin(2 * math.pi / n))
    expected = sorted(((1 + root**k) / 2 for k in range(n)), key=lambda value: -value.real)
    assert topology.eigenvalues.real.tolist() == pytest.approx([value.real for value in expected])
    assert topology.eigenvalues.abs().tolist() == pytest.approx([abs(value) for value in expected])
    assert topology.lambda_2 == pytest.approx(expected[1].real)
    assert topology.lambda_min == pytest.approx(expected[-1].real)
    assert topology.spectral_gap == pytest.approx(1 - abs(expected[1]))


def test_the_spectrum_is_computed_once(monkeypatch):
    calls = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda W: calls.append(1) or eigvalsh(W))
    topology = tp.star(6)
    assert calls == []
    assert topology.lambda_2 > topology.lambda_min
    assert topology.spectral_gap > 0
    assert len(topology.eigenvalues) == 6
    assert calls == [1]


@pytest.mark.parametrize("name", ["eigenvalues", "lambda_2", "lambda_min", "spectral_gap"])
def test_a_time_varying_topology_has_no_single_spectrum(name):
    for topology in (tp.random_matching(4, 0), tp.one_peer_exponential(4)):
        with pytest.raises(RuntimeError, match=r"changes from step to step and has no single spectrum"):
            getattr(topology, name)


# Time-varying topologies


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 16])
def test_one_peer_exponential(n):
    topology = tp.one_peer_exponential(n)
    period = max(1, math.ceil(math.log2(n)))
    assert topology.period == period
    assert topology.is_static == (n <= 2)
    for step in range(2 * period + 1):
        expected = identity(topology) / 2
        for agent in range(n):
            expected[agent, (agent + 2 ** (step % period)) % n] += 0.5
        assert torch.equal(topology.matrix(step), expected)
        assert topology.csr(step) is topology.csr(step % period)


@pytest.mark.parametrize("k", range(1, 6))
def test_one_peer_exponential_averages_exactly_in_log2_steps(k):
    topology, n = tp.one_peer_exponential(2**k), 2**k
    product = torch.linalg.multi_dot([*(topology.matrix(step) for step in range(k)), identity(topology)])
    assert torch.equal(product, torch.full((n, n), 1 / n, dtype=torch.float64))
    assert topology.graph.is_directed() == (k > 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 10**12))
def test_random_matching_pairs_all_agents_but_at_most_one(n, seed, step):
    W = tp.random_matching(n, seed).matrix(step)
    assert torch.equal(W, W.T)
    assert torch.equal(W @ W, W)  # pairs that average: a projection
    assert int((W.diagonal() == 1).sum()) == n % 2
    assert set(W.flatten().tolist()) <= {0.0, 0.5, 1.0}


def test_random_matching_depends_on_seed_and_step_alone():
    topology = tp.random_matching(12, seed=5)
    steps = [7, 3, 3, 900, 0, 7]
    matrices = [topology.matrix(step) for step in steps]
    drawn._drawn.cache_clear()
    for step, matrix in sorted(zip(steps, matrices, strict=True), key=lambda pair: pair[0]):
        assert torch.equal(tp.random_matching(12, seed=5).matrix(step), matrix)
    assert len({tuple(tp.random_matching(12, 5).matrix(step).flatten().tolist()) for step in range(40)}) > 35
    assert not torch.equal(tp.random_matching(12, 6).matrix(0), tp.random_matching(12, 5).matrix(0))
    assert topology.period is None
    assert not topology.is_static


def test_random_matchings_are_uniform():
    topology, draws = tp.random_matching(4, seed=0), 600
    met = sum((topology.matrix(step) for step in range(draws)), start=torch.zeros(4, 4, dtype=torch.float64))
    pairs = 2 * met[~torch.eye(4, dtype=torch.bool)] / draws  # each of the three matchings has probability 1/3
    assert (pairs - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / draws)
    assert nx.utils.graphs_equal(topology.graph, nx.complete_graph(4))


def test_random_matchings_do_not_pile_up():
    topology = tp.random_matching(4, seed=0)
    for step in range(300):
        topology.csr(step)
    assert drawn._drawn.cache_info().currsize <= 64


def test_sequence_takes_turns():
    ring, star, matching, peer = tp.ring(4), tp.star(4), tp.random_matching(4, 2), tp.one_peer_exponential(4)
    topology = tp.sequence([ring, star])
    assert topology.period == 2
    for step in range(6):
        assert topology.csr(step) is [ring, star][step % 2].csr()
    assert nx.utils.graphs_equal(topology.graph, nx.compose(ring.graph, star.graph))

    topology = tp.sequence([ring, peer, star])
    assert topology.period == 6
    for turn in range(5):
        assert topology.csr(3 * turn) is ring.csr()
        assert topology.csr(3 * turn + 1) is peer.csr(turn)
        assert topology.csr(3 * turn + 2) is star.csr()

    topology = tp.sequence([peer, matching])
    assert topology.period is None
    assert [topology.csr(2 * turn) for turn in range(2)] == [peer.csr(0), peer.csr(1)]
    drawn = {tuple(topology.csr(2 * turn + 1).neighbor.tolist()) for turn in range(20)}
    assert len(drawn) == 3


def test_sequence_of_one_static_topology_is_static():
    topology = tp.sequence([tp.ring(5)])
    assert topology.is_static
    assert torch.equal(topology.eigenvalues, tp.ring(5).eigenvalues)
    assert topology.spectral_gap == tp.ring(5).spectral_gap


def test_sequence_connects_in_union():
    evens = tp.from_matrix([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]], connected=False)
    odds = tp.from_networkx(nx.Graph([(0, 3), (1, 2)]), connected=False)
    assert evens.spectral_gap == pytest.approx(0, abs=1e-15)
    assert tp.sequence([evens, odds]).matrix(1).tolist() == odds.matrix().tolist()
    with pytest.raises(
        ValueError, match=r"sequence.*not connected.*2 components, of sizes 2 with agent 0, 2 with agent 2"
    ):
        tp.sequence([evens, evens])
    assert tp.sequence([evens, tp.random_matching(4, 0)]).period is None


def test_idle_agents_keep_what_they_have():
    graph = nx.Graph([(0, 1)])
    graph.add_node(2)
    topology = tp.from_networkx(graph, connected=False)
    assert topology.matrix().tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert topology.with_weights("uniform").cycle == topology.cycle


# Agents that leave


@every_topology
def test_those_who_are_left_keep_their_pairs_and_the_average(topology):
    n = topology.num_agents
    if n == 1:
        return
    gone = sorted({0, n // 2} if n > 2 else {1})
    left = [agent for agent in range(n) if agent not in gone]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some fall apart
        rest = topology.without(gone)
    assert rest.name == f"{topology.name}.without({gone})"
    assert (rest.num_agents, rest.period) == (len(left), topology.period)
    for step in range(topology.period or 3):
        W, before = rest.matrix(step), topology.matrix(step)[left][:, left]
        ones = torch.ones(len(left), dtype=torch.float64)
        assert_equal(W, W.T)
        assert_equal(W.sum(1), ones)
        assert (W >= 0).all()
        if topology.period is not None:
            talked = (before != 0) | (before.T != 0)
            off_diagonal = ~torch.eye(len(left), dtype=torch.bool)
            assert torch.equal(W[off_diagonal] != 0, talked[off_diagonal])


def test_metropolis_weights_of_those_who_are_left():
    with pytest.warns(UserWarning, match="falls into") as caught:
        rest = tp.ring(16).without([7, 3, 3])
    assert repr(rest) == "ring(16).without([3, 7])"
    (warning,) = caught
    assert str(warning.message) == (
        "ring(16) without [3, 7] falls into 2 components, of sizes 11 with agent 0, 3 with agent 4"
    )
    expected = nx.path_graph([8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2])
    expected.add_edges_from([(4, 5), (5, 6)])
    left = [agent for agent in range(16) if agent not in (3, 7)]
    number = {agent: place for place, agent in enumerate(left)}
    assert nx.utils.graphs_equal(rest.graph, nx.relabel_nodes(nx.Graph(sorted(expected.edges)), number))
    for i, j in rest.graph.edges:
        assert rest.matrix()[i, j] == 1 / (1 + max(rest.graph.degree[i], rest.graph.degree[j]))


def test_gamma_survives_and_other_weights_do_not():
    assert tp.complete(5).lazy(0.5).without([4]).cycle == tp.complete(4).lazy(0.5).cycle
    assert tp.complete(5).lazy(0.5).lazy(0.5).without([4]).without([0]).cycle == tp.complete(3).lazy(0.25).cycle
    assert pickle.loads(pickle.dumps(tp.complete(5).lazy(0.5))).without([4]).cycle == tp.complete(4).lazy(0.5).cycle
    assert tp.random_matching(5, seed=1).lazy(0.5).without([4]).cycle == tp.random_matching(4, 1).lazy(0.5).cycle
    W = [[0.1, 0.4, 0.5], [0.4, 0.2, 0.4], [0.5, 0.4, 0.1]]
    assert tp.from_matrix(W).without([1]).cycle == tp.ring(2).cycle


def test_one_way_pairs_become_two_way():
    rest = tp.one_peer_exponential(8).without([5])
    assert not rest.graph.is_directed()
    assert rest.neighbors(0, step=0) == [1, 6]  # agents 1 and 7 of before
    assert rest.neighbors(4, step=0) == [3]
    assert rest.period == 3


def test_matchings_are_drawn_among_those_who_are_left():
    rest = tp.random_matching(7, seed=2).without([0, 6, 1])
    assert all(len(rest.neighbors(agent, step)) == 1 for agent in range(4) for step in range(10))
    assert tp.random_matching(3, seed=2).without([0, 2]).matrix(5).tolist() == [[1.0]]


def test_many_components_are_listed_in_part():
    with pytest.warns(UserWarning, match=r"star\(30\) without \[0\] falls into 29 components, of sizes 1 .* 8, …$"):
        tp.star(30).without([0])


@pytest.mark.parametrize(
    ("agents", "error", "message"),
    [
        ([5], ValueError, r"ring\(5\) has no agent 5; its agents are 0 … 4"),
        ([-1], ValueError, r"ring\(5\)\.without: agent must be at least 0, got -1"),
        ([1.5], TypeError, r"agent must be an integer, got 1\.5"),
        (range(5), ValueError, r"nobody is left of 5 agents"),
    ],
)
def test_only_agents_that_are_there_can_leave(agents, error, message):
    with pytest.raises(error, match=message):
        tp.ring(5).without(agents)


# Bad input


@pytest.mark.parametrize(
    "make",
    [
        *(tp.ring, tp.complete, tp.chain, tp.star, tp.exponential, tp.one_peer_exponential),
        *(lambda n: tp.torus(n, 3), lambda n: tp.torus(3, n), lambda n: tp.circulant(n, (1,))),
        *(lambda n: tp.erdos_renyi(n, 0.5, 0), lambda n: tp.random_regular(n, 2, 0)),
        *(lambda n: tp.random_matching(n, 0), tp.base),
        *(lambda n: tp.equi_static(n, 2, 0), lambda n: tp.equi_dynamic(n, 0)),
    ],
)
def test_sizes_are_positive_integers(make):
    for size in (2.5, 4.0, True, "4", None, float("nan")):
        with pytest.raises(TypeError, match=f"must be an integer, got {size!r}"):
            make(size)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"must be at least 1, got {size}"):
            make(size)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tp.hypercube(-1), ValueError, "hypercube: k must be at least 0, got -1"),
        (lambda: tp.torus(0, 3), ValueError, "torus: rows must be at least 1, got 0"),
        (lambda: tp.circulant(8, (0,)), ValueError, "circulant: offset must be at least 1, got 0"),
        (lambda: tp.circulant(8, (1, 8)), ValueError, "circulant: offset 8 must be below n = 8"),
        (lambda: tp.circulant(8, 2), TypeError, r"circulant: offsets must be integers in .*, such as \(1, 2\), got 2"),
        (lambda: tp.circulant(8, (1.0,)), TypeError, "circulant: offset must be an integer, got 1.0"),
        (lambda: tp.circulant(6, (2, 4)), ValueError, r"circulant\(6, \(2, 4\)\) is not connected"),
        (lambda: tp.circulant(3, ()), ValueError, r"falls into 3 components, of sizes 1 with agent 0, 1 with agent 1"),
        (lambda: tp.erdos_renyi(8, 1.5, 0), ValueError, r"erdos_renyi: p must be in \[0, 1\], got 1.5"),
        (lambda: tp.erdos_renyi(8, float("nan"), 0), ValueError, r"p must be in \[0, 1\], got nan"),
        (lambda: tp.erdos_renyi(8, "0.5", 0), TypeError, "erdos_renyi: p must be a number, got '0.5'"),
        (lambda: tp.erdos_renyi(8, 0.5, -1), ValueError, "erdos_renyi: seed must be at least 0, got -1"),
        (lambda: tp.erdos_renyi(8, 0.5, None), TypeError, "erdos_renyi: seed must be an integer, got None"),
        (lambda: tp.erdos_renyi(16, 0.01, 0), ValueError, r"none of 1000 draws is connected; p is too small.*= 0\.17"),
        (lambda: tp.erdos_renyi(2, 1e-300, 0), ValueError, "p is too small"),
        (lambda: tp.random_regular(4, 4, 0), ValueError, "the degree d must be below n"),
        (lambda: tp.random_regular(5, 3, 0), ValueError, r"n \* d must be even, got 15"),
        (lambda: tp.random_regular(6, 1, 0), ValueError, "6 agents of degree 1 cannot be connected, take d >= 2"),
        (lambda: tp.random_regular(6, 0, 0), ValueError, "6 agents of degree 0 cannot be connected"),
        (lambda: tp.base(6, 0), ValueError, "base: k must be at least 1, got 0"),
        (lambda: tp.base(6, 6), ValueError, "base: k = 6 must be below n = 6, an agent has no more neighbours"),
        (lambda: tp.base(1, 2), ValueError, "base: k = 2 must be below n = 1"),
        (lambda: tp.base(6, 1.0), TypeError, "base: k must be an integer, got 1.0"),
        (lambda: tp.equi_static(6, 3, 0), ValueError, r"degree must be even.*at most 2 \(n - 1\), got 3 with n = 6"),
        (lambda: tp.equi_static(6, 12, 0), ValueError, "got 12 with n = 6"),
        (lambda: tp.equi_static(6, 6, 0, directed=True), ValueError, "degree must be below n, got 6 with n = 6"),
        (lambda: tp.equi_static(6, 0, 0), ValueError, "equi_static: degree must be at least 1, got 0"),
        (lambda: tp.equi_dynamic(6, 0, eta=0), ValueError, r"equi_dynamic: eta must be in \(0, 1\], got 0.0"),
        (lambda: tp.equi_dynamic(6, 0, eta=NAN), ValueError, r"eta must be in \(0, 1\], got nan"),
        (lambda: tp.equi_dynamic(6, 0, eta="1"), TypeError, "equi_dynamic: eta must be a number, got '1'"),
        (lambda: tp.random_matching(6, 1.5), TypeError, "random_matching: seed must be an integer, got 1.5"),
    ],
)
def test_bad_graphs_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("W", "error", "message"),
    [
        (None, TypeError, r"from_matrix: W must be an \[N, N\] matrix of real numbers"),
        ("ring", TypeError, r"from_matrix: W must be an \[N, N\] matrix of real numbers"),
        ([[1.0], [0.5, 0.5]], ValueError, r"from_matrix: W must be an \[N, N\] matrix of real numbers"),
        ([[1j]], TypeError, "W must hold real numbers, got torch.complex128"),
        ([[True]], TypeError, "W must hold real numbers, got torch.bool"),
        (1.0, ValueError, r"W must be square, \[N, N\] with N >= 1, got shape \(\)"),
        ([1.0, 0.0], ValueError, r"W must be square.*got shape \(2,\)"),
        ([[0.5, 0.5]], ValueError, r"W must be square.*got shape \(1, 2\)"),
        (np.zeros((0, 0)), ValueError, r"W must be square.*got shape \(0, 0\)"),
        (np.zeros((2, 2, 2)), ValueError, r"W must be square.*got shape \(2, 2, 2\)"),
        ([[0.5, 0.5], [NAN, 1.0]], ValueError, r"W\[1, 0\] is nan; every entry must be finite"),
        ([[0.5, INF], [0.5, 0.5]], ValueError, r"W\[0, 1\] is inf; every entry must be finite"),
        ([[0.5, 0.5], [0.5, 0.4]], ValueError, "row 1 of W sums to 0.9, expected 1$"),
        ([[0.5, 0.6], [0.5, 0.4]], ValueError, r"row 0 of W sums to 1.1, expected 1 \(2 such rows\)"),
        ([[0.5, 0.5], [-0.5, -0.5]], ValueError, "row 1 of W sums to -1, a negative row sum, expected 1"),
        ([[-1.0, 2.0], [2.0, -1.0]], ValueError, r"eigenvalue -3 outside the unit circle.*W\[0, 0\] = -1"),
        ([[2.0, -1.0], [-1.0, 2.0]], ValueError, r"eigenvalue 3 outside the unit circle"),
        (
            np.eye(3),
            ValueError,
            r"not connected.*3 components, of sizes 1 with agent 0, 1 with agent 1.*connected=False",
        ),
        (np.eye(20), ValueError, r"20 components, of sizes .*1 with agent 7, …"),
        (
            [[1, 0], [0.5, 0.5]],
            ValueError,
            r"not strongly connected.*2 components, of sizes 1 with agent 0, 1 with agent 1",
        ),
    ],
    ids=str,
)
def test_bad_matrices_are_named(W, error, message):
    with pytest.raises(error, match=message):
        tp.from_matrix(W)


def test_components_are_listed_with_their_sizes():
    graph = nx.disjoint_union(nx.path_graph(3), nx.cycle_graph(4))
    with pytest.raises(ValueError, match=r"2 components, of sizes 3 with agent 0, 4 with agent 3; .*connected=False"):
        tp.from_networkx(graph)


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (nx.DiGraph([(0, 1)]), TypeError, "expected an undirected networkx.Graph, got DiGraph"),
        (nx.MultiGraph([(0, 1)]), TypeError, "expected an undirected networkx.Graph, got MultiGraph"),
        ([(0, 1)], TypeError, "expected an undirected networkx.Graph, got list"),
        (nx.Graph(), ValueError, "the graph has no node"),
        (nx.Graph([("a", "b"), ("b", "b")]), ValueError, "node 'b' has a self loop"),
    ],
)
def test_bad_networkx_graphs_are_named(graph, error, message):
    with pytest.raises(error, match=f"from_networkx: {message}"):
        tp.from_networkx(graph)


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([], ValueError, "expected at least one topology, got none"),
        ([tp.ring(3), "ring(3)"], TypeError, "expected topologies, got str at place 1"),
        ([tp.ring(3), tp.ring(4)], ValueError, r"ring\(4\) at place 1 has 4 agents, ring\(3\) at place 0 has 3"),
    ],
)
def test_bad_sequences_are_named(members, error, message):
    with pytest.raises(error, match=f"sequence: {message}"):
        tp.sequence(members)


@pytest.mark.parametrize("gamma", [0, -0.5, 1.5, NAN, INF])
def test_gamma_is_in_the_half_open_unit_interval(gamma):
    with pytest.raises(ValueError, match=r"ring\(4\)\.lazy: gamma must be in \(0, 1\], got"):
        tp.ring(4).lazy(gamma)


@pytest.mark.parametrize("gamma", ["0.5", None, True])
def test_gamma_is_a_number(gamma):
    with pytest.raises(TypeError, match=r"ring\(4\)\.lazy: gamma must be a number"):
        tp.ring(4).lazy(gamma)


def test_weights_need_a_known_name_and_an_undirected_graph():
    with pytest.raises(ValueError, match=r"ring\(4\): unknown weights 'best'; known are 'metropolis', 'uniform'"):
        tp.ring(4).with_weights("best")
    with pytest.raises(ValueError, match="unknown weights"):
        tp.random_matching(4, 0).with_weights("best")
    with pytest.raises(ValueError, match="the graph is directed; uniform weights need an undirected one"):
        tp.one_peer_exponential(5).with_weights("uniform")


@every_topology
def test_agents_and_steps_are_in_range(topology):
    n = topology.num_agents
    with pytest.raises(ValueError, match=f"has no agent {n}; its agents are 0 … {n - 1}"):
        topology.neighbors(n)
    with pytest.raises(ValueError, match="agent must be at least 0, got -1"):
        topology.neighbors(-1)
    for ask in (topology.matrix, topology.csr, lambda step: topology.neighbors(0, step)):
        with pytest.raises(ValueError, match="step must be at least 0, got -1"):
            ask(-1)
        with pytest.raises(TypeError, match=r"step must be an integer, got 0\.5"):
            ask(0.5)
