"""A group of boards in one process, on a virtual clock, with faults, from one seed.

Each board runs the very :class:`~edgemoa.core.node.Node` that the daemon runs. The same
:class:`Scenario` and seed give the same events in the same order, bit for bit; ``digest`` proves
it. After each event the invariants of the board that it touched are checked, and a violation
names the seed and the time that reproduce it.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal

from edgemoa.core.events import (
    Accepted,
    Answered,
    Effect,
    EngineInfo,
    Failed,
    Job,
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
from edgemoa.core.limits import MAX_JOB_ATTEMPTS, MAX_REMEMBERED_RESULTS
from edgemoa.core.membership import GONE_AFTER_MS, HEARTBEAT_MS
from edgemoa.core.messages import HOP_MESSAGES, BoardId, ChatMessage, Message, Sampling
from edgemoa.core.moa import State
from edgemoa.core.node import Node, NodeSettings

Distribution = Literal["exponential", "fixed"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. Rates are per board and second, probabilities per message."""

    boards: int = 4
    seconds: float = 60.0
    prompts_per_s: float = 0.05
    layers: int = 1
    proposers: int = 2
    service_s: tuple[float, ...] = (1.0,)  # mean service time, dealt out in turn to the boards
    distribution: Distribution = "exponential"
    slots: int = 1  # jobs that an engine works on at a time, each as fast as alone
    own_requests: int = 16
    peer_jobs: int = 32
    quorum: int = 0
    layer_deadline_s: float = 60.0
    deadline_s: float = 180.0
    delay_ms: tuple[int, int] = (1, 20)
    loss: float = 0.0
    duplicates: float = 0.0
    false_alarms: float = 0.0  # delivered, but the sender is told that it was not
    crashes_per_s: float = 0.0
    stops_per_s: float = 0.0  # in good order: drained, then stopped, then started again
    down_s: tuple[float, float] = (0.5, 30.0)
    engine_crashes_per_s: float = 0.0
    failures: float = 0.0  # jobs that the engine cannot do
    cancels: float = 0.0  # users that go away before their answer


class InvariantError(AssertionError):
    """Something happened that must never happen; the text says how to see it again."""


@dataclass(slots=True)
class Board:
    """One simulated board: its node while it is up, and its engine's running jobs."""

    board_id: BoardId
    mean_service_ms: float
    node: Node | None = None
    boot: int = 0
    engine_life: int = 0  # grows when the engine dies; results of an older life are void
    jobs: set[int] = field(default_factory=set)
    reads_ahead: set[str] = field(default_factory=set)  # for which prompts
    tick_at_ms: int = -1  # when the next tick is due; -1 for none
    down_since_ms: int = -1  # -1 while it is up
    computed: set[tuple[BoardId, str, int]] = field(default_factory=set)  # peers' work, this boot


@dataclass(slots=True)
class Prompt:
    """One prompt as its user sees it."""

    owner: BoardId
    asked_ms: int
    deadline_ms: int
    accepted: bool = False
    text: str = ""
    ended: Answered | Failed | None = None
    lost_with_owner: bool = False
    end_ms: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    events: int = 0
    asked: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    lost_with_owner: int = 0  # the owner crashed before the answer
    degraded: int = 0  # answered with less than was asked for
    left_out: int = 0
    latency_ms: list[int] = field(default_factory=list)
    mean_queue: float = 0.0  # jobs per board, averaged over time
    utilisation: float = 0.0
    digest: str = ""


class World:
    """See the module."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.now_ms = 0
        self.boards: dict[BoardId, Board] = {}
        self.prompts: dict[str, Prompt] = {}
        self.outcome = Outcome(seed)
        self._rng = Random(seed)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._hash = hashlib.sha256()
        self._until_ms = round(scenario.seconds * 1000)
        self._queue_area = 0
        self._busy_area = 0
        self._area_at_ms = 0
        self._open = 0  # prompts that have not come to their end
        self._engine = EngineInfo("simulated", context_tokens=8192, slots=scenario.slots)

    def run(self) -> Outcome:
        """Run the scenario, then let every prompt come to its end.

        :raises InvariantError: at the first thing that must not happen.
        """
        scenario = self.scenario
        for i in range(scenario.boards):
            board_id = BoardId(f"board-{i:04}")
            mean_s = scenario.service_s[i % len(scenario.service_s)]
            self.boards[board_id] = Board(board_id, mean_s * 1000)
        for board in self.boards.values():
            self._at(self._rng.randrange(1000), partial(self._start, board))
            self._next_prompt(board)
            self._next_fault(board, scenario.crashes_per_s, self._crash)
            self._next_fault(board, scenario.stops_per_s, self._stop)
            self._next_fault(board, scenario.engine_crashes_per_s, self._engine_crash)
        end_ms = self._until_ms + round(scenario.deadline_s * 1000) + 1_000
        while self._heap and self._heap[0][0] <= end_ms:
            if self.now_ms >= self._until_ms and not self._open:
                break
            now_ms, _, event = heapq.heappop(self._heap)
            self._account(now_ms)
            self.now_ms = now_ms
            self.outcome.events += 1
            event()
        for request_id, prompt in self.prompts.items():
            if prompt.ended is None and not prompt.lost_with_owner:
                self._violated(f"prompt {request_id} was forgotten")
        self._sum_up()
        return self.outcome

    # --- the driver of one node

    def _do(self, board: Board, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to=to, message=message):
                    self._carry(board, to, message)
                case StartWork(job=job):
                    self._work(board, job)
                case ReadAhead(request_id=request_id, messages=messages):
                    self._read_ahead(board, request_id, messages)
                case StopWork(job_id=job_id):
                    board.jobs.discard(job_id)
                case Tell(request_id=request_id, event=event):
                    self._told(request_id, event)
        self._check(board)
        node = board.node
        if node is not None:
            due_ms = max(node.next_deadline_ms(), self.now_ms + 1)
            if board.tick_at_ms < 0 or due_ms < board.tick_at_ms:
                board.tick_at_ms = due_ms
                self._at(due_ms, lambda: self._tick(board, node, due_ms))

    def _tick(self, board: Board, node: Node, due_ms: int) -> None:
        if board.node is node and board.tick_at_ms == due_ms:
            board.tick_at_ms = -1
            self._do(board, node.tick(self.now_ms))

    def _start(self, board: Board) -> None:
        scenario = self.scenario
        board.boot += 1
        board.tick_at_ms = -1
        board.down_since_ms = -1
        board.computed.clear()
        node = Node(
            board.board_id,
            NodeSettings(
                name=board.board_id,
                boot=board.boot,
                own_requests=scenario.own_requests,
                peer_jobs=scenario.peer_jobs,
                quorum=scenario.quorum,
                layer_deadline_ms=round(scenario.layer_deadline_s * 1000),
            ),
            Random(self._rng.getrandbits(64)),
        )
        board.node = node
        self._note("start", board.board_id, board.boot)
        for other in self.boards:
            if other != board.board_id:
                self._do(board, node.pair(other, other, self.now_ms))
        self._do(board, node.engine_is_ready(self._engine, self.now_ms))

    def _crash(self, board: Board) -> None:
        if board.node is None:
            return
        self._note("crash", board.board_id, board.boot)
        for request_id in board.node.runs:
            self.prompts[request_id].lost_with_owner = True
            self._open -= 1
        self._go_down(board)

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
            if not node.idle:
                self._violated(f"{board.board_id} stopped and left someone waiting")
            self._go_down(board)

        self._in(2_000, last_words)

    def _go_down(self, board: Board) -> None:
        board.node = None
        board.engine_life += 1
        board.jobs.clear()
        board.reads_ahead.clear()
        board.down_since_ms = self.now_ms
        low, high = self.scenario.down_s
        self._in(round(self._rng.uniform(low, high) * 1000), lambda: self._start(board))

    # --- users

    def _next_prompt(self, board: Board) -> None:
        rate = self.scenario.prompts_per_s
        if rate <= 0:
            return
        at_ms = self.now_ms + round(self._rng.expovariate(rate) * 1000)
        if at_ms < self._until_ms:
            self._at(at_ms, lambda: self._ask(board))

    def _ask(self, board: Board) -> None:
        self._next_prompt(board)
        node = board.node
        if node is None:
            return
        scenario = self.scenario
        deadline_ms = round(scenario.deadline_s * 1000)
        request = Request(
            request_id=f"request-{len(self.prompts):06}",
            messages=(ChatMessage("user", "why?"),),
            prompt_tokens=10,
            layers=scenario.layers,
            proposers=scenario.proposers,
            sampling=Sampling(),
            deadline_ms=deadline_ms,
        )
        prompt = Prompt(board.board_id, self.now_ms, self.now_ms + deadline_ms)
        self.prompts[request.request_id] = prompt
        self._open += 1
        self._do(board, node.submit(request, self.now_ms))
        if self._rng.random() < scenario.cancels:
            patience_ms = self._rng.randrange(1, 5_000)
            self._in(patience_ms, lambda: self._give_up(board, node, request.request_id))

    def _give_up(self, board: Board, node: Node, request_id: str) -> None:
        if board.node is node:
            self._do(board, node.cancel(request_id, self.now_ms))

    def _told(self, request_id: str, event: RequestEvent) -> None:
        prompt = self.prompts[request_id]
        self._note("tell", request_id, type(event).__name__)
        if prompt.ended is not None:
            self._violated(f"prompt {request_id} was answered twice")
        if isinstance(event, Accepted) == prompt.accepted and not isinstance(event, Failed):
            self._violated(f"prompt {request_id} heard {type(event).__name__} out of turn")
        match event:
            case Accepted():
                prompt.accepted = True
            case Text(text=text):
                prompt.text += text
            case Answered():
                self._open -= 1
                if not prompt.accepted or prompt.text != event.text:
                    self._violated(f"the text told for {request_id} is not its answer")
                boards = [(r.board_id, r.layer) for r in event.proposals]
                if len(set(boards)) != len(boards):
                    self._violated(f"a board proposed twice in one layer of {request_id}")
                prompt.ended, prompt.end_ms = event, self.now_ms
            case Failed():
                self._open -= 1
                prompt.ended, prompt.end_ms = event, self.now_ms
            case _:
                pass

    # --- the network

    def _carry(self, board: Board, to: BoardId, message: Message) -> None:
        scenario, rng = self.scenario, self._rng
        target = self.boards[to]
        link = (board.boot, target.boot)  # which ends with either boot
        hop = isinstance(message, HOP_MESSAGES)
        delay_ms = rng.randint(*scenario.delay_ms)
        if scenario.loss:
            lost = 0
            while lost < (1 if hop else 4) and rng.random() < scenario.loss:
                lost += 1
            if hop and lost:
                return
            delay_ms += (0, 100, 300, 1_000, 3_000)[lost]
            if lost == 4:
                self._in(delay_ms, lambda: self._undelivered(board, to, message))
                return
        if target.node is None:
            if not hop:
                self._in(3_000, lambda: self._undelivered(board, to, message))
            return
        copies = 1 + (rng.random() < scenario.duplicates)
        for copy in range(copies):
            late_ms = delay_ms + copy * rng.randint(1, 2_000)
            self._in(late_ms, lambda: self._deliver(board, target, link, message))
        if not hop and rng.random() < scenario.false_alarms:
            self._in(delay_ms + 1_000, lambda: self._undelivered(board, to, message))

    def _deliver(
        self, sender: Board, target: Board, link: tuple[int, int], message: Message
    ) -> None:
        if sender.node is None and self.now_ms > sender.down_since_ms + self.scenario.delay_ms[1]:
            return  # the dead do not repeat what was lost
        if target.node is not None and (sender.boot, target.boot) == link:
            what = f"{sender.board_id} {type(message).__name__}"
            self._note("receive", target.board_id, what)
            self._do(target, target.node.receive(sender.board_id, message, self.now_ms))

    def _undelivered(self, board: Board, to: BoardId, message: Message) -> None:
        if board.node is not None:
            self._do(board, board.node.undelivered(to, message, self.now_ms))

    # --- the engines

    def _work(self, board: Board, job: Job) -> None:
        rng, mean_ms = self._rng, board.mean_service_ms
        exponential = self.scenario.distribution == "exponential"
        work_ms = round(rng.expovariate(1 / mean_ms) if exponential else mean_ms)
        board.jobs.add(job.job_id)
        self._check_start(board, job)
        life = board.engine_life
        if rng.random() < self.scenario.failures:
            self._in(work_ms, lambda: self._work_failed(board, life, job))
            return
        text = f"{board.board_id} on {len(job.messages[-1].content)} characters, as it sees it"
        if job.stream:
            half_ms = work_ms // 2
            self._in(half_ms, lambda: self._wrote(board, life, job, text[: len(text) // 2]))
        self._in(work_ms, lambda: self._work_done(board, life, job, text, work_ms))

    def _read_ahead(self, board: Board, request_id: str, messages: tuple[ChatMessage, ...]) -> None:
        if not messages:
            board.reads_ahead.discard(request_id)
            return
        node = board.node
        run = node.runs.get(request_id) if node else None
        if run is None or run.state is not State.PROPOSING or not (run.drafts and run.pending):
            self._violated(f"{board.board_id} reads ahead for {request_id} without a reason")
        elif messages[: len(run.request.messages)] != run.request.messages or not all(
            draft.text in messages[-1].content for draft in run.drafts
        ):
            self._violated(f"{board.board_id} reads for {request_id} what will not come")
        board.reads_ahead.add(request_id)

    def _at_work(self, board: Board, life: int, job: Job) -> Node | None:
        alive = board.engine_life == life and job.job_id in board.jobs
        return board.node if alive else None

    def _wrote(self, board: Board, life: int, job: Job, text: str) -> None:
        if node := self._at_work(board, life, job):
            self._do(board, node.wrote(job.job_id, text, self.now_ms))

    def _work_done(self, board: Board, life: int, job: Job, text: str, work_ms: int) -> None:
        if node := self._at_work(board, life, job):
            board.jobs.discard(job.job_id)
            tokens = len(text) // 4
            done = WorkDone(text, "stop", prompt_tokens=10, tokens=tokens,
                            prefill_ms=0, decode_ms=work_ms, model_ms=work_ms)  # fmt: skip
            self._do(board, node.finished(job.job_id, done, self.now_ms))

    def _work_failed(self, board: Board, life: int, job: Job) -> None:
        if node := self._at_work(board, life, job):
            board.jobs.discard(job.job_id)
            self._do(board, node.failed(job.job_id, WorkFailed("broken"), self.now_ms))

    def _engine_crash(self, board: Board) -> None:
        node = board.node
        if node is None or not node.engine_ready:
            return
        self._note("engine crash", board.board_id, board.engine_life)
        board.engine_life += 1
        board.jobs.clear()
        board.reads_ahead.clear()
        self._do(board, node.engine_is_lost(self.now_ms))
        self._in(1_000, lambda: self._engine_back(board, node))

    def _engine_back(self, board: Board, node: Node) -> None:
        if board.node is node:
            self._do(board, node.engine_is_ready(self._engine, self.now_ms))

    def _next_fault(self, board: Board, rate: float, fault: Callable[[Board], None]) -> None:
        if rate <= 0:
            return
        at_ms = self.now_ms + 1 + round(self._rng.expovariate(rate) * 1000)
        if at_ms < self._until_ms:

            def strike() -> None:
                fault(board)
                self._next_fault(board, rate, fault)

            self._at(at_ms, strike)

    # --- what must hold

    def _check(self, board: Board) -> None:
        node = board.node
        if node is None:
            return
        scenario, queue = self.scenario, node.queue
        if len(node.runs) > scenario.own_requests:
            self._violated(f"{board.board_id} holds more prompts than its cap")
        if node.peer_jobs() > scenario.peer_jobs:
            self._violated(f"{board.board_id} holds more peers' jobs than its cap")
        if len(queue.running) > queue.slots or board.jobs != queue.running.keys():
            self._violated(f"{board.board_id} and its engine disagree about what runs")
        self._check_peers_work(board, node)
        if any(len(r) > MAX_REMEMBERED_RESULTS for r in node._results.values()):
            self._violated(f"{board.board_id} remembers more results than its cap")
        own = {work.request_id: work for work in queue if work.source == board.board_id}
        if not own.keys() <= node.runs.keys():
            self._violated(f"{board.board_id} works for a prompt that has ended")
        if not board.reads_ahead <= node.runs.keys():
            self._violated(f"{board.board_id} reads ahead for a prompt that has ended")
        if any(node.runs[each].state is State.CONCLUDING and own[each].started_ms >= 0
               for each in board.reads_ahead):  # fmt: skip
            self._violated(f"{board.board_id} reads ahead of what it reads already")
        for request_id, run in node.runs.items():
            if run.state is State.PROPOSING:
                if run.settled(scenario.quorum):
                    self._violated(f"{request_id} waits though its layer is settled")
                if self.now_ms > run.layer_deadline_ms + 1:
                    self._violated(f"{request_id} is past its layer's deadline")
            elif run.state is not State.CONCLUDING or request_id not in own:
                self._violated(f"{request_id} is {run.state} and nothing works for it")
            if self.now_ms > run.deadline_ms + 1:
                self._violated(f"{request_id} is past its deadline")

    def _check_start(self, board: Board, job: Job) -> None:
        """A job begins: it is its turn, and it has not been done before."""
        node = board.node
        if node is None:
            return
        work = node.queue.running[job.job_id]
        if work.attempts > MAX_JOB_ATTEMPTS:
            self._violated(f"{board.board_id} tries job {job.job_id} for ever")
        if any(w.arrived_ms < work.arrived_ms for w in node.queue.waiting):
            self._violated(f"{board.board_id} does not serve first what came first")
        key = (work.source, work.request_id, work.layer)
        if work.source != board.board_id and work.attempts == 1:
            if key in board.computed:
                self._violated(f"{board.board_id} computes {key} twice")
            board.computed.add(key)

    def _check_peers_work(self, board: Board, node: Node) -> None:
        """Nobody works for what nobody waits for any longer."""
        calm = not (self.scenario.loss or self.scenario.false_alarms or self.scenario.duplicates)
        for work in node.queue:
            if work.source == board.board_id:
                continue
            if self.now_ms > work.deadline_ms + HEARTBEAT_MS:
                self._violated(f"{board.board_id} keeps work that is past its deadline")
            owner = self.boards[work.source]
            down_ms = self.now_ms - owner.down_since_ms if owner.down_since_ms >= 0 else 0
            if down_ms > GONE_AFTER_MS + 2 * HEARTBEAT_MS:
                self._violated(f"{board.board_id} works for {work.source}, which is gone")
            prompt = self.prompts[work.request_id]
            if calm and prompt.ended is not None and self.now_ms > prompt.end_ms + CALL_OFF_MS:
                self._violated(f"{board.board_id} works for {work.request_id}, which has ended")

    def _violated(self, what: str) -> None:
        raise InvariantError(f"{what} (seed {self.seed}, at {self.now_ms} ms, {self.scenario})")

    # --- the clock and the books

    def _at(self, at_ms: int, event: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at_ms, self._order, event))

    def _in(self, delay_ms: int, event: Callable[[], None]) -> None:
        self._at(self.now_ms + delay_ms, event)

    def _note(self, what: str, where: str, detail: object) -> None:
        self._hash.update(f"{self.now_ms} {what} {where} {detail}\n".encode())

    def _account(self, now_ms: int) -> None:
        # Queue lengths change by events only: weigh the lengths of now with the time until then.
        if now_ms == self._area_at_ms or now_ms > self._until_ms:
            return
        waited_ms = now_ms - self._area_at_ms
        for board in self.boards.values():
            if board.node is not None:
                self._queue_area += waited_ms * (len(board.node.queue.waiting) + len(board.jobs))
                self._busy_area += waited_ms * bool(board.jobs)
        self._area_at_ms = now_ms

    def _sum_up(self) -> None:
        out = self.outcome
        for prompt in self.prompts.values():
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
                case Failed(code="overloaded") if not prompt.accepted:
                    out.refused += 1
                case Failed():
                    out.failed += 1
                case None:
                    out.lost_with_owner += 1
        board_ms = max(self._area_at_ms, 1) * max(len(self.boards), 1)
        out.mean_queue = self._queue_area / board_ms
        out.utilisation = self._busy_area / board_ms
        out.digest = self._hash.hexdigest()


CALL_OFF_MS = 4_000  # until a proposer has heard that a prompt has ended, or of a board's restart
