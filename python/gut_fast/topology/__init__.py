"""Topologies: which agents talk to each other at each step, and with what weights."""

from gut_fast.topology.graphs import (
    chain,
    circulant,
    complete,
    dyck,
    erdos_renyi,
    exponential,
    from_matrix,
    from_networkx,
    hypercube,
    one_peer_exponential,
    petersen,
    random_matching,
    random_regular,
    ring,
    sequence,
    star,
    torus,
)
from gut_fast.topology.mixing import CSR, nobody
from gut_fast.topology.topology import Topology

__all__ = [
    "CSR",
    "Topology",
    "chain",
    "circulant",
    "complete",
    "dyck",
    "erdos_renyi",
    "exponential",
    "from_matrix",
    "from_networkx",
    "hypercube",
    "nobody",
    "one_peer_exponential",
    "petersen",
    "random_matching",
    "random_regular",
    "ring",
    "sequence",
    "star",
    "torus",
]
