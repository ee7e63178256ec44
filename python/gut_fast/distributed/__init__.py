"""Agents on several ranks: the same optimizers over `torch.distributed`, what they exchange, and what may go wrong."""

from gut_fast.distributed.agreement import telling_the_others
from gut_fast.distributed.checkpoints import Checkpoints
from gut_fast.distributed.consolidation import consolidate
from gut_fast.distributed.exchange import Exchange
from gut_fast.distributed.group import DEFAULT_TIMEOUT, Group, MismatchError, PeerError
from gut_fast.distributed.membership import RankOptions, rejoin
from gut_fast.distributed.overlap import SCALED
from gut_fast.distributed.state_bucket import mix_together, state_bytes, state_step
from gut_fast.distributed.together import Together
from gut_fast.distributed.wire import Wire

__all__ = [
    "DEFAULT_TIMEOUT",
    "SCALED",
    "Checkpoints",
    "Exchange",
    "Group",
    "MismatchError",
    "PeerError",
    "RankOptions",
    "Together",
    "Wire",
    "consolidate",
    "mix_together",
    "rejoin",
    "state_bytes",
    "state_step",
    "telling_the_others",
]
