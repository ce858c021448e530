"""A group of boards in one process, on a virtual clock, with faults, from one seed.

Each board runs the very :class:`~edgemoa.core.node.Node` that the daemon runs. The same
:class:`Scenario` and seed give the same events in the same order, bit for bit; ``digest`` proves
it. With ``checks``, the invariants of the board that an event touched are checked after it, and a
violation names the seed and the time that reproduce it. Without, texts are not composed and what
has ended is forgotten: the same group, many times as fast.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from edgemoa.core.events import (
    Accepted,
    Answered,
    Effect,
    EngineInfo,
    Failed,
    Job,
    LayerStarted,
    ReadAhead,
    Request,
    RequestEvent,
    Send,
    StartWork,
    StopWork,
    Tell,
    Text,
    WorkDone,
    WorkFailed,
)
from edgemoa.core.messages import HOP_MESSAGES, Alive, BoardId, ChatMessage, Message, Sampling
from edgemoa.core.moa import Conclusion, Draft, Give, Room, Synthesis, Write
from edgemoa.core.node import Node, NodeSettings
from edgemoa.sim.checks import Checks, InvariantError
from edgemoa.sim.engines import Ask, Batch, Need, Recorded, Timed
from edgemoa.sim.scenario import PARTS, Arrival, Outcome, Scenario
from edgemoa.sim.table import Table, TableMembership, TableSwim

__all__ = ["InvariantError", "Outcome", "Scenario", "World"]

CONTEXT_TOKENS: Final = 8192
LINK_MS: Final = (20, 500)  # from the start of a board until it has found another
KEEP_ALIVE_MS: Final = 11_000  # until a link ends whose other end is simply not there any more
SETTLED_MS: Final = 5_000  # when all boards have heard each other, and a burst may come
PROGRESS_EVENTS: Final = 50_000  # from one to the next word about progress
NEVER_MS: Final = 2**62

_PROMPT: Final = (ChatMessage("user", "why?"),)
_PROPOSAL: Final = ChatMessage("assistant", "a proposal")
_GREEDY: Final = Sampling()


@dataclass(slots=True, eq=False)
class Board:
    """One simulated board: its node while it is up, and its engine's running jobs."""

    board_id: BoardId
    place: int
    law: Timed | Recorded
    batch: Batch | None  # None where jobs come one at a time
    node: Node | None = None
    boot: int = 0
    engine_life: int = 0  # grows when the engine dies; results of an older life are void
    jobs: dict[int, _Started] = field(default_factory=dict)
    reads_ahead: set[str] = field(default_factory=set)  # for which prompts
    links: dict[BoardId, int] = field(default_factory=dict)  # with which boot of whom
    tick_at_ms: int = -1  # when the next tick is due; -1 for none
    down_since_ms: int = -1  # -1 while it is up
    computed: set[tuple[BoardId, str, int]] = field(default_factory=set)  # peers' work, this boot
    # The books: how much there is to do since when, and the sums up to then.
    queued: int = 0
    busy: bool = False
    since_ms: int = 0
    queue_area: int = 0
    busy_area: int = 0
    # The table's report of it, and in which of its intervals it was taken.
    report: Alive | None = None
    interval: int = -1


@dataclass(slots=True)
class _Started:
    job: Job
    began_ms: int
    need: Need
    text: str
    fails: bool


@dataclass(slots=True)
class Prompt:
    """One prompt as its user sees it. Sizes in tokens of 0 are the usual ones."""

    owner: BoardId
    asked_ms: int
    prompt_tokens: int = 0
    answer_tokens: int = 0
    accepted: bool = False
    text: str = ""
    ended: Answered | Failed | None = None
    lost_with_owner: bool = False
    end_ms: int = 0


class Wordless:
    """The paper's way of making prompts of proposals, but for the words: a message for each."""

    def propose(
        self, conversation: Sequence[ChatMessage], previous: Sequence[Draft], room: Room
    ) -> tuple[ChatMessage, ...]:
        """The conversation, and the proposals of the layer before."""
        return (*conversation, *(_PROPOSAL,) * len(previous))

    def begin(
        self,
        conversation: Sequence[ChatMessage],
        drafts: Sequence[Draft],
        room: Room,
        begun: str = "",
    ) -> tuple[ChatMessage, ...]:
        """Nothing is read ahead."""
        return ()

    def conclude(
        self, conversation: Sequence[ChatMessage], drafts: Sequence[Draft], room: Room
    ) -> Conclusion:
        """As :class:`~edgemoa.core.moa.Synthesis` decides."""
        if len(drafts) == 1 and drafts[0].own:
            return Give(drafts[0], "no peer's proposal arrived: the board's own answer")
        return Write(self.propose(conversation, drafts, room), len(drafts))

    def fall_back(self, drafts: Sequence[Draft]) -> Draft | None:
        """As :class:`~edgemoa.core.moa.Synthesis` decides."""
        return next((draft for draft in drafts if draft.own), drafts[0] if drafts else None)


class World:
    """See the module."""

    def __init__(self, scenario: Scenario, seed: int, *, checks: bool = True) -> None:
        self.scenario = scenario
        self.seed = seed
        self.now_ms = 0
        self.boards: dict[BoardId, Board] = {}
        self.prompts: dict[str, Prompt] = {}
        self.outcome = Outcome(seed)
        self._checks = Checks(self) if checks else None
        self._strategy = Synthesis() if checks else Wordless()
        self._rng = Random(seed)
        self._random = self._rng.random
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._hash = hashlib.sha256()
        self._warm_ms = round(scenario.warm_up_s * 1000)
        self._until_ms = round(scenario.seconds * 1000)
        self._asked = 0
        self._open = 0  # prompts that have not come to their end
        self._stale = 0  # what came off the queue and did not count any more
        self._jobs = 0  # at all boards
        self._part_ms = max((self._until_ms - self._warm_ms) / PARTS, 1.0)
        self._parts = [0.0] * PARTS
        self._parts_at_ms = self._warm_ms
        self._perfect = not scenario.has_faults
        self._low_ms, self._spread_ms = (
            scenario.delay_ms[0],
            1 + scenario.delay_ms[1] - scenario.delay_ms[0],
        )
        self._table: Table | None = None
        self._age_ms = round(scenario.report_age_s * 1000)
        # Where nothing depends on reports, none is taken but the first.
        settings = NodeSettings("", 0, **scenario.node)
        self._looks = settings.ladder or settings.pick != "uniform"
        self._watched = scenario.reports == "table" and self._age_ms > 0 and self._looks
        self._reported: list[Board] = []

    def run(self, progress: Callable[[float], None] = lambda _: None) -> Outcome:
        """Run the scenario, then let every prompt come to its end. What an interrupt from the
        keyboard leaves is told with ``unfinished`` prompts, and the time up to then.

        :param progress: is told the share of the time that has passed, now and then.
        :raises InvariantError: at the first thing that must not happen.
        """
        self._set_up()
        heap, pop = self._heap, heapq.heappop
        end_ms = self._until_ms + round(self.scenario.deadline_s * 1000) + 1_000
        handled = 0
        try:
            while heap and heap[0][0] <= end_ms:
                if heap[0][0] >= self._until_ms and not self._open:
                    break
                self.now_ms, _, event, arguments = pop(heap)
                handled += 1
                event(*arguments)
                if handled % PROGRESS_EVENTS == 0:
                    progress(min(self.now_ms / self._until_ms, 1.0))
        except KeyboardInterrupt:
            self._until_ms = min(self._until_ms, self.now_ms)
            self.outcome.interrupted = True
        else:
            if self._checks is not None:
                self._checks.end()
        self.outcome.events = handled - self._stale
        self._sum_up()
        return self.outcome

    def _set_up(self) -> None:
        scenario = self.scenario
        for i in range(scenario.boards):
            board_id = BoardId(f"board-{i:04}")
            law: Timed | Recorded
            if scenario.recordings:
                law = Recorded(scenario, scenario.recordings[i % len(scenario.recordings)])
            else:
                law = Timed(scenario, scenario.service_s[i % len(scenario.service_s)])
            batch = Batch(law.overhead) if law.slots > 1 else None
            self.boards[board_id] = Board(board_id, i, law, batch)
        self._reported = list(self.boards.values())
        if scenario.reports == "table":
            self._table = Table(list(self.boards), self._report)
        for board in self._reported:
            self._at(0 if self._table else self._rng.randrange(1000), self._start, board)
        for board in self._reported:
            for _ in range(scenario.burst):
                self._at(0 if self._table else SETTLED_MS, self._ask, board)
            if not scenario.replay:
                self._next_prompt(board)
            self._next_fault(board, scenario.crashes_per_s, self._crash)
            self._next_fault(board, scenario.stops_per_s, self._stop)
            self._next_fault(board, scenario.engine_crashes_per_s, self._engine_crash)
        self._next_replayed(0)

    # --- the driver of one node

    def _do(self, board: Board, effects: list[Effect]) -> None:
        node = board.node
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                self._carry(board, effect.to, effect.message)  # type: ignore[union-attr]
            elif kind is Tell:
                event = effect.event  # type: ignore[union-attr]
                self._told(effect.request_id, event)  # type: ignore[union-attr]
                if node is not None and type(event) in (Accepted, LayerStarted):
                    self._expect(board, node, effect.request_id)  # type: ignore[union-attr]
            elif kind is StartWork:
                self._work(board, effect.job)  # type: ignore[union-attr]
            elif kind is StopWork:
                self._stop_work(board, effect.job_id)  # type: ignore[union-attr]
            elif kind is ReadAhead:
                self._read_ahead(board, effect.request_id, effect.messages)  # type: ignore[union-attr]
        if node is None:
            return
        self._count(board, len(node.queue), bool(board.jobs))
        if self._checks is not None:
            self._checks.board(board)
        if board.tick_at_ms < 0 or self._checks is not None:
            self._arm(board, node, node.next_deadline_ms())

    def _expect(self, board: Board, node: Node, request_id: str) -> None:
        """Deadlines begin with these words alone: no need to look at those of all prompts."""
        run = node.runs.get(request_id)
        if run is not None:
            layer_ms = run.layer_deadline_ms or run.deadline_ms
            self._arm(board, node, min(run.deadline_ms, layer_ms))

    def _arm(self, board: Board, node: Node, due_ms: int) -> None:
        due_ms = max(due_ms, self.now_ms + 1)
        if due_ms < NEVER_MS and (board.tick_at_ms < 0 or due_ms < board.tick_at_ms):
            board.tick_at_ms = due_ms
            self._at(due_ms, self._tick, board, node, due_ms)

    def _tick(self, board: Board, node: Node, due_ms: int) -> None:
        if board.node is node and board.tick_at_ms == due_ms:
            board.tick_at_ms = -1
            if self._watched:
                self._touch(board)
            self._do(board, node.tick(self.now_ms))
            if board.node is node:
                self._arm(board, node, node.next_deadline_ms())
        else:
            self._stale += 1

    def _start(self, board: Board) -> None:
        board.boot += 1
        board.tick_at_ms = -1
        board.down_since_ms = -1
        board.computed.clear()
        random = Random(self._rng.getrandbits(64))
        node = Node(board.board_id, self._settings(board), random, self.now_ms)
        board.node = node
        self._note("start", board.board_id, board.boot)
        info = self._engine_info(board)
        if self._table is not None:
            node.members = TableMembership(self._table, board.place)
            node.swim = TableSwim(board.board_id, board.boot, node.members, rng=random,
                                  report=node.report, now_ms=self.now_ms)  # fmt: skip
            self._do(board, node.engine_is_ready(info, self.now_ms))
            return
        for other in self.boards:
            if other != board.board_id:
                self._do(board, node.pair(other, other, self.now_ms))
        self._do(board, node.engine_is_ready(info, self.now_ms))
        for peer in self._reported:
            if peer.node is not None and peer is not board:
                link_ms = self._rng.randint(*LINK_MS)
                self._in(link_ms, self._link, board, board.boot, peer, peer.boot)

    def _link(self, one: Board, boot: int, other: Board, other_boot: int) -> None:
        """Two boards have found each other, if both are still the same."""
        if (one.boot, other.boot) != (boot, other_boot):
            return
        if one.node is None or other.node is None:
            return
        one.links[other.board_id], other.links[one.board_id] = other_boot, boot
        self._do(one, one.node.linked(other.board_id, other_boot, self.now_ms))
        if other.node is not None:
            self._do(other, other.node.linked(one.board_id, boot, self.now_ms))

    def _unlink(self, board: Board, boot: int, other: BoardId, other_boot: int) -> None:
        """A board notices that a link has ended."""
        if board.node is not None and (board.boot, board.links.get(other)) == (boot, other_boot):
            del board.links[other]
            self._do(board, board.node.unlinked(other, self.now_ms))

    def _engine_info(self, board: Board) -> EngineInfo:
        return EngineInfo(
            "simulated",
            context_tokens=CONTEXT_TOKENS,
            slots=board.law.slots,
            reads_ahead=self.scenario.streams,
        )

    def _settings(self, board: Board) -> NodeSettings:
        scenario = self.scenario
        return NodeSettings(
            **{
                "name": board.board_id,
                "boot": board.boot,
                "own_requests": scenario.own_requests,
                "peer_jobs": scenario.peer_jobs,
                "quorum": scenario.quorum,
                "layer_deadline_ms": round(scenario.layer_deadline_s * 1000),
                "strategy": self._strategy,
                **scenario.node,
            }
        )

    def _crash(self, board: Board) -> None:
        if board.node is None:
            return
        self._note("crash", board.board_id, board.boot)
        for request_id in board.node.runs:
            self.prompts[request_id].lost_with_owner = True
            self._open -= 1
        # A process that dies leaves a system that says so, unless the power has failed.
        self._go_down(board, self._rng.choice((self.scenario.delay_ms[1], KEEP_ALIVE_MS)))

    def _stop(self, board: Board) -> None:
        """What SIGTERM does: drain, a little patience, the last words."""
        node = board.node
        if node is None or node.draining:
            return
        self._note("stop", board.board_id, board.boot)
        self._do(board, node.drain(self.now_ms))

        def last_words() -> None:
            if board.node is not node:
                return
            self._do(board, node.stop(self.now_ms))
            if self._checks is not None:
                self._checks.stopped(board, node)
            self._go_down(board, self.scenario.delay_ms[1])

        self._in(2_000, last_words)

    def _go_down(self, board: Board, noticed_ms: int) -> None:
        """:param noticed_ms: after which the others' ends of its links end."""
        board.node = None
        board.links.clear()
        for other in self._reported:
            if other is not board and other.node is not None:
                self._in(noticed_ms, self._unlink, other, other.boot, board.board_id, board.boot)
        self._engine_dies(board)
        self._count(board, 0, busy=False)
        board.down_since_ms = self.now_ms
        low, high = self.scenario.down_s
        self._in(round(self._rng.uniform(low, high) * 1000), self._start, board)

    # --- the table of reports

    def _touch(self, board: Board) -> None:
        """Something is about to happen to a board: what it reported up to now is known now."""
        # Phases are spread evenly, and neighbours' are far apart.
        phase_ms = self._age_ms * (board.place * 382 % 1000) // 1000
        interval = (self.now_ms + phase_ms) // self._age_ms
        if interval != board.interval:
            board.interval = interval
            self._take_report(board, max(interval * self._age_ms - phase_ms, 0))

    def _report(self, place: int) -> Alive | None:
        board = self._reported[place]
        if self._watched:
            self._touch(board)
        elif self._looks or board.report is None:
            self._take_report(board, self.now_ms)
        return board.report

    def _take_report(self, board: Board, at_ms: int) -> None:
        if board.node is not None:
            board.report = board.node.report(at_ms)

    # --- users

    def _next_prompt(self, board: Board) -> None:
        rate = self.scenario.rate_of(board.place)
        if rate <= 0:
            return
        at_ms = self.now_ms + round(self._rng.expovariate(rate) * 1000)
        if at_ms < self._until_ms:
            self._at(at_ms, self._ask_and_go_on, board)

    def _ask_and_go_on(self, board: Board) -> None:
        self._next_prompt(board)
        self._ask(board)

    def _next_replayed(self, number: int) -> None:
        replay = self.scenario.replay
        if number < len(replay):
            at_ms = round(replay[number].time_s * 1000)
            if at_ms < self._until_ms:
                self._at(max(at_ms, self.now_ms), self._replay, number)

    def _replay(self, number: int) -> None:
        arrival = self.scenario.replay[number]
        self._next_replayed(number + 1)
        place = arrival.board if arrival.board >= 0 else number
        self._ask(self._reported[place % len(self._reported)], arrival)

    def _ask(self, board: Board, arrival: Arrival | None = None) -> None:
        node = board.node
        if node is None:
            return
        scenario = self.scenario
        prompt = Prompt(board.board_id, self.now_ms)
        if arrival is not None:
            prompt.prompt_tokens, prompt.answer_tokens = (
                arrival.prompt_tokens,
                arrival.answer_tokens,
            )
        request = Request(
            request_id=f"request-{self._asked:06}",
            messages=_PROMPT,
            prompt_tokens=prompt.prompt_tokens or 10,
            layers=scenario.layers,
            proposers=scenario.proposers,
            sampling=_GREEDY,
            deadline_ms=round(scenario.deadline_s * 1000),
            streamed=scenario.streams,
        )
        self._asked += 1
        self.prompts[request.request_id] = prompt
        self._open += 1
        if self._watched:
            self._touch(board)
        self._do(board, node.submit(request, self.now_ms))
        if scenario.cancels and self._random() < scenario.cancels:
            patience_ms = self._rng.randrange(1, 5_000)
            self._in(patience_ms, self._give_up, board, node, request.request_id)

    def _give_up(self, board: Board, node: Node, request_id: str) -> None:
        if board.node is node:
            if self._watched:
                self._touch(board)
            self._do(board, node.cancel(request_id, self.now_ms))

    def _told(self, request_id: str, event: RequestEvent) -> None:
        kind = type(event)
        if self._checks is None and kind is not Answered and kind is not Failed:
            return
        prompt = self.prompts[request_id]
        self._note("tell", request_id, kind.__name__)
        if self._checks is not None:
            self._checks.told(request_id, prompt, event)
        match event:
            case Accepted():
                prompt.accepted = True
            case Text(text=text):
                prompt.text += text
            case Answered() | Failed():
                self._open -= 1
                prompt.ended, prompt.end_ms = event, self.now_ms
                if self._checks is None:
                    self._tally(prompt)
                    del self.prompts[request_id]
            case _:
                pass

    # --- the network

    def _carry(self, board: Board, to: BoardId, message: Message) -> None:
        target = self.boards[to]
        link = (board.boot, board.links.get(to, target.boot))  # which ends with either boot
        delay_ms = self._low_ms + int(self._random() * self._spread_ms)
        if self._perfect:
            if target.node is not None:
                self._at(self.now_ms + delay_ms, self._deliver, board, target, link, message)
            return
        scenario, rng = self.scenario, self._rng
        hop = isinstance(message, HOP_MESSAGES)
        if scenario.loss:
            lost = 0
            while lost < (1 if hop else 4) and rng.random() < scenario.loss:
                lost += 1
            if hop and lost:
                return
            delay_ms += (0, 100, 300, 1_000, 3_000)[lost]
            if lost == 4:
                self._in(delay_ms, self._undelivered, board, to, message)
                return
        if target.node is None or to not in board.links or link[1] != target.boot:
            if not hop:
                self._in(3_000, self._undelivered, board, to, message)
            return
        copies = 1 + (rng.random() < scenario.duplicates)
        for copy in range(copies):
            late_ms = delay_ms + copy * rng.randint(1, 2_000)
            self._in(late_ms, self._deliver, board, target, link, message)
        if not hop and rng.random() < scenario.false_alarms:
            self._in(delay_ms + 1_000, self._undelivered, board, to, message)

    def _deliver(
        self, sender: Board, target: Board, link: tuple[int, int], message: Message
    ) -> None:
        if sender.node is None and self.now_ms > sender.down_since_ms + self.scenario.delay_ms[1]:
            return  # the dead do not repeat what was lost
        if target.node is not None and (sender.boot, target.boot) == link:
            if self._checks is not None:
                what = f"{sender.board_id} {type(message).__name__}"
                self._note("receive", target.board_id, what)
            if self._watched:
                self._touch(target)
            self._do(target, target.node.receive(sender.board_id, message, self.now_ms))

    def _undelivered(self, board: Board, to: BoardId, message: Message) -> None:
        if board.node is not None:
            self._do(board, board.node.undelivered(to, message, self.now_ms))

    # --- the engines

    def _work(self, board: Board, job: Job) -> None:
        node = board.node
        if node is None:
            return
        work = node.queue.running[job.job_id]
        ask = Ask(job.kind, job.stream, self._drafts(job))
        if self.scenario.replay and (prompt := self.prompts.get(work.request_id)) is not None:
            ask = Ask(job.kind, job.stream, ask.drafts, prompt.prompt_tokens, prompt.answer_tokens)
        need = board.law.draw(self._rng, ask)
        fails = self.scenario.failures > 0 and self._random() < self.scenario.failures
        started = _Started(job, self.now_ms, need, "", fails)
        board.jobs[job.job_id] = started
        if self._checks is not None:
            self._checks.start(board, job)
            self._compose(board, started)
        else:
            started.text = "an answer"
        if board.batch is None:
            end_ms = self.now_ms + round(need.model_ms)
            self._at(end_ms, self._work_ends, board, board.engine_life, job.job_id)
        else:
            board.batch.start(job.job_id, need.model_ms, self.now_ms)
            self._rebatch(board, board.batch)

    def _drafts(self, job: Job) -> int:
        """How many proposals a job reads."""
        if job.kind == "proposal":
            return 0
        if self._checks is None:
            return len(job.messages) - len(_PROMPT)
        return self.scenario.proposers + 1

    def _compose(self, board: Board, started: _Started) -> None:
        """A text of its own for a job that is watched, half of it told on the way."""
        job = started.job
        started.text = text = (
            f"{board.board_id} on {len(job.messages[-1].content)} characters, as it sees it"
        )
        if job.stream and not started.fails:
            half_ms = int(started.need.model_ms) // 2
            life, half = board.engine_life, text[: len(text) // 2]
            self._in(half_ms, self._wrote, board, life, job.job_id, half)

    def _stop_work(self, board: Board, job_id: int) -> None:
        board.jobs.pop(job_id, None)
        if board.batch is not None and board.batch.stop(job_id, self.now_ms) is not None:
            self._rebatch(board, board.batch)

    def _rebatch(self, board: Board, batch: Batch) -> None:
        """Who runs has changed, and with it when the next one is done."""
        batch.turn += 1
        end_ms = batch.next_end_ms(self.now_ms)
        if end_ms is not None:
            self._at(end_ms, self._batch_ends, board, batch, batch.turn)

    def _batch_ends(self, board: Board, batch: Batch, turn: int) -> None:
        ended = batch.ended(self.now_ms) if batch.turn == turn else None
        if ended is None:
            self._stale += 1
            return
        share_ms = batch.stop(ended.job_id, self.now_ms)
        started = board.jobs.pop(ended.job_id)
        self._report_end(board, started, share_ms or 0.0)
        if batch.turn == turn:  # nothing came in its place
            self._rebatch(board, batch)

    def _work_ends(self, board: Board, life: int, job_id: int) -> None:
        if board.engine_life != life or job_id not in board.jobs:
            self._stale += 1
            return
        started = board.jobs.pop(job_id)
        self._report_end(board, started, self.now_ms - started.began_ms)

    def _report_end(self, board: Board, started: _Started, share_ms: float) -> None:
        node = board.node
        if node is None:
            return
        if self._watched:
            self._touch(board)
        job_id, need = started.job.job_id, started.need
        if started.fails:
            self._do(board, node.failed(job_id, WorkFailed("broken"), self.now_ms))
            return
        work_ms = self.now_ms - started.began_ms
        done = WorkDone(started.text, "stop", need.prompt_tokens, need.tokens,
                        prefill_ms=0, decode_ms=work_ms, model_ms=round(share_ms))  # fmt: skip
        self._do(board, node.finished(job_id, done, self.now_ms))

    def _wrote(self, board: Board, life: int, job_id: int, text: str) -> None:
        if board.engine_life == life and job_id in board.jobs and board.node is not None:
            self._do(board, board.node.wrote(job_id, text, self.now_ms))
        else:
            self._stale += 1

    def _read_ahead(self, board: Board, request_id: str, messages: tuple[ChatMessage, ...]) -> None:
        if not messages:
            board.reads_ahead.discard(request_id)
            return
        if self._checks is not None:
            self._checks.read_ahead(board, request_id, messages)
        board.reads_ahead.add(request_id)

    def _engine_crash(self, board: Board) -> None:
        node = board.node
        if node is None or not node.engine_ready:
            return
        self._note("engine crash", board.board_id, board.engine_life)
        self._engine_dies(board)
        self._do(board, node.engine_is_lost(self.now_ms))
        self._in(1_000, self._engine_back, board, node)

    def _engine_dies(self, board: Board) -> None:
        board.engine_life += 1
        board.jobs.clear()
        board.reads_ahead.clear()
        if board.batch is not None:
            board.batch.clear()

    def _engine_back(self, board: Board, node: Node) -> None:
        if board.node is node:
            info = self._engine_info(board)
            self._do(board, node.engine_is_ready(info, self.now_ms))

    def _next_fault(self, board: Board, rate: float, fault: Callable[[Board], None]) -> None:
        if rate <= 0:
            return
        at_ms = self.now_ms + 1 + round(self._rng.expovariate(rate) * 1000)
        if at_ms < self._until_ms:

            def strike() -> None:
                fault(board)
                self._next_fault(board, rate, fault)

            self._at(at_ms, strike)

    # --- the clock and the books

    def _at(self, at_ms: int, event: Callable[..., None], *arguments: object) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at_ms, self._order, event, arguments))

    def _in(self, delay_ms: int, event: Callable[..., None], *arguments: object) -> None:
        self._at(self.now_ms + delay_ms, event, *arguments)

    def _note(self, what: str, where: str, detail: object) -> None:
        self._hash.update(f"{self.now_ms} {what} {where} {detail}\n".encode())

    def _count(self, board: Board, queued: int, busy: bool) -> None:
        """So much is to be done at a board from now on."""
        if queued == board.queued and busy == board.busy:
            return
        self._close_books(board)
        self._pass()
        self._jobs += queued - board.queued
        board.queued, board.busy = queued, busy

    def _close_books(self, board: Board) -> None:
        """Weigh a board's queue with the time that it stayed so."""
        until_ms = min(self.now_ms, self._until_ms)
        passed_ms = until_ms - max(board.since_ms, self._warm_ms)
        if passed_ms > 0:
            board.queue_area += passed_ms * board.queued
            board.busy_area += passed_ms * board.busy
        board.since_ms = self.now_ms

    def _pass(self) -> None:
        """The same for all boards together, by parts of the time."""
        until_ms = min(self.now_ms, self._until_ms)
        at_ms = float(self._parts_at_ms)
        while at_ms < until_ms:
            part = min(int((at_ms - self._warm_ms) / self._part_ms), PARTS - 1)
            end_ms = self._warm_ms + (part + 1) * self._part_ms if part < PARTS - 1 else until_ms
            end_ms = min(max(end_ms, at_ms + 1e-3), until_ms)
            self._parts[part] += (end_ms - at_ms) * self._jobs
            at_ms = end_ms
        self._parts_at_ms = max(self._parts_at_ms, until_ms)

    def _tally(self, prompt: Prompt) -> None:
        """Count a prompt that has come to its end, or will not."""
        out = self.outcome
        if prompt.asked_ms < self._warm_ms:
            return
        out.asked += 1
        match prompt.ended:
            case Answered() as answered:
                out.answered += 1
                out.latency_ms.append(prompt.end_ms - prompt.asked_ms)
                out.left_out += len(answered.left_out)
                granted = answered.granted
                out.degraded += bool(answered.note or answered.left_out or granted.why)
            case Failed(code="cancelled"):
                out.cancelled += 1
            case Failed(code="overloaded") if self._checks is None or not prompt.accepted:
                out.refused += 1
            case Failed():
                out.failed += 1
            case None if prompt.lost_with_owner:
                out.lost_with_owner += 1
            case None:
                out.unfinished += 1

    def _sum_up(self) -> None:
        out = self.outcome
        for prompt in self.prompts.values():
            self._tally(prompt)
        for board in self.boards.values():
            self._close_books(board)
        self._pass()
        measured_ms = max(self._until_ms - self._warm_ms, 1)
        boards = list(self.boards.values())
        out.seconds = self._until_ms / 1000
        out.queues = [board.queue_area / measured_ms for board in boards]
        out.utilisations = [board.busy_area / measured_ms for board in boards]
        out.mean_queue = sum(out.queues) / max(len(boards), 1)
        out.utilisation = sum(out.utilisations) / max(len(boards), 1)
        out.queue_over_time = [area / self._part_ms / max(len(boards), 1) for area in self._parts]
        self._note("end", str(out.events), out.latency_ms[-1:])
        out.digest = self._hash.hexdigest()
