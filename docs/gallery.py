"""Draws docs/topologies.png: some graphs of `gut_fast.topology`, with the spectral gap that says how fast they mix."""

from pathlib import Path

from gut_fast.study import plots
from gut_fast.study.graph_pictures import plot_graph
from gut_fast.topology.names import parse_topology

SPECS = (
    "ring:16",
    "torus:4x8",
    "complete:8",
    "petersen",
    "dyck",
    "hypercube:4",
    "exponential:16",
    "circulant:16:1,4",
    "star:9",
    "random-regular:24:3:1",
    "erdos-renyi:20:0.2:3",
    "chain:8",
)

if __name__ == "__main__":
    path = Path(__file__).with_name("topologies.png")
    with plots.new_figure(path, (6.6, 9.6), 180) as figure:
        for axes, spec in zip(figure.subplots(4, 3).flat, SPECS, strict=True):
            topology = parse_topology(spec)
            plot_graph(axes, topology, numbered=False)
            axes.set_title(f"{spec}\ngap {topology.spectral_gap:.3f}", fontsize=10.5, fontweight="normal")
    print(f"wrote {path}")
