"""A method has one look in every picture, and graphs are drawn as they are known."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from gut_fast import topology
from gut_fast.rules import RULES
from gut_fast.study import graph_pictures, plots
from gut_fast.study.looks import LOOKS, look_of, looks_of


def test_every_rule_has_a_look_of_its_own():
    assert len({look_of("of one's own", rule) for rule in RULES}) == len(RULES)
    assert len({(look.color, look.marker) for look in LOOKS.values()}) == len(LOOKS)


def test_looks_follow_the_method_and_not_its_place():
    rules = {"QG-GUTm": "qg_gutm", "QG-DSGDm β+μ (control)": "qg_gutm", "GUT, H = 4": "gut", "K-GT †": "k_gt"}
    for order in itertools.permutations(rules):
        looks = looks_of({label: rules[label] for label in order})
        assert looks["GUT, H = 4"] == LOOKS["GUT"]
        assert looks["K-GT †"] == LOOKS["K-GT"]
        assert looks["QG-DSGDm β+μ (control)"] == LOOKS["QG-DSGDm β+μ"]


def test_one_method_twice_is_one_colour_in_two_lines_and_strangers_get_what_is_free():
    looks = looks_of({"GUT, H = 1": "gut", "GUT, H = 4": "gut", "mine": "mine", "yours": ""})
    assert looks["GUT, H = 1"].color == looks["GUT, H = 4"].color
    assert looks["GUT, H = 1"].line != looks["GUT, H = 4"].line
    assert len({look.color for look in looks.values()}) == 3


def drawn(graph):
    axes = Figure().subplots()
    graph_pictures.plot_graph(axes, graph)
    return np.asarray(max((collection.get_offsets() for collection in axes.collections), key=len))


def test_petersen_is_a_pentagram_in_a_pentagon():
    places = drawn(topology.petersen())
    radius = np.linalg.norm(places, axis=1)
    assert radius[:5] == pytest.approx(1.0)
    assert radius[5:] == pytest.approx(0.5)
    assert np.linalg.norm(places[:5] - 2 * places[5:]) == pytest.approx(0.0)


@pytest.mark.parametrize("graph", [topology.exponential(16), topology.dyck(), topology.one_peer_exponential(8)])
def test_exponential_graphs_and_dyck_are_circles_with_chords(graph):
    assert np.linalg.norm(drawn(graph), axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_edges_of_a_hypercube_have_the_directions_of_its_bits(dimension):
    places = drawn(topology.hypercube(dimension))
    for bit in range(dimension):
        agents = [agent for agent in range(2**dimension) if not agent >> bit & 1]
        edges = np.array([places[agent | 1 << bit] - places[agent] for agent in agents])
        assert edges == pytest.approx(np.tile(edges[0], (len(edges), 1)))
    assert len({tuple(place) for place in places.round(6)}) == 2**dimension


def test_a_chain_is_a_line_and_a_star_has_its_centre():
    assert np.ptp(drawn(topology.chain(6))[:, 1]) == 0
    assert drawn(topology.star(7))[0] == pytest.approx([0, 0])


def test_graphs_that_lost_an_agent_are_drawn_too():
    for graph in (topology.petersen(), topology.star(5), topology.chain(5), topology.torus(2, 3)):
        assert len(drawn(graph.without([1]) if graph.name.startswith(("petersen", "torus")) else graph)) > 3


def test_panels_of_one_quantity_share_their_scale():
    first, second = Figure().subplots(1, 2)
    first.set_ylim(10, 90)
    second.set_ylim(50, 95)
    plots.share_scale([first, second])
    assert first.get_ylim() == second.get_ylim() == (10, 95)
