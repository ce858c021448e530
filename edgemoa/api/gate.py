"""The local API's part that says who belongs to the group: only for the user that the daemon runs
as, and for root. Others who may use the socket ask questions; they let nobody in or out.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Annotated, Final, Protocol, TypedDict, TypeVar

import msgspec
from aiohttp import web

from edgemoa.api.answers import json_response
from edgemoa.api.arrivals import read_small
from edgemoa.api.routes import Route, ok
from edgemoa.api.service import Device
from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import NetworkError, PeerError, UserError

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_ERRORS: Final = (UserError, NetworkError, PeerError)
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


class Code(msgspec.Struct):
    code: str
    expires_in_s: int


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    code: _Text
    address: _Text = ""


class Which(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: _Text
    address: _Text = ""
    name: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)] = ""


class Renamed(msgspec.Struct):
    id: str
    name: str


class Revoked(msgspec.Struct):
    id: str


class Window(TypedDict):
    """How pairing by a code goes: whether it is open, for how long, who came, and why it is not."""

    open: bool
    left_s: int
    failures: int
    joined: list[str]
    closed: str


def routes(gate: Gate) -> list[Route]:
    """The routes, to be added to an application."""

    async def open_window(http: web.Request) -> web.Response:
        _check_owner(http)
        code, seconds = gate.open_window()
        return json_response(Code(code, round(seconds)))

    async def window(http: web.Request) -> web.Response:
        _check_owner(http)
        return json_response(gate.window())

    async def close_window(http: web.Request) -> web.Response:
        _check_owner(http)
        gate.close_window()
        return json_response(gate.window())

    async def join(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, Join)
        return json_response(await gate.join(asked.code, asked.address))

    async def accept(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, Which)
        return json_response(await gate.accept(_board(asked.id), asked.address))

    async def rename(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, Which)
        await gate.rename(_board(asked.id), asked.name)
        return json_response(Renamed(asked.id, asked.name))

    async def revoke(http: web.Request) -> web.Response:
        _check_owner(http)
        asked = await _body(http, Which)
        await gate.unpair(_board(asked.id), "revoked here")
        return json_response(Revoked(asked.id))

    return [
        Route(
            method="POST",
            path="/v1/pairing",
            handler=open_window,
            about="Let boards pair with this one by a code, for a while",
            told=ok("The code, told this once", Code),
            errors=_ERRORS,
        ),
        Route(
            method="GET",
            path="/v1/pairing",
            handler=window,
            about="How pairing by a code goes",
            told=ok("How", Window),
        ),
        Route(
            method="DELETE",
            path="/v1/pairing",
            handler=close_window,
            about="Let no more boards pair by the code",
            told=ok("How it went", Window),
        ),
        Route(
            method="POST",
            path="/v1/pairing/join",
            handler=join,
            about="Pair with the board that shows a code",
            asks=Join,
            told=ok("That board", Device),
            errors=_ERRORS,
        ),
        Route(
            method="POST",
            path="/v1/devices/accept",
            handler=accept,
            about="Trust a board by its identity",
            asks=Which,
            told=ok("That board", Device),
            errors=_ERRORS,
        ),
        Route(
            method="POST",
            path="/v1/devices/rename",
            handler=rename,
            about="Call a board by another name",
            asks=Which,
            told=ok("Its name", Renamed),
            errors=_ERRORS,
        ),
        Route(
            method="POST",
            path="/v1/devices/revoke",
            handler=revoke,
            about="Put a board out, everywhere",
            asks=Which,
            told=ok("It is out", Revoked),
            errors=_ERRORS,
        ),
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
    try:
        return msgspec.json.decode(await read_small(http), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Not what was sent: a code may be in it.
        text = "it is not JSON" if not isinstance(error, msgspec.ValidationError) else str(error)
        raise UserError(f"the request cannot be read: {text}", hint="see the README") from None


def _board(text: str) -> BoardId:
    try:
        return envelope.check_board_id(text)
    except PeerError as error:
        raise UserError(str(error), hint="see `edgemoa devices`") from None
