"""A model file is hostile input: whatever is done to one, it is imported or refused, once."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path

import pytest

from edgemoa.errors import EdgemoaError
from edgemoa.models.gguf import GgufFile
from edgemoa.models.importer import convert
from edgemoa.models.progress import silent

from .tiny import PRESETS, tiny

ROUNDS = 12  # for each architecture; tens of thousands were run by hand


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
    imported = refused = 0
    for _ in range(rounds):
        source.write_bytes(damaged(data, header, rng))
        folder = tmp_path / "model"
        folder.mkdir()
        try:
            convert(source, folder, "model", silent)
            imported += 1
        except EdgemoaError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 1500
            refused += 1
        shutil.rmtree(folder)
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000  # KiB
