"""The local API's server: aiohttp on a Unix socket.

It knows the board only through :class:`Service`. A request is answered with an HTTP status as
long as nothing of the answer has been sent; after that an error travels in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from edgemoa.api import doors, metrics, openai, requests
from edgemoa.api.doors import Door
from edgemoa.api.gate import Gate, routes
from edgemoa.core import envelope, limits
from edgemoa.core.events import (
    Accepted,
    Answered,
    Failed,
    Request,
    RequestEvent,
    Text,
    TokenLogprob,
)
from edgemoa.core.messages import BoardId, ChatMessage
from edgemoa.desk import Prompt, Ticket
from edgemoa.errors import (
    AddressInUseError,
    BoardError,
    ConfigError,
    DeadlineError,
    EdgemoaError,
    EngineError,
    NotFoundError,
    OverloadedError,
    PeerError,
    PromptTooLongError,
    SchemaError,
    StateError,
    UserError,
)

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 10.0  # a stream says something at least so often, or clients give up
STOP_GRACE_S: Final = 2.0
READ_S: Final = 30.0  # for a request to arrive
READ_AHEAD_BYTES: Final = 16 * limits.KIB  # of a connection, before anybody asked for them
TAKE_S: Final = 60.0  # for a client to take a part of its answer; what is written waits in memory
MEASURE_S: Final = 60.0  # for its tokens to be counted; the model may still be loading

COPY_S: Final = 10.0  # for a client to take a piece of a copied file, of 64 KiB
SILENT_S: Final = 20.0  # for a connection to ask for something
TCP_BACKLOG: Final = 128
_OPEN: Final = frozenset({"/healthz", "/readyz"})  # tell nothing, and need no key
_OWNER: Final = web.RequestKey("owner", str)
MAX_OFFSET: Final = 2**48  # that boards may name to each other

_CREDENTIALS: Final = struct.Struct("3i")  # pid, owner, gid
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # as boards may name one
_PEER_MODEL: Final = "/v1/peers/{board}/models/{model_id:[0-9a-f]{64}}"
_PEER_FILE: Final = _PEER_MODEL + "/{file:[^/]{1,128}}"


class Service(Protocol):
    """What the API needs of the board."""

    def plan(self) -> tuple[int, int, int, int]:
        """The configured (layers, proposers, max_tokens, deadline_ms)."""

    def own_model(self) -> tuple[str, int]:
        """Name and context, in tokens, of this board's model."""

    def refusal(self) -> Failed | None:
        """Why a prompt that comes now is refused unread, which counts; None if it may come in."""

    async def measure(self, messages: tuple[ChatMessage, ...]) -> int:
        """How many tokens the model counts.

        :raises EngineError: the model is not there now.
        """

    async def check_schema(self, schema: str) -> None:
        """See that an answer can be held to this JSON schema.

        :raises UserError: it cannot.
        :raises EngineError: none can, or not now.
        """

    def new_request_id(self) -> str:
        """A name for a prompt, never used before."""

    async def take(self, prompt: Prompt) -> str | Failed:
        """See :meth:`edgemoa.desk.Desk.take`."""

    def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        """See :meth:`edgemoa.desk.Desk.follow`."""

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        """See :meth:`edgemoa.desk.Desk.find`."""

    def unfinished(self, owner: str) -> list[Ticket]:
        """See :meth:`edgemoa.desk.Desk.unfinished`."""

    async def forget(self, request_id: str, owner: str) -> bool:
        """See :meth:`edgemoa.desk.Desk.forget`."""

    def status(self) -> dict[str, Any]:
        """The board's state, for people and scripts."""

    def devices(self) -> list[dict[str, Any]]:
        """Every board known: paired, or seen and not paired."""

    async def peer_models(self) -> dict[str, Any]:
        """What paired boards lend, and where this board keeps its own models."""

    async def peer_manifest(self, board: BoardId, model_id: str) -> bytes:
        """The manifest of a paired board's model, as that board sends it.

        :raises EdgemoaError: it is not to be had.
        """

    def peer_file(
        self, board: BoardId, model_id: str, file: str, offset: int
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """How many bytes of such a model's file there are from ``offset`` on, and these bytes.

        :raises EdgemoaError: it is not to be had, or ends in the middle.
        """


def failure(failed: Failed) -> EdgemoaError:
    """The core's word for a prompt's bad end, as an error."""
    if failed.code == "overloaded":
        seconds = max(1, -(-failed.retry_after_ms // 1000))
        return OverloadedError(
            failed.reason,
            hint=f"try again in {seconds} s",
            retry_after_s=seconds,
            position=failed.position,
        )
    if failed.code == "schema_failed":
        return SchemaError(failed.reason, hint="use a simpler schema, or none")
    kinds: dict[str, type[EdgemoaError]] = {
        "context_length_exceeded": PromptTooLongError,
        "engine_failed": EngineError,
        "deadline_exceeded": DeadlineError,
    }
    return kinds.get(failed.code, BoardError)(failed.reason)


class Api:
    """The listening side. ``start`` and ``stop`` once each.

    :param arriving_bytes: that requests may take, all together, until they are accepted or refused.
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
    ) -> None:
        self._service = service
        self._gate = gate
        self._door = door
        self._tcp: asyncio.Server | None = None
        self._room = _Room(arriving_bytes)
        self._path = path
        self._mode = mode
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._silent: dict[web.RequestHandler, float] = {}  # since when they ask for nothing
        self._spoke: set[web.RequestHandler] = set()
        self._inode = 0
        self._measuring: set[asyncio.Future[int]] = set()
        self._checking = 0  # of these, with a schema that is still being checked
        self._copying: set[asyncio.Transport] = set()

    async def start(self) -> None:
        """Listen.

        :raises AddressInUseError: another daemon has the socket.
        :raises ConfigError, StateError: the path cannot be used.
        """
        app = web.Application(middlewares=[self._guard], client_max_size=limits.MAX_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post(requests.PATH, self._leave_prompt)
        app.router.add_get(requests.PATH, self._unfinished)
        app.router.add_get(requests.PATH + "/{id}", self._find_prompt, allow_head=False)
        app.router.add_delete(requests.PATH + "/{id}", self._forget_prompt)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/devices", self._devices)
        app.router.add_get("/v1/peers/models", self._peer_models)
        app.router.add_get(_PEER_MODEL, self._peer_manifest)
        app.router.add_get(_PEER_FILE, self._peer_file, allow_head=False)
        if self._gate is not None:
            app.router.add_routes(routes(self._gate))
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that goes away frees what works for it
            shutdown_timeout=STOP_GRACE_S,
            read_bufsize=READ_AHEAD_BYTES,
            max_line_size=8 * limits.KIB,
            max_field_size=8 * limits.KIB,
        )
        await self._runner.setup()
        listening, self._inode = await asyncio.to_thread(_listen, self._path, self._mode)
        loop = asyncio.get_running_loop()
        # Of asyncio's clients, those that the backlog has no room for think that they are in.
        self._server = await loop.create_unix_server(
            self._protocol, sock=listening, backlog=limits.MAX_API_CONNECTIONS
        )
        if self._door is not None:
            await self._listen_tcp(self._door)
        self._watching = loop.call_later(SILENT_S / 2, self._end_silent)

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
        for counting in self._measuring:
            counting.cancel()
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
            http[_OWNER] = "tcp"
        elif http.path not in _OPEN:
            key = doors.shown_key(http.headers.items())
            http[_OWNER] = f"key:{await asyncio.to_thread(door.keys.who, key)}"

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
            return _error(error)
        except web.HTTPRequestEntityTooLarge:
            text = f"the request is larger than {limits.MAX_BODY_BYTES} bytes"
            return _error(UserError(text, hint="send less"), 413)
        except web.HTTPException as error:
            return _error(
                UserError(f"{request.method} {request.path}: {error.reason}"), error.status
            )
        except web.RequestPayloadError:
            return _error(UserError("the request's body cannot be read", hint="is it encoded?"))
        except ConnectionError:  # the client left: as when aiohttp is the first to notice
            raise asyncio.CancelledError from None
        except Exception:
            log.exception("a request failed", extra={"path": request.path})
            return _error(EdgemoaError("something went wrong in edgemoa", hint="see its log"))

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

    async def _models(self, _: web.Request) -> web.Response:
        return _json(openai.models_json(self._service.own_model()[0]))

    async def _status(self, _: web.Request) -> web.Response:
        return _json(self._service.status())

    async def _devices(self, _: web.Request) -> web.Response:
        return _json({"devices": self._service.devices()})

    async def _peer_models(self, _: web.Request) -> web.Response:
        return _json(await self._service.peer_models())

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
            response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
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

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        with _Place(self._room) as place:
            form, prompt = await self._arrive(http, place)
            form.id = await self._take(prompt)
        if form.id != prompt.request.request_id:  # known by its key
            known = await self._service.find(form.id, prompt.owner)
            form.created = known.created if known is not None else form.created
        follow = self._service.follow(form.id, prompt.owner, holds=True)
        async with contextlib.aclosing(_Events(follow)) as events:
            if form.stream:
                return await _Stream(http, form).send(events)
            wishes = prompt.request.wishes
            told: list[TokenLogprob] | None = [] if wishes.logprobs >= 0 else None
            while True:
                match event := await events.next():
                    case Text(logprobs=logprobs) if told is not None:
                        told += logprobs
                    case Answered():
                        response = _json(
                            openai.completion(form.id, form.created, form.model, event, told)
                        )
                        async with _taken(http):
                            await response.prepare(http)
                            await response.write_eof()
                        return response
                    case Failed():
                        raise failure(event)
                    case _:
                        pass

    async def _leave_prompt(self, http: web.Request) -> web.Response:
        """Take a prompt whose client comes back for the answer."""
        with _Place(self._room) as place:
            _, prompt = await self._arrive(http, place, holds=False)
            request_id = await self._take(prompt)
        ticket = await self._service.find(request_id, prompt.owner)
        if ticket is None:
            raise NotFoundError("the prompt has been taken back")
        return self._ticket(ticket, 202)

    async def _take(self, prompt: Prompt) -> str:
        taken = await self._service.take(prompt)
        if isinstance(taken, Failed):
            raise failure(taken)
        return taken

    async def _unfinished(self, http: web.Request) -> web.Response:
        tickets = self._service.unfinished(_peer(http)[0])
        return _json({"object": "list", "data": [requests.ticket_json(t) for t in tickets]})

    async def _find_prompt(self, http: web.Request) -> web.StreamResponse:
        """How a prompt stands; with ``?wait=`` not before its end, or so many seconds; or all that
        happens with it, as events."""
        request_id, owner = http.match_info["id"], _peer(http)[0]
        wait_s, ticket = requests.wait_s(http), await self._service.find(request_id, owner)
        if ticket is None:
            raise NotFoundError(
                "no such request here", hint="it was deleted, its time is over, or it is another's"
            )
        if requests.wants_events(http):
            form = _Form(request_id, ticket.created, ticket.model, True, True, True)
            follow = self._service.follow(request_id, owner)
            async with contextlib.aclosing(_Events(follow)) as events:
                return await _Stream(http, form).send(events)
        if ticket.end is None and wait_s:
            await self._await_end(request_id, owner, wait_s)
            ticket = await self._service.find(request_id, owner) or ticket
        return self._ticket(ticket)

    async def _await_end(self, request_id: str, owner: str, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        follow = self._service.follow(request_id, owner)
        async with contextlib.aclosing(_Events(follow)) as events:
            while (left := until - asyncio.get_running_loop().time()) > 0:
                if isinstance(await events.next_within(left), Answered | Failed):
                    return

    async def _forget_prompt(self, http: web.Request) -> web.Response:
        request_id = http.match_info["id"]
        if not await self._service.forget(request_id, _peer(http)[0]):
            raise NotFoundError("no such request here")
        return _json({"id": request_id, "object": "edgemoa.request", "deleted": True})

    @staticmethod
    def _ticket(ticket: Ticket, status: int = 200) -> web.Response:
        failed = requests.failed(ticket)
        told = requests.ticket_json(ticket, failure(failed) if failed else None)
        return _json(told, status, {"Location": f"{requests.PATH}/{ticket.id}"})

    async def _arrive(
        self, http: web.Request, place: _Place, *, holds: bool = True
    ) -> tuple[_Form, Prompt]:
        """Read a prompt, and see whether it can be taken. Of all that was sent only what the board
        needs is left in memory then."""
        if refusal := self._service.refusal():
            raise failure(refusal)  # before anything is read
        (owner, client), key = _peer(http), requests.idempotency_key(http)
        ask = openai.decode_chat_request(await self._read(http, place))
        digest = openai.digest(ask) if key else b""
        layers, proposers, max_tokens, deadline_ms = self._service.plan()
        layers, proposers = ask.plan(self._service.own_model()[0], layers, proposers)
        sampling = ask.sampling(max_tokens, secrets.randbits(31))
        wishes = ask.wishes(sampling.max_tokens)
        messages = ask.conversation()
        prompt_tokens = await self._measure(messages, wishes.schema)
        context_tokens = self._service.own_model()[1]  # known by now, even at the first start
        if prompt_tokens >= context_tokens:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens, the model's context {context_tokens}",
                hint="shorten the prompt or the conversation",
            )
        request = Request(
            request_id=self._service.new_request_id(),
            messages=messages,
            prompt_tokens=prompt_tokens,
            layers=layers,
            proposers=proposers,
            sampling=sampling,
            deadline_ms=ask.edgemoa.deadline_ms or deadline_ms,
            wishes=wishes,
            strict=ask.edgemoa.strict,
            client=client,
            streamed=bool(ask.stream),
        )
        prompt = Prompt(request, ask.model, owner, int(time.time()), key, digest, holds)
        return _Form.of(ask, prompt), prompt

    async def _read(self, http: web.Request, place: _Place) -> bytes:
        """The body, whose bytes are given room before they are read, or at least as they come."""
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

    async def _measure(self, messages: tuple[ChatMessage, ...], schema: str) -> int:
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
        counting = asyncio.ensure_future(self._check(messages, schema))
        self._measuring.add(counting)
        counting.add_done_callback(self._measured)
        done, _ = await asyncio.wait({counting}, timeout=MEASURE_S)
        if not done:
            raise EngineError("the model is not ready yet", hint="try again in a moment")
        return counting.result()

    async def _check(self, messages: tuple[ChatMessage, ...], schema: str) -> int:
        if schema:
            try:
                await self._service.check_schema(schema)
            finally:
                self._checking -= 1
        return await self._service.measure(messages)

    def _measured(self, counting: asyncio.Future[int]) -> None:
        self._measuring.discard(counting)
        if not counting.cancelled():
            counting.exception()  # whoever still waits is told; nobody else needs to be


class _Refused(asyncio.Protocol):
    """What a connection gets that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Closed at once."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream socket
        transport.abort()


@dataclass(slots=True)
class _Room:
    """Bytes for requests that are neither accepted nor refused yet; then the board counts them."""

    most_bytes: int
    taken_bytes: int = 0


class _Place:
    """One request's part of the room, until it is left."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._bytes = 0

    def __enter__(self) -> _Place:
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


@dataclass(slots=True)
class _Form:
    """How an answer is told."""

    id: str
    created: int
    model: str
    stream: bool
    events: bool
    usage: bool

    @classmethod
    def of(cls, ask: openai.ChatRequest, prompt: Prompt) -> _Form:
        """As it was asked for."""
        options, events = ask.stream_options, ask.edgemoa.events
        usage = events or (options is not None and options.include_usage)
        request_id = prompt.request.request_id
        return cls(request_id, prompt.created, ask.model, bool(ask.stream), events, usage)


@contextlib.asynccontextmanager
async def _taken(http: web.Request) -> AsyncIterator[None]:
    """Bounds the time that a client takes for what is written to it meanwhile; one that does not
    read is left."""
    try:
        async with asyncio.timeout(TAKE_S):
            yield
    except TimeoutError:
        log.info("a client does not read its answer")
        if http.transport is not None:
            http.transport.abort()
        raise ConnectionResetError from None


class _Events:
    """A request's events, with a way to wait for the next for a bounded time only."""

    def __init__(self, source: AsyncIterator[RequestEvent]) -> None:
        self._source = source
        self._waiting: asyncio.Task[RequestEvent] | None = None

    async def next(self) -> RequestEvent:
        event = await self.next_within(None)
        assert event is not None  # noqa: S101 - no time limit was given
        return event

    async def next_within(self, seconds: float | None) -> RequestEvent | None:
        """The next event, or None if there is none within that time; it is not lost."""
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(anext(self._source))
        done, _ = await asyncio.wait((self._waiting,), timeout=seconds)
        if not done:
            return None
        waiting, self._waiting = self._waiting, None
        return waiting.result()

    async def aclose(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait((self._waiting,))
        close = getattr(self._source, "aclose", None)
        if close is not None:
            await close()


class _Stream:
    """One answer as server-sent events."""

    def __init__(self, http: web.Request, form: _Form) -> None:
        self._http = http
        self._form = form
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )

    async def send(self, events: _Events) -> web.StreamResponse:
        await self._response.prepare(self._http)
        await self._chunk(openai.Delta(role="assistant", content=""))
        while True:
            event = await events.next_within(KEEP_ALIVE_S)
            match event:
                case None:
                    await self._write(b": working\n\n")
                case Text(text=text, logprobs=logprobs):
                    await self._chunk(openai.Delta(content=text), logprobs=logprobs)
                case Answered():
                    await self._end(event)
                    break
                case Failed():
                    await self._data(openai.encode(openai.error_json(failure(event))))
                    break
                case _:
                    await self._progress(event)
        async with _taken(self._http):
            await self._response.write_eof()
        return self._response

    async def _progress(self, event: RequestEvent) -> None:
        if self._form.events:
            await self._data(openai.encode(self._new([], edgemoa=event)))
        elif not isinstance(event, Accepted):
            await self._write(b": working\n\n")

    async def _chunk(
        self,
        delta: openai.Delta,
        finish_reason: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        choice = openai.ChunkChoice(delta, finish_reason)
        if logprobs:
            choice.logprobs = openai.logprobs(logprobs)
        chunk = self._new([choice])
        await self._data(openai.encode(chunk))

    async def _end(self, answered: Answered) -> None:
        await self._chunk(openai.Delta(), openai.finish_reason(answered))
        if self._form.usage:
            last = self._new([], edgemoa=answered)
            last.usage = openai.usage(answered)
            await self._data(openai.encode(last))
        await self._data(b"[DONE]")

    def _new(self, choices: list[openai.ChunkChoice], **more: Any) -> openai.Chunk:
        form = self._form
        return openai.Chunk(form.id, form.created, form.model, choices, **more)

    async def _data(self, data: bytes) -> None:
        await self._write(b"data: " + data + b"\n\n")

    async def _write(self, data: bytes) -> None:
        async with _taken(self._http):
            await self._response.write(data)


def _peer_model(http: web.Request) -> tuple[BoardId, str]:
    try:
        board = envelope.check_board_id(http.match_info["board"])
    except PeerError as error:
        raise UserError(str(error), hint="see `edgemoa devices`") from None
    return board, http.match_info["model_id"]


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


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=openai.encode(value), status=status, content_type="application/json", headers=headers
    )


def _peer(http: web.Request) -> tuple[str, str]:
    """Whose request it is, and which application asks: user and process, as the kernel knows them,
    or the key that was shown."""
    if (owner := http.get(_OWNER)) is not None:
        return owner, owner
    connection = http.get_extra_info("socket")
    if connection is None:
        raise ConnectionResetError
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return str(uid), f"{uid}:{pid}"


def _error(error: EdgemoaError, status: int = 0) -> web.Response:
    headers = openai.error_headers(error)
    return _json(openai.error_json(error), status or error.http_status, headers)


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
