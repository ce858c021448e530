"""Runs a real engine in a test and keeps what it reports."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from edgemoa.core.events import EngineInfo, Job, TokenLogprob, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.core.rates import Rates
from edgemoa.engine.engine import Engine

WAIT_S = 30.0


class Recorder:
    """The events of an engine, to wait for and to look at."""

    def __init__(self) -> None:
        self.ready: list[EngineInfo] = []
        self.lost: list[str] = []
        self.texts: dict[int, list[str]] = {}
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        self.done: dict[int, WorkDone] = {}
        self.failed: dict[int, WorkFailed] = {}
        self.rates: list[Rates] = []
        self._changed = asyncio.Event()

    def on_ready(self, info: EngineInfo) -> None:
        self.ready.append(info)
        self._changed.set()

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)
        self._changed.set()

    def on_text(self, job_id: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        self.logprobs.setdefault(job_id, []).extend(logprobs)
        self.texts.setdefault(job_id, []).append(text)
        self._changed.set()

    def on_done(self, job_id: int, result: WorkDone) -> None:
        assert job_id not in self.done
        self.done[job_id] = result
        self._changed.set()

    def on_failed(self, job_id: int, failure: WorkFailed) -> None:
        assert job_id not in self.failed
        self.failed[job_id] = failure
        self._changed.set()

    def on_rates(self, rates: Rates) -> None:
        self.rates.append(rates)
        self._changed.set()

    async def loads(self, times: int = 1) -> EngineInfo:
        async with asyncio.timeout(WAIT_S):
            while len(self.ready) < times:
                await self._change()
        return self.ready[-1]

    async def loses(self, times: int = 1) -> str:
        async with asyncio.timeout(WAIT_S):
            while len(self.lost) < times:
                await self._change()
        return self.lost[-1]

    async def writes(self, job_id: int) -> None:
        """Until the job's first text is there."""
        async with asyncio.timeout(WAIT_S):
            while job_id not in self.texts:
                await self._change()

    async def ends(self, job_id: int) -> WorkDone:
        async with asyncio.timeout(WAIT_S):
            while job_id not in self.done:
                assert job_id not in self.failed, self.failed[job_id]
                await self._change()
        return self.done[job_id]

    async def fails(self, job_id: int) -> WorkFailed:
        async with asyncio.timeout(WAIT_S):
            while job_id not in self.failed:
                assert job_id not in self.done, self.done[job_id]
                await self._change()
        return self.failed[job_id]

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@asynccontextmanager
async def running(
    model_dir: Path,
    *,
    threads: int = 1,
    hang_s: float = 20.0,
    load_s: float = 60.0,
    settled_s: float = 60.0,
    load: bool = True,
    backend: Literal["auto", "slots", "genai"] = "auto",
    slots: int = 0,
    ends_loops: bool = True,
    provider: str = "cpu",
    tune_s: float = 0.0,
) -> AsyncIterator[tuple[Engine, Recorder]]:
    """An engine, ready unless ``load`` is false; none of its processes is there afterwards."""
    events = Recorder()
    engine = Engine(
        model_dir, "model", threads, events,
        backend=backend, slots=slots, ends_loops=ends_loops,
        provider=provider, tune_s=tune_s,
        hang_s=hang_s, load_s=load_s, settled_s=settled_s,
    )  # fmt: skip
    await engine.start()
    try:
        if load:
            await events.loads()
        yield engine, events
    finally:
        pid = engine.pid
        await engine.stop()
        assert engine.pid is None
        assert pid is None or not alive(pid)


def job(
    job_id: int,
    *turns: str,
    max_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    stream: bool = True,
    messages: tuple[ChatMessage, ...] = (),
) -> Job:
    """A job for the model: ``messages``, or else ``turns`` of user and assistant."""
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    return Job(job_id, "proposal", messages or conversation(*turns), sampling, stream)


def conversation(*turns: str) -> tuple[ChatMessage, ...]:
    """User and assistant in turns."""
    return tuple(
        ChatMessage("assistant" if at % 2 else "user", text) for at, text in enumerate(turns)
    )


def pid_of(engine: Engine) -> int:
    assert engine.pid is not None
    return engine.pid


def process_file(pid: int | str, name: str) -> str:
    """What the kernel says of a process."""
    return Path(f"/proc/{pid}/{name}").read_text()


def alive(pid: int) -> bool:
    """Whether the process still runs; one that only waits to be reaped does not."""
    try:
        return process_file(pid, "stat").rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, within_s: float) -> bool:
    """Wait for a process that is not ours to end."""
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def cpu_s(pid: int) -> float:
    """Processor time that the process has used."""
    fields = process_file(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
