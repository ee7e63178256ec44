"""Processes that are killed while they write: no file is half written, and sweeps end as if nothing had been.

    python tests/soak/kills.py --checkpoints 200 --sweeps 10

Kills of ranks are in tests/test_checkpoints.py. The exit code is 1 if anything was lost.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

import gut_fast as gf
from gut_fast import cli
from gut_fast.study.results import read_results

RING = gf.topology.ring(4)
SWEEP = """\
methods:
  GUT: {rule: gut, mu: 0.5}
  DSGD: {rule: dsgd}
settings: {topology: "ring:4", alpha: 0.1, steps: 60, eval_every: 20, batch_size: 4,
  model: "mlp:8", engine: loop, lr: 0.1}
seeds: 2
"""


def main() -> int:
    """Kills so often, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=200, help="kills of a process that writes checkpoints")
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps that are killed until they are done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # or a forked child waits for threads that it does not have
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        lost = checkpoints(Path(folder), rng, options.checkpoints) + sweeps(Path(folder), rng, options.sweeps)
    print(f"lost: {lost}")
    return lost > 0


def killed(seconds, doing, *arguments):
    """Forks a process that does something, and kills it after a while; whether it was done before that."""
    child = multiprocessing.get_context("fork").Process(target=doing, args=arguments)
    child.start()
    child.join(seconds)
    is_done = child.exitcode == 0
    child.kill()
    child.join()
    return is_done


def simulator():
    """Four agents that learn digits."""
    data = gf.data.digits()
    parts = gf.data.partition.dirichlet(data.train_labels, 4, alpha=0.1, seed=0)
    model = gf.models.mlp(64, [512], 10)
    return gf.Simulator(model, RING, optimizer=gut, data=data, parts=parts, engine="loop", batch_size=4)


def gut(parameters):
    return gf.GUT(parameters, lr=0.1, topology=RING)


def write_on(path, one, steps=2**40):
    """Takes steps, each of which is saved."""
    for _ in range(steps):
        one.run(one.step + 1, progress=False)
        one.save_checkpoint(path)


def checkpoints(folder, rng, kills):
    """How many kills left a checkpoint that cannot be loaded, an older one than before, or files that stay."""
    path, one, lost, step, begin = folder / "run.pt", simulator(), 0, 0, time.monotonic()
    write_on(path, one, steps=10)
    told = time.monotonic()
    longest = told - begin
    for kill in range(kills):
        killed(rng.uniform(0.0, longest), write_on, path, one)
        try:
            one.load_checkpoint(path)
            lost += one.step < step
            step = one.step
        except Exception as error:
            print(f"checkpoint after kill {kill}: {error!r}", flush=True)
            lost += 1
        if time.monotonic() > told + 10:
            told = time.monotonic()
            print(f"checkpoints: {kill:,} kills, step {step:,}", flush=True)
    one.save_checkpoint(path)
    left = [file.name for file in folder.iterdir() if file != path]
    print(f"checkpoints: {kills:,} kills, {step:,} steps, {lost} lost, files left: {left}", flush=True)
    return lost + len(left)


def run_sweep(folder):
    sys.exit(cli.main(["sweep", str(folder / "sweep.yaml"), "--out", str(folder), "--jobs", "1", "--threads", "1"]))


def sweeps(folder, rng, count):
    """How many sweeps, killed until they were done, ended with other histories than one that was left alone."""
    begin, (expected, _) = time.monotonic(), swept(folder / "sweep-0", lambda kill: None)
    longest, lost = time.monotonic() - begin, 0
    for number in range(1, count + 1):
        # The longer, the more often it was killed: a busy machine needs longer than at the beginning.
        history, kills = swept(folder / f"sweep-{number}", lambda kill: rng.uniform(0.0, longest * 1.2**kill))
        lost += not history.equals(expected)
        print(f"sweeps: {number} of {count}, {kills} kills, {len(history)} rows, {lost} lost", flush=True)
    return lost


def swept(folder, seconds):
    """Makes a sweep in a new folder, killed after so many seconds until it is done; its history and the kills."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    kill = 0
    while not killed(seconds(kill), run_sweep, folder):
        kill += 1
    return read_results(folder).history.drop(columns="seconds", errors="ignore"), kill


if __name__ == "__main__":
    sys.exit(main())
