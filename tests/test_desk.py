"""The front desk, with the real journal and a node that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edgemoa.core.events import Accepted, Answered, Failed, Granted, Request, RequestEvent, Text
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.desk import Desk, Prompt
from edgemoa.errors import ConflictError, DiskFullError
from edgemoa.journal import Journal

ACCEPTED = Accepted(Granted(1, 2), 0)
ANSWERED = Answered("An answer.", "stop", Granted(1, 2), (), (), 3, 2, 0, 1, 1)
CANCELLED = Failed("cancelled", "the client went away")
STOPPED = Failed("unavailable", "this board shut down")


class Node:
    """Accepts, or refuses; the test says when something is answered."""

    def __init__(self) -> None:
        self.desk: Desk
        self.submitted: list[str] = []
        self.promised: list[str] = []
        self.cancelled: list[str] = []
        self.refuses = False
        self.room = 0

    def submit(self, request: Request, *, promised: bool) -> None:
        (self.promised if promised else self.submitted).append(request.request_id)
        self.room -= promised
        refuses = self.refuses and not promised
        first = Failed("overloaded", "full", 1000, 3) if refuses else ACCEPTED
        self.desk.tell(request.request_id, first)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.desk.tell(request_id, CANCELLED)

    def has_room(self) -> bool:
        return self.room > 0


Test = Callable[[Desk, Node], Coroutine[Any, Any, None]]


def run(folder: Path, test: Test) -> Node:
    """One life of a daemon."""
    node = Node()
    desk = node.desk = Desk(Journal(folder, 3600, 1 << 20), node)
    desk.open()

    async def life() -> None:
        async with asyncio.timeout(10):
            try:
                await test(desk, node)
            finally:
                await desk.close()

    asyncio.run(life())
    return node


def prompt(desk: Desk, text: str = "Why?", **more: Any) -> Prompt:
    request = Request(desk.new_id(), (ChatMessage("user", text),), 3, 1, 2, Sampling(), 60_000)
    return Prompt(request, "edgemoa", owner=more.pop("owner", "1000"), created=7, **more)


async def take(desk: Desk, asked: Prompt) -> str:
    taken = await desk.take(asked)
    assert isinstance(taken, str)
    return taken


async def hear(desk: Desk, request_id: str, owner: str = "1000") -> list[RequestEvent]:
    return [event async for event in desk.follow(request_id, owner)]


def test_what_was_accepted_is_answered_after_a_crash(tmp_path: Path) -> None:
    ids: list[str] = []

    async def before(desk: Desk, node: Node) -> None:
        ids.extend([await take(desk, prompt(desk, f"{n}?")) for n in range(3)])
        desk.tell(ids[0], Text("An "))
        desk.tell(ids[0], Text("answer."))
        desk.tell(ids[0], ANSWERED)
        assert await hear(desk, ids[0]) == [ACCEPTED, Text("An answer."), ANSWERED]
        desk.tell(ids[1], Text("half a"))  # and then the power fails

    run(tmp_path, before)

    async def after(desk: Desk, node: Node) -> None:
        assert len(desk) == desk.backlog == 2
        told = desk.unfinished("1000")
        assert [(t.id, t.state, t.waiting_before) for t in told] == [
            (ids[1], "waiting", 1),
            (ids[2], "waiting", 2),
        ]
        desk.pump()
        assert node.promised == []
        node.room = 1
        desk.pump()
        assert node.promised == [ids[1]]
        node.room = 1
        desk.tell(ids[1], ANSWERED)
        assert await hear(desk, ids[1]) == [ACCEPTED, ANSWERED]
        assert node.promised == ids[1:], "the next one follows by itself"
        desk.tell(ids[2], ANSWERED)
        assert (await hear(desk, ids[2]))[-1] == ANSWERED
        assert (await hear(desk, ids[0]))[-1] == ANSWERED
        assert node.submitted == []
        ticket = await desk.find(ids[0], "1000")
        assert ticket is not None
        assert (ticket.state, ticket.model, ticket.created, ticket.end) == (
            "answered", "edgemoa", 7, ANSWERED,
        )  # fmt: skip

    run(tmp_path, after)

    async def nothing_left(desk: Desk, node: Node) -> None:
        node.room = 9
        desk.pump()
        assert node.promised == []

    run(tmp_path, nothing_left)


def test_what_is_refused_is_not_kept(tmp_path: Path) -> None:
    async def refused(desk: Desk, node: Node) -> None:
        node.refuses = True
        for key in ("", "k"):
            taken = await desk.take(prompt(desk, key=key))
            assert isinstance(taken, Failed)
            assert taken.position == 3
        node.refuses = False
        assert await take(desk, prompt(desk, key="k"))

    run(tmp_path, refused)

    async def after(desk: Desk, node: Node) -> None:
        assert desk.backlog == 1

    run(tmp_path, after)


def test_a_key_is_answered_once(tmp_path: Path) -> None:
    ids = []

    async def first(desk: Desk, node: Node) -> None:
        asked = [prompt(desk, key="k", digest=b"d") for _ in range(5)]
        taken = await asyncio.gather(*(take(desk, a) for a in asked))
        assert len(set(taken)) == len(node.submitted) == 1
        ids.append(taken[0])
        with pytest.raises(ConflictError):
            await desk.take(prompt(desk, "Else?", key="k", digest=b"other"))
        other = await take(desk, prompt(desk, owner="1001", key="k", digest=b"theirs"))
        assert other != taken[0], "another user's key is another"
        listening = desk.follow(taken[0], "1000", holds=True)
        assert await anext(listening) == ACCEPTED
        await listening.aclose()
        assert node.cancelled == [], "it can be fetched later"
        desk.tell(taken[0], ANSWERED)
        again = await take(desk, prompt(desk, key="k", digest=b"d"))
        assert again == taken[0]
        assert (await hear(desk, again))[-1] == ANSWERED

    run(tmp_path, first)

    async def later(desk: Desk, node: Node) -> None:
        assert await take(desk, prompt(desk, key="k", digest=b"d")) == ids[0]
        with pytest.raises(ConflictError):
            await desk.take(prompt(desk, key="k", digest=b"other"))
        assert node.submitted == []
        waits = await take(desk, prompt(desk, owner="1001", key="k", digest=b"theirs"))
        ticket = await desk.find(waits, "1001")
        assert ticket is not None
        assert ticket.state == "waiting"

    run(tmp_path, later)


def test_who_holds_the_line_takes_its_prompt_back_by_leaving(tmp_path: Path) -> None:
    async def leaves(desk: Desk, node: Node) -> None:
        held, left = await take(desk, prompt(desk)), await take(desk, prompt(desk, holds=False))
        for request_id in (held, left):
            line = desk.follow(request_id, "1000", holds=True)
            assert await anext(line) == ACCEPTED
            await line.aclose()
        assert node.cancelled == [held]
        while len(desk) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert await desk.find(held, "1000") is None
        two = await take(desk, prompt(desk))
        lines = [desk.follow(two, "1000", holds=True) for _ in range(2)]
        for line in lines:
            await anext(line)
        await lines[0].aclose()
        assert node.cancelled == [held], "another one listens"
        await lines[1].aclose()
        assert node.cancelled == [held, two]

    run(tmp_path, leaves)

    async def after(desk: Desk, node: Node) -> None:
        assert desk.backlog == 1

    run(tmp_path, after)


def test_a_board_that_stops_keeps_what_can_be_fetched(tmp_path: Path) -> None:
    ids: list[str] = []

    async def stops(desk: Desk, node: Node) -> None:
        ids.extend([await take(desk, prompt(desk, holds=held)) for held in (True, False)])
        lines = [asyncio.create_task(hear(desk, i)) for i in ids]
        await asyncio.sleep(0)
        for request_id in ids:
            desk.tell(request_id, STOPPED)
        assert [(await line)[-1] for line in lines] == [STOPPED, STOPPED]

    run(tmp_path, stops)

    async def after(desk: Desk, node: Node) -> None:
        assert [t.id for t in desk.unfinished("1000")] == ids[1:]
        ticket = await desk.find(ids[0], "1000")
        assert ticket is not None
        assert ticket.end == STOPPED, "its client has been told"

    run(tmp_path, after)


def test_only_its_user_hears_of_a_prompt(tmp_path: Path) -> None:
    async def strangers(desk: Desk, node: Node) -> None:
        mine = await take(desk, prompt(desk))
        done = await take(desk, prompt(desk))
        desk.tell(done, ANSWERED)
        assert (await hear(desk, done))[-1] == ANSWERED
        for request_id in (mine, done):
            assert await desk.find(request_id, "1001") is None
            assert await hear(desk, request_id, "1001") == []
            assert not await desk.forget(request_id, "1001")
        assert desk.unfinished("1001") == []
        assert await desk.find(mine, "0") is not None
        assert await desk.forget(done, "1000")
        assert await desk.find(done, "1000") is None
        assert await desk.forget(mine, "1000")
        assert node.cancelled == [mine]

    run(tmp_path, strangers)


def test_one_that_waits_since_before_can_be_taken_back(tmp_path: Path) -> None:
    async def before(desk: Desk, node: Node) -> None:
        await take(desk, prompt(desk))

    run(tmp_path, before)

    async def after(desk: Desk, node: Node) -> None:
        (ticket,) = desk.unfinished("1000")
        assert await desk.forget(ticket.id, "1000")
        assert desk.backlog == 0
        node.room = 1
        desk.pump()
        assert node.promised == []

    run(tmp_path, after)

    async def gone(desk: Desk, node: Node) -> None:
        assert desk.backlog == 0

    run(tmp_path, gone)


def test_what_cannot_be_written_down_is_not_accepted(tmp_path: Path) -> None:
    async def full(desk: Desk, node: Node) -> None:
        ordered = desk._journal._order
        pages = await ordered(lambda d: d.execute("PRAGMA page_count").fetchone()[0])
        await ordered(lambda d: d.execute(f"PRAGMA max_page_count = {pages}").fetchone())
        asked = prompt(desk, " ".join(map(str, range(20_000))), key="k")
        with pytest.raises(DiskFullError):
            await desk.take(asked)
        assert node.cancelled == [asked.request.request_id]
        while len(desk):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await ordered(lambda d: d.execute("PRAGMA max_page_count = 1000000").fetchone())
        assert await take(desk, prompt(desk, key="k"))

    run(tmp_path, full)


def test_a_client_that_leaves_while_it_is_written_down(tmp_path: Path) -> None:
    async def leaves(desk: Desk, node: Node) -> None:
        asked = prompt(desk)
        taking = asyncio.create_task(desk.take(asked))
        while desk._feeds == {} or desk._feeds[asked.request.request_id].accepting is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert node.cancelled == [asked.request.request_id]

    run(tmp_path, leaves)

    async def after(desk: Desk, node: Node) -> None:
        assert desk.backlog == 0

    run(tmp_path, after)
