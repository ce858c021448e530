"""What is fuzzed: every parser of ours that reads what the network or a client sends.

A target takes bytes and either returns what it made of them, or raises one of the errors that the
parser documents. Anything else is a finding; so is a value that takes much more memory than the
bytes that it was made of. What is signed or sealed is fuzzed twice: as it arrives, and below the
signature, where a helper signs the changed inside with a known board's key.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

HERE: Final = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "vectors")]

from mutate import Form  # noqa: E402 - beside this file

SLACK_BYTES: Final = 8 * 1024
"""What a value may take however small its bytes are: fields that were left out have defaults."""
TAKEN: Final = "taken: "
_PARTICULAR: Final = re.compile(r"""\d+|'.*'|".*\"""")


@dataclass(frozen=True)
class Target:
    """One parser.

    :param parse: see the module.
    :param errors: what it may raise.
    :param seeds: inputs to begin with, good and bad.
    :param head: bytes before the value, which say what to make of it.
    :param multiple: so many bytes may the value take for each byte of the input, at most.
    :param figure: so many inputs are to be tried; fewer where one takes milliseconds by its nature.
    """

    name: str
    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    form: Form = "msgpack"
    head: int = 0
    multiple: int = 16
    figure: int = 10_000_000

    @functools.cached_property
    def corpus(self) -> list[bytes]:
        """The seeds, and what once found something."""
        kept = sorted(self.folder.glob("*")) if self.folder.is_dir() else []
        return list(dict.fromkeys([*self.seeds(), *(file.read_bytes() for file in kept)]))

    @property
    def folder(self) -> Path:
        """Where inputs are kept that found something."""
        return HERE / "corpus" / self.name

    def keep(self, data: bytes) -> str:
        """Have an input tried by the tests from now on; returns its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / hashlib.sha256(data).hexdigest()[:12]
        file.write_bytes(data)
        return file.name

    def judge(self, data: bytes) -> str:
        """What becomes of an input, in words that inputs of a kind share: :data:`TAKEN` goes before
        those that are not refused.

        :raises Exception: it is a finding.
        """
        try:
            value = self.parse(data)
        except self.errors as error:
            # What the decoder said, which the package does not pass on, tells inputs apart.
            cause = error.__context__ or error.__cause__
            return _PARTICULAR.sub("#", f"{type(error).__name__}: {error}; {cause}"[:200])
        taken, allowed = size_bytes(value), self.multiple * len(data) + SLACK_BYTES
        if taken > allowed:
            raise TooLargeError(f"{len(data)} bytes became {taken}, more than {allowed}")
        return f"{TAKEN}{type(value).__name__} {_shape(value)}"


class TooLargeError(AssertionError):
    """A value takes more memory than its bytes allow."""


def size_bytes(value: object) -> int:
    """What a value takes in memory, with all that is in it, but not what all values share."""
    total, left, seen = 0, [value], set[int]()
    while left:
        each = left.pop()
        if each is None or isinstance(each, bool | type) or id(each) in seen:
            continue
        seen.add(id(each))
        total += sys.getsizeof(each)
        left += _inside(each)
    return total


def _inside(value: object) -> Iterable[object]:
    match value:
        case str() | bytes() | int() | float():
            return ()
        case dict():
            return (*value.keys(), *value.values())
        case list() | tuple() | set() | frozenset():
            return value
        case msgspec.Struct():
            return (getattr(value, name) for name in value.__struct_fields__)
        case _ if dataclasses.is_dataclass(value):
            return (getattr(value, each.name) for each in dataclasses.fields(value))
        case _:
            return ()


def _shape(value: object) -> str:
    """Which of a value's fields say something."""
    if isinstance(value, msgspec.Struct):
        return "".join("1" if getattr(value, name) else "0" for name in value.__struct_fields__)
    if isinstance(value, frozenset):
        return " ".join(sorted(map(str, value)))
    if isinstance(value, tuple | list):
        return f"{min(len(value), 3)} " + " ".join(map(_shape, value[:3]))
    if dataclasses.is_dataclass(value):
        fields = [getattr(value, each.name) for each in dataclasses.fields(value)]
        return " ".join(_shape(each) for each in fields)
    return type(value).__name__


def vectors(file: str) -> Any:
    """One of the files of test vectors."""
    return json.loads((HERE.parent / "vectors" / file).read_text("utf-8"))


def hexes(vectors: object, *names: str) -> Iterator[bytes]:
    """Every byte string that stands under one of these names, wherever that is."""
    if isinstance(vectors, dict):
        for name, value in vectors.items():
            if name in names and isinstance(value, str):
                yield bytes.fromhex(value)
            else:
                yield from hexes(value, *names)
    elif isinstance(vectors, list):
        for each in vectors:
            yield from hexes(each, *names)


@functools.cache
def targets() -> dict[str, Target]:
    """All of them, by name."""
    import targets_api  # beside this file, and each needs this module
    import targets_core
    import targets_mdns
    import targets_net

    found = (
        *(*targets_net.TARGETS, *targets_mdns.TARGETS),
        *(*targets_core.TARGETS, *targets_api.TARGETS),
    )
    return {target.name: target for target in found}
