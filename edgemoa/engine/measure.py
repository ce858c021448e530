"""How fast a loaded model is, and how many threads and jobs at a time do best on this board.

Measured with jobs, as the daemon gives them to a back end, so that picking tokens and putting text
together count as they do at work.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from edgemoa.core.events import WorkDone
from edgemoa.core.messages import ChatMessage, Sampling
from edgemoa.engine.frames import Done, Failed, Generate, Text
from edgemoa.engine.load import Wish, load
from edgemoa.engine.slots import MOST_SLOTS
from edgemoa.engine.tuning import MOST_BUSY, Jobs, Threads, Tuning
from edgemoa.engine.worker import Backend
from edgemoa.errors import EngineError

MOST_JOBS: Final = 8  # at a time, that a measurement chooses; settings may ask for more
TUNING_CONTEXT: Final = 128  # tokens

WORTH_A_THREAD: Final = 1.05  # a thread more has to be faster by so much: the board has other work
WORTH_A_BATCH: Final = 1.15  # twice the jobs have to give so much more in all
LEAST_SHARE: Final = 0.25  # of its speed alone, that each of several jobs must keep
HOPELESS: Final = 0.8  # of the best so far: with still fewer threads it gets no better

USUAL_PROMPT: Final = 300  # tokens of the job by which numbers of threads are compared
USUAL_ANSWER: Final = 150

_PREFILL_STEPS: Final = 3
_DECODE_STEPS: Final = 24
_ENOUGH_S: Final = 0.5  # for one figure; a step at least, however long it takes
_MOST_GIVEN: Final = 8  # jobs for each that is measured, where they end too soon
_MARGIN: Final = 32  # tokens of context that are left free
_SENTENCE: Final = "The quick brown fox jumps over the lazy dog. "

Progress = Callable[[str], None]
Load = Callable[[int], Backend]
"""Loads the model with so many threads."""


class Gauge:
    """Measures a back end that has no jobs, and leaves it so."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ids = itertools.count(1)
        self._different = itertools.count(1)

    def prefill(self, tokens: int = 0) -> float:
        """Tokens a second of a prompt of ``tokens``, which nothing was read of before; by default
        of as long a one as a few steps read. Time is bounded, so a long one may not be finished.

        Raises :class:`EngineError` where the model fails.
        """
        step = self._backend.chunk_tokens
        messages = self._prompt(tokens or _PREFILL_STEPS * step + 2, next(self._different))
        patience_s = 20 * _ENOUGH_S if tokens else _ENOUGH_S
        job = self._admit(messages, 1)
        steps: list[float] = []
        ended: dict[int, WorkDone] = {}
        while not ended and sum(steps) < patience_s:
            started_s = time.perf_counter()
            ended = self._step()
            steps.append(time.perf_counter() - started_s)
        self._backend.drop(job)
        if ended:
            return (ended[job].prompt_tokens - ended[job].cached_tokens) / sum(steps)
        return step / statistics.median(steps)

    def decode(self, jobs: int, context: int) -> float | None:
        """Tokens a second in all that are written for so many jobs behind ``context`` tokens,
        without guesses: how many come true is for the text to say. None where there is no room for
        them, and for a model that has nothing to say.

        Raises :class:`EngineError` where the model fails.
        """
        cost, self._backend.guess_cost = self._backend.guess_cost, 1.0
        try:
            return self._decode(jobs, context)
        finally:
            self._backend.guess_cost = cost

    def _decode(self, jobs: int, context: int) -> float | None:
        messages = self._prompt(context, 0)
        limit = 4 * _DECODE_STEPS
        room = self._backend.context_tokens - self._backend.count(messages)
        if room < _MARGIN or not self._fits(jobs, self._backend.count(messages) + limit):
            return None
        at_work: set[int] = set()
        steps: list[float] = []
        given = 0
        while len(steps) < _DECODE_STEPS and (sum(steps) < _ENOUGH_S or not steps):
            if len(at_work) < jobs:  # the model may end a text whenever it likes
                if given > _MOST_GIVEN * jobs:
                    return None
                given += jobs - len(at_work)
                at_work |= {self._admit(messages, limit) for _ in range(jobs - len(at_work))}
                self._until_all_write(at_work)
                continue
            started_s = time.perf_counter()
            at_work -= self._step().keys()
            steps.append(time.perf_counter() - started_s)
        for job in at_work:
            self._backend.drop(job)
        return jobs / statistics.median(steps)

    def _fits(self, jobs: int, tokens: int) -> bool:
        return jobs <= self._backend.slots and jobs * tokens <= self._backend.budget_tokens

    def _until_all_write(self, at_work: set[int]) -> None:
        silent = set(at_work)
        while silent:
            for event in self._backend.step():
                if isinstance(event, Text | Done):
                    silent.discard(event.job_id)
                if isinstance(event, Done):
                    at_work.discard(event.job_id)
                _check(event)

    def _step(self) -> dict[int, WorkDone]:
        """A step; the jobs that it ended."""
        events = self._backend.step()
        for event in events:
            _check(event)
        return {event.job_id: event.result for event in events if isinstance(event, Done)}

    def _admit(self, messages: tuple[ChatMessage, ...], limit: int) -> int:
        job = next(self._ids)
        sampling = Sampling(max_tokens=limit)
        if not self._backend.admit(Generate(job, messages, sampling, stream=True)):
            raise EngineError("The model's memory has no room to measure.")
        return job

    def _prompt(self, tokens: int, number: int) -> tuple[ChatMessage, ...]:
        """A conversation of about so many tokens; another number, other words from the start."""
        begin = f"{number} " if number else ""

        def prompt(times: int) -> tuple[ChatMessage, ...]:
            return (ChatMessage("user", begin + _SENTENCE * times),)

        least, some = self._backend.count(prompt(1)), self._backend.count(prompt(9))
        most = self._backend.context_tokens - _MARGIN
        times = 1 + (min(tokens, most) - least) * 8 // max(1, some - least)
        return prompt(max(1, times))


def _check(event: object) -> None:
    if isinstance(event, Failed):
        raise EngineError(f"The model fails: {event.failure.reason}")


def tune(
    load: Load,
    cores: int,
    *,
    threads: int = 0,
    slots: int = 0,
    goal_s: float,
    progress: Progress = lambda _: None,
) -> tuple[Backend, Tuning]:
    """Find how many threads and jobs at a time do best; also returns the back end, loaded so.

    While others keep the processors busy, fewer threads and jobs look better than they are: then
    it is the most threads, and as many jobs as without a measurement.

    :param load: with as many slots as may be chosen; what it has loaded before is given up first.
    :param threads: so many, and no others are tried; 0: up to ``cores``. ``slots`` likewise.
    :param goal_s: what may be left out is left out when so much time will have passed.

    Raises :class:`EdgemoaError` where the model cannot be loaded or run.
    """
    started_s = time.perf_counter()
    deadline_s = started_s + goal_s
    tried: list[Threads] = []
    others = _Others()
    loaded, backend = 0, None
    cost_s = 0.0
    for number in [threads] if threads else candidates(cores):
        # The best may have to be loaded once more.
        if tried and time.perf_counter() + 2 * cost_s > deadline_s:
            break
        progress(f"{number} threads")
        begun_s = time.perf_counter()
        backend = None
        _give_back()
        loaded, backend = number, load(number)
        tried.append(_speed(backend, number))
        cost_s = time.perf_counter() - begun_s
        hopeless = _usual_s(tried[-1]) * HOPELESS > min(map(_usual_s, tried))
        if hopeless or others.share() > MOST_BUSY:
            break
    best = choose_threads(tried) if others.share() <= MOST_BUSY else tried[0]
    if backend is None or loaded != best.threads:
        backend = None
        _give_back()
        backend = load(best.threads)
    batches = [Jobs(1, best.decode)]
    if not slots and others.share() <= MOST_BUSY:
        batches += _batches(backend, best.decode, deadline_s, progress)
    busy = others.share()
    chosen = slots or (choose_slots(batches) if busy <= MOST_BUSY else MOST_SLOTS)
    backend.slots = min(backend.slots, chosen)
    backend.forget()
    found = Tuning(best.threads, backend.slots, tuple(tried), tuple(batches), round(busy, 3))
    return backend, found


def tune_wish(
    wish: Wish, cores: int, *, goal_s: float, progress: Progress = lambda _: None
) -> tuple[Backend, str, Tuning]:
    """:func:`tune` with what :func:`~edgemoa.engine.load.load` loads; also why that is not what was
    wished for. Where the wish names threads or slots, so many there are.
    """
    note = ""

    def load_with(threads: int) -> Backend:
        nonlocal note
        backend, note = load(replace(wish, threads=threads, most_slots=MOST_JOBS))
        return backend

    backend, tuning = tune(
        load_with,
        cores,
        threads=wish.threads,
        slots=wish.slots,
        goal_s=goal_s,
        progress=progress,
    )
    return backend, note, tuning


def candidates(cores: int) -> list[int]:
    """Numbers of threads to try, from many to few: every one up to eight, then by quarters."""
    if cores <= 8:
        return list(range(cores, 0, -1))
    return [cores, cores - 1, *sorted({cores * 3 // 4, cores // 2, cores // 4, 4, 2}, reverse=True)]


def choose_threads(tried: list[Threads]) -> Threads:
    """The fewest of those that are as good as any; the first where that was not measured."""
    fastest_s = min(map(_usual_s, tried))
    if fastest_s == float("inf"):
        return tried[0]
    good = [each for each in tried if _usual_s(each) <= WORTH_A_THREAD * fastest_s]
    return min(good, key=lambda each: each.threads)


def choose_slots(batches: list[Jobs]) -> int:
    """The largest batch that is worth it, of batches each twice the one before."""
    chosen = batches[0]
    for batch in batches[1:]:
        keeps = batch.decode / batch.jobs >= LEAST_SHARE * batches[0].decode
        if not keeps or batch.decode < WORTH_A_BATCH * chosen.decode:
            break
        chosen = batch
    return chosen.jobs


def _batches(
    backend: Backend, alone: float, deadline_s: float, progress: Progress
) -> Iterator[Jobs]:
    found = [Jobs(1, alone)]
    cost_s = 0.0
    while (jobs := 2 * found[-1].jobs) <= backend.slots:
        if time.perf_counter() + 1.5 * cost_s > deadline_s:
            return
        progress(f"{jobs} jobs at a time")
        begun_s = time.perf_counter()
        rate = Gauge(backend).decode(jobs, TUNING_CONTEXT)
        if rate is None:
            return
        cost_s = time.perf_counter() - begun_s
        found.append(Jobs(jobs, round(rate, 1)))
        yield found[-1]
        if choose_slots(found) < jobs:
            return


class _Others:
    """What other processes take of the processors, from here on."""

    def __init__(self) -> None:
        self._began = self._times()

    def share(self) -> float:
        """Of all the processors' time, 0 to 1; 0 where the kernel does not say."""
        everyone, own, all_s = (
            now - then for now, then in zip(self._times(), self._began, strict=True)
        )
        return min(1.0, max(0.0, (everyone - own) / all_s)) if all_s > 0 else 0.0

    def _times(self) -> tuple[float, float, float]:
        """Seconds at work of all processes and of this one, and all that there were."""
        try:
            with Path("/proc/stat").open("rb") as stream:
                user, nice, system, idle, wait, *more = map(int, stream.readline().split()[1:9])
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0
        ticks = os.sysconf("SC_CLK_TCK")
        at_work = user + nice + system + sum(more)
        own = os.times()
        return at_work / ticks, own.user + own.system, (at_work + idle + wait) / ticks


def _speed(backend: Backend, threads: int) -> Threads:
    gauge = Gauge(backend)
    decode = gauge.decode(1, TUNING_CONTEXT) or 0.0
    return Threads(threads, round(gauge.prefill(), 1), round(decode, 1))


def _usual_s(speed: Threads) -> float:
    """Seconds of a usual job."""
    if not speed.prefill or not speed.decode:
        return float("inf")
    return USUAL_PROMPT / speed.prefill + USUAL_ANSWER / speed.decode


def _give_back() -> None:
    """Give a model's memory back to the system: two of them may be more than the board has."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)
