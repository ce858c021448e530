"""The board's work: who is served next, and how long that takes to come.

Two classes share the model: the board's own user and its peers. Where both wait, the own user gets
:data:`OWN_WEIGHT` times as much of it as all peers together, so that neither shuts the other out.
Within a class every source (a peer, a local application) gets the same: start-time fair queueing,
by what jobs are expected to take. Within a source, what belongs to the older prompt goes first. The
paper's device (arXiv 2412.21200, section III) serves one queue first come, first served, which is
the other discipline.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from edgemoa.core.events import Job, JobKind
from edgemoa.core.load import KINDS, Arrivals, ServiceTimes
from edgemoa.core.messages import BoardId
from edgemoa.core.parts import Telling

OWN_WEIGHT: Final = 3.0  # of the own user's work, where the peers' altogether has 1
MOST_COMES: Final = 0.95  # of the other class, against what the board can do, that is reckoned with
LONGEST_WAIT_MS: Final = 86_400_000  # that is told; who hears of a day asks another

Discipline: TypeAlias = Literal["fair", "fcfs"]


@dataclass(slots=True, eq=False)
class Work:
    """A job with whom it is for. ``final`` marks the writing of the user's own answer."""

    job: Job
    source: BoardId
    request_id: str
    layer: int
    arrived_ms: int
    deadline_ms: int  # worthless from then on
    final: bool = False
    own: bool = False  # of this board's user
    client: str = ""  # which local application's, if own
    since_ms: int = -1  # when its prompt was accepted, if own; else as it arrived
    size_bytes: int = 0
    attempts: int = 0
    started_ms: int = -1
    telling: Telling | None = None  # to a peer that wants to hear of the text while it is written
    order: tuple[int, int] = (0, 0)  # within its line

    @property
    def line(self) -> str:
        """Whom it takes turns for."""
        return self.client if self.own else self.source


def _order(work: Work) -> tuple[int, int]:
    return work.order


@dataclass(slots=True)
class _Line:
    """What waits of one source. ``served`` is its virtual time: work done by weight, in ms."""

    works: list[Work] = field(default_factory=list)
    served: float = 0.0


@dataclass(slots=True)
class _Class:
    """Lines that share what their class gets."""

    weight: float
    lines: dict[str, _Line] = field(default_factory=dict)
    served: float = 0.0
    virtual: float = 0.0  # of the line that was served last, before it was


class _Tally:
    """Own or peers' work in numbers, and how often such work comes."""

    def __init__(self, start_ms: int) -> None:
        self.jobs = 0  # waiting or running
        self.size_bytes = 0
        self.waiting: dict[JobKind, int] = dict.fromkeys(KINDS, 0)
        self.arrivals = {kind: Arrivals(start_ms) for kind in KINDS}


class WorkQueue:
    """The queue in front of an engine that works on ``slots`` jobs at a time."""

    def __init__(self, discipline: Discipline = "fair", start_ms: int = 0) -> None:
        self.slots = 1
        self.running: dict[int, Work] = {}
        self.times = ServiceTimes()
        self._fair = discipline == "fair"
        self._own, self._peers = _Class(OWN_WEIGHT), _Class(1.0)
        self._virtual = 0.0
        self._sequence = 0
        self._jobs = 0
        self._tallies = {True: _Tally(start_ms), False: _Tally(start_ms)}  # own, peers'

    def __iter__(self) -> Iterator[Work]:
        yield from self.running.values()
        yield from self._waiting()

    def _waiting(self) -> Iterator[Work]:
        for each in (self._own, self._peers):
            for line in each.lines.values():
                yield from line.works

    @property
    def waiting(self) -> list[Work]:
        """What has not begun, by class and source."""
        return list(self._waiting())

    @property
    def waits(self) -> int:
        """How many jobs have not begun."""
        return self._jobs - len(self.running)

    def __len__(self) -> int:
        return self._jobs

    def jobs(self, *, own: bool) -> int:
        """Jobs of one class, waiting or running."""
        return self._tallies[own].jobs

    def size_bytes(self, *, own: bool) -> int:
        """What their prompts take up."""
        return self._tallies[own].size_bytes

    def add(self, work: Work) -> int:
        """Queue ``work``; returns the number of jobs that are here already."""
        before = len(self)
        self._sequence += 1
        since_ms = work.since_ms if work.own and self._fair else 0
        work.order = (since_ms, self._sequence)
        tally = self._tallies[work.own]
        tally.arrivals[work.job.kind].observe(work.arrived_ms)
        tally.jobs += 1
        self._jobs += 1
        tally.size_bytes += work.size_bytes
        self._insert(work)
        return before

    def next(self, now_ms: int) -> Work | None:
        """Move the job whose turn it is to running, if a slot is free."""
        if self._jobs == len(self.running) or len(self.running) >= self.slots:
            return None
        each = self._turn()
        if each is None:
            return None
        if self._fair:
            line = min(each.lines.values(), key=lambda line: line.served)
        else:
            line = next(iter(each.lines.values()))
        work = line.works[0]
        self._take(work)
        cost_ms = self.times.mean_ms(work.job.kind, self.slots)
        self._virtual = each.served
        each.served += cost_ms / each.weight
        each.virtual = line.served
        line.served += cost_ms
        work.started_ms = now_ms
        work.attempts += 1
        self.running[work.job.job_id] = work
        return work

    def end(self, job_id: int) -> Work | None:
        """Take a running job out; None if it is no longer known."""
        work = self.running.pop(job_id, None)
        if work is not None:
            self._forget(work)
        return work

    def put_back(self) -> list[Work]:
        """The engine is gone: running jobs wait again, ahead of the rest. Returns them."""
        back = list(self.running.values())
        self.running.clear()
        for place, work in enumerate(back):
            work.order = (-1, place)
            work.started_ms = -1
            self._insert(work)
        return back

    def remove(self, unwanted: Callable[[Work], bool]) -> tuple[list[Work], list[Work]]:
        """Take out what is ``unwanted``; returns (waiting ones, running ones)."""
        waiting = [work for work in self._waiting() if unwanted(work)]
        for work in waiting:
            self._take(work)
        running = [work for work in self.running.values() if unwanted(work)]
        for work in running:
            del self.running[work.job.job_id]
        for work in (*waiting, *running):
            self._forget(work)
        return waiting, running

    def find(self, found: Callable[[Work], bool]) -> Work | None:
        """The first job that is ``found``."""
        return next((work for work in self if found(work)), None)

    # --- how long it takes

    def expected_wait_ms(self, now_ms: int, *, own: bool) -> int:
        """How long a job that came now would wait for its turn, by what is served before it, up to
        a day: figures that make it longer are no reason to send others away for longer."""
        batch = max(min(self.slots, len(self)), 1)
        ahead_ms = self._waiting_ms(own, batch)
        begun_ms = self._remaining_ms(now_ms, batch)
        wait_ms = begun_ms + ahead_ms + self._waiting_ms(not own, batch)
        if self._fair:
            # The other class has its turns meanwhile: with what waits of it and what is still to
            # come, up to its share.
            share = OWN_WEIGHT if own else 1 / OWN_WEIGHT
            most_ms = begun_ms + ahead_ms * (1 + 1 / share)
            if wait_ms < most_ms:
                comes = min(self.utilisation(now_ms, own=not own), MOST_COMES)
                wait_ms /= 1 - comes
            wait_ms = min(wait_ms, most_ms)
        return min(round(wait_ms), LONGEST_WAIT_MS)

    def _waiting_ms(self, own: bool, batch: int) -> float:
        total_ms = 0.0
        for kind, jobs in self._tallies[own].waiting.items():
            if jobs:
                total_ms += jobs * self.times.mean_ms(kind, batch)
        return total_ms

    def _remaining_ms(self, now_ms: int, batch: int) -> float:
        """What running jobs still take of the model. Of one that takes always the same it is known;
        of one that may take any time, what is gone says nothing; what is between, is between."""
        remaining = 0.0
        for work in self.running.values():
            kind = work.job.kind
            mean_ms, varies = self.times.mean_ms(kind, batch), min(self.times.scv(kind), 1.0)
            gone_ms = (now_ms - work.started_ms) / len(self.running)
            remaining += varies * mean_ms + (1 - varies) * max(mean_ms - gone_ms, 0.0)
        return remaining

    def utilisation(self, now_ms: int, *, own: bool | None = None) -> float:
        """Work that comes, of one class or both, against what the board can do with all its slots
        in use: rho of the stability condition. More than 1 is more than it can do."""
        load, slots = 0.0, self.slots
        ours, theirs = self._tallies[True].arrivals, self._tallies[False].arrivals
        for kind in KINDS:
            per_ms = 0.0
            if own is not False:
                per_ms += ours[kind].per_ms(now_ms)
            if own is not True:
                per_ms += theirs[kind].per_ms(now_ms)
            if per_ms:
                load += per_ms * self.times.mean_ms(kind, slots)
        return load

    # --- inside

    def _class(self, own: bool) -> _Class:
        return self._own if own or not self._fair else self._peers

    def _turn(self) -> _Class | None:
        own, peers = self._own, self._peers
        if not own.lines or not peers.lines:
            return own if own.lines else peers if peers.lines else None
        return own if own.served <= peers.served else peers

    def _insert(self, work: Work) -> None:
        each, name = self._class(work.own), work.line if self._fair else ""
        if not each.lines:  # idle time is no credit
            each.served = max(each.served, self._virtual)
        line = each.lines.get(name)
        if line is None:
            # At the end of the round: who comes back at once is not served before those who wait.
            last = max((other.served for other in each.lines.values()), default=each.virtual)
            line = each.lines[name] = _Line(served=last)
        insort(line.works, work, key=_order)
        self._tallies[work.own].waiting[work.job.kind] += 1

    def _take(self, work: Work) -> None:
        each, name = self._class(work.own), work.line if self._fair else ""
        line = each.lines[name]
        line.works.remove(work)
        if not line.works:
            del each.lines[name]
        self._tallies[work.own].waiting[work.job.kind] -= 1

    def _forget(self, work: Work) -> None:
        tally = self._tallies[work.own]
        tally.jobs -= 1
        self._jobs -= 1
        tally.size_bytes -= work.size_bytes
