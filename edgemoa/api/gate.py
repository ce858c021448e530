"""The local API's part that says who belongs to the group: only for the user that the daemon runs
as, and for root. Others who may use the socket ask questions; they let nobody in or out.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Annotated, Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from edgemoa.api import openai
from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import PeerError, UserError

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_MAX_BODY_BYTES: Final = 4 * limits.KIB
T = TypeVar("T")
_Text = Annotated[str, msgspec.Meta(max_length=300)]


class Gate(Protocol):
    """What these routes need of the network."""

    def open_window(self) -> tuple[str, float]: ...
    def close_window(self) -> None: ...
    def window(self) -> dict[str, object]: ...
    async def join(self, text: str, address: str = "") -> object: ...
    async def accept(self, board: BoardId, address: str = "") -> object: ...
    async def rename(self, board: BoardId, name: str) -> None: ...
    async def unpair(self, board: BoardId, reason: str) -> None: ...


class _Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    code: _Text
    address: _Text = ""


class _Which(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: _Text
    address: _Text = ""
    name: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)] = ""


def routes(gate: Gate) -> list[web.RouteDef]:
    """The routes, to be added to an application."""

    async def open_window(http: web.Request) -> web.Response:
        _check_owner(http)
        code, seconds = gate.open_window()
        return _json({"code": code, "expires_in_s": round(seconds)})

    async def window(http: web.Request) -> web.Response:
        _check_owner(http)
        return _json(gate.window())

    async def close_window(http: web.Request) -> web.Response:
        _check_owner(http)
        gate.close_window()
        return _json(gate.window())

    async def join(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, _Join)
        return _json(await gate.join(asked.code, asked.address))

    async def accept(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, _Which)
        return _json(await gate.accept(_board(asked.id), asked.address))

    async def rename(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, _Which)
        await gate.rename(_board(asked.id), asked.name)
        return _json({"id": asked.id, "name": asked.name})

    async def revoke(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, _Which)
        await gate.unpair(_board(asked.id), "revoked here")
        return _json({"id": asked.id})

    return [
        web.post("/v1/pairing", open_window),
        web.get("/v1/pairing", window, allow_head=False),
        web.delete("/v1/pairing", close_window),
        web.post("/v1/pairing/join", join),
        web.post("/v1/devices/accept", accept),
        web.post("/v1/devices/rename", rename),
        web.post("/v1/devices/revoke", revoke),
    ]


def _check_owner(http: web.Request) -> None:
    connection = http.get_extra_info("socket")
    if connection is None:
        raise ConnectionResetError
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(data)
    if uid not in (0, os.geteuid()):
        raise web.HTTPForbidden(reason="only the user that edgemoa runs as may do this")


async def _body(http: web.Request, kind: type[T]) -> T:
    data = await http.content.read(_MAX_BODY_BYTES + 1)
    while 0 < len(data) <= _MAX_BODY_BYTES and (more := await http.content.readany()):
        data += more
    try:
        if len(data) > _MAX_BODY_BYTES:
            raise msgspec.ValidationError("it is too long")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Not what was sent: a code may be in it.
        text = "it is not JSON" if not isinstance(error, msgspec.ValidationError) else str(error)
        raise UserError(f"the request cannot be read: {text}", hint="see the README") from None


def _board(text: str) -> BoardId:
    try:
        return envelope.check_board_id(text)
    except PeerError as error:
        raise UserError(str(error), hint="see `edgemoa devices`") from None


def _json(value: Any) -> web.Response:
    return web.Response(body=openai.encode(value), content_type="application/json")
