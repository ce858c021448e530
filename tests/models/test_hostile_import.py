"""A model file is hostile input: whatever is done to one, it is imported or refused, once."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from edgemoa.errors import EdgemoaError
from edgemoa.models.gguf import GgufFile
from edgemoa.models.importer import convert
from edgemoa.models.progress import silent

from .tiny import PRESETS, tiny

ROUNDS = 12  # for each architecture; tens of thousands were run by hand
GROWTH_KIB = 64 << 10  # of memory, for a file of less than 50 KiB; some hundred KiB are used
CPU_S = 1.0  # some milliseconds are used


def memory(key: str) -> int:
    """A figure of this process, in KiB."""
    found = re.search(rf"(?m)^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


@contextmanager
def bounded() -> Iterator[None]:
    """Fails what takes more memory than :data:`GROWTH_KIB`, even if it gives it back, and cuts
    short what takes more than :data:`CPU_S`.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it does not come to an end")

    before = signal.signal(signal.SIGVTALRM, late)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    began = memory("VmRSS")
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = memory("VmHWM") - began
    assert grown < GROWTH_KIB, f"it took {grown} KiB"


def test_the_bounds_hold() -> None:
    with pytest.raises(AssertionError, match="it took"), bounded():
        bytes(b"x" * (2 * GROWTH_KIB << 10))
    with pytest.raises(AssertionError, match="not come to an end"), bounded():
        while True:
            pass


def tensors_start(path: Path) -> int:
    with GgufFile(path) as file:
        return min(tensor.offset for tensor in file.tensors.values())


def damaged(data: bytes, header: int, rng: random.Random) -> bytes:
    """Some bytes of the header changed, or exchanged, or the file cut; numbers made extreme."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(header)
        match rng.randrange(4):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at : at + 4] = rng.choice(
                    [bytes(4), b"\xff" * 4, b"\x01\0\0\0", b"\0\0\0\x80", b"\0\0\xc0\x7f"]
                )
            case 2:
                other = rng.randrange(header)
                changed[at : at + 8] = changed[other : other + 8]
            case 3:
                changed[at] ^= 1 << rng.randrange(8)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_damaged_file_is_imported_or_refused(
    tmp_path: Path, preset: str, rounds: int = ROUNDS, seed: int = 0
) -> None:
    source = tiny(preset, "Q4_0", layers=1).write(tmp_path / "source.gguf")
    data, header = source.read_bytes(), tensors_start(source)
    rng = random.Random(f"{preset} {seed}")
    refused = 0
    for _ in range(rounds):
        source.write_bytes(damaged(data, header, rng))
        folder = tmp_path / "model"
        folder.mkdir()
        try:
            with bounded():
                convert(source, folder, "model", silent)
        except EdgemoaError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 1500
            refused += 1
        shutil.rmtree(folder)
    assert refused
