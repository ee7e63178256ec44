"""``gut-fast verify`` and the comparison under it: right kernels pass, every kind of fault is found and named."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import typer

from gut_fast import _core, reference, topology
from gut_fast.cli import verify as command
from gut_fast.cli.terminal import BadArgumentError
from gut_fast.kernels import ops
from gut_fast.kernels.backends import AUTOMATIC, BACKENDS
from gut_fast.kernels.backends import torch as plain_torch
from gut_fast.reference import PUBLISHED
from gut_fast.rules import RULES
from gut_fast.verify import cases, comparison, lockstep
from gut_fast.verify.lockstep import EXACT, LIMIT, PRECISIONS, Problem, compare

FLOAT32 = PRECISIONS["float32"]


@pytest.fixture
def verify(capsys):
    """A function that runs the command and returns its exit code and the words that it prints."""
    app = typer.Typer()
    app.command()(command.verify)

    def run(*arguments):
        code = app(arguments, standalone_mode=False) or 0
        return code, " ".join(capsys.readouterr().out.split())

    return run


@pytest.fixture
def plant(monkeypatch):
    """A function that makes a step function the backend "planted"."""

    def planted(step_function, unavailable=lambda *kind: None):
        module = SimpleNamespace(gossip_step=step_function, unavailable=unavailable, why_missing=None)
        ops.select_backend.cache_clear()
        monkeypatch.setitem(BACKENDS, "planted", module)

    yield planted
    ops.select_backend.cache_clear()


@pytest.fixture(autouse=True)
def few_graphs(monkeypatch):
    """One graph stands for all, so that each test is quick."""
    monkeypatch.setattr(cases, "_graphs", lambda seed: {"petersen()": topology.petersen().lazy(0.5)})


# Right kernels pass


@pytest.mark.parametrize("rule", ["dsgd", "gradient_tracking", pytest.param("qg_dsgdm", marks=pytest.mark.slow)])
def test_right_kernels_pass(rule, verify, tmp_path):
    file = tmp_path / "results.json"
    code, text = verify("--rule", rule, "--json", str(file), "--seed", "3")
    content = json.loads(file.read_text())
    found = {(line["backend"], line["precision"]) for line in content["lines"]}
    assert code == 0
    assert "right: " in text
    assert "WRONG" not in text
    assert content["passed"]
    assert content["seed"] == 3
    assert content["versions"]["torch"] == torch.__version__
    assert {("cpu", "float32"), ("cpu", "float64"), ("torch", "float32"), ("published", "float64")} <= found
    assert all(line["rule"] == rule and 0 < line["error"] <= LIMIT for line in content["lines"])
    assert ("torch", "bfloat16/float32") in found or not RULES[rule].states


def test_everything_is_asked_for_unless_told_otherwise():
    request = command._request(None, None, None, None, seed=0, full=False)
    assert request.rules == list(RULES.values())
    on_gpu = AUTOMATIC["cuda"] if torch.cuda.is_available() else ()
    assert request.backends == [name for name in BACKENDS if name in {*AUTOMATIC["cpu"], *on_gpu}]
    assert request.precisions == list(PRECISIONS.values())
    assert request.tiers == _core.available_tiers()
    assert all(name in PUBLISHED for name in RULES)


def test_cases_have_the_odd_sizes_and_special_steps(monkeypatch):
    monkeypatch.undo()
    usual = {case.label: case for case in cases.cases(RULES["dsgdm"], seed=0, full=False)}
    assert {"ring(1)", "torus(4, 4)", "one_peer_exponential(8)", "weight decay", "nesterov"} <= usual.keys()
    full = {case.label: case for case in cases.cases(RULES["dsgdm"], seed=0, full=True)}
    assert usual.keys() < full.keys()
    sizes = {(case.problem.num_agents, case.problem.columns) for case in full.values()}
    assert {(n, (d,)) for n in (1, 2, 3, 16, 257) for d in (1, 2, 63, 4097)} <= sizes
    assert all(case.num_steps > usual[label].num_steps for label, case in full.items() if label in usual)


def test_a_backend_that_comes_is_compared_in_all_it_serves(verify, plant):
    plant(plain_torch.gossip_step, lambda device, dtype, *_: "no doubles" if dtype is torch.float64 else None)
    code, text = verify("--rule", "gut", "--backend", "planted")
    assert code == 0
    assert text.count("planted") == len(PRECISIONS) - 1 + 1
    assert "not compared: planted in float64: no doubles" in text


def test_settings_are_put_back():
    before, tiers = (_core.tier(), torch.get_num_threads()), _core.available_tiers()
    for setting in comparison.settings("cpu", tiers, (1, 2)):
        with setting.in_force():
            assert (_core.tier(), torch.get_num_threads()) == (setting.tier, setting.threads)
    assert len(comparison.settings("cpu", tiers, (1, 2))) == 2 * len(tiers)
    assert comparison.settings("torch", tiers, (1, 2)) == [comparison.Setting()]
    assert len(comparison.settings("torch", tiers, (1, 2), "cuda")) == 2
    assert (_core.tier(), torch.get_num_threads()) == before


# Wrong kernels are found


def drops_an_edge(step):
    if step.neighbor.numel():
        row_start = step.row_start.clamp(max=step.neighbor.numel() - 1)
        step = step._replace(row_start=row_start, neighbor=step.neighbor[:-1], weight=step.weight[:-1])
    plain_torch.gossip_step(step)


def skips_the_last_column(step):
    before = step.parameters[-1][:, -1].clone()
    plain_torch.gossip_step(step)
    step.parameters[-1][:, -1] = before


def forgets_a_state(step):
    before = step.state[-1].clone()
    plain_torch.gossip_step(step)
    step.state[-1].copy_(before)


def ignores_the_gradient_scale(step):
    plain_torch.gossip_step(step._replace(grad_scale=None))


def leaves_out_segments_without_gradient(step):
    before = [parameter.clone() for parameter in step.parameters]
    plain_torch.gossip_step(step)
    for parameter, gradient, old in zip(step.parameters, step.gradients, before, strict=True):
        if gradient is None:
            parameter.copy_(old)


def writes_a_nan(step):
    plain_torch.gossip_step(step)
    step.parameters[0][-1, 0] = math.nan


def writes_behind_its_buffer(step):
    plain_torch.gossip_step(step)
    n = step.state[0].numel()
    step.state[0].as_strided((n + 1,), (1,))[n] = 0.0


class KeepsOldCoefficients:
    """A step that uses the coefficients of the first step with the same tensors."""

    def __init__(self):
        self.first = {}

    def __call__(self, step):
        plain_torch.gossip_step(
            step._replace(coefficients=self.first.setdefault(step.parameters[0].data_ptr(), step.coefficients))
        )


FAULTS = {
    "an edge": (drops_an_edge, "error"),
    "last column": (skips_the_last_column, "error"),
    "state": (forgets_a_state, "error"),
    "gradient scale": (ignores_the_gradient_scale, "gradient scale: error"),
    "no gradient": (leaves_out_segments_without_gradient, "no gradient: error"),
    "nan": (writes_a_nan, "error inf, more than 2"),
    "guard": (writes_behind_its_buffer, "writes beside its buffers"),
    "coefficients": (KeepsOldCoefficients(), "error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault, plant):
    step_function, message = FAULTS[fault]
    plant(step_function)
    precisions = [FLOAT32, PRECISIONS["bfloat16"]]
    result = comparison.verify(comparison.Request([RULES["gut"]], ["planted"], precisions, [], devices=["cpu"]))
    assert not any(candidate.passed for candidate in result.candidates)
    assert not result.passed
    failures = command._failures(result)
    for precision in precisions:
        assert any(f"gut on planted in {precision}: " in text and message in text for text in failures), failures


def test_too_little_precision_is_found(verify, plant):
    def in_float32(step):
        narrow = [tensor.float() for tensor in (*step.parameters, *step.state)]
        count = len(step.parameters)
        gradients = [gradient.float() for gradient in step.gradients]
        plain_torch.gossip_step(step._replace(parameters=narrow[:count], state=narrow[count:], gradients=gradients))
        for tensor, result in zip((*step.parameters, *step.state), narrow, strict=True):
            tensor.copy_(result)

    plant(in_float32)
    code, text = verify("--rule", "gutm", "--backend", "planted", "--dtype", "float64")
    assert code == 1
    assert "WRONG: gutm on planted in float64: " in text
    assert "1 of 2 lines are WRONG: gutm; do not trust" in text


def test_a_backend_that_fails_is_found_and_the_others_are_compared(verify, plant):
    def fails(step):
        raise RuntimeError("an illegal memory access\nand so on")

    plant(fails)
    code, text = verify("--rule", "dsgd", "--dtype", "float32", "--backend", "planted", "--backend", "torch")
    assert code == 1
    assert "WRONG: dsgd on planted in float32: petersen()" in text
    assert "RuntimeError: an illegal memory access" in text
    assert "and so on" not in text
    assert "1 of 2 lines are WRONG" in text


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        (lambda: _core.tier() == "baseline", "other bits with tier baseline"),
        (lambda: torch.get_num_threads() == 2, "2 threads than with"),
    ],
    ids=["tier", "threads"],
)
def test_bits_that_differ_between_tiers_or_threads_are_found(differs, message, verify, plant, monkeypatch):
    def one_rounding_more(step):
        plain_torch.gossip_step(step)
        if differs():
            step.parameters[0][0, 0] *= 1 + torch.finfo(step.parameters[0].dtype).eps

    plant(one_rounding_more)
    monkeypatch.setattr(comparison, "BACKENDS_WITH_TIERS", ("planted",))
    code, text = verify("--rule", "dsgd", "--backend", "planted", "--dtype", "float32")
    assert code == 1
    assert message in text


def test_bits_that_differ_from_run_to_run_on_a_device_are_found(plant):
    """On another device everything runs twice; "cpu:0" stands for one."""
    calls = iter(range(10**6))

    def restless(step):
        plain_torch.gossip_step(step)
        if next(calls) == 27:  # in the second run on the device, after one of 12 steps there and one on the CPU
            step.parameters[0][0, 0] *= 1 + torch.finfo(step.parameters[0].dtype).eps

    plant(restless)
    ask = comparison.Request([RULES["dsgd"]], ["planted", "torch"], [FLOAT32], [], devices=["cpu", "cpu:0"])
    result = comparison.verify(ask)
    wheres = {candidate.where: candidate for candidate in result.candidates}
    assert list(wheres) == ["planted", "planted, cpu:0", "torch", "torch, cpu:0"]
    assert wheres["planted"].passed
    assert "other bits with once more than with as it is" in wheres["planted, cpu:0"].faults[0]
    assert wheres["torch, cpu:0"].passed
    assert wheres["torch, cpu:0"].num_comparisons == 2 * wheres["torch"].num_comparisons
    assert command.legend(["baseline"], (1,), ask.devices).endswith("\ncpu:0: the same bits a second time")


@pytest.mark.gpu
def test_right_kernels_pass_on_a_gpu():
    ask = comparison.Request([RULES["gut"]], list(BACKENDS), list(PRECISIONS.values()), [], devices=["cuda"])
    result = comparison.verify(ask)
    assert {candidate.backend for candidate in result.candidates} >= {"torch", "published"}
    assert result.passed


def test_a_wrong_published_form_or_rule_is_found(verify, monkeypatch):
    class Wrong(PUBLISHED["gut"]):
        def step(self, g):
            super().step(g * (1 + 1e-12))

    monkeypatch.setitem(PUBLISHED, "gut", Wrong)
    code, text = verify("--rule", "gut", "--backend", "cpu", "--dtype", "float64")
    assert code == 1
    assert "WRONG: gut on published in float64: " in text
    assert "1 of 2 lines are WRONG" in text


def test_the_comparison_notices_a_difference(monkeypatch):
    true_step = reference.step
    problem = Problem(RULES["gut"], topology.ring(4), (1, 63), {"mu": 0.5}, lr=0.8)
    assert compare(problem, EXACT, "cpu") <= LIMIT
    assert compare(problem, FLOAT32, "cpu") <= LIMIT

    def slightly_wrong(rule, settings, *arguments, **options):
        return true_step(rule, {**settings, "mu": 0.5 + 1e-9}, *arguments, **options)

    monkeypatch.setattr(reference, "step", slightly_wrong)
    assert compare(problem, EXACT, "cpu") > LIMIT


def test_the_unit_is_what_plain_pytorch_loses():
    exact = [torch.ones(2, 3, dtype=torch.float64)]
    plain = [torch.full((2, 3), 1.001)]
    assert lockstep.excess_error([torch.full((2, 3), 1.003)], exact, plain, lr=0.1) == pytest.approx(3, rel=1e-3)
    assert lockstep.excess_error([torch.full((2, 3), math.nan)], exact, plain, lr=0.1) == math.inf
    few_roundings = [torch.ones(2, 3) + 8 * torch.finfo(torch.float32).eps]
    assert lockstep.excess_error(few_roundings, exact, [torch.ones(2, 3)], lr=0.1) == 2


# Requests that cannot be served


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "gott"), r"unknown rule 'gott'; known are dsgd, gut"),
        (("--backend", "gpu"), rf"--backend gpu: expected one of {', '.join(BACKENDS)}"),
        (("--dtype", "float8"), r"--dtype float8: expected one of float32, float64, float32/bfloat16"),
        (("--tier", "x87"), r"--tier x87: expected one of .*baseline"),
        (("--json", "."), r"--json \.: this is a folder"),
        (("--json", "no/such/folder.json"), "no/such"),
        (("--rule", "dsgd", "--dtype", "bfloat16/float32"), "there is nothing to compare"),
    ],
)
def test_bad_arguments_are_named(arguments, message, verify):
    with pytest.raises(BadArgumentError, match=message):
        verify(*arguments)


def test_a_backend_that_serves_nothing_is_an_error(verify, plant):
    plant(plain_torch.gossip_step, lambda *kind: "its chip is missing")
    with pytest.raises(BadArgumentError, match=r"nothing to compare; .* planted in float32, .*: its chip is missing"):
        verify("--rule", "gut", "--backend", "planted")


def test_candidates_keep_the_worst():
    candidate = comparison.Candidate("gut", "cuda", "cuda", "float32")
    for label, error in (("a", 0.5), ("b", 1.5), ("c", 1.0)):
        candidate.add(label, error, 2)
    assert (candidate.error, candidate.worst_case, candidate.num_comparisons, candidate.where) == (1.5, "b", 6, "cuda")
    assert candidate.passed
    candidate.add("d", math.inf)
    assert not candidate.passed


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_not_taken_for_a_proof(poison):
    row = torch.ones(2, 3, dtype=torch.float64)
    twin = torch.full((2, 3), poison, dtype=torch.float32)
    assert lockstep.excess_error([row], [row], [twin], lr=0.1) == math.inf
