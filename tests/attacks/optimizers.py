"""Hostile options of the optimizers: each is refused with a clear error, or the optimizer steps as its rule says.

After that something is put into a parameter group, a parameter, a gradient or the state, and steps go on.
"""

import copy
import math
import pickle
import random
import warnings

import torch

import gut_fast as gf
from attacks.arguments import check_message
from steps import combined_in_float64, rows_of

OPTIMIZERS = [
    gf.DSGD,
    gf.GUT,
    gf.GUTm,
    gf.D2,
    gf.QGGUTm,
    gf.DSGDm,
    gf.QGDSGDm,
    gf.GradientTracking,
    gf.MomentumTracking,
]
GRAPHS = [gf.topology.ring(4), gf.topology.complete(4), gf.topology.exponential(4), gf.topology.from_matrix([[1.0]])]
VALUES = [
    0,
    1,
    -1,
    0.5,
    1e-3,
    2**70,
    math.nan,
    math.inf,
    -math.inf,
    None,
    True,
    "0.1",
    "auto",
    [],
    {},
    (0.1,),
    1j,
    object(),
]
VALUES += [torch.tensor(0.1), torch.tensor([0.1, 0.2]), torch.tensor(math.nan), torch.float32, print, b"x", ""]
OPTIONS = [
    "lr",
    "weight_decay",
    "maximize",
    "drift_memory",
    "backend",
    "state_dtype",
    "foreach",
    "fused",
    "mu",
    "momentum",
]
OPTIONS += ["topology", "capturable", "differentiable", "process_group", "agents_per_rank", "overlap", "wire_dtype"]
OPTIONS += ["timeout", "on_peer_failure", "bucket_bytes", "sync_initial", "shared_memory", "nesterov", "no_such_option"]
GROUP_ENTRIES = ["lr", "weight_decay", "maximize", "mu", "momentum", "drift_memory", "drift_lr"]
REFUSALS = TypeError, ValueError, RuntimeError, NotImplementedError, ImportError
STEPS = 3


def attack(seed: int, count: int) -> int:
    """Makes and steps so many optimizers; raises AssertionError, which says which, when one does harm."""
    for number in range(count):
        rng, said = random.Random(f"{seed} {number}"), []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _attack_once(rng, said)
        except Exception as error:
            raise AssertionError(f"attack {number} of seed {seed}: {', '.join(said)}: {error!r}") from error
    return count


def _attack_once(rng, said):
    topology, make = rng.choice(GRAPHS), rng.choice(OPTIMIZERS)
    n = topology.num_agents
    shapes = rng.choice([[(n, 3)], [(n, 2, 2), (n,), (n, 5)], [(n, 0), (n, 1)]])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    options = {"lr": 0.1, "topology": topology}
    for _ in range(rng.choice([0, 1, 1, 2])):
        name, value = rng.choice(OPTIONS), rng.choice(VALUES)
        options[name] = value
        said.append(f"{name}={value!r}")
    said.insert(0, f"{make.__name__} on {topology}, {shapes} of {dtype}")
    given = parameters if rng.random() < 0.8 else _odd_parameters(rng, parameters, said)
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        optimizer = make(given, **options)
    except REFUSALS as error:
        refusal = str(error)
    else:
        _steps(rng, optimizer, parameters, said)
        return
    check_message(refusal)
    assert all(map(torch.equal, before, (p.detach() for p in parameters))), "refused, but parameters have changed"


def _steps(rng, optimizer, parameters, said):
    """Takes some steps, unless one is refused."""
    for _ in range(STEPS):
        _put_something(rng, optimizer, parameters, said)
        optimizer = _copied(rng, optimizer, said)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not _step(optimizer, parameters):
            return


def _odd_parameters(rng, parameters, said):
    """Something else than a list of parameters."""
    first = parameters[0]
    name, odd = rng.choice(
        [
            ("none at all", []),
            ("a tensor", first),
            ("twice the same", [first, first]),
            ("no leaf", [first * 1]),
            ("of another shape", [torch.nn.Parameter(torch.ones(7, 2))]),
            ("numbers", [1.0, 2.0]),
            ("a dictionary", {"params": parameters}),
            ("groups", [{"params": [p]} for p in parameters]),
            ("a group without any", [{"lr": 0.1}]),
            ("an empty group", [{"params": parameters}, {"params": []}]),
            ("named", [(f"p{k}", p) for k, p in enumerate(parameters)]),
            ("nothing", None),
            ("whole numbers", [torch.ones(4, 2, dtype=torch.int64)]),
            ("sparse", [torch.nn.Parameter(torch.eye(4).to_sparse())]),
            ("meta", [torch.nn.Parameter(torch.ones(4, 2, device="meta"))]),
            ("of two types", [first, torch.nn.Parameter(torch.ones(first.shape, dtype=torch.float16))]),
        ]
    )
    said.append(f"parameters: {name}")
    return odd


def _put_something(rng, optimizer, parameters, said):
    """Gives gradients, and now and then puts something odd where users put things."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) if rng.random() < 0.9 else None
    if rng.random() < 0.6 or not parameters:
        return
    group, parameter, value = rng.choice(optimizer.param_groups), rng.choice(parameters), rng.choice(VALUES)
    how = rng.choice(["entry", "state", "clear", "gradient", "no entry", "data", "grown"])
    said.append(f"{how} {value!r}")
    try:
        if how == "entry":
            group[rng.choice(GROUP_ENTRIES)] = value
        elif how == "no entry":
            group.pop(rng.choice(GROUP_ENTRIES), None)
        elif how == "state":
            for name in optimizer.state[parameter]:
                optimizer.state[parameter][name] = rng.choice([value, torch.ones(3), torch.ones_like(parameter)])
        elif how == "clear":
            optimizer.state.clear()
        elif how == "gradient":
            parameter.grad = rng.choice(
                [None, torch.zeros_like(parameter), torch._neg_view(torch.ones_like(parameter))]
            )
        elif how == "data":
            parameter.data = rng.choice([torch.ones(3), torch.ones_like(parameter), parameter.data.double()])
        else:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones_like(parameter))], "lr": value})
    except REFUSALS as error:
        check_message(str(error))


def _copied(rng, optimizer, said):
    """The optimizer, or a copy with parameters of its own, by one of the usual ways."""
    how = rng.choice(["as it is", "as it is", "as it is", "copied", "pickled", "loaded"])
    if how == "as it is" or any(p.device.type == "meta" for group in optimizer.param_groups for p in group["params"]):
        return optimizer
    said.append(how)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    try:
        if how == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            return optimizer
        optimizer = copy.deepcopy(optimizer) if how == "copied" else pickle.loads(pickle.dumps(optimizer))
    except (*REFUSALS, AttributeError, pickle.PicklingError):  # what was put there can not be copied
        return optimizer
    for parameter, gradient in zip((p for g in optimizer.param_groups for p in g["params"]), gradients, strict=True):
        is_like = gradient is not None and (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
        parameter.grad = gradient.clone() if is_like else None
    return optimizer


def _step(optimizer, parameters):
    """Takes a step, which equals float64's; returns False once it was refused, with nothing changed."""
    before = _bits(optimizer, parameters)
    try:
        expected = [_expected(optimizer, index) for index in range(len(optimizer.param_groups))]
    except Exception:
        expected = None
    try:
        optimizer.step()
    except (*REFUSALS, KeyError) as error:
        refusal = str(error)
    else:
        for index, truths in enumerate(expected or []):
            if truths is not None:
                _compare(optimizer, index, truths)
        return True
    check_message(refusal)
    assert before == _bits(optimizer, parameters), f"refused ({refusal}), but something has changed"
    return False


def _expected(optimizer, index):
    step = optimizer._snapshot(index) if optimizer.param_groups[index]["params"] else None
    if step is None or not sum(parameter.numel() for parameter in step.parameters):
        return None
    gradients = [
        torch.zeros_like(p) if g is None else g.resolve_neg()
        for p, g in zip(step.parameters, step.gradients, strict=True)
    ]
    results = combined_in_float64(step._replace(gradients=gradients), [None] * step.num_agents)
    return results if all(each.isfinite().all() and each.abs().max() < 1e6 for each in results) else None


def _compare(optimizer, index, truths):
    step = optimizer._snapshot(index)
    dtypes = {step.parameters[0].dtype, *(buffer.dtype for buffer in step.state)}
    # The drift is divided by the rate, and so is its rounding.
    rate = min(float(optimizer.param_groups[index]["lr"]), 1.0) or 1.0
    limit = (0.05 if dtypes & {torch.bfloat16, torch.float16} else 1e-5) / rate
    for place, (rows, truth) in enumerate(zip(rows_of(step), truths, strict=True)):
        error = float((rows.detach().double() - truth).abs().max() / truth.abs().max().clamp(min=1.0))
        assert error <= limit, f"output {place} is off by {error:.1e}"


def _bits(optimizer, parameters):
    """Parameters, state and the number of steps, to compare."""
    tensors = [*parameters]
    for own in dict.values(optimizer.state):
        tensors += [value for value in own.values() if isinstance(value, torch.Tensor)]
    readable = [t.detach() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return [(t.dtype, t.shape, t.float().nan_to_num().tolist()) for t in readable], optimizer.num_steps
