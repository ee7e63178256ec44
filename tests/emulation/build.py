"""Compiles gut_fast._cuda for the CPU, kernels and all, with this folder's stand-ins for CUDA's headers.

The library is kept in build/emulation under a name that changes with the sources, so that it is compiled once, however
many processes and sessions test with it.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SOURCES = [*(CSRC / "cuda").glob("*.c*[pu]"), CSRC / "bindings" / "cuda.cpp", HERE / "emulator.cpp"]
HEADERS = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")]
# Only explicit contractions, as for the device; the fibers' jumps leave their stack, as they are meant to.
FLAGS = "-std=c++17 -O1 -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -fvisibility=hidden"
WARNINGS = "-Wall -Wextra -Werror -Wfatal-errors -Wno-unknown-pragmas -U_FORTIFY_SOURCE"
INCLUDES = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]


def run_compiler(*arguments):
    command = [os.environ.get("CXX", "c++"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def compile_source(source, folder):
    output = folder / f"{source.name}.o"
    includes = [f"-I{path}" for path in INCLUDES]
    run_compiler(*FLAGS.split(), *WARNINGS.split(), *includes, "-x", "c++", "-c", source, "-o", output)
    return output


def compile_library(library):
    longest_first = sorted(SOURCES, key=lambda source: source.name != "cuda.cpp")
    with tempfile.TemporaryDirectory(dir=library.parent) as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        objects = list(pool.map(lambda source: compile_source(source, folder), longest_first))
        run_compiler("-shared", *objects, "-o", folder / "_cuda.so")
        (folder / "_cuda.so").rename(library)


def load():
    """The emulated module, and its library with `set_emulation(multiprocessors, shared_bytes, seed)`."""
    contents = [path.read_bytes() for path in sorted({*SOURCES, *HEADERS, Path(__file__)})]
    key = hashlib.sha256(b"\0".join([*contents, os.environ.get("CXX", "c++").encode(), sys.version.encode()]))
    library = ROOT / "build" / "emulation" / f"{key.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_library(library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(library))
