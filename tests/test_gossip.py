"""Any local optimizer made decentralized, and clipping per agent."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import gut_fast as gf
import ranks
from gut_fast.distributed import PeerError
from gut_fast.verify.lockstep import seeded
from quadratics import MATCHING, RING, parameters, refused, same, set_gradients, snapshot, train


@pytest.mark.parametrize("rule", gf.rules.RULES)
def test_sgd_inside_equals_the_plain_class(rule):
    plain, wrapped = parameters(), parameters()
    one = gf.GossipOptimizer(plain, rule, lr=0.1, topology=RING, weight_decay=0.02)
    other = gf.Gossip(torch.optim.SGD(wrapped, lr=0.1, weight_decay=0.02), rule, topology=RING)
    for step in range(25):
        for params in (plain, wrapped):
            set_gradients(params, step)
        one.step()
        other.step()
    for p, q in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-9)


def inner_sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.02)


@pytest.mark.parametrize("inner", [inner_sgd, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_factors_are_on_the_gradients_that_the_inner_optimizer_sees(inner):
    scale = torch.tensor([1.0, 0.0, 0.5, 3.0, -1.0, 0.0])
    (params, optimizer), (twins, twin) = ((p, gf.Gossip(inner(p), topology=RING)) for p in (parameters(), parameters()))
    for step in range(4):
        set_gradients(params, step)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad * scale.view(6, *[1] * (p.dim() - 1))
            p.grad[1], p.grad[5] = float("nan"), float("inf")
        params[step % 3].grad = twins[step % 3].grad = None
        given = [p.grad for p in params]
        optimizer.step(grad_scale=scale)
        twin.step()
        assert all(p.grad is gradient for p, gradient in zip(params, given, strict=True))
    assert same(snapshot(params, optimizer), snapshot(twins, twin))
    assert all(same(optimizer.inner.state[p], twin.inner.state[q]) for p, q in zip(params, twins, strict=True))


def train_scaled(rank, size):
    """Trains with GradScaler, and with gradients as they are; one rank finds infinities, where its own are zero."""
    results = []
    for is_scaled in (True, False):
        params = [torch.nn.Parameter(torch.full(shape, 1.0 + rank)) for shape in ((3, 5), ())]
        where = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD}
        optimizer = gf.Gossip(torch.optim.AdamW(params, lr=0.1), **where)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=is_scaled)
        for step in range(6):
            optimizer.zero_grad()
            has_overflow = (step, rank) == (4, 1)
            spoilt = (torch.inf if is_scaled else 0.0) if has_overflow else 1.0
            scaler.scale(sum((p - step).square().sum() for p in params) * spoilt).backward()
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in params])
    return results


def test_grad_scaler_across_ranks_changes_no_number():
    for scaled, plain in ranks.run(2, train_scaled):
        assert same(scaled, plain)
        assert all(p.isfinite().all() for p in scaled)


def test_it_cannot_be_captured():
    inner = torch.optim.AdamW(parameters(), lr=0.01)
    with pytest.raises(ValueError, match="Gossip: no capturable=; a CUDA graph"):
        gf.Gossip(inner, topology=RING, capturable=True)


def test_state_in_bfloat16():
    params = parameters(torch.float32)
    optimizer = gf.Gossip(torch.optim.AdamW(params, lr=0.01), topology=RING, state_dtype=torch.bfloat16)
    train(params, optimizer, range(3))
    assert all(optimizer.state[p]["r"].dtype == torch.bfloat16 for p in params)
    assert all(optimizer.inner.state[p]["exp_avg"].dtype == torch.float32 for p in params)


def test_adamw_with_tracking_agrees_better_than_without():
    def disagreement(rule, **hyperparameters):
        params = parameters(shapes=((20,),))
        optimizer = gf.Gossip(torch.optim.AdamW(params, lr=0.01), rule, topology=RING, **hyperparameters)
        train(params, optimizer, range(600))
        return gf.consensus_error(params)

    assert disagreement("gut", mu=0.9) < disagreement("dsgd") / 2


def test_at_one_agent_the_inner_optimizer_is_all():
    plain, wrapped = parameters(num_agents=1), parameters(num_agents=1)
    one = torch.optim.AdamW(plain, lr=0.01)
    other = gf.Gossip(torch.optim.AdamW(wrapped, lr=0.01), "dsgd", topology=gf.topology.ring(1))
    for step in range(20):
        for params in (plain, wrapped):
            set_gradients(params, step)
        one.step()
        other.step()
    for p, q in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-10)


def test_schedulers_hand_the_learning_rate_on():
    params = parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    optimizer = gf.Gossip(inner, "gut", topology=RING)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [0.0, 1.0, 0.5][min(epoch, 2)])
    expected = RING.matrix() @ params[0].detach().flatten(1)
    train(params, optimizer, [0], scheduler)
    torch.testing.assert_close(params[0].detach().flatten(1), expected)  # lr = 0: z mixes
    train(params, optimizer, [1], scheduler)
    assert inner.param_groups[0]["lr"] == 0.1
    train(params, optimizer, [2], scheduler)
    assert inner.param_groups[0]["lr"] == 0.05


def test_a_scheduler_on_the_inner_optimizer_is_an_error_not_a_surprise():
    params = parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    optimizer = gf.Gossip(inner, topology=RING)
    inner.param_groups[0]["lr"] = 0.01
    set_gradients(params, 0)
    with refused(params, optimizer, RuntimeError, r"changed from \[0.1\] to \[0.01\]; attach schedulers to the Gossip"):
        optimizer.step()


def test_an_inner_step_that_fails_leaves_the_parameters():
    class Failing(torch.optim.SGD):
        luck = True

        def step(self, closure=None):
            super().step(closure)
            if not self.luck:
                raise RuntimeError("out of luck")

    params = parameters()
    optimizer = gf.Gossip(Failing(params, lr=0.1), topology=RING)
    optimizer.inner.luck = False
    set_gradients(params, 0)
    with refused(params, optimizer, RuntimeError, "out of luck"):
        optimizer.step()


def test_groups():
    params = parameters()
    inner = torch.optim.AdamW([{"params": params[:1], "lr": 0.02}, {"params": params[1:2]}], lr=0.01)
    optimizer = gf.Gossip(inner, "gut", topology=RING, mu=0.5)
    optimizer.add_param_group({"params": params[2:], "lr": 0.03, "mu": 0.2, "betas": (0.5, 0.9)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.03]
    assert [group["mu"] for group in optimizer.param_groups] == [0.5, 0.5, 0.2]
    assert inner.param_groups[2]["betas"] == (0.5, 0.9)
    train(params, optimizer, range(3))
    assert inner.param_groups[2]["lr"] == 0.03


class Choosy(torch.optim.SGD):
    """An optimizer of one's own that raises after it has added a group with Nesterov momentum."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if param_group["nesterov"]:
            raise RuntimeError("no nesterov")


@pytest.mark.parametrize("wire", [None, "int4"])
@pytest.mark.parametrize(
    ("inner", "group", "message"),
    [
        (lambda params: torch.optim.AdamW([("a", params[0])]), {}, "with/without names"),
        (lambda params: torch.optim.AdamW(params[:1]), {"weight_decay": -1.0, "mu": 1.5}, "mu"),
        (lambda params: torch.optim.AdamW(params[:1]), {"lr": -1.0}, "lr"),
        (lambda params: Choosy(params[:1], 0.1), {"nesterov": True}, "no nesterov"),
    ],
    ids=["names", "rule", "rate", "own"],
)
def test_a_group_that_one_of_both_refuses_changes_neither(inner, group, message, wire):
    ends = []
    for is_tried in (True, False):
        params = parameters(torch.float32)
        optimizer = gf.Gossip(inner(params), mu=0.2, topology=RING, wire_dtype=wire)
        train(params[:1], optimizer, range(2))
        if is_tried:
            with refused(params[:1], optimizer, (ValueError, RuntimeError), message):
                optimizer.add_param_group({"params": params[1:], **group})
            assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 1
        train(params[:1], optimizer, range(2, 4))
        ends.append(snapshot(params[:1], optimizer))
    assert same(*ends)


def add_refused_by_the_inner(rank, size):
    """The inner optimizer of rank 1 refuses a group; then all go on."""
    first, second = (torch.nn.Parameter(torch.full((3,), k + float(rank))) for k in range(2))
    inner = Choosy([first], lr=0.1)
    optimizer = gf.Gossip(inner, topology=gf.topology.complete(size), process_group=dist.group.WORLD)
    error, message = (RuntimeError, "no nesterov") if rank else (PeerError, "rank 1 does not come .* no nesterov")
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [second], "nesterov": rank == 1})
    optimizer.step()
    return first.detach().clone(), len(optimizer.param_groups), len(inner.param_groups)


def test_a_rank_whose_inner_optimizer_refuses_a_group_tells_the_others():
    assert same(ranks.run(2, add_refused_by_the_inner), [(torch.full((3,), 0.5), 1, 1)] * 2)


@pytest.mark.parametrize("is_listed_anew", [False, True])
def test_parameters_that_come_to_a_group_or_go_are_followed_by_both(is_listed_anew):
    params = parameters()
    optimizer = gf.Gossip(torch.optim.AdamW(params[:2], lr=0.01), "dsgd", topology=RING)
    group = optimizer.param_groups[0]
    train(params[:2], optimizer, range(2))
    if is_listed_anew:
        group["params"] = params[1:]
    else:
        group["params"].append(params[2])
        del group["params"][0]
    train(params, optimizer, range(2, 4))
    assert list(optimizer.inner.state) == params[1:]
    assert optimizer.inner.state[params[2]]["step"] == 2
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = gf.Gossip(torch.optim.AdamW(twins[1:], lr=0.01), "dsgd", topology=RING)
    twin.load_state_dict(saved)
    train(params, optimizer, range(4, 6))
    train(twins, twin, range(4, 6))
    assert same([p.detach() for p in params], [p.detach() for p in twins])


def test_names_of_parameters_are_those_of_the_inner_optimizer():
    a, b, c = parameters()
    optimizer = gf.Gossip(torch.optim.AdamW([("a", a), ("b", b)]), mu=0.2, topology=RING)
    optimizer.add_param_group({"params": [("c", c)]})
    for one in (optimizer, optimizer.inner):
        assert [group["param_names"] for group in one.param_groups] == [["a", "b"], ["c"]]
    train([a, b, c], optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_state_dict_and_pickle_continue_bit_for_bit():
    def build(params):
        return gf.Gossip(torch.optim.AdamW(params, lr=0.01), "gut", topology=MATCHING)

    params = parameters()
    optimizer = build(params)
    train(params, optimizer, range(5))
    loaded = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = build(loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch.optim shares the tensors it loads
    unpickled, unpickled_params = pickle.loads(pickle.dumps((optimizer, params)))
    train(params, optimizer, range(5, 10))
    train(loaded, other, range(5, 10))
    train(unpickled_params, unpickled, range(5, 10))
    assert same(snapshot(params, optimizer), snapshot(loaded, other))
    assert same(snapshot(params, optimizer), snapshot(unpickled_params, unpickled))


def test_bad_input():
    params = parameters()
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        gf.Gossip(params, topology=RING)
    with pytest.raises(TypeError, match="LBFGS cannot make the local move"):
        gf.Gossip(torch.optim.LBFGS(params), topology=RING)
    with pytest.raises(TypeError, match="Adafactor cannot make the local move: it looks at all agents' numbers"):
        gf.Gossip(torch.optim.Adafactor(params), topology=RING)
    with pytest.raises(TypeError, match="GUT cannot make the local move"):
        gf.Gossip(gf.GUT(params, 0.1, topology=RING), topology=RING)
    with pytest.raises(ValueError, match=r"expected \(5, ...\)"):
        gf.Gossip(torch.optim.SGD(params, 0.1), topology=gf.topology.ring(5))
    with pytest.raises(ValueError, match="no 'inner' entry"):
        gf.Gossip(torch.optim.SGD(params, 0.1), topology=RING).load_state_dict(
            gf.GUT(parameters(), 0.1, topology=RING).state_dict()
        )


class Logged(torch.optim.Adafactor):
    """A subclass of one of torch's optimizers that look at whole tensors."""


class Trust(torch.optim.SGD):
    """An optimizer of one's own that divides each tensor's gradient by its norm over all agents, as LARS and LAMB."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


class Rows(Trust):
    """As `Trust`, but for matrices alone, as Muon."""

    def step(self, closure=None):
        assert all(p.dim() == 2 for group in self.param_groups for p in group["params"])
        super().step()


class Cubes(torch.optim.SGD):
    """An optimizer of one's own that refuses the tensors of every trial step."""

    def step(self, closure=None):
        if any(p.dim() != 4 for group in self.param_groups for p in group["params"]):
            raise RuntimeError("four dimensions only")
        return super().step(closure)


class Decayed(torch.optim.SGD):
    """An optimizer of one's own that treats every number by itself, with state and an attribute of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr, momentum=0.9)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


@pytest.mark.parametrize("mixing", [Logged, Trust, Rows])
def test_optimizers_that_look_at_whole_tensors_are_refused_whatever_their_class(mixing):
    with pytest.raises(TypeError, match=rf"{mixing.__name__} cannot make the local move: it looks at all agents' numb"):
        gf.Gossip(mixing(parameters(), lr=0.1), topology=RING)


def test_an_optimizer_that_cannot_be_tried_is_told():
    params = parameters(shapes=((2, 3, 5),))
    with pytest.warns(UserWarning, match=r"Cubes cannot take a trial step \(RuntimeError four dimensions only\)"):
        optimizer = gf.Gossip(Cubes(params, lr=0.1), topology=RING)
    train(params, optimizer, range(1))


def test_trying_an_optimizer_leaves_it_alone():
    params, twins = parameters(), parameters()
    inner, state = Decayed(params, 0.1), torch.get_rng_state()
    optimizer = gf.Gossip(inner, "dsgd", topology=RING)
    assert (inner.calls, dict(inner.state)) == (0, {})
    assert torch.equal(torch.get_rng_state(), state)
    twin = gf.Gossip(torch.optim.SGD(twins, 0.1, momentum=0.9), "dsgd", topology=RING)
    train(params, optimizer, range(3))
    train(twins, twin, range(3))
    assert same([p.detach() for p in params], [p.detach() for p in twins])


def test_options_of_the_inner_optimizer_are_not_given_to_gossip():
    for option, reason in (("weight_decay", "give it to the inner optimizer"), ("lr", "it is that of the inner")):
        with pytest.raises(ValueError, match=f"Gossip: no {option}=; {reason}"):
            gf.Gossip(torch.optim.SGD(parameters(), 0.1), topology=RING, **{option: 0.1})
    with pytest.raises(TypeError, match="Gossip: unexpected keyword argument 'mue'; did you mean 'mu'"):
        gf.Gossip(torch.optim.SGD(parameters(), 0.1), topology=RING, mue=0.1)


def test_a_tensor_learning_rate_is_handed_on_in_place():
    params, lr = parameters(), torch.tensor(0.1)
    inner = torch.optim.SGD(params, lr=lr)
    optimizer = gf.Gossip(inner, topology=RING)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(params, optimizer, range(3), scheduler)
    assert inner.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.025)


def test_what_a_step_refuses_leaves_the_inner_optimizer_alone():
    params = parameters(shapes=((3, 5),))
    optimizer = gf.Gossip(torch.optim.Adam(params, lr=0.1), topology=RING)
    set_gradients(params, 0)
    optimizer.step()
    params[0].grad = None
    params[0].data = params[0].data.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="parameter 0 is not contiguous"):
        optimizer.step()
    assert optimizer.inner.state[params[0]]["step"] == 1


def test_the_inner_state_of_another_optimizer_is_refused():
    params = parameters()
    saved = gf.Gossip(torch.optim.SGD(parameters(), lr=0.1), topology=RING).state_dict()
    optimizer = gf.Gossip(torch.optim.Adam(params, lr=0.1), topology=RING)
    with pytest.raises(ValueError, match="the inner state is of 'SGD', expected 'Adam'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_equals_torchs_for_each_agent(norm_type):
    params = parameters()
    set_gradients(params, 0)
    agents = [[torch.nn.Parameter(p.detach()[i]) for p in params] for i in range(6)]
    for i, rows in enumerate(agents):
        for row, p in zip(rows, params, strict=True):
            row.grad = p.grad[i].clone()
    norms = gf.clip_grad_norm_per_agent_(params, 1.5, norm_type)
    for i, rows in enumerate(agents):
        torch.testing.assert_close(norms[i], torch.nn.utils.clip_grad_norm_(rows, 1.5, norm_type))
        for row, p in zip(rows, params, strict=True):
            torch.testing.assert_close(p.grad[i], row.grad)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_leaves_out_parameters_without_a_number(norm_type):
    params = parameters()
    set_gradients(params, 0)
    empty = torch.nn.Parameter(torch.zeros(6, 0, dtype=params[0].dtype))
    empty.grad = torch.zeros_like(empty)
    expected = gf.clip_grad_norm_per_agent_(params, float("inf"), norm_type)
    assert torch.equal(gf.clip_grad_norm_per_agent_([empty, *params], float("inf"), norm_type), expected)
    assert gf.clip_grad_norm_per_agent_(empty, 1.0, norm_type).tolist() == [0] * 6


def test_clipping_bad_input():
    params = parameters()
    assert gf.clip_grad_norm_per_agent_(params, 1.0).shape == (0,)
    set_gradients(params, 0)
    params[0].grad[4, 0, 0] = float("inf")
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match=r"agents \[4\] is not finite"):
        gf.clip_grad_norm_per_agent_(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(TypeError, match="max_norm must be a number, got '1'"):
        gf.clip_grad_norm_per_agent_(params, "1")
    with pytest.raises(ValueError, match="max_norm must be >= 0, got nan"):
        gf.clip_grad_norm_per_agent_(params, float("nan"))
    odd = torch.nn.Parameter(seeded(5, 2, seed=0))
    odd.grad = torch.zeros_like(odd)
    with pytest.raises(ValueError, match="must share the leading dimension"):
        gf.clip_grad_norm_per_agent_([*params, odd], 1.0)
    assert same([p.grad for p in params], before)


@pytest.mark.parametrize("wire", ["int8", "int4", torch.bfloat16], ids=str)
def test_coded_messages_serve_an_inner_optimizer_and_its_state(wire):
    def make():
        parameter = torch.nn.Parameter(seeded(4, 300, seed=1, dtype=torch.float32))
        ring = gf.topology.ring(4)
        inner = torch.optim.AdamW([parameter], lr=0.01)
        return parameter, gf.Gossip(inner, "gut", mu=0.5, topology=ring, wire_dtype=wire)

    def train(parameter, optimizer):
        for _ in range(6):
            parameter.grad = parameter.detach() - torch.arange(4.0)[:, None]
            optimizer.step()

    (parameter, optimizer), (other, restored) = make(), make()
    train(parameter, optimizer)
    other.data.copy_(parameter.detach())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(parameter, optimizer)
    train(other, restored)
    assert torch.equal(parameter, other)
