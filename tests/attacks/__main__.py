"""Attacks gut_fast for so many minutes, and says what fell: ``make fuzz``.

    python -m attacks --minutes 60 --seed 7          # in the folder tests, or with it in PYTHONPATH
    python -m attacks --only arguments --seed 7 --batches 1

Every batch has a seed and runs in a process of its own, so that a crash or a hang is a finding like any other; the
seed brings it back. The exit code is 1 if anything fell.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
COUNTS = {
    "arguments": 1000,
    "codes": 1000,
    "optimizers": 400,
    "state_dicts": 400,
    "checkpoints": 200,
    "files": 1000,
    "commands": 60,
}
"""The modules of this package, and the size of a batch: some ten seconds."""
LIMIT = 300
"""The longest that a batch may take, in seconds."""


def main() -> int:
    """Runs batches of all attacks in turn and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; every other one has the next")
    parser.add_argument("--only", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--batches", type=int, help="how many, instead of minutes")
    options = parser.parse_args()
    end, attacks, fallen = time.monotonic() + 60 * options.minutes, 0, []
    for batch in itertools.count():
        if batch >= options.batches if options.batches else batch >= len(options.only) and time.monotonic() > end:
            break
        name, seed = options.only[batch % len(options.only)], options.seed + batch
        begin, finding = time.monotonic(), run_batch(name, seed, COUNTS[name])
        attacks += COUNTS[name]
        print(f"{name} --seed {seed}: {finding or 'nothing fell'} ({time.monotonic() - begin:.0f} s)", flush=True)
        fallen += [f"{name} --seed {seed}"] if finding else []
    print(f"{attacks:,} attacks; something fell in {len(fallen)} of {batch} batches", *fallen)
    return bool(fallen)


def run_batch(name: str, seed: int, count: int) -> str:
    """Makes so many attacks in a process of their own; returns what fell, or nothing."""
    call = f"import importlib; importlib.import_module('attacks.{name}').attack({seed}, {count})"
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", call]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"it hangs: not done after {LIMIT} s"
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or ["nothing said"]
    return f"killed by signal {-done.returncode}, {said[0]}" if done.returncode < 0 else said[-1]


if __name__ == "__main__":
    sys.exit(main())
