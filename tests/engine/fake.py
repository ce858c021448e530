"""An engine without a model, for tests of what stands on it.

For tests in one process. Where a test starts the real daemon, give the daemon the folder of
``write_tiny_model`` (tiny.py, beside this) as its model: that is the real engine, process border
included, with a known text in milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edgemoa.core.events import EngineInfo, Given, Job, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage
from edgemoa.engine.engine import Engine, EngineEvents
from edgemoa.errors import EngineError


def count_words(messages: tuple[ChatMessage, ...]) -> int:
    """The fake's tokens: words, and one per turn for the template."""
    return sum(1 + len(message.content.split()) for message in messages)


def echo(job: Job) -> str:
    """The fake's usual answer: the last turn's words in upper case."""
    return job.messages[-1].content.upper()


class FakeEngine(Engine):
    """Writes ``answer(job)`` word by word, each in ``token_s``, up to ``slots`` jobs at a time.

    Reports as :class:`Engine` does, from the event loop and never from inside a call.
    ``fail_next`` makes the next job to begin fail so; :meth:`lose` is the process dying, with
    another ready ``restart_s`` later; ``jobs`` are all that were handed over, in order.
    """

    def __init__(
        self,
        model_name: str,
        events: EngineEvents,
        *,
        answer: Callable[[Job], str] = echo,
        token_s: float = 0.0,
        slots: int = 1,
        context_tokens: int = 2048,
        load_s: float = 0.0,
        restart_s: float = 0.05,
    ) -> None:
        super().__init__(Path(), model_name, 1, events)
        self.jobs: list[Job] = []
        self.fail_next: WorkFailed | None = None
        self._told = events
        self._info = EngineInfo(model_name, context_tokens, slots)
        self._answer = answer
        self._token_s = token_s
        self._load_s = load_s
        self._restart_s = restart_s
        self._waiting: deque[Job] = deque()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._loading: asyncio.Task[None] | None = None
        self._down = False
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, and not gone yet

    async def start(self) -> None:
        self._load(self._load_s)

    async def stop(self) -> None:
        self._end_all()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def work(self, job: Job) -> None:
        self.jobs.append(job)
        if self._down:
            failure = WorkFailed("The model process is down; it is being started again.")
            asyncio.get_running_loop().call_soon(self._told.on_failed, job.job_id, failure)
        else:
            self._waiting.append(job)
            self._begin()

    def cancel(self, job_id: int) -> None:
        self._waiting = deque(job for job in self._waiting if job.job_id != job_id)
        if (task := self._running.pop(job_id, None)) is not None:
            self._end(task)
            self._begin()

    async def measure(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        if self._down:
            raise EngineError("The model process is down; it is being started again.")
        if self._loading is not None:
            await asyncio.wait({self._loading})
        return count_words(messages)

    def lose(self, reason: str = "The model process was ended by SIGKILL at work.") -> None:
        """The model process dies."""
        self._end_all()
        self._down = True
        self._told.on_lost(reason)
        self.restarts += 1
        self._load(self._restart_s)

    def _load(self, seconds: float) -> None:
        self._loading = asyncio.create_task(self._become_ready(seconds))

    async def _become_ready(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.pid, self._down = 1, False
        self._told.on_ready(self._info)
        self._begin()

    def _begin(self) -> None:
        while self.pid is not None and self._waiting and len(self._running) < self._info.slots:
            job = self._waiting.popleft()
            self._running[job.job_id] = asyncio.create_task(self._write(job))

    async def _write(self, job: Job) -> None:
        await asyncio.sleep(0)
        failure, self.fail_next = self.fail_next, None
        prompt = count_words(job.messages)
        if failure is None and prompt >= self._info.context_tokens:
            failure = WorkFailed(f"{prompt} tokens, {self._info.context_tokens} fit", "context")
        result = None if failure is not None else await self._generate(job, prompt)
        del self._running[job.job_id]
        self._begin()
        if failure is not None:
            self._told.on_failed(job.job_id, failure)
        elif result is not None:
            self._told.on_done(job.job_id, result)

    async def _generate(self, job: Job, prompt: int) -> WorkDone:
        words = self._answer(job).split()
        limit = min(job.sampling.max_tokens, self._info.context_tokens - prompt)
        pieces = [f" {word}" if at else word for at, word in enumerate(words[:limit])]
        for piece in pieces:
            await asyncio.sleep(self._token_s)
            if job.stream:
                self._told.on_text(job.job_id, piece)
        return WorkDone(
            text="".join(pieces),
            finish="stop" if len(words) <= limit else "length",
            prompt_tokens=prompt,
            tokens=len(pieces),
            prefill_ms=0,
            decode_ms=round(1000 * self._token_s * len(pieces)),
            model_ms=round(1000 * self._token_s * len(pieces)),
        )

    def _end_all(self) -> None:
        self.pid = None
        self._waiting.clear()
        for task in self._running.values():
            self._end(task)
        self._running.clear()
        if self._loading is not None:
            self._end(self._loading)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
