"""Answers on their way out: one or several prompts' events, told to one client in its shape.

A request is answered with an HTTP status as long as nothing of the answer has been sent; after
that an error travels in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from edgemoa.api.service import failure
from edgemoa.core.events import Answered, Failed, RequestEvent, Text, TokenLogprob
from edgemoa.errors import EdgemoaError

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 10.0  # a stream says something at least so often, or clients give up
TAKE_S: Final = 60.0  # for a client to take a part of its answer; what is written waits in memory
_GONE: Final = Failed("cancelled", "the prompt was taken back")

encode = msgspec.json.Encoder().encode


class Shape(Protocol):
    """How answers are told in one of the ways that clients know. What is streamed comes as bytes
    that are ready to be sent, or empty where there is nothing to say."""

    @property
    def stream(self) -> bool:
        """Whether the answers are told as they are written."""

    @property
    def content_type(self) -> str:
        """Of a stream."""

    @property
    def alive(self) -> bytes:
        """What a stream says while nothing happens."""

    def opening(self) -> bytes:
        """The beginning of a stream."""

    def event(self, index: int, event: RequestEvent) -> bytes:
        """What happened with one of the prompts; all but a bad end."""

    def closing(self, answers: Sequence[Answered]) -> bytes:
        """The end of a stream, when all prompts have been answered."""

    def failed(self, error: EdgemoaError) -> bytes:
        """The bad end of a stream."""

    def whole(self, answers: Sequence[Answered], told: Sequence[Sequence[TokenLogprob]]) -> Any:
        """All answers at once, with the probabilities of their tokens, as JSON."""


class Events:
    """What becomes of prompts, with a way to wait for the next for a bounded time only."""

    def __init__(self, *sources: AsyncIterator[RequestEvent]) -> None:
        self._sources = sources
        self._idle = set(range(len(sources)))  # that can be asked for their next
        self._waiting: dict[asyncio.Future[RequestEvent], int] = {}

    async def next(self) -> tuple[int, RequestEvent]:
        """The next event, and which prompt's it is."""
        event = await self.next_within(None)
        assert event is not None  # noqa: S101 - no time limit was given
        return event

    async def next_within(self, seconds: float | None) -> tuple[int, RequestEvent] | None:
        """The next event, or None if there is none within that time; it is not lost."""
        for index in self._idle:
            source = self._sources[index]
            self._waiting[asyncio.ensure_future(anext(source, _GONE))] = index
        self._idle.clear()
        done, _ = await asyncio.wait(
            self._waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            return None
        first = done.pop()
        index, event = self._waiting.pop(first), first.result()
        if not isinstance(event, Answered | Failed):
            self._idle.add(index)
        return index, event

    async def aclose(self) -> None:
        """No more of it is wanted."""
        for waiting in self._waiting:
            waiting.cancel()
        if self._waiting:
            await asyncio.wait(self._waiting)
        for source in self._sources:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()


async def tell(
    http: web.Request, shape: Shape, events: Events, count: int = 1
) -> web.StreamResponse:
    """Answer a request with what becomes of ``count`` prompts.

    :raises EdgemoaError: one of them came to a bad end, and nothing has been sent yet.
    """
    if shape.stream:
        return await _stream(http, shape, events, count)
    answers: dict[int, Answered] = {}
    told: list[list[TokenLogprob]] = [[] for _ in range(count)]
    while len(answers) < count:
        index, event = await events.next()
        match event:
            case Text(logprobs=logprobs):
                told[index] += logprobs
            case Answered():
                answers[index] = event
            case Failed():
                raise failure(event)
            case _:
                pass
    response = json_response(shape.whole([answers[i] for i in range(count)], told))
    async with _taken(http):
        await response.prepare(http)
        await response.write_eof()
    return response


async def _stream(
    http: web.Request, shape: Shape, events: Events, count: int
) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": shape.content_type, "Cache-Control": "no-store"}
    )

    async def write(data: bytes) -> None:
        if data:
            async with _taken(http):
                await response.write(data)

    first = await events.next_within(0)  # from now on, who leaves takes all of them back
    await response.prepare(http)
    await write(shape.opening())
    answers: dict[int, Answered] = {}
    while len(answers) < count:
        happened = first or await events.next_within(KEEP_ALIVE_S)
        first = None
        if happened is None:
            await write(shape.alive)
            continue
        index, event = happened
        if isinstance(event, Failed):
            await write(shape.failed(failure(event)))
            break
        if isinstance(event, Answered):
            answers[index] = event
        await write(shape.event(index, event))
    else:
        await write(shape.closing([answers[i] for i in range(count)]))
    async with _taken(http):
        await response.write_eof()
    return response


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


def json_response(
    value: Any, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A response in JSON."""
    return web.Response(
        body=encode(value), status=status, content_type="application/json", headers=headers
    )
