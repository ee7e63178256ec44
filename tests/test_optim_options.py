"""What the classes of optimizers list: signatures, arguments, types; and the schedules that they stand."""

import copy
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import lr_scheduler

import gut_fast as gf
from gut_fast import optim
from gut_fast.optim.options import Options
from gut_fast.rules import next_drift_lr
from quadratics import RING, make, parameters, refused, same, set_gradients, snapshot, train, values_of

ROOT = Path(__file__).parents[1]
CLASSES = [getattr(optim, name) for name in optim.__all__ if inspect.isclass(getattr(optim, name))]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@each_class
def test_every_argument_is_in_the_signature_and_described(cls):
    listed = inspect.signature(cls).parameters
    described = re.findall(r"^ +(?:\*\*)?(\w+): ", inspect.getdoc(cls).partition("Args:\n")[2], re.MULTILINE)
    assert set(listed) <= set(described)
    assert listed["topology"].default is inspect.Parameter.empty
    if cls not in (gf.Gossip, gf.GossipOptimizer):
        assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in listed.values())
        assert set(Options.__annotations__) < set(listed)
        assert list(listed)[:2] == ["params", "lr"]
        assert all(
            listed[name].default == inspect.signature(gf.GossipOptimizer).parameters[name].default
            for name in Options.__annotations__
        )
        rule = cls(parameters(), topology=RING).rule
        assert {name: listed[name].default for name in rule.hyperparameters} == rule.hyperparameters


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        ({"mue": 0.9}, "GUT: unexpected keyword argument 'mue'; did you mean 'mu'"),
        ({"weight_decy": 0.1}, "did you mean 'weight_decay'"),
        ({"proces_group": None}, "did you mean 'process_group'"),
        ({"learning": 0.1}, "GUT: unexpected keyword argument 'learning'; its rule has: mu"),
    ],
)
def test_unknown_keywords_are_answered_with_the_nearest_right_one(unknown, message):
    with pytest.raises(TypeError, match=message):
        gf.GUT(parameters(), 0.1, topology=RING, **unknown)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nesterof'; did you mean 'nesterov'"):
        gf.GossipOptimizer(parameters(), "dsgdm", topology=RING, nesterof=True)


@pytest.mark.parametrize("setting", ["topology", "wire_dtype", "group"])
def test_what_a_run_rests_on_cannot_be_assigned(setting):
    params, optimizer = make()
    with refused(params, optimizer, AttributeError, setting):
        setattr(optimizer, setting, gf.topology.complete(6))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("local_steps", "has no 'local_steps' of its own; give it to the whole optimizer"),
        ("topology", "has no 'topology' of its own"),
        ("kapa", "has the key 'kapa'; did you mean 'kappa'"),
        ("weight_decy", ".* did you mean 'weight_decay'"),
    ],
)
@pytest.mark.parametrize(
    "make_one", [gf.GUT, lambda params, topology: gf.Gossip(torch.optim.AdamW(params), topology=topology)]
)
def test_keys_of_groups_that_would_have_no_effect_are_refused(make_one, key, message):
    params = parameters()
    optimizer = make_one(params[:1], topology=RING)
    with refused(params[:1], optimizer, ValueError, f"{optimizer._name}: a parameter group {message}"):
        optimizer.add_param_group({"params": params[1:], key: 0.5})
    optimizer.add_param_group({"params": params[1:], "name": "rest", "lr_scale": 2.0, "no_weight_decay": True})


@pytest.mark.parametrize("option", ["foreach", "fused", "differentiable"])
def test_other_ways_to_compute_a_step_are_refused_in_groups_too(option):
    params, optimizer = make()
    with refused(params, optimizer, ValueError, f"GUT: {option}=True is not possible: "):
        optimizer.add_param_group({"params": parameters(), option: True})
    with pytest.raises(TypeError, match=f"GUT: {option} must be True, False or None, got 'yes'"):
        gf.GUT(parameters(), topology=RING, **{option: "yes"})


LIKE_A_MODULE = {
    "a linear layer": lambda: torch.nn.Linear(5, 6),
    "a convolution": lambda: torch.nn.Conv2d(2, 6, 3),
    "layers and a norm": lambda: torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.LayerNorm(6)),
}


@pytest.mark.parametrize("name", LIKE_A_MODULE)
def test_a_plain_module_as_wide_as_the_number_of_agents_is_most_likely_a_mistake(name):
    torch.manual_seed(0)
    module = LIKE_A_MODULE[name]()
    with pytest.warns(UserWarning, match=r"GUT: are these .* of one plain module.* gut_fast.stack\(m") as said:
        gf.GUT(module.parameters(), topology=RING)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gf.GUT(gf.stack(module, 6).parameters(), topology=RING)
        gf.GUT([torch.nn.Parameter(torch.rand(6, 5)), torch.nn.Parameter(torch.zeros(6))], topology=RING)
        gf.GUT([torch.nn.Parameter(0.1 * torch.rand(6, 5))], topology=RING)
        gf.GUT(module.parameters(), topology=gf.topology.complete(1))


# The rate that the drift is divided by


@pytest.mark.parametrize("rule", gf.rules.RULES)
def test_a_falling_learning_rate_is_followed_in_e_alone(rule):
    rule = gf.rules.RULES[rule]
    now, before = rule.coefficients(0.01), rule.coefficients(0.1)
    held = rule.coefficients(0.01, drift_lr=0.1)
    assert (held.A, held.B, held.C, held.E[0]) == (now.A, now.B, now.C, now.E[0])
    assert list(held.E[1:]) == list(before.E[1:])
    assert rule.divides_drift == (now.E != held.E)
    assert rule.coefficients(0.1, drift_lr=0.01) == before  # the rate is never below the learning rate
    assert rule.coefficients(0.0, drift_lr=0.1) == rule.coefficients(0.0)


def test_the_rate_of_the_drift():
    rates, rate = [], 0.0
    for lr in (0.1, 0.1, 0.2, 0.01, 0.01, 0.0, 1.0):
        rate = next_drift_lr(lr, rate, 0.5)
        rates.append(rate)
    assert rates == [0.1, 0.1, 0.2, 0.1, 0.05, 0.025, 1.0]


RISING = [0.0, 0.01, 0.01, 0.05, 0.1]


def at_rates(optimizer, params, rates):
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        set_gradients(params, step)
        optimizer.step()
    return values_of(params)


def test_nothing_changes_while_the_learning_rate_is_constant_or_rises():
    published, plain = make(drift_memory=0.0), make()
    assert same(at_rates(published[1], published[0], RISING), at_rates(plain[1], plain[0], RISING))
    falling = [0.1, 0.01, 0.1]
    assert not same(at_rates(published[1], published[0], falling), at_rates(plain[1], plain[0], falling))


@pytest.mark.parametrize("rule", ["gut", "gutm", "qgt", "d2"])
def test_agents_agree_better_than_with_dsgd_after_warm_restarts(rule):
    """Noise over a tiny learning rate, multiplied by a large one, is what divided agents at a restart."""

    def error(rule, **options):
        params = parameters(shapes=((20,),))
        optimizer = gf.GossipOptimizer(params, rule, topology=RING, lr=0.05, **options)
        scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 25, eta_min=1e-7)
        largest = 0.0
        for step in range(100):
            train(params, optimizer, [step], scheduler)
            largest = max(largest, float(gf.consensus_error(params)) if step >= 25 else 0.0)
        return largest

    assert error(rule) < error("dsgd") / 2
    assert error(rule, drift_memory=0.0) > 100 * error(rule)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_the_rate_is_kept(how):
    params, optimizer = make()
    at_rates(optimizer, params, [0.1, 0.01])
    assert optimizer.param_groups[0]["drift_lr"] == pytest.approx(0.095)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = gf.GUT(twins, topology=RING)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if how == "deepcopy":
        twins, other = copy.deepcopy((params, optimizer))
    rates = [0.01, 0.005, 0.2]
    assert same(at_rates(optimizer, params, rates), at_rates(other, twins, rates))
    assert same(snapshot(params, optimizer), snapshot(twins, other))


def test_a_refused_step_does_not_advance_the_rate():
    params, optimizer = make()
    at_rates(optimizer, params, [0.1])
    optimizer.param_groups[0]["lr"] = 0.01
    params[0].grad = params[0].grad.to_sparse()
    with refused(params, optimizer, TypeError, "use dense gradients"):
        optimizer.step()


def test_a_captured_step_cannot_change_its_rate():
    with pytest.raises(ValueError, match=r"capturable=True with drift_memory=0.9: the drift's rate changes"):
        make(capturable=True, drift_memory=0.9)
    assert make(capturable=True)[1].param_groups[0]["drift_memory"] == 0.0


# Checkpoints of torch.distributed


@pytest.mark.parametrize("cls", [gf.DSGD, gf.GUT])
def test_asking_for_a_checkpoint_does_not_mix(cls):
    """Torch makes missing state by a step at learning rate 0, which would mix the agents."""
    module = gf.stack(torch.nn.Linear(3, 2), 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    optimizer = cls(module.parameters(), topology=gf.topology.ring(4))
    before = values_of([p.clone() for p in module.parameters()])
    for clear in (False, True):
        if clear:
            optimizer.state.clear()
        state = checkpoint.get_optimizer_state_dict(torch.nn.ParameterList(module.parameters()), optimizer)
        assert len(state["param_groups"]) == 1
    assert same(values_of(list(module.parameters())), before)
    assert optimizer.num_steps == 0


# What type checkers see

PRELUDE = """
from typing import Any
import torch
import torch.distributed as dist
import gut_fast as gf
params = [torch.nn.Parameter(torch.zeros(16, 3))]
topology = gf.topology.ring(16)
module = model = torch.nn.Linear(3, 2)
agents = gf.stack(model, 16)
optimizer: torch.optim.Optimizer = gf.GUT(params, topology=topology)
pg = dist.group.WORLD
N, batch_size, parts = 16, 4, [torch.arange(8)] * 16
accelerator: Any = None
"""

LINES = """
x = torch.zeros(16, 4, 3)
one = gf.GUT(agents.parameters(), lr=0.1, mu=0.9, topology=topology, process_group=dist.group.WORLD)
average: dict[str, Any] | None = gf.consolidate(model, optimizer)
gf.GUT([{"params": params, "lr": 0.1}], topology=topology, drift_memory=0.9, foreach=None, fused=False)
gf.DSGDm([("weight", params[0])], torch.tensor(0.1), momentum=0.9, nesterov=True, topology=topology, maximize=True)
gossip = gf.Gossip(torch.optim.AdamW(params, lr=1e-3), rule="gut", topology=topology, mu="auto")
gf.GossipOptimizer(params, "gut", lr=0.4, mu=0.8, topology=topology, state_dtype=torch.bfloat16)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
loss = agents(x).square().mean()
loss.backward()
optimizer.step()
optimizer.zero_grad(set_to_none=True)
norms: torch.Tensor = gf.clip_grad_norm_per_agent_(params, 1.0)
"""

WRONG = """
gf.GUT(params, lr=0.1, mu="fast", topology=topology)
gf.GUT(params, lr=0.1, topology=topology, momentun=0.9)
gf.GUT(params, lr=0.1)
gf.QGT(params, lr=0.1, topology=topology, overlap="yes")
"""


ABSTRACT = {"rule", "hyperparameters"}
"""Names in calls within sentences that stand for any value."""


MYPY = ("-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "--allow-untyped-calls")
"""How mypy is called: torch's own `Tensor.backward` has no types."""


def scripts():
    """Yields the Python code of README and docs: the blocks of a page, and each call within its sentences."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if blocks and page.name != "integrations.md":  # which shows parts of the examples
            yield f"{page.name}, blocks", "\n".join(["" if "import gut_fast" in blocks[0] else PRELUDE, *blocks])
        sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for number, call in enumerate(re.findall(r"`(gf\.[\w.]+\([^`\n]*\))`", sentences)):
            if "..." not in call and not ABSTRACT & set(re.findall(r"\w+", call)):
                yield f"{page.name}, call {number}", PRELUDE + call + "\n"


@pytest.mark.slow
def test_mypy_accepts_what_the_pages_show_and_refuses_what_is_wrong(tmp_path):
    pytest.importorskip("mypy")
    files = {"lines": PRELUDE + LINES, "wrong": PRELUDE + WRONG, **dict(scripts())}
    paths = {name: tmp_path / f"page_{place}.py" for place, name in enumerate(files)}
    for name, text in files.items():
        paths[name].write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *MYPY, f"--cache-dir={tmp_path / 'cache'}", *map(str, paths.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    own = [line for line in errors if paths["wrong"].name not in line and "page_" in line]
    assert own == [], {path.name: name for name, path in paths.items()}
    assert len({line.split(":")[1] for line in errors if paths["wrong"].name in line}) == len(WRONG.split("\n")) - 2
