from torch import Tensor

MAX_STATES: int
MAX_MESSAGES: int
CUDA_OPTION: str

class DType:
    float32: DType
    float64: DType
    bfloat16: DType

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
    def __init__(self, block: int, ahead: int, fetch: Fetch) -> None: ...

class TensorReader: ...

class TensorStep:
    def run(self, num_threads: int) -> None: ...
    def message(
        self, reader: TensorReader, rows: list[Tensor | None], residuals: list[Tensor | None], num_threads: int
    ) -> bool: ...
    def combine(
        self, reader: TensorReader, rows: list[Tensor | None], residuals: list[Tensor | None], num_threads: int
    ) -> bool: ...

def tensor_reader(exchange_api: object, types: list[type]) -> TensorReader | None: ...
def are_plain(
    reader: TensorReader,
    num_agents: int,
    parameters: list[Tensor],
    state: list[Tensor],
    gradients: list[Tensor | None],
) -> bool: ...
def tensor_step(
    reader: TensorReader,
    parameters: list[Tensor],
    state: list[Tensor],
    gradients: list[Tensor | None],
    coefficients: Tensor,
    num_messages: int,
    row_start: Tensor,
    neighbor: Tensor,
    weight: Tensor,
    grad_scale: Tensor | None,
) -> TensorStep | None: ...
def available_tiers() -> list[str]: ...
def tier() -> str: ...
def force_plan(plan: Plan | None) -> None: ...
def last_plan() -> Plan: ...
def set_tier(name: str) -> None: ...
def gossip_step(
    dtype: DType,
    state_dtype: DType,
    num_agents: int,
    parameters: list[int],
    gradients: list[int],
    columns: list[int],
    state: list[int],
    coefficients: int,
    num_messages: int,
    row_start: int,
    neighbor: int,
    weight: int,
    gradient_scale: int,
    num_threads: int,
) -> None: ...
def stream_step(
    dtype: DType,
    state_dtype: DType,
    num_agents: int,
    parameters: list[int],
    gradients: list[int],
    columns: list[int],
    state: list[int],
    coefficients: int,
    num_messages: int,
    row_start: int,
    neighbor: int,
    weight: int,
    gradient_scale: int,
    num_threads: int,
) -> None: ...
def message(
    dtype: DType,
    state_dtype: DType,
    num_agents: int,
    parameters: list[int],
    gradients: list[int],
    columns: list[int],
    state: list[int],
    coefficients: int,
    num_messages: int,
    row_start: int,
    neighbor: int,
    weight: int,
    gradient_scale: int,
    row_dtype: DType,
    rows: list[int],
    residuals: list[int],
    num_threads: int,
) -> None: ...
def combine(
    dtype: DType,
    state_dtype: DType,
    num_agents: int,
    parameters: list[int],
    gradients: list[int],
    columns: list[int],
    state: list[int],
    coefficients: int,
    num_messages: int,
    row_start: int,
    neighbor: int,
    weight: int,
    gradient_scale: int,
    row_dtype: DType,
    rows: list[int],
    residuals: list[int],
    num_threads: int,
) -> None: ...
