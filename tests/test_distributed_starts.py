"""The weights that ranks start from: compared, or brought to all agents from the first one."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gut_fast as gf
import ranks

STARTS = {"same": [0, 0, 0], "one": [0, 0, 7], "first": [7, 0, 0], "within": [0, 0, 0]}
"""The seeds of three ranks' parameters; `within` adds one to a rank's second agent."""


def parameters_of(rank, start, k):
    """Returns parameters of several dtypes, one of them frozen, of the k agents of a rank."""
    torch.manual_seed(STARTS[start][rank])
    shapes = {(3, 2): torch.float32, (): torch.float64, (5,): torch.bfloat16, (0,): torch.float32}
    values = [torch.randn(shape, dtype=dtype).expand(k or 1, *shape).clone() for shape, dtype in shapes.items()]
    if start == "within" and rank == 1:
        values[0][1] += 1
    parameters = [nn.Parameter(value if k else value[0]) for value in values]
    parameters[0].requires_grad_(requires_grad=False)
    return parameters


def grouped(parameters):
    """Returns a group for each dtype."""
    return [
        {"params": [p for p in parameters if p.dtype == dtype]} for dtype in dict.fromkeys(p.dtype for p in parameters)
    ]


def start(rank, size, cases):
    """Makes an optimizer for each case; returns what it warns of, and all parameters before and after."""
    results = []
    for name, k, kind, options in cases:
        parameters = parameters_of(rank, name, k)
        before = [parameter.detach().clone() for parameter in parameters]
        versions = [parameter._version for parameter in parameters]
        options = options | {"process_group": dist.group.WORLD, "agents_per_rank": k}
        options["topology"] = gf.topology.ring(size * (k or 1))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if kind == "gossip":
                optimizer = gf.Gossip(torch.optim.Adam(grouped(parameters), lr=0.1), **options)
            else:
                optimizer = gf.GUT(grouped(parameters), 0.1, 0.5, **options)
        assert not any(state.any() for p in parameters for state in optimizer.state[p].values())
        if options.get("sync_initial"):
            assert all(p._version > v for p, v in zip(parameters, versions, strict=True) if p.numel())
        texts = [str(each.message) for each in said if "start from" in str(each.message)]
        files = {each.filename for each in said if "start from" in str(each.message)}
        results.append((texts, files, before, [parameter.detach().clone() for parameter in parameters]))
    return results


CASES = [
    (name, k, kind, options)
    for name, k in (("same", None), ("one", None), ("first", None), ("same", 2), ("within", 2))
    for kind in ("gut", "gossip")
    for options in ({}, {"sync_initial": True})
]
DIFFERENT = {"same": [], "one": [2], "first": [1, 2], "within": [1]}


def test_agents_that_start_from_different_weights_are_named_once_or_get_those_of_the_first():
    outcomes = ranks.run(3, start, CASES)
    for case, results in zip(CASES, zip(*outcomes, strict=True), strict=True):
        name, k, kind, options = case
        others = [texts for texts, *_ in results[1:]]
        texts, files, first, _ = results[0]
        assert others == [[], []]
        if options or name == "same":
            assert texts == []
        else:
            [text] = texts
            own = "Gossip" if kind == "gossip" else "GUT"
            assert text.startswith(f"{own}: the agents start from different weights: ranks {DIFFERENT[name]} have")
            assert (
                "seed all ranks alike (torch.manual_seed) before the model is made, or give sync_initial=True" in text
            )
            assert files == {__file__}
        for _, _, before, after in results:
            expected = [value[:1].expand_as(value) if k else value for value in first] if options else before
            assert all(map(torch.equal, after, expected))


def add_groups(rank, size, is_synchronized):
    """Adds a group of the rank's own weights before the first step, and one after it; returns what was warned of."""
    groups = [nn.Parameter(torch.full((3,), float(value))) for value in (1, 1 + rank, 10 + rank)]
    where = {"topology": gf.topology.ring(size), "process_group": dist.group.WORLD, "sync_initial": is_synchronized}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = gf.DSGD([groups[0]], 0.0, **where)
        count = [len(said)]
        optimizer.add_param_group({"params": groups[1]})
        count.append(len(said))
        optimizer.step()
        groups[0].data += rank  # what has been trained stays
        optimizer.add_param_group({"params": groups[2]})
        count.append(len(said))
    return count, [parameter.detach()[0].item() for parameter in groups]


@pytest.mark.parametrize("is_synchronized", [False, True])
def test_groups_that_are_added_later_are_treated_as_the_first_ones(is_synchronized):
    for rank, (count, values) in enumerate(ranks.run(2, add_groups, is_synchronized)):
        assert count == ([0, 1, 1] if rank == 0 and not is_synchronized else [0, 0, 0])
        assert values == [1 + rank, 1 if is_synchronized else 1.5, 10 if is_synchronized else 10 + rank]


def test_sync_initial_needs_ranks():
    parameter = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"GUT: sync_initial= needs process_group=; this optimizer holds all agents"):
        gf.GUT([parameter], 0.1, topology=gf.topology.ring(4), sync_initial=True)
    with pytest.raises(TypeError, match="sync_initial must be True or False, got 'yes'"):
        gf.distributed.RankOptions(sync_initial="yes").check()
