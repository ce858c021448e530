"""One board: its queue, its prompts, its view of the others. The only class a shell touches.

Every method takes what happened and the time, and returns what is to be done about it, in order.
Nothing here reads a clock, draws from a global generator, or does I/O; the daemon and the
simulator drive this same class.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final, Literal, TypeAlias

import msgspec

from edgemoa.core import limits
from edgemoa.core.admission import RESUME, SLOW_OWNER, Cap, Grant, Ladder, Plan, cap, grant_anyway
from edgemoa.core.events import (
    Accepted,
    Aggregating,
    Answered,
    Effect,
    EngineInfo,
    Failed,
    Finish,
    Granted,
    Job,
    JobKind,
    LayerStarted,
    ProposalArrived,
    ProposalRecord,
    ProposerLeftOut,
    ReadAhead,
    Request,
    RequestEvent,
    Send,
    StartWork,
    StopWork,
    Tell,
    Text,
    TokenLogprob,
    ToolCall,
    Wishes,
    WorkDone,
    WorkFailed,
)
from edgemoa.core.load import KINDS, Arrivals, Average, Learned
from edgemoa.core.membership import Membership
from edgemoa.core.messages import (
    Alive,
    BoardId,
    Cancel,
    ChatMessage,
    Declined,
    Message,
    Part,
    Proposal,
    Propose,
    Queued,
    Sampling,
    printable,
)
from edgemoa.core.moa import (
    MOST_BYTES_PER_TOKEN,
    Draft,
    Give,
    Question,
    Room,
    Run,
    State,
    Strategy,
    Synthesis,
    Write,
    held_bytes,
    shown,
    size_bytes,
)
from edgemoa.core.parts import (
    ANSWER_MS,
    BYTES_PER_TOKEN,
    PROPOSAL_MS,
    READ_CHARACTERS,
    STALL_MS,
    Hearing,
    Telling,
)
from edgemoa.core.picking import Outlook, Pick, choose
from edgemoa.core.queueing import LONGEST_WAIT_MS, OWN_WEIGHT, Discipline, Work, WorkQueue
from edgemoa.core.rates import Rates
from edgemoa.core.swim import Swim

USUAL_BYTES: Final = 16 * limits.KIB  # of a prompt and what belongs to it, until one was seen
LOGPROB_BYTES: Final = 128  # of one token's alternative, about
LEAST_RETRY_MS: Final = 1_000
MOST_PERMILLE: Final = 1_000_000
PROPOSAL_TOP_P: Final = 0.95
ANSWER_ROOM_TOKENS: Final = 512  # kept free for the answer where it asked for more than fits

Aggregator: TypeAlias = Literal["owner", "strongest", "auto"]
WorkKey: TypeAlias = tuple[BoardId, str, int]  # who asked, for which request, in which layer
_Unwanted: TypeAlias = Callable[[Work], bool]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What the configuration says to the core."""

    name: str
    boot: int  # grows with every start of the board
    own_requests: int | None = None  # at most, beside the cap that follows from what is measured
    peer_jobs: int | None = None  # the same; 0 for a board that works for its own user alone
    queue_bytes: int = 64 * limits.MIB  # for prompts and proposals, half for either class
    promise_ms: int = 300_000  # within which an accepted prompt is meant to be answered
    pick: Pick = "shortest"
    discipline: Discipline = "fair"
    ladder: bool = True  # False: every plan as asked for, whatever the load; to study that
    aggregator: Aggregator = "owner"
    answer_max_tokens: int = 512  # of an aggregation that is done for a peer
    own_proposal: Literal["auto", "always"] = "auto"  # auto: a slow owner leaves it to its peers
    learned: Learned | None = None  # at earlier starts
    quorum: int = 0
    layer_deadline_ms: int = 120_000
    proposal_max_tokens: int = 256
    proposal_temperature: float = 0.7
    strategy: Strategy = field(default_factory=Synthesis)


@dataclass(slots=True)
class Counters:
    """What this board has done since it started."""

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    degraded: int = 0  # accepted with less than was asked for
    refused: int = 0
    proposals_served: int = 0
    proposals_declined: int = 0
    proposers_left_out: int = 0
    engine_losses: int = 0
    tokens_read: int = 0  # of finished jobs' prompts, without what was cached
    tokens_cached: int = 0  # that need not be read
    tokens_written: int = 0


class Node:
    """See the module. ``rng`` is the only source of chance."""

    def __init__(
        self, board_id: BoardId, settings: NodeSettings, rng: Random, now_ms: int = 0
    ) -> None:
        self.board_id = board_id
        self.settings = settings
        self.members = Membership()
        self.swim = Swim(
            board_id, settings.boot, self.members, rng=rng, report=self.report, now_ms=now_ms
        )
        self.queue = WorkQueue(settings.discipline, now_ms)
        self.ladder = Ladder(settings.promise_ms)
        self.prompts = Arrivals(now_ms)  # of the own user's, taken or not
        self.runs: dict[str, Run] = {}
        self.counters = Counters()
        self.engine: EngineInfo | None = None
        self.engine_ready = False
        self.draining = False
        self._rng = rng
        self._effects: list[Effect] = []
        self._next_job_id = 1
        self._sequence = 0
        self._stopped = False
        self._refusing = False
        self._own_bytes = 0  # what the prompts that are worked on may come to
        self._usual_bytes = {True: Average(), False: Average()}  # of one prompt: own, peers'
        # Jobs that a board was given since its last report, by that report's number.
        self._unreported: dict[BoardId, tuple[int, int]] = {}
        # Finished and called-off work, by who asked: a repeated question gets the same answer
        # again, and one that was called off before it arrived is not begun.
        self._results: defaultdict[BoardId, dict[WorkKey, Proposal | Declined]] = defaultdict(dict)

    # --- the local user

    def submit(self, request: Request, now_ms: int, *, promised: bool = False) -> list[Effect]:
        """Accept a prompt, or refuse it with a reason; the client hears which as first event.

        One that was ``promised``, accepted before this board was restarted, is not refused.
        """
        if request.request_id in self.runs:
            raise ValueError("a request id is used once")
        self.prompts.observe(now_ms)
        decided = self._promised(request, now_ms) if promised else self.decide(request, now_ms)
        if isinstance(decided, Failed):
            self.counters.refused += 1
            self._effects.append(Tell(request.request_id, decided))
            return self._flush()
        grant, candidates = decided
        granted = Granted(grant.plan.layers, grant.plan.proposers, grant.why)
        promise_ms = self._promise_ms(request)
        run = Run(
            request,
            granted,
            now_ms,
            now_ms + request.deadline_ms,
            now_ms + promise_ms,
            predicted_ms=grant.predicted_ms,
            own_proposes=grant.plan.own,
            footprint_bytes=self._footprint(request),
        )
        run.room = self._room(request)
        self.runs[request.request_id] = run
        self._own_bytes += run.footprint_bytes
        self._usual_bytes[True].add(run.footprint_bytes)
        self.counters.accepted += 1
        self.counters.degraded += bool(granted.why)
        expected_ms = round(self.ladder.likely_ms(grant.predicted_ms))
        self._tell(run, Accepted(granted, len(self.queue), expected_ms))
        if granted.layers:
            self._begin_layer(run, now_ms, candidates)
        else:
            self._conclude(run, now_ms)
        return self._settle(now_ms)

    def turned_away(self, now_ms: int) -> Failed | None:
        """Why a prompt that comes now is refused before anything of it is read; None if it may
        come in. A refusal counts."""
        refusal = self.refusal(now_ms)
        if refusal is not None:
            self.prompts.observe(now_ms)
            self.counters.refused += 1
        return refusal

    def decide(self, request: Request, now_ms: int) -> tuple[Grant, list[Outlook]] | Failed:
        """With which plan a prompt would be accepted, and the peers that could be asked; or why it
        would not be. Takes nothing in."""
        refusal = self.refusal(now_ms)
        if refusal is not None:
            return refusal
        asked, promise_ms = self._asked(request), self._promise_ms(request)
        candidates = self._candidates(asked.proposers, (), now_ms)
        own = self.outlook(now_ms, request)
        grant = self._grant(asked, own, candidates, promise_ms, now_ms)
        refusal = self._broken_promise(grant, promise_ms, now_ms)
        if refusal is None and request.strict and grant.why:
            retry_ms = self._drain_ms(now_ms) if candidates else 0
            refusal = Failed("overloaded", f"only less can be had now: {grant.why}", retry_ms)
        return refusal or (grant, candidates)

    def _promised(self, request: Request, now_ms: int) -> tuple[Grant, list[Outlook]] | Failed:
        """The same for one that was accepted before; only a board that stops refuses it."""
        if self.draining:
            return Failed("unavailable", "this board is shutting down")
        asked = self._asked(request)
        candidates = self._candidates(asked.proposers, (), now_ms)
        own = self.outlook(now_ms, request)
        return self._grant(asked, own, candidates, math.inf, now_ms), candidates

    def refusal(self, now_ms: int) -> Failed | None:
        """Why no prompt at all would be accepted now; None if one would be.

        Once the cap has been reached, some of it is worked off before more is taken: whoever was
        sent away and comes back when told does not meet the next full queue.
        """
        if self.draining:
            return Failed("unavailable", "this board is shutting down")
        bound = self.cap(own=True)
        level = max(
            len(self.runs) / max(bound.requests, 1),
            self._own_bytes / max(bound.budget_bytes, 1),
            self._alone_ms(now_ms) * self.ladder.doubt / self.settings.promise_ms,
        )
        self._refusing = bool(self.runs) and level >= (RESUME if self._refusing else 1)
        if not self._refusing:
            return None
        reason = f"{len(self.runs)} prompts are being worked on, as many as this board can for now"
        return Failed("overloaded", reason, self._drain_ms(now_ms), len(self.runs))

    def _alone_ms(self, now_ms: int) -> float:
        """How long an answer takes that this board writes by itself; 0 while that is a guess."""
        known = self.settings.ladder and self.queue.times.is_measured("proposal")
        return self.outlook(now_ms).done_ms() if known else 0.0

    def cancel(self, request_id: str, now_ms: int) -> list[Effect]:
        """The client no longer wants the answer: stop everything that works for it."""
        run = self.runs.get(request_id)
        if run is not None:
            self._fail(run, Failed("cancelled", "the client went away"), State.CANCELLED)
        return self._settle(now_ms)

    # --- the other boards

    def pair(self, board: BoardId, name: str, now_ms: int) -> list[Effect]:
        """A board that may be asked, and may ask, from now on."""
        self.members.pair(board, name)
        self.swim.pair(board)
        return self._settle(now_ms)

    def unpair(self, board: BoardId, now_ms: int) -> list[Effect]:
        """A board that is no longer trusted: its work stops, nothing of it is waited for."""
        if board in self.members.peers:
            self.members.silence(board)
            self._void(board, "no longer paired", now_ms)
            self.swim.forget(board)
            self.members.unpair(board)
            self._results.pop(board, None)
            self._unreported.pop(board, None)
            self.ladder.forget(board)
        return self._settle(now_ms)

    def linked(self, board: BoardId, boot: int, now_ms: int) -> list[Effect]:
        """Messages can reach a paired board from now on, and it is this boot of it that they
        reach; a link that only takes another's place may be told as well."""
        if board in self.members.peers and not self._stopped:
            self.swim.linked(board, boot, now_ms)
            self._heed(now_ms)
        return self._settle(now_ms)

    def unlinked(self, board: BoardId, now_ms: int) -> list[Effect]:
        """The link with a board has ended, and there is no other."""
        if board in self.members.peers and not self._stopped:
            self.swim.unlinked(board, now_ms)
            self._heed(now_ms)
        return self._settle(now_ms)

    def receive(self, sender: BoardId, message: Message, now_ms: int) -> list[Effect]:
        """An authentic message of a board; one that is not paired is not listened to."""
        if sender not in self.members.peers:
            return []
        listen = self.swim.receive(sender, message, now_ms)
        self._heed(now_ms)
        if not listen:
            return self._settle(now_ms)
        match message:
            case Propose():
                self._asked_for_proposal(sender, message, now_ms)
            case Queued(request_id=request_id, layer=layer):
                run = self.runs.get(request_id)
                if run is None or not run.waits_for(sender, layer):
                    self._send(sender, Cancel(request_id, layer))  # orphaned: let it stop
            case Part():
                self._part_arrived(sender, message, now_ms)
            case Proposal():
                self._proposal_arrived(sender, message, now_ms)
            case Declined():
                self._declined(sender, message, now_ms)
            case Cancel(request_id=request_id, layer=layer):
                key = (sender, request_id, layer)
                self._drop(lambda work: _key(work) == key)
                if key not in self._results[sender]:
                    self._remember(key, Declined(request_id, layer, "called off"))
        return self._settle(now_ms)

    def undelivered(self, to: BoardId, message: Message, now_ms: int) -> list[Effect]:
        """A message could not be brought to its board; if it was a question, ask another."""
        match message:
            case Propose(request_id=request_id, layer=layer):
                run = self.runs.get(request_id)
                heard = run.heard_of(to, layer) if run is not None else None
                if heard is None or not heard.text:  # else it was, whatever became of the link
                    self._substitute(to, request_id, layer, "could not be reached", now_ms)
            case Part(request_id=request_id, layer=layer, start=start):
                key = (to, request_id, layer)
                work = self.queue.find(lambda work: _key(work) == key)
                if work is not None and work.telling is not None:
                    work.telling.take_back(start)
        return self._settle(now_ms)

    # --- the engine

    def engine_is_ready(self, info: EngineInfo, now_ms: int) -> list[Effect]:
        """The model process takes work."""
        changed = not self.engine_ready
        self.engine, self.engine_ready = info, True
        self.queue.slots = info.slots
        learned = self.settings.learned
        if learned is not None and learned.model == info.model and not self.queue.times.measured():
            self.queue.times.recall(learned)
        if changed:
            self.swim.announce(now_ms)
            self._heed(now_ms)
        return self._settle(now_ms)

    def engine_is_lost(self, now_ms: int) -> list[Effect]:
        """The model process is gone; what it was on is tried once more when it is back."""
        self.engine_ready = False
        self.counters.engine_losses += 1
        for work in self.queue.put_back():
            if work.telling is not None:
                work.telling.begin_anew()
        spent, _ = self.queue.remove(lambda work: work.attempts >= limits.MAX_JOB_ATTEMPTS)
        for work in spent:
            self._work_failed(work, WorkFailed("the model process died on it twice"), now_ms)
        for run in self.runs.values():
            run.attempt, run.pieces, run.read_ahead = "", 0, False
            run.logprobs = []
        self.swim.announce(now_ms)
        self._heed(now_ms)
        return self._settle(now_ms)

    def wrote(
        self, job_id: int, text: str, now_ms: int, logprobs: tuple[TokenLogprob, ...] = ()
    ) -> list[Effect]:
        """The engine wrote a piece of a streamed job's text."""
        work = self.queue.running.get(job_id)
        run = self.runs.get(work.request_id) if work and work.final else None
        if work is not None and work.telling is not None:
            part = work.telling.write(text, now_ms)
            if part is not None:
                self._send(work.source, Part(work.request_id, work.layer, *part))
        elif run is not None:
            run.attempt += text
            run.logprobs += logprobs
            run.pieces += 1
            self._tell_text(run, run.attempt)
        return self._settle(now_ms)

    def finished(self, job_id: int, done: WorkDone, now_ms: int) -> list[Effect]:
        """The engine finished a job."""
        work = self.queue.end(job_id)
        if work is not None:
            self.queue.times.observe(work.job.kind, done)
            self.counters.tokens_read += done.prompt_tokens - done.cached_tokens
            self.counters.tokens_cached += done.cached_tokens
            self.counters.tokens_written += done.tokens
            self._work_finished(work, done, now_ms)
        return self._settle(now_ms)

    def failed(self, job_id: int, failure: WorkFailed, now_ms: int) -> list[Effect]:
        """The engine could not do a job."""
        work = self.queue.end(job_id)
        if work is not None:
            self._work_failed(work, failure, now_ms)
        return self._settle(now_ms)

    def measured(self, rates: Rates) -> None:
        """How fast the engine has been so far."""
        self.queue.times.measured_rates(rates)

    def learned(self) -> Learned | None:
        """What is worth keeping for the next start; None if nothing is."""
        if self.engine is None or not self.queue.times.measured():
            return None
        return self.queue.times.learned(self.engine.model)

    # --- time

    def tick(self, now_ms: int) -> list[Effect]:
        """Do what is due by now; harmless when called early or late."""
        if self._stopped:
            return []
        self.swim.tick(now_ms)
        self._heed(now_ms)
        for run in list(self.runs.values()):
            if now_ms >= run.deadline_ms:
                self._deadline_passed(run, now_ms)
            elif run.state is State.PROPOSING and now_ms >= run.layer_deadline_ms:
                self._leave_out_pending(run, "too late")
                self._close_layer(run, now_ms)
        self._drop(lambda work: not work.own and now_ms >= work.deadline_ms)
        return self._settle(now_ms)

    def next_deadline_ms(self) -> int:
        """When :meth:`tick` has something to do, at the latest."""
        due = self.swim.due_ms()
        for run in self.runs.values():
            due = min(due, run.deadline_ms)
            if run.state is State.PROPOSING:
                due = min(due, run.layer_deadline_ms)
        return due

    def drain(self, now_ms: int) -> list[Effect]:
        """Take nothing new and hand back what peers are waiting for and has not begun."""
        self.draining = True
        waiting, _ = self.queue.remove(lambda work: not work.own and work.started_ms < 0)
        for work in waiting:
            self._decline(_key(work), "this board is shutting down")
        self.swim.announce(now_ms)
        self._heed(now_ms)
        return self._settle(now_ms)

    def stop(self, now_ms: int) -> list[Effect]:
        """The end of the board's run: every prompt and every peer's job gets its last word."""
        self.draining = True
        for run in list(self.runs.values()):
            self._fail_or_fall_back(run, Failed("unavailable", "this board shut down"), now_ms)
        for work in self._drop(lambda work: not work.own):
            self._decline(_key(work), "this board is shutting down")
        self.swim.last_words()
        self._heed(now_ms)
        self._stopped = True
        return self._flush()

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything of this board."""
        return not self.runs and not len(self.queue)

    def peer_jobs(self) -> int:
        """Peers' jobs waiting or running here."""
        return self.queue.jobs(own=False)

    # --- what is taken, and with which plan

    def cap(self, *, own: bool) -> Cap:
        """How many own prompts, or peers' jobs, are taken at a time."""
        settings, times = self.settings, self.queue.times
        setting = settings.own_requests if own else settings.peer_jobs
        # Own prompts are sure of their share of the model. A peer's job is of use within its layer.
        share = OWN_WEIGHT / (OWN_WEIGHT + 1) if own else 1.0
        promise_ms = settings.promise_ms if own else settings.layer_deadline_ms
        bound = cap(
            service_ms=times.mean_ms("proposal", self.queue.slots) / share,
            scv=times.scv("proposal"),
            slots=self.queue.slots,
            promise_ms=promise_ms,
            budget_bytes=settings.queue_bytes // 2,
            usual_bytes=self._usual_bytes[own].mean or USUAL_BYTES,
            setting=setting,
        )
        if settings.ladder:
            return bound
        free = limits.MAX_OWN_REQUESTS if setting is None else setting
        return msgspec.structs.replace(bound, requests=free)

    def outlook(self, now_ms: int, request: Request | None = None) -> Outlook:
        """What this board is expected to do with the next prompt of its own: with this one, or
        with a usual one."""
        queue, times = self.queue, self.queue.times
        batch = max(min(queue.slots, len(queue) + 1), 1)
        if request is None:
            first_ms, later_ms = (times.mean_ms(kind, batch) for kind in KINDS)
        else:
            sizes = request.prompt_tokens, request.sampling.max_tokens
            first_ms, later_ms = (times.ms_of(kind, batch, *sizes) for kind in KINDS)
        wait_ms = queue.expected_wait_ms(now_ms, own=True)
        return Outlook(self.board_id, wait_ms, first_ms, later_ms, queue.utilisation(now_ms))

    def peer_outlook(self, board: BoardId, now_ms: int) -> Outlook:
        """What a peer is expected to do with the next job that it is given."""
        peer = self.members.peers[board]
        report = peer.report
        assert report is not None  # noqa: S101 - of usable ones only
        sequence, jobs = self._unreported.get(board, (-1, 0))
        unreported = jobs if sequence == report.sequence else 0
        return Outlook.of(board, report, unreported, now_ms - peer.report_ms)

    def _asked(self, request: Request) -> Plan:
        # Whether it is slow is found out by proposing.
        measured = self.queue.times.is_measured("proposal")
        always = self.settings.own_proposal == "always" or not measured
        if not request.layers or not request.proposers:
            # M > 0 with k = 0 is the owner talking to itself: the board alone.
            return Plan(0, 0)
        return Plan(request.layers, request.proposers, always)

    def _promise_ms(self, request: Request) -> int:
        return min(self.settings.promise_ms, request.deadline_ms)

    def _candidates(self, proposers: int, asked: Container[BoardId], now_ms: int) -> list[Outlook]:
        """Peers that could be asked, the best first."""
        if not proposers:
            return []
        usable: Sequence[BoardId] = self.members.usable()
        if asked:
            usable = [board for board in usable if board not in asked]
        outlook = partial(self.peer_outlook, now_ms=now_ms)
        return choose(self.settings.pick, usable, proposers, self._rng, outlook)

    def _grant(
        self, asked: Plan, own: Outlook, candidates: list[Outlook], promise_ms: float, now_ms: int
    ) -> Grant:
        if not self.settings.ladder:
            return grant_anyway(asked, own, candidates)
        return self.ladder.grant(
            asked,
            own,
            candidates,
            prompts_per_ms=self.prompts.per_ms(now_ms),
            peers_utilisation=self.queue.utilisation(now_ms, own=False),
            # A guess is no reason to give less than was asked for.
            promise_ms=promise_ms if self.queue.times.is_measured("proposal") else math.inf,
        )

    def _broken_promise(self, grant: Grant, promise_ms: int, now_ms: int) -> Failed | None:
        """Why even the smallest plan is refused: it would be too late, by what is before it."""
        likely_ms = grant.predicted_ms * self.ladder.doubt
        if not self._alone_ms(now_ms) or not self.runs or likely_ms <= promise_ms:
            return None
        reason = (
            f"an answer would take about {likely_ms / 1000:.0f} s,"
            f" and {promise_ms / 1000:.0f} s are promised"
        )
        return Failed("overloaded", reason, self._drain_ms(now_ms), len(self.runs))

    def _drain_ms(self, now_ms: int) -> int:
        """How long until prompts are taken again, for one that is refused now."""
        bound = self.cap(own=True)
        ends = len(self.runs) - math.ceil(RESUME * bound.requests) + 1
        most_ms = RESUME * self.settings.promise_ms / self.ladder.doubt
        service_ms = self.queue.times.mean_ms("proposal", self.queue.slots)
        excess_ms = max(ends * service_ms, self._alone_ms(now_ms) - most_ms, service_ms / 2)
        share = 1 - min(self.queue.utilisation(now_ms, own=False), 1 / (OWN_WEIGHT + 1))
        return max(round(excess_ms / share), LEAST_RETRY_MS)

    def _footprint(self, request: Request) -> int:
        """Bytes that a prompt may come to: it, its proposals, and its answer."""
        text = (request.layers > 0) * (request.proposers + 1) * self._proposal_bytes * 2
        context = self.engine.context_tokens if self.engine else limits.MAX_COMPLETION_TOKENS
        max_tokens = min(request.sampling.max_tokens, context)
        alternatives = request.wishes.logprobs + 1
        logprobs = min(max_tokens * (alternatives + 1), limits.MAX_LOGPROBS) * LOGPROB_BYTES
        answer = max_tokens * MOST_BYTES_PER_TOKEN + (alternatives > 0) * logprobs
        return 2 * held_bytes(request.messages) + text + answer

    @property
    def _proposal_bytes(self) -> int:
        """That a proposal is cut to: more than its tokens can be."""
        return _most_bytes(self.settings.proposal_max_tokens)

    # --- one prompt, layer by layer

    def _room(self, request: Request) -> Room:
        """Tokens that proposals may take beside the conversation and the answer to come."""
        context = self.engine.context_tokens if self.engine else 0
        answer = min(request.sampling.max_tokens, max(ANSWER_ROOM_TOKENS, context // 4))
        return Room(
            tokens=max(context - request.prompt_tokens - answer, 0),
            bytes=max(limits.MAX_PROMPT_BYTES - size_bytes(request.messages), 0),
        )

    def _begin_layer(self, run: Run, now_ms: int, candidates: list[Outlook] | None = None) -> None:
        if candidates is None:
            candidates = self._candidates(run.granted.proposers, (), now_ms)
        peers = [each.board for each in self._ready(candidates)[: run.granted.proposers]]
        own = run.own_proposes or len(peers) < 2
        proposers = [self.board_id, *peers] if own else peers
        run.begin_layer(proposers, now_ms, self.settings.layer_deadline_ms)
        if len(peers) < run.granted.proposers:
            run.notes.append(
                f"layer {run.layer} had {len(peers)} of {run.granted.proposers} proposers"
            )
        names = tuple(self.members.name(peer) for peer in peers)
        if own:
            names = (self.settings.name, *names)
        self._tell(run, LayerStarted(run.layer, names))
        if own:
            self._queue_own(run, self._proposal_messages(run), self._own_proposal(), now_ms)
        for peer in peers:
            self._ask(run, peer, now_ms)

    def _ready(self, candidates: list[Outlook]) -> list[Outlook]:
        """Full boards are asked only where there are no others."""
        if not self.settings.ladder:
            return candidates
        return sorted(candidates, key=self.ladder.is_full)

    def _own_proposal(self) -> Sampling:
        # Greedy: at small sizes a model's greedy answer beats its samples on average, and boards
        # with the same model still differ, since the peers sample.
        return Sampling(max_tokens=self.settings.proposal_max_tokens)

    def _proposal_messages(self, run: Run) -> tuple[ChatMessage, ...]:
        return self.settings.strategy.propose(run.request.messages, run.previous, run.room)

    def _ask(self, run: Run, peer: BoardId, now_ms: int) -> None:
        sampling = Sampling(
            max_tokens=self.settings.proposal_max_tokens,
            temperature=self.settings.proposal_temperature,
            top_p=PROPOSAL_TOP_P,
            seed=self._rng.getrandbits(31),
        )
        messages = self._proposal_messages(run)
        stream = self._has_time_to_read()
        self._send_question(run, peer, messages, sampling, now_ms, stream=stream)

    def _has_time_to_read(self) -> bool:
        """Whether parts of proposals would likely be of use: the model can read ahead, will have
        nothing else to do, and will be the one to write."""
        reads = self.engine is not None and self.engine.reads_ahead
        return reads and len(self.runs) == 1 and self.settings.aggregator != "strongest"

    def _send_question(
        self,
        run: Run,
        peer: BoardId,
        messages: tuple[ChatMessage, ...],
        sampling: Sampling,
        now_ms: int,
        *,
        is_answer: bool = False,
        stream: bool = False,
    ) -> None:
        if stream:
            run.heard[peer] = Hearing(self._most_proposal_bytes(run))
        # Once it is shown, nobody else can write it; until then, this board says when it is late.
        until_ms = run.deadline_ms if is_answer and stream else run.layer_deadline_ms
        run.questions[peer] = Question(now_ms, size_bytes(messages))
        report = self.members.peers[peer].report
        if report is not None:
            sequence, jobs = self._unreported.get(peer, (-1, 0))
            known = jobs if sequence == report.sequence else 0
            self._unreported[peer] = (report.sequence, known + 1)
        self._send(
            peer,
            Propose(
                request_id=run.request.request_id,
                layer=run.layer,
                messages=messages,
                sampling=sampling,
                time_left_ms=max(until_ms - now_ms, 0),
                is_answer=is_answer,
                stream=stream,
            ),
        )

    def _substitute(
        self, board: BoardId, request_id: str, layer: int, reason: str, now_ms: int
    ) -> None:
        """``board`` will not propose: leave it out and ask one that has not been asked yet."""
        run = self.runs.get(request_id)
        if run is None or not run.waits_for(board, layer):
            return
        self._leave_out(run, board, reason)
        others = [] if run.handed_over else self._ready(self._candidates(1, run.asked, now_ms))
        if others:
            run.ask_also(others[0].board)
            self._ask(run, others[0].board, now_ms)
        self._close_if_settled(run, now_ms)

    def _proposal_arrived(self, sender: BoardId, proposal: Proposal, now_ms: int) -> None:
        run = self.runs.get(proposal.request_id)
        if run is not None and run.waits_for(sender, proposal.layer):
            question = run.questions[sender]
            spent_ms = proposal.queue_ms + proposal.work_ms  # the peer's word
            self._take(
                run,
                Draft.of(
                    sender,
                    _cut(proposal.text, self._most_proposal_bytes(run)),
                    proposal.tokens,
                    proposal.finish,
                    own=False,
                ),
                ProposalRecord(
                    board=self.members.name(sender),
                    board_id=sender,
                    model=printable(proposal.model),
                    layer=proposal.layer,
                    prompt_tokens=proposal.prompt_tokens,
                    tokens=proposal.tokens,
                    queue_ms=proposal.queue_ms,
                    work_ms=proposal.work_ms,
                    own=False,
                    cached_tokens=min(proposal.cached_tokens, proposal.prompt_tokens),
                    prefill_ms=min(proposal.prefill_ms, proposal.work_ms),
                    model_ms=proposal.model_ms,
                    asked_at_ms=question.asked_ms - run.accepted_ms,
                    network_ms=max(now_ms - question.asked_ms - spent_ms, 0),
                    sent_bytes=question.size_bytes,
                    received_bytes=len(proposal.text.encode()),
                ),
                now_ms,
            )

    def _most_proposal_bytes(self, run: Run) -> int:
        """That a proposal is cut to, or an answer that a peer writes."""
        most_tokens = run.request.sampling.max_tokens
        return _most_bytes(most_tokens) if run.handed_over else self._proposal_bytes

    def _part_arrived(self, sender: BoardId, part: Part, now_ms: int) -> None:
        """More of a text that is being written; of one that nobody waits for, or that was not to
        be told of, it is ignored."""
        run = self.runs.get(part.request_id)
        heard = run.heard_of(sender, part.layer) if run is not None else None
        if run is None or heard is None or not heard.hear(part.start, part.text):
            return
        if run.handed_over:
            run.pieces = -(-heard.size_bytes // BYTES_PER_TOKEN)
            self._tell_text(run, shown(heard.text, run.request.sampling.stop))
            if run.told:  # it cannot be written here any more, so it may take what time there is
                run.layer_deadline_ms = min(now_ms + STALL_MS, run.deadline_ms)
        elif (
            not self.queue.running
            and run.reading in (None, sender)
            and len(heard.text) - heard.read >= READ_CHARACTERS
        ):
            self._read_ahead(run)

    def _take(self, run: Run, draft: Draft, record: ProposalRecord, now_ms: int) -> None:
        if not draft.text:
            self._leave_out(run, draft.board, "wrote nothing")
        elif run.take(draft, record):
            self._tell(run, ProposalArrived(record))
        self._close_if_settled(run, now_ms)
        if draft.text:
            self._read_ahead(run)

    def _read_ahead(self, run: Run) -> None:
        """While a layer waits for more, have the model read what is there; unless other work waits
        for the model, or may at any moment.

        A proposal that is not finished may turn out to be of no use, or not the next one: that is
        read where the model has nothing else to do at all.
        """
        free = not self.queue.waits and len(self.queue.running) < self.queue.slots
        if run.state is not State.PROPOSING or not self.engine_ready or not free:
            return
        unfinished = None if self.queue.running or run.handed_over else run.unfinished()
        strategy, conversation = self.settings.strategy, run.request.messages
        if unfinished is not None:
            unfinished.read = len(unfinished.text)
            begun = strategy.begin(conversation, run.drafts, run.room, unfinished.text)
        else:
            begun = strategy.begin(conversation, run.drafts, run.room) if run.drafts else ()
        if begun:
            run.read_ahead = True
            self._effects.append(ReadAhead(run.request.request_id, begun))

    def _read_no_further(self, run: Run) -> None:
        if run.read_ahead:
            run.read_ahead = False
            self._effects.append(ReadAhead(run.request.request_id))

    def _declined(self, sender: BoardId, message: Declined, now_ms: int) -> None:
        reason = printable(message.reason)
        self._substitute(sender, message.request_id, message.layer, reason, now_ms)

    def _leave_out(self, run: Run, board: BoardId, reason: str) -> None:
        name = self.settings.name if board == self.board_id else self.members.name(board)
        self.counters.proposers_left_out += 1
        self._tell(run, ProposerLeftOut(run.leave_out(board, name, reason)))

    def _leave_out_pending(self, run: Run, reason: str) -> None:
        for board in sorted(run.pending):
            self._call_off(run, board)
            self._leave_out(run, board, reason)

    def _call_off(self, run: Run, board: BoardId) -> None:
        request_id, layer = run.request.request_id, run.layer
        if board == self.board_id:
            self._drop(lambda work: _key(work) == (board, request_id, layer) and not work.final)
        else:
            self._send(board, Cancel(request_id, layer))

    def _close_if_settled(self, run: Run, now_ms: int) -> None:
        if run.state is State.PROPOSING and run.settled(self.settings.quorum):
            self._leave_out_pending(run, "not needed: the quorum was reached")
            self._close_layer(run, now_ms)

    def _close_layer(self, run: Run, now_ms: int) -> None:
        if run.handed_over and (run.told or (run.drafts and not self._is_cut_short(run))):
            self._give_from_afar(run, now_ms)
        elif run.layer < run.granted.layers and run.drafts:
            self._begin_layer(run, now_ms)
        else:
            self._conclude(run, now_ms)

    def _conclude(self, run: Run, now_ms: int) -> None:
        drafts = run.best_at_hand()
        conclusion = self.settings.strategy.conclude(run.request.messages, drafts, run.room)
        if isinstance(conclusion, Give):
            if conclusion.draft.is_what_was_asked(run.request.sampling, run.request.wishes):
                self._give(run, conclusion.draft, conclusion.note, now_ms)
                return
            run.notes.append(conclusion.note)
            conclusion = Write(run.request.messages, 0)
        aggregator = self._aggregator(run, conclusion, now_ms)
        if aggregator is not None:
            self._hand_over(run, conclusion, aggregator, now_ms)
            return
        if run.state is not State.CONCLUDING:
            run.move(State.CONCLUDING)
        if conclusion.drafts:
            self._tell(run, Aggregating(conclusion.drafts))
        self._queue_own(run, conclusion.messages, run.request.sampling, now_ms, final=True)

    def _aggregator(self, run: Run, write: Write, now_ms: int) -> BoardId | None:
        """The peer that is to write the answer; None for this board.

        One that is handed over comes in one piece, and is of a model that knows nothing of what
        was wished for: only what is much faster elsewhere is worth that, unless it is told so.
        """
        how = self.settings.aggregator
        if (
            how == "owner"
            or run.handed_over
            or run.state is State.CONCLUDING
            or run.request.sampling.max_tokens > self.settings.answer_max_tokens
            or run.told
            or not write.drafts
            or run.request.wishes
            or run.layer >= limits.MAX_LAYERS
        ):
            return None
        own = self.outlook(now_ms)
        outlooks = [
            self.peer_outlook(board, now_ms)
            for board in self.members.usable()
            if (report := self.members.peers[board].report) is not None and report.aggregation_ms
        ]
        if how == "strongest":
            best = min([own, *outlooks], key=lambda each: each.aggregation_ms)
        else:
            best = min([own, *outlooks], key=lambda each: each.done_ms(2))
            if own.done_ms(2) < SLOW_OWNER * best.done_ms(2):
                best = own
        return None if best is own else best.board

    def _hand_over(self, run: Run, write: Write, peer: BoardId, now_ms: int) -> None:
        """Have a peer write the answer, as a layer of its own with one proposer. What becomes of
        it otherwise, this board writes it after all, unless its user has been shown a part of it.
        """
        run.handed_over = True
        run.begin_layer([peer], now_ms, self.settings.layer_deadline_ms)
        self._tell(run, Aggregating(write.drafts, self.members.name(peer)))
        stream = run.request.streamed
        self._send_question(
            run, peer, write.messages, run.request.sampling, now_ms, is_answer=True, stream=stream
        )

    def _give_from_afar(self, run: Run, now_ms: int) -> None:
        """Answer with what a peer wrote, which has to go on from what was shown of it."""
        (board,) = run.asked
        name = self.members.name(board)
        if not run.drafts:
            reason = f"{name}, which wrote the answer, did not end it: {run.left_out[-1].reason}"
            self._fail(run, Failed("unavailable", reason))
        elif not run.drafts[0].as_answer(run.request.sampling).text.startswith(run.told):
            reason = f"{name}, which wrote the answer, ended it otherwise than it began it"
            self._fail(run, Failed("engine_failed", reason))
        else:
            cut = self._is_cut_short(run)
            note = f"{name}, which wrote the answer, writes no longer ones" if cut else ""
            self._give(run, run.drafts[0], note, now_ms)

    @staticmethod
    def _is_cut_short(run: Run) -> bool:
        """Whether an answer that was written elsewhere ends where that board does not go on."""
        draft = run.drafts[0]
        return draft.finish == "length" and draft.tokens < run.request.sampling.max_tokens

    def _queue_own(
        self,
        run: Run,
        messages: tuple[ChatMessage, ...],
        sampling: Sampling,
        now_ms: int,
        *,
        final: bool = False,
    ) -> None:
        with_drafts = messages != run.request.messages
        job = Job(
            job_id=self._take_job_id(),
            kind="aggregation" if with_drafts else "proposal",
            messages=messages,
            sampling=sampling,
            stream=final,
            wishes=run.request.wishes if final else Wishes(),
        )
        self.queue.add(
            Work(
                job=job,
                source=self.board_id,
                request_id=run.request.request_id,
                layer=run.layer,
                arrived_ms=now_ms,
                deadline_ms=run.deadline_ms,
                final=final,
                own=True,
                client=run.request.client,
                since_ms=run.accepted_ms,
                size_bytes=held_bytes(messages),
            )
        )

    # --- the ends of a prompt

    def _give(self, run: Run, draft: Draft, note: str, now_ms: int) -> None:
        """Answer with a proposal, within the bounds that were asked for."""
        draft = draft.as_answer(run.request.sampling)
        record = next((r for r in reversed(run.records) if r.board_id == draft.board), None)
        self._answer(
            run,
            now_ms,
            text=draft.text,
            finish=draft.finish,
            tokens=draft.tokens,
            queue_ms=record.queue_ms if record else 0,
            work_ms=record.work_ms if record else 0,
            note=note,
            spent=record,
        )

    def _answer(
        self,
        run: Run,
        now_ms: int,
        *,
        text: str,
        finish: Finish | Literal["deadline"],
        tokens: int,
        queue_ms: int,
        work_ms: int,
        note: str = "",
        spent: WorkDone | ProposalRecord | None = None,
        calls: tuple[ToolCall, ...] = (),
    ) -> None:
        self._tell_text(run, text)
        self._end(run, State.ANSWERED)
        self.counters.answered += 1
        self.ladder.observe(run.predicted_ms, now_ms - run.accepted_ms)
        answered = Answered(
            text=text,
            finish=finish,
            granted=run.granted,
            proposals=tuple(run.records),
            left_out=tuple(run.left_out),
            prompt_tokens=run.request.prompt_tokens,
            tokens=tokens,
            queue_ms=queue_ms,
            work_ms=work_ms,
            total_ms=now_ms - run.accepted_ms,
            note="; ".join((*run.notes, note) if note else run.notes),
            calls=calls,
        )
        if spent is not None:
            answered = msgspec.structs.replace(
                answered,
                job_tokens=spent.prompt_tokens,
                cached_tokens=spent.cached_tokens,
                prefill_ms=spent.prefill_ms,
                model_ms=spent.model_ms,
            )
        self._tell(run, answered)

    def _fail(self, run: Run, failed: Failed, state: State = State.FAILED) -> None:
        self._end(run, state)
        if state is State.CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        self._tell(run, failed)

    def _fail_or_fall_back(self, run: Run, failed: Failed, now_ms: int) -> None:
        """A proposal that is there is better than no answer, unless another text has begun or it
        is not of the form that was wished for."""
        draft = self.settings.strategy.fall_back(run.best_at_hand())
        if draft is None or run.told or run.request.wishes:
            self._fail(run, failed)
        else:
            who = self.settings.name if draft.own else self.members.name(draft.board)
            self._give(run, draft, f"{failed.reason}; this is the proposal of {who}", now_ms)

    def _deadline_passed(self, run: Run, now_ms: int) -> None:
        if run.told:
            work = next(
                (w for w in self.queue if w.final and w.request_id == run.request.request_id), None
            )
            runs = work is not None and work.started_ms >= 0
            started_ms = work.started_ms if work and runs else now_ms
            self._answer(
                run,
                now_ms,
                text=run.told,
                finish="deadline",
                tokens=run.pieces,
                queue_ms=max(started_ms - work.arrived_ms, 0) if work else 0,
                work_ms=max(now_ms - started_ms, 0),
                note="the deadline passed while the answer was being written",
            )
        else:
            reason = "the deadline passed before the answer was written"
            self._fail_or_fall_back(run, Failed("deadline_exceeded", reason), now_ms)

    def _end(self, run: Run, state: State) -> None:
        """Leave nothing behind that works for this prompt."""
        request_id = run.request.request_id
        for board in sorted(run.pending):
            if board != self.board_id:
                self._send(board, Cancel(request_id, run.layer))
        run.pending.clear()
        self._drop(lambda work: work.own and work.request_id == request_id)
        self._read_no_further(run)
        run.move(state)
        del self.runs[request_id]
        self._own_bytes -= run.footprint_bytes

    # --- work

    def _asked_for_proposal(self, sender: BoardId, ask: Propose, now_ms: int) -> None:
        key = (sender, ask.request_id, ask.layer)
        if key in self._results[sender]:
            self._send(sender, self._results[sender][key])
            return
        work = self.queue.find(lambda work: _key(work) == key)
        wait_ms = self.queue.expected_wait_ms(now_ms, own=False)
        position = len(self.queue)
        if work is None:
            settings = self.settings
            most = settings.answer_max_tokens if ask.is_answer else settings.proposal_max_tokens
            most_tokens = min(ask.sampling.max_tokens, most)
            work = Work(
                job=Job(
                    job_id=self._take_job_id(),
                    kind="proposal" if ask.layer == 1 else "aggregation",
                    messages=ask.messages,
                    sampling=msgspec.structs.replace(ask.sampling, max_tokens=most_tokens),
                    stream=ask.stream,
                ),
                source=sender,
                request_id=ask.request_id,
                layer=ask.layer,
                arrived_ms=now_ms,
                deadline_ms=now_ms + min(ask.time_left_ms, limits.MAX_PEER_JOB_MS),
                size_bytes=held_bytes(ask.messages) + self._proposal_bytes,
            )
            if ask.stream:
                work.telling = Telling(ANSWER_MS if ask.is_answer else PROPOSAL_MS)
                work.size_bytes += 2 * _most_bytes(most_tokens)  # as written, and as told
            refusal = self._peers_refusal(work, now_ms + wait_ms)
            if refusal:
                self.counters.proposals_declined += 1
                self._send(sender, Declined(ask.request_id, ask.layer, refusal, wait_ms))
                return
            self._usual_bytes[False].add(work.size_bytes)
            self.queue.add(work)
        self._send(sender, Queued(ask.request_id, ask.layer, position, wait_ms))

    def _peers_refusal(self, work: Work, turn_ms: int) -> str:
        """Why a peer's job is not taken; empty if it is.

        Where several boards are paired, one alone may hold half of the places.

        :param turn_ms: when it would be its turn.
        """
        if self.draining:
            return "this board is shutting down"
        if not self.engine_ready:
            return "its model is not ready"
        bound = self.cap(own=False)
        if self.peer_jobs() >= bound.requests:
            return f"its queue is full ({bound.requests} jobs)"
        share = bound.requests
        if len(self.members.peers) > 1:
            share = max(share // 2, 1)
        if sum(1 for each in self.queue if each.source == work.source) >= share:
            return f"its places for one board are taken ({share} jobs)"
        if size_bytes(work.job.messages) > limits.MAX_PROMPT_BYTES:
            return "the prompt is too large"
        held_bytes = self.queue.size_bytes(own=False)
        if self.peer_jobs() and held_bytes + work.size_bytes > bound.budget_bytes:
            return "its memory for peers' prompts is taken"
        # What is slow is found out by doing it, as long as nothing else waits for that.
        if len(self.queue) and self._is_too_late(work, turn_ms):
            return f"it would begin only in {(turn_ms - work.arrived_ms) / 1000:.0f} s"
        return ""

    def _is_too_late(self, work: Work, turn_ms: int) -> bool:
        """Whether a peer's job that begins then can no longer be of use, as far as is known."""
        times, kind = self.queue.times, work.job.kind
        if not self.settings.ladder or not times.is_measured(kind):
            return False
        return turn_ms + times.mean_ms(kind) > work.deadline_ms

    def _work_finished(self, work: Work, done: WorkDone, now_ms: int) -> None:
        queue_ms = max(now_ms - work.arrived_ms - done.work_ms, 0)
        if not work.own:
            self.counters.proposals_served += 1
            proposal = Proposal(
                request_id=work.request_id,
                layer=work.layer,
                text=_cut(done.text, limits.MAX_PROPOSAL_BYTES),
                model=self.engine.model if self.engine else "",
                prompt_tokens=done.prompt_tokens,
                tokens=done.tokens,
                queue_ms=queue_ms,
                work_ms=done.work_ms,
                finish=done.finish,
                cached_tokens=done.cached_tokens,
                prefill_ms=done.prefill_ms,
                model_ms=done.model_ms,
            )
            self._remember(_key(work), proposal)
            self._send(work.source, proposal)
            return
        run = self.runs[work.request_id]
        if not work.final:
            self._take(
                run,
                Draft.of(self.board_id, done.text, done.tokens, done.finish, own=True),
                ProposalRecord(
                    board=self.settings.name,
                    board_id=self.board_id,
                    model=self.engine.model if self.engine else "",
                    layer=work.layer,
                    prompt_tokens=done.prompt_tokens,
                    tokens=done.tokens,
                    queue_ms=queue_ms,
                    work_ms=done.work_ms,
                    own=True,
                    cached_tokens=done.cached_tokens,
                    prefill_ms=done.prefill_ms,
                    model_ms=done.model_ms,
                    asked_at_ms=work.arrived_ms - run.accepted_ms,
                ),
                now_ms,
            )
            return
        if not done.text.startswith(run.told):
            self._fail(run, _CHANGED)
            return
        if not done.text.strip() and run.best_at_hand() and not run.request.wishes:
            failed = Failed("engine_failed", "the aggregation came out empty")
            self._fail_or_fall_back(run, failed, now_ms)
            return
        self._answer(
            run,
            now_ms,
            text=done.text,
            finish=done.finish,
            tokens=done.tokens,
            queue_ms=queue_ms,
            work_ms=done.work_ms,
            spent=done,
            calls=done.calls,
        )

    def _work_failed(self, work: Work, failure: WorkFailed, now_ms: int) -> None:
        if not work.own:
            self._decline(_key(work), failure.reason)
            return
        run = self.runs.get(work.request_id)
        if run is None:
            return
        if not work.final:
            self._leave_out(run, self.board_id, failure.reason)
            self._close_if_settled(run, now_ms)
        elif failure.code == "context" and work.job.kind == "aggregation":
            run.room = run.room.half()  # the proposers' token counts were too hopeful
            self._conclude(run, now_ms)
        elif failure.code == "context":
            failed = Failed("context_length_exceeded", failure.reason)
            self._fail_or_fall_back(run, failed, now_ms)
        elif failure.code == "schema":
            self._fail_or_fall_back(run, Failed("schema_failed", failure.reason), now_ms)
        else:
            self._fail_or_fall_back(run, Failed("engine_failed", failure.reason), now_ms)

    def _drop_late(self, now_ms: int) -> None:
        """Let go of peers' jobs that have waited and would be of no use even if they began now."""
        late, _ = self.queue.remove(
            lambda work: (
                not work.own
                and work.started_ms < 0
                and work.arrived_ms < now_ms
                and self._is_too_late(work, now_ms)
            )
        )
        for work in late:
            self._decline(_key(work), "it was not its turn in time")

    def _decline(self, key: WorkKey, reason: str) -> None:
        sender, request_id, layer = key
        self.counters.proposals_declined += 1
        declined = Declined(request_id, layer, reason[: limits.MAX_REASON_BYTES])
        self._remember(key, declined)
        self._send(sender, declined)

    def _drop(self, unwanted: _Unwanted) -> list[Work]:
        """Take work out of the queue without a word; stop it where it runs. Returns it.

        A peer's is remembered, so that a late repetition of the question does not begin it again.
        """
        waiting, running = self.queue.remove(unwanted)
        for work in running:
            self._effects.append(StopWork(work.job.job_id))
        dropped = [*waiting, *running]
        for work in dropped:
            if not work.own:
                self._remember(_key(work), Declined(work.request_id, work.layer, "called off"))
        return dropped

    def _void(self, board: BoardId, reason: str, now_ms: int) -> None:
        """Nothing that ``board`` asked for, or was asked, stands any longer."""
        self._drop(lambda work: work.source == board)
        for run in list(self.runs.values()):
            if run.waits_for(board, run.layer):
                self._substitute(board, run.request.request_id, run.layer, reason, now_ms)

    # --- small change

    def _tell_text(self, run: Run, text: str) -> None:
        """Give the client what it does not have of the answer so far.

        After a restart of the model process the answer is written anew from its beginning, and
        only what goes on from the text already given is passed on. One that takes another turn
        is not: the prompt then fails when that attempt is finished.
        """
        logprobs = tuple(run.logprobs[run.told_logprobs :])
        if (len(text) > len(run.told) or logprobs) and text.startswith(run.told):
            self._tell(run, Text(text[len(run.told) :], logprobs))
            run.told = text
            run.told_logprobs += len(logprobs)

    def _tell(self, run: Run, event: RequestEvent) -> None:
        self._effects.append(Tell(run.request.request_id, event))

    def _send(self, to: BoardId, message: Message) -> None:
        self._effects.append(Send(to, message))

    def report(self, now_ms: int) -> Alive:
        """What this board tells the others of itself."""
        self._sequence += 1
        queue = self.queue
        batch = max(min(queue.slots, len(queue) + 1), 1)
        return Alive(
            boot=self.settings.boot,
            sequence=self._sequence,
            name=self.settings.name,
            accepting=self.engine_ready and not self.draining,
            model=self.engine.model if self.engine else "",
            waiting=queue.waits,
            running=len(queue.running),
            expected_wait_ms=queue.expected_wait_ms(now_ms, own=False),
            proposal_ms=self._told_ms("proposal", batch),
            aggregation_ms=self._told_ms("aggregation", batch),
            utilisation_permille=min(round(1000 * queue.utilisation(now_ms)), MOST_PERMILLE),
        )

    def _told_ms(self, kind: JobKind, batch: int) -> int:
        times = self.queue.times
        known = times.is_measured("proposal") or times.is_measured(kind)
        return min(round(times.mean_ms(kind, batch)), LONGEST_WAIT_MS) if known else 0

    def _heed(self, now_ms: int) -> None:
        """Do what the watch over the group wants done."""
        said, self.swim.out = self.swim.out, []
        lost, self.swim.lost = self.swim.lost, []
        for to, message in said:
            self._send(to, message)
        for board, why in lost:
            self._void(board, why, now_ms)

    def _remember(self, key: WorkKey, result: Proposal | Declined) -> None:
        results = self._results[key[0]]
        results[key] = result
        if len(results) > limits.MAX_REMEMBERED_RESULTS:
            del results[next(iter(results))]  # the oldest

    def _take_job_id(self) -> int:
        self._next_job_id += 1
        return self._next_job_id - 1

    def _settle(self, now_ms: int) -> list[Effect]:
        """Give the engine what it has room for, then hand over all effects."""
        if self.engine_ready and self.queue.waits and self.queue.jobs(own=False):
            self._drop_late(now_ms)
        while self.engine_ready and (work := self.queue.next(now_ms)) is not None:
            self._effects.append(StartWork(work.job))
            # Whatever of this board's own starts after a reading ahead is what it was ahead of.
            if work.own:
                self._read_no_further(self.runs[work.request_id])
        return self._flush()

    def _flush(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore")


def _most_bytes(tokens: int) -> int:
    return min(tokens * MOST_BYTES_PER_TOKEN, limits.MAX_PROPOSAL_BYTES)


def _key(work: Work) -> WorkKey:
    return (work.source, work.request_id, work.layer)


_CHANGED: Final = Failed(
    "engine_failed", "the model process died while it wrote the answer and could not go on from it"
)
