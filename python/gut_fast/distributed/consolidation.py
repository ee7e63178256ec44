"""The averaged model, out of the agents of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gut_fast.arguments import as_integer
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group, MismatchError, PeerError

__all__ = ["consolidate", "given_group"]


def consolidate(module: Any, group: Any = None, *, to: int | None = None) -> dict[str, Any] | None:
    """Averages the model over all agents of all ranks, and returns a plain state dict.

    Floating-point parameters and buffers are averaged, in float64, with a single all-reduce; other entries, such as
    counters, are those of this rank's first agent. Names, dtypes and devices are those of the module's
    ``state_dict()``; a tensor that it holds under several names is one tensor in the result too. Nothing is changed.

    Args:
        module: an nn.Module, which is one agent, or what `gut_fast.stack` returns. Ranks may hold different numbers of
            agents.
        group: the ranks, all of which call this: an optimizer, a `Group` or a `torch.distributed` process group. None,
            or an optimizer of one process, averages the agents of this process.
        to: number of the only rank that gets the result; None is all ranks.

    Returns:
        The state dict; None on ranks other than `to`.

    Raises:
        TypeError, ValueError: no such rank `to`, not a module, or it holds complex numbers; nothing has been sent.
        MismatchError: the ranks' models differ in size; nothing has been changed.
        PeerError: not all ranks came in time.
    """
    ranks = given_group(group)
    members = _numbers(ranks)
    if to is not None and as_integer(to, "to", minimum=0) not in members:
        raise ValueError(f"consolidate: there is no rank {to}; ranks are {list(members)}")
    rows = _rows(module)
    summed = {id(each): each for each in rows.values() if isinstance(each, Tensor) and each.is_floating_point()}
    flat = _flat_sum(list(summed.values()), _count(module), ranks)
    if ranks is not None and len(members) > 1:
        _reduce(flat, ranks, None if to is None else members.index(to))
    if to is not None and ranks is not None and to != members[_place(ranks)]:
        return None
    means = (flat[:-1] / flat[-1]).split([each[0].numel() for each in summed.values()])
    result = {
        key: mean.reshape(each.shape[1:]).to(each.device, each.dtype, copy=True)
        for (key, each), mean in zip(summed.items(), means, strict=True)
    }
    for each in rows.values():
        if isinstance(each, Tensor):
            result.setdefault(id(each), each[0].clone())
    return {name: result[id(each)] if isinstance(each, Tensor) else each for name, each in rows.items()}


def given_group(group: Any) -> Group | dist.ProcessGroup | None:
    """Returns the group itself, or an optimizer's group. Raises TypeError if it is neither."""
    if group is None or isinstance(group, (Group, dist.ProcessGroup)):
        return group
    if not isinstance(group, torch.optim.Optimizer) and not hasattr(group, "group"):
        raise TypeError(
            "group must be an optimizer of gut_fast, a torch.distributed.ProcessGroup or None, "
            f"got {type(group).__name__}"
        )
    found: Any = getattr(group, "group", None)
    return given_group(found)


def _numbers(group: Group | dist.ProcessGroup | None) -> tuple[int, ...]:
    if isinstance(group, Group):
        return group.members
    return tuple(range(1 if group is None else group.size()))


def _place(group: Group | dist.ProcessGroup) -> int:
    return group.rank if isinstance(group, Group) else group.rank()


def _count(module: nn.Module) -> int:
    return int(getattr(module, "num_agents", 1))


@torch.no_grad()
def _rows(module: Any) -> dict[str, Any]:
    """Returns the state dict of one agent's module with a row for each agent: tensors (k, *shape), shared ones once."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module or what gut_fast.stack returns, got {type(module).__name__}")
    state = module.state_dict(keep_vars=True)
    rows: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            if tensor.is_complex():
                raise TypeError(f"consolidate: {name} is {tensor.dtype}; complex numbers are not averaged")
            rows[id(tensor)] = tensor.detach() if hasattr(module, "num_agents") else tensor.detach()[None]
    return {name: rows[id(tensor)] if isinstance(tensor, Tensor) else tensor for name, tensor in state.items()}


def _flat_sum(stacked: list[Tensor], count: int, group: Group | dist.ProcessGroup | None) -> Tensor:
    """Returns the sums over the agents here, then their number, in one float64 tensor where `group` can send it."""
    is_gloo = group.is_own if isinstance(group, Group) else group is not None and dist.get_backend(group) == "gloo"
    device = stacked[0].device if stacked and not is_gloo else torch.device("cpu")
    sums = [each.sum(0, dtype=torch.float64).flatten().to(device) for each in stacked]
    return torch.cat([*sums, torch.tensor([count], dtype=torch.float64, device=device)])


def _reduce(flat: Tensor, group: Group | dist.ProcessGroup, to: int | None) -> None:
    """Sums a tensor over the ranks, in place, on all of them or on the one at place `to`."""
    if isinstance(group, Group):
        notes = group.gather(f"consolidate {next(group.occasions)}", str(flat.numel()))
        _check_sizes([int(note) for note in notes], group.members)
        group.all_reduce(flat) if to is None else group.reduce(flat, to)
        return
    sizes = [flat.new_zeros(1) for _ in range(group.size())]
    _wait(lambda: dist.all_gather(sizes, flat.new_full((1,), flat.numel()), group=group, async_op=True), group)
    _check_sizes([int(size) for size in sizes], _numbers(group))
    if to is None:
        _wait(lambda: dist.all_reduce(flat, group=group, async_op=True), group)
    else:
        _wait(lambda: dist.reduce(flat, dist.get_global_rank(group, to), group=group, async_op=True), group)


def _check_sizes(sizes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raises MismatchError unless all sizes are the same; reducing tensors of different sizes would end the process."""
    if len(set(sizes)) > 1:
        described = "; ".join(f"rank {rank} {size - 1:,}" for rank, size in zip(ranks, sizes, strict=True))
        raise MismatchError(f"consolidate: the ranks' models differ in their numbers to average: {described}")


def _wait(begin: Callable[[], Any], group: dist.ProcessGroup) -> None:
    """Begins a collective and waits for it. Raises PeerError if that fails."""
    started = time.monotonic()
    try:
        begin().wait(timedelta(seconds=DEFAULT_TIMEOUT))
    except RuntimeError as error:
        raise PeerError(
            f"consolidate: not all of {group.size()} ranks came within {time.monotonic() - started:.3g} s, or one is "
            f"gone: {error}",
            -1,
        ) from error
