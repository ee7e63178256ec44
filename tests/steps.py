"""Steps of random numbers, what a rank sees of them, and what they come to: the tests of kernels start from these."""

import warnings

import torch

from gut_fast import topology
from gut_fast.kernels import ops
from gut_fast.kernels.backends import GossipStep
from gut_fast.reference import drift
from gut_fast.rules import Coefficients, UpdateRule, get_rule
from gut_fast.verify.lockstep import seeded

COLUMNS = (5, 1, 130)


def a_step(rule="gut", graph=None, columns=COLUMNS, dtype=torch.float32, state_dtype=None, device="cpu", **settings):
    """A step of a rule from random parameters, state and gradients; agent 0's gradient scale is zero."""
    graph, rule, sizes = graph or topology.ring(6), get_rule(rule), list(enumerate(columns))
    n = graph.num_agents
    coefficients = rule.coefficients(**{"lr": 0.1, "weight_decay": 0.01, **settings})
    return GossipStep(
        [seeded(n, d, seed=k, dtype=dtype).to(device) for k, d in sizes],
        [seeded(n * sum(columns), seed=90 + k, dtype=state_dtype or dtype).to(device) for k in range(len(rule.states))],
        [seeded(n, d, seed=50 + k, dtype=dtype).to(device) for k, d in sizes],
        torch.tensor(coefficients.flat(), dtype=torch.float64),
        rule.num_messages,
        *graph.csr(0, device),
        torch.linspace(0, 1, n, dtype=torch.float64, device=device),
    )


def own_rule(num_states, num_messages):
    """A user's rule in which no coefficient is zero, so that nothing of its shape is special."""
    outputs, inputs = num_states + 1, num_states + 2

    def formula(lr, leak=0.1):
        def filled(rows, columns, seed):
            return (leak * seeded(rows, columns, seed=seed)).tolist()

        A, B = filled(num_messages, inputs, 1), filled(outputs, inputs, 2)
        A[0][0], A[0][-1] = 1.0, -lr
        C, E = filled(outputs, num_messages, 3), filled(outputs, num_messages, 4)
        C[0][0] = E[0][0] = 0.9
        return Coefficients(A, B, C, E)

    return UpdateRule(f"own_{num_states}_{num_messages}", tuple(f"s{k}" for k in range(num_states)), formula)


def asymmetric():
    """Three agents with a row-stochastic W that is not symmetric."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return topology.from_matrix([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.2, 0.0, 0.8]])


def unequal_complete(n):
    """A complete graph of n agents in which no two edges have the same weight."""
    weights = seeded(n, n, seed=3).abs().clamp(max=1) + 0.1
    W = (weights + weights.T) / (4 * n)
    W.fill_diagonal_(0)
    return topology.from_matrix((W + torch.diag(1 - W.sum(1))).tolist())


def copied(step):
    """The step with parameters and state of its own."""
    return step._replace(parameters=[p.clone() for p in step.parameters], state=[s.clone() for s in step.state])


def stepped(step, backend):
    """A copy of the step after it was taken."""
    step = copied(step)
    ops.gossip_step_(*step, backend)
    return step


def outputs(step):
    """All that a step changes: parameters and state."""
    return [*step.parameters, *step.state]


def blocks(buffer, step):
    """The segments [N, d] of a state."""
    return [block.view(step.num_agents, -1) for block in buffer.split([p.numel() for p in step.parameters])]


def length_of(step):
    """The number of numbers in a row of messages."""
    return step.num_messages * sum(p.numel() for p in step.parameters) // step.num_agents


def part_of(step, agents):
    """The agents whose rows a rank with these `agents` needs, its own first, and the rank's own step."""
    edges = [range(int(step.row_start[i]), int(step.row_start[i + 1])) for i in agents]
    names = [[int(step.neighbor[e]) for e in own] for own in edges]
    rows = [*agents, *sorted({name for own in names for name in own} - set(agents))]
    device = step.row_start.device
    return rows, step._replace(
        parameters=[p[agents] for p in step.parameters],
        state=[torch.cat([block[agents].flatten() for block in blocks(buffer, step)]) for buffer in step.state],
        gradients=[g[agents] for g in step.gradients],
        row_start=torch.tensor([0, *map(len, edges)], device=device).cumsum(0),
        neighbor=torch.tensor([rows.index(name) for own in names for name in own], dtype=torch.int64, device=device),
        weight=torch.cat([step.weight[list(own)] for own in edges]),
        grad_scale=None if step.grad_scale is None else step.grad_scale[agents],
    )


def combined_in_float64(step, rows):
    """Parameters and state, as rows [N, ΣD] in float64, after mixing these rows of messages; None stands for S."""
    n, M, K = step.num_agents, step.num_messages, len(step.state) + 2
    sizes = [M * K, (K - 1) * K, (K - 1) * M, (K - 1) * M]
    A, B, C, E = (
        block.view(-1, columns) for block, columns in zip(step.coefficients.split(sizes), (K, K, M, M), strict=True)
    )
    z = torch.cat([p.view(n, -1) for p in step.parameters], dim=1).double().cpu()
    state = [torch.cat(blocks(s, step), dim=1).double().cpu() for s in step.state]
    g = torch.cat([g.view(n, -1) for g in step.gradients], dim=1).double().cpu()
    if step.grad_scale is not None:
        g = g * step.grad_scale.cpu()[:, None]
    u = torch.stack([z, *state, g])
    S = torch.tensordot(A, u, 1)
    X = torch.stack([S[:, i].flatten() if row is None else row.double().cpu() for i, row in enumerate(rows)])
    W = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    agents = torch.arange(n).repeat_interleave(step.row_start.cpu().diff())
    W.index_put_((agents, step.neighbor.cpu()), step.weight.cpu(), accumulate=True)
    D = drift(X, W)[:n].view(n, M, -1).transpose(0, 1)
    return list(torch.tensordot(B, u, 1) + torch.tensordot(C, S, 1) + torch.tensordot(E, D, 1))


def rows_of(step):
    """Parameters and state as rows [N, ΣD]."""
    z = torch.cat([p.view(step.num_agents, -1) for p in step.parameters], dim=1)
    return [z, *(torch.cat(blocks(buffer, step), dim=1) for buffer in step.state)]
