"""Short forms of ``make soak`` and ``make sanitize``."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(script, *arguments):
    return subprocess.run([sys.executable, TESTS / script, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_grows():
    done = run("soak/resources.py", "--steps", "600", "--optimizers", "100", "--simulators", "12")
    assert done.stdout.splitlines()[-1:] == ["nothing grew"], done.stdout + done.stderr
    assert done.returncode == 0


LEAK = """
import runpy, sys
import gut_fast as gf
kept, step = [], gf.GossipOptimizer.step
gf.GossipOptimizer.step = lambda self: kept.append(open({file!r}, "rb")) or step(self)
sys.argv = ["resources.py", "--steps", "200", "--optimizers", "0", "--simulators", "0"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_what_grows_is_found():
    text = LEAK.format(file=__file__, script=str(TESTS / "soak" / "resources.py"))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert "grew: steps" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_kills_lose_nothing():
    done = run("soak/kills.py", "--checkpoints", "15", "--sweeps", "1")
    assert done.stdout.splitlines()[-1:] == ["lost: 0"], done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_steps_beside_each_other_do_not_race():
    """ThreadSanitizer; of AddressSanitizer, which takes minutes to compile, ``make test-all`` runs a short form."""
    done = run("sanitize", "thread", "--steps", "100")
    assert done.stdout.splitlines()[-1:] == ["nothing was reported"], done.stdout + done.stderr
    assert done.returncode == 0
