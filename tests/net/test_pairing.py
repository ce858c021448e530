"""Pairing by a code, introduction, revocation, new keys and copied cards, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from netbed import FAST, SECRET, Bed, Board, closed, raw_link, run, small, until
from spake2 import SPAKE2_A

from edgemoa.core.envelope import board_id
from edgemoa.errors import DiskFullError, NetworkError, PairingError, StateError, UserError
from edgemoa.net import pairing, tls, wire
from edgemoa.net.identity import Identity, load_identity, rotate_identity
from edgemoa.net.pairing import Code, Window, new_code, parse_code
from edgemoa.net.twins import BOTH, SECOND
from edgemoa.store import Store

SLOW = replace(FAST, join=3.0)


async def alone(bed: Bed, name: str, **options: object) -> Board:
    """A board without a join secret."""
    return await bed.board(name, secret=None, **options)  # type: ignore[arg-type]


async def by_code(joiner: Board, member: Board) -> None:
    code, _ = member.network.open_window()
    await joiner.network.join(code, member.seed)


async def chain(bed: Bed, *names: str) -> list[Board]:
    """Boards that are paired one by one, each with the first."""
    boards = [await alone(bed, name) for name in names]
    for board in boards[1:]:
        await by_code(board, boards[0])
    await until(lambda: all(b.linked(*(o for o in boards if o is not b)) for b in boards))
    return boards


@contextlib.asynccontextmanager
async def stranger(own: Identity, board: Board) -> AsyncIterator[tls.Connection]:
    contexts = tls.make_contexts(own, [])
    connection = await tls.dial(("127.0.0.1", board.network.port), contexts.stranger, 2.0)
    try:
        yield connection
    finally:
        connection.abort()
        await asyncio.sleep(0)


async def guess(own: Identity, board: Board, code: Code) -> None:
    async with stranger(own, board) as connection:
        member = pairing.identify(connection.certificate or b"")
        await pairing.join(connection, own, code, "mallory", member)


def wrong(code: str) -> Code:
    return Code(f"{(int(parse_code(code).digits) + 1) % 10**8:08}")


def test_a_code_pairs_and_one_pairing_is_enough_for_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(bed: Bed) -> None:
        caplog.set_level(logging.DEBUG)
        a, b, c = await chain(bed, "a", "b", "c")
        d = await alone(bed, "d")
        code, seconds = b.network.open_window()
        assert seconds == 180
        found = await d.network.join(code.replace("-", " "), b.seed)
        assert (found.id, found.state, found.name) == (b.id, "paired", "b")
        boards = [a, b, c, d]
        await until(lambda: all(x.linked(*(o for o in boards if o is not x)) for x in boards))
        assert b.network.window()["joined"] == ["d"]
        assert b.network.window()["failures"] == 0
        a.network.send(d.id, small())
        await until(lambda: d.heard.messages == [(a.id, small())])
        digits = code.replace("-", "")
        for said in (caplog.text, str(b.network.window()), repr(b.network._window.code)):  # type: ignore[union-attr]
            assert code not in said
            assert digits not in said

    run(tmp_path, test)


def test_codes_are_found_by_themselves_and_two_windows_do_not_disturb(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, c = [await alone(bed, n, mdns=True) for n in "abc"]
        a.network.open_window()
        code, _ = b.network.open_window()
        await until(lambda: len(c.network.devices()) == 2)
        found = await c.network.join(code)
        assert found.id == b.id
        assert a.heard.paired == {}
        assert int(str(a.network.window()["failures"])) <= 1

    run(tmp_path, test)


def test_five_wrong_codes_close_the_window(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await alone(bed, "a")
        own = await asyncio.to_thread(load_identity, bed.folder / "mallory")
        code, _ = a.network.open_window()
        for _ in range(Window.TRIES):
            assert a.network.window()["open"]
            with pytest.raises((OSError, EOFError)):
                await guess(own, a, wrong(code))
        await until(lambda: not a.network.window()["open"])
        assert "guessing" in str(a.network.window()["closed"])
        with pytest.raises((OSError, EOFError)):
            await guess(own, a, parse_code(code))
        assert a.heard.paired == {}
        await guess(own, a, parse_code(a.network.open_window()[0]))
        await until(lambda: list(a.heard.paired) == [own.board_id])

    run(tmp_path, test)


def test_abandoned_runs_count_and_a_flood_of_strangers_gets_no_more(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await alone(bed, "a", timings=replace(FAST, pairing=0.6))
        own = await asyncio.to_thread(load_identity, bed.folder / "mallory")
        contexts = tls.make_contexts(own, [])
        code, _ = a.network.open_window()
        answers = 0

        async def begin(n: int) -> None:
            nonlocal answers
            where = ("127.0.0.1", a.network.port)
            connection = await tls.dial(where, contexts.stranger, 2.0)
            spake = pairing._Spake(SPAKE2_A, Code(f"{n:08}"), own.board_id, a.id)
            half = await asyncio.to_thread(spake.start)
            start = pairing._CodeStart((1, 1), b"n" * 32, own.certificate, half)
            with contextlib.suppress(OSError, EOFError):
                await pairing._send(connection, pairing._encode(start))
                await pairing._receive(connection)
                answers += 1
                assert await closed(connection)  # and never another word
            connection.abort()

        await asyncio.gather(*(begin(n) for n in range(25)))
        assert answers == Window.TRIES
        assert not a.network.window()["open"]
        with pytest.raises((OSError, EOFError)):
            await guess(own, a, parse_code(code))
        assert a.heard.paired == {}

    run(tmp_path, test)


def test_a_window_ends_by_time_and_by_hand(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await alone(bed, "a", timings=replace(FAST, window=0.2))
        own = await asyncio.to_thread(load_identity, bed.folder / "b")
        first, _ = a.network.open_window()
        second, _ = a.network.open_window()
        with pytest.raises((OSError, EOFError)):
            await guess(own, a, parse_code(first))
        a.network.close_window()
        with pytest.raises((OSError, EOFError)):
            await guess(own, a, parse_code(second))
        third, _ = a.network.open_window()
        await asyncio.sleep(0.25)
        with pytest.raises((OSError, EOFError)):
            await guess(own, a, parse_code(third))
        assert a.network.window()["closed"] == "its time is over"

    run(tmp_path, test)


def test_who_joins_gives_away_few_guesses(tmp_path: Path) -> None:
    """Anybody may announce boards that take part in runs: each tries one code."""

    async def test(bed: Bed) -> None:
        joiner = await alone(bed, "joiner", timings=SLOW)
        fakes = [await alone(bed, f"fake{n}") for n in range(Window.TRIES + 2)]
        for fake in fakes:
            fake.network.open_window()
            joiner.network._found(fake.id, (("127.0.0.1", fake.network.port),))
        with pytest.raises(PairingError, match="too many boards"):
            await joiner.network.join(new_code().digits)
        assert sum(int(str(f.network.window()["failures"])) for f in fakes) == Window.TRIES
        assert joiner.heard.paired == {}

    run(tmp_path, test)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await alone(bed, "a"), await alone(bed, "b", timings=SLOW)
        for text in ("", "1234567", "123456789", "1234567x", "\u0661" * 8):
            with pytest.raises(UserError, match="8 digits"):
                await b.network.join(text)
        code, _ = a.network.open_window()
        with pytest.raises(PairingError, match="not the one"):
            await b.network.join(wrong(code).digits, a.seed)
        a.network.close_window()
        with pytest.raises(NetworkError, match="no board was found") as caught:
            await b.network.join(code, a.seed)
        assert "edgemoa pair" in caught.value.hint
        with pytest.raises(NetworkError, match="no board of that identity"):
            await a.network.accept(board_id(bytes(32)))
        with pytest.raises(UserError):
            await a.network.rename(b.id, "x")

    run(tmp_path, test)


def test_keys_swapped_in_the_middle(tmp_path: Path) -> None:
    """Who relays a run between two boards under a certificate of its own gets neither."""

    async def test(bed: Bed) -> None:
        a, b = await alone(bed, "a"), await alone(bed, "b", timings=SLOW)
        mallory = await asyncio.to_thread(load_identity, bed.folder / "mallory")
        contexts = tls.make_contexts(mallory, [])

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            onward = await tls.dial(("127.0.0.1", a.network.port), contexts.stranger, 2.0)

            async def pipe(r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    while data := await r.read(4096):
                        w.write(data)
                w.close()

            await asyncio.gather(pipe(reader, onward.writer), pipe(onward.reader, writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=contexts.server)
        async with server:
            port = server.sockets[0].getsockname()[1]
            code, _ = a.network.open_window()
            with pytest.raises(PairingError):
                await b.network.join(code, f"127.0.0.1:{port}")
        assert a.heard.paired == b.heard.paired == {}
        assert a.network.window()["failures"] == 1

    run(tmp_path, test)


def test_accepted_by_identity_on_both_sides(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, liar = [await alone(bed, n) for n in ("a", "b", "liar")]
        with pytest.raises(NetworkError):  # another key answers there
            await a.network.accept(b.id, liar.seed)
        await a.network.accept(b.id, b.seed)
        await asyncio.sleep(0.3)
        assert not a.linked(b)
        b.network._found(a.id, (("127.0.0.1", a.network.port),))
        await b.network.accept(a.id)
        await until(lambda: a.linked(b) and b.linked(a))

    run(tmp_path, test)


def test_revoked_everywhere_at_once_and_where_it_was_off(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, c, d = await chain(bed, "a", "b", "c", "d")
        port = d.network.port
        await until(lambda: len({x.network._trust.roster.digest for x in (a, b, c, d)}) == 1)
        await d.network.stop()
        await asyncio.to_thread(d.store.close)
        bed.boards.remove(d)
        await a.network.unpair(b.id, "stolen")
        await until(lambda: b.id in c.heard.unpaired, seconds=1)
        assert not c.linked(b)
        await until(lambda: not b.linked(a) and not b.linked(c))
        await until(lambda: "revoked by a" in b.detail(a))
        (gone,) = [x for x in c.network.devices() if x.state == "revoked"]
        assert (gone.id, gone.name, gone.detail) == (b.id, "b", "revoked by a")
        d = await alone(bed, "d", port=port)
        await until(lambda: b.id in d.heard.unpaired)
        for board in (a, c, d):
            with pytest.raises(PairingError, match="revoked"):
                async with raw_link(b.identity, board):
                    pass
            assert board.heard.messages == []
            with pytest.raises(PairingError, match="the board was revoked"):
                board.network._check_trustable(b.id)
        await c.network.accept(b.id)
        await until(lambda: b.linked(a, c, d))

    run(tmp_path, test)


def test_a_revoked_board_keeps_no_captured_record_of_use(tmp_path: Path) -> None:
    """Its old admission, shown by a board that may speak or by a stranger, lets it in nowhere."""

    async def test(bed: Bed) -> None:
        a, b, c = await chain(bed, "a", "b", "c")
        captured = c.network._trust.roster.records
        await a.network.unpair(b.id, "stolen")
        await until(lambda: b.id in c.heard.unpaired)
        for records in (captured, b.network._trust.roster.records):
            plan = await a.network._change(lambda r, told=records: r.merged(told))  # type: ignore[misc]
            assert plan.said == ()
        async with stranger(b.identity, a) as connection:
            await pairing.tell(connection, tuple(captured[:5]))
            assert await closed(connection)
        assert a.linked(c)
        assert not a.linked(b)

    run(tmp_path, test)


def test_a_board_that_is_revoked_while_it_pairs_stays_out(tmp_path: Path) -> None:
    """Boards of one secret find each other again and again, and may be at it just then."""

    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        candidate = pairing.identify(b.identity.certificate)
        await a.network.unpair(b.id, "stolen")
        with pytest.raises(PairingError, match="revoked meanwhile"):
            await a.network._pair_with(candidate, ())
        a.network._hints.put(b.id, (("127.0.0.1", b.network.port),))
        a.network._suits[b.id] = "waiting"
        await a.network._suit(b.id, SECRET)
        assert b.id not in a.network._peers
        await a.network.accept(b.id)
        await until(lambda: a.linked(b))

    run(tmp_path, test)


def test_a_name_is_given_once_for_all(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, c = await chain(bed, "a", "b", "c")
        await a.network.rename(b.id, "kitchen")
        for board in (a, c):
            await until(lambda x=board: x.heard.paired[b.id] == "kitchen")  # type: ignore[misc]
            (device,) = [d for d in board.network.devices() if d.id == b.id]
            assert device.name == "kitchen"
        await c.network.rename(b.id, "")
        await until(lambda: a.heard.paired[b.id] == "b")

    run(tmp_path, test)


def test_a_new_key_is_told_to_boards_that_were_off(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, c = await chain(bed, "a", "b", "c")
        await until(lambda: len({x.network._trust.roster.digest for x in (a, b, c)}) == 1)
        old, port = b.id, c.network.port
        for board in (b, c):
            await board.network.stop()
            await asyncio.to_thread(board.store.close)
            bed.boards.remove(board)
        for version in (1, 2):  # twice
            await asyncio.to_thread(rotate_identity, bed.folder / "b", version)
        b = await alone(bed, "b")
        assert b.id != old
        await until(lambda: a.linked(b) and b.linked(a))
        assert set(a.heard.paired) >= {b.id, c.id}
        assert old in a.heard.unpaired
        c = await alone(bed, "c", port=port)
        await until(lambda: c.linked(b) and b.linked(c))
        devices = [d for d in c.network.devices() if d.id in (old, b.id)]
        assert [(d.id, d.name, d.state) for d in devices] == [(b.id, "b", "paired")]
        later = await alone(bed, "later")
        await by_code(later, a)
        await until(lambda: later.linked(a, b, c))

    run(tmp_path, test)


def test_a_new_key_survives_a_power_cut_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_identity(tmp_path)
    for name in ("fsync", "replace", "open"):
        real, calls = getattr(os, name), 0

        def cut(*args: object, real: object = real, **more: object) -> object:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched, pytest.raises(DiskFullError):
            patched.setattr(os, name, cut)
            rotate_identity(tmp_path, 1)
        assert load_identity(tmp_path).board_id == before.board_id
        assert [f.name for f in tmp_path.iterdir()] == ["identity.pem"], calls
    old, new = rotate_identity(tmp_path, 1)
    assert (old.board_id, new.board_id) == (before.board_id, load_identity(tmp_path).board_id)
    tls.make_contexts(new, [])  # the TLS library passes over what else is in the file


@contextlib.asynccontextmanager
async def copied(bed: Bed, board: Board, name: str) -> AsyncIterator[None]:
    """The card of ``board`` is copied to ``name`` while it is off, and both know their places."""
    await board.network.stop()
    await asyncio.to_thread(board.store.close)
    bed.boards.remove(board)
    await asyncio.to_thread(shutil.copytree, bed.folder / board.network._name, bed.folder / name)
    yield


def test_a_copied_card_is_noticed_and_refused(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await chain(bed, "a", "b")
        async with copied(bed, b, "twin"):
            b = await alone(bed, "b")
        await until(lambda: a.linked(b) and b.linked(a))
        twin = await alone(bed, "twin")
        assert twin.id == b.id
        await until(lambda: SECOND in twin.detail(a))
        assert a.detail(b) == SECOND
        assert a.linked(b)
        link = a.network._peers[b.id].link
        assert link is not None
        assert link.hello.boot == b.network.boot_epoch

    run(tmp_path, test)


def test_a_boot_that_comes_back_is_a_copy_and_both_are_out(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        quick = replace(FAST, quarantine=1.5, retry_max=0.2)
        a = await alone(bed, "a", timings=quick)
        b = await alone(bed, "b", timings=quick)
        await by_code(b, a)
        await until(lambda: a.linked(b) and b.linked(a))
        async with copied(bed, b, "twin"):
            b = await alone(bed, "b", timings=quick)
        await until(lambda: a.linked(b))
        a.network._peers[b.id].link.is_alive = _silent  # type: ignore
        twin = await alone(bed, "twin", timings=quick)  # the other is too busy to answer
        await until(lambda: a.detail(b) == BOTH)
        await until(lambda: not a.linked(b), seconds=1)
        await until(lambda: any(BOTH in x.detail(a) for x in (b, twin)))
        await twin.network.stop()  # one of them is switched off
        await until(lambda: a.linked(b))

    run(tmp_path, test)


async def _silent(_: float) -> bool:
    return False


def test_a_storage_image_rolled_back_is_brought_up_to_date(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b, c = await chain(bed, "a", "b", "c")
        async with copied(bed, b, "image"):
            b = await alone(bed, "b")
        await until(lambda: b.linked(a, c) and a.linked(b))
        await b.network.unpair(c.id, "sold")
        await until(lambda: c.id in a.heard.unpaired)
        await b.network.stop()
        await asyncio.to_thread(b.store.close)
        bed.boards.remove(b)
        b = await alone(bed, "image")
        assert c.id in b.heard.paired
        await until(lambda: c.id in b.heard.unpaired)
        assert b.linked(a)

    run(tmp_path, test)


def test_what_cannot_be_written_is_not_done(tmp_path: Path) -> None:
    """A disk that is full, and one that cannot be written."""

    async def test(bed: Bed) -> None:
        a, b = await chain(bed, "a", "b")
        c = await alone(bed, "c")
        assert a.store._database is not None
        for pragma, error in (
            ("query_only = ON", StateError),
            ("query_only = OFF", None),
        ):
            a.store._database.execute(f"PRAGMA {pragma}")
            if error is None:
                continue
            with pytest.raises(error):
                await a.network.unpair(b.id, "sold")
            assert a.linked(b)
            assert a.heard.unpaired == {}
            with pytest.raises((error, PairingError)):
                await a.network.accept(c.id, c.seed)
            assert c.id not in a.heard.paired
        await a.network.unpair(b.id, "sold")
        assert a.heard.unpaired == {b.id: "sold"}

    run(tmp_path, test)


FULL = """
import resource, signal, sys
from pathlib import Path
from edgemoa.errors import EdgemoaError
from edgemoa.store import FormerBoard, PairedBoard, Store, Trust
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
store.open()
size = max(f.stat().st_size for f in Path(sys.argv[1]).iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
more = PairedBoard("x" * 56, b"k" * 32, b"c" * 900, "x", ())
failed = 0
for n in range(400):
    before = store.trust()
    there = bool(before.boards)
    former = tuple(FormerBoard(b.id) for b in before.boards)
    try:
        store.change(Trust(() if there else (more,), former, (bytes([n % 256]) * 1000,)))
    except EdgemoaError:
        failed += 1
        assert store.trust() == before
print(failed)
"""


def test_a_disk_that_fills_up_leaves_the_old_state(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    identity = load_identity(tmp_path / "other")
    from netbed import paired

    store.add(paired(identity))
    store.close()
    shutil.rmtree(tmp_path / "other")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) > 0
    store.open()
    kept = store.trust()
    ids = [b.id for b in kept.boards] + [b.id for b in kept.former]
    assert ids.count(identity.board_id) == 1
    assert len(set(ids)) == len(ids)
    store.close()


CUT = """
import sys
from pathlib import Path
from edgemoa.store import FormerBoard, PairedBoard, Store, Trust
store = Store(Path(sys.argv[1]))
store.open()
board = PairedBoard("x" * 56, b"k" * 32, b"c" * 900, "x", ())
while True:
    store.change(Trust((board,), (), (b"in",), (b"out",)))
    print("in", flush=True)
    store.change(Trust((), (FormerBoard(board.id),), (b"out",), (b"in",)))
    print("out", flush=True)
"""


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """Whatever was said to be written is, and never half of a change."""
    for n in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", CUT, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(7 + 5 * n):
            process.stdout.readline()
        process.kill()
        said = (process.stdout.read() or "").split()
        process.wait()
        process.stdout.close()
        store = Store(tmp_path)
        store.open()
        kept = store.trust()
        store.close()
        inside = bool(kept.boards)
        assert kept.records == ((b"in",) if inside else (b"out",))
        assert bool(kept.former) is not inside
        assert not said or said[-1] in ("in", "out")


def test_roster_packets_that_are_not_right_end_the_link(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        own = await asyncio.to_thread(load_identity, bed.folder / "friend")
        a = await bed.board("a", trusts=(own,))
        good = wire.RosterNews(b"d" * 32, (b"k" * 8,))
        forged = a.network._trust.roster.admitted(own.certificate).revoked(own.board_id).records
        spoiled = [r[:-1] + bytes([r[-1] ^ 1]) for r in forged]
        for bad in (
            bytes([wire.ROSTER]),
            bytes([wire.ROSTER]) + b"\xc1",
            wire.roster_packet(replace_news(good, digest=b"short")),
            wire.roster_packet(replace_news(good, known=(b"k" * 8,) * 65)),
            wire.roster_packet(replace_news(good, records=(b"x",))),
            wire.roster_packet(replace_news(good, records=tuple(spoiled))),
            wire.roster_packet(replace_news(good, where=(wire.Where(b"k" * 8, "", 1),))),
            bytes([wire.BYE]) + b"\xc1",
        ):
            a.network._peers[own.board_id].conduct.__init__(0.0)  # type: ignore[misc]
            async with raw_link(own, a) as (connection, _):
                connection.writer.write(wire.framed(bad))
                assert await closed(connection), bad[:20]
        async with raw_link(own, a) as (connection, _):
            connection.writer.write(wire.framed(wire.bye_packet("I leave\n\x1b[2J")))
            assert await closed(connection)
        assert a.network.devices()[0].detail == "it ended the link: I leave[2J"
        assert a.heard.unpaired == {}

    run(tmp_path, test)


def replace_news(news: wire.RosterNews, **changes: object) -> wire.RosterNews:
    fields = {f: getattr(news, f) for f in news.__struct_fields__}
    return wire.RosterNews(**(fields | changes))


def test_a_change_that_nobody_waits_for_any_more_is_whole(tmp_path: Path) -> None:
    """The run in which it was made ran out of time while it was written down."""

    async def test(bed: Bed) -> None:
        a, b = await alone(bed, "a"), await alone(bed, "b")
        other = pairing.identify(b.identity.certificate)
        async with a.network._trusting:
            waiting = asyncio.create_task(a.network._pair_with(other, ()))
            await until(lambda: bool(a.network._changes))
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert a.heard.paired == {}
        await until(lambda: b.id in a.heard.paired)
        assert b.id in {d.id for d in a.network.devices()}
        assert [x.id for x in await asyncio.to_thread(a.store.boards)] == [b.id]

    run(tmp_path, test)
