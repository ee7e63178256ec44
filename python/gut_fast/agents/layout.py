"""The flat buffers in which the stacked tensors of a module lie.

The parameters lie as in `gut_fast.kernels.buffers`: segment k is parameter k of all agents, a block [N, d_k]. Buffers
lie in the same way, in one flat buffer for each dtype and device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from gut_fast.kernels.buffers import allocate, segment_views

__all__ = ["BufferEntry", "Entry", "Layout", "Place", "own_storage", "places"]

Place = tuple[dict[str, Any], str]
"""A module's dict of parameters or buffers, and a key in it."""


class Entry(NamedTuple):
    """A stacked tensor (N, *shape), its name, and its places in the module that holds it."""

    name: str
    tensor: Tensor
    places: list[Place]


class BufferEntry(Entry):
    """One that is a buffer."""


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


def entries_of(module: nn.Module) -> list[Entry]:
    """The tensors that stand in a module, the parameters, then the buffers, each once."""
    entries = [Entry(name, tensor, []) for name, tensor in module.named_parameters()]
    entries += [BufferEntry(name, tensor, []) for name, tensor in module.named_buffers()]
    by_tensor = {id(entry.tensor): entry for entry in entries}
    for registry, key in places(module):
        by_tensor[id(registry[key])].places.append((registry, key))
    return entries


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
        self._module, self._num_agents = module, num_agents
        self.entries = entries_of(module)
        self._known = {each for entry in self.entries for each in _ids(entry.places)}
        self._registries: list[dict[str, Any]] = []  # of every submodule, and what they held at the last look
        self._held: list[Any] = []
        self._pointers: list[int] = []
        self.flats: list[Tensor] = []
        self.gradients = torch.empty(0, device="cpu")
        self._lay(None)

    def settle(self) -> bool:
        """Moves tensors that do not lie in the flat buffers into them; returns whether these are new ones.

        Raises:
            RuntimeError: a tensor has been replaced by what cannot be stacked; the message says what to do.
        """
        if self.is_held() and [entry.tensor.data_ptr() for entry in self.entries] == self._pointers:
            return False
        return self._lay(None)

    def is_held(self) -> bool:
        """Returns whether the module holds what it held when the tensors were laid: nothing has been replaced."""
        held = list(chain.from_iterable(map(dict.values, self._registries)))
        return len(held) == len(self._held) and all(map(is_, held, self._held))

    def standing(self) -> list[Entry]:
        """The tensors that stand in the places now; nothing is moved, since `torch.func.functional_call` only lends.

        Raises:
            RuntimeError: one has another shape, or the module has got a parameter in a new place.
        """
        if self.is_held():
            return self.entries
        self._check_places()
        if all(registry[key] is tensor for _, tensor, where in self.entries for registry, key in where):
            return self.entries
        return [entry for entry in entries_of(self._module) if self._known.intersection(_ids(entry.places))]

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
                _take_over(entry.tensor, current)
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
        modules = self._module.modules()
        self._registries = [each for m in modules for each in (m._parameters, m._buffers, m._modules)]
        self._held = list(chain.from_iterable(map(dict.values, self._registries)))
        if has_moved:
            self.gradients = allocate(flats[0].numel(), flats[0].dtype, flats[0].device)
        return has_moved

    def _groups(self) -> list[list[Tensor]]:
        """The tensors of each flat buffer."""
        parameters: list[Tensor] = [entry.tensor for entry in self.entries if isinstance(entry.tensor, nn.Parameter)]
        buffers = [entry.tensor for entry in self.entries if not isinstance(entry.tensor, nn.Parameter)]
        kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers)
        return [parameters, *([each for each in buffers if (each.dtype, each.device) == kind] for kind in kinds)]

    def _check_places(self) -> None:
        for name, tensor, where in entries_of(self._module):
            if isinstance(tensor, nn.Parameter) and not self._known.issuperset(_ids(where)):
                raise RuntimeError(
                    f"{name} is new in the stacked module, whose parameters have a row for each agent; change the "
                    "plain module, then stack it"
                )
        for name, tensor, where in self.entries:
            for registry, key in where:
                _check_shape(name, registry.get(key), tensor.shape)

    def _checked(self) -> list[Tensor]:
        """Returns what is in the module's places now, if it can be the stacked tensors; nothing has been changed."""
        self._check_places()
        found: list[Tensor] = []
        own = {id(entry.tensor): entry.name for entry in self.entries}
        for name, tensor, where in self.entries:
            others = [registry[key] for registry, key in where]
            found.append(current := next((other for other in others if other is not tensor), tensor))
            if current is not tensor and id(current) in own:
                raise RuntimeError(
                    f"{name} of the stacked module has become its {own[id(current)]}; share them in the plain module, "
                    "then stack it"
                )
            if isinstance(tensor, nn.Parameter) and not isinstance(current, nn.Parameter):
                raise RuntimeError(
                    f"{name} of the stacked module is lent a tensor that is no parameter, as by "
                    "torch.func.functional_call; only agents(...) computes with it"
                )
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


def _ids(where: list[Place]) -> list[tuple[int, str]]:
    return [(id(registry), key) for registry, key in where]


def _check_shape(name: str, current: Any, shape: torch.Size) -> None:
    if not isinstance(current, Tensor) or current.shape != shape or current.is_meta:
        given = f"{tuple(current.shape)} on {current.device}" if isinstance(current, Tensor) else repr(current)
        raise RuntimeError(f"{name} of the stacked module has become {given}, expected {tuple(shape)}")


def _take_over(tensor: Tensor, current: Tensor) -> None:
    """Makes a tensor what it has been replaced by; of a parameter with its gradient, and trained if that is."""
    tensor.data = current.detach()
    if isinstance(current, nn.Parameter):
        tensor.requires_grad_(current.requires_grad)
        if current.grad is not None:
            tensor.grad = current.grad if tensor.grad is None else tensor.grad + current.grad


def _fitting(tensors: Sequence[Tensor], flat: Tensor | None) -> Tensor:
    """The flat buffer if it fits these tensors, or a new one."""
    size, first = sum(tensor.numel() for tensor in tensors), tensors[0]
    if flat is not None and (flat.numel(), flat.dtype, flat.device) == (size, first.dtype, first.device):
        return flat
    return allocate(size, first.dtype, first.device)
