"""What must hold after every event of a simulated group. A violation says how to see it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from edgemoa.core.events import Accepted, Answered, Failed, Job, RequestEvent
from edgemoa.core.limits import MAX_JOB_ATTEMPTS, MAX_REMEMBERED_RESULTS
from edgemoa.core.messages import ChatMessage
from edgemoa.core.moa import State
from edgemoa.core.node import Node
from edgemoa.core.swim import REPORT_MS

if TYPE_CHECKING:
    from edgemoa.sim.world import Board, Prompt, World

CALL_OFF_MS: Final = 4_000
"""Until a proposer has heard that a prompt has ended, or of a board's restart."""
GONE_MS: Final = 20_000
"""Until everybody has found that a board is gone, at the worst: few boards, bad luck."""


class InvariantError(AssertionError):
    """Something happened that must never happen; the text says how to see it again."""


class Checks:
    """Watches a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._scenario = world.scenario

    def violated(self, what: str) -> NoReturn:
        """Raise :class:`InvariantError`."""
        world = self._world
        raise InvariantError(f"{what} (seed {world.seed}, at {world.now_ms} ms, {self._scenario})")

    def board(self, board: Board) -> None:
        """A board after something happened to it."""
        node = board.node
        if node is None:
            return
        scenario, queue, now_ms = self._scenario, node.queue, self._world.now_ms
        if scenario.own_requests is not None and len(node.runs) > scenario.own_requests:
            self.violated(f"{board.board_id} holds more prompts than its cap")
        if scenario.peer_jobs is not None and node.peer_jobs() > scenario.peer_jobs:
            self.violated(f"{board.board_id} holds more peers' jobs than its cap")
        if len(queue.running) > queue.slots or board.jobs.keys() != queue.running.keys():
            self.violated(f"{board.board_id} and its engine disagree about what runs")
        self._peers_work(board, node)
        if any(len(r) > MAX_REMEMBERED_RESULTS for r in node._results.values()):
            self.violated(f"{board.board_id} remembers more results than its cap")
        own = {work.request_id: work for work in queue if work.source == board.board_id}
        if not own.keys() <= node.runs.keys():
            self.violated(f"{board.board_id} works for a prompt that has ended")
        if not board.reads_ahead <= node.runs.keys():
            self.violated(f"{board.board_id} reads ahead for a prompt that has ended")
        if any(node.runs[each].state is State.CONCLUDING and own[each].started_ms >= 0
               for each in board.reads_ahead):  # fmt: skip
            self.violated(f"{board.board_id} reads ahead of what it reads already")
        for request_id, run in node.runs.items():
            if run.state is State.PROPOSING:
                if run.settled(scenario.quorum):
                    self.violated(f"{request_id} waits though its layer is settled")
                if now_ms > run.layer_deadline_ms + 1:
                    self.violated(f"{request_id} is past its layer's deadline")
            elif run.state is not State.CONCLUDING or request_id not in own:
                self.violated(f"{request_id} is {run.state} and nothing works for it")
            if now_ms > run.deadline_ms + 1:
                self.violated(f"{request_id} is past its deadline")

    def start(self, board: Board, job: Job) -> None:
        """A job begins: it is its turn, and it has not been done before."""
        node = board.node
        if node is None:
            return
        work = node.queue.running[job.job_id]
        if work.attempts > MAX_JOB_ATTEMPTS:
            self.violated(f"{board.board_id} tries job {job.job_id} for ever")
        first_come = node.settings.discipline == "fcfs"
        if any(
            other.arrived_ms < work.arrived_ms
            and (first_come or (other.source == work.source and not other.own))
            for other in node.queue.waiting
        ):
            self.violated(f"{board.board_id} does not serve first what came first")
        key = (work.source, work.request_id, work.layer)
        if work.source != board.board_id and work.attempts == 1:
            if key in board.computed:
                self.violated(f"{board.board_id} computes {key} twice")
            board.computed.add(key)

    def read_ahead(self, board: Board, request_id: str, messages: tuple[ChatMessage, ...]) -> None:
        """The model is told to read what will come."""
        run = board.node.runs.get(request_id) if board.node else None
        begun = run is not None and any(heard.text for heard in run.heard.values())
        there = run is not None and run.pending and (run.drafts or begun)
        if run is None or run.state is not State.PROPOSING or not there:
            self.violated(f"{board.board_id} reads ahead for {request_id} without a reason")
        if messages[: len(run.request.messages)] != run.request.messages or not all(
            draft.text in messages[-1].content for draft in run.drafts
        ):
            self.violated(f"{board.board_id} reads for {request_id} what will not come")

    def told(self, request_id: str, prompt: Prompt, event: RequestEvent) -> None:
        """Somebody who waits for an answer hears something."""
        if prompt.ended is not None:
            self.violated(f"prompt {request_id} was answered twice")
        if isinstance(event, Accepted) == prompt.accepted and not isinstance(event, Failed):
            self.violated(f"prompt {request_id} heard {type(event).__name__} out of turn")
        if isinstance(event, Answered):
            if not prompt.accepted or prompt.text != event.text:
                self.violated(f"the text told for {request_id} is not its answer")
            boards = [(r.board_id, r.layer) for r in event.proposals]
            if len(set(boards)) != len(boards):
                self.violated(f"a board proposed twice in one layer of {request_id}")

    def stopped(self, board: Board, node: Node) -> None:
        """A board has said its last words."""
        if not node.idle:
            self.violated(f"{board.board_id} stopped and left someone waiting")

    def end(self) -> None:
        """Nothing happens any more."""
        for request_id, prompt in self._world.prompts.items():
            if prompt.ended is None and not prompt.lost_with_owner:
                self.violated(f"prompt {request_id} was forgotten")

    def _peers_work(self, board: Board, node: Node) -> None:
        """Nobody works for what nobody waits for any longer."""
        scenario, world = self._scenario, self._world
        calm = not (scenario.loss or scenario.false_alarms or scenario.duplicates)
        for work in node.queue:
            if work.source == board.board_id:
                continue
            if world.now_ms > work.deadline_ms + REPORT_MS:
                self.violated(f"{board.board_id} keeps work that is past its deadline")
            owner = world.boards[work.source]
            down_ms = world.now_ms - owner.down_since_ms if owner.down_since_ms >= 0 else 0
            if down_ms > GONE_MS:
                self.violated(f"{board.board_id} works for {work.source}, which is gone")
            prompt = world.prompts[work.request_id]
            if calm and prompt.ended is not None and world.now_ms > prompt.end_ms + CALL_OFF_MS:
                self.violated(f"{board.board_id} works for {work.request_id}, which has ended")
