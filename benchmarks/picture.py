"""Draws results: the time of every contender beside the ceiling's, or else the baseline's, in every case.

python benchmarks/picture.py benchmarks/results/amd-epyc.json docs/step.png [--benchmark step]
"""

import argparse
import itertools
from pathlib import Path

from matplotlib import pyplot

from gut_fast.bench import results

LOOKS = {
    "gut_fast": ("#D55E00", "o"),
    "SGD": ("#0072B2", "s"),
    "plain tensors": ("#009E73", "v"),
    "compile": ("#CC79A7", "^"),
    "eager": ("#E69F00", "P"),
    "kernel": ("#56B4E9", "X"),
    "authors": ("#000000", "*"),
    "jax": ("#777777", "D"),
}
"""The colour and marker of each kind of contender: Okabe and Ito's palette, told apart with every colour vision."""

OTHERS = (("#332288", "<"), ("#999933", ">"), ("#882255", "p"), ("#44AA99", "h"))
"""The looks of further kinds, one after the other."""


def draw(measured: list[results.Result], path: Path) -> None:
    """Writes a picture with a row for each result and a mark for the fastest contender of each kind."""
    unit = "ceiling" if all("ceiling" in result.measurements for result in measured) else measured[0].baseline
    kinds = list(dict.fromkeys(results.kind_of(name) for result in measured for name in result.measurements))
    others = itertools.cycle(OTHERS)
    figure, axes = pyplot.subplots(figsize=(6.2, 1.8 + 0.24 * len(measured)), layout="constrained")
    for kind in (kind for kind in kinds if kind != unit):
        found = [(row, result, result.fastest(kind)) for row, result in enumerate(measured)]
        points = [(result.time(name) / result.time(unit), row) for row, result, name in found if name is not None]
        color, marker = LOOKS.get(kind) or next(others)
        axes.plot(*zip(*points, strict=True), marker, color=color, label=kind)
    axes.axvline(1, color="#888888", linewidth=1, label=unit)
    axes.set_xscale("log")
    axes.set_yticks(range(len(measured)), [f"{result.case}, {result.place}" for result in measured])
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_xlabel(f"time / time of {unit}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Reads results and draws those of one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="JSON of gut-fast bench")
    parser.add_argument("picture", type=Path, help="a PNG file")
    parser.add_argument("--benchmark", choices=("step", "train", "across"), default="step")
    options = parser.parse_args()
    draw([each for each in results.load(options.results) if each.benchmark == options.benchmark], options.picture)
    print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
