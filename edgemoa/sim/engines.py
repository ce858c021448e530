"""Simulated engines: how long a job takes, and how jobs that run at a time share the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

from edgemoa.core.events import JobKind
from edgemoa.core.moa import FRAME_TOKENS
from edgemoa.sim.recording import Recording, Speeds
from edgemoa.sim.scenario import Scenario, Sizes

ASKED_TOKENS: Final = 16  # of the sentence that asks for an aggregation
_CLOSE: Final = 1e-6  # ms; what is nearer to its end has reached it


class Need(NamedTuple):
    """What a job takes that has the model to itself."""

    model_ms: float
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What is known of a job before it runs. ``drafts`` is how many proposals it reads; its
    prompt's and answer's own sizes in tokens are 0 where they are as usual."""

    kind: JobKind
    final: bool
    drafts: int
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Timed:
    """Service times from a distribution around a mean."""

    def __init__(self, scenario: Scenario, mean_s: float) -> None:
        self._means_ms = {
            "proposal": mean_s * 1000,
            "aggregation": mean_s * 1000 * scenario.aggregation_factor,
        }
        fixed = scenario.distribution == "fixed"
        cv = {"exponential": 1.0, "fixed": 0.0, "gamma": scenario.cv}[scenario.distribution]
        self._exponential = not fixed and cv == 1
        self._shape = 0.0 if cv == 0 else 1 / (cv * cv)
        self.overhead = scenario.batch_overhead
        self.slots = scenario.slots

    def draw(self, rng: Random, ask: Ask) -> Need:
        """A job's need."""
        mean_ms = self._means_ms[ask.kind]
        if self._exponential:
            mean_ms *= rng.expovariate(1.0)
        elif self._shape:
            mean_ms *= rng.gammavariate(self._shape, 1 / self._shape)
        return Need(mean_ms, 10, 10)


class Recorded:
    """Service times of a measured board: its samples as they are or, for other sizes of prompts and
    answers, what its speeds make of those.

    Answers differ in length by the scenario's distribution, up to what a job may write. What a
    board finds read already of a prompt is left out of account: it reads every prompt anew.
    """

    def __init__(self, scenario: Scenario, recording: Recording) -> None:
        self._speeds = Speeds.of(recording.rates)
        self._sizes = scenario.sizes or Sizes()
        self._lengths = Timed(scenario, 0.001)
        kinds: tuple[JobKind, ...] = ("proposal", "aggregation")
        self._samples: dict[JobKind, list[Need]] = {
            kind: [
                Need(each.model_ms, each.prompt_tokens, each.tokens)
                for each in recording.samples
                if each.kind == kind
            ]
            for kind in kinds
        }
        self._sampled = scenario.sizes is None and all(self._samples.values())
        self.slots = recording.slots
        usual = self.mean("proposal", scenario.proposers + 1, self._sizes)
        self.overhead = self._speeds.overhead(usual.prompt_tokens, usual.tokens)

    def draw(self, rng: Random, ask: Ask) -> Need:
        """A job's need."""
        given = ask.prompt_tokens or ask.answer_tokens
        if self._sampled and not given:
            samples = self._samples[ask.kind]
            return samples[int(rng.random() * len(samples))]
        usual = self._sizes
        answer = ask.answer_tokens or usual.answer
        # A longer answer is made of longer proposals.
        proposal = usual.proposal
        if ask.answer_tokens:
            proposal = max(round(usual.proposal * answer / usual.answer), 1)
        sizes = Sizes(ask.prompt_tokens or usual.prompt, proposal, answer)
        tokens = sizes.answer if ask.final else sizes.proposal
        if not ask.answer_tokens:
            need = self._lengths.draw(rng, Ask("proposal", ask.final, 0))
            tokens = max(round(tokens * need.model_ms), 1)
        prompt = prompt_tokens(ask.kind, ask.drafts, sizes)
        return Need(self._speeds.job_ms(prompt, tokens), prompt, tokens)

    def mean(self, kind: JobKind, drafts: int, sizes: Sizes, *, final: bool = False) -> Need:
        """What a job of usual length takes."""
        prompt = prompt_tokens(kind, drafts, sizes)
        tokens = sizes.answer if final else sizes.proposal
        return Need(self._speeds.job_ms(prompt, tokens), prompt, tokens)


def prompt_tokens(kind: JobKind, drafts: int, sizes: Sizes) -> int:
    """What a job reads: the conversation and, for an aggregation, the proposals and the request
    once more (see :class:`edgemoa.core.moa.Synthesis`)."""
    if kind == "proposal":
        return sizes.prompt
    return 2 * sizes.prompt + drafts * (sizes.proposal + FRAME_TOKENS) + ASKED_TOKENS


@dataclass(slots=True)
class Running:
    """A job in a batch: where its clocks will stand at the job's end, and stood when it began."""

    job_id: int
    until: float
    shared: float


class Batch:
    """Jobs that run at a time: a step for b of them takes tau(b) = t0 + a b, so that each goes at
    tau(1) / tau(b) of its speed alone.

    Two clocks run while there are jobs: ``_done``, in ms of a job's own need, and ``_share``, in ms
    of the model's time that each job has had.
    """

    def __init__(self, overhead: float) -> None:
        self.jobs: dict[int, Running] = {}
        self.turn = 0  # changes with everything that changes when the next job is done
        self._overhead = overhead
        self._at_ms = 0.0
        self._done = 0.0
        self._share = 0.0

    def start(self, job_id: int, need_ms: float, now_ms: int) -> None:
        """Take a job in."""
        self._advance(now_ms)
        self.jobs[job_id] = Running(job_id, self._done + need_ms, self._share)

    def stop(self, job_id: int, now_ms: int) -> float | None:
        """Take a job out, done or not; its share of the model's time in ms, None if unknown."""
        self._advance(now_ms)
        running = self.jobs.pop(job_id, None)
        return None if running is None else self._share - running.shared

    def next_end_ms(self, now_ms: int) -> int | None:
        """When the next job will be done if none comes or goes."""
        self._advance(now_ms)
        if not self.jobs:
            return None
        nearest = min(running.until for running in self.jobs.values())
        left_ms = max(nearest - self._done, 0.0) * self._step(len(self.jobs))
        return now_ms + math.ceil(left_ms - _CLOSE)

    def ended(self, now_ms: int) -> Running | None:
        """A job that is done by now."""
        self._advance(now_ms)
        # The clock has whole milliseconds: who would be done before the next one is done.
        done = self._done + _CLOSE
        return next((each for each in self.jobs.values() if each.until <= done), None)

    def clear(self) -> None:
        """Forget all jobs."""
        self.jobs.clear()
        self.turn += 1

    def _step(self, jobs: int) -> float:
        """tau(b) / tau(1)."""
        return self._overhead + (1 - self._overhead) * jobs

    def _advance(self, now_ms: int) -> None:
        if jobs := len(self.jobs):
            passed_ms = now_ms - self._at_ms
            self._done += passed_ms / self._step(jobs)
            self._share += passed_ms / jobs
        self._at_ms = now_ms
