"""Boards that find each other, pair, talk, fail and come back."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from netbed import CANARY, FAST, SECRET, Bed, Board, large, run, small, until

from edgemoa import config
from edgemoa.core import limits
from edgemoa.core.messages import Alive, Ping, Sync
from edgemoa.errors import AddressInUseError, ConfigError
from edgemoa.net.network import Network
from edgemoa.net.pairing import new_join_secret, parse_join_secret

ALIVE = Alive(1, 1, "a", True, "m", 0, 0, 0)


async def settled(a: Board, b: Board) -> None:
    """Wait until both use the same link: what is not acknowledged may be lost before."""
    ends = [x.network._peers[y.id] for x, y in ((a, b), (b, a))]
    await until(lambda: len({e.link.dialler for e in ends if e.link}) == 1)
    await asyncio.sleep(0.1)


def test_three_boards_find_each_other_by_mdns_and_talk(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        boards = [await bed.board(n, mdns=True) for n in ("ann", "bob", "cid")]
        for board in boards:
            others = [b for b in boards if b is not board]
            await until(lambda b=board, o=others: b.linked(*o))  # type: ignore[misc]
            assert set(board.heard.paired) == {o.id for o in others}
            for other in others:
                board.network.send(other.id, small())
        for board in boards:
            await until(lambda b=board: len(b.heard.messages) == 2)  # type: ignore[misc]
            names = {d.name for d in board.network.devices() if d.state == "paired"}
            assert names | {board.network._name} == {"ann", "bob", "cid"}
            assert board.heard.undelivered == []
        last = boards.pop()
        await last.network.stop()
        for board in boards:
            await until(lambda b=board: last.id not in b.network._hints)  # type: ignore[misc]

    run(tmp_path, test)


def test_ipv4_and_ipv6_on_one_port(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", listen="")
        b = await bed.board("b", seeds=(a.seed,))
        boards = [b]
        if socket.has_dualstack_ipv6():
            boards.append(await bed.board("c", listen="::1", seeds=(f"[::1]:{a.network.port}",)))
        for board in boards:
            await until(lambda o=board: a.linked(o) and o.linked(a))  # type: ignore[misc]
            link = a.network._peers[board.id].link
            assert link is not None
            await until(lambda of=link: of.udp_works)  # type: ignore[misc]

    run(tmp_path, test)


def test_a_large_message_takes_the_link(tmp_path: Path) -> None:
    datagrams: list[bytes] = []

    def hook(datagram: bytes) -> Iterable[bytes]:
        datagrams.append(datagram)
        return [datagram]

    async def test(bed: Bed) -> None:
        a, b = await bed.pair(a=hook)
        a.network.send(b.id, large())
        await until(lambda: b.heard.messages != [])
        assert b.heard.messages == [(a.id, large())]
        assert max(map(len, datagrams)) <= limits.MAX_DATAGRAM_BYTES

    run(tmp_path, test)


def test_links_are_told_before_what_comes_over_them(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        boot = b.network.boot_epoch
        assert set(a.heard.linked) == {(b.id, boot)}
        await b.crash()
        await until(lambda: a.heard.unlinked == [b.id])
        b = await bed.board("b", seeds=(a.seed,))
        await until(lambda: a.heard.linked[-1] == (b.id, b.network.boot_epoch))
        assert b.network.boot_epoch > boot
        assert a.heard.unlinked == [b.id]

    run(tmp_path, test)


def test_the_second_way_to_ask_a_board_is_another_one(tmp_path: Path) -> None:
    blocked = False

    def hook(datagram: bytes) -> Iterable[bytes]:
        return [] if blocked else [datagram]

    async def test(bed: Bed) -> None:
        nonlocal blocked
        a, b = await bed.pair(a=hook)
        await until(lambda: a.network._peers[b.id].link.udp_works)  # type: ignore[union-attr]
        blocked = True
        a.network.send(b.id, Ping(1, 0))
        a.network.send(b.id, Ping(2, 0, sure=True))
        a.network.send(b.id, Sync(b"digested"))
        await until(lambda: len(b.heard.messages) == 2)
        assert b.heard.messages == [(a.id, Ping(2, 0, sure=True)), (a.id, Sync(b"digested"))]

    run(tmp_path, test)


def test_messages_wait_for_a_link(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        await b.crash()
        await until(lambda: not a.linked(b))
        a.network.send(b.id, small(1))
        b = await bed.board("b", seeds=(a.seed,))
        await until(lambda: b.heard.messages == [(a.id, small(1))])
        assert a.heard.undelivered == []

    run(tmp_path, test)


def test_loss_and_duplication_of_datagrams_are_repaired(tmp_path: Path) -> None:
    chance = random.Random(5)

    def hook(datagram: bytes) -> Iterable[bytes]:
        return [datagram] * chance.choice((0, 0, 1, 1, 2))

    async def test(bed: Bed) -> None:
        a, b = await bed.pair(a=hook, b=hook)
        await until(lambda: a.network._peers[b.id].link.udp_works)  # type: ignore[union-attr]
        sent = [(a.id, small(n)) for n in range(100)]
        for _, message in sent:
            a.network.send(b.id, message)
        await until(lambda: len(b.heard.messages) >= 100)
        await until(lambda: a.network._peers[b.id].outbox == 0)
        key = str
        assert sorted(b.heard.messages, key=key) == sorted(sent, key=key)
        assert a.network.counters["datagram seen before"] > 0
        assert a.heard.undelivered == []

    run(tmp_path, test)


def test_lost_acknowledgements_do_not_deliver_twice(tmp_path: Path) -> None:
    mute = False

    async def test(bed: Bed) -> None:
        nonlocal mute
        a, b = await bed.pair(b=lambda d: [] if mute else [d])
        await until(lambda: a.network._peers[b.id].link.udp_works)  # type: ignore[union-attr]
        mute = True
        a.network.send(b.id, small())
        await until(lambda: a.network._peers[b.id].outbox == 0)  # acknowledged over the link
        assert b.heard.messages == [(a.id, small())]
        assert b.network._peers[a.id].duplicates == len(FAST.resend)

    run(tmp_path, test)


def test_hop_messages_are_sent_once_or_not_at_all(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        await settled(a, b)
        a.network.send(b.id, ALIVE)
        await until(lambda: b.heard.messages == [(a.id, ALIVE)])
        await b.crash()
        await until(lambda: not a.linked(b))
        a.network.send(b.id, ALIVE)
        await asyncio.sleep(2 * FAST.no_link)
        assert a.heard.undelivered == []

    run(tmp_path, test)


def test_without_datagrams_everything_takes_the_link(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair(a=lambda _: [], b=lambda _: [])
        await settled(a, b)
        a.network.send(b.id, ALIVE)
        a.network.send(b.id, small())
        await until(lambda: len(b.heard.messages) == 2)

    run(tmp_path, test)


def test_a_board_that_dies_is_reported_once_and_links_again(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        port = b.network.port
        await b.crash()
        a.network.send(b.id, small())
        a.network.send(b.id, large())
        await until(lambda: len(a.heard.undelivered) == 2)
        await asyncio.sleep(FAST.no_link)
        assert sorted(str(m) for _, m in a.heard.undelivered) == sorted(
            map(str, (small(), large()))
        )
        b = await bed.board("b", port=port)  # no seed: it knows where "a" was
        await until(lambda: a.linked(b) and b.linked(a), seconds=3)
        b.network.send(a.id, small())
        await until(lambda: a.heard.messages == [(b.id, small())])

    run(tmp_path, test)


def test_what_was_sent_to_an_earlier_boot_is_not_sent_to_the_next(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair(b=lambda _: [])
        peer = a.network._peers[b.id]
        b.network._peers[a.id].link.send_frame = lambda _: None  # type: ignore
        a.network.send(b.id, small())
        await until(lambda: b.heard.messages != [])
        assert peer.outbox == 1
        await b.crash()
        b = await bed.board("b", seeds=(a.seed,))
        await until(lambda: a.heard.undelivered == [(b.id, small())])
        await until(lambda: a.linked(b))
        assert b.heard.messages == []

    run(tmp_path, test)


def test_nobody_there(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        b = await bed.board("b", start=False)
        a.network.send(b.id, small())
        assert a.heard.undelivered == []  # never from within send()
        await until(lambda: a.heard.undelivered == [(b.id, small())])
        assert a.network.devices() == []

    run(tmp_path, test)


def test_an_outbox_is_bounded(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        stranger = await bed.board("b", start=False)
        a = await bed.board("a", trusts=(stranger.identity,))
        for n in range(limits.MAX_OUTBOX_MESSAGES + 3):
            a.network.send(stranger.id, small(n))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(a.heard.undelivered) == 3
        await until(lambda: len(a.heard.undelivered) == limits.MAX_OUTBOX_MESSAGES + 3)
        assert a.network._budget.left == limits.MAX_ALL_OUTBOXES_BYTES

    run(tmp_path, test)


def test_both_dial_at_once_and_keep_one_link(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        eager = replace(FAST, yield_dial=0.0)
        a, b = await bed.pair()
        ports = a.network.port, b.network.port
        await a.crash()
        await b.crash()
        a, b = await asyncio.gather(
            bed.board("a", port=ports[0], timings=eager),
            bed.board("b", port=ports[1], timings=eager),
        )
        await until(lambda: a.linked(b) and b.linked(a))
        await asyncio.sleep(0.5)
        assert a.linked(b) and b.linked(a)
        assert len(a.network._links) == len(b.network._links) == 1
        for n in range(20):
            a.network.send(b.id, small(n))
            b.network.send(a.id, small(n))
        await until(lambda: len(a.heard.messages) == len(b.heard.messages) == 20)

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("secret", "told"),
    [
        (None, "not paired: `edgemoa pair` there, then `edgemoa join CODE` here, or so"),
        (parse_join_secret(new_join_secret()), "it refused: does it hold the same join secret?"),
    ],
)
def test_a_stranger_gets_nothing_and_shows_as_pending(
    tmp_path: Path, secret: object, told: str
) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        stranger = await bed.board("b", seeds=(a.seed,), secret=secret)  # type: ignore[arg-type]
        a.network._found(stranger.id, (("127.0.0.1", stranger.network.port),))
        await until(lambda: stranger.detail(a) == told)
        await until(lambda: a.detail(stranger) == "it refused: does it hold the same join secret?")
        (device,) = stranger.network.devices()
        assert (device.state, device.linked, device.name) == ("pending", False, "")
        for board, other in ((a, stranger), (stranger, a)):
            board.network.send(other.id, small())
            await until(lambda b=board: len(b.heard.undelivered) == 1)  # type: ignore[misc]
            assert board.heard.paired == {}
            assert board.heard.messages == []

    run(tmp_path, test)


def test_an_unpaired_board_stays_out(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        a.network.send(b.id, large())
        await a.network.unpair(b.id, "sold")
        assert a.heard.unpaired == {b.id: "sold"}
        await until(lambda: not b.linked(a))
        await asyncio.sleep(0.5)  # both hold the same secret, and "b" keeps trying
        assert [d.state for d in a.network.devices()] == ["revoked"]
        assert not b.linked(a)
        port = a.network.port
        await a.crash()
        a = await bed.board("a", port=port)
        await asyncio.sleep(0.5)
        assert a.heard.paired == {}
        assert not b.linked(a)

    run(tmp_path, test)


def test_the_address_of_a_board_may_be_a_lie(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        c = await bed.board("c", secret=None)
        a.network._found(b.id, (("127.0.0.1", c.network.port), ("127.0.0.1", 9)))
        for _ in range(2):
            a.network._peers[b.id].link.close("test")  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
            await until(lambda: a.linked(b) and b.linked(a))
        assert c.heard.paired == {}

    run(tmp_path, test)


def test_a_flood_of_made_up_boards_is_bounded(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        from edgemoa.core.envelope import board_id

        a, b = await bed.pair()
        for n in range(10_000):
            a.network._found(board_id(n.to_bytes(32)), (("127.0.0.1", 9),))
        assert len(list(a.network._hints)) == limits.MAX_DISCOVERED
        assert len(a.network._suits) <= limits.MAX_SUITS
        c = await bed.board("c", seeds=(a.seed,))
        await until(lambda: a.linked(b, c))

    run(tmp_path, test)


def test_the_port_is_taken(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        b = await bed.board("b", port=a.network.port, start=False)
        with pytest.raises(AddressInUseError) as caught:
            await b.network.start()
        assert "net.port" in caught.value.hint
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            c = await bed.board("c", port=udp.getsockname()[1], start=False)
            with pytest.raises(AddressInUseError):
                await c.network.start()

    run(tmp_path, test)


@pytest.mark.parametrize(
    "settings",
    [
        config.Net(listen="203.0.113.7", mdns=False),
        config.Net(listen="no address", mdns=False),
        config.Net(listen="127.0.0.1", mdns=False, seeds=("nowhere",)),
        config.Net(listen="127.0.0.1", mdns=False, seeds=("host:99999",)),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, settings: config.Net) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", start=False)
        network = Network(
            settings,
            name="x",
            identity=a.identity,
            store=a.store,
            boot=1,
            handlers=a.heard,
            rng=random.Random(1),
            join_secret=SECRET,
        )
        with pytest.raises(ConfigError):
            await network.start()

    run(tmp_path, test)


def test_a_capture_of_everything_never_shows_the_prompt(tmp_path: Path) -> None:
    wire_tap = bytearray()

    def hook(datagram: bytes) -> Iterable[bytes]:
        wire_tap.extend(datagram)
        return [datagram]

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                wire_tap.extend(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def test(bed: Bed) -> None:
        a = await bed.board("a", hook=hook)

        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            onward = await asyncio.open_connection("127.0.0.1", a.network.port)
            await asyncio.gather(pipe(reader, onward[1]), pipe(onward[0], writer))

        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            b = await bed.board("b", seeds=(f"127.0.0.1:{port}",), hook=hook)
            await until(lambda: a.linked(b) and b.linked(a))
            await until(lambda: b.network._peers[a.id].link.udp_works)  # type: ignore[union-attr]
            b.network.send(a.id, large(600))  # by datagram
            b.network.send(a.id, large())
            await until(lambda: len(a.heard.messages) == 2)
            await b.network.stop()
            await a.network.stop()
        assert len(wire_tap) > 200_000
        for secret in (CANARY.encode(), SECRET.key, b"request-large"):
            assert secret not in wire_tap

    run(tmp_path, test)


def test_pairing_that_cannot_be_finished_changes_nothing(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", mdns=True)
        await asyncio.to_thread(a.identity.file.rename, tmp_path / "away")
        b = await bed.board("b", mdns=True)
        await asyncio.sleep(1.5)
        assert (a.heard.paired, await asyncio.to_thread(a.store.boards)) == ({}, [])
        await asyncio.to_thread((tmp_path / "away").rename, a.identity.file)
        await until(lambda: a.linked(b) and b.linked(a))

    run(tmp_path, test)
