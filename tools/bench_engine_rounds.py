"""The rounds of ``bench-engine``: engines started anew, each asked for the same in its turn."""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench_engine_limits import bandwidth
from bench_engine_prompts import (
    ANSWER_TOKENS,
    FOLLOW_UP,
    LONG_TOKENS,
    TO_AGGREGATE,
    Loads,
    asked,
    from_nothing,
)
from bench_engine_sides import (
    LlamaCpp,
    Messages,
    Ours,
    Server,
    Stream,
    llama_cpp,
    llama_server,
    ours,
    total_speed,
)
from figures import say

from edgemoa.core.messages import ChatMessage
from edgemoa.models.library import Manifest

SLOTS: Final = 8
WRITTEN_TOKENS: Final = 101  # of each text; the first is the prefill's
IDLE_S: Final = 10.0


@dataclass
class Rivals:
    """What ours is compared with, as far as it is there."""

    python: Path | None  # of llama.cpp's environment
    server: Path | None
    genai: bool


@dataclass
class Bench:
    """All measurements, by name: a value of each round; and notes on some."""

    folder: Path
    manifest: Manifest
    gguf: Path
    threads: int
    loads: Loads
    rivals: Rivals
    work: Path
    samples: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, str] = field(default_factory=dict)

    async def run(self, rounds: int) -> None:
        """Everything."""
        began, busy = time.perf_counter(), _busy_s()
        say("writing proposals and a conversation")
        async with ours(self.folder, self.threads, SLOTS) as our:
            await self.loads.write(our)
        for number in range(rounds):
            await self._round(f"round {number + 1} of {rounds}", swapped=number % 2 == 1)
        say("memory, idle time")
        await self._upkeep()
        own = sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        cores_s = (os.cpu_count() or 1) * (time.perf_counter() - began)
        self._add("others", 100 * max(_busy_s() - busy - own, 0) / cores_s)

    async def _round(self, title: str, *, swapped: bool) -> None:
        async with AsyncExitStack() as stack:
            our = await stack.enter_async_context(ours(self.folder, self.threads, SLOTS))
            their = server = None
            if self.rivals.python:
                their = await stack.enter_async_context(
                    llama_cpp(self.rivals.python, self.gguf, self.threads)
                )
            if self.rivals.server:
                server = await stack.enter_async_context(
                    llama_server(self.rivals.server, self.gguf, self.threads, SLOTS, self.work)
                )

            async def turns(*measures: Awaitable[None]) -> None:
                for measure in reversed(measures) if swapped else measures:
                    await measure

            say(f"{title}: short prompts")
            self._add("bandwidth", await asyncio.to_thread(bandwidth, self.threads))
            await turns(self._short(our), self._their_short(their))
            say(f"{title}: prompts of {LONG_TOKENS} tokens")
            await turns(self._long(our), self._their_long(their))
            say(f"{title}: {SLOTS} at once")
            await turns(self._eight(our), self._their_eight(their), self._server_eight(server))
            say(f"{title}: late arrivals, an aggregation, a follow-up")
            await self._arrivals(our)
            await turns(self._aggregation(our), self._their_aggregation(their))
            await self._follow_up(our)
            await stack.aclose()
            if self.rivals.genai:
                say(f"{title}: genai")
                await self._genai()

    def _add(self, name: str, value: float) -> None:
        self.samples[name].append(value)

    # ours

    async def _short(self, our: Ours, name: str = "our short") -> None:
        streams = [(await our.write(each, WRITTEN_TOKENS))[0] for each in self.loads.short]
        self._add(name, _rest_speed(streams))

    async def _long(self, our: Ours, name: str = "our long") -> None:
        found = [await our.write(each, WRITTEN_TOKENS) for each in self.loads.long]
        read = sum(done.prompt_tokens - done.cached_tokens for _, done in found)
        self._add(f"{name} prefill", read / sum(stream.first_s for stream, _ in found))
        self._add(name, _rest_speed([stream for stream, _ in found]))
        _, done = found[-1]
        self.notes[f"{name} prefill"] = (
            f"{done.prompt_tokens} tokens, {done.cached_tokens} of them cached"
        )

    async def _eight(self, our: Ours) -> None:
        self._add("our eight", total_speed(await our.write_all(self.loads.eight, WRITTEN_TOKENS)))

    async def _arrivals(self, our: Ours) -> None:
        """The first token of a prompt that nobody has read, alone and beside seven others."""
        alone = [await our.write(each, 1) for each in self.loads.alone]
        others = [our.start(each, 10 * WRITTEN_TOKENS) for each in self.loads.eight[1:]]
        for number in others:
            await our.begun(number)
        late = [await our.write(each, 1) for each in self.loads.arrivals]
        for number in others:
            our.engine.cancel(number)
        for name, found in (("alone", alone), ("late", late)):
            self._add(name, 1000 * statistics.median(stream.first_s for stream, _ in found))
            _, done = found[-1]
            self.notes[name] = f"{done.prompt_tokens} tokens, {done.cached_tokens} of them cached"

    async def _aggregation(self, our: Ours) -> None:
        """From nothing; then as it goes: the board has proposed, and reads what arrives; then
        with the last proposal told of in parts, of which the owner has not read the end."""
        whole, all_of_it = await our.write(self.loads.aggregation(f"Please, {TO_AGGREGATE}"), 1)
        self._add("our aggregation whole", 1000 * whole.first_s)
        for name, question, parts in (
            ("last", TO_AGGREGATE, False),
            ("streamed", f"Say it briefly: {TO_AGGREGATE}", True),
        ):
            await our.write(asked(question), 1)
            for begun in self.loads.begun(question, parts=parts):
                our.engine.read_ahead("aggregation", begun)
                await _settled(our)
            last, done = await our.write(self.loads.aggregation(question), WRITTEN_TOKENS)
            our.engine.read_ahead("aggregation", ())
            self._add(f"our aggregation {name}", 1000 * last.first_s)
            if not parts:
                self._add("our aggregation", _rest_speed([last]))
            self.notes[f"aggregation {name}"] = (
                f"{done.prompt_tokens - done.cached_tokens} of {done.prompt_tokens} tokens,"
                f" against {all_of_it.prompt_tokens - all_of_it.cached_tokens}"
            )

    async def _follow_up(self, our: Ours) -> None:
        """The first token of a conversation's next turn, from nothing and after the one before."""
        _, before = await our.write(self.loads.talk, ANSWER_TOKENS)
        answer = ChatMessage("assistant", before.text)
        follow_up = (*self.loads.talk, answer, ChatMessage("user", FOLLOW_UP))
        warm, done = await our.write(follow_up, 1)
        cold, all_of_it = await our.write(from_nothing(follow_up), 1)
        self._add("follow-up", 1000 * warm.first_s)
        self._add("cold", 1000 * cold.first_s)
        self.notes["follow-up"] = (
            f"{done.prompt_tokens - done.cached_tokens} of {done.prompt_tokens} tokens,"
            f" against {all_of_it.prompt_tokens - all_of_it.cached_tokens}"
        )

    async def _genai(self) -> None:
        async with ours(self.folder, self.threads, 1, "genai") as our:
            await self._short(our, "genai short")
            await self._long(our, "genai long")

    async def _upkeep(self) -> None:
        """Memory with much in it, and what a process costs that has nothing to do."""
        prompts = [*self.loads.eight[1:], self.loads.long[0]]
        async with ours(self.folder, self.threads, SLOTS) as our:
            streams = await our.write_all(prompts, WRITTEN_TOKENS)
            held = sum(len(self.loads.tokens(each)) for each in prompts)
            held += sum(stream.tokens for stream in streams)
            assert our.engine.pid is not None  # noqa: S101 - it has just answered
            process = Path(f"/proc/{our.engine.pid}")
            self._add("peak", _megabytes(process / "status", "VmHWM"))
            for name in ("Pss", "Anonymous"):
                self._add(name, _megabytes(process / "smaps_rollup", name))
            self._add("held", held * self.manifest.kv_bytes_per_token / 1e6)
            await asyncio.sleep(1)
            busy_s = _cpu_s(our)
            await asyncio.sleep(IDLE_S)
            self._add("idle", 100 * (_cpu_s(our) - busy_s) / IDLE_S)
        if self.rivals.python:
            async with llama_cpp(self.rivals.python, self.gguf, self.threads) as their:
                await their.write_all(self._ids(prompts[:1]), WRITTEN_TOKENS)
                self._add(
                    "their peak", _megabytes(Path(f"/proc/{their.process.pid}/status"), "VmHWM")
                )

    # theirs

    def _ids(self, prompts: Sequence[Messages]) -> list[list[int]]:
        return [self.loads.tokens(messages) for messages in prompts]

    async def _their_short(self, their: LlamaCpp | None) -> None:
        if their:
            found = [
                await their.write_all([ids], WRITTEN_TOKENS) for ids in self._ids(self.loads.short)
            ]
            written = len(found) * (WRITTEN_TOKENS - 1)
            self._add("their short", written / sum(each["rest_s"] for each in found))

    async def _their_long(self, their: LlamaCpp | None) -> None:
        if their:
            prompts = self._ids(self.loads.long)
            found = [await their.write_all([ids], WRITTEN_TOKENS) for ids in prompts]
            read, written = sum(map(len, prompts)), len(found) * (WRITTEN_TOKENS - 1)
            self._add("their long prefill", read / sum(each["first_s"] for each in found))
            self._add("their long", written / sum(each["rest_s"] for each in found))

    async def _their_eight(self, their: LlamaCpp | None) -> None:
        if their:
            found = await their.write_all(self._ids(self.loads.eight), WRITTEN_TOKENS)
            self._add("their eight", SLOTS * (WRITTEN_TOKENS - 1) / found["rest_s"])

    async def _server_eight(self, server: Server | None) -> None:
        if server:
            prompts = self._ids(self.loads.eight)
            self._add("server eight", total_speed(await server.write_all(prompts, WRITTEN_TOKENS)))

    async def _their_aggregation(self, their: LlamaCpp | None) -> None:
        if their:
            ids = self._ids([self.loads.aggregation(TO_AGGREGATE)])
            found = await their.write_all(ids, WRITTEN_TOKENS)
            self._add("their aggregation", (WRITTEN_TOKENS - 1) / found["rest_s"])
            self._add("their aggregation whole", 1000 * found["first_s"])


def _rest_speed(streams: Sequence[Stream]) -> float:
    """Tokens a second after the first of each, of one stream after the other."""
    return sum(stream.tokens - 1 for stream in streams) / sum(stream.rest_s for stream in streams)


async def _settled(our: Ours) -> None:
    """Wait until the model process rests."""
    before_s, now_s = -1.0, _cpu_s(our)
    while now_s != before_s:
        await asyncio.sleep(0.1)
        before_s, now_s = now_s, _cpu_s(our)


def _cpu_s(our: Ours) -> float:
    """What the model process has computed so far."""
    assert our.engine.pid is not None  # noqa: S101 - else what was asked of it has failed
    fields = Path(f"/proc/{our.engine.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy_s() -> float:
    """What all processes of this machine have computed so far."""
    fields = Path("/proc/stat").read_text("ascii").partition("\n")[0].split()[1:]
    user, nice, system, *_ = map(int, fields)
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _megabytes(file: Path, name: str) -> float:
    """An entry in kilobytes of a file in ``/proc``."""
    for line in file.read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"{file} has no {name}")
