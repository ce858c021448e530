"""Strangers and paired boards that do not keep to the rules, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from netbed import (
    FAST,
    HASTY,
    SECRET,
    Bed,
    Board,
    closed,
    frame,
    large,
    paired,
    raw_link,
    run,
    small,
    until,
)

from edgemoa.core import envelope, limits
from edgemoa.net import pairing, tls, wire
from edgemoa.net.conduct import Conduct
from edgemoa.net.identity import Identity, load_identity, make_certificate
from edgemoa.net.link import greet


async def friend(bed: Bed, **options: object) -> tuple[Board, Identity]:
    """A board, and an identity that it trusts, to misbehave with."""
    identity = await asyncio.to_thread(load_identity, bed.folder / "friend")
    return await bed.board("a", trusts=(identity,), **options), identity  # type: ignore[arg-type]


def signed(own: Identity, to: Board, sequence: int, **other: int) -> bytes:
    """An ENVELOPE packet as the friend would send it from boot 7."""
    kind, body = envelope.encode(small())
    data = envelope.sign(
        kind,
        body,
        key=envelope.key_id(own.public_key),
        signer=own.sign,
        boot=other.get("boot", 7),
        sequence=other.get("inner", sequence),
        to=to.id,
        to_boot=other.get("to_boot", to.network.boot_epoch),
    )
    return bytes([wire.ENVELOPE]) + sequence.to_bytes(8) + data


def test_envelopes_by_hand(tmp_path: Path) -> None:
    """The path that the next tests leave: what is right is taken, acknowledged, and taken once."""

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        async with raw_link(own, a) as (connection, _):
            for _ in range(2):
                connection.writer.write(wire.framed(signed(own, a, 1)))
                assert await frame(connection) == wire.numbered(wire.ACK, 1)
        assert a.heard.messages == [(own.board_id, small())]

    run(tmp_path, test)


def test_bad_packets_end_the_link(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        c = await bed.board("c")
        good = signed(own, a, 1)
        for bad in (
            b"\xff\xff\xff\xff",  # a frame of 4 GiB
            b"\0\0\0\0",
            (limits.MAX_FRAME_BYTES + 1).to_bytes(4) + b"x" * 1000,
            wire.framed(bytes([wire.ENVELOPE])),
            wire.framed(good[:-1] + bytes([good[-1] ^ 1])),
            wire.framed(good[:-1]),
            wire.framed(signed(own, c, 1, to_boot=a.network.boot_epoch)),  # for another board
            wire.framed(signed(own, a, 1, to_boot=1)),  # for an earlier boot of this one
            wire.framed(signed(own, a, 1, inner=2)),
            wire.framed(signed(own, a, 1, boot=8)),
            wire.framed(bytes([wire.ACK])),
            wire.framed(bytes([wire.ACK]) + b"1234567"),
            wire.framed(bytes([wire.ACK]) + b"\0" * 8 * (wire.MAX_ACKS + 1)),
            wire.framed(bytes([wire.PING])),
            wire.framed(bytes([wire.HOP]) + b"\xc1"),
            wire.framed(bytes([wire.HOP]) + envelope.encode(small())[1]),  # has to be signed
            wire.framed(bytes([wire.HELLO])),
        ):
            a.network._peers[own.board_id].conduct = Conduct(time.monotonic())  # as if the first
            async with raw_link(own, a) as (connection, _):
                connection.writer.write(bad)
                assert await closed(connection), bad[:8]
        assert a.heard.messages == []

    run(tmp_path, test)


def test_unknown_kinds_of_packets_are_passed_over(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        async with raw_link(own, a) as (connection, _):
            connection.writer.write(wire.framed(b"\x77later") + wire.framed(signed(own, a, 1)))
            assert await frame(connection) == wire.numbered(wire.ACK, 1)

    run(tmp_path, test)


@pytest.mark.parametrize("hello", ["versions", "kind", "long", "none"])
def test_a_bad_hello(tmp_path: Path, hello: str) -> None:
    async def test(bed: Bed) -> None:
        a, own = await friend(bed, timings=HASTY)
        contexts = tls.make_contexts(own, [a.identity.certificate])
        connection = await tls.dial(("127.0.0.1", a.network.port), contexts.member, 1.0)
        packet = wire.hello_packet(wire.Hello((2, 3), 7, b"s" * 32, b"k" * 8, 9, "later"))
        match hello:
            case "versions":
                connection.writer.write(wire.framed(packet))
            case "kind":
                connection.writer.write(wire.framed(b"\0" + packet[1:]))
            case "long":
                connection.writer.write(wire.framed(packet + b"x" * wire.MAX_HELLO_BYTES))
        assert await closed(connection)
        connection.abort()
        assert a.network._links == {}

    run(tmp_path, test)


def test_a_paired_board_speaks_for_nobody_else(tmp_path: Path) -> None:
    """Under a child certificate that it made, or a stranger's, or with another's identity."""

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        key = await asyncio.to_thread(
            lambda: serialization.load_pem_private_key(own.file.read_bytes(), None)
        )
        assert isinstance(key, Ed25519PrivateKey)
        child = Ed25519PrivateKey.generate()
        issuer = make_certificate(key)
        minted = (
            x509.CertificateBuilder()
            .subject_name(issuer.subject)
            .issuer_name(issuer.subject)
            .public_key(child.public_key())
            .serial_number(5)
            .not_valid_before(issuer.not_valid_before_utc)
            .not_valid_after(issuer.not_valid_after_utc)
            .sign(key, algorithm=None)
        )
        for certificate in (minted, make_certificate(child)):
            file = tmp_path / "child.pem"
            pem = child.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ) + certificate.public_bytes(serialization.Encoding.PEM)
            await asyncio.to_thread(file.write_bytes, pem)
            stranger = Identity(own.board_id, own.public_key, own.certificate, file, child)
            with pytest.raises((OSError, EOFError)):
                async with raw_link(stranger, a):
                    pass
        assert a.network._links == {}
        # The chain check alone is not relied on: even if it let the child through.
        a.network._contexts = tls.make_contexts(
            a.identity, [make_certificate(child).public_bytes(serialization.Encoding.DER)]
        )
        with pytest.raises((OSError, EOFError)):
            async with raw_link(stranger, a):
                pass
        assert a.network.counters["a connection under a key that is not paired"] == 1

    run(tmp_path, test)


def test_a_dialled_board_has_to_be_the_one_that_was_meant(tmp_path: Path) -> None:
    """Two paired boards, and one answers at the other's address: it is not taken for it."""

    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        c = await bed.board("c", start=False)
        await asyncio.to_thread(a.store.add, paired(c.identity, ("127.0.0.1", b.network.port)))
        await a.crash()
        a = await bed.board("a")
        await until(lambda: a.detail(c) == "another board answers at its address")
        assert not a.linked(c)

    run(tmp_path, test)


def test_a_replayed_datagram_is_dropped(tmp_path: Path) -> None:
    taken: list[bytes] = []

    def hook(datagram: bytes) -> Iterable[bytes]:
        taken.append(datagram)
        return [datagram]

    async def test(bed: Bed) -> None:
        a, b = await bed.pair(a=hook)
        await until(lambda: a.network._peers[b.id].link.udp_works)  # type: ignore[union-attr]
        a.network.send(b.id, small())
        await until(lambda: b.heard.messages != [])
        before = b.network.counters["datagram seen before"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            udp.setblocking(False)
            replayed = taken.copy()
            for count, datagram in enumerate(replayed, 1):
                for changed in (datagram, datagram[:-1], b"unknown!" + datagram[8:], datagram[:9]):
                    udp.sendto(changed, ("127.0.0.1", b.network.port))
                # A few at a time, or the system drops some. The last may be on its way itself.
                await until(
                    lambda wanted=before + 2 * count - 1: (  # type: ignore[misc]
                        b.network.counters["datagram seen before"] >= wanted
                    )
                )
            udp.sendto(b"x" * 60_000, ("127.0.0.1", b.network.port))
            with pytest.raises(BlockingIOError):
                udp.recv(2000)  # and nobody is answered
        assert b.network.counters["datagram of no link"] >= len(replayed)
        assert len(b.heard.messages) == 1

    run(tmp_path, test)


def test_a_peer_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, own = await friend(bed, timings=HASTY)
        async with raw_link(own, a) as (connection, _):
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: bool(a.network._links))
            for end in (connection, next(iter(a.network._links.values()))[0].connection):
                sock = end.writer.get_extra_info("socket")  # else the system's buffers take it all
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            for _ in range(6):
                a.network.send(own.board_id, large(900_000))
            link = a.network._peers[own.board_id].link
            assert link is not None
            told = "the other board does not read"
            await until(lambda: link.closed, seconds=3)
            assert link._closed.result() == told
        await until(lambda: len(a.heard.undelivered) == 6)
        assert a.network._budget.left == limits.MAX_ALL_OUTBOXES_BYTES

    run(tmp_path, test)


def test_a_peer_that_only_talks_gets_no_memory(tmp_path: Path) -> None:
    """It sends the same envelope on and on and reads no acknowledgement."""

    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        async with raw_link(own, a) as (connection, _):
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            packet = wire.framed(signed(own, a, 1))
            await until(lambda: bool(a.network._links))
            with_link = next(iter(a.network._links.values()))[0]
            for _ in range(200):
                connection.writer.write(packet * 20)
                try:
                    async with asyncio.timeout(1):
                        await connection.writer.drain()
                except (TimeoutError, OSError):
                    break
                assert with_link._queued_bytes <= limits.MAX_LINK_QUEUE_BYTES

    run(tmp_path, test)


def test_slow_loris(tmp_path: Path) -> None:
    """Before TLS, before HELLO, in a frame, in pairing: each is cut off in its time."""

    async def test(bed: Bed) -> None:
        a, own = await friend(bed, timings=HASTY)
        where = ("127.0.0.1", a.network.port)
        contexts = tls.make_contexts(own, [a.identity.certificate])

        async def before_tls() -> bool:
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"\x16")
            try:
                async with asyncio.timeout(3):
                    return await reader.read(1) == b""
            finally:
                writer.close()

        async def silent(context: ssl.SSLContext, sent: bytes) -> bool:
            connection = await tls.dial(where, context, 1.0)
            connection.writer.write(sent)
            try:
                return await closed(connection)
            finally:
                connection.abort()

        async def in_a_frame() -> bool:
            async with raw_link(own, a) as (connection, _):
                connection.writer.write(b"\0\0\1\0abc")
                return await closed(connection)

        cut_off = await asyncio.gather(
            before_tls(),
            silent(contexts.member, b""),
            silent(contexts.member, b"\0\0"),
            silent(contexts.stranger, b""),
            silent(contexts.stranger, b"\0\0\1\0abc"),
            in_a_frame(),
        )
        assert all(cut_off)

    run(tmp_path, test)


def test_a_crowd_at_the_door_does_not_keep_friends_out(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", timings=HASTY)
        where = ("127.0.0.1", a.network.port)
        crowd = [await asyncio.open_connection(*where) for _ in range(2 * limits.MAX_HALF_OPEN)]
        assert len(a.network._half_open) <= limits.MAX_HALF_OPEN
        b = await bed.board("b", seeds=(a.seed,))
        await until(lambda: a.linked(b))
        for _, writer in crowd:
            writer.close()

    run(tmp_path, test)


# --- pairing


async def man_in_the_middle(bed: Bed, a: Board) -> tuple[asyncio.Server, int]:
    """Ends TLS with a key of its own and passes every frame of the pairing on."""
    own = await asyncio.to_thread(load_identity, bed.folder / "mallory")
    contexts = tls.make_contexts(own, [])

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await tls.dial(("127.0.0.1", a.network.port), contexts.stranger, 1.0)
        await asyncio.gather(pipe(reader, onward.writer), pipe(onward.reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=contexts.server)
    return server, server.sockets[0].getsockname()[1]


def test_a_man_in_the_middle_pairs_with_nobody(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        server, port = await man_in_the_middle(bed, a)
        async with server:
            b = await bed.board("b", seeds=(f"127.0.0.1:{port}",))
            told = "the other board holds another join secret or code"
            await until(lambda: a.network.counters[told] > 0)
            await until(lambda: "refused" in next(iter(b.network.devices())).detail)
        assert a.heard.paired == b.heard.paired == {}

    run(tmp_path, test)


def test_a_reflected_proof_is_refused(tmp_path: Path) -> None:
    """A member without the secret sends the joiner's own proof back."""

    async def test(bed: Bed) -> None:
        own = await asyncio.to_thread(load_identity, bed.folder / "mirror")
        contexts = tls.make_contexts(own, [])
        frames: list[bytes] = []

        async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await wire.read_frame(reader, 2048, 1.0)
                writer.write(wire.framed(pairing._encode(pairing._Accept(1, b"n" * 32))))
                frames.append(await wire.read_frame(reader, 2048, 1.0))
                writer.write(wire.framed(frames[0]))
                frames.append(await wire.read_frame(reader, 2048, 1.0))
            except (EOFError, OSError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(mirror, "127.0.0.1", 0, ssl=contexts.server)
        async with server:
            port = server.sockets[0].getsockname()[1]
            b = await bed.board("b", seeds=(f"127.0.0.1:{port}",))
            told = "the other board holds another join secret or code"
            await until(lambda: b.network.counters[told] > 0)
        assert b.heard.paired == {}
        assert len(frames) == 1

    run(tmp_path, test)


def test_whoever_dials_without_the_secret_learns_nothing(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        own = await asyncio.to_thread(load_identity, bed.folder / "mallory")
        guess = pairing.parse_join_secret(pairing.new_join_secret())
        contexts = tls.make_contexts(own, [])
        connection = await tls.dial(("127.0.0.1", a.network.port), contexts.stranger, 1.0)
        member = pairing.identify(connection.certificate or b"")
        with pytest.raises((OSError, EOFError)):
            await pairing.join(connection, own, guess, "mallory", member)
        connection.abort()
        assert a.network.counters["the other board holds another join secret or code"] == 1
        assert a.heard.paired == {}

    run(tmp_path, test)


def test_a_key_that_is_only_shown_does_not_pair(tmp_path: Path) -> None:
    """The secret alone is not enough: the joiner has to hold the key of its certificate."""

    async def test(bed: Bed) -> None:
        a = await bed.board("a")
        victim = await asyncio.to_thread(load_identity, bed.folder / "victim")
        own = await asyncio.to_thread(load_identity, bed.folder / "mallory")
        posing = Identity(
            victim.board_id, victim.public_key, victim.certificate, own.file, own._key
        )
        contexts = tls.make_contexts(own, [])
        connection = await tls.dial(("127.0.0.1", a.network.port), contexts.stranger, 1.0)
        member = pairing.identify(connection.certificate or b"")
        with pytest.raises((OSError, EOFError)):
            await pairing.join(connection, posing, SECRET, "mallory", member)
        connection.abort()
        assert a.network.counters["the other board does not hold the key that it shows"] == 1
        assert a.heard.paired == {}

    run(tmp_path, test)


def test_pairing_again_changes_nothing(tmp_path: Path) -> None:
    """The last message got lost once: the board that missed it just pairs again."""

    async def test(bed: Bed) -> None:
        a, b = await bed.pair()
        contexts = tls.make_contexts(b.identity, [])
        connection = await tls.dial(("127.0.0.1", a.network.port), contexts.stranger, 1.0)
        member = pairing.identify(connection.certificate or b"")
        again = await pairing.join(connection, b.identity, SECRET, "b", member)
        await connection.close()
        assert (again.id, again.name) == (a.id, "a")
        await asyncio.sleep(0.1)
        assert a.linked(b)
        assert a.heard.paired == {b.id: "b"}

    run(tmp_path, test)


def test_a_stranger_hears_no_hello(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, own = await friend(bed)
        where = ("127.0.0.1", a.network.port)
        stranger = tls.make_contexts(own, []).stranger
        connection = await tls.dial(where, stranger, 1.0)
        hello = wire.Hello((1, 1), 7, b"s" * 32, b"k" * 8, 9, "raw")
        with pytest.raises((OSError, EOFError)):
            await greet(connection, hello, FAST)
        connection.abort()
        stranger.minimum_version = stranger.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):  # older than 1.3 is refused altogether
            await tls.dial(where, stranger, 1.0)

    run(tmp_path, test)
