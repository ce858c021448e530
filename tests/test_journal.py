"""The journal of accepted prompts: what is acknowledged is there again, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edgemoa import journal
from edgemoa.errors import DiskFullError, StateError
from edgemoa.journal import FILE_NAME, Entry, Journal

DAY_S = 86_400
MIB = 1 << 20


def opened(folder: Path, keep_s: int = DAY_S, keep_bytes: int = MIB) -> tuple[Journal, list[Entry]]:
    made = Journal(folder, keep_s, keep_bytes)
    return made, made.open()


def with_journal(folder: Path, do: Callable[[Journal], Awaitable[None]], **options: int) -> None:
    made, _ = opened(folder, **options)
    try:
        asyncio.run(do(made))  # type: ignore[arg-type]
    finally:
        made.close()


def waiting(folder: Path) -> list[Entry]:
    made, entries = opened(folder)
    made.close()
    return entries


def test_a_prompt_waits_until_it_has_an_outcome(tmp_path: Path) -> None:
    kept: list[Entry] = []

    async def accept(made: Journal) -> None:
        for n in range(3):
            entry = Entry(made.new_id(), "1000:7", bytes([n]) * 32, b"prompt %d" % n)
            await made.accept(entry)
            kept.append(entry)
        await made.finish(kept[1].id, b"answer")
        found = await made.find(kept[1].id)
        assert found == Entry(kept[1].id, "1000:7", kept[1].key, b"", b"answer")
        assert kept[2].key is not None
        assert await made.find_key(kept[2].key) == kept[2]

    with_journal(tmp_path, accept)
    assert waiting(tmp_path) == [kept[0], kept[2]]
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600

    async def again(made: Journal) -> None:
        assert made.new_id() not in {entry.id for entry in kept}
        found = await made.find(kept[1].id)
        assert found is not None
        assert found.outcome == b"answer"
        await made.finish(kept[1].id, b"another")
        again = await made.find(kept[1].id)
        assert again is not None
        assert again.outcome == b"answer", "an outcome is the only one"
        await made.forget(kept[0].id)
        assert await made.find(kept[0].id) is None

    with_journal(tmp_path, again)
    assert waiting(tmp_path) == [kept[2]]


def test_names_that_are_none_find_nothing(tmp_path: Path) -> None:
    async def look(made: Journal) -> None:
        entry = Entry(made.new_id(), "1:1", None, b"p")
        await made.accept(entry)
        for name in ("", "x", "chatcmpl-", entry.id[:-1], entry.id + "0", "chatcmpl-" + "é" * 28):
            assert await made.find(name) is None
        guess = entry.id[:-1] + ("0" if entry.id[-1] != "0" else "1")
        assert await made.find(guess) is None
        assert await made.find(entry.id) == entry

    with_journal(tmp_path, look)


def test_a_key_is_taken_once(tmp_path: Path) -> None:
    async def twice(made: Journal) -> None:
        await made.accept(Entry(made.new_id(), "1:1", b"k", b"p"))
        several = [made.accept(Entry(made.new_id(), "1:1", None, b"other")) for _ in range(5)]
        bad = made.accept(Entry(made.new_id(), "1:1", b"k", b"q"))
        results = await asyncio.gather(*several, bad, return_exceptions=True)
        assert [type(r) for r in results] == [type(None)] * 5 + [StateError]

    with_journal(tmp_path, twice)
    assert [e.request for e in waiting(tmp_path)] == [b"p"] + [b"other"] * 5


def test_answers_are_kept_by_age_and_size(tmp_path: Path) -> None:
    rng = random.Random(1)

    async def many(made: Journal) -> None:
        ids = []
        for _ in range(200):
            entry = Entry(made.new_id(), "1:1", None, b"p")
            await made.accept(entry)
            await made.finish(entry.id, rng.randbytes(1000))
            ids.append(entry.id)
        waits = Entry(made.new_id(), "1:1", None, b"waits")
        await made.accept(waits)
        found = [await made.find(i) for i in ids]
        there = sum(f is not None for f in found)
        assert 80 <= there <= 100
        assert all(f is not None for f in found[-80:]), "the oldest go first"
        made._clock_s += DAY_S + 2
        for _ in range(64):
            late = Entry(made.new_id(), "1:1", None, b"p")
            await made.accept(late)
            await made.finish(late.id, b"answer")
        assert [await made.find(i) for i in ids] == [None] * 200
        assert await made.find(late.id) is not None
        assert await made.find(waits.id) == waits, "what waits is kept whatever its age"

    with_journal(tmp_path, many, keep_bytes=100_000)
    made, _ = opened(tmp_path)
    assert made._now_s() >= DAY_S, "age goes on over a restart, without a clock"
    made.close()


def test_a_full_disk_refuses_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_RETRY_S", 0.05)

    async def full(made: Journal) -> None:
        first = Entry(made.new_id(), "1:1", None, b"p")
        await made.accept(first)

        def bound(pages: int) -> Callable[[sqlite3.Connection], int]:
            return lambda d: int(d.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0])

        pages = await made._order(lambda d: int(d.execute("PRAGMA page_count").fetchone()[0]))
        # SQLite's own SQLITE_FULL, as a full disk gives it.
        await made._order(bound(pages))
        with pytest.raises(DiskFullError):
            await made.accept(Entry(made.new_id(), "1:1", None, os.urandom(50_000)))
        answer = os.urandom(50_000)
        await made.finish(first.id, answer)
        found = await made.find(first.id)
        assert found is not None
        assert found.outcome == answer, "answered, though the disk does not know yet"
        await made._order(bound(1_000_000))
        async with asyncio.timeout(5):
            while made._late:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await made.accept(Entry(made.new_id(), "1:1", None, b"again"))

    with_journal(tmp_path, full)
    assert [e.request for e in waiting(tmp_path)] == [b"again"]


def test_a_damaged_journal_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but longer than a header" * 50)
    assert waiting(tmp_path) == []
    (aside,) = tmp_path.glob(f"{FILE_NAME}.damaged-*")
    assert aside.read_bytes().startswith(b"not a database")


def test_two_daemons_do_not_share_one(tmp_path: Path) -> None:
    made, _ = opened(tmp_path)
    with pytest.raises(StateError, match="in use"):
        opened(tmp_path)
    made.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from edgemoa.journal import Entry, Journal

async def main():
    made = Journal(Path(sys.argv[1]), 86400, 1 << 30)
    made.open()

    async def client(n):
        for m in range(10_000):
            entry = Entry(made.new_id(), "1:1", None, b"%d.%d " % (n, m) * 50)
            await made.accept(entry)
            print("+", entry.id, flush=True)
            if m % 2:
                await made.finish(entry.id, b"done")
                print("-", entry.id, flush=True)

    await asyncio.gather(*(client(n) for n in range(8)))

asyncio.run(main())
"""


def written(folder: Path, seconds: float) -> tuple[set[str], set[str]]:
    """What a process acknowledged that writes, and is killed in the middle of it."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    said = [line.split() for line in lines if line.endswith("\n")]
    return {i for s, i in said if s == "+"}, {i for s, i in said if s == "-"}


def test_killed_at_any_instant_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    accepted: set[str] = set()
    finished: set[str] = set()
    rng = random.Random(3)
    for _ in range(4):
        more, done = written(tmp_path, rng.uniform(0.05, 0.3))
        assert not more & accepted, "an id is used once"
        accepted |= more
        finished |= done
        left = {entry.id for entry in waiting(tmp_path)}
        assert accepted - finished <= left | _answered(tmp_path, accepted - finished - left)
        assert not finished & left, "an outcome that was acknowledged is there"
    assert len(accepted) > 100


def _answered(folder: Path, ids: set[str]) -> set[str]:
    """Of these, the ones with an outcome that was on the disk before it was acknowledged."""
    found = set()

    async def look(made: Journal) -> None:
        for request_id in ids:
            entry = await made.find(request_id)
            if entry is not None and entry.outcome:
                found.add(request_id)

    with_journal(folder, look)
    return found


def test_a_torn_last_write_takes_only_what_was_not_acknowledged(tmp_path: Path) -> None:
    """Power fails in the middle of a write: its end is missing, or something else."""
    whole = tmp_path / "whole"
    sizes: list[tuple[int, int]] = []  # of the log, after so many were acknowledged

    async def some(made: Journal) -> None:
        log = whole / f"{FILE_NAME}-wal"
        for n in range(12):
            await made.accept(Entry(made.new_id(), "1:1", None, os.urandom(600)))
            sizes.append((log.stat().st_size, n + 1))
            if n == 11:
                shutil.copytree(whole, tmp_path / "taken")

    with_journal(whole, some)
    log = tmp_path / "taken" / f"{FILE_NAME}-wal"
    data = log.read_bytes()
    rng = random.Random(5)
    cuts = [rng.randrange(sizes[0][0], len(data)) for _ in range(40)]
    for cut in cuts:
        least = max((n for size, n in sizes if size <= cut), default=0)
        for rest in (b"", rng.randbytes(len(data) - cut), bytes(len(data) - cut)):
            torn = tmp_path / "torn"
            shutil.copytree(tmp_path / "taken", torn)
            (torn / f"{FILE_NAME}-wal").write_bytes(data[:cut] + rest)
            assert len(waiting(torn)) == least
            shutil.rmtree(torn)
