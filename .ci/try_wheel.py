"""Tries a wheel outside the checkout: ``python try_wheel.py WHEEL`` installs it in an empty environment and uses it.

The compiled module is imported alone; its instruction tiers must be those that this processor has. Where a folder of
pip's (PIP_FIND_LINKS) holds a torch for this Python, eight agents train with the kernel and with plain PyTorch, and the
results are compared; elsewhere a line says that there is none.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MODULE = """
import importlib.util, sys
(path,) = __import__("pathlib").Path(sys.prefix).glob("lib/*/site-packages/gut_fast/_core.*.so")
core = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("_core", path))
spec.loader.exec_module(core)
flags = open("/proc/cpuinfo").read().split()
has = {"x86-64-v4": "avx512vl" in flags, "x86-64-v3": "avx2" in flags, "baseline": True}
assert core.available_tiers() == [tier for tier in has if has[tier]], core.available_tiers()
print(f"Python {sys.version.split()[0]}: the compiled module has {', '.join(core.available_tiers())}")
"""

TRAINING = """
import sys, torch, gut_fast as gf
assert gf.__file__.startswith(sys.prefix), gf.__file__

def trained(backend):
    torch.manual_seed(0)
    agents, inputs = gf.stack(gf.models.mlp(8, [16], 2), 8), torch.randn(8, 32, 8)
    optimizer = gf.GUT(agents.parameters(), lr=0.1, mu=0.9, topology=gf.topology.ring(8), backend=backend)
    for _ in range(50):
        optimizer.zero_grad()
        torch.vmap(torch.nn.functional.cross_entropy)(agents(inputs), (inputs[..., 0] > 0).long()).sum().backward()
        optimizer.step()
    return torch.cat([each.detach().flatten() for each in agents.parameters()])

torch.testing.assert_close(trained("cpu"), trained("torch"))
print(f"gut_fast {gf.__version__}, torch {torch.__version__}: the kernel trains as plain PyTorch does")
"""


def main(wheel: Path) -> None:
    """Installs and uses the wheel in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = [str(Path(folder, "bin/python")), "-I"]
        pip = [*python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*pip, "--no-deps", wheel], check=True)
        subprocess.run([*python, "-c", MODULE], cwd=folder, check=True)
        torch = [*pip, "--no-deps", "--no-index", "torch"]  # from folders only: an index has gigabytes for GPUs
        if subprocess.run(torch, cwd=folder, capture_output=True).returncode:
            print("no torch for this Python lies in pip's folders (PIP_FIND_LINKS): nothing was trained")
        else:
            subprocess.run([*pip, wheel], check=True)
            subprocess.run([*python, "-c", TRAINING], cwd=folder, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
