"""Models lent over real TLS: to whom, what, and what becomes of those who do not keep to it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import example, given
from hypothesis import strategies as st
from netbed import HASTY, Bed, Board, closed, frame, run, small, until

from edgemoa.core import envelope
from edgemoa.core.messages import BoardId
from edgemoa.errors import (
    EdgemoaError,
    ModelNotFoundError,
    NetworkError,
    OverloadedError,
    PeerError,
    ProtocolError,
)
from edgemoa.net import copies, tls, wire
from edgemoa.net.copies import (
    MAX_CONNECTIONS_EACH,
    FileIs,
    GetFile,
    GetManifest,
    GetModels,
    ManifestIs,
    Models,
    Offer,
    Ready,
    Refused,
)
from edgemoa.net.identity import load_identity, make_certificate
from edgemoa.net.pairing import identify

ID = "ab" * 32
DATA = os.urandom(3_000_000)


class Memory:
    """A shelf with one model, of one file. ``size`` is what it says of it."""

    def __init__(self, data: bytes = DATA, size: int | None = None) -> None:
        self.data = data
        self.size = len(data) if size is None else size

    def offers(self) -> list[Offer]:
        return [Offer("one", ID, self.size)]

    def manifest(self, model_id: str) -> bytes:
        self._check(model_id)
        return b"{}"

    def open(self, model_id: str, file: str) -> tuple[BinaryIO, int]:
        self._check(model_id)
        return io.BytesIO(self.data), self.size

    def _check(self, model_id: str) -> None:
        if model_id != ID:
            raise ModelNotFoundError("that model is not there")


ON_SHELF = Memory()


async def two(bed: Bed, shelf: copies.Shelf | None = None) -> tuple[Board, Board]:
    """ "a", which lends, and "b", paired and linked."""
    a = await bed.board("a", shelf=shelf or Memory(), timings=HASTY)
    b = await bed.board("b", seeds=(a.seed,), timings=HASTY)
    await until(lambda: a.linked(b) and b.linked(a))
    return a, b


async def fetched(board: Board, lender: BoardId, offset: int = 0) -> bytes:
    async with board.network.borrow(lender) as there:
        length, pieces = await there.file(ID, "weights.bin", offset)
        data = b"".join([piece async for piece in pieces])
        assert len(data) == length
        return data


def test_what_a_board_lends(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await two(bed)
        async with b.network.borrow(a.id) as there:
            assert await there.offers() == (Offer("one", ID, len(DATA)),)
            sock = there._connection.writer.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0x20  # behind messages
            assert await there.manifest(ID) == b"{}"
            for offset in (0, 1, 2_999_999, 3_000_000, 3_000_001, 2**48):  # one after another
                length, pieces = await there.file(ID, "weights.bin", offset)
                assert length == max(0, 3_000_000 - offset)
                assert b"".join([piece async for piece in pieces]) == DATA[offset:]
            for ask in (there.manifest("0" * 64), there.file("0" * 64, "weights.bin", 0)):
                with pytest.raises(PeerError, match="a: that model is not there"):
                    await ask
        assert a.network.lent_bytes == 3_000_000 + 2_999_999 + 1
        async with a.network.borrow(b.id) as there:
            assert await there.offers() == ()
            with pytest.raises(PeerError, match="b: this board lends no models"):
                await there.manifest(ID)

    run(tmp_path, test)


def test_messages_do_not_wait_behind_a_file(tmp_path: Path) -> None:
    """One that asks for a file and does not read it: what it is told beside it arrives, and the
    file is given up, so that another may ask."""

    async def test(bed: Bed) -> None:
        a, b = await two(bed, Memory(bytes(50_000_000)))
        async with b.network.borrow(a.id) as there:
            _, pieces = await there.file(ID, "weights.bin", 0)
            await anext(pieces)
            with pytest.raises(OverloadedError, match="lends to others") as told:
                await fetched(b, a.id)
            assert told.value.retry_after_s == 1
            a.network.send(b.id, small())
            await until(lambda: b.heard.messages == [(a.id, small())])
            await until(lambda: a.network.counters["the other board does not read"] == 1)
            with pytest.raises(NetworkError, match="a went away"):
                async for _ in pieces:
                    pass
        assert len(await fetched(b, a.id)) == 50_000_000
        assert a.linked(b)

    run(tmp_path, test)


def test_a_copy_leaves_half_of_the_event_loop_to_others(tmp_path: Path) -> None:
    """Both ends are in this one, and each rests for what the thread worked."""

    async def test(bed: Bed) -> None:
        a, b = await two(bed, Memory(bytes(50_000_000)))
        worked, began = time.thread_time(), time.monotonic()
        assert len(await fetched(b, a.id)) == 50_000_000
        share = (time.thread_time() - worked) / (time.monotonic() - began)
        assert 0.02 < share < 0.85  # without a rest it is 1; the machine may do other things, too

    run(tmp_path, test)


def test_questions_without_end_leave_the_processor_to_others(tmp_path: Path) -> None:
    """From all the connections that a board may have, without waiting for any answer."""

    class Library(Memory):
        """As many models as take a while to look through."""

        def offers(self) -> list[Offer]:
            until_ = time.thread_time() + 0.02
            while time.thread_time() < until_:
                pass
            return super().offers()

    async def test(bed: Bed) -> None:
        async with asking(bed, Library()) as connect:
            answers = 0

            async def listen(connection: tls.Connection) -> None:
                nonlocal answers
                connection.writer.write(packed(type="get_models") * 1000)
                while True:
                    await frame(connection)
                    answers += 1

            connections = [await connect() for _ in range(MAX_CONNECTIONS_EACH)]
            worked, began = time.process_time(), time.monotonic()
            tasks = [asyncio.create_task(listen(connection)) for connection in connections]
            await asyncio.sleep(1.5)
            share = (time.process_time() - worked) / (time.monotonic() - began)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert answers >= 3
            assert share < 0.7  # of one core; the other end is here, too

    run(tmp_path, test)


def test_questions_that_cost_nothing_have_a_pace_too(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async with asking(bed, None) as connect:
            connection = await connect()
            worked, began = time.thread_time(), time.monotonic()
            for _ in range(5):
                connection.writer.write(packed(type="get_manifest", model_id=ID) * 1000)
                answer = await frame(connection)
                assert b"lends no models" in answer
                await connection.reader.readexactly(999 * (wire.LENGTH_BYTES + len(answer)))
            assert (time.thread_time() - worked) / (time.monotonic() - began) < 0.75

    run(tmp_path, test)


def test_who_reads_a_trickle_does_not_keep_others_from_a_file(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async with asking(bed, Memory(bytes(50_000_000))) as connect:
            connection = await connect()
            sock = connection.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            connection.writer.write(packed(type="get_file", model_id=ID, file="w"))
            await frame(connection)
            a = bed.boards[0].network
            assert a._lender._lent
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while a._lender._lent and time.monotonic() - began < 6:
                    assert await connection.reader.read(2000)
                    await asyncio.sleep(0.05)  # a quarter of what is the least
            assert not a._lender._lent
            assert a.counters["the other board does not read"] == 1

    run(tmp_path, test)


def test_so_many_files_and_connections_at_a_time(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", shelf=Memory(bytes(20_000_000)))
        others = [await bed.board(n, seeds=(a.seed,)) for n in "bcd"]
        await until(lambda: a.linked(*others))
        async with contextlib.AsyncExitStack() as stack:
            for other in others[:2]:
                there = await stack.enter_async_context(other.network.borrow(a.id))
                _, pieces = await there.file(ID, "weights.bin", 0)
                await anext(pieces)
            with pytest.raises(OverloadedError):
                await fetched(others[2], a.id)
            for _ in range(MAX_CONNECTIONS_EACH):
                await stack.enter_async_context(others[2].network.borrow(a.id))
            with pytest.raises(NetworkError):
                await stack.enter_async_context(others[2].network.borrow(a.id))
            there = await stack.enter_async_context(others[1].network.borrow(a.id))
            assert await there.offers()

        async def lent() -> bool:
            with contextlib.suppress(OverloadedError):
                return len(await fetched(others[2], a.id)) == 20_000_000
            return False

        async with asyncio.timeout(10):
            while not await lent():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    run(tmp_path, test)


@pytest.mark.parametrize("who", ["lender", "borrower"])
def test_whoever_is_unpaired_is_cut_off(tmp_path: Path, who: str) -> None:
    async def test(bed: Bed) -> None:
        a, b = await two(bed, Memory(bytes(50_000_000)))
        async with b.network.borrow(a.id) as there:
            _, pieces = await there.file(ID, "weights.bin", 0)
            await anext(pieces)
            if who == "lender":
                await b.network.unpair(a.id, "test")
            else:
                await a.network.unpair(b.id, "test")
            with pytest.raises(NetworkError):
                async for _ in pieces:
                    pass
        with pytest.raises(EdgemoaError, match="not paired" if who == "lender" else "away|answer"):
            await fetched(b, a.id)

    run(tmp_path, test)


def test_strangers_get_nothing(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a = await bed.board("a", shelf=Memory(), timings=HASTY)
        stranger = await asyncio.to_thread(load_identity, tmp_path / "stranger")
        nameless = tls.make_contexts(stranger, []).stranger
        nameless.set_alpn_protocols([tls.COPIES])
        named = tls.make_contexts(stranger, [a.identity.certificate]).borrower
        for context in (nameless, named):
            heard = b""
            with contextlib.suppress(OSError):
                connection = await tls.dial(("127.0.0.1", a.network.port), context, 1.0)
                connection.writer.write(wire.framed(msgspec.msgpack.encode(GetModels())))
                heard = await connection.reader.read()
                connection.abort()
            assert heard == b""

    run(tmp_path, test)


# --- who asks wrongly


@contextlib.asynccontextmanager
async def asking(
    bed: Bed, shelf: copies.Shelf | None = ON_SHELF
) -> AsyncIterator[Callable[[], Awaitable[tls.Connection]]]:
    """Connections to a board that lends, made by hand by a paired one."""
    identity = await asyncio.to_thread(load_identity, bed.folder / "friend")
    a = await bed.board("a", trusts=(identity,), shelf=shelf, timings=HASTY)
    context = tls.make_contexts(identity, [a.identity.certificate]).borrower
    opened = []

    async def connect() -> tls.Connection:
        connection = await tls.dial(("127.0.0.1", a.network.port), context, 1.0)
        opened.append(connection)
        assert await frame(connection) == msgspec.msgpack.encode({"type": "ready"})
        return connection

    yield connect
    for connection in opened:
        connection.abort()


def packed(**fields: Any) -> bytes:
    return wire.framed(msgspec.msgpack.encode(fields))


def test_asked_by_hand(tmp_path: Path) -> None:
    """The path that the next test leaves; unknown fields are passed over."""

    async def test(bed: Bed) -> None:
        async with asking(bed) as connect:
            connection = await connect()
            ask = packed(type="get_file", model_id=ID, file="w", offset=2_999_990, later=1)
            connection.writer.write(ask)
            answer = msgspec.msgpack.decode(await frame(connection))
            assert answer == {"type": "file", "length": 10}
            assert await connection.reader.readexactly(10) == DATA[-10:]
            assert await closed(connection)  # who has nothing more to ask, in time

    run(tmp_path, test)


def test_questions_that_end_the_connection(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        good = {"type": "get_file", "model_id": ID, "file": "w", "offset": 0}
        async with asking(bed) as connect:
            for bad in (
                b"\xff\xff\xff\xff",
                b"\0\0\0\0",
                (1025).to_bytes(4) + bytes(1025),
                wire.framed(b"\xc1"),
                wire.framed(b"\x80"),
                wire.framed(msgspec.msgpack.encode(good) + b"\0"),
                packed(type="get_everything"),
                packed(type="ready"),
                packed(**good | {"model_id": ID.upper()}),
                packed(**good | {"model_id": ID + "\n"}),
                packed(**good | {"model_id": "../" + ID[3:]}),
                packed(**good | {"file": "../identity.pem"}),
                packed(**good | {"file": "/etc/passwd"}),
                packed(**good | {"file": ".."}),
                packed(**good | {"file": ""}),
                packed(**good | {"file": "w\n"}),
                packed(**good | {"file": "w\0"}),
                packed(**good | {"file": b"w"}),
                packed(**good | {"offset": -1}),
                packed(**good | {"offset": 2**63}),
                packed(**good | {"offset": True}),
                (100).to_bytes(4) + b"slow",
            ):
                connection = await connect()
                connection.writer.write(bad)
                assert await closed(connection), bad
                connection.abort()
            connection = await connect()  # and others are served
            connection.writer.write(packed(type="get_models"))
            answer = msgspec.msgpack.decode(await frame(connection))
            assert [model["name"] for model in answer["models"]] == ["one"]

    run(tmp_path, test)


@given(st.binary(max_size=200))
@example(b"\x81\xa4type\xd9\xff")
@example(b"\x91" * 199)
def test_any_bytes_are_a_question_or_an_answer_or_refused(data: bytes) -> None:
    decoders: tuple[msgspec.msgpack.Decoder[Any], ...] = (copies._asks, copies._answers)
    for decoder in decoders:
        for packet in (data, b"\x82\xa4type\xa8get_file" + data, b"\x82\xa4type\xa6models" + data):
            with contextlib.suppress(ProtocolError):
                envelope.decode(decoder, packet, "packet")


# --- who lends wrongly


@contextlib.asynccontextmanager
async def lending(
    bed: Bed, *said: bytes, then: str = "close", alpn: bool = True
) -> AsyncIterator[tuple[Board, BoardId]]:
    """A board, and the id of a paired one that says this to whoever wants to copy a model."""
    identity = await asyncio.to_thread(load_identity, bed.folder / "friend")
    b = await bed.board("b", trusts=(identity,), timings=HASTY)
    context = tls.make_contexts(identity, [b.identity.certificate]).server
    if not alpn:
        context.set_alpn_protocols([])
    tasks: set[asyncio.Task[None]] = set()

    async def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, EdgemoaError):
            connection = await tls.accept(sock, context, 1.0)
            try:
                for packet in said:
                    connection.writer.write(packet)
                if then == "stall":
                    await asyncio.sleep(30)
                while then == "trickle":
                    connection.writer.write(b"x")
                    await asyncio.sleep(0.02)
                await connection.close()
            finally:
                connection.abort()

    async def listen(listening: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listening)
            tasks.add(asyncio.create_task(serve(sock)))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        tasks.add(asyncio.create_task(listen(listening)))
        b.network._keepers[identity.board_id].cancel()  # no links: only copies are wanted
        b.network._found(identity.board_id, (listening.getsockname(),))
        try:
            yield b, identity.board_id
        finally:
            await asyncio.sleep(0.05)  # whose handshake has just ended goes on, to be closed
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def said(*answers: msgspec.Struct) -> list[bytes]:
    return [wire.framed(msgspec.msgpack.encode(answer)) for answer in answers]


OFFER = msgspec.to_builtins(Offer("one", ID, 1))


@pytest.mark.parametrize(
    ("words", "then", "error"),
    [
        ([], "close", NetworkError),
        ([], "stall", NetworkError),
        ([b"\xff\xff\xff\xff"], "stall", ProtocolError),
        ([b"\0\0\0\0"], "stall", ProtocolError),
        ([packed(type="hello")], "stall", ProtocolError),
        ([wire.framed(wire.hello_packet(wire.Hello((1, 1), 7, bytes(32), bytes(8), 9, "")))],
         "stall", ProtocolError),
        (said(Ready()), "stall", NetworkError),
        (said(Ready()), "close", NetworkError),
        (said(Ready(), Ready()), "stall", ProtocolError),
        (said(Ready(), ManifestIs(b"")), "stall", ProtocolError),
        (said(Ready(), Refused("no\x1b[2J")), "stall", PeerError),
        (said(Ready(), Refused("x" * 257)), "stall", ProtocolError),
        (said(Ready(), Refused("wait", 2**40)), "stall", OverloadedError),
        ([*said(Ready()), packed(type="models", models=[OFFER] * 257)], "stall", ProtocolError),
        *(
            ([*said(Ready()), packed(type="models", models=[OFFER | bad])], "stall", ProtocolError)
            for bad in (
                {"name": "../x"}, {"name": ""}, {"name": "x" * 65}, {"name": "x\n"}, {"name": 1},
                {"model_id": "x"}, {"model_id": ID + "0"}, {"size_bytes": -1},
                {"size_bytes": 2**48 + 1}, {"size_bytes": 1.5},
            )
        ),
    ],
)  # fmt: skip
def test_what_a_lender_may_not_say(
    tmp_path: Path, words: list[bytes], then: str, error: type[EdgemoaError]
) -> None:
    async def test(bed: Bed) -> None:
        async with lending(bed, *words, then=then) as (b, lender):
            with pytest.raises(error) as told:
                async with b.network.borrow(lender) as there:
                    await there.offers()
            assert type(told.value) is error
            assert str(told.value).isprintable()
            assert b.network._borrowed == 0

    run(tmp_path, test)


def test_a_refusal_never_asks_for_long(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async with lending(bed, *said(Ready(), Refused("wait", 2**40)), then="stall") as (b, id_):
            with pytest.raises(OverloadedError) as told:
                async with b.network.borrow(id_) as there:
                    await there.offers()
            assert told.value.retry_after_s == 60

    run(tmp_path, test)


@pytest.mark.parametrize("size", [64 << 10, (64 << 10) + 1, 256 << 10])
def test_a_manifest_has_a_bound(tmp_path: Path, size: int) -> None:
    async def test(bed: Bed) -> None:
        said_ = said(Ready(), ManifestIs(bytes(size)))
        async with lending(bed, *said_, then="stall") as (b, id_), b.network.borrow(id_) as there:
            if size == 64 << 10:
                assert len(await there.manifest(ID)) == size
            else:
                with pytest.raises(ProtocolError):
                    await there.manifest(ID)

    run(tmp_path, test)


def test_a_file_that_comes_in_single_bytes(tmp_path: Path) -> None:
    """Each comes in time, all together never would."""

    async def test(bed: Bed) -> None:
        words = said(Ready(), FileIs(2**48))
        async with (
            lending(bed, *words, then="trickle") as (b, lender),
            b.network.borrow(lender) as there,
        ):
            _, pieces = await there.file(ID, "weights.bin", 0)
            began, got = time.monotonic(), 0
            with pytest.raises(NetworkError, match="went away in the middle"):
                async for piece in pieces:
                    got += len(piece)
            assert 5 < got < 100
            assert time.monotonic() - began < 2

    run(tmp_path, test)


def test_who_takes_long_to_read_a_file_is_not_the_lenders_fault(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        words = said(Ready(), FileIs(60))
        async with (
            lending(bed, *words, then="trickle") as (b, lender),
            b.network.borrow(lender) as there,
        ):
            _, pieces = await there.file(ID, "weights.bin", 0)
            began, data = time.monotonic(), b""
            async for piece in pieces:
                await asyncio.sleep(0.2)
                data += piece
            assert data == b"x" * 60
            assert time.monotonic() - began > 2 * HASTY.write

    run(tmp_path, test)


@pytest.mark.parametrize("then", ["close", "stall"])
def test_a_file_that_does_not_come_to_its_end(tmp_path: Path, then: str) -> None:
    async def test(bed: Bed) -> None:
        words = [*said(Ready(), FileIs(2**48)), b"x" * 1000]
        async with (
            lending(bed, *words, then=then) as (b, lender),
            b.network.borrow(lender) as there,
        ):
            length, pieces = await there.file(ID, "weights.bin", 0)
            assert length == 2**48
            assert await anext(pieces) == b"x" * 1000
            with pytest.raises(NetworkError, match="went away in the middle"):
                await anext(pieces)

    run(tmp_path, test)


def test_a_file_that_does_not_end(tmp_path: Path) -> None:
    """What comes after what was announced is never taken for a part of it."""

    async def test(bed: Bed) -> None:
        words = [*said(Ready(), FileIs(10)), b"x" * 100_000]
        async with lending(bed, *words, then="stall") as (b, lender):
            assert await fetched(b, lender) == b"x" * 10

    run(tmp_path, test)


def test_a_board_of_before_copies(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async with lending(bed, then="stall", alpn=False) as (b, lender):
            with pytest.raises(PeerError, match="cannot lend models") as told:
                await fetched(b, lender)
            assert "upgrade" in told.value.hint

    run(tmp_path, test)


def test_another_board_at_its_address(tmp_path: Path) -> None:
    """The chain check passes for any paired board; which one it is, is looked at beside it."""

    async def test(bed: Bed) -> None:
        a, b = await two(bed)
        other = identify(make_certificate(Ed25519PrivateKey.generate()).public_bytes(Encoding.DER))
        await b.network._pair_with(other, (("127.0.0.1", a.network.port),))
        b.network._keepers[other.id].cancel()  # only what follows is to dial it
        with pytest.raises(NetworkError, match="does not answer"):
            await fetched(b, other.id)
        await until(lambda: not a.network._half_open)

    run(tmp_path, test)


def test_a_file_cut_short_under_way(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        a, b = await two(bed, Memory(size=len(DATA) + 1))
        with pytest.raises(NetworkError):
            await fetched(b, a.id)
        a.network._lender._shelf = Memory()
        assert await fetched(b, a.id) == DATA

    run(tmp_path, test)


def test_two_types_are_refused_whichever_comes_last() -> None:
    for first, last in (("get_models", "get_file"), ("get_file", "get_models")):
        pairs = b"".join(msgspec.msgpack.encode(x) for x in ("type", first, "type", last))
        with pytest.raises(ProtocolError, match="not a valid question"):
            envelope.decode(copies._asks, b"\x82" + pairs, "question")


@pytest.mark.parametrize("who", ["accepts", "dials"])
def test_who_is_cancelled_as_a_handshake_ends_closes_what_the_loop_watches(
    tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the loop takes the next connection, under the same descriptor, for this one."""
    identity = load_identity(tmp_path)
    contexts = tls.make_contexts(identity, [identity.certificate])
    made = asyncio.StreamReaderProtocol.connection_made

    async def test() -> None:
        loop: Any = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            dialling = asyncio.create_task(tls.dial(listening.getsockname(), contexts.stranger, 3))
            sock, _ = await loop.sock_accept(listening)
            accepting = asyncio.create_task(tls.accept(sock, contexts.server, 3))
            cancelled, other = (accepting, dialling) if who == "accepts" else (dialling, accepting)
            descriptors = []

            def made_(self: asyncio.StreamReaderProtocol, transport: Any) -> None:
                made(self, transport)
                if transport.get_extra_info("ssl_object").server_side == (who == "accepts"):
                    descriptors.append(transport.get_extra_info("socket").fileno())
                    cancelled.cancel()

            monkeypatch.setattr(asyncio.StreamReaderProtocol, "connection_made", made_)
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert descriptors[0] not in loop._selector.get_map()
            connection = await other
            assert await closed(connection, 0.3)
            connection.abort()
            await asyncio.sleep(0)

    asyncio.run(test())


def test_every_question_has_an_answer() -> None:
    """The types on the wire, as PROTOCOL.md names them."""
    tags = {kind.__struct_config__.tag for kind in (GetModels, GetManifest, GetFile)}
    assert tags == {"get_models", "get_manifest", "get_file"}
    answers = {kind.__struct_config__.tag for kind in (Ready, Models, ManifestIs, FileIs, Refused)}
    assert answers == {"ready", "models", "manifest", "file", "refused"}
