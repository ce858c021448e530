"""mDNS: what anybody on the network may say must not matter to the daemon."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from netbed import SECRET, Bed, run, until
from zeroconf import DNSCache, DNSIncoming  # type: ignore[attr-defined]

from edgemoa.core import envelope
from edgemoa.core.messages import BoardId
from edgemoa.net import discovery, interfaces
from edgemoa.net.discovery import Discovery

TYPE = [b"_edgemoa", b"_tcp", b"local"]
LONG = b"\xff" * 63  # 189 bytes, once each is read as U+FFFD
SHORT_LIVED = (3).to_bytes(4, "big")  # so that nothing of it stays with neighbours


def name(labels: list[bytes]) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def record(owner: list[bytes], kind: int, data: bytes) -> bytes:
    head = name(owner) + kind.to_bytes(2, "big") + b"\0\1" + SHORT_LIVED
    return head + len(data).to_bytes(2, "big") + data


def answers(*records: bytes) -> bytes:
    return b"\0\0\x84\0\0\0" + len(records).to_bytes(2, "big") + b"\0\0\0\0" + b"".join(records)


def hostile_packets() -> Iterator[bytes]:
    board = envelope.board_id(os.urandom(32)).encode()
    yield answers(record(TYPE, 12, name([LONG, *TYPE])))
    yield answers(
        record(TYPE, 12, name([board, *TYPE])),
        record([board, *TYPE], 33, b"\0\0\0\0\x1f\x0a" + name([LONG, b"local"])),
    )
    question = name(TYPE) + b"\0\x0c\0\1"
    yield b"\0\7\0\0\0\2\0\0\0\0\0\0" + question + name([LONG, *TYPE]) + b"\0\x0c\0\1"
    yield b"\xff" * 200
    yield b"\0" * 12
    yield b""


def shout() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        loopback = socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
        for packet in hostile_packets():
            sock.sendto(packet, ("224.0.0.251", 5353))


def test_hostile_packets_stop_nothing(tmp_path: Path) -> None:
    """netbed fails this test on whatever reaches the event loop's exception handler."""

    async def test(bed: Bed) -> None:
        shout()
        a = await bed.board("a", secret=SECRET, mdns=True)
        for _ in range(10):
            shout()
            await asyncio.sleep(0.15)
        b = await bed.board("b", secret=SECRET, mdns=True)
        shout()
        await until(lambda: b.id in a.heard.paired and a.id in b.heard.paired)

    run(tmp_path, test)


def test_an_interface_that_is_gone_does_not_keep_the_others_from_use() -> None:
    assert interfaces.usable(("127.0.0.1", "192.0.2.1")) == ("127.0.0.1",)
    assert interfaces.usable(("192.0.2.1",)) == ("192.0.2.1",)  # and the reason is then said


def test_trouble_is_said_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "_RETRY_S", (0.05, 0.1))
    calls: list[int] = []

    def usable(_: tuple[str, ...]) -> tuple[str, ...]:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("the network is not up")
        return ("127.0.0.1",)

    monkeypatch.setattr(interfaces, "usable", usable)

    async def scenario() -> None:
        own = BoardId(envelope.board_id(os.urandom(32)))
        found = Discovery(own, 7000, ("127.0.0.1",), lambda *_: None, lambda _: None)
        found.start()
        try:
            await until(lambda: found._browser is not None)
        finally:
            await found.stop()

    asyncio.run(scenario())
    told = [r for r in caplog.records if r.name == "edgemoa.net.discovery"]
    assert len(told) == 2
    assert "seeds" in told[0].getMessage()


def test_the_sieve_lets_through_what_is_right() -> None:
    heard: list[bytes] = []

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            heard.append(data)

    sieve = discovery.Sieve(Listener(), lambda _: False)
    board = envelope.board_id(os.urandom(32)).encode()
    good = answers(record(TYPE, 12, name([board, *TYPE])))
    sieve.datagram_received(good, ("127.0.0.1", 5353))
    for packet in hostile_packets():
        sieve.datagram_received(packet, ("127.0.0.1", 5353))
    assert heard[0] == good
    assert not [data for data in heard if b"\xff" in data]


def test_ten_thousand_made_up_boards_take_no_memory_and_push_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "_MAX_RECORDS", 100)
    cache = DNSCache()

    class Listener(asyncio.DatagramProtocol):
        """As zeroconf keeps what it hears."""

        zc = SimpleNamespace(cache=cache)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            cache.async_add_records(DNSIncoming(data).answers())

    def announced() -> tuple[BoardId, bytes]:
        board = BoardId(envelope.board_id(os.urandom(32)))
        return board, answers(record(TYPE, 12, name([board.encode(), *TYPE])))

    friend, packet = announced()
    sieve = discovery.Sieve(Listener(), lambda board: board == friend)
    sieve.datagram_received(packet, ("127.0.0.1", 5353))
    for _ in range(10_000):
        sieve.datagram_received(announced()[1], ("127.0.0.1", 5353))
    other = [b"_printer", b"_tcp", b"local"]
    sieve.datagram_received(answers(record(other, 12, name([b"x", *other]))), ("127.0.0.1", 5353))
    kept = cache.entries_with_name(discovery.SERVICE)
    assert len(kept) == 100
    assert any(getattr(each, "alias", "").startswith(friend) for each in kept)
    assert cache.names() == [discovery.SERVICE]
