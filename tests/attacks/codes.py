"""Hostile rows of codes: each call is refused before anything has changed, or gives what plain PyTorch gives.

One or two of the rows that are encoded into, or decoded from, are replaced by others that are wrong, odd, or merely
rare, and codes are overwritten with random bytes.
"""

import random

import torch

from attacks.arguments import COLUMNS, GRAPHS, REFUSALS, TENSORS, _has_memory, check_message
from gut_fast.kernels import ops
from gut_fast.kernels.codes import Code
from steps import a_step

CODES = [Code(16), *(Code(bits, kind) for bits in (8, 4) for kind in ("difference", "modulo")), Code(8, seed=3)]


def attack(seed: int, count: int) -> int:
    """Codes so many times with hostile rows; raises AssertionError, which says which, when one does harm."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        said: list[str] = []
        try:
            _encode_once(rng, said)
            _decode_once(rng, said)
        except Exception as error:
            raise AssertionError(f"attack {number} of seed {seed}: {', '.join(said)}: {error!r}") from error
    return count


def _numbers(rng, length):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    return torch.randn(length, generator=generator) * 10.0 ** rng.randrange(-44, 39)


def _bytes(rng, length):
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    return torch.randint(256, (length,), dtype=torch.uint8, generator=generator)


def _changed(rng, rows, said):
    """The rows, one of them perhaps in another form."""
    rows = list(rows)
    if rows and rng.random() < 0.5:
        index, how = rng.randrange(len(rows)), rng.choice(list(TENSORS))
        try:
            rows[index] = TENSORS[how](rows[index])
        except Exception:  # PyTorch does not make such a thing
            return rows
        said.append(f"row {index}: {how}")
    return rows


def _bits(rows):
    """The bytes of all rows that can be read, with one NaN for all."""
    found = []
    for row in rows:
        if isinstance(row, torch.Tensor) and _has_memory(row):
            plain = row.detach().as_subclass(torch.Tensor).resolve_neg().resolve_conj()
            numbers = torch.cat([plain.reshape(-1)])
            if numbers.is_floating_point():
                numbers = numbers.masked_fill(numbers.isnan(), float("nan"))
            found.append(numbers.view(torch.uint8))
    return found


def _same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _encode_once(rng, said):
    code, step = rng.choice(CODES), a_step("gut", rng.choice(GRAPHS), rng.choice(COLUMNS))
    layout, n = code.layout(step), step.num_agents
    said.append(f"encode {code} of {layout.columns}")
    rows = [_bytes(rng, layout.num_bytes) for _ in range(n)]
    copies = [_numbers(rng, layout.num_numbers) for _ in range(n)]
    widths = [_numbers(rng, layout.num_blocks) for _ in range(n if code.kind == "modulo" else 0)]
    rows, copies, widths = (_changed(rng, each, said) for each in (rows, copies, widths))
    before = _bits([*rows, *copies, *widths])
    refusal = _refusal(lambda: ops.encode(step, code, rows, copies, widths))
    assert not refusal or _same(before, _bits([*rows, *copies, *widths])), f"refused ({refusal}), but changed"


def _decode_once(rng, said):
    code, step = rng.choice(CODES), a_step("gut", GRAPHS[0], rng.choice(COLUMNS))
    layout = code.layout(step)
    said.append(f"decode {code} of {layout.columns}")
    given = [_bytes(rng, layout.num_bytes), _numbers(rng, layout.num_numbers)]
    if code.kind == "modulo":
        given += [_numbers(rng, layout.num_numbers), _numbers(rng, layout.num_blocks)]
    given = _changed(rng, given, said)
    copies = [each.clone() if type(each) is torch.Tensor and _has_memory(each) else each for each in given]
    before = _bits(given)
    found = []
    refusal = _refusal(lambda: found.append(ops.decode(layout, *given)))
    if refusal:
        assert _same(before, _bits(given)), f"refused ({refusal}), but changed"
        return
    expected = ops.decode(layout, *copies, backend="torch")
    assert _same(_bits(given), _bits(copies)), "not what plain PyTorch gives"
    assert _same(_bits(found), _bits([expected])), "other distances than those of plain PyTorch"


def _refusal(call):
    """What a call says that refuses its arguments; nothing if it does not."""
    try:
        call()
    except REFUSALS as error:
        check_message(str(error))
        return str(error)
    return ""
