"""Everything that is to be known of a GPU, in one call of under ten minutes.

    python benchmarks/gpu/run.py FOLDER [--parts steps,peers] [--seconds 540] [--device cpu]

Writes FOLDER/results.json after every measurement, and FOLDER/table.txt, which it also prints, at the end. Needs
gut_fast, built where nvcc is found, and nothing besides what torch brings; `draw.py` makes a page of the results.
"""

import signal
import sys

from gut_fast.benchmark.gpu.run import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # by an exception, so that the part at work ends too
    sys.exit(main())
