"""Requests that arrive take no more memory than there is for them: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest
from test_server import ScriptedBoard, answered

from edgemoa.api import answers
from edgemoa.api.server import Api
from edgemoa.core import limits
from edgemoa.core.events import Accepted, Failed, Granted, Text

LARGE = 900 * limits.KIB
ROOM = 2 * limits.MIB  # for two of these
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
SAID = json.dumps({"messages": [{"role": "user", "content": "Why?"}]}).encode()
STREAM = json.dumps({**json.loads(SAID), "stream": True}).encode()
BODY = SAID + b" " * (LARGE - len(SAID))
KNOWN = HEAD + b"Content-Length: %d\r\n\r\n" % LARGE
UNKNOWN = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def run(
    folder: Path,
    board: ScriptedBoard,
    test: Callable[[Path], Coroutine[None, None, None]],
    room: int = ROOM,
) -> None:
    async def whole() -> None:
        path = folder / "api.sock"
        api = Api(board, path, 0o600, room)
        await api.start()
        try:
            async with asyncio.timeout(20):
                await test(path)
        finally:
            await api.stop()

    asyncio.run(whole())


class Client:
    """A client that sends what it likes, when it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def status(self) -> tuple[int, int]:
        """Of the answer, with its ``Retry-After``, or 0."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        after = [line.split(": ")[1] for line in head if line.startswith("Retry-After: ")]
        return int(head[0].split()[1]), int(after[0]) if after else 0

    async def says_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await self._reader.readexactly(1)

    async def end(self) -> bytes:
        """All that is still sent, until the server closes."""
        return await self._reader.read()


@contextlib.asynccontextmanager
async def client(path: Path, data: bytes = b"") -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        one = Client(reader, writer)
        await one.send(data)
        yield one
    finally:
        writer.transport.abort()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def test_a_body_that_there_is_no_room_for_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async with client(path, KNOWN + BODY[:-1]) as one, client(path, KNOWN) as two:
            await two.says_nothing()
            async with client(path, KNOWN) as three:
                assert await three.status() == (429, 1)
            async with client(
                path, HEAD + b"Content-Length: %d\r\n\r\n" % len(SAID) + SAID
            ) as four:
                assert (await four.status())[0] == 200  # small ones go on
            await one.send(BODY[-1:])
            assert (await one.status())[0] == 200
            async with client(path, KNOWN + BODY) as three:  # in its room
                assert (await three.status())[0] == 200
            await two.send(BODY)
            assert (await two.status())[0] == 200

    run(tmp_path, ScriptedBoard(), test)


def test_a_body_of_unknown_length_is_counted_as_it_comes(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        half = BODY[: LARGE // 2]
        async with client(path, UNKNOWN + chunk(half)) as one:
            await one.says_nothing()
            async with client(path, UNKNOWN + chunk(half)) as two:
                await two.says_nothing()
                await two.send(chunk(half))
                assert await two.status() == (429, 1)
            await one.send(chunk(b" " * (LARGE // 2)) + b"0\r\n\r\n")
            assert (await one.status())[0] == 200

    run(tmp_path, ScriptedBoard(), test, LARGE + 200 * limits.KIB)


def test_one_alone_has_room_whatever_its_size(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        async with client(path, KNOWN + BODY[:-1]) as one:
            await one.says_nothing()
            async with client(path, KNOWN) as two:
                assert await two.status() == (429, 1)
            await one.send(BODY[-1:])
            assert (await one.status())[0] == 200

    run(tmp_path, ScriptedBoard(), test, 1)


def test_what_leaves_or_is_accepted_or_wrong_takes_no_room(tmp_path: Path) -> None:
    board = ScriptedBoard()
    board.script = [Accepted(Granted(1, 1), 0), 15.0]

    async def test(path: Path) -> None:
        async with contextlib.AsyncExitStack() as waiting:
            for _ in range(8):  # more than there is room for, accepted one by one
                accepted = len(board.asked) + 1
                await waiting.enter_async_context(client(path, KNOWN + BODY))
                while len(board.asked) < accepted:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for _ in range(8):
                async with client(path, KNOWN + BODY[:-1] + b"!") as wrong:
                    assert (await wrong.status())[0] == 400
            for _ in range(8):
                async with client(path, KNOWN + BODY[:-1]) as leaving:
                    await leaving.says_nothing()
            board.script = ScriptedBoard().script
            async with client(path, KNOWN + BODY) as last:
                assert (await last.status())[0] == 200

    run(tmp_path, board, test, LARGE)


def test_too_much_is_refused_as_such(tmp_path: Path) -> None:
    async def test(path: Path) -> None:
        size = limits.MAX_BODY_BYTES + 1
        async with client(path, HEAD + b"Content-Length: %d\r\n\r\n" % size) as known:
            assert (await known.status())[0] == 413
        async with client(path, UNKNOWN + chunk(b" " * size)) as unknown:
            assert (await unknown.status())[0] == 413

    run(tmp_path, ScriptedBoard(), test)


def test_a_full_board_says_so_before_anything_is_sent(tmp_path: Path) -> None:
    board = ScriptedBoard()
    board.refused = Failed("overloaded", "full", 7_000)

    async def test(path: Path) -> None:
        async with client(path, KNOWN) as one:
            assert await one.status() == (429, 7)

    run(tmp_path, board, test)


@pytest.mark.parametrize("said", [SAID, STREAM])
def test_an_answer_that_nobody_reads_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(answers, "TAKE_S", 0.3)
    board, text = ScriptedBoard(), "word " * 200_000
    board.script = [Accepted(Granted(1, 1), 0), Text(text), answered(text)]

    async def test(path: Path) -> None:
        sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(said) + said
        async with client(path, sent) as one:
            assert (await one.status())[0] == 200
            await asyncio.sleep(1)
            # All that was on its way, and then the end, as the server has left.
            assert len(await one.end()) < len(text) / 2
        async with client(path, sent) as one:
            assert len(await one.end()) > len(text)

    run(tmp_path, board, test)
