"""The daemon's handle on its model process: starts it, talks to it, replaces it when it dies.

Nothing here imports onnxruntime, and nothing here waits for the model: what the model process
says arrives as calls of :class:`EngineEvents`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from edgemoa.core import limits
from edgemoa.core.events import EngineInfo, Given, Job, TokenLogprob, WorkDone, WorkFailed
from edgemoa.core.messages import ChatMessage
from edgemoa.core.rates import Rates
from edgemoa.engine import frames
from edgemoa.engine.tuning import Tuning
from edgemoa.errors import EngineError, InvalidPromptError, UserError

T = TypeVar("T", frames.Scored, frames.Embedded)
V = TypeVar("V")

log = logging.getLogger(__name__)

HANG_S: Final = 120.0  # without a word while there is work; a word comes after each model step
LOAD_S: Final = 600.0  # for a large model from a slow card
FIRST_DELAY_S: Final = 0.25
MAX_DELAY_S: Final = 30.0
SETTLED_S: Final = 60.0  # a process that was ready for so long starts the delays anew
GRACE_S: Final = 1.0  # for a process to end by itself
CHECK_S: Final = 30.0  # for a schema to be checked: a second of processor time, on a busy board

MAX_UNREAD_BYTES: Final = 64 * limits.MIB  # that the process is behind with reading
_READ_BYTES: Final = 65536
_KEPT_CHECKS: Final = 64  # of schemas that can be obeyed, and as many of those that cannot
_MAX_LOG_BYTES: Final = 65536  # of one process
_KEPT_VARIABLES: Final = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


class EngineEvents(Protocol):
    """Whom the engine reports to. Called in the event loop; must not block."""

    def on_ready(self, info: EngineInfo) -> None:
        """The model is loaded: at the start, and again after each loss."""

    def on_lost(self, reason: str) -> None:
        """The model process died, hung or could not load. Its jobs are gone; another process
        follows by itself. ``reason`` is a sentence for the user, with what to do where known."""

    def on_text(self, job_id: int, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """The next piece of a job with ``stream``."""

    def on_done(self, job_id: int, result: WorkDone) -> None:
        """The job's result."""

    def on_failed(self, job_id: int, failure: WorkFailed) -> None:
        """The job could not be done; the process goes on."""

    def on_rates(self, rates: Rates) -> None:
        """How fast the model process has been so far, over all its jobs."""


class Engine:
    """One model process at a time.

    ``pid`` is the process's, None while there is none. ``restarts`` counts the processes after the
    first. ``tuning`` is what the process found where it was asked to tune first, for ``tune_s``
    seconds or so; ``note`` why it does not run as it was to. ``backend``, ``provider``,
    ``memory_mb``, ``slots`` and ``ends_loops`` are the settings of the same names (see
    :class:`edgemoa.config.Model`). ``hang_s``, ``load_s`` and ``settled_s`` replace the constants
    above.
    """

    def __init__(
        self,
        model_dir: Path,
        model_name: str,
        threads: int,
        events: EngineEvents,
        *,
        backend: Literal["auto", "slots", "genai"] = "auto",
        provider: str = "cpu",
        slots: int = 0,
        most_slots: int = 0,
        memory_mb: int = 0,
        tune_s: float = 0.0,
        ends_loops: bool = True,
        hang_s: float = HANG_S,
        load_s: float = LOAD_S,
        settled_s: float = SETTLED_S,
    ) -> None:
        self.pid: int | None = None
        self.restarts = 0
        self.tuning: Tuning | None = None
        self.note = ""
        self._fallen_back = ""
        self._model_dir = model_dir
        self._model_name = model_name
        self._events = events
        self._threads = threads
        self._slots = slots
        self._most_slots = most_slots
        self._tune_s = tune_s
        self._provider = provider
        self._options = ["--backend", backend, "--memory", str(memory_mb)]
        if not ends_loops:
            self._options.append("--keep-loops")
        self._hang_s = hang_s
        self._load_s = load_s
        self._settled_s = settled_s
        self._keeper: asyncio.Task[None] | None = None
        self._stdin: asyncio.StreamWriter | None = None  # of the process, while there is one
        self._ready_at: float | None = None  # loop time
        self._jobs: set[int] = set()
        self._reads_ahead = False  # whether the process can use what would be read
        self._ahead: set[str] = set()  # of whom it was told what to read
        self._calls: dict[int, asyncio.Future[int]] = {}
        self._asked: dict[int, asyncio.Future[frames.Scored | frames.Embedded]] = {}
        self._last_call = 0
        self._checking = asyncio.Lock()
        self._checked: dict[bytes, None] = {}  # schemas that can be obeyed
        self._refused: dict[bytes, str] = {}  # and those that cannot: why
        self._quiet_s = 0.0  # since the last word of a process that has something to do
        self._verdict = ""  # why the process is about to end, where that is known

    async def start(self) -> None:
        """Start the model process; ``on_ready`` follows.

        Raises :class:`EngineError` where not even the process can be started.
        """
        try:
            process = await self._spawn()
        except OSError as error:
            raise EngineError(f"The model process cannot be started: {error.strerror}.") from error
        self._keeper = asyncio.create_task(self._keep(process), name="engine")
        self._keeper.add_done_callback(_report_failure)

    async def stop(self) -> None:
        """End the model process and wait until it is gone; jobs are dropped without a word."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})

    def work(self, job: Job) -> None:
        """Hand over a job; jobs beyond the process's slots wait there in order.

        Every way to fail is an event, never from inside this call: ``on_failed`` where the process
        could not take such a prompt or there is none, ``on_lost`` where it dies, or has just died.
        """
        frame = frames.Generate(job.job_id, job.messages, job.sampling, job.stream, job.wishes)
        self._jobs.add(job.job_id)
        try:
            self._send(frame)
        except (EngineError, InvalidPromptError) as error:
            if self._ready_at is not None and self._is_down:
                return  # the process has just died, and ``on_lost`` is on its way
            failure = frames.Failed(job.job_id, frames.failure(error))
            asyncio.get_running_loop().call_soon(self._handle, failure)

    def cancel(self, job_id: int) -> None:
        """Drop a job; nothing more is reported of it. Nothing where there is no such job."""
        if job_id in self._jobs:
            self._jobs.discard(job_id)
            with suppress(EngineError):  # down, and the job with it
                self._send(frames.Cancel(job_id))

    def read_ahead(self, request_id: str, messages: tuple[ChatMessage, ...]) -> None:
        """See :class:`edgemoa.core.events.ReadAhead`. Nothing comes of it but time saved, so
        nothing is said where it cannot be done."""
        if self._ready_at is None or not self._reads_ahead:
            return
        if not messages and request_id not in self._ahead:
            return
        with suppress(EngineError, InvalidPromptError):
            self._send(frames.ReadAhead(request_id, messages))
            (self._ahead.add if messages else self._ahead.discard)(request_id)

    async def measure(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """Count a conversation's tokens, chat template included; waits while the model loads.

        Raises :class:`EngineError` while there is no process or when it dies meanwhile, and
        :class:`InvalidPromptError` for a conversation that the model's template refuses, that is
        too large, or that is not Unicode.
        """
        self._last_call += 1
        call_id = self._last_call
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._send(frames.Measure(call_id, messages, given))
        self._calls[call_id] = answer
        try:
            return await answer
        finally:
            self._calls.pop(call_id, None)

    async def score(
        self, messages: tuple[ChatMessage, ...], candidates: Sequence[str]
    ) -> tuple[frames.Likelihood, ...]:
        """How likely the model would have answered with each of the candidates, in their order.

        Waits while the model loads, and for a slot like a job; cancelled, it frees the slot within
        one step. Raises :class:`InvalidPromptError` for what is empty, too large or not Unicode,
        :class:`PromptTooLongError` for a candidate that does not fit behind the conversation, and
        :class:`EngineError` where the model cannot score, while there is no process, or when it
        dies meanwhile.
        """
        if not candidates or not all(candidates):
            raise InvalidPromptError("There is nothing to score: a candidate is empty.")
        if len(candidates) > limits.MAX_CANDIDATES:
            raise InvalidPromptError(
                f"{len(candidates)} candidates are too many; {limits.MAX_CANDIDATES} are scored at"
                " a time."
            )
        score = frames.Score(self._new_id(), messages, tuple(candidates))
        return (await self._ask(score, frames.Scored)).scores

    async def embed(self, texts: Sequence[str]) -> frames.Embedded:
        """A vector for each of the texts, in their order; :mod:`edgemoa.engine.embed` says what of
        the model it is.

        Waits, is cancelled and fails as :meth:`score` does: :class:`InvalidPromptError` for what is
        empty, too much at a time or no text, :class:`PromptTooLongError` for a text that does not
        fit in the model's context, :class:`ModelInvalidError` where the model cannot do it, and
        :class:`EngineError`.
        """
        if not texts or not all(texts):
            raise InvalidPromptError("There is nothing to embed: a text is empty.")
        if len(texts) > limits.MAX_EMBEDDED:
            raise InvalidPromptError(
                f"{len(texts)} texts are too many; {limits.MAX_EMBEDDED} are embedded at a time."
            )
        size_bytes = sum(len(text.encode(errors="replace")) for text in texts)
        if size_bytes > limits.MAX_PROMPT_BYTES:
            raise InvalidPromptError(
                f"The texts have {size_bytes} bytes; {limits.MAX_PROMPT_BYTES} are embedded at a"
                " time."
            )
        told = await self._ask(frames.Embed(self._new_id(), tuple(texts)), frames.Embedded)
        if len(told.embeddings) != len(texts):
            raise EngineError("The model process did not answer what it was asked.")
        return told

    def _new_id(self) -> int:
        """Of what takes a slot and is no job."""
        self._last_call += 1
        return -self._last_call

    async def _ask(self, work: frames.Score | frames.Embed, kind: type[T]) -> T:
        answer: asyncio.Future[frames.Scored | frames.Embedded]
        answer = asyncio.get_running_loop().create_future()
        self._send(work)
        self._asked[work.job_id] = answer
        try:
            told = await answer
        finally:
            del self._asked[work.job_id]
            if answer.cancelled():
                with suppress(EngineError):  # down, and the job with it
                    self._send(frames.Cancel(work.job_id))
        if not isinstance(told, kind):
            raise EngineError("The model process did not answer what it was asked.")
        return told

    async def check_schema(self, schema: str) -> None:
        """See whether an answer can be held to a JSON schema, in a process of its own, one at a
        time: some schemas take time and memory without end.

        What came of it is remembered, so that asking again costs nothing. Raises
        :class:`UserError` for one that does, or that cannot be obeyed, and :class:`EngineError`
        where schemas cannot be checked here.
        """
        digest = hashlib.sha256(schema.encode()).digest()
        refused = self._refused.get(digest, "")
        if not refused and digest not in self._checked:
            async with self._checking:
                refused = await self._check(schema.encode(), digest)
        if refused:
            raise UserError(refused, hint="use another one")

    async def _check(self, schema: bytes, digest: bytes) -> str:
        """Why a schema cannot be obeyed; empty where it can."""
        if digest in self._checked or digest in self._refused:  # while this one waited
            return self._refused.get(digest, "")
        status, said = await _run_check(schema)
        if status == EngineError.exit_code:
            raise EngineError(said, hint="Install edgemoa again, with its dependencies.")
        if status == -signal.SIGKILL:  # not by its own limits
            raise EngineError("The JSON schema could not be checked: its check was killed.")
        if status:
            said = said or "The JSON schema takes too much time or memory to be made a grammar of"
            _remember(self._refused, digest, said)
            return said
        _remember(self._checked, digest, None)
        return ""

    # --- the life of the processes

    async def _keep(self, process: Process) -> None:
        """Keep a model process running, until cancelled."""
        loop = asyncio.get_running_loop()
        delay_s = FIRST_DELAY_S
        try:
            while True:
                reason = await self._attend(process)
                if self._ready_at is not None and loop.time() - self._ready_at >= self._settled_s:
                    delay_s = FIRST_DELAY_S
                self._lose(reason)
                while True:
                    log.info("model process starts again in %.2f s", delay_s)
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, MAX_DELAY_S)
                    self.restarts += 1
                    try:
                        process = await self._spawn()
                        break
                    except OSError as error:
                        self._lose(f"The model process cannot be started: {error.strerror}.")
        finally:
            self._forget("The engine was stopped.")

    async def _spawn(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing from whatever folder the daemon was started in
            *("-m", "edgemoa.engine.worker"),
            str(self._model_dir.absolute()),
            *("--threads", str(self._threads)),
            *("--slots", str(self._slots), "--most-slots", str(self._most_slots)),
            *("--provider", self._provider, "--tune", str(self._tune_s)),
            *self._options,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            cwd="/",
            env=_environment(),
            start_new_session=True,  # signals from the terminal are the daemon's to act on
        )
        self.pid = process.pid
        self._stdin = process.stdin
        self._ready_at = None
        self._quiet_s = 0.0
        self._verdict = ""
        return process

    async def _attend(self, process: Process) -> str:
        """Listen to a process until its end; returns why it ended. Leaves nothing of it behind."""
        assert process.stderr is not None  # noqa: S101 - by how it was spawned
        async with asyncio.TaskGroup() as helpers:
            watch = helpers.create_task(self._watch(process))
            helpers.create_task(_log_lines(process.stderr))
            try:
                await self._listen(process)
                with suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await process.wait()
                return self._verdict or self._why(process.returncode)
            finally:
                self.pid, self._stdin = None, None
                watch.cancel()
                await _end(process)

    async def _listen(self, process: Process) -> None:
        """Pass on what the process says until it closes its end, or says what nobody understands"""
        assert process.stdout is not None  # noqa: S101 - by how it was spawned
        reader = frames.event_reader()
        while data := await process.stdout.read(_READ_BYTES):
            try:
                events = reader.feed(data)
            except EngineError as error:
                self._verdict = str(error)
                return
            for event in events:
                self._handle(event)

    async def _watch(self, process: Process) -> None:
        """Kill a process that has something to do and says nothing for too long.

        Counts its own wake-ups instead of reading a clock: a daemon that was itself suspended has
        not heard anything either.
        """
        tick_s = min(self._hang_s, self._load_s) / 8
        while True:
            await asyncio.sleep(tick_s)
            loading = self._ready_at is None
            busy = loading or self._jobs or self._calls or self._asked or self._ahead
            if self._ahead:  # which the process may have done, and it would say nothing by itself
                with suppress(EngineError):  # down
                    self._send(frames.Ping())
            self._quiet_s = self._quiet_s + tick_s if busy else 0.0
            if self._quiet_s >= (self._load_s if loading else self._hang_s):
                doing = "loading the model" if loading else "at work"
                self._verdict = (
                    f"The model process said nothing for {self._quiet_s:.0f} s while {doing}"
                    " and was ended."
                )
                with suppress(ProcessLookupError):
                    process.kill()

    def _lose(self, reason: str) -> None:
        log.warning("model process lost: %s", reason)
        self._tune_s = 0.0  # whatever ended it, the next one is to be ready
        if self._ready_at is None and self._provider != "cpu":
            # For good: each try of what does not even load could take as long as LOAD_S.
            self._fallen_back = (
                f"model.provider {self._provider} cannot be used, the CPU is until edgemoa is"
                f" started again: {reason}"
            )
            self._provider = "cpu"
            log.warning("%s", self._fallen_back)
        self._forget(reason)
        self._events.on_lost(reason)

    def _forget(self, reason: str) -> None:
        """Nothing that was handed to the process will be answered any more."""
        self._ready_at = None
        self._jobs.clear()
        self._ahead.clear()
        waiting: list[asyncio.Future[Any]] = [*self._calls.values(), *self._asked.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(EngineError(reason))
        self._calls.clear()

    def _why(self, returncode: int | None) -> str:
        doing = "while loading the model" if self._ready_at is None else "at work"
        if returncode is None:
            return "The model process closed its pipe and was ended."
        if returncode >= 0:
            return f"The model process ended {doing}, with status {returncode}."
        try:
            name = signal.Signals(-returncode).name
        except ValueError:  # a real-time signal
            name = f"signal {-returncode}"
        advice = (
            " If the board is out of memory, use a smaller model."
            if -returncode == signal.SIGKILL
            else ""
        )
        return f"The model process was ended by {name} {doing}.{advice}"

    # --- what is said

    @property
    def _is_down(self) -> bool:
        return self._stdin is None or self._stdin.is_closing()

    def _send(self, op: frames.Op) -> None:
        if self._stdin is None or self._is_down:
            raise EngineError(
                "The model process is down; it is being started again.",
                hint="Try again in a moment; the daemon's log says why it ended.",
            )
        # Prompts may come and be called off for as long as the process does not read.
        unread = self._stdin.transport.get_write_buffer_size()
        if unread > MAX_UNREAD_BYTES and not isinstance(op, frames.Cancel):
            raise EngineError(
                "The model process is behind with reading what it was given.",
                hint="Try again in a moment; where it hangs, it is started again.",
            )
        self._stdin.write(frames.encode_op(op))

    def _handle(self, event: frames.Event) -> None:
        self._quiet_s = 0.0
        match event:
            case frames.Ready():
                self._loaded(event)
            case frames.Broken(reason):
                self._verdict = reason
            case frames.Text(job_id, text, logprobs):
                if job_id in self._jobs:
                    self._events.on_text(job_id, text, logprobs)
            case frames.Done(job_id, result):
                if job_id in self._jobs:
                    self._jobs.discard(job_id)
                    self._events.on_done(job_id, result)
            case frames.Failed(job_id, failure):
                if job_id in self._jobs:
                    self._jobs.discard(job_id)
                    self._events.on_failed(job_id, failure)
                elif (asked := self._asked.get(job_id)) is not None and not asked.done():
                    asked.set_exception(frames.error_of(failure))
            case frames.Scored(job_id) | frames.Embedded(job_id):
                if (asked := self._asked.get(job_id)) is not None and not asked.done():
                    asked.set_result(event)
            case frames.Measured(call_id, tokens, refused):
                answer = self._calls.get(call_id)
                if answer is None or answer.done():
                    return
                if refused:
                    answer.set_exception(InvalidPromptError(refused))
                else:
                    answer.set_result(tokens)
            case frames.Pace(rates):
                self._events.on_rates(rates)
            case frames.Progress():
                pass

    def _loaded(self, ready: frames.Ready) -> None:
        log.info(
            "model loaded in %d ms by back end %s, %d jobs at a time, context of %d tokens,"
            " room for %d",
            ready.load_ms, ready.backend, ready.slots, ready.context_tokens, ready.budget_tokens,
        )  # fmt: skip
        self.note = f"{self._fallen_back} {ready.note}".strip()
        if ready.note:
            log.warning("%s", ready.note)
        self._tune_s = 0.0
        self.tuning = ready.tuning
        if ready.tuning is not None:
            self._threads, self._most_slots = ready.tuning.threads, ready.tuning.slots
        self._ready_at = asyncio.get_running_loop().time()
        self._reads_ahead = ready.reads_ahead
        self._events.on_ready(
            EngineInfo(
                model=self._model_name,
                context_tokens=ready.context_tokens,
                slots=ready.slots,
                backend=ready.backend,
                threads=self._threads,
                budget_tokens=ready.budget_tokens,
                reads_ahead=ready.reads_ahead,
                calls_tools=ready.calls_tools,
                embeds=ready.embeds,
            )
        )


async def _run_check(schema: bytes) -> tuple[int, str]:
    """How the child that checks a schema ended, and what it said."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "edgemoa.engine.guidance"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise EngineError(f"The JSON schema cannot be checked: {error.strerror}.") from error
    try:
        async with asyncio.timeout(CHECK_S):
            said, _ = await process.communicate(schema)
    except TimeoutError:
        raise EngineError("The JSON schema could not be checked in time.") from None
    finally:
        await _end(process)
    assert process.returncode is not None  # noqa: S101 - it has ended
    return process.returncode, said.decode(errors="replace")


def _environment() -> dict[str, str]:
    """Of a child: a few variables of this process, and the path to this very code."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2])}


async def _end(process: Process) -> None:
    """End a process, by force if need be, and reap it."""
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await process.wait()
    finally:  # also when the engine is stopped just now
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _log_lines(stream: asyncio.StreamReader) -> None:
    """Log what the process and its libraries print, the first part of it, until they end."""
    room = _MAX_LOG_BYTES
    while data := await stream.read(_READ_BYTES):
        for line in data[:room].decode(errors="replace").splitlines():
            log.debug("model process: %s", line)
        room -= min(room, len(data))


def _remember(kept: dict[bytes, V], digest: bytes, value: V) -> None:
    kept[digest] = value
    if len(kept) > _KEPT_CHECKS:
        del kept[next(iter(kept))]  # the oldest


def _report_failure(task: asyncio.Task[None]) -> None:
    """A keeper that fails is a bug, here or in what the events call; nobody awaits it, so say so"""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler(
            {"message": "the model process is no longer looked after", "exception": error}
        )
