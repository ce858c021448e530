"""The fake engine keeps the real one's promises."""

from __future__ import annotations

import asyncio

import pytest

from edgemoa.core.events import WorkFailed
from edgemoa.errors import EngineError

from .fake import FakeEngine
from .harness import Recorder, conversation, job


def test_it_writes_fails_dies_and_comes_back() -> None:
    async def scenario() -> None:
        events = Recorder()
        engine = FakeEngine("fake", events, slots=2)
        await engine.start()
        engine.work(job(1, "why is the sky blue", max_tokens=3))
        assert await engine.measure(conversation("why is")) == 3
        result = await events.ends(1)
        assert (result.text, result.finish) == ("WHY IS THE", "length")
        assert "".join(events.texts[1]) == result.text
        engine.fail_next = WorkFailed("no")
        engine.work(job(2, "a"))
        engine.work(job(3, "b"))
        assert (await events.fails(2)).reason == "no"
        await events.ends(3)
        engine.work(job(4, "a"))
        engine.cancel(4)
        engine.work(job(5, "a"))
        engine.lose()
        engine.work(job(6, "a"))
        assert "down" in (await events.fails(6)).reason
        with pytest.raises(EngineError):
            await engine.measure(conversation("a"))
        await events.loads(2)
        assert engine.restarts == len(events.lost) == 1
        engine.work(job(7, "a"))
        await events.ends(7)
        assert sorted(events.done) == [1, 3, 7]
        await engine.stop()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
