"""The database: what it keeps, and how it fails."""

from __future__ import annotations

import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from netbed import paired

from edgemoa.errors import DiskFullError, StateError
from edgemoa.net.identity import load_identity
from edgemoa.net.trust import TrustKeeper
from edgemoa.store import FILE_NAME, FormerBoard, Store, Trust


def opened(folder: Path) -> Store:
    store = Store(folder)
    store.open()
    return store


def test_what_is_kept(tmp_path: Path) -> None:
    ann, bob = (paired(load_identity(tmp_path / n)) for n in ("ann", "bob"))
    store = opened(tmp_path)
    assert store.boards() == []
    store.add(ann)
    store.add(bob)
    store.add(replace(ann, name="Ann"))
    store.seen(bob.id, "Bob", (("10.0.0.1", 5), ("fe80::1", 6)))
    store.seen(ann.id, "Annie", ())
    store.close()
    store = opened(tmp_path)
    assert store.boards() == [
        replace(ann, name="Annie"),
        replace(bob, name="Bob", addresses=(("10.0.0.1", 5), ("fe80::1", 6))),
    ]
    store.change(Trust(former=(FormerBoard(ann.id, ann.certificate, "Annie"),)))
    assert [b.id for b in store.boards()] == [bob.id]
    assert store.revoked() == {ann.id}
    store.close()


def test_boots_grow_and_do_not_repeat_when_the_storage_is_rolled_back(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    epochs = []
    for _ in range(3):
        store = opened(tmp_path)
        epochs.append(store.count_boot())
        store.close()
    assert epochs == sorted(epochs)
    image = file.read_bytes()
    again = set()
    for _ in range(2):
        file.write_bytes(image)
        store = opened(tmp_path)
        again.add(store.count_boot())
        store.close()
    assert len(again) == 2
    assert max(again) < 2**53


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.count_boot()
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store.close()


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(StateError, match="in use") as caught:
        opened(tmp_path)
    assert "state_dir" in caught.value.hint
    store.close()
    opened(tmp_path).close()


def test_damaged(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 10_000)
    with pytest.raises(StateError, match="damaged"):
        opened(tmp_path)


def test_of_a_newer_version(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StateError, match="newer"):
        opened(tmp_path)


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError):
        opened(tmp_path / "file")
    with pytest.raises(StateError, match="not open"):
        Store(tmp_path).boards()


def test_disk_full(tmp_path: Path) -> None:
    store = opened(tmp_path)
    ann = paired(load_identity(tmp_path / "ann"))
    store.add(ann)
    assert store._database is not None
    store._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(DiskFullError) as caught:
        for n in range(200):
            store.add(replace(ann, id=f"{n}", name="x" * 64))  # type: ignore[arg-type]
    assert "free some disk space" in caught.value.hint
    assert store.boards()[0] == ann
    store.close()


VERSION_2 = (
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT",
    "CREATE TABLE boards (position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
    " public_key BLOB NOT NULL, certificate BLOB NOT NULL, name TEXT NOT NULL,"
    " addresses TEXT NOT NULL) STRICT",
    "CREATE TABLE revoked (id TEXT PRIMARY KEY) STRICT",
    "CREATE TABLE learned (model TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "PRAGMA user_version = 2",
)


def test_boards_of_version_2_stay_paired_and_revoked(tmp_path: Path) -> None:
    own = load_identity(tmp_path)
    ann, bob = (paired(load_identity(tmp_path / n)) for n in ("ann", "bob"))
    database = sqlite3.connect(tmp_path / FILE_NAME)
    for statement in VERSION_2:
        database.execute(statement)
    database.execute(
        "INSERT INTO boards VALUES (1, ?, ?, ?, 'Ann', '[]')",
        (ann.id, ann.public_key, ann.certificate),
    )
    database.execute("INSERT INTO revoked VALUES (?)", (bob.id,))
    database.commit()
    database.close()
    for _ in range(2):  # what is made of it is kept
        store = opened(tmp_path)
        assert (store.boards(), store.revoked()) == ([replace(ann, name="Ann")], {bob.id})
        keeper = TrustKeeper(own, store)
        keeper.load()
        assert list(keeper.roster.trusted) == [ann.id]
        assert keeper.roster.why_not(bob.id) is not None
        assert sorted(store.trust().records) == keeper.roster.records
        store.close()
