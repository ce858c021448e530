"""A bounded, streaming reader of GGUF files, versions 2 and 3 (little endian).

Why a reader of our own: a model file is hostile input, and this one runs on boards with 1 GB of
memory. Every count and length is checked against what is left of the file *before* anything is
allocated for it; any bytes either parse or raise :class:`ModelInvalidError`, nothing else; tensor
data is read in slabs with ``pread``, so that neither the file's pages nor a whole tensor need to
be in memory, and a file that shrinks while it is read is an error instead of a SIGBUS. The
``gguf`` package, the reference in our tests, maps the file and trusts its counts (0.19: an array
said to have 2^40 elements, in a file of 117 bytes, keeps it busy until it is killed).

The format is described in ``docs/gguf.md`` of the ggml project.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import numpy as np
from numpy.typing import NDArray

from edgemoa.errors import ModelInvalidError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_KEYS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 16
MAX_ITEMS: Final = 1 << 21  # of all arrays together; the most that was seen is 1.3 million
MAX_TEXT_BYTES: Final = 1 << 20  # one string: a chat template is some kilobytes
MAX_HEADER_BYTES: Final = 1 << 26  # without tensor data; the largest that was seen is 17 MB
MAX_NAME_BYTES: Final = 256
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 1 << 16
SLAB_BYTES: Final = 1 << 20

Value = bool | int | float | str | list["Value"]

_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores elements: ``block`` of them in ``block_bytes``."""

    name: str
    block: int
    block_bytes: int


# Every type whose size is fixed, so that tables are checked even where the importer then says no.
TENSOR_TYPES: Final = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table.

    ``shape`` is in the order of numpy, the slowest dimension first (the file has it reversed), so
    a weight is [out, in]. ``offset`` and ``size`` are bytes in the file.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.block_bytes


class GgufFile:
    """An open GGUF file: ``metadata`` by key, ``tensors`` by name, their bytes on demand.

    Use it as a context manager. Raises :class:`ModelInvalidError` for anything wrong with the
    bytes, ``OSError`` for what the system says about the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header = _Header(self._file, self.size)
            self.version, self.metadata, self.tensors = header.parse()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def chunks(self, size: int) -> Iterator[bytes]:
        """The whole file from its start, ``size`` bytes at a time."""
        offset = 0
        while data := os.pread(self._file.fileno(), size, offset):
            offset += len(data)
            yield data

    def slabs(self, tensor: Tensor, multiple_of: int = 1) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes as arrays [rows, row_bytes], of about ``SLAB_BYTES`` each.

        The number of rows of each, except perhaps the last, is a multiple of ``multiple_of``.
        """
        step = max(1, SLAB_BYTES // (tensor.row_bytes * multiple_of)) * multiple_of
        for first in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - first)
            want = rows * tensor.row_bytes
            data = os.pread(self._file.fileno(), want, tensor.offset + first * tensor.row_bytes)
            if len(data) != want:
                raise ModelInvalidError(f"{self.path.name} became shorter while it was read")
            yield np.frombuffer(data, np.uint8).reshape(rows, tensor.row_bytes)

    # --- typed access to metadata: each names the key in its error

    def text(self, key: str, default: str | None = None, *, most: int = 256) -> str:
        """At most ``most`` characters: a name, unless it is said to be more."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str) or len(value) > most:
            raise ModelInvalidError(
                f"{self.path.name}: {key} is not a string of up to {most} characters"
            )
        return value

    def integer(self, key: str, default: int | None = None, *, most: int = 1 << 31) -> int:
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ModelInvalidError(f"{self.path.name}: {key} is not an integer from 0 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(key, default)
        if not isinstance(value, float):
            raise ModelInvalidError(f"{self.path.name}: {key} is not a floating-point number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ModelInvalidError(f"{self.path.name}: {key} is not true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ModelInvalidError(f"{self.path.name}: {key} is not a list of strings")
        items = [item for item in value if isinstance(item, str)]
        if len(items) != len(value):
            raise ModelInvalidError(f"{self.path.name}: {key} is not a list of strings")
        return items

    def integers(self, key: str) -> list[int]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ModelInvalidError(f"{self.path.name}: {key} is not a list of integers")
        items = [i for i in value if isinstance(i, int) and not isinstance(i, bool)]
        if len(items) != len(value):
            raise ModelInvalidError(f"{self.path.name}: {key} is not a list of integers")
        return items


class _Header:
    """The part before the tensor data, read once from front to back."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._left = size
        self._items = 0
        self._taken = 0

    def parse(self) -> tuple[int, dict[str, Value], dict[str, Tensor]]:
        if self._size < 24 or self._take(4) != MAGIC:
            raise ModelInvalidError(
                "this is not a GGUF file",
                hint="edgemoa imports GGUF files, the format of llama.cpp",
            )
        version = self._int("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian files are" if swapped in VERSIONS else f"version {version} is"
            raise ModelInvalidError(f"GGUF {what} not supported; versions 2 and 3 are")
        tensor_count = self._int("<Q")
        key_count = self._int("<Q")
        # A key takes at least 8 + 1 + 4 + 1 bytes, a tensor at least 8 + 1 + 4 + 8 + 4 + 8.
        self._at_most("keys", key_count, min(MAX_KEYS, self._left // 14))
        self._at_most("tensors", tensor_count, min(MAX_TENSORS, self._left // 33))

        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise ModelInvalidError(f"GGUF key {key!r} appears twice")
            metadata[key] = self._value(self._int("<I"))

        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise ModelInvalidError("GGUF general.alignment is not a power of two up to 65536")
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        start = (self._size - self._left + alignment - 1) // alignment * alignment
        tensors: dict[str, Tensor] = {}
        for name, kind, shape, offset in entries:
            if name in tensors:
                raise ModelInvalidError(f"tensor {name!r} appears twice")
            size = prod(shape) // kind.block * kind.block_bytes
            if offset % alignment:
                raise ModelInvalidError(f"tensor {name!r} starts at an unaligned place")
            if start + offset + size > self._size:
                raise ModelInvalidError(
                    f"tensor {name!r} reaches past the end of the file: the file is truncated",
                    hint="fetch or copy the file again",
                )
            tensors[name] = Tensor(name, kind, shape, start + offset, size)
        end = 0
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise ModelInvalidError(f"tensor {tensor.name!r} overlaps another one")
            end = tensor.offset + tensor.size
        return version, metadata, tensors

    def _tensor_entry(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = self._string(MAX_NAME_BYTES)
        dimensions = self._int("<I")
        self._at_most(f"dimensions of tensor {name!r}", dimensions, MAX_DIMENSIONS)
        shape = tuple(reversed([self._int("<Q") for _ in range(dimensions)]))
        number = self._int("<I")
        offset = self._int("<Q")
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            raise ModelInvalidError(f"tensor {name!r} has the unknown type {number}")
        if not shape or min(shape) < 1 or prod(shape) > self._size * 256:
            # No type packs more than 256 elements in a byte: a larger product is a lie.
            raise ModelInvalidError(f"tensor {name!r} has the impossible shape {list(shape)}")
        if shape[-1] % kind.block:
            raise ModelInvalidError(
                f"tensor {name!r}: rows of {shape[-1]} do not divide into {kind.name} blocks"
            )
        return name, kind, shape, offset

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(MAX_TEXT_BYTES)
        if kind != _ARRAY:
            raise ModelInvalidError(f"GGUF value of the unknown type {kind}")
        item_kind = self._int("<I")
        count = self._int("<Q")
        layout = _SCALARS.get(item_kind, "")
        width = struct.calcsize(layout) if layout else 8
        self._at_most("array items", count, min(MAX_ITEMS - self._items, self._left // width))
        self._items += count
        if layout:
            return list(struct.unpack(f"<{count}{layout[1]}", self._take(count * width)))
        if item_kind == _STRING:
            return [self._string(MAX_TEXT_BYTES) for _ in range(count)]
        raise ModelInvalidError(f"GGUF arrays of the type {item_kind} are not supported")

    def _scalar(self, layout: str) -> bool | int | float:
        value: bool | int | float = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _int(self, layout: str) -> int:
        return int(self._scalar(layout))

    def _string(self, most: int) -> str:
        length = self._int("<Q")
        self._at_most("bytes in a string", length, min(most, self._left))
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise ModelInvalidError("a string in the GGUF header is not UTF-8") from None

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ModelInvalidError("the GGUF header ends early: the file is truncated")
        self._at_most("bytes of metadata", self._taken + count, MAX_HEADER_BYTES)
        data = self._file.read(count)
        if len(data) != count:
            raise ModelInvalidError("the GGUF file became shorter while it was read")
        self._left -= count
        self._taken += count
        return data

    def _at_most(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise ModelInvalidError(
                f"the GGUF header claims {count} {what}, "
                "more than the file can hold or a model needs",
                hint="the file is damaged; fetch or copy it again",
            )
