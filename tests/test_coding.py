"""Errors of coded messages: how large they are, and that they die out or grow as the analysis says."""

import math
import warnings

import pytest
import torch

import gut_fast as gf
from gut_fast import analysis
from gut_fast.kernels.codes import Code, Layout, encode_difference

RING = gf.topology.ring(16)
BITS = {"int8": 8, "int4": 4}


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("at_random", [False, True])
def test_the_error_of_a_code_is_what_is_measured(bits, at_random):
    if bits == 16 and at_random:
        return
    numbers = torch.randn(256 * 200, generator=torch.Generator().manual_seed(0))
    code = Code(bits, seed=1 if at_random else None)
    layout = Layout(bits, False, (len(numbers),), 1)
    copy, coded = torch.zeros_like(numbers), torch.zeros(layout.num_bytes, dtype=torch.uint8)
    dither = torch.rand(len(numbers), generator=torch.Generator().manual_seed(1)) - 0.5 if code.seed else None
    encode_difference(layout, numbers, copy, coded, dither)
    measured = float((copy - numbers).square().mean().sqrt())
    assert measured == pytest.approx(analysis.coding_error(bits, at_random=at_random), rel=0.1 if bits < 16 else 0.5)


def disagreement(rule, hyperparameters, wire_dtype, local_steps, lr=0.1, steps=1200):
    """The largest distance between agents after so many steps on quadratics of curvature 1 whose minima differ."""
    minima = torch.randn(16, 600, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.zeros(16, 600))
    options = {"lr": lr, "topology": RING, "wire_dtype": wire_dtype, "local_steps": local_steps, **hyperparameters}
    optimizer = gf.GossipOptimizer([parameter], rule, **options)
    for _ in range(steps):
        parameter.grad = parameter.detach() - minima
        optimizer.step()
    rows = parameter.detach()
    return float((rows - rows.mean(0)).abs().max())


CASES = [
    ("edm", {"momentum": 0.9}, "int4", 1, 0.1, False),
    ("edm", {"momentum": 0.9}, "int8", 1, 0.1, True),
    ("edm", {"momentum": 0.8}, "int4", 1, 0.1, False),
    ("edm", {"momentum": 0.2}, "int4", 1, 0.4, True),
    ("edm", {"momentum": 0.9}, "int4", 4, 0.1, False),
    ("edm", {"momentum": 0.9}, "int4", 4, 0.4, True),
    ("d2", {}, "int4", 1, 0.1, True),
    ("gut", {"mu": 1.0, "kappa": 0.3}, "int4", 1, 0.1, True),
    ("gradient_tracking", {}, "int4", 1, 0.1, True),
]


@pytest.mark.filterwarnings("ignore:.*grows from round to round")
@pytest.mark.parametrize(("rule", "hyperparameters", "wire", "local_steps", "lr", "dies_out"), CASES)
def test_errors_die_out_where_the_analysis_says_so(rule, hyperparameters, wire, local_steps, lr, dies_out):
    limit = analysis.coding_limit(rule, {**hyperparameters, "lr": lr}, RING, local_steps=local_steps)
    assert (analysis.coding_error(BITS[wire]) < limit) == dies_out
    found = disagreement(rule, hyperparameters, wire, local_steps, lr)
    plain = disagreement(rule, hyperparameters, None, local_steps, lr)
    assert found < plain + 1e-3 if dies_out else not found < 1.0


def test_an_optimizer_warns_of_errors_that_grow():
    def make(wire_dtype, rule="gut", topology=RING, **options):
        parameter = torch.nn.Parameter(torch.zeros(topology.num_agents, 3))
        return gf.GossipOptimizer([parameter], rule, lr=0.1, topology=topology, wire_dtype=wire_dtype, **options)

    message = r"gut: messages of 4 bits change a difference by 12.4%, and on ring\(4\) what is more than 11.4% grows"
    with pytest.warns(UserWarning, match=message + ".*; use messages of more bits or kappa <= 0.95 or mu <= 0.8$"):
        make("int4", topology=gf.topology.ring(4), mu=0.9)
    with pytest.warns(UserWarning, match="by 17.5%"):
        make("int4", wire_seed=1, mu=0.9)
    with pytest.warns(UserWarning, match="what is more than 1.5% grows.*; use messages of more bits"):
        make("int4", "edm")
    make("int8", "edm")
    make("int4", mu=0.9)
    make("int4", topology=gf.topology.ring(4), mu=0.9, kappa=0.85)
    make("int4", "qgt")


def test_what_advice_names_is_safe_and_what_it_warns_of_is_not():
    ring = gf.topology.ring(4)
    for hyperparameters, dies_out in (({"mu": 0.9}, False), ({"mu": 0.9, "kappa": 0.9}, True), ({"mu": 0.8}, True)):
        assert (analysis.coding_advice("gut", {**hyperparameters, "lr": 0.02}, ring, 4) is None) == dies_out
        minima = torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
        parameter = torch.nn.Parameter(torch.zeros(4, 600))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = gf.GUT([parameter], lr=0.02, topology=ring, wire_dtype="int4", **hyperparameters)
        for _ in range(1500):
            parameter.grad = parameter.detach() - minima
            optimizer.step()
        rows = parameter.detach()
        assert (float((rows - rows.mean(0)).abs().max()) < 0.1) == dies_out


def test_what_varies_is_not_analysed():
    assert math.isnan(analysis.coding_limit("gut", {}, gf.topology.one_peer_exponential(16)))
    assert math.isnan(analysis.coding_limit("gut", {"mu": 0.9, "lr": 0.1}, gf.topology.torus(4, 4)))  # unstable itself
    assert analysis.coding_limit("gut", {"mu": 0.5}, gf.topology.from_matrix([[1.0]])) == 1.0
