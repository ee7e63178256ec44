"""The entry "wire" of a state dict: who is known, and of each parameter group the agents' copies or widths.

A copy is saved where its agent is. Its neighbours, which have the same copy, do not save it: the first message after
loading is sent as it is, at the cost of its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gut_fast.arguments import shown
from gut_fast.distributed.wire import Copies, Wire
from gut_fast.kernels.validation import unreadable

__all__ = ["check_state", "load_state", "state_of"]

Groups = Sequence[Sequence[Copies]]
"""The copies of each parameter group, cut into runs of parameters."""

INSTEAD = "load the state of the same agents and wire_dtype, or delete state_dict['wire'], to begin with whole messages"


def state_of(wire: Wire, groups: Groups) -> dict[str, Any]:
    """Returns the entry "wire" of a state dict; it is empty where nothing is coded or no round has been mixed.

    ``known`` is `Wire.known`, ``copies`` holds X of the agents here, [k, M, numbers], for each group, ``widths`` in the
    same way B if the code is modulo, which needs no copies.
    """
    if not any(groups) or not bool(wire.known.any()):
        return {}
    name = _entry(wire)
    whole = [
        [torch.stack(rows).view(len(rows), c.layout.num_messages, -1) for c, rows in _rows(wire, g)] for g in groups
    ]
    return {"known": wire.known.clone(), name: [torch.cat(parts, 2) if parts else torch.zeros(0) for parts in whole]}


def check_state(state: Any, wire: Wire, groups: Groups, num_agents: int, name: str) -> None:
    """Raises ValueError unless `state` is what `state_of` returns for such a wire; where nothing is coded any will do.

    Args:
        state: the entry "wire" of a state dict, an empty dict if it has none.
        wire: of the optimizer that is to load it.
        groups: the copies of that optimizer, cut in any way.
        num_agents: N.
        name: of the optimizer, for messages.
    """
    if not any(groups) or state == {}:
        return
    entry = _entry(wire)
    if not isinstance(state, dict) or state.keys() != {"known", entry}:
        found = sorted(map(shown, state)) if isinstance(state, dict) else shown(state)
        raise ValueError(f"{name}: the state's wire has {found}, expected 'known' and {entry!r}; {INSTEAD}")
    saved = state[entry]
    if not isinstance(saved, list) or len(saved) != len(groups):
        raise ValueError(f"{name}: the state's wire[{entry!r}] must be a list of {len(groups)} tensors, {INSTEAD}")
    expected: list[tuple[str, Any, tuple[int, ...], torch.dtype]] = [
        ("known", state["known"], (num_agents,), torch.bool)
    ]
    for index, (group, tensor) in enumerate(zip(groups, saved, strict=True)):
        if group:
            expected.append((f"{entry}[{index}]", tensor, *_form(wire, group)))
    for what, tensor, shape, dtype in expected:
        is_right = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape and tensor.dtype == dtype
        if not is_right or unreadable(tensor):
            given = (
                f"{tensor.dtype} {tuple(tensor.shape)} {unreadable(tensor)}" if isinstance(tensor, Tensor) else tensor
            )
            raise ValueError(f"{name}: the state's wire: {what} is {shown(given)}, expected {dtype} {shape}; {INSTEAD}")


def load_state(state: Any, wire: Wire, groups: Groups, num_agents: int) -> None:
    """Takes over what `check_state` has accepted; an empty state begins with whole messages."""
    wire.begin_anew(num_agents)
    for copies in (each for group in groups for each in group):
        copies.own, copies.widths, copies.heard = [], [], []
    if not any(groups) or state == {}:
        return
    wire.known, wire.sends_again = state["known"].to("cpu", copy=True), wire.stays
    for group, saved in zip(groups, state[_entry(wire)], strict=True):
        lengths = [_length(wire, copies) for copies in group]
        for copies, part in zip(group, saved.split(lengths, 2) if group else [], strict=True):
            rows = [row.reshape(-1).to(copies.device, copy=True) for row in part]
            copies.own, copies.widths = (rows, []) if wire.stays else ([], rows)


def _entry(wire: Wire) -> str:
    return "copies" if wire.stays else "widths"


def _rows(wire: Wire, group: Sequence[Copies]) -> list[tuple[Copies, list[Tensor]]]:
    return [(copies, copies.own if wire.stays else copies.widths) for copies in group]


def _length(wire: Wire, copies: Copies) -> int:
    """Returns the numbers of an agent and message."""
    layout = copies.layout
    return (layout.num_numbers if wire.stays else layout.num_blocks) // layout.num_messages


def _form(wire: Wire, group: Sequence[Copies]) -> tuple[tuple[int, int, int], torch.dtype]:
    first = group[0]
    numbers = sum(_length(wire, copies) for copies in group)
    return (first.num_agents, first.layout.num_messages, numbers), first.dtype if wire.stays else torch.float32
