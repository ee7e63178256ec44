"""Costs on a network: times against a simulation message by message, steps to a target against drawn runs."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gut_fast import reference
from gut_fast import topology as topologies
from gut_fast.cli.network import make_question, measured_table, parse_sizes, show_comparison, write_sizes
from gut_fast.cli.terminal import console_of_text
from gut_fast.rules import RULES, get_rule
from gut_fast.study import network as networks
from gut_fast.study import quadratics, units
from gut_fast.study.network import (
    Network,
    allreduce_seconds,
    bytes_per_step,
    compare,
    measured,
    round_ends,
    step_seconds,
)
from gut_fast.study.quadratics import EXACT_AVERAGE, Quadratics, consensus_quadrature, excess_losses, steps_to_target
from gut_fast.study.results import Results

PLAIN = Network(bandwidth=1e6, latency=0.002, compute=0.05)
STRAGGLING = dataclasses.replace(
    PLAIN,
    overlap=0.5,
    straggler_probability=0.3,
    straggler_factor=4.0,
    link_straggler_probability=0.2,
    link_straggler_factor=3.0,
)
MESSAGE = 1e4

SMALL = [
    topologies.ring(5),
    topologies.star(6),
    topologies.chain(2),
    topologies.complete(1),
    topologies.one_peer_exponential(6),
    topologies.random_matching(5, seed=3),
    topologies.sequence([topologies.ring(4), topologies.star(4)]),
]


def events(topology, network, message_bytes, num_rounds, seed, local_steps):
    """The ends of the rounds, agent by agent and message by message, with the draws of the library."""
    rng = np.random.default_rng(seed)
    starts = [0.0] * topology.num_agents
    for number in range(num_rounds):
        receivers = {i: [] for i in range(topology.num_agents)}
        for i in range(topology.num_agents):
            for j in topology.neighbors(i, number):
                receivers[j].append(i)
        draws = [network.compute * network.slowness(rng, topology.num_agents) for _ in range(local_steps)]
        starts = [start + sum(before) for start, *before in zip(starts, *draws[:-1], strict=True)]
        computing = draws[-1]
        slow = iter(network.slowness(rng, sum(map(len, receivers.values())), of_links=True))
        ends = [start + time for start, time in zip(starts, computing, strict=True)]
        arrivals = []
        for j in range(topology.num_agents):
            computed = starts[j] + computing[j]
            port_is_free = computed - network.overlap * computing[j]
            for i in sorted(receivers[j]):
                factor = next(slow)
                port_is_free += factor * message_bytes / network.bandwidth
                left = max(port_is_free, computed)
                ends[j] = max(ends[j], left)
                arrivals.append((i, left + factor * network.latency))
        for i, arrived in arrivals:
            ends[i] = max(ends[i], arrived)
        starts = ends
        yield ends


@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("network", [PLAIN, STRAGGLING], ids=["plain", "straggling"])
def test_the_recursion_is_that_of_single_messages(network, H):
    for topology in SMALL:
        simulated = itertools.islice(round_ends(topology, network, MESSAGE, seed=7, local_steps=H), 9)
        for ends, expected in zip(simulated, events(topology, network, MESSAGE, 9, seed=7, local_steps=H), strict=True):
            np.testing.assert_allclose(ends, expected, rtol=1e-12, err_msg=topology.name)


@pytest.mark.parametrize(
    ("topology", "degree"),
    [
        (topologies.ring(16), 2),
        (topologies.petersen(), 3),
        (topologies.exponential(16), 7),
        (topologies.one_peer_exponential(16), 1),
    ],
    ids=str,
)
def test_without_stragglers_the_time_is_the_closed_form(topology, degree):
    for overlap, message_bytes, H in itertools.product((0.0, 0.5, 1.0), (0.0, MESSAGE), (1, 4)):
        network = dataclasses.replace(PLAIN, overlap=overlap)
        expected = max(H * 0.05, (H - overlap) * 0.05 + degree * message_bytes / 1e6) + 0.002
        seconds = step_seconds(topology, network, message_bytes, local_steps=H)
        assert seconds == pytest.approx(expected / H, rel=1e-9)
    assert bytes_per_step(topology, MESSAGE) == degree * MESSAGE
    assert bytes_per_step(topology, MESSAGE, 4) == degree * MESSAGE / 4


def test_stragglers_cost_more_where_more_neighbors_are_waited_for():
    network = Network(1e9, compute=1.0, straggler_probability=0.05, straggler_factor=5.0)
    alone, ring, complete = (
        step_seconds(topology, network, 0.0, num_rounds=2000)
        for topology in (topologies.ring(1), topologies.ring(32), topologies.complete(32))
    )
    barrier = allreduce_seconds(32, network, 0.0)
    assert alone == pytest.approx(1.2)
    assert barrier == pytest.approx(1 + 4 * (1 - 0.95**32))
    assert complete == pytest.approx(barrier, rel=0.03)  # the mean of 1,000 independent steps
    assert alone < ring < 0.95 * complete


@pytest.mark.parametrize("num_agents", [1, 2, 16, 1000])
def test_allreduce_is_hockneys_formula(num_agents):
    rounds = 2 * (num_agents - 1)
    assert allreduce_seconds(num_agents, PLAIN, 1e6) == pytest.approx(0.05 + rounds * (0.002 + 1 / num_agents))
    depth = math.ceil(math.log2(num_agents))
    tree = 0.05 + 2 * depth * 0.002 + 2 * (1 - 2.0**-depth)
    assert allreduce_seconds(num_agents, PLAIN, 1e6, "tree") == pytest.approx(tree)
    hidden = dataclasses.replace(PLAIN, overlap=1.0, compute=5.0)  # all but the latencies
    assert allreduce_seconds(num_agents, hidden, 1e6) == pytest.approx(5.0 + rounds * 0.002)


@pytest.mark.parametrize("algorithm", networks.ALLREDUCE)
def test_straggling_links_slow_an_allreduce_between_their_factor_and_none(algorithm):
    always = dataclasses.replace(PLAIN, link_straggler_probability=1.0, link_straggler_factor=3.0)
    rarely = dataclasses.replace(always, link_straggler_probability=0.05)
    plain, slow, slowest = (
        allreduce_seconds(300, network, 1e6, algorithm) - 0.05 for network in (PLAIN, rarely, always)
    )
    assert plain < 1.01 * plain < slow < slowest
    assert slowest == pytest.approx(3 * plain)


def test_a_hundred_thousand_agents():
    topology = topologies.ring(100_000)
    seconds = step_seconds(topology, dataclasses.replace(STRAGGLING, overlap=0.0), MESSAGE, num_rounds=20)
    assert 0.072 < seconds < 4 * 0.05 + 3 * 0.022
    problem = Quadratics(target=0.6)
    found = steps_to_target("dsgd", consensus_quadrature(topology), 100_000, problem, max_steps=500)
    assert math.isfinite(found.steps)


@pytest.mark.parametrize(
    ("name", "H"), [*((name, 1) for name in RULES), *((name, 3) for name in ("gut", "gutm", "gradient_tracking"))]
)
def test_the_expected_loss_is_that_of_drawn_runs(name, H):
    """The noise and the agents' own optima are drawn; 2,000 columns are as many runs at once."""
    rule, num_runs = get_rule(name), 2000
    problem = Quadratics(curvatures=(1.0, 0.2), noise=0.5, heterogeneity=0.7)
    setting = {"lr": 0.1} | ({"mu": 0.25} if "mu" in rule.hyperparameters else {})
    setting |= {"momentum": 0.5} if "momentum" in rule.hyperparameters else {}
    h = torch.tensor(problem.curvatures, dtype=torch.float64).repeat_interleave(num_runs)
    for topology in (topologies.ring(6), topologies.one_peer_exponential(6)):
        generator = torch.Generator().manual_seed(0)
        own = torch.randn(topology.num_agents, len(h), dtype=torch.float64, generator=generator)
        own = problem.heterogeneity * (own - own.mean(0))
        z = torch.ones_like(own)
        state = reference.zero_state(rule, z)
        expected = excess_losses(rule, [setting], consensus_quadrature(topology), topology.num_agents, problem, H)
        for number in range(15 // H):
            for kind in [*[{"is_local": True}] * (H - 1), {"drift_lr": H * setting["lr"]}]:
                noise = problem.noise * torch.randn(z.shape, dtype=torch.float64, generator=generator)
                gradient, W = h * (z + own + noise), topology.matrix(number)
                z, state = reference.step(rule, {**setting, **kind}, z, state, gradient, W)
            assert next(expected).item() == pytest.approx(z.square().mean().item(), rel=0.03)


def test_the_quadrature_reproduces_the_spectrum():
    for topology in (topologies.ring(600), topologies.torus(20, 30), topologies.random_regular(600, 4, seed=1)):
        (nodes,), weights = consensus_quadrature(topology)
        eigenvalues = topology.eigenvalues[1:].numpy()
        assert len(nodes) <= quadratics.NUM_NODES
        exact = topology.cycle[0].group is not None
        for power in range(8):
            mean = (eigenvalues**power).sum() / 600
            assert weights @ nodes**power == pytest.approx(mean, rel=1e-9 if exact else 0.15, abs=1e-12)


def test_where_the_steps_are_not_known_the_spectrum_is_none():
    assert consensus_quadrature(topologies.random_matching(4, seed=0)) is None
    assert consensus_quadrature(topologies.sequence([topologies.ring(4), topologies.star(4)])) is None
    assert consensus_quadrature(topologies.sequence([topologies.ring(4), topologies.complete(4)])) is not None
    assert math.isnan(steps_to_target("gut", None, 4, Quadratics()).steps)


def test_steps_to_a_target_follow_theory():
    def steps(topology, rule="dsgd", target=0.2, **problem):
        quadrature, problem = consensus_quadrature(topology), Quadratics(target=target, **problem)
        return steps_to_target(rule, quadrature, topology.num_agents, problem, max_steps=1000).steps

    ring = topologies.ring(16)
    assert steps(ring, target=0.4) <= steps(ring, target=0.2) <= steps(ring, target=0.1)
    assert steps(topologies.complete(16)) <= steps(topologies.exponential(16)) <= steps(ring)
    assert steps(topologies.complete(64)) <= steps(topologies.complete(16)) <= steps(topologies.complete(4))
    assert steps(ring, heterogeneity=0.0) < steps(ring, heterogeneity=2.0)
    assert steps(ring, "gut", heterogeneity=2.0) < steps(ring, "dsgd", heterogeneity=2.0)
    assert steps(ring, noise=1e3) == math.inf
    for rule in networks.METHODS:
        exact = steps_to_target(rule, EXACT_AVERAGE, 8, Quadratics(target=0.2)).steps
        assert steps(topologies.complete(8), rule) == exact


@pytest.fixture(scope="module")
def question():
    return make_question("1Mbit", "2ms", "50ms", "10kB", target=0.5, straggler_probability=0.01)


def test_a_comparison_multiplies_steps_by_what_a_step_costs():
    question = make_question("1MB/s", "2ms", "50ms", "10kB", target=0.5)
    costs = compare(8, question, topologies.random_matching(8, seed=0))
    assert len(set(costs["topology"])) == 9
    assert list(costs["topology"][:5]) == ["random_matching(8, seed=0)"] * 5
    by_place = costs.set_index(["topology", "method"])
    gut, tracking = by_place.loc["ring(8)", "gut"], by_place.loc["ring(8)", "gradient_tracking"]
    assert tracking["bytes_per_step"] == 2 * gut["bytes_per_step"] == 4 * MESSAGE
    assert gut["seconds_per_step"] == pytest.approx(0.072)
    assert tracking["seconds_per_step"] == pytest.approx(0.092)
    assert gut["seconds_to_target"] == gut["steps_to_target"] * gut["seconds_per_step"]
    assert gut["bytes_to_target"] == gut["steps_to_target"] * 2 * MESSAGE
    assert gut["lr"] in quadratics.LEARNING_RATES
    assert gut["mu"] in quadratics.MUS
    assert math.isnan(by_place.loc["ring(8)", "dsgd"]["mu"])
    unknown = by_place.loc["random_matching(8, seed=0)", "gut"]
    assert math.isnan(unknown["seconds_to_target"])
    assert unknown["seconds_per_step"] == pytest.approx(0.062)
    assert by_place.loc["all-reduce, ring", "dsgd"]["bytes_per_step"] == pytest.approx(2 * 7 / 8 * MESSAGE)
    assert by_place.loc["all-reduce, tree", "dsgd"]["bytes_per_step"] == pytest.approx(2 * 7 / 8 * MESSAGE)


def test_local_steps_divide_bytes_and_lengthen_the_way_to_the_target():
    every, rare = (compare(8, make_question("1MB/s", "2ms", "50ms", "10kB", target=0.5, local_steps=H)) for H in (1, 4))
    ring = [costs.set_index(["topology", "method"]).loc["ring(8)", "gut"] for costs in (every, rare)]
    assert ring[0]["bytes_per_step"] == 4 * ring[1]["bytes_per_step"]
    assert ring[1]["seconds_per_step"] == pytest.approx((4 * 0.05 + 2 * 0.01 + 0.002) / 4)
    assert ring[1]["steps_to_target"] % 4 == 0
    assert ring[0]["steps_to_target"] <= ring[1]["steps_to_target"] < math.inf
    exact = [costs[costs["family"].str.startswith("all-reduce")].reset_index(drop=True) for costs in (every, rare)]
    pd.testing.assert_frame_equal(*exact)


def test_the_comparison_is_printed_drawn_and_written(tmp_path, capsys, question):
    console = console_of_text()
    show_comparison(console, compare(8, question, topologies.star(8)), question)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("star(8)", "torus(2, 4)", "all-reduce, tree", "50 % of the excess", "*"))
    write_sizes(console, [4, 6], question, tmp_path / "costs.png")
    assert "planning for 6 agents" in capsys.readouterr().out
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    assert set(pd.read_csv(tmp_path / "costs.csv")["agents"]) == {4, 6}


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bandwidth, "1Gbit", 125e6),
        (units.parse_bandwidth, "100 MB/s", 1e8),
        (units.parse_bandwidth, "1.5Mbit/s", 187_500),
        (units.parse_bandwidth, "10Gbps", 1.25e9),
        (units.parse_seconds, "1ms", 1e-3),
        (units.parse_seconds, "50us", 5e-5),
        (units.parse_seconds, "0", 0.0),
        (units.parse_bytes, "1.1MB", 1.1e6),
        (units.parse_bytes, "4KiB", 4096),
    ],
)
def test_units(parse, text, value):
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.parse_bandwidth, "1Gb"),
        (units.parse_bandwidth, "1GB"),
        (units.parse_bandwidth, "-1Gbit"),
        (units.parse_seconds, "5"),
        (units.parse_seconds, "1MB"),
        (units.parse_bytes, "1e400B"),
        (units.parse_bytes, ""),
    ],
)
def test_bad_units_are_named(parse, text):
    with pytest.raises(ValueError, match="such as"):
        parse(text)


def test_formats():
    assert [units.format_seconds(x) for x in (5e-5, 0.0123, 0.9996, 1, 150, 1e5, math.inf, math.nan)] == [
        "50.0 µs", "12.3 ms", "1.00 s", "1.00 s", "2.50 min", "27.8 h", "–", "–",
    ]  # fmt: skip
    assert [units.format_bytes(x) for x in (0, 1.1e6, 999_999, 2.5e13)] == ["0.00 B", "1.10 MB", "1.00 MB", "25.0 TB"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Network(0), r"bandwidth must be in \[1e-15"),
        (lambda: Network(1e6, latency=-1), "latency must be in"),
        (lambda: Network(1e6, overlap=1.5), r"overlap must be in \[0, 1\]"),
        (lambda: Network(1e6, straggler_probability=2), "straggler_probability"),
        (lambda: Network(1e6, straggler_factor=0.5), r"straggler_factor must be in \[1"),
        (lambda: Network(math.nan), "bandwidth"),
        (lambda: Network(1e6, compute=1e300), r"compute must be in \[0, 1e\+15\], got 1e\+300"),
        (lambda: step_seconds(topologies.ring(3), Network(1e-9), 1e9), "take less than 1e.15 s to send, got 1e.09"),
        (lambda: step_seconds(topologies.ring(3), PLAIN, -1), "message_bytes must be at least 0"),
        (lambda: step_seconds(topologies.ring(3), PLAIN, 1, num_rounds=1), "num_rounds must be at least 2"),
        (lambda: step_seconds(topologies.ring(3), PLAIN, 1, local_steps=0), "local_steps must be at least 1"),
        (lambda: allreduce_seconds(4, PLAIN, 1, "star"), "known are ring, tree"),
        (lambda: Quadratics(curvatures=()), "at least one"),
        (lambda: Quadratics(noise=-1.0), "noise must be at least 0"),
        (lambda: Quadratics(target=1.5), "target must be"),
        (lambda: compare(4, networks.Question(PLAIN, -1.0, Quadratics())), "message_bytes must be at least 0"),
        (lambda: make_question("1Gb", "1ms", "1ms", "1MB"), "--bandwidth: '1Gb' is not a bandwidth"),
        (lambda: make_question("1Gbit", "1ms", "1ms", "1MB", target=2), "--target must be"),
        (lambda: parse_sizes("16,1000000"), "from 2 to 100,000"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_finished_runs_are_put_on_the_network(capsys):
    def run(method, rule, seed, accuracies, local_steps=1):
        sent = 2 * MESSAGE * get_rule(rule).num_messages / local_steps
        name, accuracy_at = f"{method}-{seed}", zip((0, 10, 20), accuracies, strict=True)
        rows = [
            {"run": name, "step": step, "test_accuracy": accuracy, "mean_bytes_sent": step * sent}
            for step, accuracy in accuracy_at
        ]
        head = {"run": name, "method": method, "point": '{"alpha": 0.1}', "topology": "ring:4"}
        return {**head, "local_steps": local_steps}, rows

    found = [
        run("GUT", "gut", 0, (0.1, 0.7, 0.9)),
        run("GUT", "gut", 1, (0.1, 0.9, 0.9)),
        run("tracking", "gradient_tracking", 0, (0.1, 0.5, 0.7)),
        run("GUT, H = 5", "gut", 0, (0.1, 0.5, 0.8), local_steps=5),
    ]
    runs = pd.DataFrame([head for head, _ in found]).set_index("run")
    results = Results(runs, pd.DataFrame([row for _, rows in found for row in rows]), {})
    finished = measured(results, PLAIN, accuracy=0.8)
    gut, rare, tracking = finished.itertuples()
    assert rare.seconds == pytest.approx(20 * (5 * 0.05 + 0.002 + 2 * 0.01) / 5)
    assert rare.bytes == 20 * 2 * MESSAGE / 5
    assert (gut.method, gut.runs, gut.reached, gut.steps) == ("GUT", 2, 2, 15)
    assert gut.seconds == pytest.approx(15 * (0.05 + 0.002 + 2 * 0.01))
    assert gut.bytes == 15 * 2 * MESSAGE
    assert tracking.seconds_per_step == pytest.approx(0.092)
    assert (tracking.reached, tracking.seconds) == (0, math.inf)
    with pytest.raises(ValueError, match="accuracy must be a fraction"):
        measured(results, PLAIN, accuracy=80)
    console_of_text().print(measured_table(finished, 0.8))
    assert "2 of 2" in capsys.readouterr().out
