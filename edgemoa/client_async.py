"""The client of a running daemon for asyncio; :mod:`edgemoa.client` for the rest of the world."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import aiohttp

from edgemoa.client import (
    AGAIN_S,
    CHAT,
    GOOD,
    POLL_S,
    REQUESTS,
    Answer,
    Heard,
    Options,
    Patience,
    Prompt,
    answer_of,
    body_of,
    broken,
    chunk_of,
    error_of,
    object_of,
    path_of,
    socket_path,
    unreachable,
)
from edgemoa.errors import EdgemoaError

LONGEST_LINE_BYTES = 4 * 1024 * 1024  # an event of a stream with all its proposals
T = TypeVar("T")


class AsyncStream:
    """An answer on its way: iterate over its pieces of text; ``answer`` is there afterwards.

    Leaving its ``async with`` before the end takes the prompt back.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._chunks = chunks
        self._heard = Heard()

    @property
    def answer(self) -> Answer | None:
        """The whole answer; None before its end."""
        return self._heard.answer

    async def __aiter__(self) -> AsyncIterator[str]:
        async for chunk in self._chunks:
            if text := self._heard.hear(chunk):
                yield text

    async def aclose(self) -> None:
        """Hear no more of it."""
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncClient:
    """A client of one board's daemon; as :class:`edgemoa.Client`, whose methods it has.

    Use it as ``async with AsyncClient() as board``, or call :meth:`aclose` at the end.

    :param path: the daemon's socket; by default ``$EDGEMOA_API_SOCKET`` or its usual place.
    :param timeout_s: how long to wait for the daemon's next byte; by default for ever.
    """

    def __init__(self, path: Path | str | None = None, *, timeout_s: float | None = None) -> None:
        self.path = socket_path(path)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> Answer:
        """The answer to ``prompt``; see :meth:`edgemoa.Client.ask`."""
        key = key or uuid.uuid4().hex
        request_id = await self._patiently(
            lambda: self.submit(prompt, key=key, **options), Patience(was_there=False)
        )
        answer = None
        while answer is None:
            answer = await self._patiently(
                lambda: self.result(request_id, wait_s=POLL_S), Patience(was_there=True)
            )
        return answer

    def stream(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> AsyncStream:
        """The answer to ``prompt`` as it is written; raises as :meth:`ask` does, on its way."""
        return AsyncStream(self._chat(body_of(prompt, options), key))

    async def submit(self, prompt: Prompt, *, key: str = "", **options: Unpack[Options]) -> str:
        """Leave ``prompt`` with the daemon; see :meth:`edgemoa.Client.submit`."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        told = await self._call("POST", REQUESTS, body_of(prompt, options), headers)
        return str(told["id"])

    async def result(self, request_id: str, *, wait_s: float = 0) -> Answer | None:
        """The answer to a prompt that was left; see :meth:`edgemoa.Client.result`."""
        wait = max(0, round(wait_s))
        return answer_of(await self._call("GET", f"{path_of(request_id)}?wait={wait}"))

    async def cancel(self, request_id: str) -> None:
        """Take a prompt back, or have its answer deleted."""
        await self._call("DELETE", path_of(request_id))

    async def status(self) -> dict[str, Any]:
        """How the board is doing: queue, bounds, speed, peers."""
        return await self._call("GET", "/v1/status")

    async def devices(self) -> dict[str, Any]:
        """The boards of the group, and others in sight."""
        return await self._call("GET", "/v1/devices")

    async def aclose(self) -> None:
        """Close what is open."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    @staticmethod
    async def _patiently(call: Callable[[], Awaitable[T]], patience: Patience) -> T:
        while True:
            try:
                return await call()
            except EdgemoaError as error:
                if not patience.allows(error, asyncio.get_running_loop().time()):
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _chat(self, body: dict[str, Any], key: str) -> AsyncGenerator[dict[str, Any], None]:
        headers = {"Idempotency-Key": key} if key else {}
        async with self._open("POST", CHAT, {**body, "stream": True}, headers) as response:
            try:
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if (chunk := chunk_of(line)) is None:
                        return
                    yield chunk
            except (aiohttp.ClientError, OSError) as error:
                raise broken() from error
            raise broken()

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        async with self._open(method, path, body, headers) as response:
            try:
                return object_of(await response.read())
            except (aiohttp.ClientError, OSError) as error:
                raise broken() from error

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        headers: dict[str, str] | None,
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        if self._session is None:
            connector = aiohttp.UnixConnector(str(self.path), limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                "http://localhost",
                connector=connector,
                timeout=self._timeout,
                read_bufsize=LONGEST_LINE_BYTES,
            )
        try:
            response = await self._session.request(method, path, json=body, headers=headers)
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(self.path, _cause(error)) from _cause(error)
        async with response:
            if response.status not in GOOD:
                told = object_of(await response.read())
                raise error_of(told, response.headers.get("Retry-After"))
            yield response


def _cause(error: Exception) -> Exception:
    """What the system said, without aiohttp's wrapping: a missing socket, a refusal."""
    return error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
