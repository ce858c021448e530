"""Models, lent from board to board: what one may ask, and what the other sends.

Each copy has a TLS connection of its own, on the port and with the authentication of links and
told from them by :data:`edgemoa.net.tls.COPIES`, so that no piece of a file ever stands before a
message. The board that is dialled lends, and speaks first; the other asks, one thing after another,
for the models that are there, for a model's manifest, and for a file of it from some offset on.
Models are asked for by id, a hash of what is in them: nothing is ever sent for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, BinaryIO, Final, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId, Millis, Name, Reason, printable
from edgemoa.errors import (
    EdgemoaError,
    NetworkError,
    OverloadedError,
    PeerError,
    ProtocolError,
)
from edgemoa.net import wire
from edgemoa.net.tls import Connection

log = logging.getLogger(__name__)

MAX_MODELS: Final = 256  # that one board tells of
MAX_MANIFEST_BYTES: Final = 64 * limits.KIB
MAX_FILE_BYTES: Final = 2**48
MAX_CONNECTIONS: Final = 16  # of boards that ask, together; more are closed at once
MAX_CONNECTIONS_EACH: Final = 4
MAX_LENT: Final = 2  # files sent at a time, to different boards; others are asked to come again
BUSY_MS: Final = 1000  # when to come again
LEAST_BYTES: Final = 64 * limits.KIB  # of a file in ``Timings.write``, or the copy is given up

_MAX_ASK_BYTES: Final = 1 * limits.KIB
_MAX_ANSWER_BYTES: Final = 256 * limits.KIB
_PIECE_BYTES: Final = LEAST_BYTES  # encrypted at a time; a slow board takes 2 ms for it
_READ_BYTES: Final = 4 * _PIECE_BYTES  # from the disk at a time
_WORK_S: Final = 0.002
_LONGEST_REST_S: Final = 1.0  # where a slow disk was waited for
_REST_S: Final = 0.01  # between two looks at the shelf, at least
_LOW_PRIORITY: Final = 0x20  # DSCP CS1: the background queue of Wi-Fi, behind all messages

ModelId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
ModelName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
FileName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]


class Offer(msgspec.Struct, frozen=True):
    """A model that a board lends: what it is called there, and what is in it."""

    name: ModelName
    model_id: ModelId
    size_bytes: Bytes
    quantization: Name = ""
    parameters: Bytes = 0


class GetModels(msgspec.Struct, frozen=True, tag="get_models"):
    """Which models are there? Answered by :class:`Models`."""


class GetManifest(msgspec.Struct, frozen=True, tag="get_manifest"):
    """Answered by :class:`ManifestIs`."""

    model_id: ModelId


class GetFile(msgspec.Struct, frozen=True, tag="get_file"):
    """Answered by :class:`FileIs` and then the file's bytes from ``offset`` on."""

    model_id: ModelId
    file: FileName
    offset: Bytes = 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The lender's first word: it knows who is there, and may be asked."""


class Models(msgspec.Struct, frozen=True, tag="models"):
    """What may be asked for now."""

    models: Annotated[tuple[Offer, ...], msgspec.Meta(max_length=MAX_MODELS)]


class ManifestIs(msgspec.Struct, frozen=True, tag="manifest"):
    """``model.json`` as it lies there. Whoever takes it checks it."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]


class FileIs(msgspec.Struct, frozen=True, tag="file"):
    """So many bytes of the file follow, and nothing between them; none from its end on."""

    length: Bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Not this; ``retry_after_ms`` says when it may be otherwise, 0 that it will not."""

    reason: Reason
    retry_after_ms: Millis = 0


Ask: TypeAlias = GetModels | GetManifest | GetFile
Answer: TypeAlias = Ready | Models | ManifestIs | FileIs | Refused

_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_A = TypeVar("_A", bound=msgspec.Struct)
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Shelf(Protocol):
    """The models that this board lends. Each of these may block, and is called in a thread; what
    they raise as :class:`EdgemoaError` the other board is told."""

    def offers(self) -> list[Offer]:
        """What is there, in the order of names."""

    def manifest(self, model_id: str) -> bytes:
        """The ``model.json`` of a model. :raises EdgemoaError: if it is not there."""

    def open(self, model_id: str, file: str) -> tuple[BinaryIO, int]:
        """A file that the model's manifest lists, and its size.

        :raises EdgemoaError: if there is no such model or file.
        """


class Pace:
    """Keeps a copy from taking the event loop for itself: it rests for as long as the loop's thread
    has worked, on the copy or on anything else. So it takes half of a core at most, less when there
    is other work, and lets others in every two milliseconds."""

    def __init__(self) -> None:
        self._since = time.thread_time()

    async def rest(self) -> None:
        """To be called after each piece."""
        worked = time.thread_time() - self._since
        if worked > _WORK_S:
            await asyncio.sleep(worked)
            self._since = time.thread_time()


class Lender:
    """The lending side of this board.

    :param shelf: what it lends; None lends nothing.
    """

    def __init__(self, shelf: Shelf | None, timings: wire.Timings) -> None:
        self._shelf = shelf
        self._timings = timings
        self._asking: Counter[BoardId] = Counter()
        self._lent: set[BoardId] = set()
        self._looking = asyncio.Lock()
        self._rested_at = 0.0
        self.lent_bytes = 0

    async def serve(self, connection: Connection, board: BoardId) -> None:
        """Answer a paired board until it leaves.

        :raises ProtocolError: if it does not keep to the protocol, or takes too long.
        :raises OSError, EOFError: if the connection ends.
        """
        if self._asking.total() >= MAX_CONNECTIONS or self._asking[board] >= MAX_CONNECTIONS_EACH:
            raise ProtocolError("too many connections of boards that copy models")
        self._asking[board] += 1
        try:
            background(connection)
            await self._say(connection, Ready())
            pace = Pace()
            while True:
                try:
                    async with asyncio.timeout(self._timings.frame):
                        packet = await wire.read_frame(
                            connection.reader, _MAX_ASK_BYTES, self._timings.frame
                        )
                except TimeoutError:
                    raise EOFError from None  # it has nothing more to ask
                await self._answer(connection, board, envelope.decode(_asks, packet, "question"))
                await pace.rest()
        finally:
            self._asking[board] -= 1

    async def _answer(self, connection: Connection, board: BoardId, ask: Ask) -> None:
        shelf = self._shelf
        try:
            match ask:
                case GetModels():
                    offers = await self._look(shelf.offers) if shelf else []
                    await self._say(connection, Models(tuple(offers[:MAX_MODELS])))
                case GetManifest(model_id=model_id) if shelf:
                    manifest = await self._look(shelf.manifest, model_id)
                    await self._say(connection, ManifestIs(manifest))
                case GetFile() if shelf:
                    await self._lend(connection, board, shelf, ask)
                case _:
                    await self._say(connection, Refused("this board lends no models"))
        except ProtocolError:
            raise
        except EdgemoaError as error:
            await self._say(connection, Refused(str(error)[: limits.MAX_REASON_BYTES]))

    async def _lend(
        self, connection: Connection, board: BoardId, shelf: Shelf, ask: GetFile
    ) -> None:
        if board in self._lent or len(self._lent) >= MAX_LENT:
            await self._say(connection, Refused("it lends to others now", BUSY_MS))
            return
        self._lent.add(board)
        try:
            stream, size = await self._look(shelf.open, ask.model_id, ask.file)
            with stream:
                left = max(0, size - ask.offset)
                stream.seek(ask.offset)
                await self._say(connection, FileIs(left))
                await self._send(connection, stream, left)
        finally:
            self._lent.discard(board)

    async def _look(self, see: Callable[_P, _R], *what: _P.args, **how: _P.kwargs) -> _R:
        """Look at the shelf, for one board after another: each look reads the manifests of all
        models, and then there is a rest that is as long. However many ask, it takes half a core."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            await asyncio.sleep(self._rested_at - loop.time())
            began = loop.time()
            try:
                return await asyncio.to_thread(see, *what, **how)
            finally:
                now = loop.time()
                self._rested_at = now + min(max(_REST_S, now - began), _LONGEST_REST_S)

    async def _send(self, connection: Connection, stream: BinaryIO, length: int) -> None:
        pace = Pace()
        while length:
            read = await asyncio.to_thread(_read, stream, min(length, _READ_BYTES))
            if not read:  # cut short since it was opened; the other board will see that it ends
                raise EOFError
            length -= len(read)
            for at in range(0, len(read), _PIECE_BYTES):
                piece = read[at : at + _PIECE_BYTES]
                await self._write(connection, piece)
                self.lent_bytes += len(piece)
                await pace.rest()

    async def _say(self, connection: Connection, answer: Answer) -> None:
        await self._write(connection, wire.framed(msgspec.msgpack.encode(answer)))

    async def _write(self, connection: Connection, data: bytes) -> None:
        """Send an answer, or a piece of :data:`LEAST_BYTES`: so each of these has its time."""
        connection.writer.write(data)
        try:
            async with asyncio.timeout(self._timings.write):
                await connection.writer.drain()
        except TimeoutError:
            raise ProtocolError("the other board does not read") from None


def _read(stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        log.warning("a file of a model cannot be read", extra={"cause": error.strerror})
        return b""


class Borrower:
    """The asking side of one connection; :meth:`greeted` first. What the other board says is for
    its user to check: here it is only bounded.

    Each method raises :class:`OverloadedError` if the other board asks to come again later,
    :class:`PeerError` if it refuses or does not keep to the protocol, and :class:`NetworkError` if
    it is gone.

    :param name: of the other board, for errors.
    """

    def __init__(self, connection: Connection, name: str, timings: wire.Timings) -> None:
        self._connection = connection
        self._name = name
        self._timings = timings

    async def greeted(self) -> None:
        """Wait until the other board may be asked."""
        background(self._connection)
        await self._hear(Ready)

    async def offers(self) -> tuple[Offer, ...]:
        """The models that are there."""
        models = (await self._ask(GetModels(), Models)).models
        return tuple(
            msgspec.structs.replace(model, quantization=printable(model.quantization))
            for model in models
        )

    async def manifest(self, model_id: str) -> bytes:
        """A model's ``model.json``, as it lies there."""
        return (await self._ask(GetManifest(model_id), ManifestIs)).manifest

    async def file(self, model_id: str, file: str, offset: int) -> tuple[int, AsyncIterator[bytes]]:
        """How many bytes of a file follow from ``offset`` on, and these bytes."""
        length = (await self._ask(GetFile(model_id, file, offset), FileIs)).length
        return length, self._pieces(length)

    async def _pieces(self, length: int) -> AsyncIterator[bytes]:
        pace, loop = Pace(), asyncio.get_running_loop()
        got, waited = 0, 0.0  # for the other board: not while ours is busy
        while length:
            with self._breaks():
                began = loop.time()
                async with asyncio.timeout(self._timings.write - waited):
                    piece = await self._connection.reader.read(min(length, _PIECE_BYTES))
                if not piece:
                    raise EOFError
            waited += loop.time() - began
            length -= len(piece)
            got += len(piece)
            if got >= LEAST_BYTES:
                got, waited = 0, 0.0
            yield piece
            await pace.rest()

    async def _ask(self, ask: Ask, answer: type[_A]) -> _A:
        self._connection.writer.write(wire.framed(msgspec.msgpack.encode(ask)))
        return await self._hear(answer)

    async def _hear(self, expected: type[_A]) -> _A:
        with self._breaks():
            async with asyncio.timeout(self._timings.write):
                packet = await wire.read_frame(
                    self._connection.reader, _MAX_ANSWER_BYTES, self._timings.write
                )
        answer: Any = envelope.decode(_answers, packet, "answer")
        if isinstance(answer, Refused):
            reason = f"{self._name}: {printable(answer.reason)}"
            if answer.retry_after_ms:
                seconds = max(1, min(60, -(-answer.retry_after_ms // 1000)))
                raise OverloadedError(
                    reason, hint=f"try again in {seconds} s", retry_after_s=seconds
                )
            raise PeerError(reason, hint="see what it holds: edgemoa model list --remote")
        if not isinstance(answer, expected):
            raise ProtocolError(f"{self._name} answers something else than it was asked")
        return answer

    @contextlib.contextmanager
    def _breaks(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:  # a time limit is an OSError, too
            raise NetworkError(
                f"{self._name} went away in the middle", hint="is it on, and on this network?"
            ) from error


def background(connection: Connection) -> None:
    """Let messages overtake this connection's packets where the network knows of priorities."""
    writer = connection.writer
    writer.transport.set_write_buffer_limits(high=2 * _PIECE_BYTES)
    sock = writer.get_extra_info("socket")
    for level, option in (
        (socket.IPPROTO_IP, socket.IP_TOS),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    ):
        with contextlib.suppress(OSError):  # of the other kind of IP
            sock.setsockopt(level, option, _LOW_PRIORITY)
