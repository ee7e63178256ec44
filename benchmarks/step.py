"""Times a step in many cases beside all peers: those of `gut-fast bench step`, and those of peers.py.

    python benchmarks/step.py table storage --seconds 4 --output benchmarks/results
    python benchmarks/step.py large --no-peers --seconds 3 --output benchmarks/results
    python benchmarks/step.py ring-16 --threads 1

Results add up in a file named after the processor: a case that is measured again takes the place of its old figures.
"""

import argparse
from pathlib import Path

import torch

from gut_fast.bench import results
from gut_fast.bench.cases import CASES, GROUPS
from gut_fast.bench.device import DEVICES, find_device
from gut_fast.bench.peers import PEERS
from gut_fast.bench.step import measure
from peers import MORE_PEERS


def main() -> None:
    """Measures, prints and adds to the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="+", choices=[*GROUPS, *CASES], help="groups of cases, or cases")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case and number of threads")
    parser.add_argument("--no-peers", action="store_true", help="only what works on the library's own buffers")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--output", type=Path, help="a folder for JSON and Markdown")
    options = parser.parse_args()
    peers = {} if options.no_peers else {**PEERS, **MORE_PEERS}
    measured = []
    for case in [case for name in options.cases for case in GROUPS.get(name) or [CASES[name]]]:
        for threads in options.threads:
            measured.append(measure(case, threads, options.seconds, peers, find_device(options.device)))
            print(results.describe(measured[-1]), flush=True)
    print(results.summary(measured))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        print(f"wrote {results.add(measured, options.output)}")


if __name__ == "__main__":
    main()
