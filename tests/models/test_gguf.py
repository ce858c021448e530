"""The reader: what the ``gguf`` package reads from the same file, and any bytes whatever."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemoa.errors import ModelInvalidError
from edgemoa.models.blocks import FORMATS
from edgemoa.models.gguf import MAX_ITEMS, TENSOR_TYPES, GgufFile

from .tiny import Tiny, tiny

KINDS = [*FORMATS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return Tiny("Q4_1", layers=1).write(path).read_bytes()


def parse(folder: Path, data: bytes) -> None:
    path = folder / "some.gguf"
    path.write_bytes(data)
    with GgufFile(path) as file:
        for tensor in file.tensors.values():
            for _ in file.slabs(tensor):
                pass


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, at: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, at)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_what_the_gguf_package_reads(tmp_path: Path, kind: str) -> None:
    path = tiny("llama3", kind).write(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(path)
    with GgufFile(path) as ours:
        assert ours.version == 3
        fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert ours.metadata == fields
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            mine = ours.tensors[t.name]
            assert mine.type.name == t.tensor_type.name
            assert mine.shape == tuple(reversed(t.shape.tolist()))
            data = np.concatenate(list(ours.slabs(mine)))
            assert data.tobytes() == t.data.tobytes()


def test_the_sizes_of_types_are_those_of_the_gguf_package() -> None:
    for number, kind in TENSOR_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert kind.name == theirs.name
        assert (kind.block, kind.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_version_2_has_the_same_layout(tmp_path: Path, small: bytes) -> None:
    parse(tmp_path, small[:4] + struct.pack("<I", 2) + small[8:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (header(magic=b"GGML") + bytes(64), "not a GGUF file"),
        (header(version=1) + bytes(64), "version 1 is not supported"),
        (header(version=4) + bytes(64), "version 4 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=1 << 60) + bytes(64), "claims 1152921504606846976 tensors"),
        (header(keys=1 << 60) + bytes(64), "claims 1152921504606846976 keys"),
        (header(keys=1) + struct.pack("<Q", 1 << 40) + bytes(64), "bytes in a string"),
        (header(keys=1) + text("k") + struct.pack("<I", 99) + bytes(9), "unknown type 99"),
        (header(keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "type 9 are"),
        (
            header(keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 50) + bytes(64),
            "array items",
        ),
        (header(keys=1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 62), "array items"),
        (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16), "not UTF-8"),
        (header(keys=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(9), "twice"),
        (
            header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 3) + bytes(64),
            "not a power of two",
        ),
        (header(tensors=1) + tensor(shape=(1,) * 5) + bytes(64), "dimensions"),
        (header(tensors=1) + tensor(shape=()) + bytes(64), "impossible shape"),
        (header(tensors=1) + tensor(shape=(0, 32)) + bytes(64), "impossible shape"),
        (header(tensors=1) + tensor(shape=(1 << 63, 1 << 63)) + bytes(64), "impossible shape"),
        (header(tensors=1) + tensor(shape=(33,), kind=2) + bytes(256), "do not divide"),
        (header(tensors=1) + tensor(kind=4) + bytes(256), "unknown type 4"),
        (header(tensors=1) + tensor(at=8) + bytes(256), "unaligned"),
        (header(tensors=1) + tensor(shape=(64,)) + bytes(128), "truncated"),
        (header(tensors=1) + tensor(at=1 << 62) + bytes(128), "truncated"),
        (header(tensors=2) + tensor() * 2 + bytes(512), "appears twice"),
        (header(tensors=2) + tensor() + tensor("u") + bytes(512), "overlaps"),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ModelInvalidError, match=message):
        parse(tmp_path, data)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, small: bytes) -> None:
    for end in [*range(0, 4000, 37), *range(4000, len(small) - 1, 4099), len(small) - 40]:
        with pytest.raises(ModelInvalidError):
            parse(tmp_path, small[:end])


def test_lies_about_sizes_cost_no_memory(tmp_path: Path) -> None:
    lies = [
        header(tensors=1 << 40, keys=1 << 40),
        header(keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 22),
        header(keys=1) + text("k") + struct.pack("<IIQ", 9, 12, 1 << 40),
        header(keys=1) + text("k") + struct.pack("<IQ", 8, 1 << 30),
        header(tensors=1) + tensor(shape=(1 << 40,)),
    ]
    tracemalloc.start()
    try:
        for lie in lies:
            with pytest.raises(ModelInvalidError):
                parse(tmp_path, lie + bytes(4096))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_metadata_are_bounded_as_a_whole(tmp_path: Path) -> None:
    """Many arrays, each of a size that would do, in a file that really has them."""
    count = 1 << 18
    array = struct.pack("<IIQ", 9, 0, count) + bytes(count)
    keys = b"".join(text(f"k{n}") + array for n in range(MAX_ITEMS // count + 1))
    with pytest.raises(ModelInvalidError, match="array items, more than"):
        parse(tmp_path, header(keys=MAX_ITEMS // count + 1) + keys)
    array = struct.pack("<IIQ", 9, 8, 70) + 70 * text("x" * (1 << 20))
    with pytest.raises(ModelInvalidError, match="bytes of metadata, more than"):
        parse(tmp_path, header(keys=1) + text("k") + array)


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small)
    with GgufFile(path) as file:
        path.write_bytes(small[:9000])
        with pytest.raises(ModelInvalidError, match="shorter"):
            for t in file.tensors.values():
                list(file.slabs(t))


SETTINGS = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(data=st.binary(max_size=400))
def test_any_bytes_parse_or_raise_one_error(tmp_path: Path, data: bytes) -> None:
    for candidate in (data, header(1, 1) + data, header(1, 0) + data):
        try:
            parse(tmp_path, candidate)
        except ModelInvalidError:
            continue


@SETTINGS
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), min_size=1, max_size=6
    )
)
def test_a_changed_file_parses_or_raises_one_error(
    tmp_path: Path, small: bytes, edits: list[tuple[float, int, bool]]
) -> None:
    data = bytearray(small)
    table = small.index(b"token_embd.weight") + 1000
    for where, value, in_table in edits:
        # Half of the changes fall in the counts and keys, half in the table of tensors.
        start, end = (table - 1000, table) if in_table else (0, 1200)
        data[start + int(where * (end - start - 1))] = value
    with suppress(ModelInvalidError):
        parse(tmp_path, bytes(data))
