"""What must survive a power cut: whom this board trusts, and how often it has started. Beside
that, what it has learned of its own speed.

One SQLite database in the state directory. Changes of trust are on the disk (``synchronous=FULL``)
before the call returns; hints such as the last address seen may be lost in a power cut. The
database is locked for as long as it is open, so that two daemons never share a state directory.

Every method may block on the disk: call it in a thread. It may be any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgemoa.core import limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import DiskFullError, StateError

FILE_NAME: Final = "edgemoa.db"
SCHEMA_VERSION: Final = 3
_BOOT_RANDOM_BITS: Final = 21
_SCHEMA: Final = (
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT",
    # position: the order of pairing, as boards have no clock.
    # addresses: JSON [[host, port], ...], newest first.
    "CREATE TABLE boards (position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
    " public_key BLOB NOT NULL, certificate BLOB NOT NULL, name TEXT NOT NULL,"
    " addresses TEXT NOT NULL) STRICT",
    "CREATE TABLE revoked (id TEXT PRIMARY KEY) STRICT",
)
# What each version added to the one before.
_CHANGES: Final = {
    2: ("CREATE TABLE learned (model TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT",),
    3: (
        "ALTER TABLE boards ADD COLUMN direct INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE revoked ADD COLUMN certificate BLOB NOT NULL DEFAULT x''",
        "ALTER TABLE revoked ADD COLUMN name TEXT NOT NULL DEFAULT ''",
        "CREATE TABLE roster (record BLOB PRIMARY KEY) STRICT",
    ),
}
MAX_LEARNED: Final = 16  # models whose speed is remembered

Address = tuple[str, int]
"""IP address as text, and port."""


@dataclass(frozen=True, slots=True)
class PairedBoard:
    """A board that this one trusts.

    :param name: what it calls itself.
    :param addresses: where it was last, newest first.
    :param direct: whether it proved itself to this board, which then needs nobody's word for it.
    """

    id: BoardId
    public_key: bytes
    certificate: bytes
    name: str
    addresses: tuple[Address, ...] = ()
    direct: bool = True


@dataclass(frozen=True, slots=True)
class FormerBoard:
    """A board that was trusted once and must not be again. The certificate is empty if it was
    never known here."""

    id: BoardId
    certificate: bytes = b""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """A change of whom this board trusts, or all of it.

    :param boards: trusted from now on, or known better; ``former`` are not any more.
    :param records: of the roster, that are there from now on; ``outdated`` are not any more.
    """

    boards: tuple[PairedBoard, ...] = ()
    former: tuple[FormerBoard, ...] = ()
    records: tuple[bytes, ...] = ()
    outdated: tuple[bytes, ...] = ()


class Store:
    """The database. :meth:`open` it before anything else."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / FILE_NAME
        self._database: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open the database, making it on the first start.

        :raises StateError: if it is damaged, of a newer version, or another daemon has it open.
        :raises DiskFullError: if there is no room for it.
        """
        with self._errors():
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite would make it readable by others; its -wal file takes over the mode.
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
            database = sqlite3.connect(
                self._file, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
        self._database = database

    def close(self) -> None:
        """Close the database, if it is open."""
        with self._lock, self._errors():
            if self._database is not None:
                self._database.close()
                self._database = None

    def count_boot(self) -> int:
        """A boot epoch for this start: grows with each, and is under 2**53.

        The count alone would repeat itself when a storage image is rolled back, and other boards
        would take the messages of this run for those of an earlier one: the low bits are random.
        """
        with self._transaction(durable=True) as database:
            database.execute(
                "INSERT INTO counters VALUES ('boot', 1)"
                " ON CONFLICT (name) DO UPDATE SET value = value + 1"
            )
            row = database.execute("SELECT value FROM counters WHERE name = 'boot'").fetchone()
            count = int(row[0])
        return count << _BOOT_RANDOM_BITS | secrets.randbits(_BOOT_RANDOM_BITS)

    def trust(self) -> Trust:
        """All that was kept, the boards in the order of pairing."""
        with self._transaction(durable=False) as database:
            boards = database.execute(
                "SELECT id, public_key, certificate, name, addresses, direct"
                " FROM boards ORDER BY position"
            ).fetchall()
            former = database.execute("SELECT id, certificate, name FROM revoked").fetchall()
            records = database.execute("SELECT record FROM roster").fetchall()
        return Trust(
            tuple(
                PairedBoard(
                    BoardId(i), k, c, n, tuple((str(h), int(p)) for h, p in json.loads(a)), bool(d)
                )
                for i, k, c, n, a, d in boards
            ),
            tuple(FormerBoard(BoardId(i), c, n) for i, c, n in former),
            tuple(record for (record,) in records),
        )

    def boards(self) -> list[PairedBoard]:
        """Every paired board, in the order of pairing."""
        return list(self.trust().boards)

    def revoked(self) -> set[BoardId]:
        """Every board that was trusted once and must not be again."""
        return {board.id for board in self.trust().former}

    def change(self, change: Trust) -> None:
        """Trust boards from now on, and others no longer. A known one keeps its place. All of it
        is on the disk on return, or nothing of it is."""
        with self._transaction(durable=True) as database:
            for former in change.former:
                database.execute("DELETE FROM boards WHERE id = ?", (former.id,))
                database.execute(
                    "INSERT OR REPLACE INTO revoked VALUES (?, ?, ?)",
                    (former.id, former.certificate, former.name),
                )
            for board in change.boards:
                database.execute("DELETE FROM revoked WHERE id = ?", (board.id,))
                database.execute(
                    "INSERT INTO boards (id, public_key, certificate, name, addresses, direct)"
                    " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                    " public_key = excluded.public_key, certificate = excluded.certificate,"
                    " name = excluded.name, addresses = excluded.addresses,"
                    " direct = excluded.direct",
                    (
                        board.id,
                        board.public_key,
                        board.certificate,
                        board.name,
                        _addresses(board.addresses),
                        board.direct,
                    ),
                )
            database.executemany(
                "DELETE FROM roster WHERE record = ?", ((r,) for r in change.outdated)
            )
            database.executemany(
                "INSERT OR IGNORE INTO roster VALUES (?)", ((r,) for r in change.records)
            )

    def add(self, board: PairedBoard) -> None:
        """Trust a board from now on. Durable on return."""
        self.change(Trust(boards=(board,)))

    def seen(self, board: BoardId, name: str, addresses: tuple[Address, ...]) -> None:
        """Remember what a paired board calls itself and where it was. A power cut may undo it."""
        with self._transaction(durable=False) as database:
            database.execute(
                "UPDATE boards SET name = ?, addresses = ? WHERE id = ?",
                (name, _addresses(addresses), board),
            )

    def learned(self, model: str) -> bytes | None:
        """What was kept by :meth:`learn`."""
        with self._transaction(durable=False) as database:
            row = database.execute("SELECT data FROM learned WHERE model = ?", (model,)).fetchone()
        return None if row is None else bytes(row[0])

    def learn(self, model: str, data: bytes) -> None:
        """Keep what is known of the board's speed with a model. A power cut may undo it."""
        with self._transaction(durable=False) as database:
            database.execute("DELETE FROM learned WHERE model = ?", (model,))
            database.execute("INSERT INTO learned VALUES (?, ?)", (model, data))
            database.execute(
                "DELETE FROM learned WHERE rowid NOT IN"
                " (SELECT rowid FROM learned ORDER BY rowid DESC LIMIT ?)",
                (MAX_LEARNED,),
            )

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("BEGIN IMMEDIATE")  # takes the lock that is then kept
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StateError(
                f"{self._file} was written by a newer edgemoa",
                hint="upgrade edgemoa, or use another state directory",
            )
        if version == 0:
            for statement in _SCHEMA:
                database.execute(statement)
        for later in range(version + 1, SCHEMA_VERSION + 1):
            for statement in _CHANGES.get(later, ()):
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            database = self._database
            if database is None:
                raise StateError(f"{self._file} is not open")
            database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's and the system's errors as ours, each with what to do next."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
            if code == sqlite3.SQLITE_FULL:
                raise self._disk_full() from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StateError(
                    f"{self._file} is in use by another edgemoa",
                    hint="stop the other daemon, or give this one its own board.state_dir",
                ) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise StateError(
                    f"{self._file} is damaged",
                    hint="restore it, or move it away and pair this board again",
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
            f"no room to write {self._file}", hint="free some disk space and start again"
        )


def _addresses(addresses: tuple[Address, ...]) -> str:
    return json.dumps(addresses[: limits.MAX_ADDRESSES])
