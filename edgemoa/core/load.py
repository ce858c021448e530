"""How busy a board is: what its jobs take of the model, how often they come, and what follows.

All of it is measured on the board while it works. Averages are exponential, so that they follow a
model that is changed, a processor that throttles, and users who come and go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from edgemoa.core.events import JobKind, WorkDone
from edgemoa.core.messages import Name
from edgemoa.core.rates import Positive, Rates

PRIOR_SERVICE_MS: Final = 5_000  # assumed until the first job of a kind has been measured
AVERAGE_WEIGHT: Final = 0.1  # of the newest sample, once there are more than a few
HORIZON_MS: Final = 120_000  # that a rate of arrivals looks back over, falling off exponentially
LONG_MS: Final = 20 * HORIZON_MS  # what is older than that does not count at all
LEAST_SPAN_MS: Final = 30_000  # what came within less than that is no rate yet
MOST_SCV: Final = 16.0  # of a squared coefficient of variation that is believed

KINDS: Final[tuple[JobKind, ...]] = ("proposal", "aggregation")


@dataclass(slots=True)
class Average:
    """Exponential averages of a value and of its variance; the first samples count alike."""

    mean: float = 0.0
    variance: float = 0.0
    samples: int = 0

    def add(self, value: float) -> None:
        """Take a sample into account (West's update, with a weight that stops falling)."""
        self.samples += 1
        weight = max(1 / self.samples, AVERAGE_WEIGHT)
        off = value - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)

    @property
    def scv(self) -> float:
        """The squared coefficient of variation; 1, as of an exponential, while it is unknown."""
        if self.samples < 3 or self.mean <= 0:
            return 1.0
        return min(self.variance / (self.mean * self.mean), MOST_SCV)


class UsualJob(msgspec.Struct, frozen=True):
    """What jobs of one kind have been like, on average."""

    kind: JobKind
    model_ms: Positive  # of the model's time
    scv: Positive  # squared coefficient of variation of that
    prompt_tokens: Positive
    found_tokens: Positive  # of the prompt, that none had to read, not ahead of the job either
    tokens: Positive


class Learned(msgspec.Struct, frozen=True):
    """What a board knows of its speed with one model; kept over restarts."""

    model: Name
    jobs: Annotated[tuple[UsualJob, ...], msgspec.Meta(max_length=len(KINDS))] = ()
    rates: Rates = Rates()


@dataclass(slots=True)
class _Usual:
    """The running averages behind :class:`UsualJob`."""

    model_ms: Average
    prompt_tokens: Average
    found_tokens: Average
    tokens: Average

    def follow(self, done: WorkDone) -> None:
        self.model_ms.add(done.model_ms)
        self.prompt_tokens.add(done.prompt_tokens)
        self.found_tokens.add(done.cached_tokens - done.ahead_tokens)
        self.tokens.add(done.tokens)


class ServiceTimes:
    """What a job of each kind takes of this board's model, in ms: alpha of the stability condition.

    ``rates`` are the engine's; a usual job's size and they tell what it takes where others are
    written along with it. Before there are any, the average of what jobs took has to do.
    """

    def __init__(self) -> None:
        self.rates = Rates()
        self._usual: dict[JobKind, _Usual] = {}
        self._means: dict[tuple[JobKind, int], float] = {}  # until something new is measured

    def observe(self, kind: JobKind, done: WorkDone) -> None:
        """Take a finished job into account."""
        if kind not in self._usual:
            self._usual[kind] = _Usual(Average(), Average(), Average(), Average())
        self._usual[kind].follow(done)
        self._means.clear()

    def measured_rates(self, rates: Rates) -> None:
        """Take what the engine measured."""
        self.rates = rates
        self._means.clear()

    def ms_of(self, kind: JobKind, batch: int, prompt_tokens: int, most_tokens: int) -> float:
        """For a job about a user's prompt of so many tokens, that may not write more than that.

        An aggregation is as much longer than a usual one as the prompt is longer than usual.
        """
        mean_ms, usual = self.mean_ms(kind, batch), self._usual.get(kind)
        if usual is None:
            return mean_ms
        tokens = min(usual.tokens.mean, most_tokens)
        read = float(prompt_tokens)
        if kind == "aggregation":
            first = self._usual.get("proposal")
            more = 0.0 if first is None else prompt_tokens - first.prompt_tokens.mean
            read = max(usual.prompt_tokens.mean + more, read)
        found = min(usual.found_tokens.mean, read)
        estimate = self.rates.estimate(read, tokens, batch, found)
        if estimate is None:
            estimate = mean_ms * tokens / max(usual.tokens.mean, 1.0)
        return max(estimate, 1.0)

    def mean_ms(self, kind: JobKind, batch: int = 1) -> float:
        """For a usual job that is written along with others, ``batch`` in all; a cautious guess
        while nothing has been measured."""
        mean = self._means.get((kind, batch))
        if mean is None:
            mean = self._means[kind, batch] = self._mean_ms(kind, batch)
        return mean

    def _mean_ms(self, kind: JobKind, batch: int) -> float:
        usual = self._usual.get(kind)
        if usual is None:
            # An aggregation is at least a proposal with more to read.
            other = self._usual.get("proposal")
            return PRIOR_SERVICE_MS if other is None else max(other.model_ms.mean, 1.0)
        estimate = self.rates.estimate(
            usual.prompt_tokens.mean, usual.tokens.mean, batch, usual.found_tokens.mean
        )
        return max(usual.model_ms.mean if estimate is None else estimate, 1.0)

    def scv(self, kind: JobKind) -> float:
        """The squared coefficient of variation of what such jobs take."""
        usual = self._usual.get(kind)
        return 1.0 if usual is None else usual.model_ms.scv

    def is_measured(self, kind: JobKind) -> bool:
        """Whether there has been a job of that kind."""
        return kind in self._usual

    def measured(self) -> dict[str, int]:
        """The average that jobs took so far, in ms by kind, for people."""
        return {kind: round(usual.model_ms.mean) for kind, usual in self._usual.items()}

    def learned(self, model: str) -> Learned:
        """What is worth keeping for the next start with that model."""
        jobs = tuple(
            UsualJob(
                kind,
                usual.model_ms.mean,
                usual.model_ms.scv,
                usual.prompt_tokens.mean,
                max(usual.found_tokens.mean, 0.0),
                usual.tokens.mean,
            )
            for kind, usual in self._usual.items()
        )
        return Learned(model, jobs, self.rates)

    def recall(self, learned: Learned) -> None:
        """Begin with what was known at the last start; a few jobs of now outweigh it."""
        few = round(1 / AVERAGE_WEIGHT)
        for job in learned.jobs:
            self._usual[job.kind] = _Usual(
                Average(job.model_ms, job.scv * job.model_ms**2, few),
                Average(job.prompt_tokens, 0.0, few),
                Average(job.found_tokens, 0.0, few),
                Average(job.tokens, 0.0, few),
            )
        self.rates = learned.rates
        self._means.clear()


class Arrivals:
    """How often something comes, and how evenly: a count that is forgotten exponentially.

    ``start_ms`` is when counting began; the rate of a board that has just started is what came
    since then, and not less than if it had come within :data:`LEAST_SPAN_MS`.
    """

    def __init__(self, start_ms: int) -> None:
        self.total = 0
        self._start_ms = start_ms
        self._last_ms = start_ms
        self._level = 0.0
        self._gaps = Average()
        self._asked_ms = -1
        self._per_ms = 0.0

    def observe(self, now_ms: int) -> None:
        """One has come."""
        if self.total:
            self._gaps.add(now_ms - self._last_ms)
        self.total += 1
        self._level = self._faded(now_ms) + 1
        self._last_ms = now_ms
        self._asked_ms = -1

    def per_ms(self, now_ms: int) -> float:
        """The rate at which they come, per ms."""
        if now_ms != self._asked_ms:  # asked several times for each thing that happens
            self._asked_ms = now_ms
            self._per_ms = self._rate(now_ms)
        return self._per_ms

    def _rate(self, now_ms: int) -> float:
        if not self.total:
            return 0.0
        span_ms = now_ms - self._start_ms
        if span_ms > LONG_MS:
            return self._faded(now_ms) / HORIZON_MS
        seen = -math.expm1(-max(span_ms, LEAST_SPAN_MS) / HORIZON_MS)
        return self._faded(now_ms) / (HORIZON_MS * seen)

    @property
    def scv(self) -> float:
        """The squared coefficient of variation of the gaps: 1 for Poisson arrivals."""
        return self._gaps.scv

    def _faded(self, now_ms: int) -> float:
        return self._level * math.exp(-max(now_ms - self._last_ms, 0) / HORIZON_MS)
