"""The forward pass of all agents: at once through vmap, or one after the other where vmap cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gut_fast import randomness
from gut_fast.agents.layout import BufferEntry, Entry

__all__ = ["Forward"]

OneAgent = Callable[..., tuple[Any, ...]]
"""One agent's outputs, then its new buffers, as a function of its inputs, then its parameters and buffers."""

Way = Callable[[OneAgent, Sequence[Tensor], Sequence[Tensor]], tuple[Any, ...]]
"""A way to compute all agents' outputs and buffers from that, the inputs and parameters, and the buffers."""


class Forward:
    """The forward pass of all agents; it remembers whether vmap can take the module in training, and in evaluation.

    Attributes:
        is_vectorized: whether the agents are computed at once, by ``module.training``; empty before the first pass.
    """

    def __init__(self) -> None:
        self.is_vectorized: dict[bool, bool] = {}

    def __call__(
        self,
        module: nn.Module,
        entries: Sequence[Entry],
        num_agents: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Computes the outputs of all agents, and changes their buffers.

        Args:
            module: the module that holds the stacked tensors.
            entries: the tensors (N, *shape) to compute with, each with its name and its places in the module.
            num_agents: number of agents N.
            args: the module's positional arguments, every tensor of them (N, ...).
            kwargs: its keyword arguments, likewise.
        """
        leaves, spec = tree_flatten((args, kwargs)) if kwargs or not all(map(_is_tensor, args)) else (args, None)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _check_leading_dimension(inputs, num_agents)
        buffers = [entry.tensor for entry in entries if isinstance(entry, BufferEntry)]
        parameters = [entry.tensor for entry in entries[: len(entries) - len(buffers)]]
        one = _one_agent(module, entries, len(parameters), leaves, spec)
        first = partial(self._first, module.training)
        ways: dict[bool | None, Way] = {None: first, True: _all_at_once, False: _one_by_one}
        compute = ways[self.is_vectorized.get(module.training)]
        outputs, *after = compute(one, [*inputs, *parameters], buffers)
        _keep(after, buffers)
        return outputs

    def _first(
        self, training: bool, one: OneAgent, tensors: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """Tries both ways: an error of the module itself is raised by the second."""
        before, random_state = [buffer.clone() for buffer in buffers], randomness.get_state(tensors[-1].device)
        try:
            result = _all_at_once(one, tensors, buffers)
        except Exception as error:  # the type of an error of vmap depends on the operation
            reason = str(error).strip().split("\n")[0]
        else:
            self.is_vectorized[training] = True
            return result
        _keep(before, buffers)
        randomness.set_state(random_state, tensors[-1].device)
        result = _one_by_one(one, tensors, buffers)
        if False not in self.is_vectorized.values():
            message = f"the agents are computed one after the other, since vmap failed with {reason!r}"
            warnings.warn(message, stacklevel=6)
        self.is_vectorized[training] = False
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _check_leading_dimension(inputs: Sequence[Tensor], num_agents: int) -> None:
    for tensor in inputs:
        if tensor.ndim == 0 or len(tensor) != num_agents:
            raise ValueError(
                f"agents(x) takes tensors of shape ({num_agents}, batch, ...), a batch for each agent; got "
                f"{tuple(tensor.shape)}; for the same samples give x.expand({num_agents}, *x.shape), for one agent's "
                "forward pass call agents.agent(i)"
            )


def _one_agent(
    module: nn.Module, entries: Sequence[Entry], num_parameters: int, leaves: Sequence[Any], spec: TreeSpec | None
) -> OneAgent:
    """Makes the function of one agent. Its argument list is flat, because vmap walks nested arguments in Python."""
    num_inputs = sum(map(_is_tensor, leaves))

    def one(*tensors: Tensor) -> tuple[Any, ...]:
        args, kwargs, rows = tensors[:num_inputs], {}, tensors[num_inputs:]
        if spec is not None:
            given = iter(args)
            args, kwargs = tree_unflatten([next(given) if _is_tensor(leaf) else leaf for leaf in leaves], spec)
        try:
            _put(entries, rows)
            outputs = module(*args, **kwargs)
            after = [registry[key] for entry in entries[num_parameters:] for registry, key in entry.places[:1]]
        finally:
            _put(entries, [entry.tensor for entry in entries])
        return outputs, *after

    return one


def _put(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
    """Puts tensors in the places of the entries, as `torch.func.functional_call` does, without a search by name."""
    for entry, tensor in zip(entries, tensors, strict=True):
        for registry, key in entry.places:
            registry[key] = tensor


def _all_at_once(one: OneAgent, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[Any, ...]:
    result: tuple[Any, ...] = vmap(one, randomness="different")(*tensors, *buffers)
    return result


def _one_by_one(one: OneAgent, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[Any, ...]:
    rows = list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))
    # A backward pass needs the buffers as they were; rows of one tensor count as changed when another row is.
    results = [one(*row, *(buffer[i].clone() for buffer in buffers)) for i, row in enumerate(rows)]
    flats, specs = zip(*map(tree_flatten, results), strict=True)
    joined: tuple[Any, ...] = tree_unflatten([_join(leaves) for leaves in zip(*flats, strict=True)], specs[0])
    return joined


def _join(leaves: Sequence[Any]) -> Any:
    """Stacks the agents' tensors; anything else comes as a list with an entry for each agent, or as it is if equal."""
    if all(map(_is_tensor, leaves)):
        return torch.stack(list(leaves))
    return leaves[0] if all(leaf is leaves[0] or leaf == leaves[0] for leaf in leaves) else list(leaves)


@torch.no_grad()
def _keep(new_buffers: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    for buffer, new_buffer in zip(buffers, new_buffers, strict=True):
        if new_buffer.data_ptr() != buffer.data_ptr():
            buffer.copy_(new_buffer)
