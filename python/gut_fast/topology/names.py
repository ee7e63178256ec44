"""Names of topologies on a command line: ``ring:16``, ``torus:4x8``, ``erdos-renyi:16:0.3:1``."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from gut_fast import topology
from gut_fast.arguments import all_known, shortened
from gut_fast.files import FileError, FileTypeError, read_within
from gut_fast.topology import Topology

__all__ = ["TOPOLOGIES", "Form", "parse_topology"]

MAX_AGENTS = 100_000
MAX_GRAPH_BYTES, MAX_MATRIX_BYTES = 64 << 20, 512 << 20
"""The most bytes of the file of a graph, and of a matrix."""

MAX_AGENTS_ALL_PAIRS = 4_000
"""The limit for graphs in which every pair of agents may be an edge: 8 million edges."""


@dataclass(frozen=True)
class Form:
    """The written form of a constructor: ``name:argument:argument``."""

    arguments: tuple[str, ...]
    example: str
    make: Callable[..., Topology]
    """Makes the topology from its arguments, which are strings."""

    def usage(self, name: str) -> str:
        """The form in one line, for example ``erdos-renyi:N:P:SEED``."""
        return ":".join((name, *self.arguments))


def parse_topology(spec: str, gamma: float = 1.0) -> Topology:
    """The topology that `spec` describes, lazy if ``gamma < 1``.

    Raises:
        TypeError, ValueError: the spec or γ is bad; the message gives the form expected.
        OSError: a file named in the spec cannot be read.
    """
    name, *rest = spec.strip().split(":", 1)
    name = name.replace("_", "-")
    if name not in TOPOLOGIES:
        raise ValueError(f"unknown topology {name!r} in {spec!r}; {all_known(name, TOPOLOGIES)}")
    form = TOPOLOGIES[name]
    # The last argument takes the rest of the text, so that file names and members of a sequence may contain colons.
    arguments = rest[0].split(":", len(form.arguments) - 1) if rest and form.arguments else rest
    expected = f"expected {form.usage(name)}, for example {form.example}"
    if len(arguments) != len(form.arguments) or not all(arguments):
        raise ValueError(f"topology {spec!r}: {expected}")
    try:
        result = form.make(*arguments)
    except ArgumentError as error:
        raise ValueError(f"topology {spec!r}: {error}; {expected}") from None
    return result if gamma == 1 else result.lazy(gamma)


class ArgumentError(Exception):
    """The error for an argument of a spec that cannot be read; `parse_topology` adds the expected form."""


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not an integer") from None


def _agents(text: str, limit: int = MAX_AGENTS) -> int:
    return _within(_integer(text), limit)


def _within(num_agents: int, limit: int = MAX_AGENTS) -> int:
    if num_agents > limit:
        raise ArgumentError(f"{num_agents:,} agents are too many, the command takes at most {limit:,} here")
    return num_agents


def _of_degree(agents: str, degree: str) -> tuple[int, int]:
    """The number of agents and their degree, whose product is limited as that of a complete graph."""
    n, d = _agents(agents), _integer(degree)
    if n * d > MAX_AGENTS_ALL_PAIRS**2:
        raise ArgumentError(f"{n:,} agents with {d:,} neighbors each are too many for the command")
    return n, d


def _integers(text: str) -> list[int]:
    return [_integer(part) for part in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a number") from None


def _torus(size: str) -> Topology:
    rows, times, cols = size.partition("x")
    if not times:
        raise ArgumentError(f"{size!r} is not a size")
    num_rows, num_cols = _integer(rows), _integer(cols)
    _within(max(num_rows, num_cols, num_rows * num_cols))
    return topology.torus(num_rows, num_cols)


def _hypercube(dimension: str) -> Topology:
    k = _integer(dimension)
    if k >= MAX_AGENTS.bit_length():
        raise ArgumentError(f"2^{k} agents are too many, the command takes at most {MAX_AGENTS:,} here")
    return topology.hypercube(k)


def _sequence(members: str) -> Topology:
    return topology.sequence([parse_topology(member) for member in members.split("+")])


GRAPH_READERS: dict[str, Callable[..., Any]] = {
    ".adjlist": nx.read_adjlist,
    ".edgelist": nx.read_edgelist,
    ".gml": nx.read_gml,
    ".graphml": nx.read_graphml,
}


def _from_graph_file(file: str) -> Topology:
    path = Path(file)
    if path.suffix not in GRAPH_READERS:
        raise ArgumentError(f"{file!r} does not end in {', '.join(GRAPH_READERS)}")
    try:
        graph = GRAPH_READERS[path.suffix](io.BytesIO(read_within(path, MAX_GRAPH_BYTES)))
    except OSError:
        raise
    except Exception as error:  # networkx and the parser of XML raise a dozen types
        raise ArgumentError(f"{file} cannot be read as a graph ({shortened(str(error))})") from error
    if set(graph) == {str(agent) for agent in range(len(graph))}:
        graph = nx.relabel_nodes(graph, int)
    with _about(file):
        return topology.from_networkx(graph, name=f"from_networkx({path.name})")


def _matrix(content: bytes, suffix: str) -> np.ndarray[Any, Any]:
    """The matrix in a file. Raises ValueError if it declares more than it holds, before anything is allocated."""
    stream = io.BytesIO(content)
    if suffix != ".npy":
        return np.loadtxt(stream, delimiter="," if suffix == ".csv" else None)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError(f"it says that it holds an array of shape {shape}, but has {len(content):,} bytes")
    stream.seek(0)
    return np.asarray(np.load(stream))


def _from_matrix_file(file: str) -> Topology:
    path = Path(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of a text without numbers
            W = _matrix(read_within(path, MAX_MATRIX_BYTES), path.suffix)
    except OSError:
        raise
    except Exception as error:  # numpy and Python's tokenizer, which reads the header, raise a dozen types
        raise ArgumentError(f"{file} cannot be read as a matrix ({shortened(str(error))})") from error
    with _about(file):
        return topology.from_matrix(W, name=f"from_matrix({path.name})")


@contextlib.contextmanager
def _about(file: str) -> Iterator[None]:
    """Errors about the graph or the matrix in a file name the file."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise (FileTypeError if isinstance(error, TypeError) else FileError)(f"{file}: {error}") from error


TOPOLOGIES: dict[str, Form] = {
    "ring": Form(("N",), "ring:16", lambda n: topology.ring(_agents(n))),
    "torus": Form(("ROWSxCOLS",), "torus:4x8", _torus),
    "petersen": Form((), "petersen", topology.petersen),
    "dyck": Form((), "dyck", topology.dyck),
    "complete": Form(("N",), "complete:8", lambda n: topology.complete(_agents(n, MAX_AGENTS_ALL_PAIRS))),
    "chain": Form(("N",), "chain:8", lambda n: topology.chain(_agents(n))),
    "star": Form(("N",), "star:8", lambda n: topology.star(_agents(n))),
    "hypercube": Form(("K",), "hypercube:4", _hypercube),
    "exponential": Form(("N",), "exponential:16", lambda n: topology.exponential(_agents(n))),
    "circulant": Form(
        ("N", "OFFSET,..."),
        "circulant:16:1,4",
        lambda n, offsets: topology.circulant(_agents(n), _integers(offsets)),
    ),
    "erdos-renyi": Form(
        ("N", "P", "SEED"),
        "erdos-renyi:16:0.3:1",
        lambda n, p, seed: topology.erdos_renyi(_agents(n, MAX_AGENTS_ALL_PAIRS), _number(p), _integer(seed)),
    ),
    "random-regular": Form(
        ("N", "DEGREE", "SEED"),
        "random-regular:16:4:1",
        lambda n, degree, seed: topology.random_regular(*_of_degree(n, degree), _integer(seed)),
    ),
    "from-networkx": Form(("FILE",), "from-networkx:graph.edgelist", _from_graph_file),
    "from-matrix": Form(("FILE",), "from-matrix:W.npy", _from_matrix_file),
    "one-peer-exponential": Form(
        ("N",), "one-peer-exponential:16", lambda n: topology.one_peer_exponential(_agents(n))
    ),
    "base": Form(("N", "K"), "base:25:1", lambda n, k: topology.base(*_of_degree(n, k))),
    "equi-static": Form(
        ("N", "DEGREE", "SEED"),
        "equi-static:16:4:1",
        lambda n, degree, seed: topology.equi_static(*_of_degree(n, degree), _integer(seed)),
    ),
    "equi-dynamic": Form(
        ("N", "SEED"),
        "equi-dynamic:16:1",
        lambda n, seed: topology.equi_dynamic(_agents(n, MAX_AGENTS_ALL_PAIRS), _integer(seed)),
    ),
    "random-matching": Form(
        ("N", "SEED"),
        "random-matching:16:1",
        lambda n, seed: topology.random_matching(_agents(n, MAX_AGENTS_ALL_PAIRS), _integer(seed)),
    ),
    "sequence": Form(("SPEC+SPEC...",), "sequence:torus:2x8+hypercube:4", _sequence),
}
"""Every constructor of `gut_fast.topology`, by its name with hyphens."""
