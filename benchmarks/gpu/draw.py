"""Makes Markdown and pictures of what `run.py` has measured.

    python benchmarks/gpu/draw.py FOLDER/results.json [--output benchmarks/results]

Keeps the JSON beside them. Needs matplotlib.
"""

import argparse
import json
import shutil
from pathlib import Path

from gut_fast.benchmark.gpu import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="the JSON that run.py has written")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results", help="a folder")
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    *pictures, page = report.draw(found, options.output)
    file = shutil.copyfile(options.results, page.with_suffix(".json"))
    print(f"wrote {', '.join(str(path) for path in (file, *pictures, page))}")


if __name__ == "__main__":
    main()
