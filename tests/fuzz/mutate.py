"""Inputs that are almost right: bytes changed a little, or the value that they stand for.

A parser refuses random bytes at the first one. So what a seed means is taken apart (MessagePack,
also inside byte strings; JSON), changed in one place, and put together again; and now and then the
bytes themselves are cut, flipped and spliced. All chance comes from the generator that is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, Final, Literal, TypeAlias

import msgspec

Form: TypeAlias = Literal["msgpack", "json", "bytes"]
"""What an input is, below the bytes that :class:`targets.Target` says stand before it."""

_Change: TypeAlias = Callable[[bytes, bytes, Random], bytes]

MAX_BYTES: Final = 1 << 18  # of an input that grows by its changes
_MOST_SLOTS: Final = 200  # that are looked at in one value
_NESTED: Final = 1500  # levels; Python's decoders give up at about 1000

_INTS: Final = (
    *(0, 1, -1, 2, 7, 8, 9, 20, 21, 63, 64, 65, 127, 128, 255, 256, 257, 512, 513, 65_535, 65_536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**64 - 1),
    *(-(2**31), -(2**53), -(2**63)),
)
_FLOATS: Final = (0.0, -0.0, 1.0, 0.5, -1.5, 1e308, 5e-324, float("nan"), float("inf"))
_TEXTS: Final = (
    *("", " ", "\0", "\x7f", "\u202e", "\ufffd", "🌌", "a.b", "{}", "[]", "{", "null", "é" * 40),
    *("x" * 8, "x" * 56, "x" * 64, "x" * 65, "x" * 256, "x" * 257, "x" * 70_000),
)
_BYTES: Final = (b"", b"\0", b"\xff" * 7, bytes(8), bytes(9), bytes(32), bytes(33), bytes(64))
_HEADERS: Final = (  # of MessagePack: more than there is, and what no message holds
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
    *(b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xc1", b"\xc0", b"\xd4\x05\x00"),
    *(b"\xd6\xff\0\0\0\0", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xc9\xff\xff\xff\xff\x05"),
    *(b"\x91" * _NESTED, b"\x81\xa0" * _NESTED, b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7)),
)
_JSON_TOKENS: Final = (
    *("1e999", "-0", "1" * 400, "0.1e-400", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', "NaN"),
    *("[" * _NESTED, "[" * _NESTED + "]" * _NESTED, '{"a":' * _NESTED + "1" + "}" * _NESTED),
    *("[" + "[]," * 20_000 + "[]]", "[" + "{}," * 20_000 + "{}]", "true", "null", "1e5", "\xff"),
)


def mutated(data: bytes, other: bytes, form: Form, head: int, rng: Random) -> bytes:
    """``data`` with a few changes, some of them taken from ``other``.

    :param head: how many bytes stand before the value.
    """
    for _ in range(1 + (rng.random() < 0.3) + 2 * (rng.random() < 0.1)):
        if form != "bytes" and rng.random() < 0.7:
            body = _structured(data[head:], other[head:], form, rng)
            if body is not None:
                data = data[:head] + body
                continue
        if head and rng.random() < 0.1:
            at = rng.randrange(head)
            data = data[:at] + bytes([rng.getrandbits(8)]) + data[at + 1 :]
        else:
            change: _Change = rng.choice(_CHANGES)
            data = change(data, other, rng)
    return data[:MAX_BYTES]


# --- bytes


def _flip(data: bytes, _: bytes, rng: Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    byte = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xDD, 0xDF, 0xFE, 0xFF, rng.getrandbits(8)))
    return data[:at] + bytes([byte]) + data[at + 1 :]


def _number(data: bytes, _: bytes, rng: Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, len(data) - size + 1))
    value: int = rng.choice(_INTS) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size) + data[at + size :]


def _cut(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at]


def _remove(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 1, 2, 4, 16)) :]


def _insert(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 16))) + data[at:]


def _header(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_HEADERS) + data[at + rng.randrange(2) :]


def _repeat(data: bytes, _: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.randrange(1, 40)]
    return data[:at] + piece * rng.choice((2, 2, 3, 9, 70)) + data[at + len(piece) :]


def _splice(data: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(other) + 1)
    piece = other[start : start + rng.randrange(1, 80)]
    at = rng.randrange(len(data) + 1)
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def _cross(data: bytes, other: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_CHANGES: Final[tuple[_Change, ...]] = (
    *(_flip, _flip, _set, _set, _number, _number, _cut, _remove, _remove, _insert, _insert),
    *(_splice, _splice, _cross, _repeat, _header),
)

# --- values

_Slot: TypeAlias = tuple[Any, Any]  # a container, and a key or an index in it


def _structured(data: bytes, other: bytes, form: Form, rng: Random) -> bytes | None:
    """The same value with one thing changed; None if the bytes stand for no value."""
    try:
        root = [_read(data, form)]
        _change(root, other, form, rng)
        if form == "msgpack":
            return msgspec.msgpack.encode(root[0])
        text = json.dumps(root[0], ensure_ascii=rng.random() < 0.5)
        if rng.random() < 0.1:  # what json cannot write
            text = text.replace("0", rng.choice(_JSON_TOKENS), 1)
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _read(data: bytes, form: Form) -> Any:
    if form == "msgpack":
        return msgspec.msgpack.decode(data)
    return json.loads(data)


def _change(root: list[Any], other: bytes, form: Form, rng: Random) -> None:
    within, key = rng.choice(_slots(root))
    value = within[key]
    match rng.randrange(12):
        case 0 if within is not root:
            del within[key]
        case 1 if isinstance(within, list) and within is not root:
            within.insert(key, value)
        case 2 if isinstance(within, list) and within is not root:
            within[key : key + 1] = [value] * rng.choice((2, 3, 21, 65, 321, 513, 1025))
        case 3:
            within[key] = [value]
        case 4 if isinstance(within, dict):
            within[rng.choice(_TEXTS[:-1])] = within.pop(key) if rng.random() < 0.5 else value
        case 5:
            found = _slots([_read(other, form)])
            there, at = rng.choice(found)
            within[key] = there[at]
        case _:
            within[key] = _like(value, other, form, rng)


def _slots(root: list[Any]) -> list[_Slot]:
    """Where values stand, whatever is in them: the root first."""
    found: list[_Slot] = [(root, 0)]
    for within, key in found:  # grows meanwhile
        value = within[key]
        if len(found) > _MOST_SLOTS:
            break
        if isinstance(value, dict):
            found += [(value, each) for each in value]
        elif isinstance(value, list):
            found += [(value, each) for each in range(len(value))]
    return found


def _like(value: Any, other: bytes, form: Form, rng: Random) -> Any:
    """Another value, more often than not of the same type."""
    kind = type(value) if rng.random() < 0.7 else rng.choice((int, float, str, bytes, bool, list))
    if kind is bytes and form == "json":
        kind = str
    if kind is bool:
        return rng.choice((True, False, None))
    if kind is int:
        if isinstance(value, int) and rng.random() < 0.3:
            return value + rng.choice((-1, 1))
        return rng.choice(_INTS)
    if kind is float:
        return rng.choice(_FLOATS)
    if kind is str:
        text = value if isinstance(value, str) else ""
        return rng.choice((rng.choice(_TEXTS), text + "x", text[:-1], text * 2, text.upper()))
    if kind is bytes:
        return _bytes_like(value if isinstance(value, bytes) else b"", other, form, rng)
    return rng.choice(([], {}, [[]], {"a": None}, [0] * 65, msgspec.msgpack.Ext(5, b"x")))


def _bytes_like(data: bytes, other: bytes, form: Form, rng: Random) -> bytes:
    """Byte strings hold messages, too."""
    if len(data) > 1 and rng.random() < 0.6:
        inside = _structured(data, other, form, rng)
        if inside is not None:
            return inside
    if data and rng.random() < 0.7:
        return rng.choice(_CHANGES)(data, other, rng)
    return rng.choice(_BYTES)
