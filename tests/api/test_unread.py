"""A client that asks for a stream and never reads it: real sockets, the real desk and journal."""

from __future__ import annotations

import asyncio
import os
import socket
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from test_arriving import HEAD, STREAM
from test_server import ScriptedBoard

from edgemoa.api import answers
from edgemoa.api.server import Api
from edgemoa.core.events import Accepted, Failed, Granted, Request, RequestEvent, Text
from edgemoa.desk import Desk, Prompt, Ticket
from edgemoa.journal import Journal

WORD = "word after word " * 12
WORDS = 3_000  # more than sockets hold; written as fast as it goes


class Board(ScriptedBoard):
    """Writes on and on, for as long as anybody wants it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.desk = Desk(Journal(folder, 3600, 1 << 20), self)
        self.desk.open()
        self.writing: dict[str, asyncio.Task[None]] = {}
        self.told = 0
        self.cancelled = asyncio.Event()

    def new_request_id(self) -> str:
        return self.desk.new_id()

    async def take(self, prompt: Prompt) -> str | Failed:
        return await self.desk.take(prompt)

    async def find(self, request_id: str, owner: str) -> Ticket | None:
        return await self.desk.find(request_id, owner)

    def follow(
        self, request_id: str, owner: str, *, holds: bool = False
    ) -> AsyncIterator[RequestEvent]:
        return self.desk.follow(request_id, owner, holds=holds)

    # what the desk asks of the node

    def submit(self, request: Request, *, promised: bool) -> None:
        self.desk.tell(request.request_id, Accepted(Granted(0, 0), 0))
        writing = asyncio.create_task(self._write(request.request_id))
        self.writing[request.request_id] = writing

    async def _write(self, request_id: str) -> None:
        for _ in range(WORDS):
            self.desk.tell(request_id, Text(WORD))
            self.told += len(WORD)
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    def cancel(self, request_id: str) -> None:
        self.writing[request_id].cancel()
        self.cancelled.set()
        self.desk.tell(request_id, Failed("cancelled", "the client went away"))

    def has_room(self) -> bool:
        return True


def test_it_costs_no_more_than_the_answer_and_is_left_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TAKE_S", 1.5)

    async def scenario() -> None:
        board = Board(tmp_path)
        api = Api(board, path := tmp_path / "api.sock", 0o600)
        await api.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, os.fspath(path))
            asked = HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM
            tracemalloc.start()
            await loop.sock_sendall(client, asked)
            async with asyncio.timeout(10):
                while board.told < WORDS * len(WORD):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                assert not board.cancelled.is_set()  # a slow client is not one that went away
                held, peak = tracemalloc.get_traced_memory()
                (feed,) = board.desk._feeds.values()
                (mailbox,) = feed.mailboxes
                assert len(mailbox._events) <= 1  # joined while it does not read
                await board.cancelled.wait()
            tracemalloc.stop()
        # Once to be told from its beginning; once on its way to this client, in forms that follow
        # each other; and copies as these are joined.
        assert held < 6 * board.told
        assert peak < 9 * board.told
        await asyncio.sleep(0.05)
        assert len(board.desk) == 0
        await api.stop()
        await board.desk.close()

    asyncio.run(scenario())
