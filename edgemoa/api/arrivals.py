"""Requests on their way in: whose they are, the memory that they take until they are accepted or
refused, and what the model has to say of a prompt before that.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from edgemoa.api.service import Service
from edgemoa.core import limits
from edgemoa.core.events import Given
from edgemoa.core.messages import ChatMessage
from edgemoa.errors import EngineError, OverloadedError, UserError

SMALL_BYTES: Final = 4 * limits.KIB  # of a body that holds no prompt
READ_S: Final = 30.0  # for a request to arrive
MEASURE_S: Final = 60.0  # for its tokens to be counted; the model may still be loading

OWNER: Final = web.RequestKey("owner", str)
"""Whose request it is, where a key or the way in says so."""
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


def peer(http: web.Request) -> tuple[str, str]:
    """Whose request it is, and which application asks: user and process, as the kernel knows them,
    or the key that was shown."""
    if (owner := http.get(OWNER)) is not None:
        return owner, owner
    connection = http.get_extra_info("socket")
    if connection is None:
        raise ConnectionResetError
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return str(uid), f"{uid}:{pid}"


async def read_small(http: web.Request) -> bytes:
    """A body that holds no prompt.

    :raises UserError: it is too long, or does not arrive in time.
    """
    body = b""
    try:
        async with asyncio.timeout(READ_S):
            while more := await http.content.readany():
                body += more
                if len(body) > SMALL_BYTES:
                    raise UserError("the request is too long", hint="send less")
    except TimeoutError:
        raise UserError("the request did not arrive in time", hint="send it faster") from None
    return body


@dataclass(slots=True)
class _Room:
    """Bytes for requests that are neither accepted nor refused yet; then the board counts them."""

    most_bytes: int
    taken_bytes: int = 0


class Place:
    """One request's part of the room, until it is left."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._bytes = 0

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.taken_bytes -= self._bytes

    def take(self, size: int) -> None:
        """Have ``size`` bytes in all. One request alone has room, whatever its size.

        :raises OverloadedError: they are not to be had beside those of others.
        """
        others = self._room.taken_bytes - self._bytes
        if others and others + size > self._room.most_bytes:
            raise OverloadedError(
                "the requests that arrive take up all the memory there is for them",
                hint="try again in 1 s",
            )
        self._room.taken_bytes = others + size
        self._bytes = size


class Arrivals:
    """The bounds that all requests on their way in share.

    :param most_bytes: that they may take, all together.
    """

    def __init__(self, service: Service, most_bytes: int) -> None:
        self._service = service
        self._room = _Room(most_bytes)
        self._measuring: set[asyncio.Future[int]] = set()
        self._checking = 0  # of these, with a schema that is still being checked

    def stop(self) -> None:
        """Nobody waits for what is being counted any longer."""
        for counting in self._measuring:
            counting.cancel()

    def place(self) -> Place:
        """Room for one request, to be entered and left."""
        return Place(self._room)

    async def read(self, http: web.Request, place: Place) -> bytes:
        """The body, whose bytes are given room before they are read, or at least as they come.

        :raises UserError: it does not arrive in time.
        :raises OverloadedError: there is no room for it.
        """
        body = bytearray()
        size = http.content_length or 0  # of one that is encoded, the least
        try:
            async with asyncio.timeout(READ_S):
                while True:
                    if size > limits.MAX_BODY_BYTES:
                        raise web.HTTPRequestEntityTooLarge(limits.MAX_BODY_BYTES, size)
                    place.take(size)
                    piece = await http.content.readany()
                    if not piece:
                        return bytes(body)
                    body += piece
                    size = max(size, len(body))
        except TimeoutError:
            raise UserError("the request did not arrive in time", hint="send it faster") from None

    async def measure(
        self, messages: tuple[ChatMessage, ...], schema: str = "", given: Given = "turns"
    ) -> int:
        """Count a prompt's tokens, and see that the schema, if there is one, can be obeyed; few
        prompts at a time, and only if it could be accepted.

        A prompt given to the model process stays there until it has been counted, also when its
        client has left meanwhile; so it is that which is bounded, not the clients.
        """
        if len(self._measuring) >= limits.MAX_MEASURING:
            raise OverloadedError("too many prompts arrive at a time", hint="try again in 1 s")
        if schema and self._checking >= limits.MAX_CHECKING:
            raise OverloadedError("too many schemas arrive at a time", hint="try again in 1 s")
        self._checking += bool(schema)
        counting = asyncio.ensure_future(self._check(messages, schema, given))
        self._measuring.add(counting)
        counting.add_done_callback(self._measured)
        done, _ = await asyncio.wait({counting}, timeout=MEASURE_S)
        if not done:
            raise EngineError("the model is not ready yet", hint="try again in a moment")
        return counting.result()

    async def _check(self, messages: tuple[ChatMessage, ...], schema: str, given: Given) -> int:
        if schema:
            try:
                await self._service.check_schema(schema)
            finally:
                self._checking -= 1
        return await self._service.measure(messages, given)

    def _measured(self, counting: asyncio.Future[int]) -> None:
        self._measuring.discard(counting)
        if not counting.cancelled():
            counting.exception()  # whoever still waits is told; nobody else needs to be
