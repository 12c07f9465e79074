"""Published weights from a file, and nothing but weights: nothing that is read here is ever run.

A .safetensors file holds tensors only. The .pth files of torch are pickles, which may run anything when they are
loaded. Here their instructions are listed, not executed (`pickletools`), and only those that a dictionary of tensors
needs are understood: dictionaries, tuples, lists, numbers, names, and "this stretch of that storage in this shape".
Everything else is refused, and so is what would grow far beyond the file: numbers that many tensors share, parts nested
in parts. Both layouts of torch are read: the zip file, and the one before version 1.6.
"""

from __future__ import annotations

import hashlib
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from snowmelt.errors import UserError

DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
BUILDERS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_INSTRUCTIONS = 1_000_000
_DEEPEST = 20
"""Dictionaries, lists and tuples in one another; states need three."""
_MOST_DIMENSIONS = 16
_MOST_TIMES, _MOST_MORE = 8, 1 << 20
"""Bytes that are read and made of a file: so many times its own and so many more; states need three times."""


class Refused(ValueError):
    """A pickle holds something that a dictionary of tensors does not need."""


class Name(NamedTuple):
    """A global that a pickle speaks of; it is never looked up."""

    text: str


class Stretch(NamedTuple):
    """A tensor before its bytes are known: elements of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Storage(NamedTuple):
    """A run of numbers in a file."""

    dtype: torch.dtype
    key: str
    elements: int


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or a .pth file of torch, by name.

    Raises:
        UserError: it cannot be read, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            return _zipped(path) if zipfile.is_zipfile(file) else _legacy(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; give the path of the weights.") from error
    except Refused as error:
        raise UserError(f"{path} holds more than weights ({error}); such a file is not loaded.") from error
    except Exception as error:  # every way in which a damaged file can fail
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} holds no readable weights ({detail}); fetch it again.") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; a `UserError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of the weights.") from error


def _zipped(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        room = _Room(path)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise Refused("compressed parts")
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("big-endian numbers")
        with archive.open(pickles[0]) as file:
            state = interpret(file)
        return _tensors(state, lambda storage: archive.read(f"{folder}data/{storage.key}"), room)


def _legacy(path: Path) -> dict[str, Tensor]:
    """The layout before torch 1.6: five pickles one after the other, then each storage's count and bytes."""
    with path.open("rb") as file:
        if interpret(file) != _MAGIC:
            raise ValueError("not a file of torch")
        interpret(file)
        interpret(file)
        state, keys = interpret(file), interpret(file)
        if not isinstance(state, dict):
            raise Refused("no dictionary of tensors")
        counts = {stretch.storage.key: stretch.storage for stretch in state.values() if isinstance(stretch, Stretch)}
        found, room = dict[str, bytes](), _Room(path)
        for key in map(_text, keys):
            (count,) = struct.unpack("<q", file.read(8))
            if key not in counts or count != counts[key].elements or key in found:
                raise ValueError("storages that do not fit")
            room.take(counts[key])
            found[key] = file.read(count * counts[key].dtype.itemsize)
        return _tensors(state, lambda storage: found[storage.key], room)


class _Room:
    """The bytes that may still be made of a file."""

    def __init__(self, path: Path) -> None:
        self.left = _MOST_TIMES * path.stat().st_size + _MOST_MORE

    def take(self, storage: Storage, elements: int | None = None) -> None:
        """So many elements of a storage, or all of them, are about to be read or copied."""
        count = storage.elements if elements is None else elements
        if count < 0:
            raise ValueError("fewer numbers than none")
        self.left -= count * storage.dtype.itemsize
        if self.left < 0:
            raise Refused("tensors much larger than the file")


def _tensors(state: object, read: Callable[[Storage], bytes], room: _Room) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise Refused("no dictionary of tensors")
    kept, found = dict[Storage, Tensor](), dict[str, Tensor]()
    for name, stretch in state.items():
        if not isinstance(stretch, Stretch):
            raise Refused(f"{name[:99]!r} is no tensor")
        if stretch.storage not in kept:
            room.take(stretch.storage)
            kept[stretch.storage] = _numbers(stretch.storage, read(stretch.storage))
        room.take(stretch.storage, math.prod(stretch.size))
        found[name] = _placed(stretch, kept[stretch.storage])
    return found


def _numbers(storage: Storage, data: bytes) -> Tensor:
    if len(data) != storage.elements * storage.dtype.itemsize:
        raise ValueError("a storage of the wrong length")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _placed(stretch: Stretch, numbers: Tensor) -> Tensor:
    """The tensor itself; torch checks that it lies inside its storage."""
    if math.prod(stretch.size) > len(numbers) or min((stretch.offset, *stretch.size, *stretch.stride)) < 0:
        raise ValueError("a tensor larger than its storage")
    return numbers.as_strided(stretch.size, stretch.stride, stretch.offset).clone()


def interpret(file: BinaryIO | Any) -> Any:
    """What the pickle at the file's position says, as plain values, `Name`s and `Stretch`es; it stops behind it.

    Raises:
        Refused: it says anything else.
    """
    return _Reader().read(file)


class _Reader:
    """A stack, as pickles are written for, that knows only harmless instructions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.depths: dict[int, int] = {}
        """How deeply each dictionary, list and tuple is nested, by its id..."""
        self.whole: set[int] = set()
        """...and those that are part of another, to which nothing is added any more: so none is part of itself."""
        self.parts: list[Any] = []
        """All of them, so that no id comes back."""

    def read(self, file: Any) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in INSTRUCTIONS or number > _MOST_INSTRUCTIONS:
                raise Refused(f"the instruction {opcode.name}")
            INSTRUCTIONS[opcode.name](self, argument)
        raise ValueError("it ends too soon")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take off everything since the last mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def name(self, text: str) -> None:
        if text not in DTYPES and text not in BUILDERS:
            raise Refused(f"the name {text[:99]!r}")
        self.push(Name(text))

    def holds(self, container: Any, values: list[Any]) -> None:
        """Take note that these values are about to be in the container."""
        self.whole.update(id(value) for value in values if isinstance(value, dict | list))
        if id(container) in self.whole:
            raise Refused("a part of itself")
        depth = 1 + max((self.depths.get(id(value), 0) for value in values), default=0)
        if depth > _DEEPEST:
            raise Refused("parts nested too deeply")
        self.depths[id(container)] = max(depth, self.depths.get(id(container), 0))
        self.parts.append(container)

    def tuple_of(self, values: list[Any]) -> None:
        taken = tuple(values)
        self.holds(taken, values)
        self.push(taken)

    def last(self, count: int) -> list[Any]:
        """Take off the last values."""
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused("items of something else than a dictionary")
        if not all(isinstance(name, str) for name in flat[::2]):
            raise Refused("names that are no text")
        self.holds(target, flat[1::2])
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("values for something else than a list")
        self.holds(self.stack[-1], values)
        self.stack[-1].extend(values)

    def reduce(self) -> None:
        """A call: of the three functions that state dictionaries need, none of which is called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == Name("collections OrderedDict") and arguments == ():
            self.push({})
        elif function == Name("torch._utils _rebuild_tensor_v2"):
            storage, offset, size, stride = arguments[:4]
            self.push(_stretch(storage, offset, size, stride))
        elif function == Name("torch._utils _rebuild_parameter") and isinstance(arguments[0], Stretch):
            self.push(arguments[0])
        else:
            raise Refused(f"the call of {function.text if isinstance(function, Name) else type(function).__name__}")

    def build(self) -> None:
        """Attributes: state dictionaries have their `_metadata`, which is left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Refused("attributes of something else than a dictionary")

    def persistent(self) -> None:
        kind, name, key, _place, count, *_ = self.stack.pop()
        if kind != "storage" or not isinstance(name, Name) or name.text not in DTYPES:
            raise Refused("a reference to something else than a storage")
        self.push(Storage(DTYPES[name.text], _text(key), _whole(count)))


def _stretch(storage: Any, offset: Any, size: Any, stride: Any) -> Stretch:
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise Refused("a tensor without a storage")
    if len(size) > _MOST_DIMENSIONS:
        raise Refused(f"a tensor of {len(size)} dimensions")
    return Stretch(storage, _whole(offset), tuple(map(_whole, size)), tuple(map(_whole, stride)))


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise Refused("a number that is not whole")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("a name that is no text")
    return value


Instruction = Callable[[_Reader, Any], object]
_VALUES = (
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "UNICODE",
    "BININT",
    "BININT1",
    "BININT2",
    "INT",
    "LONG",
    "LONG1",
    "BINFLOAT",
)
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


def _constant(make: Callable[[], Any]) -> Instruction:
    return lambda reader, _: reader.push(make())


INSTRUCTIONS: Mapping[str, Instruction] = {
    **{name: lambda reader, value: reader.push(value) for name in _VALUES},
    **{name: _constant(make) for name, make in _CONSTANTS.items()},
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda reader, at: reader.memo.update({at: reader.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda reader, at: reader.push(reader.memo[at])),
    "MARK": lambda reader, _: reader.marks.append(len(reader.stack)),
    "GLOBAL": lambda reader, text: reader.name(text),
    "TUPLE": lambda reader, _: reader.tuple_of(reader.since_mark()),
    "TUPLE1": lambda reader, _: reader.tuple_of(reader.last(1)),
    "TUPLE2": lambda reader, _: reader.tuple_of(reader.last(2)),
    "TUPLE3": lambda reader, _: reader.tuple_of(reader.last(3)),
    "SETITEM": lambda reader, _: reader.set_items(reader.last(2)),
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    "APPEND": lambda reader, _: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "REDUCE": lambda reader, _: reader.reduce(),
    "BUILD": lambda reader, _: reader.build(),
    "BINPERSID": lambda reader, _: reader.persistent(),
}
"""All that is understood; pickles that run something need others, or names that are not among these."""
