"""Draws results: the time of every contender beside the ceiling's, or else the baseline's, in every case.

python benchmarks/picture.py benchmarks/results/amd-epyc.json docs/step.png [--benchmark step]
"""

import argparse
from pathlib import Path

from matplotlib import pyplot

from gut_fast.bench import results

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with every kind of colour vision."""


def draw(measured: list[results.Result], path: Path) -> None:
    """Writes a picture with a row for each result and a mark for the fastest contender of each kind."""
    unit = "ceiling" if all("ceiling" in result.measurements for result in measured) else measured[0].baseline
    kinds = list(dict.fromkeys(results.kind_of(name) for result in measured for name in result.measurements))
    figure, axes = pyplot.subplots(figsize=(9, 1.8 + 0.28 * len(measured)), layout="constrained")
    for number, kind in enumerate(kind for kind in kinds if kind != unit):
        found = [(row, result, result.fastest(kind)) for row, result in enumerate(measured)]
        points = [(result.time(name) / result.time(unit), row) for row, result, name in found if name is not None]
        marker = "o" if number == 0 else "sDv^PX*"[number % 7]
        axes.plot(*zip(*points, strict=True), marker, color=COLORS[number % len(COLORS)], label=kind)
    axes.axvline(1, color="#888888", linewidth=1, label=unit)
    axes.set_xscale("log")
    axes.set_yticks(range(len(measured)), [f"{result.case}, {result.place}" for result in measured])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_xlabel(f"time / time of {unit}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


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
