"""Second moments of an inner optimizer that are mixed each round."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks
from gut_fast.distributed import mix_together, state_step
from gut_fast.distributed.state_bucket import cut_off
from gut_fast.verify.lockstep import seeded
from quadratics import RING, parameters, same, set_gradients, train, values_of


def adamw(params, topology=RING, **options):
    return gf.Gossip(torch.optim.AdamW(params, lr=0.01), topology=topology, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_mixed_is_averaged_and_stays_above_zero(dtype):
    """On a graph of large weights, with numbers that the neighbours of an agent do not have."""
    graph = gf.topology.complete(64)
    values = seeded(64, 33, seed=1, dtype=torch.float32).abs().pow(8).to(dtype)
    values[1:, 5] = 0.0
    mixed = values.clone()
    mix_together(state_step([mixed], graph.csr()), "auto")
    assert bool((mixed >= 0).all())
    half, exact = torch.finfo(torch.bfloat16).eps, torch.finfo(dtype).eps
    mean = values.double().mean(0)
    assert (mixed.double().mean(0) - mean).abs().le(64 * exact * values.double().abs().amax(0)).all()
    assert (mixed.double() - mean).abs().le(2 * max(half, 64 * exact) * values.double().abs().amax(0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_travels_is_the_nearest_bfloat16_that_is_not_larger(dtype):
    """Of numbers of all sizes that the dtype has, those below the least bfloat16 among them."""
    exponents = torch.arange(-160, 127, dtype=torch.float64)
    numbers = (2.0 ** exponents[:, None] * (1 + seeded(len(exponents), 50, seed=1).abs())).to(dtype).flatten()
    numbers = torch.cat([numbers, -numbers, torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=dtype)])
    cut = cut_off(numbers)
    assert cut.dtype == torch.bfloat16
    assert bool((cut.double().abs() <= numbers.double().abs()).all())
    assert same(cut.signbit(), numbers.signbit())
    is_finite = numbers.isfinite()
    following = (cut.view(torch.int16) + 1).view(torch.bfloat16).double().abs()
    assert bool((following > numbers.double().abs())[is_finite].all())
    assert same(cut[~is_finite].double(), numbers[~is_finite].double())
    assert bool(cut_off(torch.tensor([torch.nan], dtype=dtype)).isnan().all())


def test_second_moments_are_mixed_at_the_end_of_each_round_only():
    params = parameters(torch.float32)
    optimizer = adamw(params, local_steps=3, mix_state=("exp_avg_sq",))
    plain_params = parameters(torch.float32)
    plain = adamw(plain_params, local_steps=3)
    spread = []
    for step in range(3):
        for p, q in zip(params, plain_params, strict=True):
            p.grad = seeded(*p.shape, seed=100 * step, dtype=torch.float32)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
        own, others = (
            [o.inner.state[p]["exp_avg_sq"] for p in o.param_groups[0]["params"]] for o in (optimizer, plain)
        )
        assert same(own, others) == (step < 2)
        spread.append(float(own[0].std(0).mean()))
    for v, w in zip(own, others, strict=True):
        expected = torch.einsum("ij,j...->i...", RING.matrix().float(), w)
        assert (v - expected).abs().max() <= 2**-7 * w.abs().max()
    assert same(values_of(params), values_of(plain_params))  # only later steps feel it
    assert spread[-1] < spread[-2]


def test_state_that_only_some_groups_have_is_mixed_there():
    params = parameters(torch.float32)
    groups = [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}]
    optimizer = adamw(groups, mix_state=("max_exp_avg_sq",))
    train(params, optimizer, range(2))
    has_state = ["max_exp_avg_sq" in optimizer.inner.state[p] for p in params]
    assert has_state == [False, False, True]
    with pytest.raises(ValueError, match="AdamW keeps 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"):
        adamw(groups, mix_state=("max_exp_avg",))


def test_states_that_are_not_there_yet_are_left_out():
    params = parameters(torch.float32)
    optimizer = adamw(params, mix_state=("exp_avg_sq",))
    optimizer.step()  # without any gradient
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert "exp_avg_sq" not in optimizer.inner.state[params[1]]


def test_state_of_another_shape_is_refused_before_anything_is_changed():
    params = parameters(torch.float32)
    optimizer = adamw(params, mix_state=("exp_avg_sq",))
    train(params, optimizer, range(2))
    optimizer.inner.state[params[1]]["exp_avg_sq"] = torch.zeros(6)
    optimizer.inner.step = lambda: None
    before = [value.clone() for value in values_of(params)]
    with pytest.raises(ValueError, match=r"mix_state: 'exp_avg_sq' of a parameter \(6, 5\) is \(6,\); only state of"):
        optimizer.step()
    assert same(values_of(params), before)


def test_compiled_steps_are_refused():
    params = parameters(torch.float32)
    optimizer = adamw(params, mix_state=("exp_avg_sq",))
    set_gradients(params, 0)
    with pytest.raises(Exception, match="with mix_state, leave step"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_messages_count_the_bytes_of_what_is_mixed():
    """Two bytes a number of 21, and one number for each of three tensors, beside the model in float32."""
    params = parameters(torch.float32)
    assert adamw(params).message_bytes().tolist() == [84] * 6
    mixed = adamw(parameters(torch.float32), mix_state=("exp_avg", "exp_avg_sq"))
    assert mixed.message_bytes().tolist() == [84 + 2 * 2 * 24] * 6


def test_a_run_goes_on_bit_for_bit():
    params = parameters(torch.float32)
    optimizer = adamw(params, local_steps=2, mix_state=["exp_avg_sq"])
    train(params, optimizer, range(5))
    others, other = copy.deepcopy((params, optimizer))
    assert other.mix_state == ("exp_avg_sq",)
    loaded = [nn.Parameter(value.clone()) for value in values_of(params)]
    third = adamw(loaded, local_steps=2, mix_state=("exp_avg_sq",))
    third.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, o in ((params, optimizer), (others, other), (loaded, third)):
        train(p, o, range(5, 9))
    assert same(values_of(params), values_of(others))
    assert same(values_of(params), values_of(loaded))


def end_of(mix_state, rule, **options):
    """The distance² of the agents' average from the common optimum of quadratics of very different gradients."""
    n, d = 8, 24
    scale = 10.0 ** seeded(n, d, seed=5).clamp(-1, 1)
    best = seeded(n, d, seed=6)
    z = nn.Parameter(torch.zeros(n, d, dtype=torch.float64))
    optimizer = gf.Gossip(
        torch.optim.AdamW([z], lr=2e-2, betas=(0.0, 0.999), weight_decay=0.0),
        rule,
        topology=gf.topology.complete(n),
        mix_state=mix_state,
        **options,
    )
    optimum = (scale * best).sum(0) / scale.sum(0)
    for step in range(6000):
        if step == 4000:
            optimizer.param_groups[0]["lr"] = 1e-3
        noise = 3.0 * seeded(n, d, seed=10_000 + step)
        z.grad = scale * (z.detach() - best) + noise * scale
        optimizer.step()
    return float((z.detach().mean(0) - optimum).square().sum())


@pytest.mark.slow
def test_second_moments_of_their_own_bias_the_average_and_mixed_ones_do_not():
    own, mixed = end_of((), "dsgd"), end_of(("exp_avg_sq",), "dsgd")
    assert mixed < own / 20, (own, mixed)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("exp_avg_sq", TypeError, r"mix_state must be a tuple of names, such as \('exp_avg_sq',\), got 'exp_avg_sq'"),
        ((1,), TypeError, "must be a tuple of names"),
        (("step",), ValueError, "'step', but of the shape of its parameters AdamW keeps 'exp_avg', 'exp_avg_sq'"),
        (("second",), ValueError, "'second', but of the shape"),
        (("exp_avg", "exp_avg"), ValueError, "a name twice"),
    ],
)
def test_names_that_cannot_be_mixed_are_refused(names, error, message):
    with pytest.raises(error, match=message):
        adamw(parameters(), mix_state=names)


def on_ranks(rank, size):
    where = {"topology": gf.topology.complete(size), "process_group": dist.group.WORLD}
    weights = [nn.Parameter(seeded(4, 3, seed=rank, dtype=torch.float32))]
    for inner in (torch.optim.Muon, torch.optim.Adafactor):
        optimizer = gf.Gossip(inner(weights, lr=0.01), **where)
        for step in range(3):
            set_gradients(weights, step)
            optimizer.step()
        with pytest.raises(TypeError, match="cannot make the local move: it looks at all agents' numbers together"):
            gf.Gossip(inner([nn.Parameter(torch.zeros(4, 3))], lr=0.01), topology=gf.topology.complete(4))
    return True


def test_optimizers_of_whole_matrices_serve_where_one_rank_holds_one_agent():
    assert ranks.run(2, on_ranks) == [True, True]


def test_coded_messages_and_mixed_second_moments_go_together():
    params, plain_params = parameters(torch.float32), parameters(torch.float32)
    optimizer = adamw(params, mix_state=("exp_avg_sq",), wire_dtype="int8")
    plain = adamw(plain_params, mix_state=("exp_avg_sq",))
    for step in range(3):
        for p, q in zip(params, plain_params, strict=True):
            p.grad = seeded(*p.shape, seed=step, dtype=torch.float32)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(params, plain_params, strict=True):
        assert same(optimizer.inner.state[p], plain.inner.state[q])
