"""The board's work: one first-come-first-served queue, its bounds, its measured service times.

As in Mitra, Kaswan, Ulukus (arXiv 2412.21200, section III) a device serves its own user's and its
peers' inferences from one FCFS queue. The bounds count own prompts and peers' jobs apart, so that
neither can shut the other out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from edgemoa.core.events import Job, JobKind, WorkDone
from edgemoa.core.messages import BoardId
from edgemoa.core.rates import Rates

PRIOR_SERVICE_MS: Final = 5_000  # assumed until the first job of a kind has been measured
LONGEST_WAIT_MS: Final = 86_400_000  # that is told; who hears of a day asks another
AVERAGE_WEIGHT: Final = 0.2  # of the newest sample in the exponential average


@dataclass(slots=True)
class Work:
    """A job with whom it is for. ``final`` marks the writing of the user's own answer."""

    job: Job
    source: BoardId
    request_id: str
    layer: int
    arrived_ms: int
    deadline_ms: int  # worthless from then on
    final: bool = False
    attempts: int = 0
    started_ms: int = -1


@dataclass(slots=True)
class _Usual:
    """Exponential averages of the jobs of one kind: their share of the model in ms, and tokens."""

    model_ms: float
    prompt_tokens: float
    found_tokens: float  # of the prompt's: none had to read them, not ahead of the job either
    tokens: float

    @classmethod
    def of(cls, done: WorkDone) -> _Usual:
        found = done.cached_tokens - done.ahead_tokens
        return cls(done.model_ms, done.prompt_tokens, found, done.tokens)

    def follow(self, done: WorkDone) -> None:
        newest = _Usual.of(done)
        self.model_ms += AVERAGE_WEIGHT * (newest.model_ms - self.model_ms)
        self.prompt_tokens += AVERAGE_WEIGHT * (newest.prompt_tokens - self.prompt_tokens)
        self.found_tokens += AVERAGE_WEIGHT * (newest.found_tokens - self.found_tokens)
        self.tokens += AVERAGE_WEIGHT * (newest.tokens - self.tokens)


class ServiceTimes:
    """What a job of each kind takes of this board's model, in ms: alpha of the stability condition.

    ``rates`` are the engine's; a usual job's size and they tell what it takes where others are
    written along with it. Before there are any, the average of what jobs took has to do.
    """

    def __init__(self) -> None:
        self.rates = Rates()
        self._usual: dict[JobKind, _Usual] = {}

    def observe(self, kind: JobKind, done: WorkDone) -> None:
        """Take a finished job into account."""
        if kind in self._usual:
            self._usual[kind].follow(done)
        else:
            self._usual[kind] = _Usual.of(done)

    def mean_ms(self, kind: JobKind, batch: int = 1) -> float:
        """For a job that is written along with others, ``batch`` in all; a cautious guess while
        nothing has been measured."""
        usual = self._usual.get(kind)
        if usual is None:
            return PRIOR_SERVICE_MS
        estimate = self.rates.estimate(usual.prompt_tokens, usual.tokens, batch, usual.found_tokens)
        return usual.model_ms if estimate is None else estimate

    def measured(self) -> dict[str, int]:
        """The average that jobs took so far, in ms by kind, for people."""
        return {kind: round(usual.model_ms) for kind, usual in self._usual.items()}


class WorkQueue:
    """FCFS queue in front of an engine that works on ``slots`` jobs at a time."""

    def __init__(self) -> None:
        self.slots = 1
        self.waiting: deque[Work] = deque()
        self.running: dict[int, Work] = {}
        self.times = ServiceTimes()

    def __iter__(self) -> Iterator[Work]:
        yield from self.running.values()
        yield from self.waiting

    def add(self, work: Work) -> int:
        """Queue ``work`` last; returns the number of jobs before it."""
        self.waiting.append(work)
        return len(self.waiting) - 1 + len(self.running)

    def next(self, now_ms: int) -> Work | None:
        """Move the first waiting job to running, if a slot is free."""
        if not self.waiting or len(self.running) >= self.slots:
            return None
        work = self.waiting.popleft()
        work.started_ms = now_ms
        work.attempts += 1
        self.running[work.job.job_id] = work
        return work

    def end(self, job_id: int) -> Work | None:
        """Take a running job out; None if it is no longer known."""
        return self.running.pop(job_id, None)

    def put_back(self) -> list[Work]:
        """The engine is gone: running jobs wait again, ahead of the rest. Returns them."""
        back = list(self.running.values())
        self.running.clear()
        self.waiting.extendleft(reversed(back))
        return back

    def remove(self, unwanted: Callable[[Work], bool]) -> tuple[list[Work], list[Work]]:
        """Take out what is ``unwanted``; returns (waiting ones, running ones)."""
        waiting = [work for work in self.waiting if unwanted(work)]
        if waiting:
            self.waiting = deque(work for work in self.waiting if not unwanted(work))
        running = [work for work in self.running.values() if unwanted(work)]
        for work in running:
            del self.running[work.job.job_id]
        return waiting, running

    def position(self, found: Callable[[Work], bool]) -> int | None:
        """Jobs before the first one that is ``found``; None if there is none."""
        return next((i for i, work in enumerate(self) if found(work)), None)

    def expected_wait_ms(self) -> int:
        """How long a job that came now would wait, by what those before it take of the model, up
        to a day: figures that make it longer are no reason to send others away for longer."""
        jobs = Counter(work.job.kind for work in self)
        batch = max(min(self.slots, jobs.total()), 1)
        wait_ms = sum(n * self.times.mean_ms(kind, batch) for kind, n in jobs.items())
        return min(round(wait_ms), LONGEST_WAIT_MS)
