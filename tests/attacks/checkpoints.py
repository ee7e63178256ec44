"""Attacks on checkpoints: bytes that changed, structures that changed under a right check sum, and archives that lie.

`attack` is called by the tests, and by whoever wants more of it: in the folder of the
tests, ``python -m attacks.checkpoints SEED COUNT``.
"""

import copy
import io
import random
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

import gut_fast as gf
from gut_fast.distributed import torch_files
from gut_fast.distributed.files import DamagedError, Shard, read_shard, write_shard
from gut_fast.files import FileError

TOPOLOGY = gf.topology.ring(4)
LABELS = torch.arange(24) % 3
STRANGE = (
    None, True, -1, 2**70, 1.5, float("nan"), "x", "\x1b[2J", [], {}, (), [[[[]]]], {"a": {}},
    torch.zeros(0), torch.zeros(2, 3, dtype=torch.float64), torch.tensor(1), torch.zeros(2).to_sparse(),
    torch.zeros(1).expand(10**12), torch.zeros(3, device="meta"),
)  # fmt: skip
"""Values that stand where others should."""


def simulator(optimizer="gut"):
    """A small simulator of four agents, with an optimizer of ours, one of torch's within ours, or one of torch's."""
    make = {
        "gut": lambda parameters: gf.GUT(parameters, lr=0.1, mu=0.5, topology=TOPOLOGY),
        "adamw": lambda parameters: gf.Gossip(torch.optim.AdamW(parameters, lr=0.01), "dsgd", topology=TOPOLOGY),
    }
    torch.manual_seed(0)
    return gf.Simulator(
        nn.Linear(2, 3),
        TOPOLOGY,
        optimizer=make[optimizer],
        data=(torch.randn(24, 2), LABELS),
        parts=gf.data.partition.iid(LABELS, 4),
        batch_size=2,
        engine="auto",
    )


def damaged(content, rng):
    """The bytes with some changed, taken out, doubled or cut off."""
    content = bytearray(content)
    place = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place : place + rng.randrange(1, 200)]
    elif kind == 2:
        content[place:place] = content[place : place + rng.randrange(1, 200)]
    else:
        del content[place:]
    return bytes(content)


def places(value, path=()):
    """The places of all values within a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def restructured(content, rng):
    """A copy of a nested value in which one value is another, is gone, or has another name."""
    content = copy.deepcopy(content)
    *path, last = rng.choice([place for place in places(content) if place])
    holder = content
    for key in path:
        holder = holder[key]
    kind = rng.randrange(4)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["other", 7, None])] = holder.pop(last)
    elif kind == 2 and isinstance(holder[last], torch.Tensor):
        changes = (lambda t: t.flatten()[:-1], lambda t: t.double(), lambda t: t[None], lambda t: t.to(torch.int8))
        holder[last] = rng.choice(changes)(holder[last])
    else:
        holder[last] = rng.choice(STRANGE)
    return content


def lies(rng):
    """An archive that declares more than it holds, or calls what it must not."""
    kind = rng.randrange(5)
    buffer = io.BytesIO()
    if kind == 0:  # compressed a thousandfold
        torch.save({"w": torch.zeros(10**5)}, buffer)
        return _rewritten(buffer, lambda name, content: content, zipfile.ZIP_DEFLATED)
    pickles = {
        1: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # bytearray(2**36)
        2: b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        3: b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",  # a bytearray of 2**36 bytes, by its opcode
        4: b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    }
    torch.save({"w": torch.zeros(3)}, buffer)
    replaced = pickles[kind]
    return _rewritten(buffer, lambda name, content: replaced if name.endswith("data.pkl") else content)


def _rewritten(buffer, change, compression=zipfile.ZIP_STORED):
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return result.getvalue()


def stretched(rng):
    """An archive whose tensor is said to be larger than its storage, or its storage larger than the file."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(300)}, buffer)
    old = b"M" + (300).to_bytes(2, "little")
    where = rng.randrange(2)

    def change(name, content):
        if not name.endswith("data.pkl"):
            return content
        parts = content.split(old)
        assert len(parts) == 3
        new = b"J" + (2**30).to_bytes(4, "little")
        return parts[0] + (new if where == 0 else old) + parts[1] + (new if where == 1 else old) + parts[2]

    return _rewritten(buffer, change)


def state_of(sim):
    """All that a checkpoint restores, as values that can be compared, NaN with NaN too."""
    return repr(_comparable({**sim._content(), "engine": None}))


def _comparable(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return [(key, _comparable(child)) for key, child in value.items()]
    return [_comparable(child) for child in value] if isinstance(value, (list, tuple)) else value


def attack(seed, count):
    """Makes `count` attacks with this seed and returns how many they were; AssertionError says which one fell."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        prepared = []
        for optimizer in ("gut", "adamw"):
            sim = simulator(optimizer)
            sim.run(3, eval_every=1, checkpoint=path, progress=False)
            other = simulator(optimizer)
            other.load_checkpoint(path)
            prepared.append((other, path.read_bytes(), torch.load(path, weights_only=True), state_of(other)))
        write_shard(path, Shard(3, 0, 1, "run, epoch 0", 1, prepared[0][2]))
        shard = path.read_bytes()
        for number in range(count):
            about = f"seed {seed}, attack {number}"
            if number % 4 == 0:
                _attack_shard(path, shard, rng, about)
            elif number % 4 == 1:
                _attack_archive(path, rng, about)
            else:
                sim, content, structure, whole = prepared[rng.randrange(2)]
                path.write_bytes(damaged(content, rng))
                if number % 4 == 2:
                    torch.save(restructured(structure, rng), path)
                _attack_simulator(sim, path, about, whole if number % 4 == 3 else None)
    return count


def refused(load, *kinds):
    """What the call is refused with, in at most 5,000 characters; None if it is not."""
    try:
        load()
    except kinds as error:
        return str(error)[:5001]
    return None


def _attack_shard(path, content, rng, about):
    path.write_bytes(damaged(content, rng))
    message = refused(lambda: read_shard(path), DamagedError)
    if path.read_bytes() != content:
        assert message, f"{about}: a damaged shard was read"
        assert str(path) in message[:5000], about


def _attack_archive(path, rng, about):
    content = rng.choice((lies, stretched))(rng)
    message = refused(lambda: torch_files.load(io.BytesIO(content), len(content), path), FileError)
    assert message, f"{about}: an archive that lies was read"
    assert str(path) in message[:5000], about


def _attack_simulator(sim, path, about, whole):
    """A checkpoint is refused, and nothing has changed; or it is loaded, as it was written if `whole` is given."""
    before = state_of(sim)
    message = refused(lambda: sim.load_checkpoint(path), FileError, ValueError, TypeError)
    if message is None:
        assert whole in (None, state_of(sim)), f"{about}: a damaged checkpoint was loaded as another"
        sim.run(sim.step + 1, progress=False)
    else:
        assert len(message) <= 5000, about
        assert state_of(sim) == before, f"{about}: refused, but something had changed ({message})"


if __name__ == "__main__":
    print(attack(*map(int, sys.argv[1:])))
