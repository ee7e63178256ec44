"""Builds the CPU module with sanitizers and runs it: ``make sanitize``.

    python tests/sanitize address      # AddressSanitizer and UBSan: the kernels' tests and the attacks on arguments
    python tests/sanitize thread       # ThreadSanitizer: steps of several threads at once

Both run the concurrent driver. Builds are kept in build/sanitize. The exit code is 1 if anything is reported.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
KINDS = {"address": "address,undefined", "thread": "thread"}
LIBRARIES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ()}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at the end of the process
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
}
TESTS = ["test_cpu.py", "test_tensor_kinds.py", "test_ops.py", "test_codes.py"]
SITE = """\
import sys  # an editable installation would import the module that it has built itself
sys.meta_path[:] = [each for each in sys.meta_path if "ScikitBuild" not in type(each).__name__]
"""


def main() -> int:
    """Builds and runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="kind", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--steps", type=int, default=300, help="of each thread of the driver")
    parser.add_argument("--seeds", type=int, default=3, help="batches of attacks on arguments")
    options = parser.parse_args()
    failed = []
    for kind in options.kinds:
        folder = build(kind)
        for name, command in commands(kind, folder, options):
            print(f"{kind}: {name}", flush=True)
            if subprocess.run(command, cwd=ROOT / "tests", env=environment(kind, folder)).returncode:
                failed.append(f"{kind}: {name}")
    print(f"reported: {', '.join(failed)}" if failed else "nothing was reported")
    return bool(failed)


def build(kind: str) -> Path:
    """Compiles the driver, and the module in a package of links, and returns the folder of the build."""
    folder = ROOT / "build" / "sanitize" / kind
    flags = f"-fsanitize={KINDS[kind]} -fno-sanitize-recover=all -fno-omit-frame-pointer"
    settings = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_FLAGS": flags,
        "GUT_FAST_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    configure = [cmake, "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in settings.items())]
    targets = ["concurrent", *(["_core"] if kind == "address" else [])]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{kind}: compiling, some minutes; what the compiler says is in {log.relative_to(ROOT)}", flush=True)
    with log.open("w") as file:
        for command in (configure, [cmake, "--build", folder, "--parallel", "--target", *targets]):
            subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, check=True)
    if kind == "address":
        link_package(folder)
    return folder


def link_package(folder: Path) -> None:
    """Makes a package of links to the sources, with the module of this build."""
    package = folder / "package" / "gut_fast"
    package.mkdir(parents=True, exist_ok=True)
    (module,) = folder.glob("_core*.so")
    sources = [each for each in (ROOT / "python" / "gut_fast").iterdir() if each.suffix != ".so"]
    for source in [*sources, module]:
        link = package / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    (package.parent / "sitecustomize.py").write_text(SITE)


def commands(kind: str, folder: Path, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """What is run with a sanitizer, with names."""
    driver = [str(folder / "concurrent"), str(options.steps)]
    if kind == "thread":  # it cannot follow threads that a forked child starts
        return [("concurrent steps", [*driver, "0"])]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS]
    attacks = [sys.executable, "-m", "attacks", "--only", "arguments", "--batches", str(options.seeds)]
    return [
        ("concurrent steps, and forks", [*driver, "40"]),
        ("the kernels' tests", tests),
        ("attacks on arguments", attacks),
    ]


def environment(kind: str, folder: Path) -> dict[str, str]:
    """The sanitizer's options, and for Python the libraries that must come first."""
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in LIBRARIES[kind]
    ]
    path = os.pathsep.join([str(folder / "package"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(found), "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main())
