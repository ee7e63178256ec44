"""Hostile command lines: each ends with exit code 0, or with 1 or 2 and one line that says what is wrong."""

import contextlib
import io
import os
import random
import tempfile
from pathlib import Path

from gut_fast import cli

WORDS = [
    "",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "1e400",
    "nan",
    "inf",
    "ring:4",
    "ring:0",
    "ring:-3",
    "ring:x",
    "torus:2x2",
]
WORDS += ["torus:0x4", "petersen:3", "complete:3", "random-regular:4:3:0", "random-regular:4:9:0", "ring:99999999999"]
WORDS += [
    "gut",
    "d2",
    "no-such",
    "mlp",
    "lenet5",
    "mlp:0",
    "cpu",
    "cuda",
    "meta",
    "float16",
    "0.1",
    "-0.1",
    "auto",
    "all",
]
WORDS += [
    ".",
    "/",
    "/dev/null",
    "/no/such/folder",
    "\x00",
    "\x1b[31m",
    "$\\foo$",
    "ä\u2028b",
    "a" * 5000,
    "%s%n",
    "'",
    "{}",
]
FILES = ["broken.yaml", "list.yaml", "empty", "bytes", "folder"]
COMMANDS = {
    "train": "--preset --data --model --norm --topology --gamma --partition --alpha --classes-per-agent --augment "
    "--validation --rule --lr --mu --momentum --nesterov --set --weight-decay --inner --inner-set --max-grad-norm "
    "--batch-size --schedule --warmup --milestones --decay --seeds --engine --backend --state-dtype --device "
    "--autocast --threads --on-peer-failure --eval-every --out --resume --json",
    "sweep": "--jobs --threads --data-folder",
    "tune": "--jobs --threads --data-folder",
    "report": "--out --baseline --title --json",
    "topology": "--gamma --lr --curvature --out --network --json --bandwidth --latency --compute --model-bytes "
    "--overlap --straggler-probability --noise --heterogeneity --target --sizes --runs --accuracy",
    "info": "--json",
    "data": "--data-folder --topology --partition --alpha --classes-per-agent --seed --out --json",
    "": "--version --help",
    "no-such-command": "",
}
"""The options of each command that neither download nor start other processes."""
QUICK = {"train": ["--steps", "1", "--threads", "1", "--topology", "ring:3"]}
CODES = 0, 1, 2


def attack(seed: int, count: int) -> int:
    """Runs so many commands; raises AssertionError, which says which, when one does harm."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _make_files()
            for number in range(count):
                _attack_once(random.Random(f"{seed} {number}"), f"attack {number} of seed {seed}")
        finally:
            os.chdir(before)
    return count


def _attack_once(rng, number):
    arguments = _arguments(rng)
    try:
        _run(arguments)
    except Exception as error:
        raise AssertionError(f"{number}: gut-fast {arguments!s:.500}: {error!r}") from error


def _make_files():
    Path("broken.yaml").write_text("methods: {A: {rule: gut}\n", encoding="utf-8")
    Path("list.yaml").write_text("- 1\n", encoding="utf-8")
    Path("empty").touch()
    Path("bytes").write_bytes(bytes(range(256)))
    Path("folder").mkdir()


def _arguments(rng):
    command = rng.choice(list(COMMANDS))
    arguments = [command, *QUICK.get(command, [])] if command else []
    for _ in range(rng.randrange(4)):
        if COMMANDS[command] and rng.random() < 0.7:
            arguments.append(rng.choice(COMMANDS[command].split()))
        arguments.append(rng.choice([*WORDS, *FILES]))
    return arguments


def _run(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert code in CODES, f"exit code {code}"
    assert "Traceback" not in err.getvalue(), err.getvalue()[-500:]
    if code:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("gut-fast: error: ")]
        assert len(lines) == 1, f"code {code} and on stderr {err.getvalue()[-500:]!r}"
        assert "\x1b" not in lines[0], "an escape sequence reaches the terminal"
