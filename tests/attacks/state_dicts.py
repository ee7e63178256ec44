"""An attack on `load_state_dict`: states with one to three entries deleted, replaced, added or bent out of shape.

Each either loads, and the optimizer then takes a step and saves a state that loads; or it is refused by a ValueError or
a TypeError that names the optimizer or rule, and nothing has changed, to the bit.
"""

import contextlib
import copy
import random

import torch
import torch.distributed as dist

import gut_fast as gf
from gut_fast.rules import RULES
from quadratics import MATCHING, RING, make, parameters, same, set_gradients, train


def gossip(inner, rule="gut", **options):
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return params, gf.Gossip(inner(groups, lr=0.1, **options), rule, topology=RING)


def on_a_rank():
    """Makes an optimizer on the one rank of a process group; what others know of its agents is in its state."""
    params = [torch.nn.Parameter(p.detach()[:1].expand_as(p).clone()) for p in parameters(torch.float32)]
    where = {"process_group": dist.group.WORLD, "agents_per_rank": 6, "wire_dtype": torch.bfloat16}
    return params, gf.GUTm(params, lr=0.1, topology=RING, **where)


def coded(topology):
    """Makes an optimizer whose messages are coded, though all agents are here."""
    params = parameters(torch.float32)
    return params, gf.GUT(params, lr=0.1, mu=0.3, topology=topology, wire_dtype="int8")


@contextlib.contextmanager
def one_rank():
    """Makes a process group of this process alone, unless there is one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trained(maker):
    """Calls the maker of parameters and optimizer, and takes three steps."""
    params, optimizer = maker()
    train(params, optimizer, range(3))
    return params, optimizer


TARGETS = {
    **{rule: lambda rule=rule: make(gf.GossipOptimizer, rule=rule, split=1) for rule in RULES},
    "varying": lambda: make(gf.GUTm, topology=MATCHING, split=1),
    "lr is a tensor": lambda: make(gf.GUT, lr=torch.tensor(0.1), split=1),
    "half-width state": lambda: make(gf.GUT, dtype=torch.float32, state_dtype=torch.bfloat16, split=1),
    "differences": lambda: coded(RING),
    "modulo": lambda: coded(MATCHING),
    "AdamW": lambda: gossip(torch.optim.AdamW),
    "AdamW, amsgrad": lambda: gossip(torch.optim.AdamW, "gutm", amsgrad=True),
    "SGD": lambda: gossip(torch.optim.SGD, "dsgd"),
    "SGD, momentum": lambda: gossip(torch.optim.SGD, momentum=0.9, nesterov=True),
    "RMSprop": lambda: gossip(torch.optim.RMSprop, "gutm", momentum=0.5),
    "Adagrad": lambda: gossip(torch.optim.Adagrad),
    "one rank": on_a_rank,
}
"""Makers of parameters and an optimizer, mostly with two groups."""


def freed():
    tensor = torch.ones(6, 5)
    tensor.untyped_storage().resize_(0)
    return tensor


def deep():
    nested = []
    for _ in range(20_000):
        nested = [nested]
    return nested


VALUES = (
    *(lambda value=value: copy.deepcopy(value) for value in (None, True, "r", b"r", (), [], {}, [[1.0]], {"r": 1.0})),
    *(lambda value=value: value for value in (-1, 2, 10**30, 10**400, -(2**70), 0.5, -0.5, 1e300)),
    *(
        lambda value=value: value
        for value in (float("nan"), float("inf"), 1j, object(), range(3), torch.float32, {1, 2}, print)
    ),
    lambda: torch.ones(6, 5),
    lambda: torch.ones(()),
    lambda: -torch.ones(1),
    lambda: torch.tensor(float("nan")),
    lambda: torch.ones(2, requires_grad=True) * 2,
    lambda: torch.ones(6, 5, device="meta"),
    lambda: torch.ones((), device="meta"),
    lambda: torch.ones(6, 5).to_sparse(),
    lambda: torch.ones(()).to_sparse(),
    lambda: torch.ones(6, 5, dtype=torch.complex64),
    lambda: torch.ones(6, 5, dtype=torch.int64),
    freed,
    deep,
)
"""Makers of values that an entry may be replaced with."""

BENDS = (
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.bfloat16(),
    lambda t: t.to(torch.int32),
    lambda t: t.to(torch.complex128),
    lambda t: t * float("nan"),
    lambda t: t[..., None],
    lambda t: t.flatten()[:-1],
    lambda t: t.expand(2, *t.shape),
    lambda t: t.tolist(),
    lambda t: t.numpy(),
    lambda t: -t,
    lambda t: t.mT if t.dim() > 1 else t.reshape(-1, 1),
)
"""What is done to tensors."""

KEYS = (
    0,
    1,
    7,
    -1,
    True,
    "",
    "r",
    "m",
    "lr",
    "mu",
    "step",
    (0, "r"),
    None,
    1.5,
    b"state",
    "params",
    "wire",
    "known",
    "copies",
)


def places(tree, path=()):
    """The paths of all entries of nested dicts and lists, but those within deep ones."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        if len(path) < 6:
            yield from places(value, (*path, key))


def mutate(tree, chance):
    """Changes one entry of nested dicts and lists, in place, or returns something else in the tree's place."""
    if chance.random() < 0.01:
        return chance.choice(VALUES)()
    path = chance.choice([*places(tree)] or [()])
    if not path:
        return tree
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = chance.random()
    if isinstance(old, torch.Tensor) and kind < 0.4:
        with contextlib.suppress(Exception):  # what was bent before may not bend again
            if old.layout is not torch.strided or old.is_meta or old.untyped_storage().nbytes():
                parent[key] = chance.choice(BENDS)(old)
    elif kind < 0.6:
        parent[key] = chance.choice(VALUES)()
    elif kind < 0.75:
        del parent[key]
    elif isinstance(parent, dict):
        parent[chance.choice(KEYS)] = chance.choice((old, chance.choice(VALUES)()))
        if chance.random() < 0.5:
            parent.pop(key, None)
    else:
        parent[key:] = chance.choice(([old, old], [[old]], parent[::-1]))
    return tree


def bits(params, optimizer):
    """Copies all that a refused state must leave as it was, with NaN and tensors compared by their bytes."""

    def frozen(value):
        if isinstance(value, torch.Tensor):
            return (
                str(value.dtype),
                tuple(value.shape),
                value.detach().contiguous().view(-1).numpy(force=True).tobytes(),
            )
        if isinstance(value, dict):
            return {key: frozen(each) for key, each in value.items()}
        return [frozen(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)

    return frozen(list(params)), frozen(float_state(optimizer.state_dict())), optimizer.num_steps


def float_state(value):
    """Widens bfloat16, which numpy does not have."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, dict):
        return {key: float_state(each) for key, each in value.items()}
    return [float_state(each) for each in value] if isinstance(value, list) else value


def check_valid(params, optimizer, maker):
    """The optimizer must have all of its state, take a step, and save what another one loads."""
    names = set(optimizer.rule.states)
    assert all(set(optimizer.state[p]) == names for p in params)
    assert all(value.shape == p.shape for p in params for value in optimizer.state[p].values())
    set_gradients(params, 3)
    if not torch_cannot_step(optimizer):
        optimizer.step()
    # A rate that float32 does not hold is handed on to an inner optimizer, and refused when that is tried.
    if all(float(group["lr"]) < torch.finfo(torch.float32).max for group in optimizer.param_groups):
        maker()[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))


def torch_cannot_step(optimizer):
    """PyTorch's fused SGD needs the momentum of all parameters of a group, or of none."""
    inner = getattr(optimizer, "inner", None)
    if not isinstance(inner, torch.optim.SGD):
        return False
    found = [[inner.state[p].get("momentum_buffer") is None for p in g["params"]] for g in inner.param_groups]
    return any(g.get("fused") and len(set(each)) > 1 for g, each in zip(inner.param_groups, found, strict=True))


def check_one(name, maker, params, optimizer, state):
    """Loads a state that was changed; returns True if it was taken."""
    before, error = bits(params, optimizer), None
    try:
        optimizer.load_state_dict(state)
    except Exception as raised:
        error = raised
    if error is not None:
        is_known = isinstance(error, (ValueError, TypeError)) or "no step count" in str(error)
        assert is_known, (name, error)
        assert str(error).startswith((f"{optimizer._name}:", "rule ")), (name, error)
        assert same(bits(params, optimizer), before), (name, error)
        return False
    check_valid(params, optimizer, maker)
    return True


def attack(seed, count):
    """Makes `count` attacks on optimizers in turn; returns how many. Raises AssertionError when something falls."""
    with one_rank():
        return attack_all(seed, count)


def attack_all(seed, count):
    chance = random.Random(seed)
    good = {}
    for name, maker in TARGETS.items():
        params, optimizer = trained(maker)
        good[name] = params, optimizer, copy.deepcopy(optimizer.state_dict())
    for number in range(count):
        name = [*TARGETS][number % len(TARGETS)]
        params, optimizer, state = good[name]
        state = copy.deepcopy(state)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            state = mutate(state, chance)
        try:
            was_taken = check_one(name, TARGETS[name], params, optimizer, state)
        except Exception as error:
            raise AssertionError(f"seed {seed}, attack {number}, on {name}: {error!r}") from error
        if was_taken:
            params, optimizer = trained(TARGETS[name])
            good[name] = params, optimizer, copy.deepcopy(optimizer.state_dict())
    return count
