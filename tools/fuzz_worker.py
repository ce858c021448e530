"""One process of tools/fuzz: feeds one target until it has had its inputs, or its time is over.

Nothing is told by what the process returns, since it may die at any input: which one it is at, and
how far it is, stands in a file that both processes map.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import resource
import struct
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "vectors")]
warnings.filterwarnings("ignore", message="Parsed a serial number")  # cryptography, of a stranger's

COVERS: Final = "EDGEMOA_FUZZ_ATHERIS" in os.environ
if COVERS:
    import atheris

    with atheris.instrument_imports(include=["edgemoa"]):
        TARGETS = importlib.import_module("targets").targets()
else:
    TARGETS = importlib.import_module("targets").targets()

from mutate import MAX_BYTES, mutated  # noqa: E402 - of tests/fuzz
from targets import TAKEN  # noqa: E402

HANG_S: Final = 30.0  # for one input, on a machine that has other work, too
MIB: Final = 1024 * 1024
_ROOM_BYTES: Final = 1024 * MIB  # of address space: what asks for more at a time, fails
_POOL_BYTES: Final = 2 * MIB  # of inputs that are gone on from
_POOLED_BYTES: Final = 16 * 1024  # each
_FROM_TAKEN: Final = 0.75  # of inputs are made of one that was not refused
_MOST_OUTCOMES: Final = 4096
_MOST_FINDINGS: Final = 20
_LOOK_EVERY: Final = 4096
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Note:
    """What stands in the shared file."""

    _head = struct.Struct("<QQQddI4x")

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 0)

    @classmethod
    def make(cls, file: Path) -> Note:
        """A new one."""
        file.write_bytes(bytes(cls._head.size + MAX_BYTES))
        return cls(file)

    def put(self, *told: float, now: bytes) -> None:
        """How it stands: inputs, those taken, ways in which they came out, memory after a tenth of
        the work and at last; and the input that comes now."""
        self._head.pack_into(self._map, 0, *told, len(now))
        self._map[self._head.size : self._head.size + len(now)] = now

    @property
    def inputs(self) -> int:
        """That were judged."""
        return int(self._read()[0])

    @property
    def taken(self) -> int:
        """Those that were not refused."""
        return int(self._read()[1])

    @property
    def outcomes(self) -> int:
        """Ways in which they came out."""
        return int(self._read()[2])

    @property
    def rss_mib(self) -> float:
        """The process's memory."""
        return float(self._read()[4])

    @property
    def growth_mib(self) -> float:
        """By how much that is more than after a tenth of the work; 0 before there is that."""
        *_, early, now, _ = self._read()
        return float(max(0.0, now - early)) if early else 0.0

    @property
    def last(self) -> bytes:
        """The input that it is at, or was."""
        size = self._read()[5]
        return bytes(self._map[self._head.size : self._head.size + size])

    def _read(self) -> tuple[Any, ...]:
        return self._head.unpack_from(self._map)


@dataclass(frozen=True)
class Share:
    """What a process has to do; ``seconds`` 0 is without end, and ``covers`` with atheris."""

    target: str
    inputs: int
    seconds: float
    seed: int
    folder: str
    part: int
    covers: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def _file(self, kind: str) -> Path:
        return Path(self.folder) / f"{self.target}.{self.part}.{int(self.covers)}.{kind}"

    @property
    def note(self) -> Path:
        """Where its :class:`Note` is."""
        return self._file("note")

    @property
    def log(self) -> Path:
        """What it prints."""
        return self._file("log")

    @property
    def found(self) -> Path:
        """Its findings, one a line."""
        return self._file("found")

    @property
    def corpus(self) -> Path:
        """The inputs that reached what none did before: the next process goes on from them."""
        return Path(self.folder) / f"{self.target}.{self.part}.corpus"

    def findings(self) -> list[str]:
        """See :attr:`found`."""
        return self.found.read_text("utf-8").splitlines() if self.found.exists() else []


class Harness:
    """Counts, judges, keeps what is found, and ends the process."""

    def __init__(self, share: Share) -> None:
        self.target = TARGETS[share.target]
        self._refused: list[bytes] = []
        self._taken: list[bytes] = []
        self._share = share
        self._note = Note(share.note)
        self._inputs = self._inputs_taken = 0
        self._early_mib = self._rss_mib = 0.0
        self._began = time.monotonic()
        self._outcomes: set[int] = set()  # their hashes
        self._known: set[tuple[object, ...]] = set()
        self._pool_bytes = 0
        room = _memory_bytes(0) + _ROOM_BYTES
        with contextlib.suppress(ValueError):  # there is less already
            resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        reached = [file.read_bytes() for file in share.corpus.glob("*")]
        for seed in [*self.target.corpus, *reached]:
            self.feed(seed)
        self._inputs = self._inputs_taken = 0
        if not (self._taken or self._refused):  # all of them are findings
            self._refused += self.target.corpus

    def base(self, rng: Random) -> bytes:
        """An input to go on from: what is refused, is refused again more often than not."""
        taken = self._taken and (not self._refused or rng.random() < _FROM_TAKEN)
        return rng.choice(self._taken if taken else self._refused)

    def feed(self, data: bytes) -> None:
        """Judge an input; the last one ends the process."""
        self._tell(data[:MAX_BYTES])
        try:
            said = self.target.judge(data)
        except Exception as error:
            self._found(data, error)
        else:
            taken, outcome = said.startswith(TAKEN), hash(said)
            self._inputs_taken += taken
            if outcome not in self._outcomes and len(self._outcomes) < _MOST_OUTCOMES:
                self._outcomes.add(outcome)
                self._keep(data, self._taken if taken else self._refused)
        self._inputs += 1
        if not self._inputs % _LOOK_EVERY or self._inputs >= self._share.inputs:
            self._look()

    def _tell(self, now: bytes) -> None:
        memory = self._early_mib, self._rss_mib
        self._note.put(self._inputs, self._inputs_taken, len(self._outcomes), *memory, now=now)

    def _keep(self, data: bytes, pool: list[bytes]) -> None:
        """Go on from it, if there is room, or nothing else to go on from."""
        fits = len(data) <= _POOLED_BYTES and self._pool_bytes + len(data) <= _POOL_BYTES
        if fits or not pool:
            self._pool_bytes += len(data)
            pool.append(data)

    def _found(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "edgemoa" in f.filename), frames[-1])
        kind = (type(error), where.filename, where.lineno)
        if kind in self._known or len(self._known) >= _MOST_FINDINGS:
            return
        self._known.add(kind)
        name = self.target.keep(data)
        with self._share.found.open("a", encoding="utf-8") as file:
            at = f"{Path(where.filename).name}:{where.lineno}"
            file.write(f"{name}: {type(error).__name__} at {at}: {str(error)[:200]!r}\n")

    def _look(self) -> None:
        spent = time.monotonic() - self._began
        share = self._share
        done = self._inputs >= share.inputs or (share.seconds and spent >= share.seconds)
        tenth = self._inputs * 10 >= share.inputs or (share.seconds and spent * 10 >= share.seconds)
        if done or (tenth and not self._early_mib):
            _tidy()
        self._rss_mib = _memory_bytes(1) / MIB
        if tenth and not self._early_mib:
            self._early_mib = self._rss_mib
        if done:
            self._tell(b"")
            self._end()

    def _end(self) -> NoReturn:
        """Without libFuzzer's own last words."""
        sys.stdout.flush()
        os._exit(0)


def _memory_bytes(which: int) -> int:
    """Of this process: 0 for its address space, 1 for what is in memory."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[which]) * _PAGE_BYTES


def _tidy() -> None:
    """Give back what is free, so that what is left is what is kept."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not of glibc
        ctypes.CDLL(None).malloc_trim(0)


def _own(harness: Harness, rng: Random) -> NoReturn:
    """Go on from inputs that came out as none before did."""
    target = harness.target
    while True:
        data, other = harness.base(rng), harness.base(rng)
        harness.feed(mutated(data, other, target.form, target.head, rng))


def _covering(harness: Harness, rng: Random, share: Share) -> None:
    """The same, and from inputs that reach lines which none before did."""
    target = harness.target
    share.corpus.mkdir()
    for number, seed in enumerate(target.corpus):
        (share.corpus / str(number)).write_bytes(seed)

    def change(data: bytes, max_size: int, _: int) -> bytes:
        chance = rng.random()
        if chance < 0.25:
            return bytes(atheris.Mutate(data, max_size))
        base = harness.base(rng) if chance < 0.6 else data
        return mutated(base, harness.base(rng), target.form, target.head, rng)[:max_size]

    settings = {
        "max_len": MAX_BYTES,
        "len_control": 0,
        "rss_limit_mb": 0,  # the harness watches that, and the other process what hangs
        "timeout": 100_000,
        "seed": share.seed % 2**31 or 1,
        "artifact_prefix": f"{share.folder}/",
    }
    arguments = [f"-{name}={value}" for name, value in settings.items()]
    atheris.Setup([sys.argv[0], *arguments, str(share.corpus)], harness.feed, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    """As the first argument says."""
    share = Share(**json.loads(sys.argv[1]))
    rng = Random(share.seed)
    harness = Harness(share)
    if COVERS:
        _covering(harness, rng, share)
    else:
        _own(harness, rng)


if __name__ == "__main__":
    main()
