"""An optimizer's part in a run on several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gut_fast.arguments import as_integer, as_number
from gut_fast.distributed.agreement import check_agreement, check_welcome, fingerprint
from gut_fast.distributed.exchange import Exchange
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group
from gut_fast.distributed.overlap import Overlap
from gut_fast.kernels.backends import GossipStep, arithmetic
from gut_fast.rules import UpdateRule
from gut_fast.topology import Topology
from gut_fast.topology.mixing import CSR

__all__ = ["RankOptions", "Ranks"]

BUCKET_BYTES, LEAST_BUCKET_BYTES, OVERLAPPING_BUCKETS = 25 << 20, 256 << 10, 4
"""Of buckets nobody set the size of: with overlap there are four, so that some can leave, unless they get too small."""

LONGEST = 1e6


class RankOptions(NamedTuple):
    """How a process takes part in a run on several ranks: see `gut_fast.GossipOptimizer`."""

    agents_per_rank: int | None = None
    overlap: bool = False
    wire_dtype: torch.dtype | None = None
    bucket_bytes: int | None = None
    timeout: float = DEFAULT_TIMEOUT
    on_peer_failure: Literal["raise", "continue"] = "raise"
    shared_memory: bool = True

    def check(self) -> None:
        """Raises TypeError or ValueError for what is no such option."""
        if self.agents_per_rank is not None:
            as_integer(self.agents_per_rank, "agents_per_rank", minimum=1)
        if self.bucket_bytes is not None:
            as_integer(self.bucket_bytes, "bucket_bytes", minimum=1)
        if not 0 < as_number(self.timeout, "timeout") < LONGEST:
            raise ValueError(f"timeout must be a number of seconds between 0 and {LONGEST:g}, got {self.timeout!r}")
        if self.on_peer_failure not in ("raise", "continue"):
            raise ValueError(f"on_peer_failure must be 'raise' or 'continue', got {self.on_peer_failure!r}")
        wire = self.wire_dtype
        if wire is not None and not (isinstance(wire, torch.dtype) and wire.is_floating_point):
            raise TypeError(f"wire_dtype must be a floating-point torch.dtype, got {wire!r}")

    def check_alone(self, name: str) -> None:
        """Raises ValueError if anything is set, though there are no ranks."""
        defaults = RankOptions()._asdict()
        if given := [f"{key}=" for key, value in self._asdict().items() if value != defaults[key]]:
            raise ValueError(f"{name}: {', '.join(given)} needs process_group=; this optimizer holds all agents itself")


class Ranks:
    """The agents of this process, and their exchange with those of other ranks.

    Args:
        process_group: a `torch.distributed` process group, or a `Group`.

    Attributes:
        agents_here: k.

    Raises:
        TypeError, ValueError: a bad argument, or the topology has not k agents for each rank.
        PeerError: not all ranks came.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | Group,
        topology: Topology,
        rule: UpdateRule,
        backend: str,
        options: RankOptions,
    ) -> None:
        options.check()
        self.agents_here = options.agents_per_rank or 1
        size = Group.size_of(process_group)
        if size * self.agents_here != topology.num_agents:
            raise ValueError(
                f"{topology} has {topology.num_agents} agents, but {size} ranks with {self.agents_here} each have "
                f"{size * self.agents_here}; give a topology of that many, or agents_per_rank="
            )
        group = Group.of(process_group, options.timeout)
        if options.on_peer_failure == "continue" and not group.is_own:
            raise ValueError('on_peer_failure="continue" needs a gloo process group; others cannot lose a rank')
        self.exchange = Exchange(
            group,
            topology,
            agents_per_rank=self.agents_here,
            backend=backend,
            wire_dtype=options.wire_dtype,
            on_peer_failure=options.on_peer_failure,
            shares_memory=options.shared_memory,
            resets_state=any(map(any, rule.coefficients(1.0).E[1:])),
        )
        self.overlap: Overlap | None = None
        self._wants_overlap, self._bucket_bytes = options.overlap, options.bucket_bytes
        self._num_messages = rule.num_messages
        self._is_there = False

    def check_wire(self, dtype: torch.dtype) -> None:
        """Raises TypeError unless messages about parameters of `dtype` can have the wire's."""
        wire = self.exchange.wire_dtype or dtype
        allowed = dict.fromkeys([dtype, arithmetic(dtype), *([torch.bfloat16] if dtype == torch.float32 else [])])
        if wire not in allowed:
            choice = " or ".join(map(str, allowed))
            raise TypeError(f"wire_dtype is {wire}; messages about parameters of {dtype} can be {choice}")

    def mixing(self, number: int, device: torch.device) -> CSR:
        """The rows of W of the agents here, at step `number`."""
        return self.exchange.mixing(number, device)

    def begin(
        self,
        rule: UpdateRule,
        groups: Sequence[Mapping[str, Any]],
        make_step: Callable[[int], GossipStep],
        number: Callable[[], int],
    ) -> int | None:
        """Makes sure that all ranks have the same settings, and plans the buckets; again after a group is added.

        Returns:
            The number of the next step, if this rank joins others that are under way; it has taken over parameters.

        Raises:
            MismatchError, PeerError: see `check_agreement`.
        """
        exchange, settings = self.exchange, self._settings(rule, groups)
        welcome = None if self._is_there else exchange.group.welcome
        if not self._is_there:
            exchange.group.take()
        if welcome is None:
            check_agreement(exchange.group, f"settings {next(exchange.group.occasions)}", settings)
        else:
            check_welcome(exchange.group, welcome, settings)
        self._is_there, exchange.settings = True, settings
        steps = [make_step(index) if group["params"] else None for index, group in enumerate(groups)]
        exchange.plan(steps, self._bucket_limit)
        if welcome is not None:
            exchange.join(steps, welcome.sponsor)
        exchange.meet(steps)
        if self.overlap is not None:
            self.overlap.turn_off()
        if self._wants_overlap:
            self.overlap = Overlap(exchange, [group["params"] for group in groups], make_step, number)
        return None if welcome is None else welcome.step

    def _bucket_limit(self, message_bytes: int) -> int:
        if self._bucket_bytes is not None:
            return self._bucket_bytes
        parts = OVERLAPPING_BUCKETS if self._wants_overlap else 1
        return min(BUCKET_BYTES, max(message_bytes // parts, LEAST_BUCKET_BYTES))

    def _settings(self, rule: UpdateRule, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        exchange = self.exchange
        names = ("lr", "weight_decay", "maximize", *rule.hyperparameters)
        return {
            "versions": f"gut_fast {version('gut_fast')}, torch {torch.__version__}",
            "rule": rule.name,
            "hyper-parameters": [f"group {k}: { ({n: group[n] for n in names}) }" for k, group in enumerate(groups)],
            "parameters": [
                f"group {k}, parameter {p}: {tuple(tensor.shape)} {tensor.dtype}"
                for k, group in enumerate(groups)
                for p, tensor in enumerate(group["params"])
            ],
            "agents_per_rank": self.agents_here,
            "wire_dtype": str(exchange.wire_dtype),
            "bucket_bytes": self._bucket_bytes or f"automatic with{'' if self._wants_overlap else 'out'} overlap",
            "on_peer_failure": exchange.on_peer_failure,
            **fingerprint(exchange.whole),
        }

    def run(self, steps: Sequence[GossipStep | None], number: int, reason: str | None) -> None:
        """Step `number`; `reason` says why messages that have left are not those of this step, if they are not."""
        if self.overlap is not None:
            self.overlap.close_step(steps, reason)
        self.exchange.run(steps, number)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it no message leaves."""
        return contextlib.nullcontext() if self.overlap is None else self.overlap.paused()

    def state_dict(self) -> list[list[Tensor]]:
        """What rounding has left of messages, for each bucket."""
        return [[row.clone() for row in bucket.residual] for bucket in self.exchange.buckets]

    def check_idle(self) -> None:
        """Raises RuntimeError if messages of the next step have left, as they do with overlap."""
        if any(map(self.exchange.has_begun, self.exchange.buckets)):
            raise RuntimeError("messages of this step have left already; call step() first")

    def load_state_dict(self, residuals: Sequence[Sequence[Tensor]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `state_dict` returned. None at all are zero; where nothing is rounded none are needed.

        Raises:
            ValueError: they are of other buckets; nothing has been changed.
        """
        for bucket, rows in zip(self.exchange.buckets, self.checked_residuals(residuals, groups), strict=True):
            bucket.residual = rows

    def checked_residuals(
        self, residuals: Sequence[Sequence[Tensor]], groups: Sequence[Mapping[str, Any]]
    ) -> list[list[Tensor]]:
        """Copies of them for each bucket. Raises ValueError if they are of other buckets."""
        buckets, found = self.exchange.buckets, _shapes(residuals)
        firsts: list[Tensor] = [groups[bucket.group]["params"][0] for bucket in buckets]
        if not any(map(self.exchange.has_feedback, firsts)) or (isinstance(found, list) and not any(found)):
            return [[] for _ in buckets]
        expected = [[(self._num_messages * bucket.columns,)] * self.agents_here for bucket in buckets]
        is_right = isinstance(found, list) and len(found) == len(expected)
        if not is_right or any(f not in ([], e) for f, e in zip(found, expected, strict=True)):
            raise ValueError(
                f"the state's residuals are of shapes {found}, expected {expected}, for each bucket those of the "
                "agents here: use the same bucket_bytes and overlap, or delete state_dict['residuals']"
            )
        return [
            [row.to(first.device, arithmetic(first.dtype), copy=True) for row in rows]
            for rows, first in zip(residuals, firsts, strict=True)
        ]


def _shapes(residuals: Any) -> Any:
    """The same with tensors' shapes in their place."""
    if isinstance(residuals, (list, tuple)):
        return [_shapes(each) for each in residuals]
    is_right = isinstance(residuals, Tensor) and residuals.is_floating_point()
    return tuple(residuals.shape) if is_right else type(residuals).__name__
