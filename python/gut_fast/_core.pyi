from types import ModuleType

from torch import Tensor

from gut_fast.kernels.step import GossipStep

TRIED_STEPS: int
MAX_STATES: int
MAX_MESSAGES: int
CUDA_OPTION: str

class Fetch:
    name: str
    none: Fetch
    near: Fetch
    outer: Fetch
    write: Fetch

class Plan:
    block: int
    ahead: int
    fetch: Fetch
    threads: int
    def __init__(self, block: int, ahead: int, fetch: Fetch, threads: int) -> None: ...

class TensorReader:
    reads_dlpack: bool
    def __init__(self, torch: ModuleType, through_dlpack: bool = True) -> None: ...
    def read(self, step: GossipStep) -> TensorStep | None: ...

class TensorStep:
    is_served: bool
    def run(self, num_threads: int) -> None: ...
    def stream(self, num_threads: int) -> None: ...
    def message(self, reader: TensorReader, rows: list[Tensor | None], num_threads: int) -> bool: ...
    def combine(self, reader: TensorReader, rows: list[Tensor | None], num_threads: int) -> bool: ...
    def encode(
        self,
        reader: TensorReader,
        layout: CodeLayout,
        coded: list[Tensor | None],
        copies: list[Tensor],
        widths: list[Tensor],
        keys: list[tuple[int, int]],
        position: int,
        num_threads: int,
    ) -> bool: ...

class CodeLayout:
    def __init__(self, bits: int, is_modulo: bool, columns: list[int], num_messages: int) -> None: ...
    def decode(
        self,
        reader: TensorReader,
        coded: Tensor,
        copy: Tensor,
        own: Tensor | None,
        widths: Tensor | None,
        distance: Tensor | None,
        num_threads: int,
    ) -> bool: ...

def available_tiers() -> list[str]: ...
def tier() -> str: ...
def force_plan(plan: Plan | None) -> None: ...
def last_plan() -> Plan: ...
def set_tier(name: str) -> None: ...
