"""Attacks on the other files that are read: results, YAML, images, graphs and matrices, each damaged byte by byte.

A loader must give what the whole file holds, or one error, which names the file and is short; nothing else may come
out of it, and it may take no more than a few seconds.
``python -m attacks.files SEED COUNT``, in the folder of the tests, makes attacks.
"""

import io
import random
import string
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from attacks.checkpoints import damaged, refused
from gut_fast.data.image_files import read_image
from gut_fast.files import FileError
from gut_fast.study import Experiment, Run
from gut_fast.study.results import LINES, TABLE, append_run, lines_of, read_results, write_table
from gut_fast.study.sweep import Task, read_sweep
from gut_fast.topology.names import parse_topology

SECONDS = 10
"""How long any attack may take; a whole file takes milliseconds."""

SWEEP = """\
settings: &all {steps: 10, lr: 1e-1, data: digits}
methods:
  GUT: {rule: gut, mu: 0.9}
  "QG µ": {<<: *all, rule: qg_gutm, momentum: 0.9}
grid:
  alpha: [0.01, 0.1]
  topology: ["ring:4", 'torus:2x2']
seeds: 2
"""

BOMBS = (
    "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "a: " + "[" * 5000 + "]" * 5000,
    "{" * 5000,
    "a: &a [*a]",
    "a: 1" + ":1" * 100_000,
    "? [1]\n: 2\n",
    "a: 2020-99-99",
    "a: 0x" + "f" * 9000,
    "methods: {g: {rule: gut}}\ngrid: {" + ", ".join(f"{c}: {list(range(10))}" for c in string.ascii_letters) + "}",
    "methods: {g: {rule: gut}}\nseeds: " + "9" * 5000,
    "methods: {g: {rule: gut}}\nseeds: [" + "[" * 15 + "1" + "]" * 15 + "]",
)
"""Files of YAML that stand for more than they are, or for nothing."""


def attack(seed, count):
    """Makes `count` attacks with this seed and returns how many they were; AssertionError says which one fell."""
    rng = random.Random(seed)
    kinds = (_results, _table, _yaml, _image, _graph, _matrix)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attacks = [kind(Path(folder) / kind.__name__[1:]) for kind in kinds]
        for number in range(count):
            about = f"seed {seed}, attack {number}, {kinds[number % len(kinds)].__name__[1:]}"
            start = time.monotonic()
            attacks[number % len(kinds)](rng, about)
            assert time.monotonic() - start < SECONDS, f"{about}: {time.monotonic() - start:.0f} s"
    return count


def _stored(folder):
    """A folder with three finished runs as records, and what is read of them."""
    folder.mkdir()
    for seed in range(3):
        experiment = Experiment(rule="d2", seed=seed, steps=20)
        rows = [{"step": step, "test_accuracy": 0.1 * seed + step / 1000} for step in (10, 20)]
        append_run(folder, lines_of(Task("D² µ\u2028", {}, experiment), Run(experiment, rows, "vmap", 1.5)))
    return read_results(folder)


def _same_runs(found, whole, about):
    """Every run that was read is one of the whole ones, to the last digit."""
    for name in found.runs.index:
        assert name in whole.runs.index, f"{about}: a run that never was"
        assert repr(found.run(name)) == repr(whole.run(name)), f"{about}: a damaged run was read"


def _results(folder):
    whole, content = _stored(folder), (folder / LINES).read_bytes()

    def once(rng, about):
        (folder / LINES).write_bytes(damaged(content, rng))
        found = []
        message = refused(lambda: found.append(read_results(folder)), FileError, FileNotFoundError)
        assert (message is None) == bool(found), about
        for results in found:
            _same_runs(results, whole, about)

    return once


def _table(folder):
    whole = _stored(folder)
    write_table(folder)
    content = (folder / TABLE).read_bytes()

    def once(rng, about):
        (folder / TABLE).write_bytes(damaged(content, rng))
        found = []
        message = refused(lambda: found.append(read_results(folder)), FileError)
        assert found or (TABLE in message and len(message) < 2000), about
        for results in found:
            _same_runs(results, whole, about)

    return once


def _yaml(folder):
    folder.mkdir()

    def once(rng, about):
        content = SWEEP.encode()
        for _ in range(rng.randrange(1, 4)):
            content = damaged(content, rng) or b"-"
        (folder / "sweep.yaml").write_bytes(rng.choice(BOMBS).encode() if rng.random() < 0.2 else content)
        message = refused(lambda: read_sweep(folder / "sweep.yaml"), FileError)
        assert message is None or ("sweep.yaml" in message and len(message) < 3000), about

    return once


def _image(folder):
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    whole = {}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "ICO", "PPM", "DDS", "EPS", "WEBP"):
        stream = io.BytesIO()
        image.save(stream, kind)
        whole[kind] = stream.getvalue()

    def once(rng, about):
        kind = rng.choice([*whole, *["JPEG", "PNG"] * 8])
        (folder / "image.JPEG").write_bytes(damaged(whole[kind], rng) if kind in ("JPEG", "PNG") else whole[kind])
        found = []
        message = refused(lambda: found.append(read_image(folder / "image.JPEG")), FileError)
        assert message is None or "image.JPEG cannot be read as an image" in message, about
        assert message or kind in ("JPEG", "PNG"), f"{about}: {kind} was opened"

    return once


def _named_topology(path, about):
    kind = "from-matrix" if path.suffix in (".npy", ".csv") else "from-networkx"
    message = refused(lambda: parse_topology(f"{kind}:{path}"), ValueError, TypeError)
    assert message is None or (path.name in message and len(message) < 3000), f"{about}: {message}"


def _graph(folder):
    folder.mkdir()
    whole = {
        ".gml": b"graph [\n" + b"".join(b"node [ id %d label \"%d\" ]\n" % (n, n) for n in range(4))
        + b"".join(b"edge [ source %d target %d ]\n" % (n, (n + 1) % 4) for n in range(4)) + b"]\n",
        ".edgelist": b"0 1\n1 2\n2 3\n3 0\n",
        ".adjlist": b"0 1 3\n1 2\n2 3\n",
        ".graphml": b"<graphml xmlns='http://graphml.graphdrawing.org/xmlns'><graph edgedefault='undirected'>"
        b"<node id='0'/><node id='1'/><edge source='0' target='1'/></graph></graphml>",
    }  # fmt: skip

    def once(rng, about):
        suffix, content = rng.choice(list(whole.items()))
        (folder / f"graph{suffix}").write_bytes(damaged(content, rng))
        _named_topology(folder / f"graph{suffix}", about)

    return once


def _matrix(folder):
    folder.mkdir()
    stream = io.BytesIO()
    np.save(stream, np.full((4, 4), 0.25))
    whole = {".npy": stream.getvalue(), ".csv": b"\n".join([b".25,.25,.25,.25"] * 4)}
    huge = stream.getvalue().replace(b"(4, 4), }", b"(4000000, 4000000), }")

    def once(rng, about):
        suffix, content = rng.choice(list(whole.items()))
        lie = suffix == ".npy" and rng.random() < 0.2
        (folder / f"matrix{suffix}").write_bytes(huge if lie else damaged(content, rng))
        _named_topology(folder / f"matrix{suffix}", about)

    return once


if __name__ == "__main__":
    print(attack(*map(int, sys.argv[1:])))
