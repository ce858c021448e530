"""What the model process holds in memory beside the model; sizes by the kernel's word."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgemoa.engine import slots
from edgemoa.engine.memory import mapped_files, release

from .harness import job, pid_of, running

SIZE = 4 << 20


def test_only_what_was_not_changed_of_files_is_left_to_the_kernel(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    files = [tmp_path / name for name in ("read", "changed")]
    maps = []
    for file in files:
        file.write_bytes(content)
        with file.open("rb") as stream:
            maps.append(mmap.mmap(stream.fileno(), SIZE, access=mmap.ACCESS_COPY))
    read, changed = maps
    changed[7] = content[7] ^ 1
    assert bytes(read) == content  # all of it is in memory now
    assert mapped_bytes(files[0]) == SIZE
    release(mapped_files())
    assert mapped_bytes(files[0]) == 0
    assert bytes(read) == content
    assert changed[7] == content[7] ^ 1
    assert changed[8:] == content[8:]


def test_the_model_process_imports_nothing_that_it_may_never_need() -> None:
    heavy = {
        "asyncio", "email", "importlib.metadata", "llguidance", "multiprocessing", "onnx",
        "onnxruntime_genai", "numpy.ma", "numpy.random", "ssl", "unittest", "zipfile",
    }  # fmt: skip
    code = "import sys, edgemoa.engine.worker, edgemoa.engine.slots, onnxruntime"
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not heavy & set(loaded)


def test_what_was_for_the_start_alone_does_not_stay(smollm2: Path) -> None:
    """Of files, libraries and weights, 46 MB are in memory when the model is loaded, and 4 when it
    is ready; 23 after a job."""

    async def scenario() -> None:
        async with running(smollm2, threads=2, backend="slots", slots=1) as (engine, events):
            pid = pid_of(engine)
            assert file_bytes(pid) < 15e6
            engine.work(job(1, "Hello", max_tokens=8))
            assert (await events.ends(1)).tokens
            assert file_bytes(pid) < 35e6

    asyncio.run(scenario())


def test_a_table_that_tokens_are_looked_up_in_does_not_stay(smollm2: Path) -> None:
    backend = slots.load(smollm2, 2, 1)
    spread = np.arange(0, 49_152, 36)  # 1,366: a token or two in each 64 KB of 28 MB
    for start in range(0, len(spread), 128):
        part = spread[start : start + 128]
        backend._graph.run(0, [part], [start])
    assert mapped_bytes(smollm2.resolve() / "weights.bin") < 20e6


def file_bytes(pid: int) -> int:
    """Of files, how much a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def mapped_bytes(file: Path) -> int:
    """How much of a file that this process has mapped is in its memory."""
    here, total = False, 0
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            here = words[-1] == str(file)
        elif here and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total
