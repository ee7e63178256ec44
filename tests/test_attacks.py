"""A short form of ``make fuzz``: hostile arguments, options and command lines, each batch in a process of its own."""

import pytest

from attacks.__main__ import COUNTS, run_batch


@pytest.mark.parametrize("name", COUNTS)
def test_nothing_falls(name):
    assert run_batch(name, seed=0, count=COUNTS[name] // 10) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_nothing_falls_for_longer(name):
    assert run_batch(name, seed=1, count=COUNTS[name]) == ""


FAULTS = {
    "crash": ("import ctypes; cpu.direct_step = lambda step: lambda: ctypes.string_at(1)", "killed by signal 11"),
    "wrong result": ("cpu.direct_step = lambda step: lambda: step.parameters[0].detach().add_(1.0)", "is off by"),
    "late refusal": (
        "right = ops.check_types\n"
        "def check_types(step):\n"
        "    for parameter in step.parameters[:1]:\n"
        "        parameter.detach().mul_(2.0)\n"
        "    right(step)\n"
        "ops.check_types = check_types",
        "has changed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    """Each kind of fault, put into the process of a batch as it starts."""
    text, finding = FAULTS[fault]
    (tmp_path / "sitecustomize.py").write_text(
        f"from gut_fast.kernels import ops\nfrom gut_fast.kernels.backends import cpu\n{text}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert finding in run_batch("arguments", seed=0, count=300)
