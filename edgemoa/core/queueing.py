"""The board's work: one first-come-first-served queue, its bounds, its measured service times.

As in Mitra, Kaswan, Ulukus (arXiv 2412.21200, section III) a device serves its own user's and its
peers' inferences from one FCFS queue. The bounds count own prompts and peers' jobs apart, so that
neither can shut the other out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from edgemoa.core.events import Job, JobKind
from edgemoa.core.messages import BoardId

PRIOR_SERVICE_MS: Final = 5_000  # assumed until the first job of a kind has been measured
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


class ServiceTimes:
    """Exponential average of the time that a job of each kind takes on this board, in ms."""

    def __init__(self) -> None:
        self._mean_ms: dict[JobKind, float] = {}

    def observe(self, kind: JobKind, work_ms: int) -> None:
        """Take a finished job's prefill and decode time into account."""
        mean = self._mean_ms.get(kind, float(work_ms))
        self._mean_ms[kind] = mean + AVERAGE_WEIGHT * (work_ms - mean)

    def mean_ms(self, kind: JobKind) -> float:
        """The average; a cautious guess while nothing has been measured."""
        return self._mean_ms.get(kind, PRIOR_SERVICE_MS)

    def measured(self) -> dict[str, int]:
        """What has been measured so far, in ms by kind, for people."""
        return {kind: round(mean) for kind, mean in self._mean_ms.items()}


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
        """How long a job that came now would wait, by the average times of those before it."""
        before = sum(self.times.mean_ms(work.job.kind) for work in self)
        return round(before / self.slots)
