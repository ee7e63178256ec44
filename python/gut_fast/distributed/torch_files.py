"""Files of tensors, written by `torch.save` and read within the limits of their own size.

`torch.load` allocates what a file declares: a few bytes may declare gigabytes, compressed or not. So the archive's
directory and the pickle in it are looked through first, without a tensor being made: no entry is compressed, each
storage is as long as its entry, and each tensor lies within its storage.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO, ClassVar

import torch

from gut_fast.arguments import shortened, shown
from gut_fast.files import FileError

__all__ = ["load", "save"]

MAX_STRUCTURE = 64 << 20
"""The most bytes that everything but the tensors' values may take, which is a pickle."""

END_OF_ARCHIVE, END_BYTES = b"PK\x05\x06", 22
"""How the last record of an archive begins, and how long it is."""

OPCODES = (
    "PROTO STOP MARK POP GLOBAL REDUCE BUILD NEWOBJ NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINSTRING BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "SETITEM SETITEMS EMPTY_SET BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID"
)
"""The opcodes of pickles that torch writes; among the others are some that allocate what they declare."""

VALUES = (torch.dtype, torch.qscheme, torch.layout)

ITEM_BYTES = {
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QUInt8Storage", "QInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
}
"""The bytes of an element of each class of storage."""


def save(content: Any, file: BinaryIO) -> bytes:
    """Writes the content with `torch.save` and returns the SHA-256 of what was written. Raises OSError if that fails.

    torch itself raises a RuntimeError about a full disk, which does not say why.
    """
    writer = _HashingWriter(file)
    try:
        torch.save(content, writer)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise writer.error or error from error
    return writer.hash.digest()


def load(file: BinaryIO, size: int, path: object) -> Any:
    """Returns what `save` has written, tensors on the CPU; takes no more memory than a small multiple of the file.

    Args:
        file: a file whose first `size` bytes are what was written.
        size: the number of these bytes.
        path: the name of the file for errors.

    Raises:
        FileError: it is no such file, it is damaged, or it declares more than it holds.
    """
    try:
        _check(file, size)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # depending on the damaged byte one of a dozen types, OSError among them
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise FileError(f"{path} cannot be read; it is truncated, corrupt or another file ({reason})") from error


class _HashingWriter:
    """A file to write that computes the SHA-256 of what is written, and keeps the error of a write that failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check(file: BinaryIO, size: int) -> None:
    """Raises ValueError or zipfile.BadZipFile for an archive that declares more than it holds."""
    file.seek(max(size - END_BYTES, 0))
    if file.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
        raise ValueError("it does not end as an archive of torch does")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("a part is compressed, which torch never does")
        if len(entries) < len(archive.infolist()) or sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("its parts have the same name, or are together larger than the file")
        sizes = {name.partition("/")[2]: entry.file_size for name, entry in entries.items()}
        if len({name.partition("/")[0] for name in entries}) > 1 or "data.pkl" not in sizes:
            raise ValueError("it is an archive, but not of torch")
        if sizes["data.pkl"] > MAX_STRUCTURE:
            raise ValueError(f"all but its tensors' values takes more than {MAX_STRUCTURE:,} bytes")
        structure = archive.read(next(name for name in entries if name.partition("/")[2] == "data.pkl"))
    _Structure(io.BytesIO(structure), sizes).load()


class _Opaque:
    """The stand-in of a value that is not looked at: it takes everything that a pickle may do to it."""

    def __new__(cls, *_: object) -> _Opaque:
        return super().__new__(cls)

    def _take(self, *_: object) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = update = _take


class _Storage:
    """The stand-in of a storage: how many elements it has, and the bytes of each."""

    def __init__(self, count: int, itemsize: int) -> None:
        self.count, self.itemsize = count, itemsize


class _Structure(pickle._Unpickler):
    """Reads a pickle of torch with stand-ins for all but plain values, and compares what is declared with its size."""

    dispatch: ClassVar = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES.split())
    }

    def __init__(self, file: BinaryIO, sizes: dict[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes
        self._users = {
            name if isinstance(given, tuple) else f"{given.__module__}.{given.__qualname__}"
            for given in torch.serialization.get_safe_globals()
            for name in (given[1] if isinstance(given, tuple) else "",)
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        if full in FUNCTIONS:
            return FUNCTIONS[full]
        if module == "torch" and isinstance(getattr(torch, name, None), VALUES):
            return getattr(torch, name)
        if module in ("torch", "torch.storage") and name in ITEM_BYTES:
            return name
        if full.startswith("torch._utils _rebuild_") or f"{module}.{name}" in self._users:
            return type(name, (_Opaque,), {})
        raise ValueError(f"it holds a {shortened(f'{module}.{name}')}, which is not read")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, count = pid
        itemsize = ITEM_BYTES[storage]
        if kind != "storage" or type(count) is not int or self._sizes[f"data/{key}"] != count * itemsize:
            raise ValueError(f"storage {shown(key)} is not as long as it says")
        return _Storage(count, itemsize)


def _checked_tensor(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Any:
    """A stand-in for a tensor that must lie within its storage; one of a newer dtype brings that along."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor has a bad shape")
    itemsize = next((each.itemsize for each in rest if isinstance(each, torch.dtype)), storage.itemsize)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if all(size) and (last + 1) * itemsize > storage.count * storage.itemsize:
        raise ValueError(f"a tensor of shape {shown(tuple(size))} does not lie within its storage")
    return _Opaque()


def _rebuilt_from_type(function: Any, kind: object, arguments: Sequence[Any], state: object) -> Any:
    return function(*arguments)


def _copied(content: Any, *_: object) -> Any:
    """A stand-in for a bytearray, which is copied and never made by its length."""
    if not isinstance(content, (str, bytes, _Opaque)):
        raise TypeError(f"a bytearray of {type(content).__name__}")
    return _Opaque()


FUNCTIONS: dict[str, Any] = {
    **dict.fromkeys(("collections Counter", "torch Size", "torch device", "torch.serialization _get_layout"), _Opaque),
    **dict.fromkeys(("_codecs encode", "builtins set", "__builtin__ set"), _Opaque),
    **dict.fromkeys(("builtins complex", "__builtin__ complex"), _Opaque),
    **dict.fromkeys(("builtins bytearray", "__builtin__ bytearray"), _copied),
    **dict.fromkeys(("torch Tensor", "torch.nn.parameter Parameter"), _Opaque()),
    "collections OrderedDict": OrderedDict,
    "torch._tensor _rebuild_from_type_v2": _rebuilt_from_type,
    "torch._utils _rebuild_tensor": _checked_tensor,
    "torch._utils _rebuild_tensor_v2": _checked_tensor,
    "torch._utils _rebuild_tensor_v3": _checked_tensor,
    "torch._utils _rebuild_qtensor": _checked_tensor,
}
"""The stand-ins of what `torch.load` calls; a class that is a value alone, and would allocate if called, cannot be."""
