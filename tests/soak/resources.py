"""Long runs keep no memory, threads or open files: what a process has is counted again and again.

    python tests/soak/resources.py --steps 20000 --optimizers 2000 --simulators 200

prints what was there in the middle and at the end, and ends with exit code 1 if anything grew.
"""

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path

import torch

import gut_fast as gf

MAX_GROWTH = 8 << 20
"""Bytes of memory, from the middle of a run to its end."""
COLUMNS = (130, 64, 5)
RING = gf.topology.ring(4)


def main() -> int:
    """Runs everything, prints a table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--optimizers", type=int, default=2_000)
    parser.add_argument("--simulators", type=int, default=200)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = {
        "steps": (steps(), options.steps),
        "optimizers": (optimizers(), options.optimizers),
        "simulators": (simulators(), options.simulators),
    }
    grown = [name for name, (doing, count) in kinds.items() if count and grows(name, doing, count)]
    print(f"grew: {', '.join(grown)}" if grown else "nothing grew")
    return bool(grown)


def grows(name, doing, count):
    """Does so many of a kind; whether there is more from the middle on than there was in the middle."""
    begin = told = time.monotonic()
    for number in range(1, count + 1):
        next(doing)
        if number == count // 2:
            middle = present()
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{name}: {number:,} of {count:,}", flush=True)
    end = present()
    said = ", ".join(f"{what} {middle[what]:,} then {end[what]:,}" for what in end)
    print(f"{name}: {count:,} in {time.monotonic() - begin:.0f} s: {said}", flush=True)
    return end["bytes"] > middle["bytes"] + MAX_GROWTH or any(end[w] > middle[w] for w in ("threads", "files"))


def present():
    """The memory, threads and open files that this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads, files = (sum(1 for _ in Path(f"/proc/self/{name}").iterdir()) for name in ("task", "fd"))
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "threads": threads, "files": files}


def steps():
    """Steps of every rule in turn, on static and on changing topologies, with one thread and with several."""
    optimizers = [
        made(name, topology)
        for name in gf.rules.RULES
        for topology in (gf.topology.ring(16), gf.topology.one_peer_exponential(16))
    ]
    while True:
        for optimizer in optimizers:
            torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
            optimizer.step()
            yield


def optimizers():
    """Optimizers that are made, stepped, saved, loaded and forgotten."""
    rules = list(gf.rules.RULES)
    while True:
        for name in rules:
            optimizer = made(name, gf.topology.random_regular(16, 4, seed=0))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            yield


def made(rule, topology):
    """An optimizer of 16 agents, with gradients that stay."""
    parameters = [torch.nn.Parameter(torch.zeros(16, columns)) for columns in COLUMNS]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return gf.GossipOptimizer(parameters, rule, lr=0.01, topology=topology)


def gut(parameters):
    return gf.GUT(parameters, lr=0.1, topology=RING)


def simulators():
    """Simulators of each engine that train for some steps."""
    data = gf.data.digits()
    parts = gf.data.partition.dirichlet(data.train_labels, 4, alpha=0.1, seed=0)
    while True:
        for engine in ("loop", "vmap", "workers"):
            model = gf.models.mlp(64, [8], 10)
            simulator = gf.Simulator(model, RING, optimizer=gut, data=data, parts=parts, engine=engine, batch_size=4)
            simulator.run(2, progress=False)
            yield


if __name__ == "__main__":
    sys.exit(main())
