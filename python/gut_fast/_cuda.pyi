MAX_STATES: int
MAX_MESSAGES: int
FEW_ROWS: int

class DType:
    float32: DType
    float64: DType
    bfloat16: DType
    float16: DType

class Step:
    def __init__(
        self,
        device: int,
        stream: int,
        dtype: DType,
        state_dtype: DType,
        num_agents: int,
        parameters: list[int],
        gradients: list[int],
        columns: list[int],
        state: list[int],
        coefficients: int,
        coefficients_on_device: bool,
        num_messages: int,
        num_edges: int,
        row_start: int,
        neighbor: int,
        weight: int,
        gradient_scale: int,
    ) -> None: ...

def refusal(device: int) -> str: ...
def fits(device: int, dtype: DType, num_messages: int, num_agents: int) -> bool: ...
def gossip_step(step: Step) -> None: ...
def message(step: Step, row_dtype: DType, num_rows: int, addresses: list[int], table: int) -> None: ...
def combine(step: Step, row_dtype: DType, num_rows: int, addresses: list[int], table: int) -> None: ...
