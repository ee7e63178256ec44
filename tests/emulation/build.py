"""Compiles gut_fast._cuda for the CPU, kernels and all, with this folder's stand-ins for CUDA's headers."""

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [*(CSRC / "cuda").glob("*.c*[pu]"), CSRC / "bindings" / "cuda.cpp", HERE / "emulator.cpp"]
# No contraction but the explicit one, as for the device; the fibers' jumps leave their stack, as they are meant to.
FLAGS = "-std=c++17 -O1 -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -fvisibility=hidden"
WARNINGS = "-Wall -Wextra -Werror -Wfatal-errors -Wno-unknown-pragmas -U_FORTIFY_SOURCE"
INCLUDES = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]


def compiler(*arguments):
    command = [os.environ.get("CXX", "c++"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def compiled(source, folder):
    output = folder / f"{source.name}.o"
    includes = [f"-I{path}" for path in INCLUDES]
    compiler(*FLAGS.split(), *WARNINGS.split(), *includes, "-x", "c++", "-c", source, "-o", output)
    return output


def build(folder):
    """The emulated module, and its library with `set_emulation(multiprocessors, shared_bytes, seed)`."""
    longest_first = sorted(SOURCES, key=lambda source: source.name != "cuda.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(source, folder), longest_first))
    library = folder / "_cuda.so"
    compiler("-shared", *objects, "-o", library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(library))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
