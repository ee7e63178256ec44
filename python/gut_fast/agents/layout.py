"""The flat buffers in which the stacked tensors of a module lie.

The parameters lie as in `gut_fast.kernels.buffers`: segment k is parameter k of all agents, a block [N, d_k]. Buffers
lie in the same way, in one flat buffer for each dtype and device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from gut_fast.kernels.buffers import allocate, segment_views

__all__ = ["Entry", "Layout", "Place", "own_storage", "places"]

Place = tuple[dict[str, Any], str]
"""A module's dict of parameters or buffers, and a key in it."""


class Entry(NamedTuple):
    """A stacked tensor (N, *shape), its name, and its places in the module that holds it."""

    name: str
    tensor: Tensor
    places: list[Place]


def places(module: nn.Module) -> Iterator[Place]:
    """Every place of a module, and of its submodules, that holds a parameter or buffer."""
    for submodule in module.modules():
        for registry in (submodule._parameters, submodule._buffers):
            yield from ((registry, key) for key, tensor in registry.items() if tensor is not None)


def own_storage(view: Tensor) -> Tensor:
    """The memory of a view as a tensor whose storage is no larger, so that saving it saves no more.

    It keeps the view alive, but not the memory of a storage that is resized or moved: flat buffers are not handed out.
    """
    has_memory = view.numel() > 0 and view.device.type in ("cpu", "cuda")
    return from_dlpack(view.detach()) if has_memory else view.detach()


class Layout:
    """The stacked tensors of a module, in flat buffers.

    Tensors that have been given other memory (``.data =``, ``.to``), or have been replaced in the module (by
    ``load_state_dict(assign=True)``), are moved back into the flat buffers by `settle`, and stay the same objects.

    Args:
        module: the module that holds the stacked tensors.
        num_agents: number of agents N.

    Attributes:
        entries: the parameters, then the buffers.
        flats: the flat buffers: of the parameters, then of the buffers of each dtype and device.
        gradients: memory for the parameters' gradients, laid out as they are.
    """

    def __init__(self, module: nn.Module, num_agents: int) -> None:
        self._module = module
        named = [*module.named_parameters(), *module.named_buffers()]
        self.entries = [Entry(name, tensor, []) for name, tensor in named]
        by_tensor = {id(entry.tensor): entry for entry in self.entries}
        for registry, key in places(module):
            by_tensor[id(registry[key])].places.append((registry, key))
        self._num_agents = num_agents
        self._pointers: list[int] = []
        self.flats: list[Tensor] = []
        self.gradients = torch.empty(0, device="cpu")
        self._lay(None)

    def settle(self) -> bool:
        """Moves tensors that do not lie in the flat buffers into them; returns whether these are new ones.

        Raises:
            RuntimeError: a tensor has been replaced by what cannot be stacked; the message says what to do.
        """
        for (_, tensor, where), pointer in zip(self.entries, self._pointers, strict=True):
            if tensor.data_ptr() != pointer or any(registry.get(key) is not tensor for registry, key in where):
                return self._lay(None)
        return False

    def move_to(self, flats: list[Tensor]) -> None:
        """Makes these the flat buffers, which hold the values already."""
        self._lay(flats)

    def put_back(self, memory: Sequence[Tensor]) -> None:
        """Puts the tensors back into their places in the module, each with the memory that it had."""
        for (_, tensor, where), data in zip(self.entries, memory, strict=True):
            tensor.data = data
            for registry, key in where:
                registry[key] = tensor

    def module_with(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the module with these tensors in place of the stacked ones."""
        memo: dict[int, Any] = {id(entry.tensor): tensors[entry.name] for entry in self.entries}
        return copy.deepcopy(self._module, memo)

    def spares(self) -> list[Tensor]:
        """The segments of the memory for gradients, one for each parameter."""
        return segment_views(self.gradients, self._num_agents, [tensor.shape[1:] for tensor in self._groups()[0]])

    @torch.no_grad()
    def _lay(self, flats: list[Tensor] | None) -> bool:
        for entry, current in zip(self.entries, self._checked(), strict=True):
            if current is not entry.tensor:
                entry.tensor.data = current.detach()
            for registry, key in entry.places:
                registry[key] = entry.tensor
        groups = self._groups()
        if flats is None:
            known = zip_longest(groups, self.flats[: len(groups)])
            flats = [_fitting(group, flat) for group, flat in known]
        has_moved = [id(flat) for flat in flats] != [id(flat) for flat in self.flats]
        for group, flat in zip(groups, flats, strict=True):
            views = segment_views(flat, self._num_agents, [tensor.shape[1:] for tensor in group])
            for tensor, view in zip(group, views, strict=True):
                if tensor.data_ptr() != view.data_ptr() or not tensor.data_ptr():
                    view.copy_(tensor)
                    tensor.data = own_storage(view)
        self.flats, self._pointers = flats, [entry.tensor.data_ptr() for entry in self.entries]
        if has_moved:
            self.gradients = allocate(flats[0].numel(), flats[0].dtype, flats[0].device)
        return has_moved

    def _groups(self) -> list[list[Tensor]]:
        """The tensors of each flat buffer."""
        parameters: list[Tensor] = [entry.tensor for entry in self.entries if isinstance(entry.tensor, nn.Parameter)]
        buffers = [entry.tensor for entry in self.entries if not isinstance(entry.tensor, nn.Parameter)]
        kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers)
        return [parameters, *([each for each in buffers if (each.dtype, each.device) == kind] for kind in kinds)]

    def _checked(self) -> list[Tensor]:
        """Returns what is in the module's places now, if it can be the stacked tensors; nothing has been changed."""
        found: list[Tensor] = []
        for name, tensor, where in self.entries:
            others = [registry.get(key) for registry, key in where]
            current = next((other for other in others if other is not tensor), tensor)
            if not isinstance(current, Tensor) or current.shape != tensor.shape or current.is_meta:
                given = f"{tuple(current.shape)} on {current.device}" if isinstance(current, Tensor) else repr(current)
                raise RuntimeError(f"{name} of the stacked module has become {given}, expected {tuple(tensor.shape)}")
            found.append(current)
        first = found[0]
        for (name, tensor, _), current in zip(self.entries, found, strict=True):
            is_like_first = (current.dtype, current.device) == (first.dtype, first.device)
            if isinstance(tensor, nn.Parameter) and not is_like_first:
                raise RuntimeError(
                    f"{name} of the stacked module is now {current.dtype} on {current.device}, but "
                    f"{self.entries[0].name} is {first.dtype} on {first.device}; convert all together, with .to() of "
                    "what gut_fast.stack returned"
                )
        return found


def _fitting(tensors: Sequence[Tensor], flat: Tensor | None) -> Tensor:
    """The flat buffer if it fits these tensors, or a new one."""
    size, first = sum(tensor.numel() for tensor in tensors), tensors[0]
    if flat is not None and (flat.numel(), flat.dtype, flat.device) == (size, first.dtype, first.device):
        return flat
    return allocate(size, first.dtype, first.device)
