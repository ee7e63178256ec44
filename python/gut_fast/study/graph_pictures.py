"""Pictures of topologies: each graph as it is known from books, and the eigenvalues of its mixing matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from gut_fast.study.plots import MAX_AGENTS_WITH_NUMBERS, new_figure, shown_label
from gut_fast.topology import Topology
from gut_fast.topology.mixing import MixingMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_topology", "plot_graph", "plot_spectrum"]


CUBES = {
    2: ((1, 0), (0, 1)),
    3: ((1, 0), (0, 1), (0.45, 0.3)),
    4: tuple((np.cos(np.pi * edge / 4), np.sin(np.pi * edge / 4)) for edge in range(4)),
}
"""The directions of the edges of a square, a cube and a tesseract in a picture."""


def draw_topology(topology: Topology, path: str | Path) -> None:
    """Writes the graph and, of a static topology, the eigenvalues of its mixing matrix."""
    num_panels = 2 if topology.is_static else 1
    with new_figure(path, (6.2 * num_panels, 5.4)) as figure:
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
        plot_graph(axes[0], topology)
        if topology.is_static:
            plot_spectrum(axes[1], topology)


def plot_graph(axes: Axes, topology: Topology, *, numbered: bool | None = None) -> None:
    """Draws agents and the pairs that talk, with arrows where only one of the two listens.

    `numbered` says whether the agents bear their numbers; None is yes if they are few.
    """
    graph = topology.graph
    positions = _positions(topology)
    if numbered is None:
        numbered = topology.num_agents <= MAX_AGENTS_WITH_NUMBERS
    options: dict[str, Any] = {"arrowsize": 9, "connectionstyle": "arc3,rad=0.08"} if graph.is_directed() else {}
    size = 340 if numbered else 30
    nx.draw_networkx_edges(graph, positions, ax=axes, edge_color="#9a9a9a", width=1.1, node_size=size, **options)
    nx.draw_networkx_nodes(graph, positions, ax=axes, node_color="#56B4E9", edgecolors="#0072B2", node_size=size)
    if numbered:
        nx.draw_networkx_labels(graph, positions, ax=axes, font_size=9)
    name = shown_label(topology.name)
    axes.set(title=name if topology.is_static else f"{name}, all steps together")
    places = np.array(list(positions.values()))
    reach = 1.15 * np.abs(places - places.mean(axis=0)).max() or 1.0
    x, y = places.mean(axis=0)
    axes.set(xlim=(x - reach, x + reach), ylim=(y - reach, y + reach))
    axes.set_aspect("equal")
    axes.set_axis_off()


def _positions(topology: Topology) -> dict[int, Any]:
    """The place of each agent: as in books where the graph is known there; springs pull others, if small, apart."""
    graph, n, first = topology.graph.to_undirected(), topology.num_agents, topology.cycle[0]
    group = first.group if isinstance(first, MixingMatrix) else None
    edges = set(map(frozenset, graph.edges))
    if edges == set(map(frozenset, nx.petersen_graph().edges)):
        corners = _circle(5)
        return {agent: corners[agent % 5] * (1 if agent < 5 else 0.5) for agent in range(10)}
    if n > 2 and edges == {frozenset((0, agent)) for agent in range(1, n)}:
        return {0: np.zeros(2), **{agent + 1: place for agent, place in _circle(n - 1).items()}}
    if edges == {frozenset((agent, agent + 1)) for agent in range(n - 1)}:
        return {agent: np.array([agent, 0.0]) for agent in range(n)}
    if group is not None and set(group) == {2} and len(group) in CUBES:
        return _cube_positions(len(group))
    if group is not None and len(group) == 2:
        return _torus_positions(*group)
    is_hamiltonian = all(frozenset((agent, (agent + 1) % n)) in edges for agent in range(n))
    if is_hamiltonian or group is not None or not topology.is_static or n > 200 or nx.density(graph) > 0.5:
        return _circle(n)
    springs: dict[int, Any] = nx.spring_layout(graph, pos=_circle(n), iterations=300, seed=0)
    return springs


def _circle(n: int) -> dict[int, Any]:
    """Places of n agents on a circle, clockwise from the top."""
    angles = 2 * np.pi * np.arange(n) / max(n, 1)
    return dict(enumerate(np.stack([np.sin(angles), np.cos(angles)], axis=1)))


def _cube_positions(dimension: int) -> dict[int, Any]:
    """Places on a cube seen from the side: the bits of an agent's number go along its edges."""
    bits = np.arange(2**dimension)[:, None] >> np.arange(dimension) & 1
    return dict(enumerate(bits @ np.array(CUBES[dimension])))


def _torus_positions(rows: int, cols: int) -> dict[int, Any]:
    """Places on a torus: columns go around the centre, rows around the tube.

    A twist puts the lower half of the tube between the columns of the upper one.
    """
    row, col = np.divmod(np.arange(rows * cols), cols)
    around_tube = 2 * np.pi * row / rows
    angle = 2 * np.pi * col / cols + np.pi / (2 * cols) * np.sin(around_tube)
    radius = 1 + 0.55 * np.cos(around_tube)
    return dict(enumerate(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)))


def plot_spectrum(axes: Axes, topology: Topology) -> None:
    """Draws the eigenvalues of W, from the largest to the smallest; in the complex plane where W is not symmetric."""
    eigenvalues = topology.eigenvalues
    gap = f"spectral gap {topology.spectral_gap:.4f}"
    if eigenvalues.is_complex():
        angles = np.linspace(0, 2 * np.pi, 200)
        axes.plot(np.cos(angles), np.sin(angles), color="#888888", linewidth=0.8)
        axes.plot(eigenvalues.real.numpy(), eigenvalues.imag.numpy(), "o", color="#0072B2")
        axes.set(title=f"Eigenvalues of W, {gap}", xlabel="real part", ylabel="imaginary part")
        axes.set_aspect("equal")
        return
    values = eigenvalues.numpy()
    axes.plot(np.arange(1, len(values) + 1), values, "o", color="#0072B2", markersize=5)
    axes.set(title=f"Eigenvalues of W, {gap}", xlabel="number, from the largest", ylabel="eigenvalue λ")
    axes.set_ylim(min(-0.1, values.min()) - 0.1, 1.1)
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.axhline(0, color="#888888", linewidth=0.8)
    if len(values) > 1:
        _label_eigenvalue(axes, 2, topology.lambda_2, "λ₂", above=True)
        _label_eigenvalue(axes, len(values), topology.lambda_min, "$λ_{min}$", above=False)


def _label_eigenvalue(axes: Axes, number: int, value: float, name: str, *, above: bool) -> None:
    """Marks the eigenvalue with that number and writes its name and value beside it."""
    axes.plot([number], [value], "o", color="#D55E00", markersize=7)
    axes.annotate(
        f"{name} = {round(value, 4) + 0.0:.4f}",  # + 0.0: no minus before a zero
        (number, value),
        xytext=(6, 6) if above else (-6, -4),
        textcoords="offset points",
        ha="left" if above else "right",
        va="bottom" if above else "top",
        color="#D55E00",
    )
