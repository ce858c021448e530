"""The local API's server: aiohttp on a Unix socket.

It lets in who may ask, hands each request to its route, and turns errors into responses. It knows
the board only through :class:`Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from edgemoa.api import catalog, doors, metrics, ollama, openai
from edgemoa.api.answers import encode, json_response
from edgemoa.api.arrivals import OWNER
from edgemoa.api.doors import Door
from edgemoa.api.gate import Gate
from edgemoa.api.gate import routes as gate_routes
from edgemoa.api.prompts import Prompts
from edgemoa.api.routes import JSON, Parameter, Route, Told, document, ok
from edgemoa.api.service import Devices, PeerModels, Service, Status
from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId
from edgemoa.errors import (
    AddressInUseError,
    ConfigError,
    EdgemoaError,
    NetworkError,
    NotFoundError,
    OverloadedError,
    PeerError,
    StateError,
    UserError,
)

log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 2.0
READ_AHEAD_BYTES: Final = 16 * limits.KIB  # of a connection, before anybody asked for them
COPY_S: Final = 10.0  # for a client to take a piece of a copied file, of 64 KiB
REFUSED_S: Final = 0.5  # for one connection too many to ask for something
SILENT_S: Final = 20.0  # for a connection to ask for something
TCP_BACKLOG: Final = 128
_OPEN: Final = frozenset({"/", "/healthz", "/readyz"})  # tell nothing, and need no key
MAX_OFFSET: Final = 2**48  # that boards may name to each other

_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # as boards may name one
_MODEL_ID: Final = re.compile(r"[0-9a-f]{64}")
_PEER_MODEL: Final = "/v1/peers/{board}/models/{model_id}"
_BYTES: Final = "application/octet-stream"
DOCUMENT: Final = "/openapi.json"


class Api:
    """The listening side. ``start`` and ``stop`` once each.

    :param arriving_bytes: that requests may take, all together, until they are accepted or refused.
    :param listening: what to take connections from, if somebody else made it and keeps it.
    """

    def __init__(
        self,
        service: Service,
        path: Path,
        mode: int,
        arriving_bytes: int = 8 * limits.MIB,
        *,
        gate: Gate | None = None,
        door: Door | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        self._service = service
        self._gate = gate
        self._door = door
        self._listening = listening
        self._tcp: asyncio.Server | None = None
        self._prompts = Prompts(service, arriving_bytes)
        self._path = path
        self._mode = mode
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._silent: dict[web.RequestHandler, float] = {}  # since when they ask for nothing
        self._spoke: set[web.RequestHandler] = set()
        self._inode = 0
        self._copying: set[asyncio.Transport] = set()

    async def start(self) -> None:
        """Listen.

        :raises AddressInUseError: another daemon has the socket.
        :raises ConfigError, StateError: the path cannot be used.
        """
        app = web.Application(middlewares=[self._guard], client_max_size=limits.MAX_BODY_BYTES)
        app.router.add_routes([route.served() for route in self.routes()])
        http_log = logging.getLogger("aiohttp.server")
        http_log.addFilter(_IS_OURS)
        self._runner = web.AppRunner(
            app,
            logger=http_log,
            access_log=None,
            handler_cancellation=True,  # a client that goes away frees what works for it
            shutdown_timeout=STOP_GRACE_S,
            read_bufsize=READ_AHEAD_BYTES,
            max_line_size=8 * limits.KIB,
            max_field_size=8 * limits.KIB,
        )
        await self._runner.setup()
        if self._listening is None:
            made = await asyncio.to_thread(_listen, self._path, self._mode)
            self._listening, self._inode = made
        loop = asyncio.get_running_loop()
        # Of asyncio's clients, those that the backlog has no room for think that they are in. And
        # create_unix_server would take the socket's file away in the end, whoever made it.
        self._server = await loop.create_server(
            self._protocol, sock=self._listening, backlog=limits.MAX_API_CONNECTIONS
        )
        if self._door is not None:
            await self._listen_tcp(self._door)
        self._watching = loop.call_later(SILENT_S / 2, self._end_silent)

    def routes(self) -> list[Route]:
        """All that is served."""
        found = [
            *self._prompts.routes(),
            *catalog.routes(self._service),
            *self._board_routes(),
            *(gate_routes(self._gate) if self._gate is not None else ()),
        ]

        async def described(_: web.Request) -> web.Response:
            return web.Response(body=text, content_type=JSON)

        about = "This document"
        told = {200: Told(about, {JSON: dict[str, Any]})}
        found.append(Route(method="GET", path=DOCUMENT, handler=described, about=about, told=told))
        text = encode(document(found))
        return found

    def _board_routes(self) -> list[Route]:
        text: dict[str, Any] = {"text/plain": None}
        board = Parameter(
            "board", "path", "its id, as in `edgemoa devices`", {"type": "string", "minLength": 1}
        )
        model = Parameter(
            "model_id",
            "path",
            "SHA-256 of the model",
            {"type": "string", "pattern": f"^{_MODEL_ID.pattern}$"},
        )
        return [
            Route(
                method="GET",
                path="/v1/status",
                handler=self._status,
                about="Queue, bounds, peers, counters, engine and its speed",
                told=ok("The board's state", Status),
                head=True,
            ),
            Route(
                method="GET",
                path="/v1/devices",
                handler=self._devices,
                about="Every board that is paired, or was seen and is not",
                told=ok("The boards", Devices),
                head=True,
            ),
            Route(
                method="GET",
                path="/v1/peers/models",
                handler=self._peer_models,
                about="Which models paired boards lend",
                told=ok("The models, by board", PeerModels),
            ),
            Route(
                method="GET",
                path=_PEER_MODEL,
                handler=self._peer_manifest,
                about="What a lent model is made of",
                told=ok("Its manifest, as that board sends it", dict[str, Any]),
                parameters=[board, model],
                errors=(UserError, NotFoundError, NetworkError, PeerError),
            ),
            Route(
                method="GET",
                path=_PEER_MODEL + "/{file}",
                handler=self._peer_file,
                about="A file of a lent model",
                told={
                    200: Told("All of it", {_BYTES: None}),
                    206: Told("From there on", {_BYTES: None}, {"Content-Range": "which part"}),
                },
                parameters=[
                    board,
                    model,
                    Parameter(
                        "file",
                        "path",
                        "its name",
                        {"type": "string", "pattern": f"^{_FILE.pattern}$"},
                    ),
                    Parameter(
                        "Range",
                        "header",
                        "from which byte on",
                        {"type": "string", "pattern": "^bytes=[0-9]{1,15}-$"},
                    ),
                ],
                errors=(
                    *(UserError, NotFoundError, NetworkError, PeerError),
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE.value,
                ),
            ),
            Route(
                method="GET",
                path="/healthz",
                handler=self._health,
                about="Whether the daemon lives",
                told={200: Told("It does", text)},
                head=True,
            ),
            Route(
                method="GET",
                path="/readyz",
                handler=self._ready,
                about="Whether it takes prompts",
                told={200: Told("It does", text), 503: Told("Why not", text)},
                head=True,
            ),
            Route(
                method="GET",
                path="/metrics",
                handler=self._metrics,
                about="The board's state, for Prometheus",
                told={200: Told("In its text format", text)},
                head=True,
            ),
        ]

    async def _listen_tcp(self, door: Door) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._tcp = await loop.create_server(
                self._protocol, door.host, door.port, ssl=door.tls, backlog=TCP_BACKLOG
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"{door.host} port {door.port} is in use",
                    hint="is Ollama or another edgemoa running? set api.listen to another port",
                ) from error
            raise ConfigError(
                f"cannot listen on {door.host} port {door.port}: {error.strerror}",
                hint="api.listen must be an address of this machine; ports under 1024 need"
                " privileges",
            ) from error
        port = self._tcp.sockets[0].getsockname()[1]
        log.info("listening for applications", extra={"host": door.host, "port": port})

    async def stop(self) -> None:
        """Stop listening, let running answers end within a moment, remove the socket."""
        if self._watching is not None:
            self._watching.cancel()
        for server in (self._server, self._tcp):
            if server is not None:
                server.close()
        self._prompts.stop()
        for transport in self._copying:
            transport.abort()  # a copy takes long, and goes on where it was
        if self._runner is not None:
            await self._runner.cleanup()
        if self._inode:
            await asyncio.to_thread(_remove_own, self._path, self._inode)

    def _protocol(self) -> asyncio.BaseProtocol:
        assert self._runner is not None  # noqa: S101 - it was set up before anybody could come
        server = self._runner.server
        if server is None or len(server.connections) >= limits.MAX_API_CONNECTIONS:
            return _Refused()
        return server()

    def _end_silent(self) -> None:
        """Part with connections that never asked for anything: they take others' places."""
        loop = asyncio.get_running_loop()
        self._watching = loop.call_later(SILENT_S / 2, self._end_silent)
        server = self._runner.server if self._runner is not None else None
        there = set(server.connections if server is not None else ())
        self._spoke &= there
        now = loop.time()
        self._silent = {each: self._silent.get(each, now) for each in there - self._spoke}
        for protocol, since in self._silent.items():
            if now - since >= SILENT_S and protocol.transport is not None:
                protocol.transport.abort()

    async def _admit(self, http: web.Request) -> None:
        """Who asks over TCP has to show a key, and not be a web page.

        :raises ForbiddenError, UnauthorizedError: it may not ask.
        """
        door, connection = self._door, http.get_extra_info("socket")
        if door is None or connection is None or connection.family == socket.AF_UNIX:
            return
        doors.check_origin(http.host, http.headers.get("Origin"), door.names)
        if door.keys is None:
            http[OWNER] = "tcp"
        elif http.path not in _OPEN:
            key = doors.shown_key(http.headers.items())
            http[OWNER] = f"key:{await asyncio.to_thread(door.keys.who, key)}"

    # --- handlers

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._spoke.add(request.protocol)
            await self._admit(request)
            return await handler(request)
        except EdgemoaError as error:
            return _error(request, error)
        except web.HTTPRequestEntityTooLarge:
            text = f"the request is larger than {limits.MAX_BODY_BYTES} bytes"
            return _error(request, UserError(text, hint="send less"), 413)
        except web.HTTPException as error:
            refused = UserError(f"{request.method} {request.path}: {error.reason}")
            return _error(request, refused, error.status, error.headers.get("Allow"))
        except web.RequestPayloadError:
            refused = UserError("the request's body cannot be read", hint="is it encoded?")
            return _error(request, refused)
        except ConnectionError:  # the client left: as when aiohttp is the first to notice
            raise asyncio.CancelledError from None
        except Exception:
            log.exception("a request failed", extra={"path": request.path})
            defect = EdgemoaError("something went wrong in edgemoa", hint="see its log")
            return _error(request, defect)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        """Whether a prompt that came now would be worked on."""
        status = self._service.status()
        if status["draining"]:
            return web.Response(text="shutting down\n", status=503)
        if not status["ready"]:
            return web.Response(text="the model is not loaded\n", status=503)
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        text = await asyncio.to_thread(metrics.exposition, self._service.status())
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _status(self, _: web.Request) -> web.Response:
        return json_response(self._service.status())

    async def _devices(self, _: web.Request) -> web.Response:
        return json_response(Devices(self._service.devices()))

    async def _peer_models(self, _: web.Request) -> web.Response:
        return json_response(await self._service.peer_models())

    async def _peer_manifest(self, http: web.Request) -> web.Response:
        board, model_id = _peer_model(http)
        manifest = await self._service.peer_manifest(board, model_id)
        return web.Response(body=manifest, content_type="application/json")

    async def _peer_file(self, http: web.Request) -> web.StreamResponse:
        """A file of a paired board's model; with ``Range: bytes=N-`` from there on. What it should
        be is for the client to know, and to check; here it only passes through."""
        board, model_id = _peer_model(http)
        file, offset = http.match_info["file"], _offset(http)
        if not _FILE.fullmatch(file):
            raise UserError("no file of a model is called that", hint="its manifest lists them")
        async with self._service.peer_file(board, model_id, file, offset) as (length, pieces):
            if offset and not length:
                raise web.HTTPRequestRangeNotSatisfiable
            response = web.StreamResponse(headers={"Content-Type": _BYTES})
            response.content_length = length
            if offset:
                end = offset + length
                response.set_status(206)
                response.headers["Content-Range"] = f"bytes {offset}-{end - 1}/{end}"
            with self._copies(http) as transport:
                await response.prepare(http)
                try:
                    async for piece in pieces:
                        async with asyncio.timeout(COPY_S):
                            await response.write(piece)
                    async with asyncio.timeout(COPY_S):
                        await response.write_eof()
                except (EdgemoaError, TimeoutError) as error:
                    # The status has been sent: that the body is too short says the rest.
                    reason = str(error) or "the client does not read"
                    log.info("a copy from another board broke off", extra={"reason": reason})
                    transport.abort()
            return response

    @contextlib.contextmanager
    def _copies(self, http: web.Request) -> Iterator[asyncio.Transport]:
        """Notes the connection that a copy goes to, for :meth:`stop`."""
        transport = http.transport
        if transport is None:
            raise ConnectionResetError
        self._copying.add(transport)
        try:
            yield transport
        finally:
            self._copying.discard(transport)


class _Refused(asyncio.Protocol):
    """What a connection gets that is one too many, whatever it asks for: why, and little time."""

    _transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Told at once."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream socket
        error = OverloadedError(
            "too many connections", hint="close some, or try again", retry_after_s=1
        )
        body = encode(openai.error_json(error))
        head = (
            f"HTTP/1.1 {error.http_status} Too Many Requests\r\nContent-Type: {JSON}\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
        )
        transport.write(head.encode() + body)
        self._transport = transport
        asyncio.get_running_loop().call_later(REFUSED_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Closed once it has asked: before, it could not hear the answer for its own talking."""
        self._transport.close()


class _IsOurs(logging.Filter):
    """Anybody may send what is not HTTP, as often as they like; that is for them to hear."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it says something of this program."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


_IS_OURS: Final = _IsOurs()


def _peer_model(http: web.Request) -> tuple[BoardId, str]:
    try:
        board = envelope.check_board_id(http.match_info["board"])
    except PeerError as error:
        raise UserError(str(error), hint="see `edgemoa devices`") from None
    model_id = http.match_info["model_id"]
    if not _MODEL_ID.fullmatch(model_id):
        raise NotFoundError("no model has that id", hint="see /v1/peers/models")
    return board, model_id


def _offset(http: web.Request) -> int:
    try:
        wanted = http.http_range
    except ValueError:
        raise web.HTTPRequestRangeNotSatisfiable from None
    if wanted.stop is not None or (wanted.start or 0) < 0:
        raise UserError("only ranges to the end are served", hint="Range: bytes=N-")
    offset = wanted.start or 0
    if offset > MAX_OFFSET:
        raise web.HTTPRequestRangeNotSatisfiable
    return offset


def _error(
    http: web.Request, error: EdgemoaError, status: int = 0, allow: str | None = None
) -> web.Response:
    """An error, in the shape of the one who asks; ``allow`` are methods that would do."""
    shape = ollama if http.path.startswith("/api/") else openai
    headers = openai.error_headers(error) | ({"Allow": allow} if allow else {})
    return json_response(shape.error_json(error), status or error.http_status, headers)


def _listen(path: Path, mode: int) -> tuple[socket.socket, int]:
    """A listening socket at ``path`` with ``mode`` from its first instant on, and its inode."""
    if len(os.fsencode(path)) > 107:  # sun_path of Linux, less its closing zero
        raise ConfigError(
            f"the socket path {path} is longer than the 107 bytes that Linux allows",
            hint="set api.socket to a shorter one",
        )
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        _remove_stale(path)
        umask = os.umask(0o777 & ~mode)
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(umask)
        listening.listen(limits.MAX_API_CONNECTIONS)
        listening.setblocking(False)
    except BaseException as error:
        listening.close()
        if not isinstance(error, OSError):
            raise
        if error.errno == errno.EADDRINUSE:
            raise _in_use(path) from error
        raise StateError(
            f"cannot listen on {path}: {error.strerror}",
            hint="set api.socket to a path that this user may write",
        ) from error
    return listening, path.stat().st_ino


def _remove_own(path: Path, inode: int) -> None:
    """Take the socket away, unless another daemon has put its own there meanwhile."""
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def _remove_stale(path: Path) -> None:
    """Take away a socket file that nobody listens on, as a crash leaves it."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AddressInUseError(
                f"{path} exists and is not a socket", hint="remove it or set api.socket"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            log.info("removed a stale socket", extra={"path": str(path)})
            return
        except (BlockingIOError, TimeoutError):
            pass  # somebody listens, and is busy
    raise _in_use(path)


def _in_use(path: Path) -> AddressInUseError:
    return AddressInUseError(
        f"another edgemoa listens on {path}", hint="stop it, or set api.socket to another path"
    )
