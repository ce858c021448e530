"""The model process: ``python -m edgemoa.engine.worker MODEL_DIR --threads N ...``.

Reads :data:`~edgemoa.engine.frames.Op` from stdin and writes :data:`~edgemoa.engine.frames.Event`
to stdout. It has one thread, which looks for new frames between two steps of the model: a second
one would not get the interpreter lock any sooner. It ends when stdin does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from edgemoa.core import limits
from edgemoa.core.events import Given
from edgemoa.core.messages import ChatMessage
from edgemoa.core.rates import Meter
from edgemoa.engine import frames
from edgemoa.engine.load import Wish, load
from edgemoa.engine.tuning import Tuning
from edgemoa.errors import EdgemoaError, EngineError

NICENESS: Final = 5  # the daemon beside it answers the network, and has to stay quick
OOM_SCORE: Final = 500  # of 1000: out of memory, the kernel ends this process before the daemon
PROGRESS_S: Final = 1.0
PACE_S: Final = 10.0  # between two reports of how fast the model is, while there is work

_READ_BYTES: Final = 65536
_PR_SET_PDEATHSIG: Final = 1


class Backend(Protocol):
    """A loaded model that works on up to ``slots`` jobs at a time, a step at a time."""

    @property
    def name(self) -> str: ...

    @property
    def context_tokens(self) -> int: ...

    slots: int
    chunk_tokens: int  # of a prefill step
    guess_cost: float  # of a guessed token, in runs of a single one; 1: nothing is guessed

    @property
    def budget_tokens(self) -> int:
        """Tokens that all slots together may hold."""

    @property
    def meter(self) -> Meter:
        """What its steps took."""

    def count(self, messages: tuple[ChatMessage, ...], given: Given = "turns") -> int:
        """The conversation's tokens, chat template included; raises :class:`EdgemoaError`."""

    def admit(self, job: frames.Work) -> bool:
        """Take a job into a free slot; False where memory for it is there only when another job
        has ended. Raises :class:`EdgemoaError` where it cannot be done at all."""

    def drop(self, job_id: int) -> None:
        """Free the slot of an admitted job."""

    def forget(self) -> None:
        """Give back the memory of what is kept beside the jobs."""

    def step(self) -> list[frames.Event]:
        """Bring admitted jobs forward by a run of the model or two, of ``STEP_GOAL_MS`` or so;
        where there is time, read ahead.

        A job's :data:`~edgemoa.engine.frames.End` frees its slot.
        """

    @property
    def reads_ahead(self) -> bool:
        """Whether :meth:`read_ahead` is of any use."""

    @property
    def has_to_read(self) -> bool:
        """Whether :meth:`step` has something to do without jobs."""

    @property
    def calls_tools(self) -> bool:
        """Whether the model was taught to call tools."""

    @property
    def embeds(self) -> bool:
        """Whether it takes :class:`~edgemoa.engine.frames.Embed`."""

    def read_ahead(self, key: str, messages: tuple[ChatMessage, ...]) -> None:
        """Have :meth:`step` read what a prompt will begin with, of which the last message goes on;
        nothing where it would be at the cost of a job. Replaces what was to be read under the same
        key; without messages, reads no further. Raises :class:`EdgemoaError`."""


class Pipe:
    """Frames over two file descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._reader = frames.op_reader()

    def receive(self, *, wait: bool) -> list[frames.Op]:
        """The frames that are there, or with ``wait`` at least what one read brings.

        Raises :class:`EOFError` when the daemon is gone.
        """
        ops: list[frames.Op] = []
        while wait or select.select([self._read_fd], [], [], 0)[0]:
            wait = False
            data = os.read(self._read_fd, _READ_BYTES)
            if not data:
                raise EOFError
            ops += self._reader.feed(data)
        return ops

    def send(self, events: Iterable[frames.Event]) -> None:
        """Write frames; raises :class:`BrokenPipeError` when the daemon is gone."""
        data = memoryview(b"".join(map(frames.encode, events)))
        while data:
            data = data[os.write(self._write_fd, data) :]


class Worker:
    """Hands jobs to the back end in the order in which they came, and its events to the daemon."""

    def __init__(self, backend: Backend, pipe: Pipe) -> None:
        self._backend = backend
        self._pipe = pipe
        self._waiting: deque[frames.Work] = deque()
        self._running: set[int] = set()
        self._full = False  # the first that waits has to wait until another ends
        self._said_at = 0.0
        self._paced_at = time.monotonic()

    def serve(self) -> None:
        """Work until the daemon is gone; leaves by :class:`EOFError` or ``BrokenPipeError``."""
        while True:
            idle = not self._waiting and not self._running and not self._backend.has_to_read
            for op in self._pipe.receive(wait=idle):
                self._handle(op)
            while self._waiting and len(self._running) < self._backend.slots and not self._full:
                self._admit(self._waiting[0])
            if self._running or self._backend.has_to_read:
                self._report(self._backend.step())

    def _handle(self, op: frames.Op) -> None:
        match op:
            case frames.Generate() | frames.Score() | frames.Embed():
                self._waiting.append(op)
            case frames.Cancel(job_id):
                self._waiting = deque(job for job in self._waiting if job.job_id != job_id)
                self._full = False
                if job_id in self._running:
                    self._running.discard(job_id)
                    self._backend.drop(job_id)
            case frames.Measure(call_id, messages, given):
                try:
                    answer = frames.Measured(call_id, self._backend.count(messages, given))
                except EdgemoaError as error:
                    answer = frames.Measured(call_id, 0, str(error))
                self._pipe.send([answer])
            case frames.ReadAhead(key, messages):
                with suppress(EdgemoaError):  # whoever asks for that prompt will hear of it
                    self._backend.read_ahead(key, messages)
            case frames.Ping():
                self._pipe.send([frames.Progress()])

    def _admit(self, job: frames.Work) -> None:
        try:
            if not self._backend.admit(job):
                self._full = True
                return
        except EdgemoaError as error:
            self._pipe.send([frames.Failed(job.job_id, frames.failure(error))])
        else:
            self._running.add(job.job_id)
        self._waiting.popleft()

    def _report(self, events: list[frames.Event]) -> None:
        for event in events:
            if isinstance(event, frames.End):
                self._running.discard(event.job_id)
                self._full = False
        now = time.monotonic()
        if not events and now - self._said_at >= PROGRESS_S:
            events = [frames.Progress()]
        meter, idle = self._backend.meter, not self._waiting and not self._running
        due = idle or now - self._paced_at >= PACE_S
        if events and due:  # the daemon is not woken for it alone
            self._paced_at = now
            events = [*events, frames.Pace(meter.rates())]
        if events:
            self._said_at = now
            self._pipe.send(events)


def main() -> None:
    """Load the model, say so, and work until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m edgemoa.engine.worker")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument(
        "--threads", type=int, required=True, help="of the model's computation; to tune: at most"
    )
    parser.add_argument("--backend", choices=("auto", "slots", "genai"), default="auto")
    parser.add_argument(
        "--slots", type=int, default=0, help="jobs at a time; 0: what memory allows"
    )
    parser.add_argument("--most-slots", type=int, default=0, help="what memory allows up to that")
    parser.add_argument("--provider", default="cpu", help="what genai computes on")
    parser.add_argument("--memory", type=int, default=0, metavar="MB", help="of keys and values")
    parser.add_argument(
        "--tune", type=float, default=0, metavar="SECONDS", help="first find the best threads"
    )
    parser.add_argument("--keep-loops", action="store_true", help="let texts go round and round")
    arguments = parser.parse_args()
    _settle()
    pipe = _take_pipe()
    status = 0
    try:
        started = time.perf_counter()
        backend, note, tuning = _load(arguments)
        load_ms = round((time.perf_counter() - started) * 1000)
        ready = frames.Ready(
            backend.context_tokens,
            backend.slots,
            load_ms,
            backend.name,
            _bounded(note),
            backend.budget_tokens,
            backend.reads_ahead,
            tuning,
            backend.calls_tools,
            backend.embeds,
        )
        pipe.send([ready])
        Worker(backend, pipe).serve()
    except (EOFError, BrokenPipeError):
        pass  # the daemon is gone, and nobody is left to tell
    except EdgemoaError as error:
        status = error.exit_code
        with suppress(BrokenPipeError):
            pipe.send([frames.Broken(_bounded(f"{error} {error.hint}".strip()))])
    # Without the libraries' own ending, which takes its time and can hang.
    sys.stderr.flush()
    os._exit(status)


def _load(asked: argparse.Namespace) -> tuple[Backend, str, Tuning | None]:
    """The back end, why it is not what was asked for, and what tuning found."""
    wish = Wish(
        model_dir=asked.model_dir,
        threads=asked.threads,
        backend=asked.backend,
        provider=asked.provider,
        slots=asked.slots,
        most_slots=asked.most_slots,
        memory_mb=asked.memory,
        ends_loops=not asked.keep_loops,
    )
    if not asked.tune:
        return *load(wish), None
    from edgemoa.engine.measure import tune_wish  # noqa: PLC0415 - once in a board's life

    with suppress(EngineError):  # what cannot be measured may still do its work
        return tune_wish(replace(wish, threads=0), wish.threads, goal_s=asked.tune)
    return *load(wish), None


def _settle() -> None:
    """Take this process's place among the others on the board."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon to act on
    os.nice(NICENESS)
    with suppress(OSError):  # only a preference
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))
    # The end of stdin is seen between two steps; this ends the process within one as well, and
    # while it loads. (Should the daemon be gone already, stdin has ended. To the kernel the parent
    # is the thread that started this process: the daemon's event loop, as long as it lives.)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _take_pipe() -> Pipe:
    """Keep stdin and stdout for frames; what a library prints goes to stderr."""
    pipe = Pipe(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return pipe


def _bounded(reason: str) -> str:
    return reason.encode()[: limits.MAX_REASON_BYTES].decode(errors="ignore")


if __name__ == "__main__":
    main()
