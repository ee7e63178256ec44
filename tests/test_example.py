"""The example: one process, several, and torchrun print the same numbers; it goes on where it was."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"


def run_example(folder, steps):
    """Runs the example in this process, and returns the lines that it prints."""
    printed, arguments = io.StringIO(), [str(EXAMPLE), "--folder", str(folder), "--steps", str(steps)]
    given, sys.argv = sys.argv, arguments
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        sys.argv = given
    return printed.getvalue().splitlines()


def run_rank(rank, size, folder, steps):
    """Runs the example as a rank."""
    with ranks.as_torchrun(rank, size):
        lines = run_example(folder, steps)
        assert not dist.is_initialized()
    return lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with torch.random.fork_rng():
        return run_example(tmp_path_factory.mktemp("alone"), 60)


def test_it_learns_and_says_where_time_and_bytes_went(alone):
    first, second, end = alone
    assert re.fullmatch(r"step 50: test loss \d\.\d{6}, accuracy \d\d\.\d\d%", first)
    assert float(second.split()[-1].rstrip("%")) > 90
    assert re.fullmatch(r"process 0 of 1: .* s, of which mixing .* s; 0.00 MB to other processes", end)


def test_four_processes_print_the_same_numbers(tmp_path, alone):
    first, *others = ranks.run(4, run_rank, tmp_path, 60)
    model_bytes = 4 * (64 * 32 + 32 + 32 * 10 + 10)
    assert first[:2] == alone[:2]
    assert first[2].endswith(f"; {60 * 2 * model_bytes / 1e6:.2f} MB to other processes")
    assert others == [[], [], []]


def test_two_processes_started_again_go_on_to_the_same_end(tmp_path, alone):
    before, _ = ranks.run(2, run_rank, tmp_path, 50)
    after, _ = ranks.run(2, run_rank, tmp_path, 60)
    assert [before[0], after[0]] == alone[:2]
    assert [len(before), len(after)] == [2, 2]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(EXAMPLE), "--folder", str(tmp_path), "--steps", "3"]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["step 3", "process 0 of 2"]
