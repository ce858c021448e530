"""Texts in parts between real boards: in order, never by datagram, and as fast as they are read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from netbed import Bed, Board, frame, raw_link, run, until
from test_hostile import friend
from test_network import ALIVE, settled

from edgemoa.core import envelope, limits
from edgemoa.core.messages import Part
from edgemoa.core.parts import Hearing, Telling
from edgemoa.net import wire

LAYER = 1


def part(start: int, text: str, number: int = 0) -> Part:
    return Part(f"request-{number:04}", LAYER, start, text)


def test_parts_keep_their_order_and_go_over_the_connection_alone(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        hops = 0

        def count(datagram: bytes) -> list[bytes]:
            nonlocal hops
            hops += 1
            return [datagram]

        a, b = await bed.pair(a=count)
        await settled(a, b)
        await until(lambda: a.network._peers[b.id].link.udp_works)  # type: ignore[union-attr]
        before = hops
        hearing = Hearing(limits.MAX_PROPOSAL_BYTES)
        for n in range(100):
            a.network.send(b.id, part(6 * n, f"{n:05} "))
        await until(lambda: len(b.heard.messages) == 100)
        assert hops <= before + 1  # a probe, perhaps
        for sender, message in b.heard.messages:
            assert sender == a.id
            assert isinstance(message, Part)
            assert hearing.hear(message.start, message.text)
        assert a.heard.undelivered == []
        # Nobody is to believe one that came by datagram, where order is not kept.
        link = a.network._peers[b.id].link
        assert link is not None
        for message in (part(0, "x"), ALIVE):
            link.send_datagram(bytes([wire.HOP]) + envelope.encode(message)[1])
        await until(lambda: b.heard.messages[-1] == (a.id, ALIVE))
        assert len(b.heard.messages) == 101

    run(tmp_path, test)


def test_without_a_link_a_part_is_undelivered(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        await b.crash()
        await until(lambda: not a.linked(b))
        a.network.send(b.id, part(0, "one"))
        assert a.heard.undelivered == []  # not from inside the call
        await until(lambda: a.heard.undelivered == [(b.id, part(0, "one"))])

    run(tmp_path, test)


def waiting(board: Board, other: str) -> int:
    (link,) = (peer.link for peer in board.network._peers.values() if peer.board.id == other)
    assert link is not None
    return link._queued_bytes + link.connection.writer.transport.get_write_buffer_size()


def test_a_board_that_does_not_read_gets_fewer_and_longer_parts(tmp_path: Path) -> None:
    """Eight texts for it, as a proposer tells of them; then it reads again, and lacks nothing."""

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        peer = a.network._peers[own.board_id]
        async with raw_link(own, a) as (connection, _):
            await until(lambda: peer.link is not None)
            # What the system takes in, no program can help: fill that first.
            number = 1_000
            while not a.heard.undelivered:
                a.network.send(own.board_id, part(0, "x" * 60_000, number := number + 1))
                await asyncio.sleep(0)
                assert number < 2_000
            a.heard.undelivered.clear()
            tellings = [Telling(0) for _ in range(8)]
            most = 0

            def write(word: str) -> int:
                told = 0
                for n, telling in enumerate(tellings):
                    more = telling.write(word, 0)
                    if more is not None:
                        a.network.send(own.board_id, part(*more, n))
                        told += 1
                return told

            def take_back() -> None:
                for _, message in a.heard.undelivered:
                    assert isinstance(message, Part)
                    if message.request_id < "request-1":
                        tellings[int(message.request_id[-4:])].take_back(message.start)
                a.heard.undelivered.clear()

            for n in range(500):
                write(f"{n:07} ")
                await asyncio.sleep(0)
                take_back()
                most = max(most, waiting(a, own.board_id))
            assert most <= 3 * limits.MAX_PARTS_QUEUE_BYTES
            hearings = [Hearing(limits.MAX_PROPOSAL_BYTES) for _ in tellings]
            parts = 0
            while any(len(hearing.text) < 4_001 for hearing in hearings):
                packet = await frame(connection)
                if packet[0] == wire.HOP:
                    message = envelope.decode_hop(packet[1:])
                    if isinstance(message, Part) and message.request_id < "request-1":
                        hearing = hearings[int(message.request_id[-4:])]
                        assert hearing.hear(message.start, message.text)
                        parts += 1
                if write("" if all(len(t.written) > 4_000 for t in tellings) else "."):
                    await asyncio.sleep(0)
                    take_back()
            assert [h.text for h in hearings] == [t.written for t in tellings]
            assert parts < 8 * 100

    run(tmp_path, test)
