"""The engines that ``bench-engine`` compares, each in a process of its own.

Ours is the daemon's own :class:`~edgemoa.engine.engine.Engine`, with the pipe to its model process;
llama.cpp is the library (``bench_engine_llama.py``) and its server, over a Unix socket. All get the
same tokens, write greedily, and go on beyond any end, so that as much is written by each.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

from edgemoa.core.events import EngineInfo, Job, TokenLogprob, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.core.rates import Rates
from edgemoa.engine.engine import Engine
from edgemoa.engine.worker import NICENESS

Messages = tuple[ChatMessage, ...]

LOAD_S: Final = 120.0
ANSWER_S: Final = 300.0  # nothing that is asked here takes as long
SERVER_CONTEXT_TOKENS: Final = 512  # of a slot
LINE_BYTES: Final = 1 << 20


@dataclass
class Stream:
    """One text as it came: times are seconds of this process's ``time.perf_counter``."""

    sent_s: float
    pieces_s: list[float] = field(default_factory=list)  # when a piece of text arrived
    ended_s: float = 0.0
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """From the request to the first token, which is also the end where only one was asked."""
        return (self.pieces_s[0] if self.pieces_s else self.ended_s) - self.sent_s

    @property
    def rest_s(self) -> float:
        """From the first token to the end."""
        return self.ended_s - self.sent_s - self.first_s


def total_speed(streams: Sequence[Stream]) -> float:
    """Tokens a second of several streams together, while all of them run."""
    start = max(stream.pieces_s[0] for stream in streams)
    end = min(stream.ended_s for stream in streams)
    written = 0.0
    for stream in streams:
        within = sum(start < at <= end for at in stream.pieces_s)
        written += (
            within * stream.tokens / len(stream.pieces_s)
        )  # a character of two tokens: 1 piece
    return written / (end - start)


# --- ours


@dataclass
class Told:
    """A job's stream and its end."""

    stream: Stream
    first: asyncio.Future[None]
    end: asyncio.Future[WorkDone]


class Ours:
    """A running engine: jobs by number, and what it says of them (an ``EngineEvents``)."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.engine: Engine
        self.ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._jobs: dict[int, Told] = {}
        self._last = 0

    def start(self, messages: Messages, tokens: int, **sampling: Any) -> int:
        """Hand over a job for so many tokens; its number."""
        self._last += 1
        loop = asyncio.get_running_loop()
        told = Told(Stream(time.perf_counter()), loop.create_future(), loop.create_future())
        self._jobs[self._last] = told
        asked = Sampling(max_tokens=tokens, **sampling)
        self.engine.work(Job(self._last, "aggregation", messages, asked, stream=True))
        return self._last

    async def begun(self, number: int) -> Stream:
        """The job's stream, once it has its first token."""
        told = self._jobs[number]
        either: set[asyncio.Future[Any]] = {told.first, told.end}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return told.stream

    async def ended(self, number: int) -> tuple[Stream, WorkDone]:
        """The whole of it."""
        told = self._jobs[number]
        async with asyncio.timeout(ANSWER_S):
            return told.stream, await told.end

    async def write(
        self, messages: Messages, tokens: int, **sampling: Any
    ) -> tuple[Stream, WorkDone]:
        """A job, from its beginning to its end."""
        return await self.ended(self.start(messages, tokens, **sampling))

    async def write_all(self, prompts: Sequence[Messages], tokens: int) -> list[Stream]:
        """Several at once."""
        numbers = [self.start(messages, tokens) for messages in prompts]
        return [(await self.ended(number))[0] for number in numbers]

    # what the engine says

    def on_ready(self, info: EngineInfo) -> None:
        if not self.ready.done():
            self.ready.set_result(info)

    def on_rates(self, rates: Rates) -> None:
        pass

    def on_text(self, job_id: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        told = self._jobs[job_id]
        told.stream.pieces_s.append(time.perf_counter())
        if not told.first.done():
            told.first.set_result(None)

    def on_done(self, job_id: int, result: WorkDone) -> None:
        told = self._jobs[job_id]
        told.stream.ended_s = time.perf_counter()
        told.stream.tokens = result.tokens
        told.end.set_result(result)

    def on_failed(self, job_id: int, failure: WorkFailed) -> None:
        self._jobs[job_id].end.set_exception(SystemExit(f"our engine: {failure.reason}"))

    def on_lost(self, reason: str) -> None:
        lost = SystemExit(f"our engine: {reason}")
        waiting: list[asyncio.Future[Any]] = [self.ready, *(t.end for t in self._jobs.values())]
        for future in waiting:
            if not future.done():
                future.set_exception(lost)


@asynccontextmanager
async def ours(
    folder: Path, threads: int, slots: int, backend: Literal["auto", "genai"] = "auto"
) -> AsyncIterator[Ours]:
    """Our engine with a model folder, loaded."""
    side = Ours()
    side.engine = Engine(
        folder, "model", threads, side, backend=backend, slots=slots, ends_loops=False
    )
    await side.engine.start()
    try:
        await side.ready
        yield side
    finally:
        await side.engine.stop()


def endless(folder: Path) -> None:
    """Have no text end by itself: the model's last token, which hardly any model ever writes, is
    the only one that would end it."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text("utf-8"))
    config["model"]["eos_token_id"] = [config["model"]["vocab_size"] - 1]
    file.write_text(json.dumps(config), "utf-8")


# --- llama.cpp


@dataclass
class LlamaCpp:
    """The library, in the interpreter of its environment."""

    process: asyncio.subprocess.Process

    async def write_all(self, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
        """See ``bench_engine_llama.py``."""
        assert self.process.stdin is not None  # noqa: S101 - by how it was started
        request = {"prompts": list(prompts), "count": tokens}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return await self.line()

    async def line(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None  # noqa: S101
        line = await self.process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp ended; run it by hand: tools/bench_engine_llama.py")
        said: dict[str, Any] = json.loads(line)
        return said


@asynccontextmanager
async def llama_cpp(python: Path, gguf: Path, threads: int) -> AsyncIterator[LlamaCpp]:
    """llama.cpp's library with the file, loaded, and as polite to others as our process is."""
    script = Path(__file__).with_name("bench_engine_llama.py")
    command = [str(word) for word in (python, script, gguf, threads, NICENESS)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=LINE_BYTES
    )
    try:
        side = LlamaCpp(process)
        await side.line()
        yield side
    finally:
        await _end(process)


@dataclass
class Server:
    """llama.cpp's server and a client of it."""

    session: aiohttp.ClientSession

    async def write_all(self, prompts: Sequence[list[int]], tokens: int) -> list[Stream]:
        """All prompts at once, a connection for each."""
        return list(await asyncio.gather(*(self._write(prompt, tokens) for prompt in prompts)))

    async def _write(self, prompt: list[int], tokens: int) -> Stream:
        asked = {
            "prompt": prompt, "n_predict": tokens, "stream": True, "ignore_eos": True,
            "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        stream = Stream(time.perf_counter())
        async with self.session.post("http://localhost/completion", json=asked) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event["stop"]:
                    stream.ended_s = time.perf_counter()
                    stream.tokens = event["tokens_predicted"]
                elif event["content"]:
                    stream.pieces_s.append(time.perf_counter())
        return stream


@asynccontextmanager
async def llama_server(
    binary: Path, gguf: Path, threads: int, slots: int, work: Path
) -> AsyncIterator[Server]:
    """llama.cpp's server with the file, loaded, and as polite to others as our process is."""
    socket = work / "llama.sock"
    socket.unlink(missing_ok=True)  # the one before left it
    nice = shutil.which("nice")
    polite = [nice, "-n", str(NICENESS)] if nice else []
    command = [
        *polite, binary, "-m", gguf, "--host", socket, "-np", slots, "-c",
        slots * SERVER_CONTEXT_TOKENS, "-t", threads, "-tb", threads,
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    connector = aiohttp.UnixConnector(str(socket), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            await _until(lambda: _healthy(session), process)
            yield Server(session)
        finally:
            await _end(process)


async def _healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("http://localhost/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _until(holds: Callable[[], Awaitable[bool]], process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(LOAD_S):
        while not await holds():
            if process.returncode is not None:
                raise SystemExit(f"llama.cpp's server ended with status {process.returncode}")
            await asyncio.sleep(0.1)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
