"""The promise on disk: every accepted prompt until it is answered, and its answer for a while.

One SQLite database of its own, apart from that of trust: it is written with each prompt, and a
damaged one must not keep the board from starting. A thread of its own writes; whatever was asked
for while it wrote goes into its next transaction, so that many prompts share one sync of the disk.
A storage card wears out by pages written, so there is one row for a prompt and its outcome, found
by its number: no index but for the few prompts that carry a key; and texts are compressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import secrets
import sqlite3
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from edgemoa.errors import DiskFullError, EdgemoaError, StateError

log = logging.getLogger(__name__)

FILE_NAME: Final = "requests.db"
SCHEMA_VERSION: Final = 1
PREFIX: Final = "chatcmpl-"
_PAGE_BYTES: Final = 1024  # a packed prompt and its answer have a page each, or little more
_WAL_PAGES: Final = 1000  # written before they are moved into the database: about 1 MB
_RANDOM_BYTES: Final = 9
_LEVEL: Final = 1  # of compression: the others save little more and take longer
_NUMBER_DIGITS: Final = 10
_AT_ONCE: Final = 512  # in one transaction
_RETRY_S: Final = 5.0  # until an outcome that could not be written is tried again
_SCHEMA: Final = (
    # number: its order of acceptance, and the front part of its id; name: the rest of the id.
    # key, digest: hashes of what the client called it and of what it said, where it gave it a
    # name. at: seconds that the board had run.
    "CREATE TABLE requests (number INTEGER PRIMARY KEY, name TEXT NOT NULL, client TEXT NOT NULL,"
    " key BLOB, digest BLOB, at INTEGER NOT NULL, request BLOB, outcome BLOB) STRICT",
    "CREATE UNIQUE INDEX keys ON requests (key) WHERE key IS NOT NULL",
)
_LOAD: Final = "SELECT number, name, client, key, digest, request, outcome FROM requests"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A prompt that was accepted.

    :param id: names it to the client; cannot be guessed.
    :param client: who asked, as the shell names clients; only it is told.
    :param key: a hash of what the client calls it, or None.
    :param request: the prompt as the daemon encoded it; empty once it has an outcome.
    :param digest: of what it said, to know another one under the same key; b"" without a key.
    :param outcome: what became of it, likewise; empty before.
    """

    id: str
    client: str
    key: bytes | None
    request: bytes
    outcome: bytes = b""
    digest: bytes = b""


class Journal:
    """See the module. :meth:`open` first; the coroutines belong to one event loop.

    :param keep_s: for how long an outcome is kept, in seconds that the board runs.
    :param keep_bytes: how much all outcomes may take; older ones make room.
    """

    def __init__(self, state_dir: Path, keep_s: int, keep_bytes: int) -> None:
        self._file = state_dir / FILE_NAME
        self._keep_s = keep_s
        self._keep_bytes = keep_bytes
        self._kept_bytes = 0
        self._number = 0
        self._clock_s = 0.0  # what to add to the monotonic clock
        self._database: sqlite3.Connection | None = None
        self._orders: deque[_Order[Any]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._late: dict[str, bytes] = {}  # outcomes that could not be written yet
        self._retrying: asyncio.Task[None] | None = None

    def open(self) -> list[Entry]:
        """Open it; returns the prompts that wait for their answer, oldest first. Blocks.

        A damaged one is moved aside, and a new one begun: what can be saved from it is for people.

        :raises StateError: it cannot be used, or another daemon has it open.
        :raises DiskFullError: there is no room for it.
        """
        with self._errors():
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                waiting = self._open()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                aside = self._file.with_name(f"{FILE_NAME}.damaged-{secrets.token_hex(4)}")
                log.error(  # noqa: TRY400
                    "the journal of prompts is damaged and was moved aside: prompts that had been"
                    " accepted before may be lost",
                    extra={"file": str(aside)},
                )
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        Path(f"{self._file}{end}").rename(f"{aside}{end}")
                waiting = self._open()
        self._thread.start()
        return waiting

    def _open(self) -> list[Entry]:
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(
            self._file, timeout=1.0, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # in WAL mode: a sync with each commit
            database.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            database.execute("BEGIN IMMEDIATE")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise StateError(  # noqa: TRY301
                    f"{self._file} was written by a newer edgemoa",
                    hint="upgrade edgemoa, or use another state directory",
                )
            if version == 0:
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            number, at, kept = database.execute(
                "SELECT coalesce(max(number), 0), coalesce(max(at), 0),"
                " coalesce(sum(length(outcome)), 0) FROM requests"
            ).fetchone()
            waiting = database.execute(f"{_LOAD} WHERE outcome IS NULL ORDER BY number").fetchall()
            database.execute("COMMIT")
        except BaseException:
            database.close()
            raise
        self._database = database
        self._number, self._kept_bytes = int(number), int(kept)
        # Boards have no clock to trust: age is counted in time that the board has run.
        self._clock_s = float(at) - time.monotonic()
        return list(self._whole(waiting))

    def _whole(self, rows: list[Any]) -> Iterator[Entry]:
        for row in rows:
            try:
                yield _entry(row)
            except zlib.error:  # SQLite has no checksums but in its log
                log.error("an accepted prompt is damaged and lost", extra={"number": row[0]})  # noqa: TRY400

    def close(self) -> None:
        """Write what was asked for, and close. Blocks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        database, self._database = self._database, None
        if database is not None:
            with self._errors():
                for request_id, outcome in self._late.items():
                    with contextlib.suppress(sqlite3.Error):
                        self._finish(database, request_id, outcome)
                database.close()

    # --- what the daemon asks

    def new_id(self) -> str:
        """A name for a prompt, never used before, that nobody can guess."""
        self._number += 1
        return f"{PREFIX}{self._number:0{_NUMBER_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"

    async def accept(self, entry: Entry) -> None:
        """On the disk when this returns.

        :raises DiskFullError: there is no room; nothing is kept of it then.
        :raises StateError: the disk fails, or the key is there already.
        """
        number, name = _split(entry.id)
        row = (number, name, entry.client, entry.key, entry.digest, self._now_s())
        await self._order(lambda database: _accept(database, row, entry.request))

    async def finish(self, request_id: str, outcome: bytes) -> None:
        """What became of a prompt, on the disk when this returns. Where that cannot be, it is
        held in memory and tried again: the prompt has been answered, whatever the disk says."""
        try:
            await self._order(lambda database: self._finish(database, request_id, outcome))
        except EdgemoaError as error:
            log.error("an answer cannot be kept yet: %s", error)  # noqa: TRY400
            self._late[request_id] = outcome
            if self._retrying is None or self._retrying.done():
                self._retrying = asyncio.get_running_loop().create_task(self._retry())

    async def forget(self, request_id: str) -> None:
        """The client takes its prompt, or the answer, back."""
        self._late.pop(request_id, None)
        await self._order(lambda database: self._forget(database, request_id))

    async def find(self, request_id: str) -> Entry | None:
        """The prompt of that name, if it is kept."""
        try:
            where = _split(request_id)
        except ValueError:
            return None
        return await self._find("number = ? AND name = ?", where)

    async def find_key(self, key: bytes) -> Entry | None:
        """The prompt of that key, if it is kept."""
        return await self._find("key = ?", (key,))

    async def _find(self, where: str, values: tuple[Any, ...]) -> Entry | None:
        entry = await self._order(lambda database: _load(database, where, values))
        if entry is None:
            return None
        late = self._late.get(entry.id)
        return entry if late is None else replace(entry, request=b"", outcome=late)

    async def _retry(self) -> None:
        while self._late:
            await asyncio.sleep(_RETRY_S)
            for request_id, outcome in list(self._late.items()):
                try:
                    await self._order(
                        functools.partial(self._finish, request_id=request_id, outcome=outcome)
                    )
                except EdgemoaError:
                    break
                self._late.pop(request_id, None)

    # --- in the thread

    def _now_s(self) -> int:
        return int(self._clock_s + time.monotonic())

    def _finish(self, database: sqlite3.Connection, request_id: str, outcome: bytes) -> None:
        number, name = _split(request_id)
        now_s = self._now_s()
        packed = zlib.compress(outcome, _LEVEL)
        changed = database.execute(
            "UPDATE requests SET outcome = ?, request = NULL, at = ?"
            " WHERE number = ? AND name = ? AND outcome IS NULL",
            (packed, now_s, number, name),
        ).rowcount
        if not changed:
            return
        self._kept_bytes += len(packed)
        if self._kept_bytes > self._keep_bytes or number % 64 == 0:
            self._purge(database, now_s)

    def _forget(self, database: sqlite3.Connection, request_id: str) -> None:
        where = _split(request_id)
        row = database.execute(
            "DELETE FROM requests WHERE number = ? AND name = ?"
            " RETURNING coalesce(length(outcome), 0)",
            where,
        ).fetchone()
        self._kept_bytes -= row[0] if row else 0

    def _purge(self, database: sqlite3.Connection, now_s: int) -> None:
        """Make room, to a tenth below the bound: not with each answer again."""
        bound = self._keep_bytes - self._keep_bytes // 10
        done = database.execute(
            "SELECT number, at, length(outcome) FROM requests WHERE outcome IS NOT NULL"
            " ORDER BY number"
        )
        old = []
        left = self._kept_bytes
        full = left > self._keep_bytes
        for number, at, size in done.fetchall():
            if at >= now_s - self._keep_s and not (full and left > bound):
                continue
            old.append((number,))
            left -= size
        database.executemany("DELETE FROM requests WHERE number = ?", old)
        self._kept_bytes = left

    def _order(self, do: Callable[[sqlite3.Connection], _T]) -> asyncio.Future[_T]:
        order = _Order(do, asyncio.get_running_loop())
        with self._wake:
            if self._closing:
                raise StateError("the journal is closed", hint="the board is shutting down")
            self._orders.append(order)
            self._wake.notify()
        return order.future

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._orders and not self._closing:
                    self._wake.wait()
                if not self._orders:
                    return
                several = [self._orders.popleft() for _ in range(min(len(self._orders), _AT_ONCE))]
            if not self._together(several):  # one of them cannot be done: each by itself
                for order in several:
                    self._together([order])
            loop = several[0].loop
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_tell, several)

    def _together(self, orders: list[_Order[Any]]) -> bool:
        """Do them in one transaction; False if it failed and could go better for each alone."""
        database = self._database
        kept = self._kept_bytes
        try:
            with self._errors():
                assert database is not None  # noqa: S101 - opened before the thread began
                database.execute("BEGIN IMMEDIATE")
                try:
                    for order in orders:
                        order.result = order.do(database)
                    database.execute("COMMIT")
                except BaseException:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
        except EdgemoaError as error:
            self._kept_bytes = kept
            if len(orders) > 1:
                return False
            orders[0].error = error
        except Exception as error:  # a defect: whoever asked is told, and the others are served
            self._kept_bytes = kept
            if len(orders) > 1:
                return False
            orders[0].error = error
        return True

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except zlib.error as error:
            raise StateError(
                f"{self._file} is damaged", hint="move it away: prompts that wait in it are lost"
            ) from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise self._disk_full() from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StateError(
                    f"{self._file} is in use by another edgemoa",
                    hint="stop the other daemon, or give this one its own board.state_dir",
                ) from error
            raise StateError(
                f"cannot use {self._file}: {error}",
                hint="check that the state directory is writable and the disk is sound",
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full() from error
            raise StateError(
                f"cannot use {self._file}: {error.strerror}",
                hint="check that the state directory exists and belongs to the daemon's user",
            ) from error

    def _disk_full(self) -> DiskFullError:
        return DiskFullError(
            f"no room to write {self._file}", hint="free some disk space and try again"
        )


_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _Order(Generic[_T]):
    """Something to do with the database, and who waits for it."""

    __slots__ = ("do", "error", "future", "loop", "result")

    def __init__(
        self, do: Callable[[sqlite3.Connection], _T], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.do = do
        self.loop = loop
        self.future: asyncio.Future[_T] = loop.create_future()
        self.result: _T | None = None
        self.error: Exception | None = None


def _tell(orders: list[_Order[Any]]) -> None:
    for order in orders:
        if order.future.done():
            continue  # nobody waits any longer; it is done all the same
        if order.error is not None:
            order.future.set_exception(order.error)
        else:
            order.future.set_result(order.result)


def _accept(database: sqlite3.Connection, row: tuple[Any, ...], request: bytes) -> None:
    packed = zlib.compress(request, _LEVEL)
    database.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", (*row, packed))


def _split(request_id: str) -> tuple[int, str]:
    """The two parts of a name. :raises ValueError: if it is none."""
    text = request_id.removeprefix(PREFIX)
    number, name = text[:_NUMBER_DIGITS], text[_NUMBER_DIGITS:]
    if text == request_id or len(name) != 2 * _RANDOM_BYTES or not (number + name).isalnum():
        raise ValueError("not a request's id")
    return int(number, 16), name


def _load(database: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> Entry | None:
    row = database.execute(f"{_LOAD} WHERE {where}", values).fetchone()
    return None if row is None else _entry(row)


_Row = tuple[int, str, str, bytes | None, bytes | None, bytes | None, bytes | None]


def _entry(row: _Row) -> Entry:
    number, name, client, key, digest, request, outcome = row
    request_id = f"{PREFIX}{number:0{_NUMBER_DIGITS}x}{name}"
    return Entry(request_id, client, key, _unpack(request), _unpack(outcome), digest or b"")


def _unpack(packed: bytes | None) -> bytes:
    return b"" if packed is None else zlib.decompress(packed)
