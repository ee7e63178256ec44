"""Topologies that change from step to step: sixteen agents talk to one other agent at a time, or to whom they like.

python examples/time_varying_topology.py
"""

import networkx as nx

import gut_fast as gf

N = 16
data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, N, alpha=0.01, seed=0)


def rows_and_columns() -> gf.Topology:
    """A graph of one's own for each step, here a 4 × 4 square whose rows and columns take turns."""
    graphs = []
    for step in range(2):
        graph = nx.Graph()
        graph.add_nodes_from(range(N))
        lines = [[4 * i + j if step == 0 else 4 * j + i for j in range(4)] for i in range(4)]
        graph.add_edges_from((a, b) for line in lines for a in line for b in line if a < b)
        graphs.append(gf.topology.from_networkx(graph, connected=False))  # only their union must be connected
    return gf.topology.sequence(graphs)


def trained(topology: gf.Topology) -> dict[str, float]:
    """The last evaluation of a run; κ and μ are chosen for the whole cycle of the topology, not for one step of it."""
    simulator = gf.Simulator(
        gf.models.mlp(64, [32], 10),
        topology,
        optimizer=lambda params: gf.GUT(params, lr=0.4, mu="auto", kappa="auto", topology=topology),
        data=data,
        parts=parts,
        batch_size=16,
        engine="vmap",
    )
    return {**simulator.run(400, milestones=[0.5, 0.75], progress=False)[-1], **simulator.optimizer.param_groups[0]}


print("neighbours a step  steps of a cycle  topology: accuracy of the averaged model, chosen mu and kappa")
for topology in (
    gf.topology.ring(N),  # the same two neighbours at every step
    gf.topology.one_peer_exponential(N),  # one at a time; after log2 N steps everyone has the exact average
    gf.topology.base(N, 1),  # the same for any N, symmetric
    gf.topology.random_matching(N, seed=0),  # pairs drawn anew at every step
    rows_and_columns(),
):
    last = trained(topology)
    neighbours = max(len(topology.neighbors(0, step)) for step in range(topology.period or 1))
    print(
        f"{neighbours:17d}  {topology.period or 'random':>16}  {topology.name}: "
        f"{last['test_accuracy']:.1%}, mu {last['mu']:.2f}, kappa {last['kappa']:.2f}"
    )
